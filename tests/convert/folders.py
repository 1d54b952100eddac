"""Writes checkpoints for tests: a tree into a Hugging Face folder, and random trees whose every array matters."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from convert.names import hf_name, is_transposed
from jquant.models import Family, Llama, LlamaConfig, build

FAMILIES: Final[tuple[Family, ...]] = get_args(Family.__value__)


def random_tensors(config: LlamaConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a random checkpoint by Hugging Face name; norms, biases and logits are far from trivial."""
    tensors: dict[str, np.ndarray] = {}

    def note(path: str, shape: tuple[int, ...]) -> Any:
        noise = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(shape)
        if path.endswith("kernel"):
            noise = noise / shape[0] ** 0.5
        elif path.endswith("norm"):
            noise = 1.0 + 0.3 * noise
        tensors[hf_name(path)] = np.ascontiguousarray(noise.T if is_transposed(path) else noise).astype(dtype)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    build(config, note)
    return tensors


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """Return a model's arrays by Hugging Face name, [out, in]."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    return {
        hf_name(path): np.ascontiguousarray(array.T) if is_transposed(path) else array for path, array in named.items()
    }


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Write config.json and one model.safetensors; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int) -> Path:
    """Write the same as `write_folder` in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder
