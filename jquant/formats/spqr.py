"""SpQR's weights: small groups whose scales and zeros are quantized too, and outliers that stay numbers.

    w[i, o] = the value stored for (i, o) if it is an outlier, else scales[i // g, o] * (codes[i, o] - zeros[i // g, o])

Dettmers et al. 2023, arXiv:2306.03078. Zeros are real numbers, not codes. A statistic (scales, or zeros) is quantized
over runs of neighbouring outputs: value = base + step * code, base and step kept in 16 bits; the paper's step * (code -
zero) is the same grid, and loses more to 16 bits. Outliers are kept as a list sorted by output, then row. Measured on
SmolLM2-135M (block 15, 3 bits, threshold 0.25: 1.2 to 1.5 % outliers, up to 317 in one of 576 outputs), in bits per
weight: list 0.42 to 0.52, slots for the largest count 0.9 to 6.6, (row, column, value) 0.60 to 0.74.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor
from jquant.formats.uniform import ScaleDtype
from jquant.numerics import pack, unpack
from jquant.types import DType, Leaf, compute_dtype

MAX_INPUTS: Final = 2**16 - 1  # rows and counts of outliers are uint16


@dataclass(frozen=True)
class SpqrFormat:
    """The static description of SpQR's weights; the paper's configuration for 4 bits per weight is the default.

    Attributes:
      bits: bits of one code, 1 to 8.
      group_size: inputs that share a scale and a zero; at least 2.
      scale_bits: bits of a scale's code; None keeps scales as numbers.
      zero_bits: likewise for zeros.
      second_group_size: neighbouring outputs whose scales, and whose zeros, share a grid.
      dtype: how numbers are stored: the statistics' steps and bases, and outliers.
    """

    bits: int = 3
    group_size: int = 16
    scale_bits: int | None = 3
    zero_bits: int | None = 3
    second_group_size: int = 16
    dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Refuses widths and sizes that cannot be."""
        for name in ("bits", "scale_bits", "zero_bits"):
            width = getattr(self, name)
            if not (1 <= width <= 8 if width is not None else name != "bits"):
                raise FormatError(f"{name}={width}: give 1 to 8{'' if name == 'bits' else ', or null for numbers'}")
        if self.group_size < 2 or self.second_group_size < 1:
            raise FormatError(
                f"group_size={self.group_size}, second_group_size={self.second_group_size}: give at least 2 and 1"
            )

    def groups(self, shape: tuple[int, ...]) -> int:
        """Returns how many groups the inputs of an (in, out) matrix make.

        Raises:
          FormatError: the groups do not divide the shape, or it has more inputs than a row number can name.
        """
        inputs, outputs = shape
        if inputs % self.group_size or outputs % self.second_group_size:
            raise FormatError(
                f"group_size {self.group_size} must divide {inputs} inputs, and second_group_size "
                f"{self.second_group_size} must divide {outputs} outputs; sizes such as 8, 16 or 32 mostly do"
            )
        if inputs > MAX_INPUTS:
            raise FormatError(f"{inputs} inputs: outliers name their row in 16 bits, at most {MAX_INPUTS}")
        return inputs // self.group_size


@struct.dataclass
class QuantizedStatistic:
    """One statistic of all groups: value[g, o] = bases[g, o // n] + steps[g, o // n] * codes[g, o].

    Attributes:
      codes: uint8 [ceil(groups * bits / 8), out], packed along the groups.
      steps: [groups, out / n].
      bases: [groups, out / n].
      bits: bits of one code.
    """

    codes: Leaf
    steps: Leaf
    bases: Leaf
    bits: int = struct.field(pytree_node=False)

    def values(self, dtype: DType) -> Float[Array, "groups out"]:
        """Returns the statistic that the codes stand for, computed in `dtype`."""
        codes = unpack(self.codes, self.bits, self.steps.shape[0]).astype(dtype)
        shared = codes.shape[1] // self.steps.shape[1]
        steps, bases = (jnp.repeat(leaf.astype(dtype), shared, axis=1) for leaf in (self.steps, self.bases))
        return bases + steps * codes


@struct.dataclass
class Outliers:
    """A list of weights sorted by output, then row; room at its end may be empty.

    Attributes:
      rows: uint16 [room, 1], the input of each.
      values: [room, 1], the weight of each.
      counts: uint16 [1, out], how many each output has.
      firsts: int32 [1, out / n], where in the list the outliers of each run of n outputs begin.
    """

    rows: Leaf
    values: Leaf
    counts: Leaf
    firsts: Leaf

    def locate(self, room: int) -> tuple[Int[Array, "{room}"], Int[Array, "{room}"]]:
        """Returns, for each outlier of these outputs, its place in the list and its output.

        Beyond the last outlier the output is `out`, an index that no output has.
        """
        counts = self.counts[0].astype(jnp.int32)
        runs = counts.reshape(self.firsts.shape[-1], -1)
        starts = (self.firsts[0][:, None] + jnp.cumsum(runs, axis=1, dtype=jnp.int32) - runs).reshape(-1)
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        outputs = jnp.repeat(jnp.arange(counts.shape[0], dtype=jnp.int32), counts, total_repeat_length=room)
        numbers = jnp.arange(room, dtype=jnp.int32)
        real = numbers < ends[-1]
        places = starts[outputs] + numbers - (ends - counts)[outputs]
        return jnp.where(real, places, 0), jnp.where(real, outputs, counts.shape[0])


@final
@struct.dataclass
class SpqrTensor(QuantizedTensor):
    """Grouped codes under quantized statistics, and a list of outliers that replace what the codes say.

    Attributes:
      codes: uint8 [ceil(in * bits / 8), out], a dense bit stream along the inputs; an outlier's code is that of 0.
      scales: a `QuantizedStatistic`, or numbers [in / g, out] if the format has no `scale_bits`.
      zeros: likewise.
      outliers: the list; None if there are none.
      format: the static description.
      shape: (in, out).
    """

    codes: Leaf
    scales: QuantizedStatistic | Leaf
    zeros: QuantizedStatistic | Leaf
    outliers: Outliers | None
    format: SpqrFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns the weight, computed in float32 and rounded once to `dtype`; outliers are exact if it holds them."""
        compute = compute_dtype(dtype)
        scales, zeros = (_values_of(statistic, compute)[:, None, :] for statistic in (self.scales, self.zeros))
        codes = unpack(self.codes, self.format.bits, self.shape[0]).astype(compute)
        codes = codes.reshape(scales.shape[0], -1, codes.shape[1])
        weight = (scales * (codes - zeros)).reshape(self.shape[0], -1).astype(dtype)
        if self.outliers is None:
            return weight
        places, outputs = self.outliers.locate(self.outliers.rows.shape[0])
        rows, values = self.outliers.rows[places, 0], self.outliers.values[places, 0]
        return weight.at[rows, outputs].set(values.astype(compute).astype(dtype), mode="drop")

    def compact(self) -> "SpqrTensor":
        """Returns the same weight with no empty room in its list of outliers. For concrete arrays, not under jit.

        Lists are put on the device as they are: `jnp.asarray` would compile a program for each new length.
        """
        if self.outliers is None:
            return self
        given = self.outliers
        rows, values, counts, firsts = map(np.asarray, (given.rows, given.values, given.counts, given.firsts))
        runs = counts.astype(np.int64).reshape(firsts.shape[-1], -1)
        total = int(runs.sum())
        if total == 0:
            return dataclasses.replace(self, outliers=None)
        first_of_output = (firsts[0][:, None] + np.cumsum(runs, axis=1) - runs).reshape(-1)
        new_first_of_output = np.cumsum(runs).reshape(-1) - runs.reshape(-1)
        places = np.arange(total) + np.repeat(first_of_output - new_first_of_output, runs.reshape(-1))
        new_firsts = np.cumsum(runs.sum(axis=1)) - runs.sum(axis=1)
        outliers = Outliers(
            rows=jax.device_put(rows[places]),
            values=jax.device_put(values[places]),
            counts=given.counts,
            firsts=jax.device_put(new_firsts[None, :].astype(np.int32)),
        )
        return dataclasses.replace(self, outliers=outliers)

    def with_room(self, room: int) -> "SpqrTensor":
        """Returns the same weight with a list of `room` outliers, at least as long as the one it has."""
        listed = self.outliers or _empty_list(self.shape[1], self.format)
        wider = ((0, room - listed.rows.shape[0]), (0, 0))
        longer = dataclasses.replace(listed, rows=jnp.pad(listed.rows, wider), values=jnp.pad(listed.values, wider))
        return dataclasses.replace(self, outliers=longer)


class StatisticCodes(NamedTuple):
    """A statistic before packing: codes [groups, out], steps and bases [groups, out / n]."""

    codes: UInt8[Array, "*groups out"]
    steps: Float[Array, "*groups runs"]
    bases: Float[Array, "*groups runs"]


def quantize_spqr(
    codes: UInt8[Array, "in out"],
    scales: StatisticCodes | Float[Array, "groups out"],
    zeros: StatisticCodes | Float[Array, "groups out"],
    format: SpqrFormat,
    outliers: tuple[Bool[Array, "in out"], Float[Array, "in out"], int] | None = None,
) -> SpqrTensor:
    """Packs codes, statistics and outliers into a tensor; the only constructor that checks.

    Args:
      codes: one code for each weight, 0 to 2^bits - 1.
      scales: codes of the scales, or the scales if `format.scale_bits` is None.
      zeros: likewise.
      format: the static description.
      outliers: which weights are outliers, their values, and how many the list has room for (static, so that this runs
        under jit; `compact` gives unused room back). More outliers than room make every stored value NaN.

    Returns:
      The packed tensor of shape (in, out).

    Raises:
      FormatError: a group size does not divide the shape, or the statistics do not fit the format.

    Example:
      >>> codes, one = jnp.array([[7], [0]], jnp.uint8), jnp.ones((1, 1))
      >>> format = SpqrFormat(group_size=2, scale_bits=None, zero_bits=None, second_group_size=1)
      >>> mask, values = jnp.array([[False], [True]]), jnp.array([[0.0], [9.5]])
      >>> quantize_spqr(codes, 0.5 * one, 3.0 * one, format, (mask, values, 1)).dequantize().ravel().tolist()
      [2.0, 9.5]
    """
    groups = format.groups(codes.shape)
    return SpqrTensor(
        codes=pack(codes, format.bits),
        scales=_statistic(scales, format.scale_bits, groups, format),
        zeros=_statistic(zeros, format.zero_bits, groups, format),
        outliers=None if outliers is None else _list_outliers(*outliers, format),
        format=format,
        shape=(codes.shape[0], codes.shape[1]),
    )


def compact_outliers[T](tree: T) -> T:
    """Compacts every `SpqrTensor` of a tree; everything else stays. For concrete arrays, not under jit."""

    def shrink(node: Any) -> Any:
        return node.compact() if isinstance(node, SpqrTensor) else node

    compacted: T = jax.tree.map(shrink, tree, is_leaf=_is_spqr)
    return compacted


def align_outliers[T](trees: Sequence[T]) -> list[T]:
    """Gives the `SpqrTensor`s that stand at the same place in several trees equally long lists of outliers.

    Trees that agree in all else then agree in structure and shapes, so that they can be stacked.
    """
    flat = [jax.tree.flatten(tree, is_leaf=_is_spqr) for tree in trees]
    if len({len(leaves) for leaves, _ in flat}) != 1:
        return list(trees)
    columns = [_align(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
    return [
        jax.tree.unflatten(structure, row) for (_, structure), row in zip(flat, zip(*columns, strict=True), strict=True)
    ]


def _align(nodes: tuple[Any, ...]) -> tuple[Any, ...]:
    rooms = {node.outliers.rows.shape[0] if node.outliers else 0 for node in nodes if isinstance(node, SpqrTensor)}
    if len(rooms) < 2 or not all(map(_is_spqr, nodes)):
        return nodes
    return tuple(node.with_room(max(rooms)) for node in nodes)


def _is_spqr(node: object) -> bool:
    return isinstance(node, SpqrTensor)


def _values_of(statistic: QuantizedStatistic | Leaf, dtype: DType) -> Float[Array, "groups out"]:
    return statistic.values(dtype) if isinstance(statistic, QuantizedStatistic) else statistic.astype(dtype)


def _statistic(
    given: StatisticCodes | Float[Array, "groups out"], bits: int | None, groups: int, format: SpqrFormat
) -> QuantizedStatistic | Leaf:
    if isinstance(given, StatisticCodes) != (bits is not None):
        raise FormatError(f"a statistic of {bits} bits: give codes if it has bits, numbers if it has none")
    if not isinstance(given, StatisticCodes) or bits is None:
        numbers = jnp.asarray(given)
        if numbers.shape[0] != groups:
            raise FormatError(f"{numbers.shape[0]} groups of numbers for {groups} groups of codes")
        return numbers.astype(format.dtype)
    grids = (groups, given.codes.shape[1] // format.second_group_size)
    if given.codes.shape[0] != groups or given.steps.shape != grids or given.bases.shape != grids:
        raise FormatError(f"codes {given.codes.shape} of a statistic with grids {given.steps.shape}: give {grids}")
    return QuantizedStatistic(
        codes=pack(given.codes, bits),
        steps=given.steps.astype(format.dtype),
        bases=given.bases.astype(format.dtype),
        bits=bits,
    )


def _list_outliers(
    mask: Bool[Array, "in out"], values: Float[Array, "in out"], room: int, format: SpqrFormat
) -> Outliers:
    inputs, outputs = mask.shape
    counts = mask.sum(axis=0, dtype=jnp.int32)
    (flat,) = jnp.nonzero(mask.T.reshape(-1), size=room, fill_value=0)
    listed = jnp.where(counts.sum() <= room, values.T.reshape(-1)[flat], jnp.nan)
    runs = _runs(outputs, format)
    ends = jnp.cumsum(counts.reshape(runs, -1).sum(axis=1))
    return Outliers(
        rows=(flat % inputs).astype(jnp.uint16)[:, None],
        values=listed.astype(format.dtype)[:, None],
        counts=counts.astype(jnp.uint16)[None, :],
        firsts=jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1].astype(jnp.int32)])[None, :],
    )


def _empty_list(outputs: int, format: SpqrFormat) -> Outliers:
    nothing = (0, 1)
    return Outliers(
        rows=jnp.zeros(nothing, jnp.uint16),
        values=jnp.zeros(nothing, format.dtype),
        counts=jnp.zeros((1, outputs), jnp.uint16),
        firsts=jnp.zeros((1, _runs(outputs, format)), jnp.int32),
    )


def _runs(outputs: int, format: SpqrFormat) -> int:
    """Returns how many runs of outputs the list notes the beginnings of.

    An entry that all outputs share may be cut anywhere (`split_outputs`), a run may not: so never a single run.
    """
    runs = outputs // format.second_group_size
    return outputs if runs == 1 else runs
