"""A foreign checkpoint into the tree: check every header first, then read one tensor at a time."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from convert.base import Header, Source
from convert.kv_cache import abstract_codec, expected_scales, has_float8_cache, read_codec
from convert.names import hf_name, is_transposed
from convert.packed import PackedScheme, Slot
from convert.quantized import linear_name, linear_shapes, read_linear, read_packing
from convert.source import open_source
from jquant.errors import ConversionError
from jquant.models import LazyModel, Llama, LlamaConfig, build, get, put

type StoredDtype = Literal["auto", "float32", "bfloat16", "float16"]

_BUFFER: Final = re.compile(
    r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"
)  # old exports keep it; recomputed
_CODEC: Final = "self_attn.kv_codec"
_BLOCK: Final = r"layers\.\d+"
_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "model.embed_tokens.weight"
_KERNEL: Final = ".kernel"
_WEIGHT: Final = ".weight"
_BIAS: Final = ".bias"  # AutoGPTQ writes one for every linear, zeros where the model has none
_SCALES: Final = ("scale", "scales")  # how the name of a packed linear's scales ends
_LISTED: Final = 20  # problems spelt out in one message


def load_model(path: str | Path, *, dtype: StoredDtype = "auto") -> Llama:
    """Loads a model of the Llama family into the tree.

    Linears that compressed-tensors, GPTQ or AWQ have packed stay packed, as nodes of the tree.

    Args:
      path: a Hugging Face folder with safetensors, a .gguf file, or a hub id.
      dtype: of every array that is not packed; "auto" leaves each tensor in the dtype it is stored in (float32 for
        GGUF).

    Returns:
      The model, with kernels [in, out].

    Raises:
      ConversionError: files are missing or damaged, the model needs what is not built here, tensors are missing,
        surplus or misshapen (all are listed), or a weight is not finite.
    """
    source = open_source(path)
    config, packing = check_source(source)
    check_tied(source, config)

    def make(node: str, shape: tuple[int, ...]) -> Any:
        return None if node.removesuffix(_KERNEL) in packing else read_array(source, node, dtype)

    model = build(config, make)
    shapes = linear_shapes(config)
    for linear, scheme in packing.items():
        read = read_linear(source, linear, scheme, shapes[linear])
        model = put(model, linear, dataclasses.replace(read, bias=get(model, linear).bias))
    for index in range(config.num_hidden_layers if has_float8_cache(source) else 0):
        model = put(model, f"{_layer(index)}.{_CODEC}", read_codec(source, index))
    return model


def abstract_model(path: str | Path, dtype: StoredDtype = "auto") -> Llama:
    """Returns what `load_model` would, with `jax.ShapeDtypeStruct` in place of arrays; reads headers only.

    Raises:
      ConversionError: as `load_model`, as far as headers show.
    """
    source = open_source(path)
    return _abstract(source, *check_source(source), dtype)


def lazy_model(path: str | Path, *, dtype: StoredDtype = "auto") -> LazyModel:
    """Opens what `load_model` loads, and leaves its arrays where they are until they are asked for.

    Raises:
      ConversionError: as `load_model`, as far as headers show; reading an array may raise it too.
    """
    source = open_source(path)
    config, packing = check_source(source)
    check_tied(source, config)
    abstract, shapes = _abstract(source, config, packing, dtype), linear_shapes(config)

    def read(node: str) -> Any:
        if node.endswith(_CODEC) and has_float8_cache(source):
            return read_codec(source, int(node.split(".")[1]))
        linear = next((name for name in packing if f"{node}.".startswith(f"{name}.")), None)
        if linear is None:
            found, places = get(abstract, node), [name for name in packing if name.startswith(f"{node}.")]
            if has_float8_cache(source) and re.fullmatch(_BLOCK, node):
                places.append(f"{node}.{_CODEC}")
            for place in places:
                found = put(found, place.removeprefix(f"{node}."), read(place))
            return jax.tree_util.tree_map_with_path(
                lambda part, leaf: read_array(source, _join(node, part), dtype) if _is_abstract(leaf) else leaf, found
            )
        bias = None if get(abstract, linear).bias is None else read_array(source, f"{linear}.bias", dtype)
        whole = dataclasses.replace(read_linear(source, linear, packing[linear], shapes[linear]), bias=bias)
        return whole if node == linear else get(whole, node.removeprefix(f"{linear}."))

    return LazyModel(abstract, read)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _join(node: str, part: Any) -> str:
    rest = jax.tree_util.keystr(part, simple=True, separator=".")
    return f"{node}.{rest}" if rest else node


def _abstract(source: Source, config: LlamaConfig, packing: Mapping[str, PackedScheme], dtype: StoredDtype) -> Llama:
    def make(node: str, shape: tuple[int, ...]) -> Any:
        if node.removesuffix(_KERNEL) in packing:
            return None
        return jax.ShapeDtypeStruct(shape, jnp.dtype(_resolve(dtype, source.headers[hf_name(node)])))

    model = build(config, make)
    shapes = linear_shapes(config)
    for linear, scheme in packing.items():
        scales = next(slot for slot in scheme.slots(shapes[linear]) if slot.endswith(_SCALES))
        read = scheme.abstract(shapes[linear], source.headers[f"{linear_name(linear)}.{scales}"].dtype)
        model = put(model, linear, dataclasses.replace(read, bias=get(model, linear).bias))
    for index in range(config.num_hidden_layers if has_float8_cache(source) else 0):
        model = put(model, f"{_layer(index)}.{_CODEC}", abstract_codec())
    return model


def _layer(index: int) -> str:
    return f"layers.{index}"


def check_source(source: Source) -> tuple[LlamaConfig, Mapping[str, PackedScheme]]:
    """Returns the configuration of a checkpoint and how its linears are packed; headers alone are looked at.

    Raises:
      ConversionError: tensors are missing, surplus, misshapen or unreadable (all are listed), or the configuration asks
        for what is not built here.
    """
    config = LlamaConfig.from_hf(source.config)
    packing = read_packing(source, config)
    expected = _expected(config, packing)
    if has_float8_cache(source):
        expected |= {name: Slot((1,)) for name in expected_scales(config)}
    missing = sorted(expected.keys() - source.headers.keys())
    surplus = [name for name in sorted(source.headers.keys() - expected.keys()) if not _is_harmless(name, config)]
    empty = [name for name in surplus if packing and name.endswith(_BIAS) and not source.read(name).any()]
    problems = [
        *_listing("missing", missing),
        *[f"surplus: {name}{_file(source, name)}" for name in surplus if name not in empty],
        *_misfits(expected, source),
    ]
    if problems:
        shown = "\n  ".join(problems[:_LISTED])
        rest = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConversionError(
            f"{source.location}: {len(problems)} tensors are not what its configuration ({config.model_type}, "
            f"{config.num_hidden_layers} layers) asks for; check that both come from the same model:\n  {shown}{rest}"
        )
    return config, packing


def _expected(config: LlamaConfig, packing: Mapping[str, PackedScheme]) -> dict[str, Slot]:
    expected: dict[str, Slot] = {}

    def note(node: str, shape: tuple[int, ...]) -> Any:
        scheme = packing.get(node.removesuffix(_KERNEL))
        if scheme is not None:
            name = hf_name(node).removesuffix(_WEIGHT)
            expected.update({f"{name}.{suffix}": slot for suffix, slot in scheme.slots((shape[0], shape[1])).items()})
        else:
            expected[hf_name(node)] = Slot(shape[::-1] if is_transposed(node) else shape)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    build(config, note)
    return expected


def _listing(word: str, names: list[str]) -> list[str]:
    return [f"{word}: {name}" for name in names]


def _misfits(expected: Mapping[str, Slot], source: Source) -> list[str]:
    misfits = []
    for name in sorted(expected.keys() & source.headers.keys()):
        shape, dtype = source.headers[name]
        if shape != expected[name].shape:
            asked = list(expected[name].shape)
            misfits.append(f"misshapen: {name} is {list(shape)}, expected {asked}{_file(source, name)}")
        if dtype not in expected[name].dtypes:
            misfits.append(
                f"unreadable: {name} is {dtype}, expected one of {', '.join(expected[name].dtypes)}"
                f"{_file(source, name)}"
            )
    return misfits


def _file(source: Source, name: str) -> str:
    return f", in {source.files[name].name}" if name in source.files else ""


def _is_harmless(name: str, config: LlamaConfig) -> bool:
    return bool(_BUFFER.fullmatch(name)) or (name == _HEAD and config.tie_word_embeddings)


def check_tied(source: Source, config: LlamaConfig) -> None:
    """Refuses a head that is stored beside the embedding that it is tied to, and differs.

    Raises:
      ConversionError: they differ.
    """
    if not (config.tie_word_embeddings and _HEAD in source.headers):
        return
    if not np.array_equal(source.read(_HEAD), source.read(_EMBEDDING)):
        raise ConversionError(
            f"{source.location}: tie_word_embeddings is true, yet {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false in config.json to use both, or remove the tensor that is not meant"
        )


def read_array(source: Source, node: str, dtype: StoredDtype = "auto") -> Shaped[Array, "..."]:
    """Reads one array of the tree that is not packed.

    Args:
      source: the opened checkpoint.
      node: its path, as `jquant.models.build` spells it.
      dtype: as of `load_model`.

    Raises:
      ConversionError: a value is not finite, or does not fit in the dtype.
    """
    name, transposed = hf_name(node), is_transposed(node)
    stored = source.read(name)
    with np.errstate(over="ignore"):  # what overflows is found below, and named
        values = stored.astype(_resolve(dtype, source.headers[name]), copy=False)
    if not np.isfinite(values).all():
        place = [int(index) for index in np.argwhere(~np.isfinite(values))[0]]
        if np.isfinite(stored[tuple(place)]):
            raise ConversionError(f"{source.place(name)} does not fit in {dtype} (at {place}); use bfloat16 or float32")
        raise ConversionError(
            f"{source.place(name)} is not finite at {place}; the checkpoint is damaged, download it again"
        )
    return jnp.array(values.T if transposed else values)  # a copy: `values` may be a mapped file


def _resolve(dtype: StoredDtype, header: Header) -> np.dtype:
    return jnp.dtype(header.dtype if dtype == "auto" else dtype)
