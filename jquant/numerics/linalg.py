"""Factorizations of damped Hessians, as GPTQ and its relatives need them.

For H = 2 X^T X / n [in, in], symmetric and positive semidefinite up to rounding, and a damping d relative to the mean
of its diagonal:

    H_d = H + d mean(diag H) I,        inv(H_d) = U^T U with U upper triangular.

Write H_d = R R^T with R upper (Cholesky of H_d with both axes reversed, reversed back); then U = inv(R). One Cholesky
and one triangular solve give U, and H_d is never inverted. The same R, its columns divided by its diagonal, is the
factor M of H_d = M diag(D) M^T, unit upper triangular, D = diag(R)^2.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jquant.types import Leaf

DAMPING_STEP: Final = 0.01  # what a failed Cholesky adds to the damping: GPTQModel's damp_auto_increment
DAMPING_LIMIT: Final = 1.0  # no attempt is made with this much or more, unless it was asked for: GPTQModel


class InverseFactor(NamedTuple):
    """Hold U with inv(H_d) = U^T U, `[in, in]`, and the damping that made H_d, relative to the mean of the diagonal."""

    upper: Leaf
    damping: Leaf


class UnitFactor(NamedTuple):
    """Hold M `[in, in]`, unit upper triangular, and D `[in]`, H_d = M diag(D) M^T, and the damping that made H_d."""

    upper: Leaf
    pivots: Leaf
    damping: Leaf


@jax.jit
def inverse_factor(hessian: Float[Array, "n n"], damping: float | Float[Array, ""]) -> InverseFactor:
    """Factor the inverse of a damped Hessian: inv(H + d mean(diag H) I) = U^T U, U upper with a positive diagonal.

    If the factor is not finite, because H is not positive definite up to rounding, d grows by `DAMPING_STEP` and the
    factorization is tried again, while d < `DAMPING_LIMIT`. A Hessian that more damping cannot cure (not finite, or
    mean(diag H) <= 0) is tried once.

    Args:
        hessian: symmetric `[n, n]`, float32 or float64; the result has its dtype. Inputs that are always zero should
            have been revived (see `revive_dead`).
        damping: the first d to try; 0.01 in GPTQ.

    Returns:
        U, not finite if no damping succeeded, and the d of the last attempt: compare it to what was asked.

    Example:
        >>> factor = inverse_factor(jnp.array([[4.0, 0.0], [0.0, 1.0]]), damping=0.0)
        >>> factor.upper.tolist(), float(factor.damping)
        ([[0.5, 0.0], [0.0, 1.0]], 0.0)

    Reference:
        Frantar et al., GPTQ: Accurate post-training quantization for generative pre-trained transformers (2023),
        section 3.3.
    """
    return InverseFactor(*_with_damping(_upper_of_inverse, hessian, damping))


@jax.jit
def unit_factor(hessian: Float[Array, "n n"], damping: float | Float[Array, ""]) -> UnitFactor:
    """Factor a damped Hessian: H + d mean(diag H) I = M diag(D) M^T, M upper triangular with ones on its diagonal.

    What `inverse_factor` says of damping and of Hessians that cannot be factored holds here too.

    Args:
        hessian: symmetric `[n, n]`, float32 or float64.
        damping: the first d to try.

    Returns:
        M and D, not finite if no damping succeeded, and the d of the last attempt.

    Example:
        >>> factor = unit_factor(jnp.array([[5.0, 2.0], [2.0, 1.0]]), damping=0.0)
        >>> factor.upper.tolist(), factor.pivots.tolist()
        ([[1.0, 2.0], [0.0, 1.0]], [1.0, 1.0])

    Reference:
        Chee et al., QuIP: 2-bit quantization of large language models with guarantees (2023).
    """
    root, used = _with_damping(_upper_root, hessian, damping)
    diagonal = jnp.diagonal(root)
    return UnitFactor(root / diagonal[None, :], diagonal**2, used)


def _with_damping(
    factorize: Callable[[jax.Array], jax.Array], hessian: jax.Array, damping: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factorize the damped Hessian, raising the damping while the factor is not finite. Return factor and damping."""
    first = jnp.asarray(damping, dtype=hessian.dtype)
    mean = jnp.mean(jnp.diagonal(hessian))
    finite = jnp.all(jnp.isfinite(hessian)) & jnp.isfinite(mean)
    curable = finite & (mean > 0)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, _, _ = state
        tried = first + tries.astype(hessian.dtype) * DAMPING_STEP
        return tries + 1, factorize(_damp(hessian, tried * mean)), tried

    def try_again(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        tries, factor, tried = state
        failed = ~jnp.all(jnp.isfinite(factor))
        return (tries == 0) | (failed & curable & (tried + DAMPING_STEP < DAMPING_LIMIT))

    start = (jnp.int32(0), jnp.full_like(hessian, jnp.nan), first)
    _, factor, used = jax.lax.while_loop(try_again, attempt, start)
    return jnp.where(finite, factor, jnp.nan), used  # the solve can turn infinities into zeros


def revive_dead(
    hessian: Float[Array, "n n"], weight: Float[Array, "n out"]
) -> tuple[Float[Array, "n n"], Float[Array, "n out"]]:
    """Neutralize the inputs that were zero on all calibration data: mean(live diag H) in H_jj, zero in row j of W.

    Their weights never mattered, and a zero on the diagonal would make H singular. The mean leaves the damping what it
    is for the live inputs, whatever the scale of H; the reference code's H_jj = 1 does not. Where no input is alive
    nothing is known of any weight: H stays zero, and no factorization of it succeeds.

    Args:
        hessian: `[n, n]`.
        weight: `[n, out]`.

    Returns:
        Hessian and weight, equal to the given ones where every H_jj is positive.

    Example:
        >>> hessian, weight = revive_dead(jnp.diag(jnp.array([2.0, 0.0])), jnp.ones((2, 1)))
        >>> hessian.tolist(), weight.tolist()
        ([[2.0, 0.0], [0.0, 2.0]], [[1.0], [0.0]])
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    level = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(hessian.dtype)
    revived = hessian + jnp.diag(jnp.where(dead, level, jnp.zeros_like(diagonal)))
    return revived, jnp.where(dead[:, None], jnp.zeros_like(weight), weight)


def _damp(hessian: Float[Array, "n n"], shift: Float[Array, ""]) -> Float[Array, "n n"]:
    return hessian + shift * jnp.eye(hessian.shape[0], dtype=hessian.dtype)


def _upper_root(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    with jax.default_matmul_precision("highest"):
        return jnp.flip(jnp.linalg.cholesky(jnp.flip(matrix)))


def _upper_of_inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    with jax.default_matmul_precision("highest"):
        identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
        return jax.scipy.linalg.solve_triangular(_upper_root(matrix), identity, lower=False)
