"""Rotated tensors: a weight kept in a random orthogonal basis of its inputs and outputs, of which a seed is stored.

    w = diag(scales) V^T W' U,        x w = (((x diag(scales)) V^T) W') U

with W' the inner tensor and V [in, in], U [out, out] as `numerics.random_rotation` makes them. In the second form an
activation costs O(in (p + q) + out (r + s)) beside the inner product, where in = p q and out = r s, and no matrix of
order `in` or `out` exists. The paper of QuIP (arXiv:2307.13304) writes U and V for our U and V, D for 1 / scales.
"""

from typing import ClassVar, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt32

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor
from jquant.formats.sharded import ShardedTensor
from jquant.numerics import Rotation, Transform, random_rotation, rotate, rotate_back
from jquant.types import DType, Leaf, compute_dtype


@final
@struct.dataclass
class RotatedTensor(QuantizedTensor):
    """w = diag(scales) V^T W' U.

    Attributes:
      inner: W', the tensor in the rotated basis.
      scales: [in, 1], what each input is multiplied by; 0 for an input that has no weight.
      seed: uint32 [1, 1], which determines V and U. A leaf, so that stacked layers share one structure.
      transform: the kind of V and U.
      shape: (in, out).
    """

    mixes_outputs: ClassVar[bool] = True

    inner: QuantizedTensor | ShardedTensor
    scales: Leaf
    seed: Leaf
    transform: Transform = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns the weight in the model's basis, computed in float32 and rounded once to `dtype`."""
        compute = compute_dtype(dtype)
        inputs, outputs = draw_rotations(self.seed[0, 0], self.shape, self.transform, compute)
        assert isinstance(self.inner, QuantizedTensor), "a part of a weight is multiplied, never brought back"
        weight = rotate_back(outputs, self.inner.dequantize(compute))
        weight = rotate_back(inputs, weight.T).T
        return (self.scales.astype(compute) * weight).astype(dtype)

    def rotate_inputs(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """Returns V (scales * x), what the inner tensor multiplies, in the dtype of `x`."""
        compute = compute_dtype(x.dtype)
        rotation, _ = draw_rotations(self.seed[0, 0], self.shape, self.transform, compute)
        scales = self.scales[:, 0].astype(compute)
        return rotate(rotation, x.astype(compute) * jnp.broadcast_to(scales, x.shape)).astype(x.dtype)

    def rotate_outputs(self, y: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
        """Returns U^T y, the product in the model's basis, in the dtype of `y`."""
        _, rotation = draw_rotations(self.seed[0, 0], self.shape, self.transform, compute_dtype(y.dtype))
        return rotate_back(rotation, y).astype(y.dtype)


def rotated(
    inner: QuantizedTensor, scales: Float[Array, "in"], seed: UInt32[Array, ""], transform: Transform
) -> RotatedTensor:
    """Wraps a tensor of the rotated basis; the only constructor that checks.

    Args:
      inner: W'.
      scales: what each input is multiplied by, in the dtype in which it is stored.
      seed: what V and U were drawn from.
      transform: their kind.

    Raises:
      FormatError: there is not one scale for each input.
    """
    if scales.shape != (inner.shape[0],):
        raise FormatError(f"scales of shape {scales.shape} for a tensor of shape {inner.shape}: give one an input")
    return RotatedTensor(
        inner=inner, scales=scales[:, None], seed=seed[None, None], transform=transform, shape=inner.shape
    )


def draw_rotations(
    seed: UInt32[Array, ""], shape: tuple[int, int], transform: Transform, dtype: DType
) -> tuple[Rotation, Rotation]:
    """Returns V and U, the transforms of the inputs and of the outputs of a tensor of some shape."""
    inputs, outputs = shape
    return random_rotation(seed, inputs, transform, dtype), random_rotation(~seed, outputs, transform, dtype)
