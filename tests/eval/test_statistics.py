"""Statistics of taps, distances of states and divergence of predictions, against numpy and scipy in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from eval.statistics import block_distances, divergence, share_basis, tap_statistics
from jquant.activations import PerToken
from jquant.errors import DataError, FormatError
from jquant.models import Llama, forward, map_linears, prompt_block, put, random_model, stack_layers, tiny_config

LENGTH = 70  # predictions are looked at in two pieces
WINDOWS = np.random.default_rng(0).integers(0, 128, (2, LENGTH))


@functools.cache
def tiny() -> Llama:
    """Build a random model of one layer, an outlier channel in its embeddings, the inputs of its linears in 4 bits."""
    model = random_model(dataclasses.replace(tiny_config(), num_hidden_layers=1), jax.random.key(0))
    model = model.replace(embed_tokens=model.embed_tokens.at[:, 5].multiply(40.0))
    quantizer = PerToken(bits=4).fit(None)
    return map_linears(model, lambda path, layer: layer.replace(input_quantizer=quantizer))


@functools.cache
def changed() -> Llama:
    """Build the same with another output of attention."""
    return put(tiny(), "layers.0.self_attn.o_proj.kernel", 1.1 * tiny().layers[0].self_attn.o_proj.kernel)


@jax.jit
def block_of(model: Llama) -> Any:
    """Run the block over the windows: states, cache, taps."""
    return prompt_block(model.layers[0], model.embed_tokens[WINDOWS], jnp.asarray([LENGTH] * 2), LENGTH, tiny().config)


def test_taps_are_those_of_the_block() -> None:
    """In two windows, whose means are put together."""
    taps = block_of(tiny())[2]
    seen: list[tuple[int, int]] = []
    rows = tap_statistics(tiny(), WINDOWS, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    assert [(row.block, row.tap) for row in rows] == [(0, name) for name in taps._fields]
    for row, tap in zip(rows, taps, strict=True):
        x = np.asarray(tap, np.float64)
        channels = np.sqrt(np.mean(x**2, axis=(0, 1)))
        peak = channels.max() / np.median(channels)
        coded = np.asarray(PerToken(bits=4).fit(None)(tap, None).dequantize(), np.float64)
        sqnr = 10 * np.log10(np.sum(x**2) / np.sum((x - coded) ** 2))
        expected = [x.min(), x.max(), x.mean(), x.std(), scipy.stats.kurtosis(x, axis=None), peak, sqnr]
        found = [row.low, row.high, row.mean, row.deviation, row.kurtosis, row.peak, row.sqnr]
        # means of fourth powers in float32: 7 digits, of which kurtosis near 0 loses one
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert row.outlier_channels == int(np.sum(channels >= 6 * np.median(channels)))
    assert rows[0].outlier_channels == 1


def test_distances_and_divergence_of_two_models() -> None:
    assert share_basis(tiny(), changed())
    run = jax.jit(forward)
    logits = [np.asarray(run(model, WINDOWS), np.float64) for model in (tiny(), changed())]
    p, q = (rows - scipy.special.logsumexp(rows, axis=-1, keepdims=True) for rows in logits)
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    found = divergence(tiny(), changed(), WINDOWS)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.flips == np.mean(p.argmax(-1) != q.argmax(-1)) > 0
    assert found.tokens == 2 * LENGTH

    r, y = (np.asarray(block_of(model)[0], np.float64).ravel() for model in (tiny(), changed()))
    (row,) = block_distances(tiny(), changed(), WINDOWS)
    assert row.relative_error == pytest.approx(np.linalg.norm(y - r) / np.linalg.norm(r), rel=1e-4)
    assert row.cosine == pytest.approx(y @ r / np.linalg.norm(y) / np.linalg.norm(r), abs=1e-6)
    assert row.relative_error > 1e-3


def test_what_says_nothing_is_refused() -> None:
    turned = tiny().replace(embed_tokens=-tiny().embed_tokens)
    assert not share_basis(tiny(), turned)
    with pytest.raises(DataError, match="one of them is rotated: distances of states would say nothing"):
        block_distances(tiny(), turned, WINDOWS)
    other = dataclasses.replace(tiny(), config=dataclasses.replace(tiny().config, vocab_size=64))
    with pytest.raises(DataError, match="vocabularies of 128 and 64 tokens"):
        divergence(tiny(), other, WINDOWS)
    for windows in (np.zeros((0, 4), np.int32), np.full((1, 4), 128)):
        with pytest.raises(DataError, match="outside 0 to 127, or none"):
            tap_statistics(tiny(), windows)
    with pytest.raises(FormatError, match="layers are stacked"):
        tap_statistics(stack_layers(tiny()), WINDOWS)
