"""Uniform grids: w = scales * (codes - zeros), with one scale (and zero) for each group of inputs and each output.

The format of RTN, GPTQ, AWQ, SmoothQuant, LLM.int8(), ZeroQuant and QuaRot weights (spec_weights.md section 2).
"""

from dataclasses import dataclass
from typing import Literal, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from jquant.errors import FormatError
from jquant.formats.base import Layout, QuantizedTensor
from jquant.numerics import Symmetry, pack, unpack
from jquant.types import Leaf, compute_dtype

type ScaleDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class UniformFormat:
    """The static description of a uniform grid.

    Attributes:
      bits: bits of one code, 1 to 8.
      group_size: inputs that share a scale; None for one group over the whole input axis ("per channel").
      symmetry: how the range is chosen: "asymmetric" (zero point stored), "symmetric" (absmax over the restricted
        grid 2^(bits-1) - 1), "symmetric_full" (2 * absmax over 2^bits - 1) or "symmetric_signed" (absmax over
        2^(bits-1): the largest positive weight is clipped).
      scale_dtype: how scales are stored. Codes are computed from the stored scale, so nothing is lost twice.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetry: Symmetry = "asymmetric"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Refuses widths that no uniform grid here can have."""
        if not 1 <= self.bits <= 8 or (self.bits == 1 and self.symmetry == "symmetric"):
            raise FormatError(f"bits={self.bits} with symmetry={self.symmetry!r}: give 1 to 8 (2 to 8 if symmetric)")
        if self.group_size is not None and self.group_size < 1:
            raise FormatError(f"group_size={self.group_size}: give a positive size, or null for per channel")

    def groups(self, inputs: int) -> int:
        """Returns how many groups `inputs` features make.

        Raises:
          FormatError: the group size does not divide the inputs.
        """
        if self.group_size is None:
            return 1
        if inputs % self.group_size:
            near = [size for size in (16, 32, 64, 96, 128, 192, 256) if inputs % size == 0]
            hint = f"sizes that do: {', '.join(map(str, near))}, or null" if near else "use null (per channel)"
            raise FormatError(f"group_size {self.group_size} does not divide {inputs} inputs; {hint}")
        return inputs // self.group_size


@final
@struct.dataclass
class UniformTensor(QuantizedTensor):
    """w[i, o] = scales[i // g, o] * (codes[i, o] - zeros[i // g, o]), g the group size.

    Attributes:
      codes: uint8 [ceil(in * bits / 8), out], a dense little-endian bit stream along the inputs.
      scales: `scale_dtype` [in / g, out].
      zeros: uint8 [ceil(groups * bits / 8), out], packed as the codes are; None when symmetric, where every zero
        is 2^(bits-1).
      format: the static description.
      shape: (in, out).
      layout: PORTABLE; what `prepare` makes of such a tensor are nodes of their own (`prepared.py`).
    """

    codes: Leaf
    scales: Leaf
    zeros: Leaf | None
    format: UniformFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False, default=Layout.PORTABLE)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scales * (codes - zeros), computed in float32 and rounded once to `dtype`."""
        inputs, bits = self.shape[0], self.format.bits
        groups = self.format.groups(inputs)
        compute = compute_dtype(dtype)
        scales = self.scales.astype(compute)[:, None, :]
        if self.zeros is None:
            zeros = jnp.full_like(scales, 2 ** (bits - 1))
        else:
            zeros = unpack(self.zeros, bits, groups).astype(compute)[:, None, :]
        codes = unpack(self.codes, bits, inputs).astype(compute).reshape(groups, inputs // groups, -1)
        return (scales * (codes - zeros)).reshape(inputs, -1).astype(dtype)


def quantize_uniform(
    codes: UInt8[Array, "in out"],
    scales: Float[Array, "groups out"],
    zeros: Float[Array, "groups out"],
    format: UniformFormat,
) -> UniformTensor:
    """Packs codes and their grids into a tensor; the only constructor that checks.

    Args:
      codes: one code for each weight, 0 to 2^bits - 1.
      scales: the grids' steps, in the weight's unit; stored as `format.scale_dtype`.
      zeros: the codes that stand for 0, whole numbers from 0 to 2^bits - 1; not stored when symmetric.
      format: the static description.

    Returns:
      The packed tensor of shape (in, out).

    Raises:
      FormatError: the group size does not divide the inputs, or the grids' shape does not match.

    Example:
      >>> codes = jnp.array([[15], [9], [0], [10]], jnp.uint8)
      >>> one = jnp.ones((1, 1))
      >>> tensor = quantize_uniform(codes, 0.5 * one, 7 * one, UniformFormat(bits=4, group_size=None))
      >>> tensor.dequantize().ravel().tolist()
      [4.0, 1.0, -3.5, 1.5]
    """
    inputs, outputs = codes.shape
    expected = (format.groups(inputs), outputs)
    if scales.shape != expected or zeros.shape != expected:
        raise FormatError(f"grids of shape {scales.shape} and {zeros.shape} for codes {codes.shape}: give {expected}")
    packed_zeros = pack(zeros.astype(jnp.uint8), format.bits) if format.symmetry == "asymmetric" else None
    return UniformTensor(
        codes=pack(codes, format.bits),
        scales=scales.astype(format.scale_dtype),
        zeros=packed_zeros,
        format=format,
        shape=(inputs, outputs),
    )
