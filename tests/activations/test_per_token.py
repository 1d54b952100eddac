"""Per-token grids: golden codes, the reference's tensors, the oracle, and what rounding must satisfy."""

from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import PerToken
from jquant.activations.per_token import TokenGrid
from jquant.errors import FormatError
from jquant.formats import UniformActivation
from tests.oracles import activations as oracle

ROW = [0.1, -0.7, 1.4, 3.2, -2.0, 0.05, 0.9, -1.1]
RNG = np.random.default_rng(0)
X = RNG.standard_t(4, (6, 48)).astype(np.float32)

run = jax.jit(lambda quantizer, x: quantizer(x, None))


def quantize(method: PerToken, x: np.ndarray | list[float]) -> UniformActivation:
    return run(method.fit(None), jnp.asarray(x, jnp.float32))


def unsigned(activation: UniformActivation, bits: int) -> np.ndarray:
    return np.asarray(activation.codes, int) + 2 ** (bits - 1)


# codes (from 0 where asymmetric), scales, zeros: spec_acts_kv.md section 13
GOLDEN = {
    "symmetric": (PerToken(4, "symmetric", 0.9), [0, -2, 3, 7, -5, 0, 2, -3], [0.4114286], None),
    "asymmetric": (PerToken(4, "asymmetric", 0.95), [6, 4, 10, 15, 0, 6, 9, 3], [0.3293333], [6]),
    "groups": (PerToken(4, "asymmetric", 0.95, 4), [3, 0, 9, 15, 0, 10, 15, 4], [0.247, 0.1836667], [3, 10]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_codes(case: str) -> None:
    method, codes, scales, zeros = GOLDEN[case]
    found = quantize(method, ROW)
    np.testing.assert_array_equal(found.codes if zeros is None else unsigned(found, 4), codes)
    np.testing.assert_allclose(found.scales, scales, rtol=2e-7 / 0.18)  # seven decimals are given
    if zeros is not None:
        np.testing.assert_array_equal(found.zeros + 8, zeros)


def test_golden_values_of_zeroquant() -> None:
    four, eight = (quantize(PerToken(bits, "symmetric_signed"), ROW).dequantize() for bits in (4, 8))
    np.testing.assert_allclose(four, [0, -0.8, 1.6, 2.8, -2, 0, 0.8, -1.2], atol=1e-6)
    np.testing.assert_allclose(eight[3], 3.175, rtol=1e-6)


def test_golden_group_far_from_zero_keeps_its_resolution() -> None:
    far = [2.0, 3.0, 4.0, 5.0]
    grouped, whole = quantize(PerToken(4, "asymmetric", 0.95, 4), far), quantize(PerToken(4, "asymmetric", 0.95), far)
    np.testing.assert_allclose(grouped.dequantize(), [2.09, 3.04, 3.99, 4.75], rtol=1e-6)
    np.testing.assert_array_equal(grouped.zeros + 8, [-10])
    np.testing.assert_allclose(whole.dequantize(), [1.9, 2.85, 4.1166667, 4.75], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("a4_sym_c0.9", PerToken(4, "symmetric", 0.9)),
        ("a4_asym_c0.95_g32", PerToken(4, "asymmetric", 0.95, 32)),
        ("a8_sym", PerToken(8)),
    ],
)
def test_quarots_tensors(shared: Path, name: str, method: PerToken) -> None:
    golden = np.load(shared / "golden" / "quarot_quant.npz")
    found = quantize(method, golden["X"][:32]).dequantize()
    np.testing.assert_allclose(found, golden[name][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeroquants_tensors(shared: Path, bits: int) -> None:
    """Its symmetric grids of the rows of a weight are those of tokens."""
    golden = np.load(shared / "golden" / "zeroquant.npz")
    found = quantize(PerToken(bits, "symmetric_signed"), golden["W"]).dequantize()
    np.testing.assert_allclose(found, golden[f"sym{bits}_g16"], rtol=0, atol=1e-6)
    found = quantize(PerToken(bits, "asymmetric_zeroquant"), golden["x"]).dequantize()
    np.testing.assert_allclose(found, golden[f"asym{bits}_tok"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("symmetry", get_args(TokenGrid.__value__))
@pytest.mark.parametrize(("bits", "clip", "group"), [(8, 1.0, None), (3, 0.9, None), (4, 0.95, 16)], ids=str)
def test_equals_the_oracle(symmetry: TokenGrid, bits: int, clip: float, group: int | None) -> None:
    found = quantize(PerToken(bits, symmetry, clip, group), X)
    for t, row in enumerate(X.astype(np.float64)):
        codes, scales, zeros = oracle.rounded(row, bits, symmetry, clip, group=group)
        np.testing.assert_array_equal(unsigned(found, bits)[t], codes)
        np.testing.assert_allclose(found.scales[t], scales, rtol=1e-6)
        if found.zeros is not None:
            np.testing.assert_array_equal(found.zeros[t] + 2 ** (bits - 1), zeros)
    np.testing.assert_allclose(
        found.dequantize(), oracle.dequantized(X, bits, symmetry, clip, group=group), rtol=0, atol=1e-5
    )


def test_idempotent_and_within_half_a_step() -> None:
    for method in (PerToken(4), PerToken(6, "asymmetric")):
        once = quantize(method, X)
        np.testing.assert_allclose(quantize(method, once.dequantize()).dequantize(), once.dequantize(), atol=2e-6)
        assert (np.abs(once.dequantize() - X) <= 0.5 * np.asarray(once.scales) * (1 + 1e-5)).all()


def test_rounds_half_to_even() -> None:
    assert quantize(PerToken(4), [7.0, 0.5, 1.5, 2.5, -0.5, -1.5]).codes.tolist() == [7, 0, 2, 2, 0, -2]


def test_zero_and_constant_tokens() -> None:
    x = jnp.concatenate([jnp.zeros((1, 32)), jnp.full((1, 32), 3.0)])
    for symmetry in get_args(TokenGrid.__value__):
        for group in (None, 16):
            dense = quantize(PerToken(8, symmetry, group_size=group), x).dequantize()
            np.testing.assert_array_equal(dense[0], 0)
            np.testing.assert_allclose(dense[1], 3.0, rtol=1 / 127)  # symmetric_signed clips it to 127/128


def test_bfloat16_is_measured_in_float32_and_remembered() -> None:
    narrow = PerToken(8).fit(None)(jnp.asarray(X, jnp.bfloat16), None)
    assert (narrow.dtype, narrow.scales.dtype, narrow.dequantize("bfloat16").dtype) == (
        "bfloat16",
        "float32",
        "bfloat16",
    )
    wide = quantize(PerToken(8), jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(narrow.codes, wide.codes)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bits": 1}, "bits=1 for an activation: give 2 to 8"),
        ({"bits": 9}, "bits=9 for an activation: give 2 to 8"),
        ({"clip_ratio": 0.0}, "clip_ratio=0.0: give a share of the range, above 0 and at most 1"),
        ({"clip_ratio": 1.5}, "clip_ratio=1.5"),
        ({"group_size": 0}, "group_size=0: give a positive size, or null"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        PerToken(**settings)


def test_groups_that_do_not_divide_are_refused() -> None:
    PerToken(group_size=16).check(48)
    with pytest.raises(
        FormatError, match="group_size 20 does not divide an input of 48 features; sizes that do: 8, 16"
    ):
        PerToken(group_size=20).check(48)
