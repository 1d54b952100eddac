"""Formats made of another format: an input order around an inner tensor. Composition instead of options."""

from typing import final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.formats.base import QuantizedTensor
from jquant.types import Leaf


@final
@struct.dataclass
class PermutedTensor(QuantizedTensor):
    """w[order[i], o] = inner[i, o]: the inner tensor holds the inputs in another order.

    GPTQ's activation order with dynamic groups ("act-order") is a permuted uniform tensor: its groups are runs of
    inputs in processing order.

    Attributes:
      inner: the tensor in its own order of inputs.
      order: int32 [in, 1], the model's input that each inner input is.
      shape: (in, out).
    """

    inner: QuantizedTensor
    order: Leaf
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns the inner weight with its inputs back in the model's order."""
        inner = self.inner.dequantize(dtype)
        return jnp.zeros_like(inner).at[self.order[:, 0]].set(inner)
