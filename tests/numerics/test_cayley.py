"""Cayley SGD: updates against the published algorithm in float64, orthogonality after many, descent, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jquant.errors import FormatError
from jquant.numerics import cayley_sgd, haar_matrix, nearest_orthogonal
from tests.oracles import cayley as oracle

ORDER = 24
RNG = np.random.default_rng(0)


def test_updates_equal_the_published_algorithms() -> None:
    """Two matrices at once with momentum; the first update is bounded by its norm, the second by the rate."""
    matrices = np.stack([haar_matrix(ORDER, 1), haar_matrix(ORDER, 2)])
    gradients = RNG.standard_normal((2, 2, ORDER, ORDER))
    optimizer = cayley_sgd(lambda updates: jnp.where(updates == 0, 1.5, 1e-3), momentum=0.9)
    params = jnp.asarray(matrices, jnp.float32)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected = [(matrix, np.zeros_like(matrix)) for matrix in matrices]
    for gradient, rate in zip(gradients, (1.5, 1e-3), strict=True):
        updates, state = update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        pairs = zip(expected, gradient, strict=True)
        expected = [oracle.update(*pair, own, learning_rate=rate, decay=0.9) for pair, own in pairs]
        found = [matrix for matrix, _ in expected]
        np.testing.assert_allclose(params, found, rtol=0, atol=2e-6)  # float32 rounding of entries of at most 1
    momenta = np.stack([momentum for _, momentum in expected])
    np.testing.assert_allclose(state.momentum, momenta, rtol=0, atol=1e-5 * np.abs(momenta).max())
    assert int(state.updates) == 2


def test_five_iterations_are_near_the_transform() -> None:
    """What the published code computes: an error of at most (a |W| / 2)^6 |T|, with a |W|_2 below a |W|_1 <= 1."""
    matrix, gradient = haar_matrix(ORDER, 1), RNG.standard_normal((ORDER, ORDER))
    exact, five = (
        oracle.update(matrix, np.zeros_like(matrix), gradient, learning_rate=1.5, iterations=count)[0]
        for count in (60, 5)
    )
    assert np.abs(exact @ exact.T - np.eye(ORDER)).max() < 1e-14
    assert 0 < np.linalg.norm(five - exact, 2) < 0.5**6


def test_many_updates_descend_and_stay_orthogonal() -> None:
    """Towards T = B in |T - B|^2: after 300 updates as orthogonal as after one, to float32's rounding."""
    goal = haar_matrix(ORDER, 3)
    optimizer = cayley_sgd(optax.linear_schedule(1.5, 0.0, 300))
    start = np.diag([np.linalg.det(goal).round(), *[1.0] * (ORDER - 1)])  # a turn can reach the goal, as it mirrors not

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
        matrix, state = carry
        loss, gradient = jax.value_and_grad(lambda one: jnp.sum(jnp.square(one - jnp.float32(goal))))(matrix)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, matrix)
        return (optax.apply_updates(matrix, updates), state), loss

    run = jax.jit(lambda one: jax.lax.scan(step, (one, optimizer.init(one)), None, 300))
    (found, _), losses = run(jnp.asarray(start, jnp.float32))
    matrix = np.asarray(found, np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(ORDER)).max() < 1e-6
    assert losses[-1] < 1e-6 * losses[0]


def test_nearest_orthogonal_removes_noise_and_keeps_the_identity() -> None:
    matrices = np.stack([haar_matrix(ORDER, 1), np.eye(ORDER)])
    noisy = matrices.copy()
    noisy[0] += 1e-6 * RNG.standard_normal((ORDER, ORDER))
    found = nearest_orthogonal(noisy)
    np.testing.assert_allclose(found[0] @ found[0].T, np.eye(ORDER), rtol=0, atol=1e-14)
    left, _, right = np.linalg.svd(noisy[0])
    np.testing.assert_allclose(found[0], left @ right, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(found[1], np.eye(ORDER))


def test_bad_input_is_refused() -> None:
    with pytest.raises(FormatError, match=r"orthogonal matrices \[\.\.\., n, n\], not an array \[2, 3\]"):
        cayley_sgd(1.0).init(jnp.ones((2, 3)))
    with pytest.raises(FormatError, match="give update their values as `params`"):
        cayley_sgd(1.0).update(jnp.eye(2), cayley_sgd(1.0).init(jnp.eye(2)))
    for wrong in (2 * np.eye(3), np.full((3, 3), np.nan)):
        with pytest.raises(FormatError, match="a matrix of order 3 is not orthogonal"):
            nearest_orthogonal(wrong)
