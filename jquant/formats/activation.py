"""What a quantized activation is: integer codes with what brings them back. It lives inside one product, never on disk.

    uniform    x ~ scales * (codes - zeros)              one scale for each token and group of features
    razored    x ~ scales * (codes << shifts)            one scale for each token, one shift for each group
    split      x ~ scales * codes + outliers             features with outliers keep their numbers
    undivided  x = numbers / sqrt(mean(sum^2) + eps)     no integers: a norm that its product with a weight divides

Codes are int8, so that they multiply int8 weights into int32 sums; an asymmetric code q of b bits is held as
q - 2^(b-1), its zero likewise. A scale that a whole tensor shares is repeated for each token.
"""

import abc
import math
from typing import final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.numerics import unrazor
from jquant.types import Leaf, compute_dtype


class QuantizedActivation(abc.ABC):
    """An activation [..., in] kept in integers, or else in parts. Final subclasses are `flax.struct` dataclasses.

    `dequantize` is the meaning of the node: every rule of `jquant.matmul` must agree with it.

    Attributes:
      dtype: name of the dtype that the activation had, which a product with it has again.
    """

    dtype: str = struct.field(pytree_node=False)

    @abc.abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*batch in"]:
        """Returns the activation that this node stands for, rounded once, to `dtype`."""


@final
@struct.dataclass
class UniformActivation(QuantizedActivation):
    """x[t, i] = scales[t, i // g] * (codes[t, i] - zeros[t, i // g]), g = in / groups.

    Attributes:
      codes: int8 [..., in].
      scales: float32 [..., groups] (float64 for float64 activations).
      zeros: whole numbers like `scales`; None when symmetric, where every zero is 0.
      dtype: of the activation.
    """

    codes: Leaf
    scales: Leaf
    zeros: Leaf | None
    dtype: str = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*batch in"]:
        """Returns scales * (codes - zeros), computed in the dtype of the scales and rounded once to `dtype`."""
        *batch, features = self.codes.shape
        groups = self.scales.shape[-1]
        codes = self.codes.astype(self.scales.dtype).reshape(*batch, groups, features // groups)
        if self.zeros is not None:
            codes = codes - self.zeros[..., None]
        return (self.scales[..., None] * codes).reshape(*batch, features).astype(dtype)


@final
@struct.dataclass
class RazoredActivation(QuantizedActivation):
    """x[t, i] = scales[t] * (codes[t, i] << shifts[t, i // g]), g = in / groups.

    Attributes:
      codes: int8 [..., in].
      shifts: uint8 [..., groups], the bits that each group dropped.
      scales: float32 [..., 1], the step of the integers before razoring.
      dtype: of the activation.
    """

    codes: Leaf
    shifts: Leaf
    scales: Leaf
    dtype: str = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*batch in"]:
        """Returns scales * (codes << shifts), computed in the dtype of the scales and rounded once to `dtype`."""
        integers = unrazor(self.codes, self.shifts, axis=self.codes.ndim - 1).astype(self.scales.dtype)
        return (self.scales * integers).astype(dtype)


@final
@struct.dataclass
class SplitActivation(QuantizedActivation):
    """x = inner + outliers: each feature is zero in one of the two.

    Attributes:
      inner: the integers; codes of features with outliers are 0.
      outliers: [..., in] in the activation's dtype, 0 but for features with outliers.
      dtype: of the activation.
    """

    inner: UniformActivation
    outliers: Leaf
    dtype: str = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*batch in"]:
        """Returns the sum of both parts, computed in float32 or wider and rounded once to `dtype`."""
        wide = compute_dtype(self.dtype)
        return (self.inner.dequantize(wide) + self.outliers.astype(wide)).astype(dtype)


@final
@struct.dataclass
class UndividedActivation(QuantizedActivation):
    """x[t] = numbers[t] / sqrt(sum(squares[:, t]) / in + eps): what a kernel leaves that begins a norm.

    Attributes:
      numbers: bfloat16 [..., in], the norm's scale times what is normed.
      squares: float32 [runs, columns], sums of the squares of what is normed over runs of features; column t is of
        token t, in the order of `numbers`, and columns behind the last token mean nothing.
      eps: of the norm.
      dtype: of the activation.
    """

    numbers: Leaf
    squares: Leaf
    eps: float = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*batch in"]:
        """Returns the numbers divided, computed in float32 and rounded once to `dtype`.

        >>> ones = jnp.ones((1, 4), jnp.bfloat16)
        >>> UndividedActivation(ones, jnp.full((2, 8), 8.0), 0.0, "bfloat16").dequantize().tolist()
        [[0.5, 0.5, 0.5, 0.5]]
        """
        from pallas_kernels import Undivided

        *batch, features = self.numbers.shape
        rows = self.numbers.reshape(math.prod(batch), features)
        factors = Undivided(rows, self.squares).factors(self.eps).reshape(*batch, 1)
        return (self.numbers.astype(jnp.float32) * jnp.broadcast_to(factors, self.numbers.shape)).astype(dtype)
