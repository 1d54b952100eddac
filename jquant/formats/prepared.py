"""Uniform tensors as the matrix products of `pallas_kernels` read them on a Hopper GPU, made from portable ones.

    float activations     y = x W               codes int4, products bfloat16                         W4A16
    integer activations   y = s (c - z) W       codes int4 or int8, sums int32, scales float32        W4A8, W8A8

                          W[i, o] = scales[i // g, o] * (codes[o, i] - zeros[i // g, o])

Codes lie [out', in'], the inputs contiguous, less 2^(bits - 1) so that they are signed; int4 codes are permuted within
each 32 inputs. in' and out' are in and out, filled up with codes, and groups, that stand for 0. What lies so is neither
cut nor sharded. `restore` gives back every bit of the portable tensor: scales in float32, which the kernels read
rounded to bfloat16, are kept beside.
"""

import math
from typing import Any, Final, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Int8, UInt8

from jquant.errors import FormatError
from jquant.formats.base import Layout, QuantizedTensor
from jquant.formats.uniform import UniformFormat, UniformTensor
from jquant.numerics import pack, unpack
from jquant.types import Leaf, compute_dtype

_MULTIPLE: Final = 64  # of inputs and outputs: what `pallas_kernels.configs.fault` asks for
_INT4_BITS: Final = 4


@final
@struct.dataclass
class PreparedFloatTensor(QuantizedTensor):
    """A weight of at most 4 bits for activations in bfloat16.

    Attributes:
      codes: int4 [out', in'].
      scales: [groups', out'], float16 or bfloat16, as they are stored, or float32 rounded to bfloat16.
      centers: bfloat16 [groups', out'], 136 + zeros as the kernels subtract it; None where all zeros are 0.
      portable_scales: the scales [groups, out] as they were, where those are float32; None where they have 16 bits.
      format: of the portable tensor.
      shape: (in, out).
      layout: whether the kernels run on a GPU or in an interpreter.
    """

    codes: Leaf
    scales: Leaf
    centers: Leaf | None
    portable_scales: Leaf | None
    format: UniformFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scales * (codes - zeros) with the kernels' scales, computed in float32 and rounded once."""
        codes, zeros = self._restored()
        return _dense(codes, self.scales, zeros, self.shape, compute_dtype(dtype)).astype(dtype)

    def restore(self) -> UniformTensor:
        """Returns the portable tensor, every bit as it was."""
        (inputs, outputs), bits = self.shape, self.format.bits
        groups = self.format.groups(inputs)
        codes, zeros = self._restored()
        packed = None
        if zeros is not None:
            packed = pack(_unsigned(zeros[:groups, :outputs], bits), bits)
        scales = self.scales[:groups, :outputs] if self.portable_scales is None else self.portable_scales
        return _portable(codes, scales, packed, self)

    def _restored(self) -> tuple[jax.Array, jax.Array | None]:
        from pallas_kernels import FloatWeight, restore_w4a16

        codes, _, zeros = restore_w4a16(FloatWeight(self.codes, self.scales, self.centers))
        return codes, zeros


@final
@struct.dataclass
class PreparedIntegerTensor(QuantizedTensor):
    """A weight with one scale for each output, for activations in int8.

    Attributes:
      codes: int4 [out', in'] for at most 4 bits without zeros, otherwise int8.
      scales: float32 [1, out'].
      sums: float32 [out'], the sum of each output's weights, by which the tokens' zeros are corrected.
      zeros: float32 [1, out'], whole numbers; None when symmetric.
      format: of the portable tensor.
      shape: (in, out).
      layout: whether the kernels run on a GPU or in an interpreter.
    """

    codes: Leaf
    scales: Leaf
    sums: Leaf
    zeros: Leaf | None
    format: UniformFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns scales * (codes - zeros), computed in float32 and rounded once to `dtype`."""
        return _dense(self._restored(), self.scales, self.zeros, self.shape, compute_dtype(dtype)).astype(dtype)

    def restore(self) -> UniformTensor:
        """Returns the portable tensor, every bit as it was."""
        outputs, bits = self.shape[1], self.format.bits
        packed = None if self.zeros is None else pack(_unsigned(self.zeros[:, :outputs], bits), bits)
        return _portable(self._restored(), self.scales[:, :outputs], packed, self)

    def _restored(self) -> jax.Array:
        from pallas_kernels import IntegerWeight, restore_integer

        return restore_integer(IntegerWeight(self.codes, self.scales, self.sums))[0]


type PreparedTensor = PreparedFloatTensor | PreparedIntegerTensor


def float_fault(format: UniformFormat, shape: tuple[int, int]) -> str | None:
    """Returns why no kernel multiplies float activations by a uniform tensor; None where one does.

    Example:
      >>> float_fault(UniformFormat(4, 64), (576, 192)), float_fault(UniformFormat(8, 64), (576, 192))
      (None, 'weights of 8 bits for float inputs, kernels have 4')
    """
    if format.bits > _INT4_BITS:
        return f"weights of {format.bits} bits for float inputs, kernels have {_INT4_BITS}"
    return _fault("w4a16", format, shape)


def integer_fault(format: UniformFormat, shape: tuple[int, int]) -> str | None:
    """Returns why no kernel multiplies integers by a uniform tensor; None where one does.

    Example:
      >>> integer_fault(UniformFormat(8, None), (172, 100))
      >>> integer_fault(UniformFormat(8, 96), (576, 192))
      '6 groups of inputs, kernels of integers take one scale for each output'
    """
    return _fault(integer_kind(format), format, shape)


def integer_kind(format: UniformFormat) -> Any:
    """Returns the name of the kernels that multiply integers by a uniform tensor: int4 codes are symmetric."""
    return "w4a8" if format.bits <= _INT4_BITS and format.symmetry != "asymmetric" else "w8a8"


def padded_shape(format: UniformFormat, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns (in', out'): what kernels take, and whole groups; the shape itself where nothing need be filled up.

    Example:
      >>> padded_shape(UniformFormat(4, None), (172, 100)), padded_shape(UniformFormat(4, 32), (96, 64))
      ((192, 128), (128, 64))
    """
    inputs, outputs = shape
    whole = _MULTIPLE if format.group_size is None else math.lcm(_MULTIPLE, format.group_size)
    if format.groups(inputs) == 1:  # one group grows with its inputs
        whole = _MULTIPLE
    return -(-inputs // whole) * whole, -(-outputs // _MULTIPLE) * _MULTIPLE


def prepare_float(tensor: UniformTensor, layout: Layout) -> PreparedFloatTensor:
    """Writes a tensor as W4A16 kernels read it.

    Args:
      tensor: portable.
      layout: what it shall have.

    Raises:
      FormatError: no kernel multiplies it: see `float_fault`.

    Example:
      >>> from jquant.formats.uniform import quantize_uniform
      >>> codes, one = jnp.full((64, 64), 9, jnp.uint8), jnp.ones((1, 64))
      >>> tensor = prepare_float(quantize_uniform(codes, one, one, UniformFormat(4, None)), Layout.HOPPER)
      >>> tensor.codes.dtype.name, float(tensor.dequantize()[0, 0])
      ('int4', 8.0)
    """
    from pallas_kernels import prepare_w4a16

    _require(float_fault(tensor.format, tensor.shape), tensor)
    weight = prepare_w4a16(_signed_codes(tensor), _padded_grid(tensor.scales, tensor), _signed_zeros(tensor))
    kept = tensor.scales if tensor.format.scale_dtype == "float32" else None
    return PreparedFloatTensor(*weight, kept, tensor.format, tensor.shape, layout)


def prepare_integer(tensor: UniformTensor, layout: Layout) -> PreparedIntegerTensor:
    """Writes a tensor as W4A8 or W8A8 kernels read it.

    Args:
      tensor: portable.
      layout: what it shall have.

    Raises:
      FormatError: no kernel multiplies it: see `integer_fault`.
    """
    from pallas_kernels import prepare_w4a8, prepare_w8a8

    _require(integer_fault(tensor.format, tensor.shape), tensor)
    codes, scales, zeros = _signed_codes(tensor), _padded_grid(tensor.scales, tensor), _signed_zeros(tensor)
    if integer_kind(tensor.format) == "w4a8":
        weight = prepare_w4a8(codes, scales)
    else:
        if zeros is not None:  # what is filled up stands for 0, in the sums too
            codes = jnp.where(jnp.arange(codes.shape[1])[None] < tensor.shape[0], codes, zeros.T.astype(jnp.int8))
        weight = prepare_w8a8(codes, scales, zeros)
    return PreparedIntegerTensor(*weight, tensor.format, tensor.shape, layout)


def _fault(kind: Any, format: UniformFormat, shape: tuple[int, int]) -> str | None:
    from pallas_kernels.configs import fault

    inputs, outputs = padded_shape(format, shape)
    groups = format.groups(shape[0])
    return fault(kind, outputs, inputs, groups if groups == 1 else groups * inputs // shape[0])


def _require(fault: str | None, tensor: UniformTensor) -> None:
    if fault is not None:
        raise FormatError(f"no kernel multiplies a {tensor.shape} tensor of {tensor.format}: {fault}; keep it portable")


def _signed_codes(tensor: UniformTensor) -> Int8[Array, "tall wide"]:
    """Returns the codes less 2^(bits - 1), [out', in'], filled up with 0."""
    (inputs, outputs), bits = tensor.shape, tensor.format.bits
    wide, tall = padded_shape(tensor.format, tensor.shape)
    codes = (unpack(tensor.codes, bits, inputs).astype(jnp.int16) - 2 ** (bits - 1)).astype(jnp.int8)
    return jnp.pad(codes.T, ((0, tall - outputs), (0, wide - inputs)))


def _signed_zeros(tensor: UniformTensor) -> Float[Array, "more tall"] | None:
    """Returns the zeros less 2^(bits - 1), filled up with 0; None where all are 0."""
    if tensor.zeros is None:
        return None
    bits = tensor.format.bits
    zeros = unpack(tensor.zeros, bits, tensor.format.groups(tensor.shape[0])).astype(jnp.float32)
    return _padded_grid(zeros - 2 ** (bits - 1), tensor)


def _padded_grid(grid: Float[Array, "groups out"], tensor: UniformTensor) -> Float[Array, "more tall"]:
    (inputs, outputs), groups = tensor.shape, grid.shape[0]
    wide, tall = padded_shape(tensor.format, tensor.shape)
    more = 0 if groups == 1 else groups * wide // inputs - groups
    return jnp.pad(grid, ((0, more), (0, tall - outputs)))


def _unsigned(codes: Any, bits: int) -> UInt8[Array, "rows columns"]:
    return (codes.astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint8)


def _portable(
    codes: Int[Array, "tall wide"], scales: Float[Array, "groups out"], zeros: Any, prepared: PreparedTensor
) -> UniformTensor:
    (inputs, outputs), format = prepared.shape, prepared.format
    unsigned = _unsigned(codes[:outputs, :inputs].T, format.bits)
    return UniformTensor(
        codes=pack(unsigned, format.bits),
        scales=scales.astype(format.scale_dtype),
        zeros=zeros,
        format=format,
        shape=prepared.shape,
    )


def _dense(
    codes: Int[Array, "tall wide"],
    scales: Float[Array, "groups tall"],
    zeros: Any,
    shape: tuple[int, int],
    compute: Any,
) -> Float[Array, "in out"]:
    outputs, inputs = codes.shape
    values = codes.T.astype(compute).reshape(scales.shape[0], -1, outputs)
    if zeros is not None:
        values = values - zeros.astype(compute)[:, None, :]
    dense = (scales.astype(compute)[:, None, :] * values).reshape(inputs, outputs)
    return dense[: shape[0], : shape[1]]
