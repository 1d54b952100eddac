"""Uniform weights of 8 bits, one scale an output, as the W8A16 kernel of `pallas_kernels` reads them, and back.

    y = x W      x bfloat16, codes int8, products bfloat16, sums and scales float32

Codes lie [out', in'], the inputs contiguous, less 128, permuted within each 16 inputs; filled up with 0. `restore`
gives back every bit of the portable tensor: float32 holds every stored scale.
"""

from typing import Any, Final, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

from jquant.errors import FormatError
from jquant.formats.base import Layout, QuantizedTensor
from jquant.formats.prepared import padded_shape
from jquant.formats.uniform import UniformFormat, UniformTensor
from jquant.numerics import pack, unpack
from jquant.types import Leaf, compute_dtype

WIDE_BITS: Final = 8


@final
@struct.dataclass
class PreparedWideTensor(QuantizedTensor):
    """A weight of 8 bits for activations in bfloat16.

    Attributes:
      codes: int8 [out', in'].
      scales: float32 [out'].
      format: of the portable tensor.
      shape: (in, out).
      layout: whether the kernel runs on a GPU or in an interpreter.
    """

    codes: Leaf
    scales: Leaf
    format: UniformFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scales * codes, computed in float32 and rounded once to `dtype`."""
        wide = compute_dtype(dtype)
        (inputs, outputs), codes = self.shape, self._restored()
        dense = codes.T.astype(wide) * self.scales.astype(wide)[None]
        return dense[:inputs, :outputs].astype(dtype)

    def restore(self) -> UniformTensor:
        """Returns the portable tensor, every bit as it was."""
        (inputs, outputs), format = self.shape, self.format
        unsigned = (self._restored()[:outputs, :inputs].T.astype(jnp.int16) + 2 ** (WIDE_BITS - 1)).astype(jnp.uint8)
        scales = self.scales[None, :outputs].astype(format.scale_dtype)
        return UniformTensor(pack(unsigned, WIDE_BITS), scales, None, format, self.shape)

    def _restored(self) -> Int8[Array, "tall wide"]:
        from pallas_kernels.wide import WideWeight, restore_w8a16

        return restore_w8a16(WideWeight(self.codes, self.scales))[0]


def wide_fault(format: UniformFormat, shape: tuple[int, int]) -> str | None:
    """Returns why no kernel multiplies float activations by a uniform tensor of 8 bits; None where one does.

    Example:
      >>> wide_fault(UniformFormat(8, None, "symmetric"), (570, 192))
      >>> wide_fault(UniformFormat(8, 64, "symmetric"), (576, 192))
      '9 groups of inputs, kernels of 8 bits take one scale for each output'
    """
    if format.bits != WIDE_BITS:
        return f"weights of {format.bits} bits, this kernel takes {WIDE_BITS}"
    if format.symmetry == "asymmetric":
        return "weights of 8 bits with zeros for float inputs, kernels take symmetric ones"
    if format.groups(shape[0]) != 1:
        return f"{format.groups(shape[0])} groups of inputs, kernels of 8 bits take one scale for each output"
    return None


def prepare_wide(tensor: UniformTensor, layout: Layout) -> PreparedWideTensor:
    """Writes a tensor as the W8A16 kernel reads it.

    Args:
      tensor: portable.
      layout: what it shall have.

    Raises:
      FormatError: no kernel multiplies it: see `wide_fault`.
    """
    from pallas_kernels.wide import prepare_w8a16

    fault = wide_fault(tensor.format, tensor.shape)
    if fault is not None:
        raise FormatError(f"no kernel multiplies a {tensor.shape} tensor of {tensor.format}: {fault}; keep it portable")
    inputs, outputs = tensor.shape
    wide, tall = padded_shape(tensor.format, tensor.shape)
    codes: Any = (unpack(tensor.codes, WIDE_BITS, inputs).astype(jnp.int16) - 2 ** (WIDE_BITS - 1)).astype(jnp.int8)
    codes = jnp.pad(codes.T, ((0, tall - outputs), (0, wide - inputs)))
    scales = jnp.pad(tensor.scales[0].astype(jnp.float32), (0, tall - outputs))
    return PreparedWideTensor(*prepare_w8a16(codes, scales), tensor.format, tensor.shape, layout)
