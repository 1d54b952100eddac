"""What every `QuantizedTensor` promises, one row for each format and each way to fill it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.checkpoint import load_tree, save_tree
from jquant.errors import FormatError
from jquant.formats import (
    BinaryFormat,
    BinaryTensor,
    CenteredTensor,
    Layout,
    PermutedTensor,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedSpqrTensor,
    PreparedWideTensor,
    QuantizedTensor,
    RazoredFormat,
    RazoredTensor,
    RotatedTensor,
    SpqrFormat,
    SpqrTensor,
    StatisticCodes,
    UniformFormat,
    UniformTensor,
    most_outliers,
    prepare_float,
    prepare_integer,
    prepare_outliers,
    prepare_signs,
    prepare_wide,
    quantize_binary,
    quantize_centered,
    quantize_razored,
    quantize_spqr,
    quantize_uniform,
    rotated,
    split_outputs,
)
from jquant.numerics import Transform, shift_bits, two_factors
from jquant.structure import decode_structure, encode_structure
from tests.oracles import quip

OUTPUTS = 6


def uniform(inputs: int, format: UniformFormat) -> tuple[UniformTensor, np.ndarray]:
    """Return a tensor of random codes, and the dense matrix that its definition gives, in float64."""
    rng = np.random.default_rng(inputs * format.bits)
    groups = format.groups(inputs)
    codes = rng.integers(0, 2**format.bits, (inputs, OUTPUTS))
    scales = jnp.asarray(rng.uniform(0.5, 2.0, (groups, OUTPUTS)), format.scale_dtype).astype(jnp.float32)
    zeros = np.full((groups, OUTPUTS), 2.0 ** (format.bits - 1))
    if format.symmetry == "asymmetric":
        zeros = rng.integers(0, 2**format.bits, (groups, OUTPUTS))
    tensor = quantize_uniform(jnp.asarray(codes, jnp.uint8), scales, jnp.asarray(zeros, jnp.float32), format)
    grid_of_row = np.arange(inputs) // (inputs // groups)
    return tensor, np.asarray(scales, np.float64)[grid_of_row] * (codes - np.asarray(zeros)[grid_of_row])


def binary(inputs: int, format: BinaryFormat) -> tuple[BinaryTensor, np.ndarray]:
    """An odd number of bits has offsets."""
    rng = np.random.default_rng(inputs + format.bits)
    groups = format.groups(inputs)
    codes = rng.integers(0, 2**format.bits, (inputs, OUTPUTS))
    alphas = np.asarray(jnp.asarray(rng.uniform(0.5, 2.0, (format.bits, groups, OUTPUTS)), format.scale_dtype))
    offsets = alphas[0] / 4 if format.bits % 2 else None
    tensor = quantize_binary(
        jnp.asarray(codes, jnp.uint8),
        jnp.asarray(alphas, jnp.float32),
        None if offsets is None else jnp.asarray(offsets, jnp.float32),
        format,
    )
    signs = 2.0 * (codes >> np.arange(format.bits)[:, None, None] & 1) - 1
    dense = (np.repeat(alphas.astype(np.float64), inputs // groups, axis=1) * signs).sum(axis=0)
    return tensor, dense if offsets is None else dense + np.repeat(offsets.astype(np.float64), inputs // groups, axis=0)


def razored(inputs: int, format: RazoredFormat) -> tuple[RazoredTensor, np.ndarray]:
    """Return a tensor of random codes and shifts."""
    rng = np.random.default_rng(inputs)
    codes = rng.integers(-(2 ** (format.bits - 1)), 2 ** (format.bits - 1), (inputs, OUTPUTS))
    shifts = rng.integers(0, 2 ** shift_bits(format.base_bits, format.bits), format.shifts_shape((inputs, OUTPUTS)))
    groups = format.scale_groups(inputs)
    scales = jnp.asarray(rng.uniform(0.5, 2.0, (groups, OUTPUTS)), format.scale_dtype).astype(jnp.float32)
    tensor = quantize_razored(jnp.asarray(codes, jnp.int8), jnp.asarray(shifts, jnp.uint8), scales, format)
    repeats, axis = (format.group_size, 0) if format.axis == "in" else (format.group_size, 1)
    integers = codes * 2.0 ** np.repeat(shifts, repeats, axis)
    return tensor, np.repeat(np.asarray(scales, np.float64), inputs // groups, 0) * integers


def permuted(inputs: int, format: UniformFormat) -> tuple[PermutedTensor, np.ndarray]:
    inner, dense = uniform(inputs, format)
    order = np.random.default_rng(1).permutation(inputs)
    expected = np.zeros_like(dense)
    expected[order] = dense
    return PermutedTensor(inner=inner, order=jnp.asarray(order, jnp.int32)[:, None], shape=inner.shape), expected


def centered(inputs: int, bits: int) -> tuple[CenteredTensor, np.ndarray]:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (inputs, OUTPUTS))
    tensor = quantize_centered(jnp.asarray(codes, jnp.uint8), jnp.float32(0.7), bits)
    return tensor, np.float64(np.float32(0.7)) * (codes - (2**bits - 1) / 2)


def turned(inputs: int, transform: Transform) -> tuple[RotatedTensor, np.ndarray]:
    """A tensor of 3 bits in rotated bases of 48 = 12 * 4 inputs and 6 = 2 * 3 outputs."""
    inner, dense = centered(inputs, 3)
    scales = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2.0, inputs), jnp.float16).at[3].set(0)
    left, right = quip.rotation(11, *two_factors(inputs), transform), quip.rotation(~11 & quip.MASK, 2, 3, transform)
    tensor = rotated(inner, scales, jnp.uint32(11), transform)
    return tensor, np.asarray(scales, np.float64)[:, None] * (left.T @ dense @ right)


def spqr(inputs: int, format: SpqrFormat, outputs: int = OUTPUTS) -> tuple[SpqrTensor, np.ndarray]:
    """Statistics of few bits, so that float32 is exact; outliers where no outputs share an entry."""
    rng = np.random.default_rng(inputs + format.bits)
    shape, groups, runs = (inputs, outputs), inputs // format.group_size, outputs // format.second_group_size
    codes = rng.integers(0, 2**format.bits, shape)

    def statistic(bits: int | None) -> tuple[StatisticCodes | jax.Array, np.ndarray]:
        if bits is None:
            numbers = rng.integers(1, 64, (groups, outputs)) / 16
            return jnp.asarray(numbers, jnp.float32), numbers
        own = rng.integers(0, 2**bits, (groups, outputs))
        steps, bases = rng.integers(1, 16, (2, groups, runs)) / 16
        values = np.repeat(bases, outputs // runs, 1) + np.repeat(steps, outputs // runs, 1) * own
        floats = jnp.asarray(steps, jnp.float32), jnp.asarray(bases, jnp.float32)
        return StatisticCodes(jnp.asarray(own, jnp.uint8), *floats), values

    (scales, scale), (zeros, zero) = statistic(format.scale_bits), statistic(format.zero_bits)
    dense = np.repeat(scale, format.group_size, 0) * (codes - np.repeat(zero, format.group_size, 0))
    if 1 < format.second_group_size < 16:
        return quantize_spqr(jnp.asarray(codes, jnp.uint8), scales, zeros, format), dense
    mask, values = rng.random(shape) < 0.1, rng.integers(-99, 99, shape) / 8
    mask[:, 2] = False  # an output without any
    outliers = jnp.asarray(mask), jnp.asarray(values, jnp.float32), int(mask.sum()) + 3
    tensor = quantize_spqr(jnp.asarray(codes, jnp.uint8), scales, zeros, format, outliers)
    return tensor, np.where(mask, values, dense)


def for_floats(inputs: int, format: UniformFormat) -> tuple[PreparedFloatTensor, np.ndarray]:
    """Both sides are filled up to 64; the meaning is that of the scales, of float32 ones that of them in bfloat16."""
    tensor, _ = uniform(inputs, format)
    read = jnp.bfloat16 if format.scale_dtype == "float32" else tensor.scales.dtype
    rounded = dataclasses.replace(tensor, scales=tensor.scales.astype(read))
    with jax.enable_x64(True):
        return prepare_float(tensor, Layout.HOPPER), np.asarray(rounded.dequantize(jnp.float64))


def for_integers(inputs: int, format: UniformFormat) -> tuple[PreparedIntegerTensor, np.ndarray]:
    tensor, dense = uniform(inputs, format)
    return prepare_integer(tensor, Layout.HOPPER), dense


def for_floats_in_bytes(inputs: int, format: UniformFormat) -> tuple[PreparedWideTensor, np.ndarray]:
    tensor, dense = uniform(inputs, format)
    return prepare_wide(tensor, Layout.HOPPER), dense


def for_signs(inputs: int, format: BinaryFormat) -> tuple[PreparedBinaryTensor, np.ndarray]:
    tensor, dense = binary(inputs, format)
    return prepare_signs(tensor, Layout.HOPPER), dense


def sixteen(inputs: int, format: SpqrFormat) -> tuple[SpqrTensor, np.ndarray]:
    return spqr(inputs, format, 16)


def for_outliers(inputs: int, format: SpqrFormat) -> tuple[PreparedSpqrTensor, np.ndarray]:
    tensor, dense = sixteen(inputs, format)
    return prepare_outliers(tensor, Layout.HOPPER, most_outliers(tensor)), dense


# 45 inputs: no multiple of 8 / bits, and 3 groups of 15 whose packed zeros end inside a byte.
CASES = {
    **{f"{bits} bits, 3 ragged groups": (uniform, 45, UniformFormat(bits, 15)) for bits in range(1, 9)},
    **{
        f"{bits} bits, symmetric": (uniform, 48, UniformFormat(bits, (None, 16)[bits % 2], "symmetric", "bfloat16"))
        for bits in range(2, 9)
    },
    "1 bit, symmetric_full": (uniform, 45, UniformFormat(1, None, "symmetric_full", "float32")),
    "4 bits, symmetric_full": (uniform, 48, UniformFormat(4, 16, "symmetric_full", "float32")),
    "3 bits, per channel": (uniform, 45, UniformFormat(3, None, scale_dtype="float32")),
    "4 bits, groups of one": (uniform, 48, UniformFormat(4, 1)),
    **{f"{bits} signs": (binary, 48, BinaryFormat(bits, (None, 16)[bits % 2])) for bits in range(1, 9)},
    "3 signs, ragged": (binary, 45, BinaryFormat(3, 15, "bfloat16")),
    "razored, inputs": (razored, 45, RazoredFormat(group_size=15)),
    "razored, outputs": (razored, 45, RazoredFormat(group_size=2, axis="out", scale_group_size=9)),
    "razored from 16 bits": (razored, 48, RazoredFormat(16, 5, 8, scale_dtype="float32")),
    "permuted 4 bits": (permuted, 48, UniformFormat(4, 16)),
    "permuted 3 bits, symmetric": (permuted, 45, UniformFormat(3, 15, "symmetric")),
    **{f"{bits} bits, centered": (centered, 45, bits) for bits in (1, 3, 8)},
    **{f"rotated, {transform}": (turned, 48, transform) for transform in ("kronecker", "butterfly")},
    "spqr 3 bits": (spqr, 48, SpqrFormat(3, 16, second_group_size=2)),
    "spqr 2 bits, numbers for scales": (spqr, 45, SpqrFormat(2, 15, None, 5, 2, "float32")),
    "spqr, outliers": (spqr, 48, SpqrFormat(3, 8, 2, 4, second_group_size=1)),
    "for floats, 3 groups": (for_floats, 96, UniformFormat(4, 32)),
    "for floats, wide scales": (for_floats, 96, UniformFormat(4, 32, "asymmetric", "float32")),
    "for floats, 3 bits, symmetric": (for_floats, 45, UniformFormat(3, None, "symmetric", "bfloat16")),
    **{f"for {bits}-bit integers": (for_integers, 45, UniformFormat(bits, None, "symmetric")) for bits in (4, 7)},
    "for 8-bit integers": (for_integers, 45, UniformFormat(8, None)),
    "for floats, 8 bits": (for_floats_in_bytes, 45, UniformFormat(8, None, "symmetric")),
    "3 signs, for a kernel": (for_signs, 192, BinaryFormat(3, 64)),
    "spqr, for a kernel": (for_outliers, 48, SpqrFormat()),
}

MIXING = {case for case, row in CASES.items() if row[0] is turned}  # their sums round, and their outputs hang together
PORTABLE: dict[Any, Any] = {
    for_floats: uniform,
    for_integers: uniform,
    for_floats_in_bytes: uniform,
    for_signs: binary,
    for_outliers: sixteen,
}
PREPARED = {case for case, row in CASES.items() if row[0] in PORTABLE}  # codes lie [out, in]
CUTTABLE = {case: row for case, row in CASES.items() if case not in MIXING | PREPARED}

every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def make(case: str) -> tuple[QuantizedTensor, np.ndarray]:
    build, inputs, format = CASES[case]
    return build(inputs, format)


def for_all[T](function: Callable[[QuantizedTensor], T], cases: Iterable[str] = CASES) -> dict[str, T]:
    """Apply a function to every row's tensor in one jit: one compilation for the table instead of one a row."""
    return jax.jit(lambda tensors: {case: function(one) for case, one in tensors.items()})(
        {case: make(case)[0] for case in cases}
    )


@pytest.fixture(scope="module")
def jitted() -> dict[str, jax.Array]:
    return for_all(lambda tensor: tensor.dequantize())


def twice(tensor: QuantizedTensor) -> QuantizedTensor:
    """Stack a tensor with one whose outputs are reversed."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.flip(leaf, -1)]), tensor)


@pytest.fixture(scope="module")
def vmapped() -> dict[str, jax.Array]:
    return for_all(lambda tensor: jax.vmap(lambda one: one.dequantize())(twice(tensor)))


@pytest.fixture(scope="module")
def split() -> dict[str, tuple[jax.Array, ...]]:
    return for_all(lambda tensor: tuple(part.dequantize() for part in split_outputs(tensor, (2, 4))), CUTTABLE)


def assert_agrees(case: str, actual: jax.Array, expected: np.ndarray | jax.Array, rtol: float = 0.0) -> None:
    """Bits, or `rtol`; a format that sums has rounded some 50 products of the largest weight's size."""
    atol = 2e-6 * float(np.abs(expected).max()) if case in MIXING else 0.0
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    """Bits, dtypes and static fields."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_format_has_a_row() -> None:
    assert {type(make(case)[0]) for case in CASES} == set(QuantizedTensor.__subclasses__())


@every_case
def test_dequantize_is_the_definition(case: str, jitted: dict[str, jax.Array]) -> None:
    tensor, expected = make(case)
    assert jitted[case].shape == tensor.shape == expected.shape
    assert_agrees(case, jitted[case], expected, rtol=1e-7)  # one rounding to float32


@pytest.mark.slow
@every_case
def test_dequantize_is_the_same_without_jit(case: str, jitted: dict[str, jax.Array]) -> None:
    assert_agrees(case, make(case)[0].dequantize(), jitted[case])


def test_dequantize_rounds_once() -> None:
    for case in ("5 bits, 3 ragged groups", "permuted 4 bits"):
        tensor, expected = make(case)
        half = tensor.dequantize(jnp.bfloat16)
        np.testing.assert_array_equal(half, tensor.dequantize().astype(jnp.bfloat16))
        with jax.enable_x64(True):
            np.testing.assert_array_equal(tensor.dequantize(jnp.float64), expected)


@every_case
def test_shape_is_static(case: str) -> None:
    tensor, _ = make(case)
    seen = []
    stacked = jax.eval_shape(twice, tensor)
    jax.eval_shape(jax.vmap(lambda one: seen.append(one.shape) or one), stacked)
    jax.eval_shape(lambda one: seen.append(one.shape) or one.dequantize(), tensor)
    abstract = jax.eval_shape(lambda one: one, tensor)
    assert [*seen, stacked.shape, abstract.shape] == [tensor.shape] * 4
    assert jax.tree.structure(abstract) == jax.tree.structure(tensor) == jax.tree.structure(stacked)
    assert abstract.nbytes() == tensor.nbytes()


@every_case
def test_vmap_is_a_loop(case: str, jitted: dict[str, jax.Array], vmapped: dict[str, jax.Array]) -> None:
    assert_agrees(case, vmapped[case][0], jitted[case])
    if case in MIXING | PREPARED:
        reversed_outputs = jax.tree.map(lambda leaf: jnp.flip(leaf, -1), make(case)[0]).dequantize()
        assert_agrees(case, vmapped[case][1], reversed_outputs)
    else:
        np.testing.assert_array_equal(vmapped[case][1], jitted[case][:, ::-1])


@pytest.mark.parametrize("case", [case for case in CASES if case not in PREPARED])
def test_leaves_end_in_outputs_or_groups_of_them_or_one(case: str) -> None:
    tensor, _ = make(case)
    assert all(OUTPUTS % leaf.shape[-1] == 0 for leaf in jax.tree.leaves(tensor))


@pytest.mark.parametrize("case", CUTTABLE)
def test_split_outputs_is_the_dense_split(
    case: str, jitted: dict[str, jax.Array], split: dict[str, tuple[jax.Array, ...]]
) -> None:
    expected = np.split(np.asarray(jitted[case]), [2], axis=1)
    for part, piece in zip(split[case], expected, strict=True):
        np.testing.assert_array_equal(part, piece)


@pytest.mark.parametrize("case", sorted(MIXING))
def test_what_mixes_outputs_is_not_cut(case: str) -> None:
    tensor, _ = make(case)
    assert tensor.mixes_outputs
    assert split_outputs(tensor, (6,))[0] is tensor
    with pytest.raises(FormatError, match="cannot cut a RotatedTensor, which mixes outputs"):
        split_outputs(tensor, (2, tensor.shape[1] - 2))


@pytest.mark.parametrize("case", sorted(PREPARED))
def test_what_is_prepared_is_portable_again_bit_for_bit_and_is_not_cut(case: str) -> None:
    tensor, _ = make(case)
    assert isinstance(
        tensor,
        PreparedFloatTensor | PreparedIntegerTensor | PreparedWideTensor | PreparedBinaryTensor | PreparedSpqrTensor,
    )
    assert_same(tensor.restore(), PORTABLE[CASES[case][0]](*CASES[case][1:])[0])
    with pytest.raises(FormatError, match=r"cannot cut a Prepared\w+ in layout hopper: restore it first"):
        split_outputs(tensor, (2, tensor.shape[1] - 2))


def test_split_outputs_checks_and_sets_sizes() -> None:
    parts = split_outputs(make("permuted 4 bits")[0], (2, 4))
    assert [part.shape for part in parts] == [part.inner.shape for part in parts] == [(48, 2), (48, 4)]
    with pytest.raises(FormatError, match=r"cannot cut 6 outputs into \(2, 3\): the sizes sum to 5"):
        split_outputs(make("permuted 4 bits")[0], (2, 3))


@every_case
def test_bits_per_weight_are_bytes(case: str) -> None:
    tensor, _ = make(case)
    taken = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))  # numpy has a byte for an int4
    assert tensor.nbytes() == taken
    assert tensor.bits_per_weight() == 8 * taken / np.prod(tensor.shape)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("8 bits, symmetric", 8 + 16 / 48),
        ("7 bits, symmetric", 7 + 16 / 16),
        ("4 bits, symmetric_full", 4 + 32 / 16),
        ("4 bits, groups of one", 4 + 16 + 4),
        ("permuted 4 bits", 4 + (16 + 16 / 3) / 16 + 32 / 6),  # 3 zeros of 4 bits take 2 bytes; an order for 6 outputs
        ("3 bits, centered", (17 * 6 + 4) * 8 / 270),
        ("rotated, kronecker", 3 + (2 * 48 + 4 + 4) * 8 / 288),  # scales, a step and a seed
        ("3 signs", 3 + (3 + 1) * 16 / 16),
        ("4 signs", 4 + 4 * 16 / 48),
        ("razored, inputs", (23 + 2 + 2) * 8 / 45),  # 180 bits, 3 shifts of 3 bits, a scale
        ("razored, outputs", (23 + 17 / 2 + 5 * 2) * 8 / 45),  # 135 bits of shifts for two outputs
        ("3 bits, per channel", (17 + 4 + 1) * 8 / 45),  # 135 bits take 17 bytes
        ("for floats, 3 groups", (64 * 128 * 4 + 2 * 4 * 64 * 16) / 576),
        ("for floats, wide scales", (64 * 128 * 4 + 2 * 4 * 64 * 16) / 576 + 32 / 32),  # the old scales too
        ("for 7-bit integers", 64 * (64 * 8 + 2 * 32) / 270),
    ],
)
def test_bits_per_weight_by_hand(case: str, bits: float) -> None:
    np.testing.assert_allclose(make(case)[0].bits_per_weight(), bits, rtol=1e-12)


@every_case
def test_structure_goes_through_json(case: str) -> None:
    tensor, _ = make(case)
    back = decode_structure(json.loads(json.dumps(encode_structure(tensor))))
    assert back == jax.eval_shape(lambda one: one, tensor)


def test_checkpoint_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = tuple(make(case)[0] for case in CASES)
    save_tree(tensors, tmp_path / "all")
    back = load_tree(tmp_path / "all")
    for case, tensor, restored in zip(CASES, tensors, back, strict=True):
        assert type(restored) is type(tensor), case
        assert_same(restored, tensor)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_widths_that_no_code_has_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=f"bits={bits} .*give 1 to 8"):
        UniformFormat(bits)


def test_settings_that_no_grid_has_are_refused() -> None:
    with pytest.raises(FormatError, match="2 to 8 if symmetric"):
        UniformFormat(1, symmetry="symmetric")
    with pytest.raises(FormatError, match="group_size=0: give a positive size"):
        UniformFormat(group_size=0)


def test_constructor_refuses_grids_of_another_shape() -> None:
    codes, row = jnp.zeros((32, 2), jnp.uint8), jnp.ones((1, 2))
    with pytest.raises(FormatError, match=r"give \(2, 2\)"):
        quantize_uniform(codes, row, row, UniformFormat(group_size=16))
    with pytest.raises(FormatError, match="group_size 24 does not divide 32 inputs; sizes that do: 16, 32, or null"):
        quantize_uniform(codes, row, row, UniformFormat(group_size=24))
    with pytest.raises(FormatError, match="use null"):
        UniformFormat(group_size=4).groups(45)


def test_rotated_and_centered_constructors_refuse_what_does_not_fit() -> None:
    codes = jnp.zeros((32, 2), jnp.uint8)
    for bits in (0, 9):
        with pytest.raises(FormatError, match=f"bits={bits} for a centered grid: give 1 to 8"):
            quantize_centered(codes, jnp.float32(1), bits)
    with pytest.raises(FormatError, match=r"scales of shape \(2,\) for a tensor of shape \(32, 2\): give one an input"):
        rotated(quantize_centered(codes, jnp.float32(1), 2), jnp.ones(2), jnp.uint32(0), "kronecker")


def test_razored_constructor_refuses_what_does_not_fit() -> None:
    codes, scales = jnp.zeros((32, 4), jnp.int8), jnp.ones((1, 4))
    with pytest.raises(FormatError, match=r"give \(\(4, 4\), \(1, 4\)\)"):
        quantize_razored(codes, jnp.zeros((32, 2), jnp.uint8), scales, RazoredFormat())
    with pytest.raises(FormatError, match="group_size 24 does not divide 32 inputs; sizes that do: 8, 16, 32"):
        quantize_razored(codes, jnp.zeros((1, 4), jnp.uint8), scales, RazoredFormat(group_size=24))


def test_outputs_that_share_an_entry_are_not_cut_apart() -> None:
    tensor, expected = make("razored, outputs")
    with pytest.raises(FormatError, match="cannot cut outputs 0 to 3 out: each 2 in turn share entries"):
        split_outputs(tensor, (3, 3))
    np.testing.assert_allclose(split_outputs(tensor, (4, 2))[1].dequantize(), expected[:, 4:], rtol=1e-7)


def test_formats_are_values() -> None:
    assert hash(UniformFormat()) == hash(UniformFormat(4, 128))
    assert dataclasses.replace(UniformFormat(), bits=3) == UniformFormat(bits=3)
