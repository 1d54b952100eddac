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
    """

    name: str
    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]


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
    wide = x.astype(jnp.float32)
    outer = jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST)
    return SecondMoment(total=moment.total + outer, tokens=moment.tokens + jnp.float32(x.shape[0]))


def _init_largest(features: int) -> Float[Array, "in"]:
    return jnp.zeros(features, jnp.float32)


def _update_largest(largest: Float[Array, "in"], x: Float[Array, "tokens in"]) -> Float[Array, "in"]:
    """Returns infinity for a feature that is NaN or infinite in any token: XLA's maximum on CPU loses NaNs."""
    wide = x.astype(largest.dtype)
    seen = jnp.maximum(largest, jnp.max(jnp.abs(wide), axis=0))
    return jnp.where(jnp.all(jnp.isfinite(wide), axis=0), seen, jnp.inf)


HESSIAN: Final = Statistic("hessian", _init_moment, _update_moment)
ABSMAX: Final = Statistic("absmax", _init_largest, _update_largest)  # [in], the largest magnitude of each feature
