"""The contract of a weight quantizer: one immutable value with one pure call (architecture 3.7)."""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.formats import QuantizedTensor
from jquant.quantizers.statistics import Statistic
from jquant.types import Key

# Named figures of one solve. One-dimensional ones are per output and sum over outputs; scalars belong to the solve.
# The axis has no name, as one call may hold diagnostics of several solves.
type Diagnostics = dict[str, Float[Array, "_"] | Float[Array, ""]]


class WeightQuantizer(abc.ABC):
    """Rounds one matrix. Final subclasses are frozen dataclasses of hyperparameters, hashable and printable.

    Attributes:
      statistic: what calibration must collect from the linear's inputs; None if nothing.
      separable: whether outputs are independent given the statistic, so that linears with the same input may be
        solved as one matrix.
    """

    statistic: ClassVar[Statistic | None]
    separable: ClassVar[bool]

    @abc.abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if a matrix of this (in, out) shape cannot be quantized so; called before any work."""

    @abc.abstractmethod
    def __call__(
        self, weight: Float[Array, "in out"], statistics: Any, key: Key
    ) -> tuple[QuantizedTensor, Diagnostics]:
        """Quantizes a matrix. Pure and jittable.

        Args:
          weight: the dense matrix.
          statistics: what `statistic` collected, or None.
          key: random key, for methods that draw.

        Returns:
          The packed tensor, and diagnostics that are finite exactly if the solve succeeded.
        """


def hessian_figures(
    weight: Float[Array, "in out"],
    tensor: QuantizedTensor,
    nearest: QuantizedTensor,
    hessian: Float[Array, "in in"],
) -> Diagnostics:
    """Returns `weight_error`, and the proxy losses of a solve and of rounding to nearest, all per output."""
    return weight_error(weight, tensor) | {
        "proxy_loss": proxy_loss(weight, tensor, hessian),
        "rtn_proxy_loss": proxy_loss(weight, nearest, hessian),
    }


def weight_error(weight: Float[Array, "in out"], tensor: QuantizedTensor) -> Diagnostics:
    """Returns the squared error and the squared norm of each output: sum_i (w - q)^2 and sum_i w^2."""
    difference = weight - tensor.dequantize(weight.dtype)
    return {"weight_error": jnp.sum(difference**2, axis=0), "weight_norm": jnp.sum(weight**2, axis=0)}


def proxy_loss(
    weight: Float[Array, "in out"], tensor: QuantizedTensor, hessian: Float[Array, "in in"]
) -> Float[Array, "out"]:
    """Returns (w - q)^T H (w - q) of each output: the mean squared error that rounding causes at the output."""
    difference = weight - tensor.dequantize(weight.dtype)
    curved = jnp.matmul(hessian.astype(weight.dtype), difference, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(difference * curved, axis=0)
