"""Random rotations: orthogonal, what their definition says, determined by the seed, small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import Transform, random_rotation, rotate, rotate_back, two_factors
from jquant.numerics.rotation import random_bits, random_orthogonal
from tests.oracles import quip as oracle

TRANSFORMS: tuple[Transform, ...] = ("kronecker", "butterfly")
SIZES = (1, 2, 7, 12, 64, 576)

every_transform = pytest.mark.parametrize("transform", TRANSFORMS)


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        (1, (1, 1)),
        (12, (6, 2)),
        (14, (2, 7)),
        (13, (13, 1)),
        (768, (48, 16)),
        (1024, (32, 32)),
        (8192, (128, 64)),
        (11008, (688, 16)),
        (14336, (64, 224)),
        (28672, (448, 64)),
    ],
)
def test_factors_are_those_of_the_paper(size: int, factors: tuple[int, int]) -> None:
    assert two_factors(size) == factors


@every_transform
@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_have_an_inverse(size: int, transform: Transform) -> None:
    rotation = random_rotation(jnp.uint32(size), size, transform)
    matrix = rotate(rotation, jnp.eye(size))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=5e-6)  # some 30 operations an entry
    np.testing.assert_allclose(rotate_back(rotation, matrix), np.eye(size), atol=5e-6)


@every_transform
@pytest.mark.parametrize("size", [2, 7, 12, 48])
def test_rotations_are_the_oracles(size: int, transform: Transform) -> None:
    expected = oracle.rotation(5, *two_factors(size), transform)
    with jax.enable_x64(True):
        rotation = random_rotation(jnp.uint32(5), size, transform, "float64")
        wide = rotate(rotation, jnp.eye(size, dtype=jnp.float64)).T
        np.testing.assert_allclose(wide, expected, atol=1e-13)
        inverse = rotate_back(rotation, jnp.eye(size, dtype=jnp.float64))
        np.testing.assert_allclose(inverse, expected, atol=1e-13)
    single = rotate(random_rotation(jnp.uint32(5), size, transform), jnp.eye(size)).T
    np.testing.assert_allclose(single, expected, atol=2e-6)  # a seed means the same matrix in both precisions


@every_transform
def test_axes_before_the_last_are_rows_of_a_batch(transform: Transform) -> None:
    rotation = random_rotation(jnp.uint32(3), 12, transform)
    x = jax.random.normal(jax.random.key(0), (2, 3, 12))
    for act in (rotate, rotate_back):
        np.testing.assert_allclose(act(rotation, x)[1, 2], act(rotation, x[1, 2]), atol=1e-6)


def test_random_bits_are_fixed_for_ever() -> None:
    """Saved models hold seeds: these numbers may never change."""
    assert random_bits(jnp.uint32(7), 0, 2).tolist() == [273791329, 837501554]
    for seed, stream in ((0, 0), (7, 3), (2**32 - 1, 1)):
        np.testing.assert_array_equal(random_bits(jnp.uint32(seed), stream, 50), oracle.bits(seed, stream, 50))


def test_random_bits_look_random() -> None:
    """Each bit is set half of the time, and neighbours, streams and seeds are unrelated."""
    several = np.stack([random_bits(jnp.uint32(seed), stream, 20000) for seed in (0, 1) for stream in (0, 1)])
    unpacked = np.unpackbits(several.view(np.uint8), axis=1).reshape(4, 20000, 32).astype(float) - 0.5
    deviation = 0.5 / np.sqrt(20000)
    assert np.abs(unpacked.mean(1)).max() < 5 * deviation
    flat = unpacked.transpose(0, 2, 1).reshape(4 * 32, 20000)
    between = flat @ flat.T / 20000 - np.eye(128) / 4
    assert np.abs(between).max() < 5.5 * 0.25 / np.sqrt(20000)
    following = flat[:, 1:] @ flat[:, :-1].T / 20000
    assert np.abs(following).max() < 5.5 * 0.25 / np.sqrt(20000)


def test_orthogonal_matrices_are_haar() -> None:
    """Moments of Haar measure: E trace^2 = 1, E q^2 = 1 / n, E q^4 = 3 / n(n + 2), determinants of both signs."""
    matrices = np.asarray(random_orthogonal(random_bits(jnp.uint32(3), 0, 2 * 20000 * 9), 20000, 3))
    np.testing.assert_allclose((np.trace(matrices, axis1=1, axis2=2) ** 2).mean(), 1, atol=0.05)
    np.testing.assert_allclose(matrices.mean(0), 0, atol=0.02)
    np.testing.assert_allclose((matrices**2).mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose((matrices**4).mean(0), 1 / 5, atol=0.01)
    np.testing.assert_allclose(np.linalg.det(matrices).mean(), 0, atol=0.05)


def test_no_array_is_as_large_as_the_dense_matrix() -> None:
    x = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    program = jax.make_jaxpr(lambda x: rotate(random_rotation(jnp.uint32(1), 4096, "kronecker"), x))(x)
    sizes = [v.aval.size for equation in program.eqns for v in equation.outvars]
    assert max(sizes) <= 2 * 64 * 64  # the bits of one factor
