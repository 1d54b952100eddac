"""Razoring: bit-exact against the definition, the specification's examples, and what its two fidelities share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.numerics import Razored, RazorFidelity, razor_integers, shift_bits, unrazor
from tests.oracles import razor as oracle

FIDELITIES: tuple[RazorFidelity, ...] = ("paper", "reference")


_razor = jax.jit(razor_integers, static_argnames=("bits", "group_size", "axis", "fidelity"))
_unrazor = jax.jit(unrazor, static_argnames="axis")


def cut(integers: np.ndarray, bits: int, group: int, fidelity: RazorFidelity) -> Razored:
    return _razor(jnp.asarray(integers, jnp.int32), bits, group, axis=-1, fidelity=fidelity)


def back(razored: Razored, axis: int = -1) -> np.ndarray:
    return np.asarray(_unrazor(*razored, axis=axis))


def formula(values: np.ndarray, others: np.ndarray, bits: int, fidelity: str) -> np.ndarray:
    """Razor each value with a group whose other magnitudes are `others`, in float64."""
    largest = np.maximum(np.abs(values), others)
    length = np.where(largest > 0, np.floor(np.log2(np.maximum(largest, 1))) + 1, 0)
    step = 2.0 ** np.maximum(length - (bits - 1), 0)
    top = 2 ** (bits - 1) - 1
    kept = np.rint(np.abs(values) / step)
    return np.sign(values) * np.minimum(kept, top + ((values < 0) & (fidelity == "reference"))) * step


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_all_pairs_of_bytes(bits: int, fidelity: RazorFidelity) -> None:
    """Every value, with every magnitude that can decide its shift; 8 bits and a sign, as "range" steps need."""
    first, second = np.meshgrid(np.arange(-255, 256), np.arange(-255, 256))
    pairs = np.stack([first.ravel(), second.ravel()], axis=-1)
    razored = cut(pairs, bits, 2, fidelity)
    expected = formula(pairs, np.abs(pairs)[:, ::-1], bits, fidelity)
    np.testing.assert_array_equal(back(razored), expected)
    low = -(2 ** (bits - 1)) + (fidelity == "paper")
    assert razored.codes.min() == low
    assert razored.codes.max() == 2 ** (bits - 1) - 1
    assert razored.shifts.max() < 2 ** shift_bits(8, bits)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_values_of_two_bytes(fidelity: RazorFidelity) -> None:
    values = np.arange(-(2**15), 2**15)
    for other in (0, 1, 100, 4095, 4096, 20_000, 2**15):
        pairs = np.stack([values, np.full_like(values, other)], axis=-1)
        for bits in (4, 8):
            razored = cut(pairs, bits, 2, fidelity)
            np.testing.assert_array_equal(back(razored)[:, 0], formula(values, np.int64(other), bits, fidelity))
            assert razored.shifts.max() < 2 ** shift_bits(16, bits)


# spec_weights.md section 8 (both fidelities) and spec_acts_kv.md section 13, item 3 (the reference alone).
EXAMPLES = [
    ([3, -7, 5, 0, 1, -2, 6, -4], 4, [3, -7, 5, 0, 1, -2, 6, -4], [3, -7, 5, 0, 1, -2, 6, -4]),
    ([8, -15, 9, -1, 3, 5, -11, 14], 4, [8, -14, 8, 0, 4, 4, -12, 14], [8, -16, 8, 0, 4, 4, -12, 14]),
    ([17, -30, 31, -31, 2, -5, 12, 29], 4, [16, -28, 28, -28, 0, -4, 12, 28], [16, -32, 28, -32, 0, -4, 12, 28]),
    (
        [64, -100, 127, -127, 40, -3, 120, -120],
        4,
        [64, -96, 112, -112, 32, 0, 112, -112],
        [64, -96, 112, -128, 32, 0, 112, -128],
    ),
    ([60, -63, 56, -60, 4, -4, 12, -12], 4, [56, -56, 56, -56, 0, 0, 16, -16], [56, -64, 56, -64, 0, 0, 16, -16]),
    ([-128, 16, 48, 112, -112, 80, -80, 15], 4, None, [-128, 0, 64, 128, -128, 64, -64, 0]),
    (
        [30000, -12345, 255, -256, 128, -1, 32767, -32767],
        8,
        None,
        [29952, -12288, 256, -256, 0, 0, 32512, -32768],
    ),
    ([100, -37, 5, -128, 64, -1, 12, 127], 4, None, [96, -32, 0, -128, 64, 0, 0, 128]),
    ([3, -7, 0, 1, 2, -4, 5, 6], 4, None, [3, -7, 0, 1, 2, -4, 5, 6]),
    ([9, -10, 15, -15, 8, 7, -1, 0], 4, None, [8, -10, 14, -16, 8, 8, 0, 0]),
    ([120, -120, 56, -56, 8, 24, -24, 40], 4, None, [112, -128, 64, -64, 0, 32, -32, 32]),
    (
        [32767, -20000, 1234, -5, 700, -32768, 4096, -4097],
        4,
        None,
        [32768, -16384, 0, 0, 0, -32768, 0, -8192],
    ),
    (
        [32767, -20000, 1234, -5, 700, -32768, 4096, -4097],
        8,
        None,
        [32768, -19968, 1024, 0, 512, -32768, 4096, -4096],
    ),
]


@pytest.mark.parametrize(("integers", "bits", "paper", "reference"), EXAMPLES)
def test_examples(integers: list[int], bits: int, paper: list[int] | None, reference: list[int]) -> None:
    assert back(cut(np.array(integers), bits, 8, "reference")).tolist() == reference
    if paper is not None:
        assert back(cut(np.array(integers), bits, 8, "paper")).tolist() == paper


@pytest.mark.parametrize("group", [8, 16, 32, 64])
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int16", 16)])
def test_reference_tensors(shared: Path, name: str, bits: int, group: int) -> None:
    golden = np.load(shared / "golden" / "qrazor_sdr.npz")
    np.testing.assert_array_equal(
        back(cut(golden[name].astype(int), 4, group, "reference")), golden[f"sdr{bits}to4_g{group}"]
    )


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("group", [1, 8, 32, 128])
def test_oracle(group: int, fidelity: RazorFidelity) -> None:
    rng = np.random.default_rng(group)
    integers = np.clip(np.rint(rng.standard_normal((16, 128)) * rng.choice([1, 10, 50], (16, 1))), -128, 127)
    np.testing.assert_array_equal(back(cut(integers, 4, group, fidelity)), oracle.razor(integers, 4, group, fidelity))


def test_fidelities_differ_only_where_a_negative_saturates() -> None:
    integers = np.random.default_rng(0).integers(-127, 128, (500, 16))
    paper, reference = (cut(integers, 4, 16, fidelity) for fidelity in FIDELITIES)
    np.testing.assert_array_equal(paper.shifts, reference.shifts)
    different = np.asarray(paper.codes != reference.codes)
    assert different.any()
    assert (np.asarray(paper.codes)[different] == -7).all()
    assert (np.asarray(reference.codes)[different] == -8).all()


def test_small_groups_are_kept_exactly() -> None:
    integers = np.random.default_rng(1).integers(-7, 8, (100, 32))
    for fidelity in FIDELITIES:
        razored = cut(integers, 4, 32, fidelity)
        np.testing.assert_array_equal(razored.codes, integers)
        assert not razored.shifts.any()


def test_paper_is_idempotent_and_reference_is_not() -> None:
    integers = np.random.default_rng(2).integers(-127, 128, (300, 16))
    once = back(cut(integers, 4, 8, "paper"))
    np.testing.assert_array_equal(back(cut(once, 4, 8, "paper")), once)
    once = back(cut(integers, 4, 8, "reference"))
    assert (back(cut(once, 4, 8, "reference")) != once).any()  # -8 2^t has one more bit than what it came from


def test_error_is_half_of_what_is_dropped_unless_saturated() -> None:
    integers = np.random.default_rng(3).integers(-127, 128, (300, 16))
    for fidelity in FIDELITIES:
        razored = cut(integers, 4, 8, fidelity)
        step = np.repeat(2.0 ** np.asarray(razored.shifts), 8, axis=-1)
        error = np.abs(back(razored) - integers)
        saturated = np.abs(integers) > 7.5 * step
        assert (error[~saturated] <= step[~saturated] / 2).all()
        assert (error[saturated] <= step[saturated] - 1).all()


def test_order_within_a_group_does_not_matter_and_coarser_groups_drop_no_less() -> None:
    integers = np.random.default_rng(4).integers(-127, 128, (50, 32))
    order = np.random.default_rng(5).permutation(32)
    whole = cut(integers, 4, 32, "reference")
    np.testing.assert_array_equal(cut(integers[:, order], 4, 32, "reference").codes, whole.codes[:, order])
    fine = cut(integers, 4, 8, "reference")
    assert (fine.shifts <= whole.shifts).all()


def test_axes_are_transposes_and_jit_changes_nothing() -> None:
    integers = jnp.asarray(np.random.default_rng(6).integers(-127, 128, (3, 32, 8)), jnp.int32)
    along = razor_integers(integers, 4, 8, axis=1)
    across = razor_integers(jnp.swapaxes(integers, 1, 2), 4, 8, axis=2)
    assert along.shifts.shape == (3, 4, 8)
    for left, right in zip(along, across, strict=True):
        np.testing.assert_array_equal(left, jnp.swapaxes(right, 1, 2))
    np.testing.assert_array_equal(back(along, axis=1), jnp.swapaxes(back(across, axis=2), 1, 2))
    np.testing.assert_array_equal(_razor(integers, 4, 8, axis=1).codes, along.codes)


def test_bad_settings_are_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(FormatError, match=f"razoring to {bits} bits: .*take 2 to 8"):
            cut(np.zeros(8), bits, 8, "paper")
    with pytest.raises(FormatError, match="group_size 3 does not divide 8 integers along axis 0"):
        cut(np.zeros(8), 4, 3, "paper")
    with pytest.raises(FormatError, match="group_size 0"):
        cut(np.zeros(8), 4, 0, "paper")


def test_bits_of_a_shift() -> None:
    assert [shift_bits(8, bits) for bits in (2, 3, 4)] == [3, 3, 3]
    assert [shift_bits(16, bits) for bits in (4, 8)] == [4, 4]
