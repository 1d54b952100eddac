"""Online rotations: the rule that chooses them for the sizes of real models, and the operator on device and host."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.formats import OnlineRotation, online_rotation, repeat_rotation
from jquant.numerics import base_order, haar_matrix, hadamard_matrix

RULE = {  # size: matrix, order, order of its base matrix
    576: ("hadamard", 576, 36),  # SmolLM2's width, 36 x 16
    1536: ("hadamard", 1536, 12),
    4864: ("hadamard", 4864, 76),  # Qwen2.5 0.5B's MLP
    11008: ("hadamard", 11008, 172),
    14336: ("hadamard", 14336, 28),
    18944: ("hadamard", 18944, 148),
    25600: ("hadamard", 25600, 200),
    20: ("hadamard", 20, 20),
    24: ("hadamard", 24, 12),
    9: ("haar", 9, None),  # odd: no divisor has a Hadamard matrix but 1
    14: ("haar", 14, None),  # 7 blocks of 2 would spread nothing
    25: ("haar", 25, None),
    4304: ("hadamard", 16, 1),  # 269 blocks
    92: ("haar", 92, None),  # the only order below 668 without a construction here that has 4 as its best divisor
    1: ("hadamard", 1, 1),
}


@pytest.mark.parametrize("size", RULE)
def test_rule(size: int) -> None:
    matrix, order, base = RULE[size]
    rotation = online_rotation(size)
    assert (rotation.size, rotation.stride, rotation.matrix, rotation.order) == (size, 1, matrix, order)
    assert base is None or base_order(rotation.order) == base
    x = np.random.default_rng(size).standard_normal((2, size))
    turned = rotation.on_host(x)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, atol=1e-10)  # lengths and angles of some 10^4 numbers
    assert size == 1 or np.abs(turned - x).max() > 0.1


@pytest.mark.parametrize(("heads", "matrix", "order"), [(9, "haar", 9), (20, "hadamard", 20), (24, "hadamard", 24)])
def test_rule_across_heads(heads: int, matrix: str, order: int) -> None:
    rotation = online_rotation(heads * 64, stride=64)
    assert (rotation.matrix, rotation.order, rotation.stride) == (matrix, order, 64)


CASES = {
    "plain": online_rotation(24),
    "across": online_rotation(20 * 4, stride=4),
    "across, dense": online_rotation(9 * 4, stride=4, seed=3),
    "blocks": OnlineRotation(size=36, order=12),
    "repeated": repeat_rotation(online_rotation(12), 3),
    "repeated, dense": repeat_rotation(online_rotation(5), 2),
}


def dense_operator(rotation: OnlineRotation) -> np.ndarray:
    """Return the operator as one matrix, by its definition."""
    own = (
        hadamard_matrix(rotation.order) if rotation.matrix == "hadamard" else haar_matrix(rotation.order, rotation.seed)
    )
    blocks = rotation.size // (rotation.order * rotation.stride)
    return np.kron(np.eye(blocks), np.kron(own, np.eye(rotation.stride)))


@pytest.mark.parametrize("case", CASES)
def test_device_and_host_are_the_dense_matrix(case: str) -> None:
    rotation = CASES[case]
    x = np.random.default_rng(1).standard_normal((2, 3, rotation.size))
    expected = x @ dense_operator(rotation).T
    np.testing.assert_allclose(rotation.on_host(x), expected, atol=1e-13)
    turned = rotation(jnp.asarray(x, jnp.float32))
    assert turned.dtype == jnp.float32
    np.testing.assert_allclose(turned, expected, atol=5e-6)


def test_float64_stays_and_bfloat16_is_computed_in_float32() -> None:
    rotation = CASES["across, dense"]
    x = np.random.default_rng(2).standard_normal((2, rotation.size))
    with jax.enable_x64(True):
        np.testing.assert_allclose(rotation(jnp.asarray(x)), rotation.on_host(x), atol=1e-14)
    narrow = jnp.asarray(x, jnp.bfloat16)
    turned = rotation(narrow)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotation(narrow.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [576, 1536])
def test_equals_reference_tensors(shared: Path, size: int) -> None:
    golden = np.load(shared / "golden" / "quarot_hadamard.npz")
    turned = online_rotation(size).on_host(golden[f"x{size}"].astype(np.float64))
    np.testing.assert_allclose(turned, golden[f"y{size}"], atol=2e-6)  # theirs is float32


def test_it_is_all_static() -> None:
    rotation = online_rotation(9 * 64, stride=64)
    assert not jax.tree.leaves(rotation)
    assert hash(rotation) == hash(online_rotation(576, stride=64))
    assert rotation != online_rotation(576, stride=64, seed=1)


def test_description() -> None:
    words = {name: rotation.describe() for name, rotation in CASES.items()}
    assert words == {
        "plain": "hadamard 12 x 2",
        "across": "hadamard 20, stride 4",
        "across, dense": "haar 9, stride 4",
        "blocks": "hadamard 12, 3 blocks",
        "repeated": "hadamard 12, 3 blocks",
        "repeated, dense": "haar 5, 2 blocks",
    }
    assert online_rotation(64).describe() == "hadamard 64"


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (10, 4), (8, 0)])
def test_impossible_sizes_are_refused(size: int, stride: int) -> None:
    with pytest.raises(FormatError, match=f"cannot rotate {size} numbers with stride {stride}"):
        online_rotation(size, stride=stride)
