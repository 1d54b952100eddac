"""BCQ: binary codes fitted by alternating least squares, the weights of LUT-GEMM (spec_weights.md section 7).

For a group of inputs and an output, w ~ sum_k alpha_k b_k with b_k in {-1, +1}. Greedy start, r = w:

    b_k = sign(r),   alpha_k = mean |r|,   r -= alpha_k b_k,        k = 1..bits

and then rounds of two exact minimisations of ||w - B alpha||^2, so that it never rises:

    alpha = argmin ||w - B alpha||  (bits x bits normal equations),     b = the nearest of the 2^bits sums of +-alpha

Xu et al. 2018, arXiv:1802.00150; Park et al. 2022, LUT-GEMM, arXiv:2206.09557. A zero residual has sign +1.

There is no offset in the fit, and the squared error that it minimises spends little on the few largest weights: per
channel its error is below that of round to nearest, and the perplexity above (spec_weights.md section 7, point 5).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jquant.errors import FormatError
from jquant.formats import BinaryFormat, BinaryTensor, quantize_binary
from jquant.numerics import as_stored
from jquant.quantizers.base import Diagnostics, WeightQuantizer, weight_error
from jquant.types import Key, compute_dtype

CONJUGATE_FLOOR: Final = 1e-6  # added to the denominators of LUT-GEMM's conjugate gradients: reference code


type Store = Callable[[jax.Array], jax.Array]  # an alpha -> what the format keeps of it
type Solve = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (B^T B, B^T w, last alphas) -> alphas


class BinaryFit(NamedTuple):
    """Binary codes of one group: bit k of `codes` [size, out] is the sign of `alphas[k]` [bits, out]."""

    alphas: Float[Array, "bits out"]
    codes: UInt8[Array, "size out"]


@final
@dataclass(frozen=True)
class Bcq(WeightQuantizer):
    """Binary-coding quantization; needs no calibration.

    Attributes:
      format: bits, groups and how alphas are stored.
      method: "greedy" for the start alone, "refined" for one round of least squares and assignment after it (the
        "refined greedy" of LUT-GEMM's code), "alternating" for `rounds` of them.
      rounds: rounds of "alternating"; the others ignore it. 15 is the default of LUT-GEMM's code; published results
        took 30.
      fidelity: "paper" solves the least squares exactly, in float32. "reference" does as LUT-GEMM's code: `bits` steps
        of conjugate gradients from the last alphas, their denominators raised by 1e-6, which is not small for weights
        below 1e-4; and a greedy start in the weight's own dtype.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (128, 8))
      >>> tensor, _ = Bcq(BinaryFormat(bits=4, group_size=64))(weight, None, jax.random.key(1))
      >>> tensor.bits_per_weight()
      5.0
    """

    statistic = None
    separable = True

    format: BinaryFormat = BinaryFormat()
    method: Literal["greedy", "refined", "alternating"] = "alternating"
    rounds: int = 15
    fidelity: Literal["paper", "reference"] = "paper"

    def __post_init__(self) -> None:
        """Refuses a number of rounds that means nothing."""
        if self.rounds < 1:
            raise FormatError(f'rounds={self.rounds}: give 1 or more, or method "greedy" for no rounds')

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if the group size does not divide the inputs."""
        self.format.groups(shape[0])

    def __call__(self, weight: Float[Array, "in out"], statistics: Any, key: Key) -> tuple[BinaryTensor, Diagnostics]:
        """Fits a matrix, group after group; an all-zero group gets alphas of zero."""
        del statistics, key
        groups = self.format.groups(weight.shape[0])
        start = weight if self.fidelity == "reference" else weight.astype(compute_dtype(weight.dtype))
        fit = jax.lax.map(self.fit, start.reshape(groups, weight.shape[0] // groups, -1))
        tensor = quantize_binary(fit.codes.reshape(weight.shape), fit.alphas.swapaxes(0, 1), None, self.format)
        return tensor, weight_error(weight.astype(fit.alphas.dtype), tensor)

    def fit(self, values: Float[Array, "size out"]) -> BinaryFit:
        """Fits one group of inputs for every output; the alphas are those that the format will store."""
        rounds = {"greedy": 0, "refined": 1, "alternating": self.rounds}[self.method]
        store = functools.partial(as_stored, dtype=self.format.scale_dtype)
        if rounds == 0 or self.format.bits == 1:  # one sign: mean |w| and sign(w) are the optimum
            return _wide(greedy(values, self.format.bits, store))
        first = _wide(greedy(values, self.format.bits, lambda alphas: alphas))
        values = values.astype(first.alphas.dtype)
        solve = _conjugate_gradients if self.fidelity == "reference" else least_squares
        alphas = store(alternate(values, first, rounds, solve).alphas)
        return BinaryFit(alphas, assign(values, alphas))


def greedy(values: Float[Array, "size out"], bits: int, store: Store) -> BinaryFit:
    """Fits one sign after another to what the signs before it left, in the dtype of the values.

    Args:
      values: one group of inputs.
      bits: signs of a weight.
      store: rounds an alpha to what will be stored, before its share is taken off.

    Returns:
      Alphas and signs.
    """
    residual, codes, alphas = values, jnp.zeros(values.shape, jnp.uint8), []
    for bit in range(bits):
        positive = residual >= 0
        alpha = store(jnp.mean(jnp.abs(residual), axis=0))
        residual = residual - jnp.where(positive, alpha[None], -alpha[None])
        codes = codes | positive.astype(jnp.uint8) << jnp.uint8(bit)
        alphas.append(alpha)
    return BinaryFit(jnp.stack(alphas), codes)


def assign(values: Float[Array, "size out"], alphas: Float[Array, "bits out"]) -> UInt8[Array, "size out"]:
    """Returns the codes of the nearest levels; a weight halfway between two takes the higher.

    The 2^bits sums of +-alpha are sorted; the code of a weight changes at each midpoint that it reaches.

    Example:
      >>> assign(jnp.array([[0.9], [-0.2], [0.0]]), jnp.array([[1.0], [0.5]])).ravel().tolist()
      [1, 2, 1]
    """
    bits = alphas.shape[0]
    sums = jnp.zeros((1, alphas.shape[1]), alphas.dtype)
    for bit in range(bits):
        sums = jnp.concatenate([sums - alphas[bit][None], sums + alphas[bit][None]])  # row p: bit j of p is b_j
    codes = jnp.broadcast_to(jnp.arange(2**bits, dtype=jnp.uint8)[:, None], sums.shape)
    levels, order = jax.lax.sort((sums, codes), dimension=0, num_keys=1)
    midpoints = (levels[1:] + levels[:-1]) / 2

    def pass_boundary(codes: jax.Array, boundary: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        midpoint, above = boundary
        return jnp.where(values >= midpoint[None], above[None], codes), None

    lowest = jnp.broadcast_to(order[:1], values.shape)
    return jax.lax.scan(pass_boundary, lowest, (midpoints, order[1:]))[0]


def least_squares(
    gram: Float[Array, "bits bits out"], right: Float[Array, "bits out"], start: Float[Array, "bits out"]
) -> Float[Array, "bits out"]:
    """Solves gram x = right exactly for every output, by L D L^T; `start` is not needed.

    A pivot is the squared distance of a sign vector to the span of those before it: zero where it depends on them, as
    in constant groups. Its alpha is then zero, and the others still are a minimum; other pivots are of order 1.
    """
    del start
    bits = right.shape[0]
    tolerance = 16 * bits * jnp.finfo(gram.dtype).eps * gram[0, 0]
    lower: list[list[jax.Array]] = []  # L D, row after row
    inverse: list[jax.Array] = []  # 1 / D
    for i in range(bits):
        row: list[jax.Array] = []
        lower.append(row)
        for j in range(i + 1):
            row.append(gram[i, j] - _dot([row[p] * inverse[p] for p in range(j)], lower[j][:j]))
        alive = row[i] > tolerance
        inverse.append(jnp.where(alive, 1 / jnp.where(alive, row[i], 1), 0))
    forward: list[jax.Array] = []
    for i in range(bits):
        forward.append((right[i] - _dot(lower[i][:i], forward)) * inverse[i])
    solution: list[jax.Array] = [jnp.zeros_like(right[0])] * bits
    for i in reversed(range(bits)):
        after = range(i + 1, bits)
        solution[i] = forward[i] - inverse[i] * _dot([lower[j][i] for j in after], [solution[j] for j in after])
    return jnp.stack(solution)


def alternate(
    values: Float[Array, "size out"], start: BinaryFit, rounds: int, solve: Solve = least_squares
) -> BinaryFit:
    """Runs rounds of alphas for the signs, then signs for the alphas; alphas come out positive and falling.

    Args:
      values: one group of inputs, in the dtype of the alphas.
      start: where to begin.
      rounds: how many rounds.
      solve: (B^T B, B^T w, last alphas) -> alphas; with the exact one the squared error of no output rises.

    Returns:
      The fit after the last round.
    """

    def improve(fit: BinaryFit, _: None) -> tuple[BinaryFit, None]:
        alphas = solve(*normal_equations(values, fit), fit.alphas)
        alphas = jnp.sort(jnp.abs(alphas), axis=0, descending=True)  # signs are chosen anew, so |alpha| loses nothing
        return BinaryFit(alphas, assign(values, alphas)), None

    return jax.lax.scan(improve, start, length=rounds)[0]


def normal_equations(
    values: Float[Array, "size out"], fit: BinaryFit
) -> tuple[Float[Array, "bits bits out"], Float[Array, "bits out"]]:
    """Returns B^T B and B^T w of every output, B [size, bits] the signs."""
    size, bits = values.shape[0], fit.alphas.shape[0]
    planes = [(fit.codes >> jnp.uint8(bit)) & jnp.uint8(1) for bit in range(bits)]
    whole = jnp.full(values.shape[1:], size, values.dtype)

    def product(one: int, other: int) -> jax.Array:
        if one == other:
            return whole
        return whole - 2 * jnp.sum(planes[one] ^ planes[other], axis=0, dtype=jnp.int32).astype(values.dtype)

    upper = {(i, j): product(i, j) for i in range(bits) for j in range(i, bits)}
    gram = jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in range(bits)]) for i in range(bits)])
    return gram, jnp.stack([jnp.sum(jnp.where(plane == 1, values, -values), axis=0) for plane in planes])


def _dot(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> jax.Array | int:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _conjugate_gradients(gram: jax.Array, right: jax.Array, start: jax.Array) -> jax.Array:
    """Improves `start` by as many steps as there are bits, as LUT-GEMM's code does."""

    def apply(vector: jax.Array) -> jax.Array:
        return jnp.sum(gram * vector[None], axis=1)

    solution, residual = start, right - apply(start)
    direction, energy = residual, jnp.sum(residual**2, axis=0)
    for _ in range(right.shape[0]):
        image = apply(direction)
        step = energy / (jnp.sum(direction * image, axis=0) + CONJUGATE_FLOOR)
        solution, residual = solution + step[None] * direction, residual - step[None] * image
        before, energy = energy, jnp.sum(residual**2, axis=0)
        direction = residual + (energy / (before + CONJUGATE_FLOOR))[None] * direction
    return solution


def _wide(fit: BinaryFit) -> BinaryFit:
    return fit._replace(alphas=fit.alphas.astype(compute_dtype(fit.alphas.dtype)))
