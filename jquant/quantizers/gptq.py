"""GPTQ: round one input row at a time and spread its error over the rows to come.

Frantar, Ashkboos, Hoefler, Alistarh 2023, arXiv:2210.17323.

Minimises sum over outputs of (w - q)^T H (w - q), W [in, out], H [in, in] the mean of x x^T plus damping. With
H^-1 = U^T U, U upper triangular, row j gives

    q_j = round(w_j),   e_j = (w_j - q_j) / U_jj,   W[j:] -= U[j, j:]^T e_j.

The paper's W is our W^T; its "column" is our row (an input). Rows are handled in blocks: inside a block one rank-1
update a row, after it one matrix product for all rows to come. The result does not depend on the block size.
Exact identity, used as a test: sum_j e_j^2 = (w - q)^T H (w - q) with the damped H (spec_weights.md section 4).
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.formats import PermutedTensor, QuantizedTensor, UniformFormat, quantize_uniform
from jquant.numerics import Grid, decode, encode, inverse_factor, revive_dead
from jquant.quantizers.base import Diagnostics, WeightQuantizer, hessian_figures
from jquant.quantizers.rtn import Clip, fit_groups, round_to_nearest
from jquant.quantizers.solver import Solver
from jquant.quantizers.statistics import HESSIAN, SecondMoment
from jquant.types import Key


class Rounding(NamedTuple):
    """How rows are rounded, which the recursion need not know.

    Attributes:
      fit: inputs [in, out], inputs of a group or None for one group -> a tree of [groups, out]: the groups' grids.
      apply: a row [out] and its grid, a tree of [out] -> a tree of what is kept of the row, and the rounded row [out].
      bits: of a code where the grids are uniform, which kernels know how to apply; None for others.
    """

    fit: Callable[[jax.Array, int | None], Any]
    apply: Callable[[jax.Array, Any], tuple[Any, jax.Array]]
    bits: int | None = None


class Solution(NamedTuple):
    """What is kept of the rows and their grids in processing order, and the errors e that the rows spread.

    Attributes:
      codes: what `Rounding.apply` kept, for all rows: uint8 [in, out] on uniform grids.
      grid: what `Rounding.fit` gave, for all groups.
      errors: [in, out].
      damping: what the factor needed.
    """

    codes: Any
    grid: Any
    errors: Float[Array, "in out"]
    damping: Float[Array, ""]


@final
@dataclass(frozen=True)
class Gptq(WeightQuantizer):
    """GPTQ on uniform grids.

    Attributes:
      format: bits, groups and grid.
      damping: share of the mean diagonal added to the Hessian; raised step by step, and reported, if it does not
        suffice.
      order: "natural", or "activation": inputs with the largest Hessian diagonal first.
      groups: "static" fits all grids to the original weight, so that groups stay runs of inputs whatever the
        order; "dynamic" fits each group when its turn comes, to the weight as updated by then. Dynamic groups in
        activation order are kept by a `PermutedTensor`.
      clip: as in RTN.

    Reference: arXiv:2210.17323, Algorithm 1.
    """

    statistic = HESSIAN
    separable = True

    format: UniformFormat = UniformFormat()
    damping: float = 0.01  # arXiv:2210.17323 section 3.3
    order: Literal["natural", "activation"] = "natural"
    groups: Literal["static", "dynamic"] = "static"
    clip: Clip = "none"

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if the group size does not divide the inputs."""
        self.format.groups(shape[0])

    def __call__(
        self, weight: Float[Array, "in out"], statistics: SecondMoment, key: Key
    ) -> tuple[QuantizedTensor, Diagnostics]:
        """Quantizes a matrix; inputs that were always zero get weight zero.

        Diagnostics: `proxy_loss` and `rtn_proxy_loss` of the undamped Hessian, `solve_loss` = sum e^2 of the damped
        one (not finite if no damping made the Hessian positive definite), `damping` used.
        """
        del key
        hessian = statistics.mean()
        weight = weight.astype(hessian.dtype)
        order = self.order_of(hessian)
        solution = self.solve(weight, hessian, order)
        tensor = self._pack(solution, order)
        rounded = round_to_nearest(weight, self.format, self.clip)
        return tensor, hessian_figures(weight, tensor, rounded, hessian) | {
            "solve_loss": jnp.sum(solution.errors**2, axis=0),
            "damping": solution.damping,
        }

    def order_of(self, hessian: Float[Array, "in in"]) -> Int[Array, "in"]:
        """Returns the inputs in processing order; dead inputs come last, ties in natural order."""
        return processing_order(hessian, self.order)

    def solve(
        self, weight: Float[Array, "in out"], hessian: Float[Array, "in in"], order: Int[Array, "in"]
    ) -> Solution:
        """Runs the recursion in the dtype of `weight`; codes and errors come in processing order.

        The grid is [groups, out]: by the input's own group if groups are static, by position if dynamic.
        """

        def fit(rows: jax.Array, group_size: int | None) -> Grid:
            return fit_groups(rows, dataclasses.replace(self.format, group_size=group_size), self.clip)

        def apply(row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
            codes = encode(row, grid, self.format.bits)
            return codes, decode(codes, grid, row.dtype)

        return spread_errors(
            weight,
            hessian,
            order,
            Rounding(fit, apply, self.format.bits),
            damping=self.damping,
            group_size=self.format.group_size,
            groups=self.groups,
        )

    def _pack(self, solution: Solution, order: Int[Array, "in"]) -> QuantizedTensor:
        codes, grid = solution.codes, solution.grid
        if self.order == "natural":
            return quantize_uniform(codes, grid.scales, grid.zeros, self.format)
        if self.groups == "dynamic" and self.format.group_size is not None:
            inner = quantize_uniform(codes, grid.scales, grid.zeros, self.format)
            return PermutedTensor(inner=inner, order=order[:, None].astype(jnp.int32), shape=inner.shape)
        codes = jnp.zeros_like(codes).at[order].set(codes)
        return quantize_uniform(codes, grid.scales, grid.zeros, self.format)


def processing_order(hessian: Float[Array, "in in"], order: Literal["natural", "activation"]) -> Int[Array, "in"]:
    """Returns the inputs as they come, or those with the largest Hessian diagonal first, ties in natural order."""
    if order == "natural":
        return jnp.arange(hessian.shape[0])
    return jnp.argsort(-jnp.diagonal(hessian), stable=True)


def spread_errors(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    order: Int[Array, "in"],
    rounding: Rounding,
    *,
    damping: float,
    group_size: int | None,
    groups: Literal["static", "dynamic"],
    solver: Solver = Solver.MACHINE,
) -> Solution:
    """Runs GPTQ's recursion with any rounding of rows, in the dtype of `weight`.

    Args:
      weight: the matrix.
      hessian: mean of x x^T.
      order: inputs in processing order.
      rounding: how grids are fitted and a row is rounded.
      damping: share of the mean diagonal added to the Hessian.
      group_size: inputs that share a grid; None for all.
      groups: whether grids are fitted before the recursion, or to the rows as updated when their turn comes.
      solver: what rounds the rows of a block; the scan where grids are not uniform.

    Returns:
      The solution, in processing order.
    """
    inputs = weight.shape[0]
    count = 1 if group_size is None else inputs // group_size
    hessian, weight = revive_dead(hessian.astype(weight.dtype), weight)
    factor = inverse_factor(hessian[order[:, None], order[None, :]], damping)
    dynamic = groups == "dynamic" and count > 1
    size = inputs // count
    solver = Solver.SCAN if rounding.bits is None else solver.resolve(weight.dtype, size if dynamic else 1)
    size = size if dynamic else min(solver.rows, inputs)
    round_block = functools.partial(_round_block, rounding, solver)
    grid = rounding.fit(weight, group_size)

    padding = -inputs % size  # rows of zeros with an identity factor: they take no error and give none
    upper = jax.scipy.linalg.block_diag(factor.upper, jnp.eye(padding, dtype=weight.dtype))
    grid_of_row = jnp.pad(jnp.zeros_like(order) if dynamic else order // (inputs // count), (0, padding))

    def block(weight: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array, Any]]:
        rows, spread, which = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (weight, upper, grid_of_row))
        own = rounding.fit(rows, None) if dynamic else grid
        within = jax.lax.dynamic_slice_in_dim(spread, start, size, axis=1)  # [size, size]
        codes, errors = round_block(rows, within, own, which)
        rest = weight - jnp.matmul(spread.T, errors, precision=jax.lax.Precision.HIGHEST)
        return rest, (codes, errors, own if dynamic else None)

    rows = jnp.pad(weight[order], ((0, padding), (0, 0)))
    _, (codes, errors, fitted) = jax.lax.scan(block, rows, jnp.arange(0, inputs + padding, size))
    codes, errors = jax.tree.map(lambda blocks: blocks.reshape(-1, blocks.shape[-1])[:inputs], (codes, errors))
    if fitted is not None:
        grid = jax.tree.map(lambda blocks: blocks[:, 0], fitted)
    return Solution(codes, grid, errors, factor.damping)


def _round_block(
    rounding: Rounding, solver: Solver, rows: jax.Array, upper: jax.Array, grid: Any, which: jax.Array
) -> tuple[Any, jax.Array]:
    """Rounds the rows of one block in turn; `which` tells each row's grid. Returns what is kept and the errors."""

    def scan(rows: jax.Array, upper: jax.Array, which: jax.Array, grid: Any) -> tuple[Any, jax.Array]:
        def row(rows: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            kept, rounded = rounding.apply(rows[index], jax.tree.map(lambda leaf: leaf[which[index]], grid))
            error = (rows[index] - rounded) / upper[index, index]
            return rows - upper[index][:, None] * error[None, :], (kept, error)

        _, (kept, errors) = jax.lax.scan(row, rows, jnp.arange(rows.shape[0]))
        return kept, errors

    def kernel(rows: jax.Array, upper: jax.Array, which: jax.Array, grid: Grid, *, simulate: Any) -> Any:
        from pallas_kernels import round_on_grids

        assert rounding.bits is not None
        which = which.astype(jnp.int32)
        return round_on_grids(rows, upper, which, grid.scales, grid.zeros, bits=rounding.bits, simulate=simulate)

    return solver.run(kernel, scan, rows, upper, which, grid)
