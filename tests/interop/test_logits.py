"""The same logits as transformers' own models under torch, in float32, for every family and for two trained models."""

import gzip
import json
import subprocess
from collections.abc import Mapping
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


def reference_logits(python: Path, jobs: Mapping[Path, np.ndarray], out: Path) -> list[np.ndarray]:
    """Return the logits of each folder on its tokens, by one run of transformers."""
    arguments = []
    for index, (folder, tokens) in enumerate(jobs.items()):
        np.save(out / f"{index}.tokens.npy", tokens)
        arguments += [str(folder), str(out / f"{index}.tokens.npy"), str(out / f"{index}.logits.npy")]
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
    logits = reference_logits(reference_python, {folder: random_tokens(folder) for folder in folders.values()}, root)
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
    (theirs,) = reference_logits(reference_python, {folder: tokens}, tmp_path)
    np.testing.assert_allclose(our_logits(folder, tokens), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_smollm2(reference_python: Path, shared: Path, smollm2: Path, tmp_path: Path) -> None:
    with gzip.open(shared / "data" / "text" / "wikitext2_raw_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False))
    tokens = np.array(load_tokenizer(smollm2)(text)["input_ids"][:512], np.int32).reshape(2, 256)
    folder = write_folder(tmp_path / "hf", open_source(smollm2).config, tensors_of(load_model(smollm2)))
    (theirs,) = reference_logits(reference_python, {folder: tokens}, tmp_path)
    error = np.abs(our_logits(folder, tokens) - theirs)
    # Logits reach 34 and float32's noise grows along the text: against float64, transformers itself is off by 8e-5 in
    # the first 32 tokens, by 1.1e-4 in 256 and by 1.9e-4 in 512. So the bound holds for every logit of a short text,
    # for all but one in a thousand of a long one, and everywhere relative to the largest logit.
    assert error[:, :32].max() <= TOLERANCE
    assert np.mean(error > TOLERANCE) <= 1e-3
    assert (error.max(-1) / np.abs(theirs).max(-1)).max() <= TOLERANCE
