"""Binary codes: w = offset + sum_k alpha_k b_k with b_k = -1 or +1, alphas and offset shared by a group of inputs.

The format of BCQ and LUT-GEMM (Park et al. 2022, arXiv:2206.09557; spec_weights.md section 7). A uniform grid is the
case alpha_k = s 2^k / 2, so every uniform tensor has an exact image here.
"""

from dataclasses import dataclass
from typing import Final, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor
from jquant.formats.uniform import ScaleDtype, UniformFormat, UniformTensor
from jquant.numerics import pack, unpack
from jquant.types import Leaf, compute_dtype

MAX_BITS: Final = 8  # binary codes of one weight: those of a uniform tensor at most


@dataclass(frozen=True)
class BinaryFormat:
    """The static description of binary codes.

    Attributes:
      bits: signs that one weight has, 1 to 8.
      group_size: inputs that share alphas; None for one group over the whole input axis ("per channel").
      scale_dtype: how alphas and offsets are stored. Signs are chosen for the stored alphas.
    """

    bits: int = 4
    group_size: int | None = 128
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Refuses widths that no binary code here can have."""
        if not 1 <= self.bits <= MAX_BITS:
            raise FormatError(f"bits={self.bits}: a binary code has 1 to {MAX_BITS}")
        if self.group_size is not None and self.group_size < 1:
            raise FormatError(f"group_size={self.group_size}: give a positive size, or null for per channel")

    def groups(self, inputs: int) -> int:
        """Returns how many groups `inputs` features make.

        Raises:
          FormatError: the group size does not divide the inputs.
        """
        return UniformFormat(self.bits, self.group_size).groups(inputs)


@final
@struct.dataclass
class BinaryTensor(QuantizedTensor):
    """w[i, o] = offsets[i // g, o] + sum_k alphas[k, i // g, o] * b[k, i, o], g the group size.

    Attributes:
      signs: uint8 [bits, ceil(in / 8), out], one bit for each b: 1 stands for +1; bit j of byte t is input 8 t + j.
      alphas: `scale_dtype` [bits, groups, out].
      offsets: `scale_dtype` [groups, out]; None where all are zero, as BCQ fits them.
      format: the static description.
      shape: (in, out).
    """

    signs: Leaf
    alphas: Leaf
    offsets: Leaf | None
    format: BinaryFormat = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns offset + sum_k +-alpha_k, summed in float32 in the order of k and rounded once to `dtype`."""
        inputs, compute = self.shape[0], compute_dtype(dtype)
        groups = self.format.groups(inputs)
        alphas = self.alphas.astype(compute)
        weight = jnp.zeros((), compute) if self.offsets is None else self.offsets.astype(compute)[:, None, :]
        for bit in range(self.format.bits):
            positive = unpack(self.signs[bit], 1, inputs).reshape(groups, inputs // groups, -1) == 1
            weight = weight + jnp.where(positive, alphas[bit][:, None, :], -alphas[bit][:, None, :])
        return weight.reshape(inputs, -1).astype(dtype)


def quantize_binary(
    codes: UInt8[Array, "in out"],
    alphas: Float[Array, "bits groups out"],
    offsets: Float[Array, "groups out"] | None,
    format: BinaryFormat,
) -> BinaryTensor:
    """Packs signs and their alphas into a tensor; the only constructor that checks.

    Args:
      codes: the signs of each weight: bit k is 1 where b_k = +1.
      alphas: what each sign is multiplied by; stored as `format.scale_dtype`.
      offsets: what is added to each group; None for nothing.
      format: the static description.

    Returns:
      The packed tensor of shape (in, out).

    Raises:
      FormatError: the group size does not divide the inputs, or alphas or offsets have another shape.

    Example:
      >>> codes = jnp.array([[0b11], [0b01], [0b00]], jnp.uint8)
      >>> alphas = jnp.array([[[1.0]], [[0.25]]])
      >>> quantize_binary(codes, alphas, None, BinaryFormat(2, None)).dequantize().ravel().tolist()
      [1.25, 0.75, -1.25]
    """
    inputs, outputs = codes.shape
    grid = (format.groups(inputs), outputs)
    if alphas.shape != (format.bits, *grid) or (offsets is not None and offsets.shape != grid):
        given = f"alphas of {alphas.shape}" + ("" if offsets is None else f" and offsets of {offsets.shape}")
        raise FormatError(f"{given} for codes {codes.shape}: give {(format.bits, *grid)} and {grid}")
    planes = jnp.arange(format.bits, dtype=jnp.uint8)[:, None, None]
    return BinaryTensor(
        signs=pack((codes[None] >> planes) & jnp.uint8(1), 1),
        alphas=alphas.astype(format.scale_dtype),
        offsets=None if offsets is None else offsets.astype(format.scale_dtype),
        format=format,
        shape=(inputs, outputs),
    )


def binary_from_uniform(tensor: UniformTensor, scale_dtype: ScaleDtype = "float32") -> BinaryTensor:
    """Returns the image of a uniform tensor: alpha_k = s 2^k / 2 and offset = s (2^bits - 1) / 2 - s z.

    With q = sum_k 2^k c_k and b_k = 2 c_k - 1, s (q - z) = offset + sum_k alpha_k b_k.

    Args:
      tensor: the uniform tensor.
      scale_dtype: how alphas and offsets are stored. In float32 the image of float16 and bfloat16 scales has the same
        weights bit for bit, that of float32 scales up to rounding.

    Returns:
      A tensor with offsets, and with the bits, groups and shape of the uniform one.

    Reference: arXiv:2206.09557, appendix on uniform quantization.
    """
    bits, inputs = tensor.format.bits, tensor.shape[0]
    groups = tensor.format.groups(inputs)
    scales = tensor.scales.astype(jnp.float32)
    centre = jnp.float32((2**bits - 1) / 2)
    if tensor.zeros is None:
        zeros = jnp.full_like(scales, 2 ** (bits - 1))
    else:
        zeros = unpack(tensor.zeros, bits, groups).astype(jnp.float32)
    halves = jnp.asarray([2**bit / 2 for bit in range(bits)], jnp.float32)
    return quantize_binary(
        unpack(tensor.codes, bits, inputs),
        halves[:, None, None] * scales[None],
        scales * (centre - zeros),
        BinaryFormat(bits, tensor.format.group_size, scale_dtype),
    )
