"""The one multiplication: a rule table says how an activation meets a weight in its format and layout."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.formats import BinaryTensor, Layout, PermutedTensor, QuantizedTensor, RotatedTensor, UniformTensor
from jquant.numerics import CHUNK, lookup_product
from jquant.types import compute_dtype

type Weight = Float[Array, "in out"] | QuantizedTensor
type MatmulRule = Callable[[jax.Array, Any], jax.Array]

LOOKUP_ROWS: Final = 4  # activations up to which tables beat the dense product on CPU: benchmarks/lookup_matmul.py


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


def lookup_matmul(x: Float[Array, "*batch in"], weight: BinaryTensor) -> Float[Array, "*batch out"]:
    """Multiplies by tables of partial sums, as LUT-GEMM does; equals `x @ dense(weight)` up to rounding.

    Args:
      x: activations [..., in].
      weight: binary codes whose groups are multiples of 8 inputs.

    Returns:
      The product [..., out], summed in float32 (float64 for float64), in the dtype of `x`.

    Raises:
      FormatError: a group is no multiple of 8 inputs, so that a byte of signs has two alphas.

    Reference: arXiv:2206.09557, section 3.
    """
    if not _has_whole_bytes(weight):
        size = weight.format.group_size or weight.shape[0]
        raise FormatError(f"groups of {size} inputs: table lookup needs multiples of {CHUNK}; use matmul")
    sums = compute_dtype(x.dtype)
    offsets = None if weight.offsets is None else weight.offsets.astype(sums)
    return lookup_product(x.astype(sums), weight.signs, weight.alphas.astype(sums), offsets).astype(x.dtype)


def _has_whole_bytes(weight: BinaryTensor) -> bool:
    return weight.shape[0] % (CHUNK * weight.format.groups(weight.shape[0])) == 0


def _binary(x: jax.Array, weight: BinaryTensor) -> jax.Array:
    if math.prod(x.shape[:-1]) > LOOKUP_ROWS or not _has_whole_bytes(weight):
        return _reference(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=lookup_matmul, default=_reference)


def _rotated(x: jax.Array, weight: RotatedTensor) -> jax.Array:
    return weight.rotate_outputs(matmul(weight.rotate_inputs(x), weight.inner))


_RULES: Final[Mapping[tuple[type, Layout], MatmulRule]] = {
    (PermutedTensor, Layout.PORTABLE): _permuted,
    (RotatedTensor, Layout.PORTABLE): _rotated,
    (BinaryTensor, Layout.PORTABLE): _binary,
}
