"""Samplers against a numpy oracle of which tokens may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import RecipeError
from jquant.sampling import GREEDY, Sampler

VOCAB = 12
DRAWS = 4000


def oracle_probabilities(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Return the distribution of one row, by sorting and a plain loop, in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    weights[top_k if top_k is not None else len(weights) :] = 0.0
    weights /= weights.sum()
    kept, total = [], 0.0
    for weight in weights:
        keep = top_p is None or total < top_p
        kept.append(weight if keep else 0.0)
        total += weight
    probabilities = np.zeros(len(logits))
    probabilities[order] = np.array(kept) / np.sum(kept)
    return probabilities


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    tokens = GREEDY(logits, jax.random.key(0))
    assert tokens.tolist() == [1, 0]
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.0, None, 0.6), (1.7, 5, 0.8), (1.0, 50, 1.0)],
)
def test_draws_follow_the_oracle(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2.0
    sampler = Sampler(temperature, top_k, top_p)
    tokens = sampler(jnp.broadcast_to(jnp.asarray(logits), (DRAWS, VOCAB)), jax.random.key(1))
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    expected = oracle_probabilities(logits, temperature, top_k, top_p)
    assert not counts[expected == 0.0].any()
    # 5 standard deviations of a binomial of 4000 draws are at most 0.04
    np.testing.assert_allclose(counts / DRAWS, expected, atol=0.04)


def test_top_p_always_keeps_the_most_likely() -> None:
    logits = jnp.array([[0.1, 0.0, 0.2, 0.05]])
    tokens = [int(Sampler(1.0, top_p=1e-9)(logits, jax.random.key(seed))[0]) for seed in range(20)]
    assert tokens == [2] * 20


def test_top_k_of_one_is_greedy_and_rows_are_independent() -> None:
    logits = jax.random.normal(jax.random.key(0), (6, VOCAB))
    tokens = Sampler(3.0, top_k=1)(logits, jax.random.key(1))
    assert tokens.tolist() == GREEDY(logits, jax.random.key(1)).tolist()


def test_top_p_counts_probability_after_top_k() -> None:
    """Of probabilities 0.4, 0.3, 0.3, top_k=2 leaves 4/7 and 3/7, and the first alone covers 0.5."""
    logits = jnp.log(jnp.array([[0.4, 0.31, 0.29]]))
    both = Sampler(1.0, top_k=2, top_p=0.5)
    assert {int(both(logits, jax.random.key(seed))[0]) for seed in range(30)} == {0}
    alone = Sampler(1.0, top_p=0.5)
    assert {int(alone(logits, jax.random.key(seed))[0]) for seed in range(30)} == {0, 1}


def test_equal_tokens_are_kept_together() -> None:
    tokens = Sampler(1.0, top_k=1)(jnp.zeros((200, 3)), jax.random.key(0))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_jit_equals_eager_and_half_precision_is_widened() -> None:
    sampler = Sampler(0.7, top_k=4, top_p=0.9)
    logits = jax.random.normal(jax.random.key(0), (5, VOCAB), jnp.bfloat16)
    eager = sampler(logits, jax.random.key(2))
    jitted = jax.jit(lambda rows, key, sampler: sampler(rows, key), static_argnames="sampler")
    assert jitted(logits, jax.random.key(2), sampler).tolist() == eager.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
    ],
)
def test_meaningless_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sampler(**settings)  # type: ignore[arg-type]
