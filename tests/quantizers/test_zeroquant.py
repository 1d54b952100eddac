"""ZeroQuant's groups: golden codes, DeepSpeed's arithmetic, a float64 oracle for groups that straddle rows."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.formats import UniformFormat, UniformTensor
from jquant.numerics import unpack
from jquant.quantizers import Rtn, ZeroQuant
from tests.oracles import closed_form
from tests.oracles import zeroquant as oracle

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def solve(quantizer: ZeroQuant, weight: jax.Array) -> UniformTensor:
    return quantizer(weight, None, KEY)[0]


def codes_of(tensor: UniformTensor) -> np.ndarray:
    """Return the signed codes [out, in]."""
    return np.asarray(unpack(tensor.codes, tensor.format.bits, tensor.shape[0]), int).T - 2 ** (tensor.format.bits - 1)


# spec_weights.md section 9, 4 bits: groups -> their scales, a row of codes, mean squared error
GOLDEN = {
    4: ([0.136479, 0.138562, 0.099009, 0.152571], (1, [7, -6, -1, 5, -5, 2, 4, -8]), 0.00371027),
    8: (
        [0.135416, 0.136479, 0.138562, 0.133973, 0.099009, 0.092361, 0.11132, 0.152571],
        (3, [-6, 3, 4, -8, 2, 5, -8, 4]),
        0.00361429,
    ),
    2: ([0.138562, 0.152571], (2, [0, -5, 5, -1, -4, 5, -1, -4]), 0.00342168),
}


@pytest.mark.parametrize("groups", GOLDEN)
def test_golden_groups(groups: int) -> None:
    scales, (row, codes), error = GOLDEN[groups]
    tensor = solve(ZeroQuant(4, groups, "float32"), jnp.asarray(closed_form.weight().T, jnp.float32))
    kept = np.asarray(tensor.scales).T.ravel()  # in the order of the flattened matrix
    np.testing.assert_allclose(kept, np.repeat(scales, len(kept) // groups), atol=6e-7)
    np.testing.assert_array_equal(codes_of(tensor)[row], codes)
    ours = np.mean((np.asarray(tensor.dequantize(), np.float64).T - closed_form.weight()) ** 2)
    np.testing.assert_allclose(ours, error, rtol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_reference_tensors(shared: Path, bits: int) -> None:
    golden = np.load(shared / "golden" / "zeroquant.npz")
    tensor = solve(ZeroQuant(bits, 16, "float32"), jnp.asarray(golden["W"].T))
    np.testing.assert_allclose(tensor.dequantize().T, golden[f"sym{bits}_g16"], atol=2e-7)


@pytest.mark.parametrize(
    ("groups", "piece"),
    [(1, None), (4, None), (8, 24), (12, None), (16, 12), (72, 8)],
    ids=["all", "3 rows", "1 1/2 rows", "a row", "3/4 row", "1/6 row"],
)
def test_groups_that_straddle_rows(groups: int, piece: int | None) -> None:
    weight = np.random.default_rng(groups).standard_normal((12, 48)).astype(np.float32)
    quantizer = ZeroQuant(5, groups, "float32")
    assert quantizer.format_of((48, 12)) == UniformFormat(5, piece, "symmetric_signed", "float32")
    tensor = solve(quantizer, jnp.asarray(weight.T))
    scales, codes = oracle.quantized(weight, 5, groups)
    np.testing.assert_array_equal(codes_of(tensor), codes)
    expected = (scales[:, None] * codes.reshape(groups, -1)).reshape(12, 48)
    np.testing.assert_allclose(tensor.dequantize().T, expected, atol=1e-6)


def test_published_grouping_of_llama_costs_its_stated_bits() -> None:
    """4096 groups of Llama 3.1 8B: rows, quarters of rows, and three and a half rows."""
    stated = {(4096, 4096): None, (4096, 1024): 1024, (4096, 14336): 2048, (14336, 4096): None}
    for shape, piece in stated.items():
        weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        tensor, _ = jax.eval_shape(lambda one: ZeroQuant(4, 4096)(one, None, KEY), weight)
        assert tensor.format.group_size == piece
        np.testing.assert_allclose(tensor.bits_per_weight(), 4 + 16 * 4096 / np.prod(shape), rtol=0.01)


def test_groups_of_rows_are_round_to_nearest_per_channel() -> None:
    weight = jax.random.normal(jax.random.key(1), (64, 12))
    ours = solve(ZeroQuant(8, 12), weight)
    theirs, _ = jax.jit(Rtn(UniformFormat(8, None, "symmetric_signed")))(weight, None, KEY)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.scales, theirs.scales)


def test_the_largest_negative_weight_is_exact_and_the_largest_positive_clipped() -> None:
    tensor = solve(ZeroQuant(4, 1), jnp.array([[-1.0, 0.25], [1.0, 0.5]]))
    np.testing.assert_array_equal(tensor.dequantize(), [[-1.0, 0.25], [0.875, 0.5]])


def test_zero_groups_give_zeros_and_others_their_values() -> None:
    weight = jax.random.normal(jax.random.key(2), (32, 8)).at[:, 3].set(0).at[16:, 5].set(0).at[:, 6].set(-0.5)
    dense = solve(ZeroQuant(4, 16), weight).dequantize()
    np.testing.assert_array_equal(dense[:, 3], 0)
    np.testing.assert_array_equal(dense[16:, 5], 0)
    np.testing.assert_array_equal(dense[:, 6], -0.5)
    assert (dense[:, 0] != 0).any()
    np.testing.assert_array_equal(solve(ZeroQuant(4, 16), jnp.zeros((32, 8))).dequantize(), 0)


def test_reference_rounds_in_the_weights_dtype() -> None:
    """Equal for float32; with bfloat16 weights the quotient is rounded twice, which moves some codes at 8 bits."""
    weight = jax.random.normal(jax.random.key(3), (64, 12))
    paper, reference = ZeroQuant(8, 12), ZeroQuant(8, 12, fidelity="reference")
    np.testing.assert_array_equal(solve(reference, weight).codes, solve(paper, weight).codes)
    narrow = weight.astype(jnp.bfloat16)
    steps = np.abs(codes_of(solve(reference, narrow)) - codes_of(solve(paper, narrow)))
    assert steps.max() == 1
    scales = np.asarray(solve(reference, narrow).scales, np.float32)
    quotient = (narrow / jnp.asarray(scales, jnp.bfloat16)).astype(jnp.float32)
    expected = np.clip(np.rint(np.asarray(quotient)), -128, 127)
    np.testing.assert_array_equal(codes_of(solve(reference, narrow)).T, expected)


def test_weights_that_are_not_finite_give_diagnostics_that_are_not() -> None:
    _, figures = ZeroQuant(4, 3)(jnp.ones((16, 3)).at[2, 1].set(jnp.nan), None, KEY)
    np.testing.assert_array_equal(jnp.isfinite(figures["weight_error"]), [True, False, True])


def test_what_cannot_be_grouped_so_is_refused() -> None:
    with pytest.raises(FormatError, match="7 does not divide the 576 weights of 12 rows of 48; 12 makes"):
        ZeroQuant(4, 7).check((48, 12))
    with pytest.raises(FormatError, match="groups of 9 weights, which cut rows of 48 inputs into pieces of 3: their"):
        ZeroQuant(4, 64).check((48, 12))
    with pytest.raises(FormatError, match="does not divide"):
        ZeroQuant(4, 1152).check((48, 12))
    with pytest.raises(FormatError, match="bits=2: ZeroQuant's grid has 3 to 8"):
        ZeroQuant(2)
    with pytest.raises(FormatError, match="number_of_groups=0"):
        ZeroQuant(4, 0)
