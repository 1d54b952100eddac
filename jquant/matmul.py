"""The one multiplication: a rule table says how an activation meets a weight in its format and layout."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.formats import Layout, PermutedTensor, QuantizedTensor, UniformTensor
from jquant.types import compute_dtype

type Weight = Float[Array, "in out"] | QuantizedTensor
type MatmulRule = Callable[[jax.Array, Any], jax.Array]


def dense(weight: Any, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
    """Returns the dense weight [in, out] that a weight in any format stands for, in `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.astype(dtype)


def matmul(x: Float[Array, "*batch in"], weight: Any) -> Float[Array, "*batch out"]:
    """Multiplies an activation by a weight; equals `x @ dense(weight)` up to rounding, whichever rule runs.

    Sums are float32 (float64 for float64 activations); the result has the activation's dtype.

    Args:
      x: activations [..., in].
      weight: an array [in, out] or a `QuantizedTensor` of that shape.

    Returns:
      The product [..., out], in the dtype of `x`.

    Example:
      >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0], [2.0]])).tolist()
      [[3.0]]
    """
    kind = type(weight) if isinstance(weight, QuantizedTensor) else jax.Array
    layout = weight.layout if isinstance(weight, UniformTensor) else Layout.PORTABLE  # a jax.Array has another `layout`
    return _RULES.get((kind, layout), _reference)(x, weight)


def _reference(x: jax.Array, weight: Any) -> jax.Array:
    sums = compute_dtype(x.dtype)
    return jnp.matmul(x, dense(weight, x.dtype), preferred_element_type=sums).astype(x.dtype)


def _permuted(x: jax.Array, weight: PermutedTensor) -> jax.Array:
    return matmul(x[..., weight.order[:, 0]], weight.inner)


_RULES: Final[Mapping[tuple[type, Layout], MatmulRule]] = {
    (PermutedTensor, Layout.PORTABLE): _permuted,
}
