"""LDLQ: round one input row at a time, with linear feedback from the errors made so far; and greedy passes after it.

In units of grid steps: t [in, out] the weight, q its codes, e = q - t. Every method here is sweeps over the rows,

    q_j = round(q_j - e_j - sum_i F_ij e_i),        F_jj = 0,

that start at q = t, e = 0 and differ in the feedback F [in, in] alone:

    near                F = 0
    LDLQ                H_d = M diag(D) M^T, M unit upper triangular; F = M - I. The error is tr((q - t)^T H_d (q - t))
                        = sum_j D_j |rounding error of row j|^2, so about tr(D) / 12 an output
    greedy              F_ij = H_ij / H_jj: coordinate descent, each row to its best codes given all others

LDLQ is GPTQ (arXiv:2210.17323) in another form: same order, same codes. A greedy sweep after it never raises the
error. Rows are handled in blocks, one product with F a block; results do not depend on the block size.

Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304; their W is our t^T. Their code runs from the last input to the first.
"""

import functools
from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.numerics import unit_factor
from jquant.types import Key, Leaf

BLOCK_SIZE: Final = 64  # rows between matrix products

type Rounding = Literal["ldlq", "stochastic", "greedy", "near"]
type Order = Literal["natural", "reversed", "activation"]
type Fidelity = Literal["paper", "reference"]


class Rounded(NamedTuple):
    """Codes of a solve.

    Attributes:
      codes: whole numbers [in, out], as floats; not finite where the solve failed.
      loss: (q - t)^T H_d (q - t) of each output, in units of grid steps.
      pivots: D [in], in the order of processing.
      damping: what was added to the Hessian's diagonal, relative to its mean.
    """

    codes: Leaf
    loss: Leaf
    pivots: Leaf
    damping: Leaf


def order_of(hessian: Float[Array, "in in"], order: Order) -> Int[Array, "in"]:
    """Returns the inputs in processing order; "activation" takes the largest diagonal first, ties in natural order."""
    if order == "activation":
        return jnp.argsort(-jnp.diagonal(hessian), stable=True)
    inputs = jnp.arange(hessian.shape[0])
    return inputs if order == "natural" else jnp.flip(inputs)


@functools.partial(jax.jit, static_argnames=("rounding", "order", "fidelity"))
def round_with_feedback(
    target: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    key: Key,
    *,
    damping: float | Float[Array, ""],
    rounding: Rounding = "ldlq",
    order: Order = "natural",
    greedy_passes: int | Int[Array, ""] = 0,
    top: int | Int[Array, ""] | None = None,
    fidelity: Fidelity = "paper",
) -> Rounded:
    """Rounds a matrix, given in units of grid steps, to whole numbers.

    Args:
      target: t.
      hessian: H, of the inputs' own order.
      key: random key; "stochastic" alone draws.
      damping: share of the mean diagonal added to H first; raised step by step if it does not suffice.
      rounding: the first sweep; "stochastic" is LDLQ that rounds up with the probability of the fraction, "greedy"
        starts at the unrounded target and leaves all work to the greedy passes.
      order: of the rows, in all sweeps.
      greedy_passes: sweeps of coordinate descent after the first.
      top: the largest code; codes are clipped to 0..top inside the sweep. None for all whole numbers.
      fidelity: "reference" clips after each greedy pass instead and forgets what that changed, as the code of the
        paper does, so that later passes start from errors that are not there.

    Returns:
      Codes in the inputs' own order.

    Example:
      >>> hessian = jnp.array([[2.0, 1.9], [1.9, 2.0]])
      >>> target = jnp.array([[0.4], [0.4]])
      >>> round_with_feedback(target, hessian, jax.random.key(0), damping=0.0).codes.ravel().tolist()
      [0.0, 1.0]

    Reference: arXiv:2307.13304.
    """
    sequence = order_of(hessian, order)
    hessian = hessian[sequence[:, None], sequence[None, :]]
    factor = unit_factor(hessian, damping)
    diagonal = jnp.diagonal(hessian) + factor.damping * jnp.mean(jnp.diagonal(hessian))
    hollow = hessian * (1 - jnp.eye(hessian.shape[0], dtype=hessian.dtype))
    first = jnp.triu(factor.upper, 1) if rounding != "near" else jnp.zeros_like(hessian)
    noise = jax.random.uniform(key, target.shape, target.dtype) if rounding == "stochastic" else None
    codes, errors = target[sequence], jnp.zeros_like(target)
    limit = None if top is None else jnp.asarray(top, target.dtype)
    if rounding != "greedy":
        codes, errors = _sweep(codes, errors, first, noise, limit)

    def greedy(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if fidelity == "paper":
            return _sweep(*state, hollow / diagonal[None, :], None, limit)
        codes, errors = _sweep(*state, hollow / diagonal[None, :], None, None)
        return jnp.clip(codes, 0, limit), errors

    codes, _ = jax.lax.fori_loop(0, greedy_passes, greedy, (codes, errors))
    errors = codes - target[sequence]
    curved = jnp.matmul(hollow, errors, precision=jax.lax.Precision.HIGHEST) + diagonal[:, None] * errors
    restored = jnp.zeros_like(codes).at[sequence].set(codes)
    return Rounded(restored, jnp.sum(errors * curved, axis=0), factor.pivots, factor.damping)


def _sweep(
    codes: jax.Array, errors: jax.Array, feedback: jax.Array, noise: jax.Array | None, top: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Rounds the rows in turn and returns codes and errors; `noise` in [0, 1) in place of the half of rounding."""
    count = codes.shape[0]
    size = min(BLOCK_SIZE, count)
    padding = -count % size  # rows of zeros without feedback: they take no error and give none
    codes, errors = (jnp.pad(rows, ((0, padding), (0, 0))) for rows in (codes, errors))
    feedback = jnp.pad(feedback, ((0, padding), (0, padding)))
    noise = None if noise is None else jnp.pad(noise, ((0, padding), (0, 0)))

    def block(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jax.lax.dynamic_slice_in_dim(feedback, start, size, axis=1)
        within = jax.lax.dynamic_slice_in_dim(columns, start, size)  # [size, size]
        own, made = (jax.lax.dynamic_slice_in_dim(rows, start, size) for rows in (codes, errors))
        draws = None if noise is None else jax.lax.dynamic_slice_in_dim(noise, start, size)
        points = own - made - jnp.matmul(columns.T, errors, precision=jax.lax.Precision.HIGHEST)
        rounded = _sweep_block(points, own, within, draws, top)
        return jax.lax.dynamic_update_slice_in_dim(errors, made + rounded - own, start, axis=0), rounded

    errors, blocks = jax.lax.scan(block, errors, jnp.arange(0, count + padding, size))
    return blocks.reshape(codes.shape)[:count], errors[:count]


def _sweep_block(
    points: jax.Array, codes: jax.Array, feedback: jax.Array, noise: jax.Array | None, top: jax.Array | None
) -> jax.Array:
    """Rounds the rows of one block in turn, `points` holding what they would round now."""

    def row(points: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = points[index]
        rounded = jnp.round(point) if noise is None else jnp.floor(point + noise[index])
        rounded = rounded if top is None else jnp.clip(rounded, 0, top)
        change = rounded - codes[index]
        return points - feedback[index][:, None] * change[None, :], rounded

    return jax.lax.scan(row, points, jnp.arange(points.shape[0]))[1]
