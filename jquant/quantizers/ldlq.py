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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.numerics import unit_factor
from jquant.quantizers.solver import Solver
from jquant.types import Key, Leaf

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


class Factored(NamedTuple):
    """A damped Hessian H_d, its rows and columns in the order of processing, as sweeps need it.

    Attributes:
      sequence: which inputs these are.
      upper: M [in, in].
      pivots: D [in].
      hollow: H_d without its diagonal.
      diagonal: of H_d.
      damping: what was added to the Hessian's diagonal, relative to its mean.
    """

    sequence: Leaf
    upper: Leaf
    pivots: Leaf
    hollow: Leaf
    diagonal: Leaf
    damping: Leaf


def order_of(hessian: Float[Array, "in in"], order: Order) -> Int[Array, "in"]:
    """Returns the inputs in processing order; "activation" takes the largest diagonal first, ties in natural order."""
    if order == "activation":
        return jnp.argsort(-jnp.diagonal(hessian), stable=True)
    inputs = jnp.arange(hessian.shape[0])
    return inputs if order == "natural" else jnp.flip(inputs)


def factorize(hessian: Float[Array, "in in"], damping: float | Float[Array, ""], order: Order) -> Factored:
    """Orders, damps and factors a Hessian, once for all roundings that it serves.

    Args:
      hessian: H, of the inputs' own order.
      damping: share of the mean diagonal added to H first; raised step by step if it does not suffice.
      order: of the rows, in all sweeps.
    """
    sequence = order_of(hessian, order)
    hessian = hessian[sequence[:, None], sequence[None, :]]
    factor = unit_factor(hessian, damping)
    diagonal = jnp.diagonal(hessian) + factor.damping * jnp.mean(jnp.diagonal(hessian))
    hollow = hessian * (1 - jnp.eye(hessian.shape[0], dtype=hessian.dtype))
    return Factored(sequence, factor.upper, factor.pivots, hollow, diagonal, factor.damping)


@functools.partial(jax.jit, static_argnames=("rounding", "order", "fidelity", "solver"))
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
    solver: Solver = Solver.MACHINE,
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
      solver: what rounds the rows of a block.

    Returns:
      Codes in the inputs' own order.

    Example:
      >>> hessian = jnp.array([[2.0, 1.9], [1.9, 2.0]])
      >>> target = jnp.array([[0.4], [0.4]])
      >>> round_with_feedback(target, hessian, jax.random.key(0), damping=0.0).codes.ravel().tolist()
      [0.0, 1.0]

    Reference: arXiv:2307.13304.
    """
    factored = factorize(hessian, damping, order)
    return round_factored(
        target, factored, key, rounding=rounding, greedy_passes=greedy_passes, top=top, fidelity=fidelity, solver=solver
    )


def round_factored(
    target: Float[Array, "in out"],
    factored: Factored,
    key: Key,
    *,
    rounding: Rounding,
    greedy_passes: int | Int[Array, ""],
    top: int | Int[Array, ""] | None,
    fidelity: Fidelity,
    solver: Solver = Solver.MACHINE,
) -> Rounded:
    """Rounds as `round_with_feedback`, whose arguments these are, with a Hessian that is factored."""
    sequence, upper, pivots, hollow, diagonal, damping = factored
    first = jnp.triu(upper, 1) if rounding != "near" else jnp.zeros_like(upper)
    noise = jax.random.uniform(key, target.shape, target.dtype) if rounding == "stochastic" else None
    codes, errors = target[sequence], jnp.zeros_like(target)
    everything = jnp.asarray([-jnp.inf, jnp.inf], target.dtype)
    ends = everything if top is None else jnp.stack([jnp.zeros((), target.dtype), jnp.asarray(top, target.dtype)])
    sweep = functools.partial(_sweep, solver.resolve(target.dtype))
    alike = rounding in ("ldlq", "near") and fidelity == "paper"  # all sweeps: one loop, half as much to compile
    if not alike and rounding != "greedy":
        codes, errors = sweep(codes, errors, first, noise, ends)

    def later(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        feedback = hollow / diagonal[None, :]
        if fidelity == "paper":
            return sweep(*state, jnp.where(number == 0, first, feedback) if alike else feedback, None, ends)
        codes, errors = sweep(*state, feedback, None, everything)
        return jnp.clip(codes, ends[0], ends[1]), errors

    codes, _ = jax.lax.fori_loop(0, greedy_passes + int(alike), later, (codes, errors))
    errors = codes - target[sequence]
    curved = jnp.matmul(hollow, errors, precision=jax.lax.Precision.HIGHEST) + diagonal[:, None] * errors
    restored = jnp.zeros_like(codes).at[sequence].set(codes)
    return Rounded(restored, jnp.sum(errors * curved, axis=0), pivots, damping)


def _sweep(
    solver: Solver,
    codes: jax.Array,
    errors: jax.Array,
    feedback: jax.Array,
    noise: jax.Array | None,
    ends: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Rounds the rows in turn and returns codes and errors; `noise` in [0, 1) in place of the half of rounding."""
    count = codes.shape[0]
    size = min(solver.rows, count)
    padding = -count % size  # rows of zeros without feedback: they take no error and give none
    codes, errors = (jnp.pad(rows, ((0, padding), (0, 0))) for rows in (codes, errors))
    feedback = jnp.pad(feedback, ((0, padding), (0, padding)))
    noise = None if noise is None else jnp.pad(noise, ((0, padding), (0, 0)))

    def block(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jax.lax.dynamic_slice_in_dim(feedback, start, size, axis=1)
        within = jax.lax.dynamic_slice_in_dim(columns, start, size)  # [size, size]
        own, made = (jax.lax.dynamic_slice_in_dim(rows, start, size) for rows in (codes, errors))
        draws = () if noise is None else (jax.lax.dynamic_slice_in_dim(noise, start, size),)
        points = own - made - jnp.matmul(columns.T, errors, precision=jax.lax.Precision.HIGHEST)
        rounded = solver.run(_round_by_kernel, _round_by_scan, points, own, within, ends, *draws)
        return jax.lax.dynamic_update_slice_in_dim(errors, made + rounded - own, start, axis=0), rounded

    errors, blocks = jax.lax.scan(block, errors, jnp.arange(0, count + padding, size))
    return blocks.reshape(codes.shape)[:count], errors[:count]


def _round_by_scan(
    points: jax.Array, codes: jax.Array, feedback: jax.Array, ends: jax.Array, *noise: jax.Array
) -> jax.Array:
    """Rounds the rows of one block in turn, `points` holding what they would round now."""

    def row(points: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        point = points[index]
        rounded = jnp.floor(point + noise[0][index]) if noise else jnp.round(point)
        rounded = jnp.clip(rounded, ends[0], ends[1])
        change = rounded - codes[index]
        return points - feedback[index][:, None] * change[None, :], rounded

    return jax.lax.scan(row, points, jnp.arange(points.shape[0]))[1]


def _round_by_kernel(
    points: jax.Array, codes: jax.Array, feedback: jax.Array, ends: jax.Array, *noise: jax.Array, simulate: Any
) -> Any:
    from pallas_kernels import round_to_steps

    return round_to_steps(points, feedback, ends, codes, noise[0] if noise else None, simulate=simulate)
