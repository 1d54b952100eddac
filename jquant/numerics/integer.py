"""Products of integers: int8 by int8 with int32 sums, and what scales and zeros make of them.

With x = s (c - z) for each row and group of inputs, w = t (d - u) for each group and output, over a group of n inputs

    sum_i x_i w_i = s t ( sum_i c_i d_i  -  u sum_i c_i  -  z (sum_i d_i - n u) )

The first two terms are exact in int32: 2^14 n each at most, below 2^31 for n up to 65536. The third is float, as a zero
z of a group whose values lie far from 0 has any size.
"""

import math
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Shaped

from jquant.types import Leaf

_ROWS_BY_INPUTS: Final = (((1,), (0,)), ((), ()))  # contract the last axis of x with the first of the weight


def integer_product(x: Int8[Array, "rows in"], weight: Int8[Array, "in out"]) -> Int32[Array, "rows out"]:
    """Multiply matrices of int8, exactly, with int32 sums.

    Example:
        >>> integer_product(jnp.array([[127, -128]], jnp.int8), jnp.array([[2], [1]], jnp.int8)).tolist()
        [[126]]
    """
    return jax.lax.dot_general(x, weight, _ROWS_BY_INPUTS, preferred_element_type=jnp.int32)


def affine_product(
    codes: Int8[Array, "rows in"],
    scales: Float[Array, "rows row_groups"],
    zeros: Float[Array, "rows row_groups"] | None,
    weight_codes: Int8[Array, "in out"],
    weight_scales: Float[Array, "weight_groups out"],
    weight_zeros: Int32[Array, "weight_groups out"] | None,
) -> Float[Array, "rows out"]:
    """Multiply integers on grids: one integer product for each run of inputs on one grid of both, scales after.

    Args:
        codes: of the rows.
        scales: of the rows' groups of inputs, in the dtype of the result.
        zeros: whole numbers, or None where all are 0.
        weight_codes: of the weight.
        weight_scales: of the weight's groups of inputs, in the dtype of the result.
        weight_zeros: or None where all are 0.

    Returns:
        The product of the values that the codes stand for, in the dtype of the scales.

    Example:
        >>> codes, ones = jnp.array([[3, 4]], jnp.int8), jnp.ones((1, 1))
        >>> affine_product(codes, 0.5 * ones, None, codes.T, ones, jnp.array([[2]])).tolist()
        [[5.5]]
    """
    inputs, outputs = weight_codes.shape
    size = math.gcd(inputs // scales.shape[1], inputs // weight_scales.shape[0])
    runs = inputs // size

    def of_rows(columns: Float[Array, "rows groups"]) -> Float[Array, "runs rows"]:
        return jnp.repeat(columns, runs // columns.shape[1], axis=1).T

    def of_weight(rows: Shaped[Array, "groups out"]) -> Shaped[Array, "runs out"]:
        return jnp.repeat(rows, runs // rows.shape[0], axis=0)

    parts = _Run(
        codes.reshape(-1, runs, size).swapaxes(0, 1),
        of_rows(scales),
        None if zeros is None else of_rows(zeros),
        weight_codes.reshape(runs, size, outputs),
        of_weight(weight_scales),
        None if weight_zeros is None else of_weight(weight_zeros),
    )
    if runs == 1:
        return _run_product(jax.tree.map(lambda part: part[0], parts))
    total = jnp.zeros((codes.shape[0], outputs), scales.dtype)
    return jax.lax.scan(lambda sums, run: (sums + _run_product(run), None), total, parts)[0]


class _Run(NamedTuple):
    """Hold inputs whose grid is one for each row and one for each output; stacked, all of them."""

    codes: Leaf  # [rows, size]
    scales: Leaf  # [rows]
    zeros: Leaf | None  # [rows]
    weight_codes: Leaf  # [size, out]
    weight_scales: Leaf  # [out]
    weight_zeros: Leaf | None  # [out]


def _run_product(run: _Run) -> Float[Array, "rows out"]:
    sums = integer_product(run.codes, run.weight_codes)
    if run.weight_zeros is not None:
        sums = sums - jnp.sum(run.codes, axis=1, dtype=jnp.int32)[:, None] * run.weight_zeros[None]
    values = sums.astype(run.scales.dtype)
    if run.zeros is not None:
        outputs = jnp.sum(run.weight_codes, axis=0, dtype=jnp.int32)
        if run.weight_zeros is not None:
            outputs = outputs - run.codes.shape[1] * run.weight_zeros
        values = values - run.zeros[:, None] * outputs.astype(run.scales.dtype)[None]
    return run.scales[:, None] * run.weight_scales[None] * values
