"""One device's part of a weight that several devices hold together, and what they tell each other for a product.

Under `jax.shard_map`, with T devices along the mesh's axis `tensor`, the device t of them has

    outputs cut      y_t = x W[:, t]                        nothing is told; y stays cut, as heads and features are
    inputs cut       y = sum_t x_t W[t, :]                  partial products are summed in float32
    both gathered    x = [x_0 .. x_T],  y = [x W[:, t]]_t   where inputs are rotated, or inputs or caches rounded:
                                                            a whole token is seen, and no sum taken in another order
    outputs taken    y_t = (x W)[:, t]                      W mixes outputs (QuIP), so that products are whole

A device then does what one device alone would do with a smaller weight: kernels, layouts and formats know of no mesh
(Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3). Weights whose outputs are cut need no node of their
own; the other three stand as a `ShardedTensor` around the device's own part.
"""

import functools
import math
from typing import Any, Final, Literal, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.formats.base import QuantizedTensor, split_outputs
from jquant.formats.spqr import align_outliers, compact_outliers
from jquant.formats.uniform import UniformTensor
from jquant.numerics import pack, unpack
from jquant.types import compute_dtype

DATA: Final = "data"  # the mesh's axis over which rows of a batch, or windows, are spread
TENSOR: Final = "tensor"  # that over which heads and features are

type Inputs = Literal["own", "gathered"]
type Outputs = Literal["own", "summed", "gathered", "taken"]


@final
@struct.dataclass
class ShardedTensor:
    """A device's part of a weight, for inside `jax.shard_map`; never on disk.

    Attributes:
      inner: the part: numbers or a `QuantizedTensor`.
      inputs: "own" takes the input as this device has it; "gathered" asks for that of all devices first.
      outputs: what becomes of the part's products: "own" nothing, "summed" over devices, "gathered" from all of them,
        "taken": this device's share of them.
      shape: (in, out) of the product that a caller sees on one device.
    """

    inner: Any
    inputs: Inputs = struct.field(pytree_node=False)
    outputs: Outputs = struct.field(pytree_node=False)
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def gather_inputs(self, x: Float[Array, "*batch own"]) -> Float[Array, "*batch in"]:
        """Returns the input that the part multiplies."""
        if self.inputs == "own" or _is_alone():
            return x
        return jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True)

    def gathers_products(self) -> bool:
        """Tells whether products are gathered from several devices."""
        return self.outputs == "gathered" and not _is_alone()

    def collect(self, y: Float[Array, "*batch part"]) -> Float[Array, "*batch out"]:
        """Returns the outputs that this device goes on with, given the part's product."""
        if _is_alone():
            return y
        if self.outputs == "summed":
            return jax.lax.psum(y.astype(compute_dtype(y.dtype)), TENSOR).astype(y.dtype)
        if self.outputs == "gathered":
            return jax.lax.all_gather(y, TENSOR, axis=y.ndim - 1, tiled=True)
        if self.outputs == "taken":
            size = y.shape[-1] // jax.lax.axis_size(TENSOR)
            return jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(TENSOR) * size, size, axis=y.ndim - 1)
        return y


def _is_alone() -> bool:
    """Tells that a device has whole weights: XLA would lay a gathered array out anew and sum it in another order."""
    return bool(jax.lax.axis_size(TENSOR) == 1)


def input_cut_fault(weight: Any, parts: int) -> str | None:
    """Returns why a weight cannot be cut along its inputs; None where `cut_inputs` can.

    Example:
      >>> input_cut_fault(jnp.ones((6, 2)), 2), input_cut_fault(jnp.ones((6, 2)), 4)
      (None, '6 inputs over 4 devices')
    """
    inputs = weight.shape[0]
    if inputs % parts:
        return f"{inputs} inputs over {parts} devices"
    if not isinstance(weight, QuantizedTensor):
        return None
    if not isinstance(weight, UniformTensor):
        return f"{type(weight).__name__} is cut by outputs"
    size = weight.format.group_size
    if size is not None and inputs // parts % size:
        return f"{inputs} inputs over {parts} devices cut groups of {size}"
    return None


def cut_inputs(weight: Any, part: int, parts: int) -> Any:
    """Returns one of equal runs of a weight's inputs, as a weight of that many inputs.

    Args:
      weight: numbers [in, out], or a portable `UniformTensor`.
      part: which run, from 0.
      parts: how many there are.

    Raises:
      FormatError: they cannot be: see `input_cut_fault`.

    Example:
      >>> cut_inputs(jnp.arange(4.0)[:, None], 1, 2).ravel().tolist()
      [2.0, 3.0]
    """
    fault = input_cut_fault(weight, parts)
    if fault is not None:
        raise FormatError(f"cannot cut a weight of {tuple(weight.shape)} along its inputs: {fault}")
    if isinstance(weight, UniformTensor):
        return _cut_uniform(weight, part, parts)
    size = weight.shape[0] // parts
    return weight[part * size : (part + 1) * size]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut_uniform(weight: UniformTensor, part: int, parts: int) -> UniformTensor:
    inputs, outputs = weight.shape
    size = inputs // parts
    bits, groups = weight.format.bits, weight.format.groups(inputs)
    codes = unpack(weight.codes, bits, inputs)[part * size : (part + 1) * size]
    first, count = (0, 1) if groups == 1 else (part * groups // parts, groups // parts)
    zeros = None
    if weight.zeros is not None:
        zeros = pack(unpack(weight.zeros, bits, groups)[first : first + count], bits)
    return UniformTensor(
        codes=pack(codes, bits),
        scales=weight.scales[first : first + count],
        zeros=zeros,
        format=weight.format,
        shape=(size, outputs),
    )


def output_cut_fault(weight: Any, parts: int) -> str | None:
    """Returns why a weight cannot be cut along its outputs; None where `cut_outputs` can.

    Example:
      >>> output_cut_fault(jnp.ones((2, 6)), 4)
      '6 outputs over 4 devices'
    """
    outputs = weight.shape[1]
    if outputs % parts:
        return f"{outputs} outputs over {parts} devices"
    if not isinstance(weight, QuantizedTensor):
        return None
    if weight.mixes_outputs:
        return f"{type(weight).__name__} mixes outputs"
    widths = {leaf.shape[-1] for leaf in jax.tree.leaves(weight)} - {1}
    shared = math.lcm(*(outputs // width for width in widths)) if widths else 1
    if outputs // parts % shared:
        return f"{outputs} outputs over {parts} devices cut runs of {shared} that share entries"
    return None


def cut_outputs(weight: Any, parts: int) -> list[Any]:
    """Returns equal runs of a weight's outputs, alike in structure and shapes.

    Args:
      weight: numbers [in, out], or a portable `QuantizedTensor`.
      parts: how many.

    Raises:
      FormatError: it cannot be cut so: see `output_cut_fault`.

    Example:
      >>> [part.ravel().tolist() for part in cut_outputs(jnp.arange(4.0)[None], 2)]
      [[0.0, 1.0], [2.0, 3.0]]
    """
    fault = output_cut_fault(weight, parts)
    if fault is not None:
        raise FormatError(f"cannot cut a weight of {tuple(weight.shape)} along its outputs: {fault}")
    sizes = (weight.shape[1] // parts,) * parts
    if not isinstance(weight, QuantizedTensor):
        return jnp.split(weight, parts, axis=1)
    return align_outliers([compact_outliers(part) for part in split_outputs(weight, sizes)])
