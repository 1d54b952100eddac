"""The residual stream between blocks: where kernels run, an update is added by the kernel that makes the next norm."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, BFloat16, Bool, Float, Float32

from jquant.formats import Layout, UndividedActivation
from jquant.fused import matmul_onto, onto_fault
from jquant.kv import KvCodec, attention_kernel
from jquant.models.config import LlamaConfig
from jquant.models.layers import is_plain, linear, rms_norm
from jquant.models.tree import Linear
from jquant.types import Leaf


@struct.dataclass
class Stream:
    """Hidden states whose last update is not yet added.

    Attributes:
      value: [batch, tokens, hidden], in the residual stream's dtype.
      update: what is to be added, of the same shape; None for nothing.
      normed: the norm that comes next, where the kernel that added the last update began it; there is no update then.
    """

    value: Leaf
    update: Leaf | None = None
    normed: UndividedActivation | None = None

    def settled(self) -> "Stream":
        """Returns the stream with its update added."""
        return self if self.update is None else Stream(self.value + self.update.astype(self.value.dtype))


def add_norm(
    x: Stream, scale: Float[Array, "hidden"], config: LlamaConfig, layout: Layout
) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"] | UndividedActivation]:
    """Returns the hidden states, the update added, and their RMS norm: by one kernel where the layout has one.

    Args:
      x: the stream.
      scale: of the norm.
      config: of the model; with its `wide_residual`, float32 hidden states have a norm in bfloat16.
      layout: of the block that reads the norm: see `layout_of_norms`.

    Example:
      >>> x, config = Stream(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2))), LlamaConfig(8, 2, 4, 1, 1, 1, 2)
      >>> value, normed = add_norm(x, jnp.ones(2), config, Layout.PORTABLE)
      >>> value.tolist(), normed.round(3).tolist()
      ([[[2.0, 2.0]]], [[[1.0, 1.0]]])
    """
    if x.normed is not None:
        return x.value, x.normed
    value, update = x.value, x.update
    if layout is Layout.PORTABLE or not _has_kernel(value, scale):
        value = x.settled().value
        return value, rms_norm(value, scale, config.rms_norm_eps, config.norm_dtype(value.dtype))
    rows = value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
    flat = None if update is None else update.reshape(rows.shape)
    sums, normed = _add_norm(rows, flat, scale, eps=config.rms_norm_eps, layout=layout)
    return sums.reshape(value.shape), normed.reshape(value.shape)


def add_linear(
    value: Float[Array, "batch tokens hidden"],
    layer: Linear,
    x: Float[Array, "batch tokens in"],
    valid: Bool[Array, "batch tokens"] | None,
    following: Float[Array, "hidden"] | None,
    config: LlamaConfig,
) -> tuple[Stream, Float[Array, "batch tokens tap"]]:
    """Returns the stream behind a linear, whose kernel adds the update and begins the next norm where it can.

    Args:
      value: the stream before it.
      layer: the linear.
      x: its input.
      valid: which tokens are no padding; None if all are.
      following: the scale of the norm that the stream meets next; None where that is left open.
      config: of the model.

    Returns:
      The stream, and the linear's tap.
    """
    kernel: Any = layer.kernel
    if following is None or not is_plain(layer) or onto_fault(x, kernel, value, following) is not None:
        update, tap = linear(layer, x, valid)
        return Stream(value, update), tap
    sums, normed = matmul_onto(x, kernel, value, following, config.rms_norm_eps)
    return Stream(sums, None, normed), x


def layout_of_norms(codec: KvCodec) -> Layout:
    """Returns where a block's norms are made: beside its attention, whose codec `prepare` has given a layout."""
    packed = attention_kernel(codec)
    return Layout.PORTABLE if packed is None else packed.layout


def _has_kernel(value: jax.Array, scale: jax.Array) -> bool:
    from pallas_kernels.norm import norm_fault

    return scale.dtype == jnp.bfloat16 and value.size > 0 and norm_fault(value.shape[-1], value.dtype) is None


@partial(jax.jit, static_argnames=("eps", "layout"))  # so that all norms share one kernel, traced and lowered once
def _add_norm(
    rows: Float32[Array, "rows hidden"],
    update: BFloat16[Array, "rows hidden"] | None,
    scale: BFloat16[Array, "hidden"],
    *,
    eps: float,
    layout: Layout,
) -> tuple[Float32[Array, "rows hidden"], BFloat16[Array, "rows hidden"]]:
    from pallas_kernels.compat import Simulation
    from pallas_kernels.norm import add_norm as kernel

    return kernel(rows, update, scale, eps=eps, simulate=Simulation() if layout is Layout.SIMULATED else None)
