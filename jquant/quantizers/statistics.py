"""What calibration collects for a quantizer: pairs of pure functions, as optax pairs init and update."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.types import Leaf


class Statistic(NamedTuple):
    """How to sum something over the inputs of a linear.

    Attributes:
      name: the statistic's name in reports.
      init: number of input features -> the empty sum.
      update: (sum, inputs [tokens, in]) -> sum.
      combine: (sum, sum) -> sum, of the inputs of both.
    """

    name: str
    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]
    combine: Callable[[Any, Any], Any]


@struct.dataclass
class SecondMoment:
    """Sum of x x^T and the number of tokens in it.

    Attributes:
      total: float32 [in, in].
      tokens: float32 scalar.
    """

    total: Leaf
    tokens: Leaf

    def mean(self) -> Float[Array, "in in"]:
        """Returns the mean of x x^T: GPTQ's Hessian up to a factor, to which every method is blind."""
        return self.total / self.tokens


def _init_moment(features: int) -> SecondMoment:
    return SecondMoment(total=jnp.zeros((features, features), jnp.float32), tokens=jnp.zeros((), jnp.float32))


def _update_moment(moment: SecondMoment, x: Float[Array, "tokens in"]) -> SecondMoment:
    return SecondMoment(total=moment.total + gram(x), tokens=moment.tokens + jnp.float32(x.shape[0]))


def gram(x: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
    """Returns x^T x, summed in float32.

    A product of two numbers of 16 bits is exact in float32, so a GPU's tensor cores take those as they are; what they
    lose is the order of the sum, and rounding: they cut. Numbers of 32 bits are multiplied as such.

    Example:
      >>> gram(jnp.array([[1.0, 2.0], [0.0, 3.0]], jnp.bfloat16)).tolist()
      [[1.0, 2.0], [2.0, 13.0]]
    """

    def widened(x: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
        wide = x.astype(jnp.float32)
        return jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST)

    def as_it_is(x: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
        return jnp.matmul(x.T, x, preferred_element_type=jnp.float32)

    if x.dtype.itemsize != 2:
        return widened(x)
    products: jax.Array = jax.lax.platform_dependent(x, cuda=as_it_is, default=widened)
    return products


def _add_moments(moment: SecondMoment, more: SecondMoment) -> SecondMoment:
    return SecondMoment(total=moment.total + more.total, tokens=moment.tokens + more.tokens)


def _init_largest(features: int) -> Float[Array, "in"]:
    return jnp.zeros(features, jnp.float32)


def _update_largest(largest: Float[Array, "in"], x: Float[Array, "tokens in"]) -> Float[Array, "in"]:
    """Returns infinity for a feature that is NaN or infinite in any token: XLA's maximum on CPU loses NaNs."""
    wide = x.astype(largest.dtype)
    seen = jnp.maximum(largest, jnp.max(jnp.abs(wide), axis=0))
    return jnp.where(jnp.all(jnp.isfinite(wide), axis=0), seen, jnp.inf)


HESSIAN: Final = Statistic("hessian", _init_moment, _update_moment, _add_moments)
ABSMAX: Final = Statistic(
    "absmax", _init_largest, _update_largest, jnp.maximum
)  # [in], each feature's largest magnitude
