"""Inverse factors of damped Hessians: the defining equation, the damping that rises, and what cannot be cured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import inverse_factor, revive_dead, unit_factor
from tests.oracles import closed_form


def random_hessian(seed: int, n: int, tokens: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, n))
    return 2 * x.T @ x / tokens


@pytest.mark.parametrize("damping", [0.0, 0.01, 7.0])
@pytest.mark.parametrize("hessian", [closed_form.hessian(), random_hessian(0, 48, 200)], ids=["closed form", "random"])
def test_factors_the_inverse_in_float64(hessian: np.ndarray, damping: float) -> None:
    with jax.enable_x64(True):
        upper, used = (np.asarray(part) for part in inverse_factor(jnp.asarray(hessian), damping))
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    assert upper.dtype == np.float64
    assert used == damping
    np.testing.assert_array_equal(upper, np.triu(upper))
    assert (np.diag(upper) > 0).all()
    np.testing.assert_allclose(upper, expected, atol=1e-10 * expected.max())


def test_float32_is_near_float64() -> None:
    hessian = random_hessian(1, 64, 256)
    upper = inverse_factor(jnp.asarray(hessian, dtype=jnp.float32), 0.01).upper
    assert upper.dtype == jnp.float32
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(64)
    np.testing.assert_allclose(upper @ damped @ upper.T, np.eye(64), atol=1e-4)  # condition number about 10


def test_unit_factor_is_the_factorization_behind_the_inverse() -> None:
    hessian = random_hessian(0, 48, 200)
    with jax.enable_x64(True):
        unit, inverse = unit_factor(jnp.asarray(hessian), 0.01), inverse_factor(jnp.asarray(hessian), 0.01)
        upper, pivots = np.asarray(unit.upper), np.asarray(unit.pivots)
        np.testing.assert_allclose(inverse.upper, np.linalg.inv(upper * np.sqrt(pivots)), atol=1e-12)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(np.diag(upper), 1, rtol=1e-15)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(48)
    np.testing.assert_allclose(upper * pivots @ upper.T, damped, atol=1e-13)


def test_unit_factor_raises_the_damping_and_shows_what_it_cannot_cure() -> None:
    risen = unit_factor(jnp.diag(jnp.array([1.0, 1.0, 1.0, -0.034])), 0.01)
    np.testing.assert_allclose(risen.damping, 0.05, rtol=1e-6)
    assert jnp.isfinite(risen.upper).all()
    for hopeless in (jnp.eye(3).at[0, 1].set(jnp.nan), jnp.eye(3).at[2, 2].set(jnp.inf), -jnp.eye(3)):
        assert not jnp.isfinite(unit_factor(hopeless, 0.01).upper).all()


def test_scaling_the_hessian_scales_the_factor() -> None:
    hessian = jnp.asarray(closed_form.hessian(), dtype=jnp.float32)
    one, four = inverse_factor(hessian, 0.01), inverse_factor(4 * hessian, 0.01)
    np.testing.assert_array_equal(four.upper, one.upper / 2)


def test_damping_rises_until_it_succeeds() -> None:
    hessian = jnp.diag(jnp.array([1.0, 1.0, 1.0, -0.034]))  # mean 0.7415: needs d > 0.0459
    factor = inverse_factor(hessian, 0.01)
    assert jnp.isfinite(factor.upper).all()
    np.testing.assert_allclose(factor.damping, 0.05, rtol=1e-6)


def test_singular_up_to_rounding_succeeds_and_says_so() -> None:
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 32)), dtype=jnp.float32)
    factor = inverse_factor(x.T @ x - 1e-3 * jnp.eye(32), 0.0)  # rank 3, the rest a little below zero
    assert jnp.isfinite(factor.upper).all()
    assert 0 < factor.damping < 0.05


@pytest.mark.parametrize(
    "hessian",
    [jnp.eye(3).at[0, 1].set(jnp.nan), jnp.eye(3).at[2, 2].set(jnp.inf), -jnp.eye(3), jnp.zeros((3, 3))],
    ids=["nan", "inf", "negative", "zero"],
)
def test_hopeless_is_tried_once_and_not_finite(hessian: jax.Array) -> None:
    factor = inverse_factor(hessian, 0.01)
    assert not jnp.isfinite(factor.upper).all()
    np.testing.assert_allclose(factor.damping, 0.01)


def test_gives_up_below_the_limit() -> None:
    factor = inverse_factor(jnp.diag(jnp.array([5.0, 5.0, -9.0])), 0.5)  # mean 1/3: would need d > 27
    assert jnp.isnan(factor.upper).any()
    assert 0.97 < factor.damping < 1


def test_batch_by_vmap_damps_each_alone() -> None:
    batch = jnp.stack([jnp.eye(4), jnp.diag(jnp.array([1.0, 1.0, 1.0, -0.034]))])
    factors = jax.vmap(inverse_factor, in_axes=(0, None))(batch, 0.01)
    np.testing.assert_allclose(factors.damping, [0.01, 0.05], rtol=1e-6)
    for index in range(2):
        np.testing.assert_allclose(factors.upper[index], inverse_factor(batch[index], 0.01).upper, rtol=1e-6)


def test_dead_inputs_are_revived() -> None:
    x = np.random.default_rng(3).standard_normal((64, 6)).astype(np.float32)
    x[:, [1, 4]] = 0
    hessian, weight = (
        jnp.asarray(x.T @ x),
        jnp.asarray(np.random.default_rng(4).standard_normal((6, 3)), dtype=jnp.float32),
    )
    revived, kept = revive_dead(hessian, weight)
    alive = np.array([0, 2, 3, 5])
    np.testing.assert_allclose(np.diag(revived)[[1, 4]], np.diag(hessian)[alive].mean(), rtol=1e-6)
    np.testing.assert_array_equal(kept[jnp.array([1, 4])], 0)
    np.testing.assert_array_equal(revived[np.ix_(alive, alive)], hessian[np.ix_(alive, alive)])
    np.testing.assert_array_equal(kept[alive], weight[alive])
    assert inverse_factor(revived, 0.0).damping == 0


def test_where_no_input_is_alive_nothing_can_be_factored() -> None:
    revived, _ = revive_dead(jnp.zeros((3, 3)), jnp.ones((3, 2)))
    assert not jnp.isfinite(inverse_factor(revived, 0.01).upper).all()
