"""What an exported folder cannot hold, said before anything is written: linear by linear, with the nearest that can.

Dynamic activations are measured by the reader: for a symmetric token compressed-tensors, and so transformers, takes
2 max|x| / (2^b - 1) where vLLM and SGLang take max|x| / (2^(b-1) - 1), none clips, and the file cannot say otherwise.
So the reader must be known, and another grid is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import jax.numpy as jnp
import numpy as np

from convert import gptq
from convert.quantized import linear_shapes
from convert.transforms import can_describe
from jquant.activations import PerToken, TensorQuantizer, TokenQuantizer
from jquant.errors import ConversionError
from jquant.formats import (
    PermutedTensor,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedSpqrTensor,
    PreparedWideTensor,
    QuantizedTensor,
    UniformTensor,
)
from jquant.kv import ExactKv, Float8Kv
from jquant.models import Attention, LazyModel, Linear, blocks, get

type ExportFormat = Literal["compressed-tensors", "gptq", "safetensors", "gguf"]
type Consumer = Literal["transformers", "vllm", "gptqmodel", "sglang", "llama.cpp"]

_TOKEN_GRIDS: Final[Mapping[str, str]] = {
    "transformers": "symmetric_full",
    "vllm": "symmetric",
    "sglang": "symmetric",
}
_PREPARED: Final = (
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedWideTensor,
    PreparedBinaryTensor,
    PreparedSpqrTensor,
)
_NARROWER: Final[Mapping[str, tuple[str, ...]]] = {"float32": ("bfloat16", "float16")}
_ALONE: Final = ("o_proj", "down_proj")  # linears that vLLM does not fuse
_GPTQ_MULTIPLE: Final = 32  # inputs and outputs fill whole words at every width
_SHOWN: Final = 3  # paths named for one reason


def check_export(model: LazyModel, format: ExportFormat, consumer: Consumer, dtype: str) -> None:
    """Refuses what a format, or the reader that it is meant for, cannot hold.

    Args:
      model: what shall be written.
      format: the format.
      consumer: who shall read it.
      dtype: of the arrays that are not packed.

    Raises:
      ConversionError: something cannot be held; every reason is given, with where and with what to do.
    """
    found: dict[str, list[str]] = {}
    for path, reason in _refusals(model, format, consumer, dtype):
        found.setdefault(reason, []).append(path)
    if found:
        listed = "\n  ".join(f"{_listed(paths)}: {reason}" for reason, paths in found.items())
        raise ConversionError(f"{format} for {consumer} cannot hold this model:\n  {listed}")


def _refusals(lazy: LazyModel, format: ExportFormat, consumer: Consumer, dtype: str) -> Iterator[tuple[str, str]]:
    model = lazy.abstract
    if consumer == "gptqmodel" and format == "compressed-tensors":
        yield "format", "gptqmodel reads gptq; export for transformers or vllm, or as gptq"
    if (consumer == "llama.cpp") != (format == "gguf"):
        yield "format", "llama.cpp reads gguf, and gguf is written for it alone; name both, or neither"
    kept = {type(block.self_attn.kv_codec) for block in blocks(model)}
    for index, block in enumerate(blocks(model)):
        for reason in _of_cache(block.self_attn, kept, format):
            yield f"layers.{index}.self_attn", reason
    kinds = set()
    for path in linear_shapes(model.config):
        linear: Linear = get(model, path)
        kernel: Any = linear.kernel
        if linear.input_rotation is not None:
            yield from _of_rotation(path, linear, format, consumer)
        if isinstance(kernel.inner if isinstance(kernel, PermutedTensor) else kernel, _PREPARED):
            laid = "its weight lies as a GPU's kernels read it, some scales rounded"
            yield path, f"{laid}; write it back first: jquant.prepare(model, Target.REFERENCE)"
            continue
        yield from _of_activations(path, linear, format, consumer)
        if isinstance(kernel, QuantizedTensor) and format != "safetensors":
            yield from _of_weight(lazy, path, format, dtype)
        elif linear.input_quantizer is not None and not isinstance(kernel, QuantizedTensor):
            yield path, "its input is quantized but its weight is not, which no format here can say"
        kinds.add(_kind(kernel))
        if format == "gptq" and isinstance(kernel, QuantizedTensor) == (path == "lm_head"):
            yield path, "gptq quantizes all linears of all blocks and not the head; nearest: compressed-tensors"
    kinds.discard(_kind(None))
    if format not in ("safetensors", "gguf") and not kinds:
        yield "layers", f"nothing is quantized, so that nothing would be {format}; nearest: safetensors"
    if format == "gptq" and len(kinds) > 1:
        yield (
            "layers",
            "its linears differ in bits, groups or symmetry, gptq has one for all; nearest: compressed-tensors",
        )


def _of_cache(attention: Attention, kept: set[type], format: str) -> Iterator[str]:
    codec = attention.kv_codec
    if isinstance(codec, ExactKv):
        return
    if not isinstance(codec, Float8Kv) or format != "compressed-tensors":
        name = type(codec).__name__
        nearest = "; nearest: calibrate_float8_kv with compressed-tensors" if not isinstance(codec, Float8Kv) else ""
        yield f"its KV cache is {name}, which {format} cannot say{nearest}, or quantize without the pass that sets it"
    elif len(kept) > 1 or codec.prompt == "exact":
        yield "its KV cache is float8, but not in all layers, or not for prompts too, as readers have it"
    elif attention.query_key_rotation is not None:
        yield "its KV cache holds rotated keys, which readers do not rotate; rotate without parts: [keys]"


def _of_rotation(path: str, linear: Linear, format: str, consumer: str) -> Iterator[tuple[str, str]]:
    assert linear.input_rotation is not None, "asked before"
    online = f"its input is rotated online ({linear.input_rotation.describe()})"
    nearest = "nearest: rotations that fold away alone, rotate with parts: [residual]"
    if format != "compressed-tensors" or consumer != "vllm":
        why = f"which {consumer} does not do with {format}"
        if (format, consumer) == ("compressed-tensors", "transformers"):
            why = "and transformers 5.23 reads transform_config without applying it"
        yield path, f"{online}, {why}; {nearest}, or compressed-tensors for vllm"
    elif path.rpartition(".")[2] not in _ALONE:
        yield path, f"{online}; vLLM fuses it with others and rotates {' and '.join(_ALONE)}; {nearest}"
    elif not can_describe(linear) or not isinstance(linear.kernel, QuantizedTensor):
        yield path, f"{online}; vLLM does so by Hadamard matrices, in packed linears without bias; {nearest}"


def _of_activations(path: str, linear: Linear, format: str, consumer: str) -> Iterator[tuple[str, str]]:
    quantizer = linear.input_quantizer
    if quantizer is None:
        return
    if format != "compressed-tensors":
        yield path, f"its input is quantized, which {format} cannot say; nearest: compressed-tensors"
        return
    if isinstance(quantizer, TensorQuantizer):
        return
    if not isinstance(quantizer, TokenQuantizer):
        name = type(quantizer.method).__name__
        yield path, f"its input is quantized by {name}, which no format here holds; it stays a jquant checkpoint"
        return
    method: PerToken = quantizer.method
    own = _TOKEN_GRIDS.get(consumer, "")
    fits = (own,) if method.group_size is not None or consumer == "sglang" else (own, "asymmetric")
    if method.symmetry not in fits or method.clip_ratio != 1:
        given = f"symmetry {method.symmetry}, clip_ratio {method.clip_ratio}"
        wanted = f"symmetry {' or '.join(fits)}, clip_ratio 1.0"
        yield path, f"its tokens have grids by {given}, but {consumer} measures by {wanted}; quantize with those"


def _of_weight(model: LazyModel, path: str, format: str, dtype: str) -> Iterator[tuple[str, str]]:
    kernel: Any = get(model.abstract, path).kernel
    permuted = isinstance(kernel, PermutedTensor)
    inner = kernel.inner if permuted else kernel
    if not isinstance(inner, UniformTensor):
        name = type(inner).__name__
        yield path, f"its weight is a {name}, which {format} cannot hold; nearest: safetensors, dequantized"
        return
    if format == "gguf":
        if permuted:
            yield path, "its groups follow the activation order, which gguf cannot say; nearest: gptq"
        return  # whether a block holds it is seen from its numbers
    bits, (inputs, outputs) = inner.format.bits, inner.shape
    if format == "compressed-tensors":
        if permuted:
            order = "its groups follow the activation order (PermutedTensor), which compressed-tensors has given up"
            yield path, f"{order}; nearest: gptq, or solve with groups: static"
        if bits == 1:
            yield path, "its codes have 1 bit, compressed-tensors is written with 2 to 8; nearest: safetensors"
    else:
        if bits not in gptq.BITS:
            yield (
                path,
                f"its codes have {bits} bits, gptq has {', '.join(map(str, gptq.BITS))}; nearest: compressed-tensors",
            )
        if inputs % _GPTQ_MULTIPLE or outputs % _GPTQ_MULTIPLE:
            yield (
                path,
                f"its shape {inputs} x {outputs} is no multiple of 32, as gptq wants; nearest: compressed-tensors",
            )
    for target in ("float16", dtype) if format == "gptq" else (dtype,):  # readers take them in the model's dtype
        if not _holds(target, model, f"{path}.kernel.inner.scales" if permuted else f"{path}.kernel.scales"):
            stored = format == "gptq" and target == "float16"
            other = "nearest: compressed-tensors" if stored else "export with --dtype float16 or float32 and run in it"
            scales = f"its scales ({inner.scales.dtype}) are not all {target} numbers, as which they would be read"
            yield path, f"{scales}; quantize with --set '*.scale_dtype={target}', or {other}"
            return


def _holds(dtype: str, model: LazyModel, path: str) -> bool:
    if str(get(model.abstract, path).dtype) in (dtype, *_NARROWER.get(dtype, ())):
        return True  # and is not read
    host = np.asarray(model.read(path))
    with np.errstate(over="ignore"):
        return np.array_equal(host.astype(jnp.dtype(dtype)).astype(np.float32), host.astype(np.float32))


def _kind(kernel: Any) -> Any:
    """Returns what GPTQ says once for all linears."""
    permuted = isinstance(kernel, PermutedTensor)
    inner = kernel.inner if permuted else kernel
    if not isinstance(inner, UniformTensor):
        return None
    return inner.format.bits, inner.format.group_size, inner.zeros is None, permuted


def _listed(paths: list[str]) -> str:
    rest = len(paths) - _SHOWN
    return ", ".join(paths[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
