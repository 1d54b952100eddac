"""Rotations to check and to time: random tokens, the kernel, its meaning in float32 and what XLA makes of the same."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16

from pallas_kernels import reference
from pallas_kernels.configs import choose_rotation
from pallas_kernels.hadamard import rotate_quantize
from pallas_kernels.kronecker import Rotation, prepare_rotation, restore_rotation

ORDERS: Final = ((8192, 1), (4096, 1), (14336, 28), (1536, 12), (576, 36), (11008, 172))  # and the base's order
TOKENS: Final = 2048
BITS: Final = 8
BYTES: Final = 3  # of a number: bfloat16 in, int8 out


class Differences(NamedTuple):
    """How a kernel's codes differ from those of float32.

    Attributes:
      share: how many codes are others.
      most: by how much at most.
      scale: the largest relative difference of a scale.
      same_bits: whether a second call gave the same.
    """

    share: float
    most: float
    scale: float
    same_bits: bool

    def right(self) -> bool:
        """Tells whether no code is more than its neighbour, and few are that: T is rounded to bfloat16."""
        return self.most <= 1 and self.share < 0.1 and self.scale < 2**-8 and self.same_bits


@dataclass(frozen=True)
class RotationCase:
    """A rotation of random tokens.

    Attributes:
      tokens: rows of the activations.
      order: numbers of a token, all mixed.
      base: rows of the Hadamard matrix that the order is a power of two of; a matrix of random signs stands for it,
        which is no rotation, and the same work.
    """

    tokens: int
    order: int
    base: int

    @property
    def bytes_moved(self) -> int:
        """Returns the bytes of activations read and codes written."""
        return BYTES * self.tokens * self.order

    def operands(self, seed: int) -> tuple[BFloat16[Array, "tokens n"], Rotation]:
        """Returns random tokens and the rotation."""
        x = jax.random.normal(jax.random.key(seed), (self.tokens, self.order), jnp.bfloat16)
        return x, _rotation(self)

    def kernel(self) -> Callable[..., Any]:
        """Returns the kernel as a function of (x, rotation)."""
        config = choose_rotation(*(len(matrix) for matrix in _rotation(self)))
        return lambda x, rotation: rotate_quantize(x, *rotation, order=self.order, bits=BITS, config=config)

    def xla(self) -> Callable[..., Any]:
        """Returns XLA's formulation: two products and the grid."""
        return functools.partial(_xla, self.order)

    def differences(self, call: Callable[..., Any], given: tuple[Any, Rotation]) -> Differences:
        """Returns how the codes of a call differ from those of float32."""
        codes, scales, _ = call(*given)
        again = call(*given)[0]
        whole = restore_rotation(given[1], self.order)
        expected, grid, _ = reference.rotate_quantize(given[0], whole, self.order, BITS)
        off = jnp.abs(codes.astype(jnp.int32) - expected.astype(jnp.int32))
        relative = jnp.max(jnp.abs(scales / grid - 1))
        same = bool((codes == again).all())
        return Differences(float((off > 0).mean()), float(off.max()), float(relative), same)


@functools.cache
def _rotation(case: RotationCase) -> Rotation:
    signs = 2 * np.random.default_rng(0).integers(0, 2, (case.base, case.base)) - 1
    return prepare_rotation(np.asarray(signs, np.int8) if case.base > 1 else np.ones((1, 1), np.int8), case.order)


def _xla(order: int, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, None]:
    slow = order // len(rotation.right)
    view = x.reshape(len(x), slow, -1)
    turned = jnp.einsum("ij,mjf->mif", rotation.left[:slow, :slow], view)
    y = jnp.einsum("mif,gf->mig", turned, rotation.right, preferred_element_type=jnp.float32)
    y = y.reshape(x.shape) / math.sqrt(order)
    scales = jnp.max(jnp.abs(y), axis=1) / (2 ** (BITS - 1) - 1)
    return jnp.round(y / scales[:, None]).astype(jnp.int8), scales, None
