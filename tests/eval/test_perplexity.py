"""Perplexity against a numpy oracle, its limits, and its independence of how it is computed."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.perplexity import perplexity
from jquant.errors import CalibrationError, DataError
from jquant.models import Llama, forward, random_model, stack_layers, tiny_config

module = importlib.import_module("eval.perplexity")  # `eval.perplexity` itself names the function


@functools.cache
def tiny() -> Llama:
    """Build a random model of 2 layers."""
    return random_model(tiny_config("smollm2"), jax.random.key(0))


def windows_of(count: int, length: int) -> np.ndarray:
    """Draw random windows of tokens."""
    return np.random.default_rng(0).integers(0, 128, size=(count, length), dtype=np.int32)


def oracle(logits: np.ndarray, windows: np.ndarray) -> tuple[float, list[float]]:
    """Return exp of the mean of means and the windows' means, position by position in float64."""
    losses = []
    for rows, window in zip(logits.astype(np.float64), windows, strict=True):
        nll = [np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[token] for row, token in zip(rows, window[1:])]
        losses.append(float(np.mean(nll)))
    return float(np.exp(np.mean(losses))), losses


def test_equal_logits_give_the_vocabulary_size() -> None:
    model = tiny()
    flat = model.replace(embed_tokens=jnp.zeros_like(model.embed_tokens))
    assert perplexity(flat, windows_of(2, 17)).value == pytest.approx(128.0, rel=1e-5)


@pytest.mark.parametrize("length", [2, 9, 258])  # 257 predictions: two pieces of 129, one of them padded
def test_equals_the_oracle_whatever_the_pieces(length: int) -> None:
    model, windows = tiny(), windows_of(2, length)
    result = perplexity(model, windows)
    value, losses = oracle(np.asarray(jax.jit(forward)(model, jnp.asarray(windows))), windows)
    np.testing.assert_allclose(result.window_losses, losses, rtol=1e-5)
    assert result.value == pytest.approx(value, rel=1e-5)
    assert (result.windows, result.window_length, result.tokens) == (2, length, 2 * (length - 1))
    assert result.kv_prompt == "exact"


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_batches_change_nothing(batch_size: int) -> None:
    model, windows = tiny(), windows_of(5, 12)
    one = perplexity(model, windows)
    many = perplexity(stack_layers(model), windows, batch_size=batch_size)
    np.testing.assert_allclose(many.window_losses, one.window_losses, rtol=1e-5)
    assert many.kv_prompt == "exact"


def test_one_compilation_for_all_windows() -> None:
    model = tiny()
    before = module._window_losses._cache_size()
    perplexity(model, windows_of(5, 23), batch_size=2)
    assert module._window_losses._cache_size() == before + 1


def test_progress_ends_at_the_result() -> None:
    calls: list[tuple[int, int, float]] = []
    result = perplexity(tiny(), windows_of(5, 8), batch_size=2, on_window=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(2, 5), (4, 5), (5, 5)]
    assert calls[-1][2] == result.value


def test_half_precision_models_have_float32_losses() -> None:
    model, windows = tiny(), windows_of(2, 16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    # bfloat16 keeps 8 bits: logits of size 10 are off by 0.04, which averages out over 30 predictions
    assert perplexity(half, windows).value == pytest.approx(perplexity(model, windows).value, rel=0.05)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 8), np.int32), "got 0 windows"),
        (np.zeros((2, 1), np.int32), "windows of 1 tokens"),
        (np.full((1, 4), 128, np.int32), "ids from 128 to 128, but the model has ids 0 to 127"),
    ],
)
def test_unusable_windows_are_refused(windows: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(tiny(), windows)


def test_a_loss_that_is_not_finite_names_its_window() -> None:
    windows = np.ones((3, 6), np.int32)
    windows[2, 3] = 5
    # a tied head would give NaN logits for every window, this one only where token 5 is read
    untied = random_model(tiny_config("llama2"), jax.random.key(0))
    broken = untied.replace(embed_tokens=untied.embed_tokens.at[5].set(jnp.nan))
    with pytest.raises(CalibrationError, match="window 2 has a mean loss of nan"):
        perplexity(broken, windows)
