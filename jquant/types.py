"""Names of types that several folders share: what a node's field holds, what a random key is, what names a dtype.

`Leaf` annotates the array fields of tree nodes. To the type checker it is `jax.Array`; at run time it is `Any`, as JAX
unflattens nodes with specifications, shape structs and strings in place of arrays, and a checked annotation would refuse them.
Functions annotate their arrays with jaxtyping shapes instead.
"""

from typing import TYPE_CHECKING, Any

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

if TYPE_CHECKING:
    from jax import Array as Leaf
else:
    Leaf = Any

Key = PRNGKeyArray
DType = DTypeLike

__all__ = ["DType", "Key", "Leaf"]
