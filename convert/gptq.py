"""GPTQ folders, as AutoGPTQ and GPTQModel write them: both versions both ways, 2, 3, 4 and 8 bits.

For a linear M of shape (in, out), b bits and G groups, w[i, o] = scales[g[i], o] * (u[i, o] - z[g[i], o]):

    M.qweight  int32 [in b / 32, out]   codes u, a dense bit stream along inputs
    M.qzeros   int32 [G, out b / 32]    zeros, packed along outputs: z - 1 in version 1 ("gptq"), z in version 2
    M.scales   float16 [G, out]
    M.g_idx    int32 [in]               the group of each input; i // group_size unless desc_act

Version 1 adds 1 to whole words when it is read, so that the 2^b - 1 that a zero of 0 becomes carries into its
neighbour: asymmetric grids are written as version 2, and such a zero in a file of version 1 is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final, override

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from convert import words
from convert.packed import (
    FLOATS,
    PackedScheme,
    Slot,
    abstract_uniform,
    codes_of_stream,
    permute,
    read_flag,
    stream_along_inputs,
    uniform_of_arrays,
    zeros_of,
)
from jquant.errors import ConversionError
from jquant.formats import PermutedTensor, UniformFormat, UniformTensor
from jquant.models import Linear
from jquant.numerics import packed_length

type GptqVersion = Literal["gptq", "gptq_v2"]

BITS: Final = (2, 3, 4, 8)  # those that readers share; GPTQModel alone has others, in a layout of its own
_DAMPING: Final = 0.01  # readers want one between 0 and 1; what the solve used is in recipe.yaml


@final
@dataclass(frozen=True)
class GptqScheme(PackedScheme):
    """One linear of a GPTQ folder.

    Attributes:
      format: bits, groups and symmetry; None as group size is one group.
      version: how zeros are stored.
      reordered: whether inputs belong to groups in another order than their own (desc_act with groups).
    """

    format: UniformFormat
    version: GptqVersion
    reordered: bool = False

    @override
    def slots(self, shape: tuple[int, int]) -> Mapping[str, Slot]:
        inputs, outputs = shape
        bits, groups = self.format.bits, self.format.groups(inputs)
        return {
            "qweight": Slot((words.word_count(inputs, bits), outputs), ("I32",)),
            "qzeros": Slot((groups, words.word_count(outputs, bits)), ("I32",)),
            "scales": Slot((groups, outputs), FLOATS),
            "g_idx": Slot((inputs,), ("I32",)),
        }

    @override
    def decode(self, arrays: Mapping[str, Shaped[np.ndarray, "..."]], shape: tuple[int, int]) -> Linear:
        inputs, outputs = shape
        scales = np.ascontiguousarray(arrays["scales"])
        format = UniformFormat(self.format.bits, self.format.group_size, self.format.symmetry, str(scales.dtype))  # type: ignore[arg-type]
        stream = words.bytes_of_words(arrays["qweight"], packed_length(inputs, format.bits))
        kernel: Any = uniform_of_arrays(stream, scales, self._zeros(arrays["qzeros"], outputs), format, shape)
        if self.reordered:
            kernel = permute(kernel, arrays["g_idx"])
            return Linear(kernel)
        size = inputs // format.groups(inputs)
        if (arrays["g_idx"] != np.arange(inputs) // size).any():
            raise ConversionError("its g_idx reorders inputs, yet desc_act is false in the configuration")
        return Linear(kernel)

    @override
    def abstract(self, shape: tuple[int, int], scale_dtype: str) -> Linear:
        format = UniformFormat(self.format.bits, self.format.group_size, self.format.symmetry, scale_dtype)  # type: ignore[arg-type]
        kernel: Any = abstract_uniform(format, shape)
        order: Any = jax.ShapeDtypeStruct((shape[0], 1), jnp.dtype("int32"))
        if self.reordered:
            kernel = PermutedTensor(inner=kernel, order=order, shape=shape)
        return Linear(kernel)

    def encode(self, linear: Linear) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the tensors that stand for a linear, by what follows its name; `decode` undoes it.

        Args:
          linear: its kernel is a `UniformTensor` of this scheme's format, permuted if the scheme reorders.
        """
        kernel: Any = linear.kernel
        inner = kernel.inner if isinstance(kernel, PermutedTensor) else kernel
        assert isinstance(inner, UniformTensor), "refused before"
        inputs, bits = inner.shape[0], self.format.bits
        stream, groups = np.asarray(inner.codes), np.arange(inputs, dtype=np.int32) // (inputs // inner.scales.shape[0])
        if isinstance(kernel, PermutedTensor):
            place = np.argsort(np.asarray(kernel.order)[:, 0])
            stream = stream_along_inputs(codes_of_stream(stream, bits, inputs)[place], bits)
            groups = groups[place]
        zeros = zeros_of(inner)
        return {
            "qweight": words.words_of_bytes(stream),
            "qzeros": words.pack_words(words.lower_zeros(zeros, bits) if self.version == "gptq" else zeros, bits),
            "scales": np.asarray(inner.scales).astype(np.float16),
            "g_idx": groups,
        }

    def describe(self) -> dict[str, Any]:
        """Returns the `quantization_config` of a folder whose linears all have this scheme."""
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": self.format.bits,
            "group_size": self.format.group_size or -1,
            "desc_act": self.reordered,
            "sym": self.format.symmetry != "asymmetric",
            "lm_head": False,
            "checkpoint_format": self.version,
            "format": self.version,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": _DAMPING,
            "meta": {"quantizer": ["jquant"]},
        }

    def _zeros(self, packed: np.ndarray, outputs: int) -> np.ndarray | None:
        bits, symmetric = self.format.bits, self.format.symmetry != "asymmetric"
        stored = words.unpack_words(np.ascontiguousarray(packed), bits, outputs)
        zeros = words.raise_zeros(stored, bits) if self.version == "gptq" else stored
        if not symmetric:
            if self.version == "gptq" and (stored == 2**bits - 1).any():
                raise ConversionError(
                    f"its qzeros hold {2**bits - 1}, which readers of version 1 take for different zeros "
                    "(0, 2^bits, or a neighbour changed); get the checkpoint as gptq_v2"
                )
            return zeros
        if (zeros != 2 ** (bits - 1)).any():
            raise ConversionError(f"its qzeros are not all {2 ** (bits - 1)}, yet sym is true in the configuration")
        return None


def read_schemes(config: Mapping[str, Any], names: Sequence[str], packed: frozenset[str]) -> dict[str, GptqScheme]:
    """Reads a `quantization_config`.

    Args:
      config: the section of config.json.
      names: Hugging Face names of all linears.
      packed: the names that have packed tensors in the folder.

    Returns:
      The scheme of each quantized linear, by its name.

    Raises:
      ConversionError: the section is incomplete, or asks for what is not built here; it is named.
    """
    bits, size = config.get("bits"), config.get("group_size")
    version: Any = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(bits, int) or bits not in BITS or not isinstance(size, int) or size == 0 or size < -1:
        raise ConversionError(f"bits {bits!r} with group_size {size!r}: bits {', '.join(map(str, BITS))} are read")
    if version not in ("gptq", "gptq_v2"):
        raise ConversionError(f"checkpoint_format {version!r} is not supported; supported: gptq, gptq_v2")
    if any(not str(key).startswith("-:") for key in config.get("dynamic") or {}):
        raise ConversionError("its dynamic section gives linears settings of their own, which are not read")
    symmetric = read_flag(config, "sym", default=True)
    format = UniformFormat(bits, None if size == -1 else size, "symmetric_full" if symmetric else "asymmetric")
    reordered = read_flag(config, "desc_act", default=False) and size != -1
    return {name: GptqScheme(format, version, reordered) for name in names if name in packed}
