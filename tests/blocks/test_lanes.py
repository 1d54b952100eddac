"""Calibration windows in lanes: the same bits on one device and on two, and errors that say what is missing."""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.blocks import LANES, SITES, Lanes, QuantizeWeights, Rule, collect, collect_all, lane_runs
from jquant.calibration import quantize_blocks
from jquant.checkpoint import digest
from jquant.errors import CalibrationError
from jquant.formats import UniformFormat
from jquant.models import LlamaConfig, embed, random_model
from jquant.quantizers import ABSMAX, HESSIAN, Gptq

CONFIG: Final = LlamaConfig(32, 16, 24, 2, 2, 1, 8, 64, tie_word_embeddings=True)
TOKENS: Final = jnp.asarray(np.random.default_rng(0).integers(0, 32, (19, 8)), jnp.int32)


@pytest.mark.parametrize("samples", [1, 7, 8, 19, 128])
def test_runs_are_even_and_whole(samples: int) -> None:
    runs = lane_runs(samples)
    sizes = [run.stop - run.start for run in runs]
    assert len(runs) == min(samples, LANES)
    assert max(sizes) - min(sizes) <= 1
    assert np.concatenate([np.arange(samples)[run] for run in runs]).tolist() == list(range(samples))


def test_statistics_have_the_same_bits_on_two_devices() -> None:
    model = random_model(CONFIG, jax.random.key(0))
    block, states = model.layers[0], embed(model, TOKENS)  # type: ignore[index]
    found: list[dict[str, Any]] = []
    for count in (1, 2):
        lanes = Lanes.make(len(TOKENS), tuple(jax.devices()[:count]), lambda run: states[run])
        assert {part.device for part in lanes.parts} == set(jax.devices()[:count])
        assert (lanes.whole() == states).all()
        found.append(collect_all(block, lanes, tuple(SITES), HESSIAN, CONFIG))
    one, two = (jax.tree.map(np.asarray, sums) for sums in found)
    plain = collect(block, states, tuple(SITES), HESSIAN, CONFIG)
    for site in SITES:
        assert (one[site].total == two[site].total).all()
        assert float(one[site].tokens) == TOKENS.size
        np.testing.assert_allclose(one[site].total, plain[site].total, rtol=1e-5, atol=1e-5)  # another order of sums
    largest = collect_all(block, lanes, ("mlp_input",), ABSMAX, CONFIG)["mlp_input"]
    assert (largest == collect(block, states, ("mlp_input",), ABSMAX, CONFIG)["mlp_input"]).all()


@pytest.mark.slow
def test_codes_have_the_same_bits_on_two_devices() -> None:
    model = random_model(CONFIG, jax.random.key(0))
    passes = (QuantizeWeights((Rule(".*", Gptq(UniformFormat(4, 8))),)),)
    digests = {
        digest(quantize_blocks(model, TOKENS, passes, key=jax.random.key(1), devices=tuple(jax.devices()[:count]))[0])
        for count in (0, 1, 2)
    }
    assert len(digests) == 1


def test_windows_of_another_process_cannot_be_joined() -> None:
    lanes = Lanes.make(3, (), lambda run: jnp.zeros((3, 2, 4))[run])
    with pytest.raises(CalibrationError, match="needs all windows in one process"):
        dataclasses.replace(lanes, parts=(*lanes.parts[:2], None)).whole()
