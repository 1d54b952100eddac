"""A foreign checkpoint into the tree: check every header first, then read one tensor at a time."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.base import Header, Source
from convert.names import hf_name, is_transposed
from convert.source import open_source
from jquant.errors import ConversionError
from jquant.models import Llama, LlamaConfig, build

type StoredDtype = Literal["auto", "float32", "bfloat16", "float16"]

_READABLE: Final = ("float32", "bfloat16", "float16")
_BUFFER: Final = re.compile(
    r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"
)  # old exports keep it; recomputed
_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "model.embed_tokens.weight"
_LISTED: Final = 20  # problems spelt out in one message


def load_model(path: str | Path, *, dtype: StoredDtype = "auto") -> Llama:
    """Loads a model of the Llama family into the tree.

    Args:
      path: a Hugging Face folder with safetensors, a .gguf file, or a hub id.
      dtype: of every array; "auto" leaves each tensor in the dtype it is stored in (float32 for GGUF).

    Returns:
      The model, with kernels [in, out].

    Raises:
      ConversionError: files are missing or damaged, the model needs what is not built here, tensors are missing,
        surplus or misshapen (all are listed), or a weight is not finite.
    """
    source = open_source(path)
    config = _checked_config(source)
    if config.tie_word_embeddings and _HEAD in source.headers:
        _check_tied(source)
    return build(config, lambda node, shape: _load(source, hf_name(node), dtype, transposed=is_transposed(node)))


def abstract_model(path: str | Path, dtype: StoredDtype = "auto") -> Llama:
    """Returns what `load_model` would, with `jax.ShapeDtypeStruct` in place of arrays; reads headers only.

    Raises:
      ConversionError: as `load_model`, as far as headers show.
    """
    source = open_source(path)

    def make(node: str, shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(_resolve(dtype, source.headers[hf_name(node)])))

    return build(_checked_config(source), make)


def _checked_config(source: Source) -> LlamaConfig:
    config = LlamaConfig.from_hf(source.config)
    expected = _expected_shapes(config)
    problems = [
        *_listing("missing", sorted(expected.keys() - source.headers.keys())),
        *_listing(
            "surplus",
            [name for name in sorted(source.headers.keys() - expected.keys()) if not _is_harmless(name, config)],
        ),
        *_misfits(expected, source.headers),
    ]
    if problems:
        shown = "\n  ".join(problems[:_LISTED])
        rest = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConversionError(
            f"{source.location}: {len(problems)} tensors are not what its configuration ({config.model_type}, "
            f"{config.num_hidden_layers} layers) asks for; check that both come from the same model:\n  {shown}{rest}"
        )
    return config


def _expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}

    def note(node: str, shape: tuple[int, ...]) -> Any:
        expected[hf_name(node)] = shape[::-1] if is_transposed(node) else shape
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    build(config, note)
    return expected


def _listing(word: str, names: list[str]) -> list[str]:
    return [f"{word}: {name}" for name in names]


def _misfits(expected: Mapping[str, tuple[int, ...]], headers: Mapping[str, Header]) -> list[str]:
    misfits = []
    for name in sorted(expected.keys() & headers.keys()):
        shape, dtype = headers[name]
        if shape != expected[name]:
            misfits.append(f"misshapen: {name} is {list(shape)}, expected {list(expected[name])}")
        if dtype not in _READABLE:
            misfits.append(f"unreadable: {name} is {dtype}, expected one of {', '.join(_READABLE)}")
    return misfits


def _is_harmless(name: str, config: LlamaConfig) -> bool:
    return bool(_BUFFER.fullmatch(name)) or (name == _HEAD and config.tie_word_embeddings)


def _check_tied(source: Source) -> None:
    if not np.array_equal(source.read(_HEAD), source.read(_EMBEDDING)):
        raise ConversionError(
            f"{source.location}: tie_word_embeddings is true, yet {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false in config.json to use both, or remove the tensor that is not meant"
        )


def _load(source: Source, name: str, dtype: StoredDtype, *, transposed: bool) -> jax.Array:
    stored = source.read(name)
    with np.errstate(over="ignore"):  # what overflows is found below, and named
        values = stored.astype(_resolve(dtype, source.headers[name]), copy=False)
    if not np.isfinite(values).all():
        place = [int(index) for index in np.argwhere(~np.isfinite(values))[0]]
        if np.isfinite(stored[tuple(place)]):
            raise ConversionError(
                f"{source.location}: {name} does not fit in {dtype} (at {place}); use bfloat16 or float32"
            )
        raise ConversionError(
            f"{source.location}: {name} is not finite at {place}; the checkpoint is damaged, download it again"
        )
    return jnp.array(values.T if transposed else values)  # a copy: `values` may be a mapped file


def _resolve(dtype: StoredDtype, header: Header) -> np.dtype:
    return jnp.dtype(header.dtype if dtype == "auto" else dtype)
