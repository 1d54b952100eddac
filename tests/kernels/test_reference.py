"""The meaning of the kernels against float64, in numpy."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference, shapes

RNG = np.random.default_rng(0)


def test_grids_equal_float64() -> None:
    x, codes = RNG.standard_normal((3, 64)), RNG.integers(-8, 8, (5, 64))
    scales, zeros = RNG.uniform(0.5, 1.5, (4, 5)), RNG.integers(-8, 8, (4, 5))
    expected = x @ (np.repeat(scales, 16, 0) * (codes.T - np.repeat(zeros, 16, 0)))
    found = reference.float_matmul(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(codes, jnp.int4),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(zeros, jnp.float32),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_integers_equal_float64() -> None:
    x, codes = RNG.integers(-128, 128, (3, 4096)), RNG.integers(-127, 128, (5, 4096))
    steps, zeros, scales = RNG.uniform(0.5, 1.5, 3), RNG.integers(-128, 128, 3), RNG.uniform(0.5, 1.5, 5)
    expected = (steps[:, None] * (x - zeros[:, None])) @ (scales[:, None] * codes).T
    found = reference.integer_matmul(
        jnp.asarray(x, jnp.int8),
        jnp.asarray(steps, jnp.float32),
        jnp.asarray(zeros, jnp.float32),
        jnp.asarray(codes, jnp.int8),
        jnp.asarray(scales, jnp.float32),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_shapes_have_the_published_sizes() -> None:
    assert {(linear.outputs, linear.inputs) for linear in shapes.LLAMA_70B} >= {(28672, 8192), (8192, 28672)}
    assert [4 * linear.outputs for linear in shapes.LUT_GEMM] == [linear.inputs for linear in shapes.LUT_GEMM]
    every = (*shapes.LLAMA_8B, *shapes.LLAMA_70B, *shapes.JOINED, *shapes.LUT_GEMM, *shapes.SMALL)
    assert len({linear.name for linear in every}) == 23
