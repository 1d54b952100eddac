"""The same logits as transformers' own models under torch, in float32, for every family and for two trained models."""

import gzip
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model, load_tokenizer, open_source
from jquant.models import LlamaConfig, forward, tiny_hf_config
from tests.convert.folders import random_tensors, tensors_of, write_folder

TOLERANCE: Final = 1e-4  # of a logit, float32 on both sides
type Job = tuple[str, Path, np.ndarray]  # dtype, folder, tokens

REFERENCE: Final = Path(__file__).with_name("reference.py")
LENGTH: Final = 96  # past the window of `mistral` and past original_max_position_embeddings of `llama3.1`

FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama2": tiny_hf_config("llama2"),
    "llama2-biases": tiny_hf_config("llama2") | {"attention_bias": True, "mlp_bias": True},
    "llama2-one-head-each": tiny_hf_config("llama2") | {"num_key_value_heads": 4},
    "llama2-wide-heads": tiny_hf_config("llama2") | {"head_dim": 32},
    "llama3.1": tiny_hf_config("llama3.1"),
    "linear": tiny_hf_config("linear"),
    "smollm2": tiny_hf_config("smollm2"),
    "mistral": tiny_hf_config("mistral"),
    "mistral-no-window": tiny_hf_config("mistral") | {"sliding_window": None},
    "qwen2": tiny_hf_config("qwen2"),
    "qwen2.5-tied": tiny_hf_config("qwen2") | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3-tied": tiny_hf_config("qwen3"),
    "qwen3-untied": tiny_hf_config("qwen3") | {"tie_word_embeddings": False},
}


def reference_logits(python: Path, jobs: Sequence[Job], out: Path) -> list[np.ndarray]:
    """Return the logits of each (dtype, folder, tokens), by one run of transformers."""
    arguments: list[str] = []
    for index, (dtype, folder, tokens) in enumerate(jobs):
        np.save(out / f"{index}.tokens.npy", tokens)
        arguments += [dtype, str(folder), str(out / f"{index}.tokens.npy"), str(out / f"{index}.logits.npy")]
    result = subprocess.run([python, REFERENCE, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [np.load(out / f"{index}.logits.npy") for index in range(len(jobs))]


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(forward)(load_model(folder), jnp.asarray(tokens)))


def random_tokens(folder: Path) -> np.ndarray:
    vocabulary = open_source(folder).config["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def families(reference_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Write a random model of each family; return its folder and the logits of transformers."""
    root = tmp_path_factory.mktemp("families")
    folders = {
        name: write_folder(root / name, config, random_tensors(LlamaConfig.from_hf(config)))
        for name, config in FAMILIES.items()
    }
    jobs = [("float32", folder, random_tokens(folder)) for folder in folders.values()]
    logits = reference_logits(reference_python, jobs, root)
    return dict(zip(folders, zip(folders.values(), logits, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family(families: dict[str, tuple[Path, np.ndarray]], name: str) -> None:
    folder, theirs = families[name]
    assert theirs.std() > 0.5  # a difference would show
    np.testing.assert_allclose(our_logits(folder, random_tokens(folder)), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_stories260k(reference_python: Path, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tokens = random_tokens(folder)
    (theirs,) = reference_logits(reference_python, [("float32", folder, tokens)], tmp_path)
    np.testing.assert_allclose(our_logits(folder, tokens), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_smollm2(reference_python: Path, shared: Path, smollm2: Path, tmp_path: Path) -> None:
    # Its logits reach 34, and 30 layers of float32 products leave 1e-4 to 2e-4 in the worst of millions: on twice this
    # text, transformers itself is 1.3e-4 from its own float64 logits. So every logit is compared with products in
    # float64 on both sides; in float32 the bound is on the root mean square, and on the worst relative to the largest.
    # 64 tokens: transformers rounds rotary angles to float32 whatever the dtype, which grows with the position.
    with gzip.open(shared / "data" / "text" / "wikitext2_raw_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False))
    tokens = np.array(load_tokenizer(smollm2)(text)["input_ids"][:128], np.int32).reshape(2, 64)
    model = load_model(smollm2)
    folder = write_folder(tmp_path / "hf", open_source(smollm2).config, tensors_of(model))
    jobs = [("float32", folder, tokens), ("float64", folder, tokens)]
    single, double = reference_logits(reference_python, jobs, tmp_path)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
        ours = np.asarray(jax.jit(forward)(wide, jnp.asarray(tokens)))
    assert ours.dtype == double.dtype == np.float64
    np.testing.assert_allclose(ours, double, rtol=0, atol=TOLERANCE)
    error = np.abs(our_logits(folder, tokens) - single)
    assert np.sqrt(np.mean(np.square(error))) <= TOLERANCE
    assert (error.max(-1) / np.abs(single).max(-1)).max() <= TOLERANCE
