"""Razored integers: w = scales * (codes << shifts), signed codes of few bits and one shift for each group.

The format of QRazor (arXiv:2501.13331): weights are integers of `base_bits` on one scale, cut to `bits` bits in groups
that drop the same low bits (jquant/numerics/razor.py). A weight takes bits + shift bits / group_size bits and its share
of the scale: 4 + 3/g for 8 to 4.
"""

from dataclasses import dataclass
from typing import Literal, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8, UInt8

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor
from jquant.formats.uniform import ScaleDtype
from jquant.numerics import pack, shift_bits, unpack, unrazor
from jquant.types import Leaf, compute_dtype


@dataclass(frozen=True)
class RazoredFormat:
    """The static description of razored integers.

    Attributes:
      base_bits: bits of the integers before razoring, sign included, 2 to 16.
      bits: bits that are kept, sign included, 2 to 8.
      group_size: neighbours that share a shift.
      axis: where these neighbours lie: "in", inputs of one output, or "out", outputs of one input, as GPTQ needs it,
        which rounds one input at a time.
      scale_group_size: inputs that share a scale; None for one scale for each output.
      scale_dtype: how scales are stored. Integers are computed from the stored scale, so nothing is lost twice.
    """

    base_bits: int = 8
    bits: int = 4
    group_size: int = 8
    axis: Literal["in", "out"] = "in"
    scale_group_size: int | None = None
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Refuses widths and groups that cannot be."""
        if not 2 <= self.bits <= min(8, self.base_bits) or self.base_bits > 16:
            raise FormatError(
                f"bits={self.bits} of base_bits={self.base_bits}: give a base of at most 16 bits, and 2 to 8 bits of it"
            )
        if self.group_size < 1 or (self.scale_group_size is not None and self.scale_group_size < 1):
            raise FormatError(
                f"group_size={self.group_size}, scale_group_size={self.scale_group_size}: give positive sizes "
                "(null for one scale for each output)"
            )

    def check(self, shape: tuple[int, int]) -> None:
        """Refuses a matrix whose axes the groups do not divide.

        Raises:
          FormatError: they do not.
        """
        size = shape[0 if self.axis == "in" else 1]
        if size % self.group_size:
            near = [group for group in (8, 16, 32, 64, 128) if size % group == 0]
            hint = f"; sizes that do: {', '.join(map(str, near))}" if near else ""
            raise FormatError(f"group_size {self.group_size} does not divide {size} {self.axis}puts{hint}")
        if shape[0] % (self.scale_group_size or 1):
            raise FormatError(
                f"scale_group_size {self.scale_group_size} does not divide {shape[0]} inputs; give one that does, or "
                "null for one scale for each output"
            )

    def shifts_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the shape of the shifts of an (in, out) matrix."""
        inputs, outputs = shape
        along = self.axis == "in"
        return (inputs // self.group_size, outputs) if along else (inputs, outputs // self.group_size)

    def scale_groups(self, inputs: int) -> int:
        """Returns how many scales an output has."""
        return 1 if self.scale_group_size is None else inputs // self.scale_group_size


@final
@struct.dataclass
class RazoredTensor(QuantizedTensor):
    """w[i, o] = scales[i // s, o] * (codes[i, o] << shifts[i // g, o]), or shifts[i, o // g] with groups of outputs.

    Attributes:
      codes: uint8 [ceil(in * bits / 8), out], two's complement, a dense little-endian bit stream along the inputs.
      shifts: uint8 [ceil(in / g * 3 / 8), out], packed likewise; [ceil(in * 3 / 8), out / g] with groups of outputs.
        3 is for 8 to 4 bits, see `shift_bits`.
      scales: `scale_dtype` [in / s, out].
      format: the static description.
      shape: (in, out).
    """

    codes: Leaf
    shifts: Leaf
    scales: Leaf
    format: RazoredFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scales * (codes << shifts), computed in float32 and rounded once to `dtype`."""
        inputs, outputs = self.shape
        compute = compute_dtype(dtype)
        width, rows = shift_bits(self.format.base_bits, self.format.bits), self.format.shifts_shape(self.shape)[0]
        sign = 2 ** (self.format.bits - 1)
        codes = (unpack(self.codes, self.format.bits, inputs).astype(jnp.int32) ^ sign) - sign
        shifts = unpack(self.shifts, width, rows)
        integers = unrazor(codes.astype(jnp.int8), shifts, axis=0 if self.format.axis == "in" else 1)
        grouped = integers.astype(compute).reshape(self.format.scale_groups(inputs), -1, outputs)
        return (self.scales.astype(compute)[:, None, :] * grouped).reshape(inputs, outputs).astype(dtype)


def quantize_razored(
    codes: Int8[Array, "in out"],
    shifts: UInt8[Array, "shift_rows shift_columns"],
    scales: Float[Array, "scale_groups out"],
    format: RazoredFormat,
) -> RazoredTensor:
    """Packs razored codes into a tensor; the only constructor that checks.

    Args:
      codes: signed codes, -2^(bits-1) to 2^(bits-1) - 1.
      shifts: the bits that each group dropped; [in / g, out], or [in, out / g] with groups of outputs.
      scales: the integers' step, in the weight's unit; stored as `format.scale_dtype`.
      format: the static description.

    Returns:
      The packed tensor of shape (in, out).

    Raises:
      FormatError: a group size does not divide its axis, or the shape of shifts or scales does not match.

    Example:
      >>> codes, shifts = jnp.array([[4], [-8]], jnp.int8), jnp.array([[1]], jnp.uint8)
      >>> tensor = quantize_razored(codes, shifts, 0.5 * jnp.ones((1, 1)), RazoredFormat(group_size=2))
      >>> tensor.dequantize().ravel().tolist()
      [4.0, -8.0]
    """
    inputs, outputs = codes.shape
    format.check((inputs, outputs))
    given = shifts.shape, scales.shape
    expected = format.shifts_shape((inputs, outputs)), (format.scale_groups(inputs), outputs)
    if given != expected:
        raise FormatError(f"shifts and scales of shapes {given} for codes {codes.shape}: give {expected}")
    return RazoredTensor(
        codes=pack(codes, format.bits),
        shifts=pack(shifts, shift_bits(format.base_bits, format.bits)),
        scales=scales.astype(format.scale_dtype),
        format=format,
        shape=(inputs, outputs),
    )
