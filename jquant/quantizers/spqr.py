"""SpQR: GPTQ on small groups whose statistics are quantized too, with the few weights that cost most kept as numbers.

Dettmers, Svirschevski, Egiazarian, Kuznedelev, Frantar, Ashkboos, Borzunov, Hoefler, Alistarh 2023, arXiv:2306.03078.

Rows are rounded in turn and their errors e_j = (w_j - q_j) / U_jj spread over those to come, as in GPTQ. When a group's
turn comes, its two-level grid (`jquant.quantizers.bilevel`) is fitted to the weights as updated by then. A weight with

    e^2 > threshold * mean_j(var(w_j) / U_jj^2)

is an outlier: it stays a number, as updated by then, and spreads no error. Before a group is fitted, weights that would
lower its sum of e^2 by more than that if the grid had not to fit them are replaced by the mean of the others (leave one
out). Exact identity, used as a test: sum e^2 = (w - q)^T H (w - q) with the damped H, outliers included
(spec_weights.md section 6).
"""

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from jquant.errors import FormatError
from jquant.formats import PermutedTensor, QuantizedTensor, SpqrFormat, StatisticCodes, quantize_spqr
from jquant.numerics import as_stored, inverse_factor, revive_dead
from jquant.quantizers.base import Diagnostics, WeightQuantizer, weight_error
from jquant.quantizers.bilevel import Fidelity, Grids, fit_group, leave_one_out, nearest
from jquant.quantizers.solver import Solver
from jquant.quantizers.statistics import HESSIAN, SecondMoment
from jquant.types import Key

FULL: Final = 0.99  # share of its room that a search for the threshold is content to fill
CLOSE: Final = 1.01  # ratio of two thresholds between which the search stops
MOST_TRIES: Final = 24  # solves of one search; a bracket and eight halvings take about 12


class Problem(NamedTuple):
    """A matrix in processing order, its factor, how much each input's error counts (0 if dead), what rounds rows."""

    rows: Float[Array, "in out"]
    upper: Float[Array, "in in"]
    counts: Float[Array, "in"]
    damping: Float[Array, ""]
    solver: Solver = Solver.MACHINE


class Solution(NamedTuple):
    """What a solve gives, in processing order; `grids` has a leading axis of groups."""

    codes: UInt8[Array, "in out"]
    outliers: Bool[Array, "in out"]
    dense: Float[Array, "in out"]
    errors: Float[Array, "in out"]
    grids: Grids


class Search(NamedTuple):
    """A search for the threshold: too many outliers at `below` (-1: not known), all fit at `above` (inf: likewise)."""

    tries: Int[Array, ""]
    below: Float[Array, ""]
    above: Float[Array, ""]
    solution: Solution


@final
@dataclass(frozen=True)
class Spqr(WeightQuantizer):
    """SpQR on the paper's two-level groups.

    Outliers never get lost: where the threshold gives more than there is room for, it is raised, by bisection over the
    solve, until they fit. With `bits_target` it is lowered too, so that outliers fill what the target leaves.

    Attributes:
      format: bits and groups of both levels, and how numbers are stored.
      outlier_threshold: which errors make an outlier, relative to the mean variance of a row over U_jj^2; a higher one
        gives fewer; None for no outliers. The first guess if there is a `bits_target`.
      outlier_limit: largest share of weights kept as outliers.
      bits_target: bits per weight that each matrix may take, outliers and order included; None for no target.
      order: "activation": inputs with the largest Hessian diagonal first, kept by a `PermutedTensor`; or "natural".
      damping: as in GPTQ.
      search: "leave_one_out" as above; "none" fits the grid to all weights of a group.
      fidelity: a range without width is exact in "paper"; "reference" makes it [-1, 1], on both levels.

    Reference: arXiv:2306.03078, Algorithm 1.
    """

    statistic = HESSIAN
    separable = False

    format: SpqrFormat = SpqrFormat()
    outlier_threshold: float | None = 0.2  # the paper's README
    outlier_limit: float = 0.05
    bits_target: float | None = None
    order: Literal["natural", "activation"] = "activation"
    damping: float = 0.01
    search: Literal["leave_one_out", "none"] = "leave_one_out"
    fidelity: Fidelity = "paper"

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        if self.outlier_threshold is None and self.bits_target is not None:
            raise FormatError("bits_target needs outliers to fill it: give an outlier_threshold to start from")
        if (self.outlier_threshold or 0.0) < 0 or not 0 < self.outlier_limit <= 1:
            raise FormatError(
                f"outlier_threshold={self.outlier_threshold}, outlier_limit={self.outlier_limit}: give 0 or more, and "
                "a share above 0, at most 1"
            )

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if a group size does not divide the shape, or the target is too small for it."""
        self.format.groups(shape)
        self.room(shape)

    def room(self, shape: tuple[int, ...]) -> int:
        """Returns how many outliers a matrix of this shape may have.

        Raises:
          FormatError: without any outlier it takes more bits than `bits_target`.
        """
        weights = shape[0] * shape[1]
        if self.bits_target is None:
            return max(1, int(self.outlier_limit * weights))
        one, two = (jax.eval_shape(functools.partial(self._empty, shape, room)).nbytes() for room in (1, 2))
        room = int((self.bits_target * weights / 8 - one) // (two - one)) + 1
        if room < 1:
            least = 8 * one / weights
            raise FormatError(f"bits_target {self.bits_target} for {shape}: it takes {least:.3f} with one outlier")
        return min(room, max(1, int(self.outlier_limit * weights)))

    def __call__(
        self, weight: Float[Array, "in out"], statistics: SecondMoment, key: Key
    ) -> tuple[QuantizedTensor, Diagnostics]:
        """Quantizes a matrix; its list of outliers has empty room, which `compact` gives back.

        Diagnostics: as `Gptq`; also `outliers` of each output and the `threshold` that was used.
        """
        del key
        hessian = statistics.mean()
        weight = weight.astype(hessian.dtype)
        natural = self.order == "natural"
        order = jnp.arange(weight.shape[0]) if natural else jnp.argsort(-jnp.diagonal(hessian), stable=True)
        problem = self.prepare(weight, hessian, order)
        solution, threshold = self._solve_within_room(problem)
        tensor = self._pack(solution, order, self.room(solution.codes.shape))
        moments = hessian[order[:, None], order[None, :]]
        figures = weight_error(weight, tensor) | {
            "proxy_loss": _proxy_loss(weight[order] - solution.dense, moments),
            "rtn_proxy_loss": _proxy_loss(weight[order] - self._round(problem), moments),
            "solve_loss": jnp.sum(solution.errors**2, axis=0),
            "damping": problem.damping,
            "outliers": jnp.sum(solution.outliers, axis=0, dtype=weight.dtype),
        }
        return tensor, figures if self.outlier_threshold is None else figures | {"threshold": threshold}

    def prepare(
        self, weight: Float[Array, "in out"], hessian: Float[Array, "in in"], order: Int[Array, "in"]
    ) -> Problem:
        """Returns the problem in an order, from the undamped Hessian."""
        alive = jnp.diagonal(hessian)[order] != 0
        hessian, weight = revive_dead(hessian, weight)
        factor = inverse_factor(hessian[order[:, None], order[None, :]], self.damping)
        counts = jnp.where(alive, 1 / jnp.diagonal(factor.upper), 0.0)
        return Problem(weight[order], factor.upper, counts, factor.damping)

    def _solve_within_room(self, problem: Problem) -> tuple[Solution, Float[Array, ""]]:
        """Solves with the threshold, or by bisection with one whose outliers fit."""
        dtype = problem.rows.dtype
        if self.outlier_threshold is None:
            return self.solve(problem, jnp.asarray(jnp.inf, dtype)), jnp.asarray(jnp.inf, dtype)
        first, room = jnp.asarray(self.outlier_threshold, dtype), self.room(problem.rows.shape)
        spread = jnp.var(problem.rows, axis=1) * (problem.rows.shape[1] / max(1, problem.rows.shape[1] - 1))
        unit = jnp.mean(spread * problem.counts**2)

        def attempt(state: Search) -> Search:
            between = jnp.where(state.below > 0, jnp.sqrt(state.below * state.above), state.above / 4)
            outside = jnp.where(jnp.isinf(state.above), jnp.maximum(4 * state.below, 2.0**-10), between)
            threshold = jnp.where(state.tries == 0, first, outside)
            solution = self.solve(problem, threshold * unit)
            fits = solution.outliers.sum() <= room
            kept = jax.tree.map(lambda new, old: jnp.where(fits, new, old), solution, state.solution)
            below, above = jnp.where(fits, state.below, threshold), jnp.where(fits, threshold, state.above)
            return Search(state.tries + 1, below, above, kept)

        def unfinished(state: Search) -> Bool[Array, ""]:
            full = state.solution.outliers.sum() >= int(FULL * room)
            close = (state.above <= CLOSE * state.below) | (state.tries >= MOST_TRIES) | (state.above == 0)
            enough = full | close | ((state.below < 0) & (self.bits_target is None))
            return jnp.isinf(state.above) | ~enough

        shapes = jax.eval_shape(lambda: self.solve(problem, unit))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = Search(jnp.int32(0), jnp.asarray(-1, dtype), jnp.asarray(jnp.inf, dtype), nothing)
        end = jax.lax.while_loop(unfinished, attempt, start)
        return end.solution, end.above

    def solve(self, problem: Problem, limit: Float[Array, ""]) -> Solution:
        """Runs the recursion with one absolute threshold."""
        size = self.format.group_size

        def group(weight: Float[Array, "in out"], start: Int[Array, ""]) -> tuple[jax.Array, Solution]:
            rows, spread, counts = (
                jax.lax.dynamic_slice_in_dim(array, start, size) for array in (weight, problem.upper, problem.counts)
            )
            within = jax.lax.dynamic_slice_in_dim(spread, start, size, axis=1)
            grids = self._fit(rows, counts, limit)
            codes, outliers, dense, errors = self._round_rows(
                (rows, within, counts, limit, grids.scales, grids.zeros), problem.solver
            )
            rest = weight - jnp.matmul(spread.T, errors, precision=jax.lax.Precision.HIGHEST)
            return rest, Solution(codes, outliers, dense, errors, grids)

        starts = jnp.arange(0, problem.rows.shape[0], size)
        _, solved = jax.lax.scan(group, problem.rows, starts)
        codes, outliers, dense, errors = (array.reshape(problem.rows.shape) for array in solved[:4])
        return Solution(codes, outliers, dense, errors, solved.grids)

    def _round_rows(self, arrays: tuple[jax.Array, ...], solver: Solver) -> tuple[Shaped[Array, "size out"], ...]:
        """Rounds the rows of one group in turn; returns codes, outliers, dense rows and errors."""
        solver = solver.resolve(arrays[0].dtype, len(arrays[0]))
        found: tuple[jax.Array, ...] = solver.run(self._round_by_kernel, self._round_by_scan, *arrays)
        return found

    def _round_by_scan(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        rows, upper, counts, limit, scales, zeros = arrays

        def row(rows: Float[Array, "size out"], index: Int[Array, ""]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            values = rows[index]
            _, rounded = nearest(values, scales, zeros, self.format.bits)
            outliers = ((values - rounded) * counts[index]) ** 2 > limit
            codes, rounded = nearest(jnp.where(outliers, 0.0, values), scales, zeros, self.format.bits)
            dense = jnp.where(outliers, as_stored(values, self.format.dtype), rounded)
            errors = (values - dense) / upper[index, index]
            return rows - upper[index][:, None] * errors[None, :], (codes, outliers, dense, errors)

        return jax.lax.scan(row, rows, jnp.arange(rows.shape[0]))[1]

    def _round_by_kernel(self, *arrays: jax.Array, simulate: Any) -> tuple[jax.Array, ...]:
        from pallas_kernels import round_with_outliers

        bits, dtype = self.format.bits, self.format.dtype
        codes, told, dense, errors = round_with_outliers(*arrays, bits=bits, dtype=dtype, simulate=simulate)
        return codes, told != 0, dense, errors

    def _fit(
        self, rows: Float[Array, "size out"], counts: Float[Array, "size"], limit: Float[Array, ""] | None
    ) -> Grids:
        """Fits the grid of one group to what is left of it without dead inputs and, above a limit, costly weights."""
        removed = jnp.broadcast_to((counts == 0)[:, None], rows.shape)
        if limit is not None and self.search == "leave_one_out" and self.outlier_threshold is not None:
            removed |= leave_one_out(rows, removed, counts, limit, self.format.bits, self.fidelity)
        return fit_group(rows, removed, self.format, self.fidelity)

    def _round(self, problem: Problem) -> Float[Array, "in out"]:
        """Returns the matrix rounded to nearest on grids of this format: no feedback, no outliers."""

        def group(rows: Float[Array, "size out"], counts: Float[Array, "size"]) -> Float[Array, "size out"]:
            grids = self._fit(rows, counts, None)
            return nearest(rows, grids.scales[None], grids.zeros[None], self.format.bits)[1]

        size, outputs = self.format.group_size, problem.rows.shape[1]
        rounded = jax.vmap(group)(problem.rows.reshape(-1, size, outputs), problem.counts.reshape(-1, size))
        return rounded.reshape(problem.rows.shape)

    def _pack(self, solution: Solution, order: Int[Array, "in"], room: int) -> QuantizedTensor:
        grids = solution.grids
        inner = quantize_spqr(
            solution.codes,
            grids.scales if grids.scale_codes is None else grids.scale_codes,
            grids.zeros if grids.zero_codes is None else grids.zero_codes,
            self.format,
            None if self.outlier_threshold is None else (solution.outliers, solution.dense, room),
        )
        if self.order == "natural":
            return inner
        return PermutedTensor(inner=inner, order=order[:, None].astype(jnp.uint16), shape=inner.shape)

    def _empty(self, shape: tuple[int, ...], room: int) -> QuantizedTensor:
        """Returns the tensor of a solve in which all is zero, to count its bytes."""
        groups, rows = self.format.groups(shape), jnp.zeros(shape)
        runs = jnp.zeros((groups, shape[1] // self.format.second_group_size))
        numbers = jnp.zeros((groups, shape[1]))
        codes = StatisticCodes(numbers.astype(jnp.uint8), runs, runs)
        grids = Grids(
            numbers, numbers, codes if self.format.scale_bits else None, codes if self.format.zero_bits else None
        )
        nothing = Solution(rows.astype(jnp.uint8), rows.astype(jnp.bool), rows, rows, grids)
        return self._pack(nothing, jnp.arange(shape[0]), room)


def _proxy_loss(difference: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, "out"]:
    return jnp.sum(difference * jnp.matmul(hessian, difference, precision=jax.lax.Precision.HIGHEST), axis=0)
