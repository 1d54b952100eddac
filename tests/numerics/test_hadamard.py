"""Hadamard matrices: every construction, the published choice of order, golden vectors, the transform by definition."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.numerics import base_matrix, base_order, hadamard_matrix, hadamard_on_host, hadamard_transform
from tests.oracles import hadamard as oracle

PUBLISHED = (12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172)
PALEY_ONE = (12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108, 132, 140)
PALEY_TWO = (28, 36, 76, 148)
GOLDEN = {  # M(n) arange(n), first six
    12: [-19.052559, 3.464102, 0.57735, 4.041452, 1.154701, -1.732051],
    24: [-55.930016, 2.041241, 10.206207, -0.408248, 2.041241, -0.408248],
    56: [190.557265, -3.474396, 0.267261, -0.267261, -13.630323, -0.267261],
    80: [-334.962983, 4.024922, 36.224301, -0.447214, 20.124612, -0.447214],
    344: [112.146084, -0.862662, 97.049496, -0.862662, 119.047382, -0.862662],
}
CHOICES = {  # n: order that QuaRot's first match gives
    11008: 172, 13824: 108, 14336: 28, 28672: 28, 8960: 140, 27648: 108, 5120: 40, 3584: 28, 2560: 40, 6656: 52,
    53248: 52, 3072: 12, 1536: 12, 576: 36, 1152: 36, 2304: 36, 960: 60, 640: 40, 896: 28, 20: 20, 40: 40, 24: 12,
    4096: 1, 1: 1,
}  # fmt: skip
BEYOND = {
    5632: 44,
    4864: 76,
    18944: 148,
    5376: 84,
    21504: 84,
    17408: 68,
    25600: 200,
    29568: 924,
}  # not in QuaRot's tables


@pytest.mark.parametrize("order", sorted({*PUBLISHED, *PALEY_ONE, *PALEY_TWO}))
def test_constructions_are_hadamard(order: int) -> None:
    matrix = base_matrix(order).astype(int)
    assert matrix.shape == (order, order)
    np.testing.assert_array_equal(np.abs(matrix), 1)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))
    assert (matrix == matrix.T).all() == (order in PALEY_TWO)


@pytest.mark.parametrize("order", PALEY_ONE)
def test_paley_one_equals_oracle(order: int) -> None:
    np.testing.assert_array_equal(base_matrix(order), oracle.paley_one(order - 1))


@pytest.mark.parametrize("order", PALEY_TWO)
def test_paley_two_equals_oracle(order: int) -> None:
    np.testing.assert_array_equal(base_matrix(order), oracle.paley_two(order // 2 - 1))


@pytest.mark.parametrize(("n", "order"), (CHOICES | BEYOND).items())
def test_choice_of_order(n: int, order: int) -> None:
    assert base_order(n) == order
    matrix = base_matrix(order).astype(np.int32)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int32))


@pytest.mark.parametrize("n", GOLDEN)
def test_golden_vectors(n: int) -> None:
    np.testing.assert_allclose((hadamard_matrix(n) @ np.arange(n))[:6], GOLDEN[n], atol=6e-7)


@pytest.mark.parametrize("n", [2, 64, 256])
def test_powers_of_two_are_sylvester(n: int) -> None:
    np.testing.assert_allclose(hadamard_matrix(n), oracle.transform(np.eye(n), np.ones((1, 1))), rtol=1e-12)


@pytest.mark.parametrize("n", [64, 576, 1536])
def test_equals_reference_tensors(shared: Path, n: int) -> None:
    golden = np.load(shared / "golden" / "quarot_hadamard.npz")
    if base_order(n) > 1:
        assert base_order(n) == golden[f"K{n}"]
        np.testing.assert_array_equal(base_matrix(base_order(n)), golden[f"hadK{n}"])
    transformed = hadamard_transform(jnp.asarray(golden[f"x{n}"]))
    np.testing.assert_allclose(transformed, golden[f"y{n}"], atol=2e-6)  # sums of n float32 of order 1


def test_equals_reference_random_rotation(shared: Path) -> None:
    golden = np.load(shared / "golden" / "quarot_hadamard.npz")
    signs = golden["randhad576_signs_seed0"]
    row = hadamard_transform(jnp.eye(1, 576) * float(signs[0]))[0]  # Q = diag(s) M^T, by the rows of diag(s)
    np.testing.assert_allclose(row, golden["randhad576_row0_seed0"], atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 128, 256, 336, 344, 32768])
def test_transform_equals_definition_in_float64(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((2, 3, n) if n < 1000 else (1, n))
    with jax.enable_x64(True):
        transformed = hadamard_transform(jnp.asarray(x))
    assert transformed.dtype == jnp.float64
    if n < 1000:
        np.testing.assert_allclose(
            transformed, oracle.transform(x, base_matrix(base_order(n)).astype(float)), atol=1e-12
        )
        np.testing.assert_allclose(transformed, x @ hadamard_matrix(n).T, atol=1e-12)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jnp.linalg.norm(transformed, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 12, 256, 336])
def test_transform_on_the_host_equals_definition(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((2, 3, n))
    expected = oracle.transform(x, base_matrix(base_order(n)).astype(float))
    np.testing.assert_allclose(hadamard_on_host(x), expected, atol=1e-12)


def test_symmetric_transform_is_its_own_inverse() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 112)), dtype=jnp.float32)
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(x)), x, atol=1e-5)


def test_same_operator_on_both_sides_cancels() -> None:
    x, w = (jnp.asarray(np.random.default_rng(seed).standard_normal(96), dtype=jnp.float32) for seed in range(2))
    np.testing.assert_allclose(hadamard_transform(x) @ hadamard_transform(w), x @ w, atol=1e-4)


def test_one_outlier_is_spread_evenly() -> None:
    spread = jnp.abs(hadamard_transform(jnp.zeros(172).at[5].set(100.0)))
    np.testing.assert_allclose(spread, 100 / np.sqrt(172), rtol=1e-5)


def test_bfloat16_is_computed_in_float32_and_returned_as_given() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 256)), dtype=jnp.bfloat16)
    transformed = hadamard_transform(x)
    assert transformed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(transformed, hadamard_transform(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("n", [3, 9, 10, 14, 15, 25, 92, 100])
def test_refuses_orders_without_construction(n: int) -> None:
    with pytest.raises(FormatError, match=f"order {n} "):
        base_order(n)


@pytest.mark.parametrize("n", [0, -4])
def test_refuses_orders_that_are_not_positive(n: int) -> None:
    with pytest.raises(FormatError, match="positive"):
        base_order(n)


def test_refuses_base_without_construction() -> None:
    with pytest.raises(FormatError, match="no construction of order 92"):
        base_matrix(92)


def test_published_matrices_never_change() -> None:
    digest = hashlib.sha256(b"".join(base_matrix(order).tobytes() for order in PUBLISHED)).hexdigest()
    assert digest == "8de695761486ad56828b23e7c4134efda00c800158af951453bed9b2030dab86"
