"""Names of types that several folders share: what a node's field holds, what a random key is, what names a dtype.

`Leaf` annotates the array fields of tree nodes. To the type checker it is `jax.Array`; at run time it is `Any`, as JAX
unflattens nodes with specifications, shape structs and strings in place of arrays, and a checked annotation would
refuse them. Functions annotate their arrays with jaxtyping shapes instead.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

if TYPE_CHECKING:
    from jax import Array as Leaf
else:
    Leaf = Any

Key = PRNGKeyArray
DType = DTypeLike


def compute_dtype(dtype: DType) -> DType:
    """Return what is computed in for arrays of a dtype: float32, or float64 for float64.

    Example:
        >>> str(compute_dtype("bfloat16"))
        'float32'
    """
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.dtype("float64") else "float32")


__all__ = ["DType", "Key", "Leaf", "compute_dtype"]
