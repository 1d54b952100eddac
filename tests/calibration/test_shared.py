"""Statistics of the source's own activations: collected once, used by every run that needs them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jquant.blocks import SITES, QuantizeWeights, Rule
from jquant.blocks.weights import collect
from jquant.calibration import SharedStatistics, quantize_blocks
from jquant.errors import CheckpointError, RecipeError
from jquant.formats import UniformFormat
from jquant.models import Llama, hidden_states, random_model, tiny_config
from jquant.quantizers import HESSIAN, Gptq
from jquant.report import Report

GPTQ = (QuantizeWeights((Rule(".*_proj", Gptq(UniformFormat(4, 32))),), "per_block", "source"),)
TOKENS = jax.random.randint(jax.random.key(1), (3, 16), 0, 256)


def run(statistics: SharedStatistics | None) -> tuple[Llama, Report]:
    model = random_model(tiny_config(), jax.random.key(0))
    return quantize_blocks(model, TOKENS, GPTQ, key=jax.random.key(2), statistics=statistics)


def leaves(model: Llama) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def test_kept_statistics_are_used_and_change_nothing(tmp_path: Path) -> None:
    kept = SharedStatistics.of(tmp_path, 2, {"model": "a", "windows": "b"})
    assert not kept.complete(HESSIAN.name)
    assert GPTQ[0].needs_teacher(kept)
    alone, collected = leaves(run(None)[0]), leaves(run(kept)[0])
    assert kept.complete(HESSIAN.name)
    assert not GPTQ[0].needs_teacher(kept)
    again = leaves(run(kept)[0])
    for one, other, third in zip(alone, collected, again, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, third)
    file = kept.path / "hessian-001.safetensors"
    spoiled = {
        name: array + np.float32(50) * np.eye(*array.shape[-2:], dtype=np.float32) if array.ndim else array
        for name, array in load_file(file).items()
    }
    save_file(spoiled, file)
    assert any((one != other).any() for one, other in zip(alone, leaves(run(kept)[0]), strict=True))
    assert SharedStatistics.of(tmp_path, 2, {"model": "other", "windows": "b"}).path != kept.path


def test_two_runs_may_collect_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second keeps a block's sums while the first is between its two steps."""
    kept, step, meanwhile = SharedStatistics.of(tmp_path, 1, {}), Path.replace, [1.0]

    def replace(self: Path, target: Path) -> Path:
        if meanwhile:
            kept.put(0, "sums", np.full(3, meanwhile.pop(), np.float32))
        return step(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    kept.put(0, "sums", np.full(3, 1.0, np.float32))
    np.testing.assert_array_equal(kept.get(0, "sums", jax.ShapeDtypeStruct((3,), np.float32)), np.ones(3))
    assert [file.name for file in kept.path.iterdir()] == ["sums-000.safetensors"]


def test_statistics_are_those_of_the_source(tmp_path: Path) -> None:
    """Those of the last block are what the unquantized model gives, not what a quantized first block makes."""
    kept = SharedStatistics.of(tmp_path, 2, {})
    run(kept)
    source = random_model(tiny_config(), jax.random.key(0))
    whole = hidden_states(dataclasses.replace(source, layers=source.layers[:1]), TOKENS)
    expected = collect(source.layers[1], whole, tuple(SITES), HESSIAN, source.config)
    ours = kept.get(1, HESSIAN.name, expected)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    kept = SharedStatistics.of(tmp_path, 2, {})
    run(kept)
    (kept.path / "hessian-000.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match=r"hessian-000.safetensors cannot be read .*; delete it to collect it again"
    ):
        run(kept)
    save_file({str(number): np.zeros(3) for number in range(8)}, kept.path / "hessian-000.safetensors")
    with pytest.raises(CheckpointError, match=r"hessian-000.safetensors holds float64\(3,\) for float32"):
        run(kept)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="give a folder with more room"):
        run(SharedStatistics.of(tmp_path / "file", 2, {}))


def test_sites_in_turn_are_refused() -> None:
    with pytest.raises(RecipeError, match="set sequence: per_block"):
        QuantizeWeights(GPTQ[0].rules, "per_site", "source")
