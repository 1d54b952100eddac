"""Rotations that stay in the forward pass: an orthogonal matrix on activations, whose inverse a weight has absorbed.

    x seen as X [blocks, order, stride],    Y[b, :, s] = O X[b, :, s],    O [order, order] orthogonal

stride 1 mixes neighbours; stride = head_dim mixes the same place of all heads; several blocks share one O. With A the
whole operator, (A x) (A W) = x W for a weight W [in, out] whose input axis went through the same A: no transpose is
ever needed (QuaRot, arXiv:2404.00456, section 3).

O is a Hadamard matrix, multiplied fast, or a fixed dense one. One rule chooses, for every size of every model: the
largest divisor of the size that has a Hadamard construction is the order; where it is below 16, which would hardly
spread anything, O is a dense orthogonal matrix of the whole size, drawn from a seed.
"""

import math
from typing import Final, Literal, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.numerics import base_order, haar_matrix, hadamard_on_host, hadamard_transform
from jquant.types import compute_dtype

type OrthogonalMatrix = Literal["hadamard", "haar"]

SMALLEST_BLOCK: Final = 16  # a block spreads a large value over its own places alone: fewer help little


@final
@struct.dataclass
class OnlineRotation:
    """An orthogonal operator on the last axis of activations; it has no arrays, its static fields are all of it.

    Attributes:
      size: numbers that it acts on, blocks * order * stride.
      order: rows of O.
      stride: distance of the numbers that O mixes.
      matrix: "hadamard", M(order) of `jquant.numerics.hadamard`; or "haar", `haar_matrix(order, seed)`.
      seed: of a Haar matrix, else 0.

    Example:
      >>> online_rotation(576).describe(), online_rotation(9 * 64, stride=64).describe()
      ('hadamard 36 x 16', 'haar 9, stride 64')
    """

    size: int = struct.field(pytree_node=False)
    order: int = struct.field(pytree_node=False)
    stride: int = struct.field(pytree_node=False, default=1)
    matrix: OrthogonalMatrix = struct.field(pytree_node=False, default="hadamard")
    seed: int = struct.field(pytree_node=False, default=0)

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Returns A x over the last axis, computed in float32 or wider, in the dtype of `x`."""
        view = x.astype(compute_dtype(x.dtype)).reshape(*x.shape[:-1], -1, self.order, self.stride)
        if self.matrix == "hadamard":
            turned = hadamard_transform(view.swapaxes(-1, -2)).swapaxes(-1, -2)
        else:
            matrix = jnp.asarray(haar_matrix(self.order, self.seed), view.dtype)
            turned = jnp.einsum("ij,...jk->...ik", matrix, view, precision=jax.lax.Precision.HIGHEST)
        return turned.reshape(x.shape).astype(x.dtype)

    def on_host(self, x: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
        """Returns A x over the last axis in float64 numpy, to fold into weights."""
        view = x.reshape(*x.shape[:-1], -1, self.order, self.stride).swapaxes(-1, -2)
        turned = hadamard_on_host(view) if self.matrix == "hadamard" else view @ haar_matrix(self.order, self.seed).T
        return np.ascontiguousarray(turned.swapaxes(-1, -2)).reshape(x.shape)

    def describe(self) -> str:
        """Returns matrix, order, blocks and stride in a few words."""
        base = base_order(self.order) if self.matrix == "hadamard" else 1
        order = f"{base} x {self.order // base}" if 1 < base < self.order else f"{self.order}"
        blocks = self.size // (self.order * self.stride)
        extent = [f", {blocks} blocks" * (blocks > 1), f", stride {self.stride}" * (self.stride > 1)]
        return f"{self.matrix} {order}{''.join(extent)}"


def online_rotation(size: int, *, stride: int = 1, seed: int = 0) -> OnlineRotation:
    """Chooses the rotation of a size by the rule of this module; the only constructor that checks.

    Args:
      size: numbers to rotate.
      stride: distance of the numbers that are mixed, a divisor of `size`; size / stride of them are.
      seed: of the dense matrix, where the rule gives one.

    Raises:
      FormatError: the size is not positive, or no multiple of the stride.

    Example:
      >>> rotation = online_rotation(4304)  # 16 * 269: no Hadamard construction of the whole
      >>> rotation.matrix, rotation.order
      ('hadamard', 16)
    """
    if size < 1 or stride < 1 or size % stride:
        raise FormatError(f"cannot rotate {size} numbers with stride {stride}; give a positive size, a multiple of it")
    mixed = size // stride
    order = next(divisor for divisor in _divisors(mixed) if _has_hadamard(divisor))
    if order == mixed or order >= SMALLEST_BLOCK:
        return OnlineRotation(size=size, order=order, stride=stride)
    return OnlineRotation(size=size, order=mixed, stride=stride, matrix="haar", seed=seed)


def repeat_rotation(rotation: OnlineRotation, count: int) -> OnlineRotation:
    """Returns the rotation on `count` times as many numbers, each run of its size rotated alone."""
    repeated: OnlineRotation = rotation.replace(size=rotation.size * count)  # type: ignore[attr-defined]
    return repeated


def _divisors(size: int) -> list[int]:
    """Returns the divisors in falling order."""
    small = [divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0]
    return sorted({*small, *(size // divisor for divisor in small)}, reverse=True)


def _has_hadamard(order: int) -> bool:
    try:
        base_order(order)
    except FormatError:
        return False
    return True
