"""What a quantized weight is: arrays, their meaning, and the bytes they take. No algorithm lives here."""

import abc
import dataclasses
import enum
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.errors import FormatError

_HOPPER: Final = re.compile(r"\bG?(H100|H200)\b")


class Layout(enum.Enum):
    """How a weight lies in memory, by which `matmul` knows what multiplies it. `prepare` alone writes new ones.

    Attributes:
      PORTABLE: the one that algorithms write and checkpoints hold; XLA multiplies it, on any machine.
      HOPPER: as the kernels of `pallas_kernels` read it on an H100 or H200.
      SIMULATED: like HOPPER, for the same kernels in Pallas' interpreter on a CPU: slow, for tests.
    """

    PORTABLE = "portable"
    HOPPER = "hopper"
    SIMULATED = "simulated"


def hopper_card(kind: str) -> str | None:
    """Returns which card of the generation JAX's `device_kind` names; None for any other device.

    >>> hopper_card("NVIDIA H100 80GB HBM3"), hopper_card("NVIDIA GH200 480GB"), hopper_card("cpu")
    ('H100', 'H200', None)
    """
    found = _HOPPER.search(kind)
    return None if found is None else found[1]


class QuantizedTensor(abc.ABC):
    """A weight matrix kept in few bits.

    Final subclasses are `flax.struct` dataclasses whose arrays are leaves and whose other fields are static.
    Invariants, checked for every subclass by `tests/contracts/test_formats.py`:

    * `shape` is the logical (in, out) and static: packing, stacking, vmap and sharding never change it;
    * in the portable layout, every leaf ends in an axis of size `out`, of size `out / g` where g neighbouring outputs
      share an entry, or of size 1 where all of them do;
    * `dequantize` is pure and jittable, and is the meaning of the tensor: every kernel must agree with it.

    Attributes:
      shape: (in, out).
      layout: PORTABLE, unless the subclass has a static field that tells otherwise.
      mixes_outputs: whether each output depends on leaves of others, so that the tensor cannot be cut.
    """

    mixes_outputs: ClassVar[bool] = False

    shape: tuple[int, int] = struct.field(pytree_node=False)
    layout: Layout = Layout.PORTABLE

    @abc.abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
        """Returns the dense weight that this tensor stands for, rounded once, to `dtype`."""

    @final
    def bits_per_weight(self) -> float:
        """Returns 8 * (bytes of all leaves) / (in * out): measured on the arrays, never a formula."""
        return 8.0 * self.nbytes() / math.prod(self.shape)

    @final
    def nbytes(self) -> int:
        """Returns the bytes that all leaves take in memory; abstract leaves count as the arrays they stand for."""
        return tree_nbytes(self)


def tree_nbytes(tree: object) -> int:
    """Returns the bytes that the arrays of a tree take; `jax.ShapeDtypeStruct` leaves count too.

    Two numbers of int4 take one byte, as they do in a device's memory, whatever `itemsize` says.

    >>> tree_nbytes({"codes": jnp.zeros((4, 2), jnp.uint8), "scales": jnp.zeros((1, 2), jnp.float16)})
    12
    """
    return sum(-(-math.prod(leaf.shape) * _bits(leaf.dtype) // 8) for leaf in jax.tree.leaves(tree))


def _bits(dtype: jax.typing.DTypeLike) -> int:
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


def split_outputs[T: QuantizedTensor](tensor: T, sizes: Sequence[int]) -> tuple[T, ...]:
    """Cuts a tensor along its outputs, as `jnp.split` would cut the dense matrix.

    Args:
      tensor: a quantized [in, out] matrix.
      sizes: outputs of each part; they sum to `out`.

    Returns:
      One tensor for each size. Leaves that all outputs share are shared by the parts.

    Raises:
      FormatError: the sizes do not sum to the number of outputs, or cut through outputs that share an entry or that the
        format mixes; or the tensor is not portable.
    """
    outputs = tensor.shape[1]
    if sum(sizes) != outputs:
        raise FormatError(f"cannot cut {outputs} outputs into {tuple(sizes)}: the sizes sum to {sum(sizes)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_slice_outputs(tensor, start, size))
        start += size
    return tuple(parts)


def _slice_outputs[T: QuantizedTensor](tensor: T, start: int, size: int) -> T:
    if size == tensor.shape[1]:
        return tensor
    if tensor.layout is not Layout.PORTABLE:
        raise FormatError(f"cannot cut a {type(tensor).__name__} in layout {tensor.layout.value}: restore it first")
    if tensor.mixes_outputs:
        raise FormatError(f"cannot cut a {type(tensor).__name__}, which mixes outputs: quantize each part alone")

    def is_inner(node: object) -> bool:
        return isinstance(node, QuantizedTensor) and node is not tensor

    def cut(node: Any) -> Any:
        if isinstance(node, QuantizedTensor):
            return _slice_outputs(node, start, size)
        if node.shape[-1] == 1:
            return node
        sharing = tensor.shape[1] // node.shape[-1]
        if start % sharing or size % sharing:
            raise FormatError(f"cannot cut outputs {start} to {start + size} out: each {sharing} in turn share entries")
        return node[..., start // sharing : (start + size) // sharing]

    parts = jax.tree.map(cut, tensor, is_leaf=is_inner)
    return dataclasses.replace(parts, shape=(tensor.shape[0], size))
