"""Cayley SGD: descent over orthogonal matrices that never leaves them, as an optax gradient transformation.

For an orthogonal T [n, n], a loss whose gradient there is G, and momentum V (V = -G without any),

    V <- mu V - G
    A  = V T^T - 1/2 T (T^T V T^T),    W = A - A^T           skew: the part of V T^T that turns
    a  = min(learning_rate, 1 / |W|_1)                       |W|_1 the largest absolute sum of a column
    T <- (I - a/2 W)^-1 (I + a/2 W) T,    V <- W T           the Cayley transform of a skew matrix is orthogonal

The published code approximates the transform by five fixed-point iterations and restores orthogonality by a QR
decomposition now and then, at random. Here it is solved for, as the paper defines it, and one Newton step towards the
nearest orthogonal matrix, T <- T (3 I - T^T T) / 2, keeps rounding errors of many updates from adding up.

Li et al. 2020, Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform, arXiv:2002.01113,
algorithm 1; SpinQuant, Liu et al. 2024, arXiv:2405.16406, section 3.2.
"""

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.types import Leaf

_NEWTON_STEPS: Final = 4  # an error e becomes 3/4 e^2: from float32's noise to float64's in two
_FARTHEST: Final = 1e-2  # |T^T T - I| beyond which a matrix is not one that rounding moved


class CayleyState(NamedTuple):
    """Hold what Cayley SGD carries from update to update.

    Attributes:
        updates: int32, how many there were.
        momentum: V of each matrix.
    """

    updates: Leaf
    momentum: Any


def cayley_sgd(learning_rate: float | optax.Schedule, momentum: float = 0.0) -> optax.GradientTransformation:
    """Makes the optimizer; its updates are differences, so that `optax.apply_updates` gives orthogonal matrices.

    Args:
        learning_rate: a constant, or a function of the number of updates so far.
        momentum: mu, 0 as in SpinQuant's runs.

    Returns:
        A transformation of trees whose leaves are orthogonal matrices `[..., n, n]`, float32 or float64.

    Raises:
        FormatError: `init` is given a leaf that is not square.

    Example:
        >>> optimizer, eye = cayley_sgd(0.1), jnp.eye(2)
        >>> updates, _ = optimizer.update(jnp.array([[0.0, 1.0], [0.0, 0.0]]), optimizer.init(eye), eye)
        >>> turned = optax.apply_updates(eye, updates)
        >>> bool(turned[0, 1] < 0), bool(jnp.allclose(turned @ turned.T, eye, atol=1e-6))
        (True, True)
    """

    def init(params: optax.Params) -> CayleyState:
        for leaf in jax.tree.leaves(params):
            if leaf.ndim < 2 or leaf.shape[-1] != leaf.shape[-2]:
                raise FormatError(
                    f"cayley_sgd moves orthogonal matrices [..., n, n], not an array {list(leaf.shape)}: give other "
                    "parameters to another optimizer (optax.partition)"
                )
        return CayleyState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CayleyState]:
        if params is None:
            raise FormatError("cayley_sgd moves matrices from where they are: give update their values as `params`")
        rate = learning_rate(state.updates) if callable(learning_rate) else learning_rate
        descent = jax.tree.map(lambda old, gradient: momentum * old - gradient, state.momentum, updates)
        moved = jax.tree.map(lambda matrix, v: _turn(matrix, v, rate), params, descent)
        turned, kept = (jax.tree.map(lambda _, pair, part=part: pair[part], params, moved) for part in (0, 1))
        return jax.tree.map(jnp.subtract, turned, params), CayleyState(state.updates + 1, kept)

    return optax.GradientTransformation(init, update)


def nearest_orthogonal(matrix: Float[np.ndarray, "*batch n n"]) -> Float[np.ndarray, "*batch n n"]:
    """Removes rounding errors from orthogonal matrices, in float64 on the host; the identity stays as it is.

    Args:
        matrix: orthogonal up to rounding.

    Returns:
        The orthogonal polar factor, float64, by Newton's iteration.

    Raises:
        FormatError: the matrix is far from orthogonal, or not finite.

    Example:
        >>> turned = nearest_orthogonal(np.float32([[0.6, 0.8], [-0.8, 0.6]]))
        >>> bool(np.abs(turned @ turned.T - np.eye(2)).max() < 1e-15)
        True
    """
    found, eye = matrix.astype(np.float64), np.eye(matrix.shape[-1])
    distance = np.abs(found.swapaxes(-1, -2) @ found - eye).max()
    if not distance < _FARTHEST:
        raise FormatError(
            f"a matrix of order {matrix.shape[-1]} is not orthogonal: T^T T is {distance:.3g} from the identity, more "
            f"than rounding ({_FARTHEST}); orthogonalise it (a QR or polar decomposition) if that is meant"
        )
    for _ in range(_NEWTON_STEPS):
        found = found @ (1.5 * eye - 0.5 * (found.swapaxes(-1, -2) @ found))
    return found


def _turn(
    matrix: Float[Array, "*batch n n"], descent: Float[Array, "*batch n n"], rate: float | Float[Array, ""]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """Returns the matrices after an update by V, and the V that is kept."""
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    slope = _times(descent, _transposed(matrix))
    slope = slope - 0.5 * _times(matrix, _times(_transposed(matrix), slope))
    skew = slope - _transposed(slope)
    norm = jnp.max(jnp.sum(jnp.abs(skew), axis=-2), axis=-1)
    step = jnp.minimum(jnp.asarray(rate, norm.dtype), 1 / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    half = 0.5 * step[..., None, None] * skew
    turned = jnp.linalg.solve(eye - half, _times(eye + half, matrix))
    turned = _times(turned, 1.5 * eye - 0.5 * _times(_transposed(turned), turned))
    return turned, _times(skew, matrix)


def _times(left: Float[Array, "*batch n n"], right: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _transposed(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    return matrix.swapaxes(-1, -2)
