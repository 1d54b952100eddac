"""Centered grids: w = scale * (codes - (2^bits - 1) / 2), levels in even steps on both sides of zero and none at it.

The grid of QuIP's incoherent matrices, whose weights all have one spread: one scale serves the whole matrix
(spec_weights.md section 5.2, "qfn b"; arXiv:2307.13304).
"""

from typing import final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor
from jquant.numerics import pack, unpack
from jquant.types import Leaf, compute_dtype


@final
@struct.dataclass
class CenteredTensor(QuantizedTensor):
    """w[i, o] = scale * (codes[i, o] - (2^bits - 1) / 2).

    Attributes:
      codes: uint8 [ceil(in * bits / 8), out], a dense little-endian bit stream along the inputs.
      scale: float32 [1, 1], the step between levels.
      bits: bits of one code, 1 to 8.
      shape: (in, out).
    """

    codes: Leaf
    scale: Leaf
    bits: int = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scale * (codes - (2^bits - 1) / 2), computed in float32 and rounded once to `dtype`."""
        compute = compute_dtype(dtype)
        codes = unpack(self.codes, self.bits, self.shape[0]).astype(compute)
        return (self.scale.astype(compute) * (codes - (2**self.bits - 1) / 2)).astype(dtype)


def quantize_centered(codes: UInt8[Array, "in out"], scale: Float[Array, ""], bits: int) -> CenteredTensor:
    """Packs codes on one centered grid; the only constructor that checks.

    Args:
      codes: one code for each weight, 0 to 2^bits - 1.
      scale: the step between levels, stored in float32.
      bits: bits of one code.

    Returns:
      The packed tensor of shape (in, out).

    Raises:
      FormatError: no code has that many bits.

    Example:
      >>> codes = jnp.array([[0, 1], [2, 3]], jnp.uint8)
      >>> quantize_centered(codes, jnp.float32(2), bits=2).dequantize().tolist()
      [[-3.0, -1.0], [1.0, 3.0]]
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"bits={bits} for a centered grid: give 1 to 8")
    inputs, outputs = codes.shape
    return CenteredTensor(
        codes=pack(codes, bits), scale=scale.astype(jnp.float32)[None, None], bits=bits, shape=(inputs, outputs)
    )
