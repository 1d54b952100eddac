"""Integer products: exact sums, and grids against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import affine_product, integer_product

RNG = np.random.default_rng(0)
multiply = jax.jit(affine_product)


def codes(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def test_sums_are_exact_at_the_ends_of_the_range() -> None:
    low = jnp.full((2, 4096), -128, jnp.int8)
    np.testing.assert_array_equal(integer_product(low, low.T), 128 * 128 * 4096)
    x, weight = codes(5, 1000), codes(1000, 7)
    np.testing.assert_array_equal(
        integer_product(jnp.asarray(x), jnp.asarray(weight)), x.astype(int) @ weight.astype(int)
    )


@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (4, 1), (1, 6), (4, 6), (6, 3)], ids=str)
@pytest.mark.parametrize("zeros", ["none", "rows", "weight", "both"])
def test_grids_equal_float64(groups: int, weight_groups: int, zeros: str) -> None:
    rows, inputs, outputs = 5, 48, 7
    x, weight = codes(rows, inputs), codes(inputs, outputs)
    scales, weight_scales = RNG.uniform(0.5, 2, (rows, groups)), RNG.uniform(0.5, 2, (weight_groups, outputs))
    own = RNG.integers(-300, 300, (rows, groups)) if zeros in ("rows", "both") else np.zeros((rows, groups))
    other = RNG.integers(-128, 128, (weight_groups, outputs)) if zeros in ("weight", "both") else None
    dense = np.repeat(scales, inputs // groups, 1) * (x - np.repeat(own, inputs // groups, 1))
    shifted = weight if other is None else weight - np.repeat(other, inputs // weight_groups, 0)
    expected = dense @ (np.repeat(weight_scales, inputs // weight_groups, 0) * shifted)
    found = multiply(
        jnp.asarray(x),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(own, jnp.float32) if zeros in ("rows", "both") else None,
        jnp.asarray(weight),
        jnp.asarray(weight_scales, jnp.float32),
        None if other is None else jnp.asarray(other, jnp.int32),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_program_does_not_grow_with_the_groups() -> None:
    def program(inputs: int) -> str:
        shapes = (2, inputs, jnp.int8), (2, 1, jnp.float32), (inputs, 3, jnp.int8), (inputs // 16, 3, jnp.float32)
        x, scales, weight, weight_scales = (jax.ShapeDtypeStruct(shape[:2], shape[2]) for shape in shapes)
        return multiply.lower(x, scales, None, weight, weight_scales, None).as_text()

    assert len(program(1024)) <= 1.1 * len(program(64))
