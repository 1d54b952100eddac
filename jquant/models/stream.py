"""The residual stream between blocks: where kernels run, an update is added by the kernel that makes the next norm."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, BFloat16, Float, Float32

from jquant.formats import Layout
from jquant.kv import KvCodec, attention_kernel
from jquant.models.config import LlamaConfig
from jquant.models.layers import rms_norm
from jquant.types import Leaf


@struct.dataclass
class Stream:
    """Hidden states whose last update is not yet added.

    Attributes:
      value: [batch, tokens, hidden], in the residual stream's dtype.
      update: what is to be added, of the same shape; None for nothing.
    """

    value: Leaf
    update: Leaf | None = None

    def settled(self) -> "Stream":
        """Returns the stream with its update added."""
        return self if self.update is None else Stream(self.value + self.update.astype(self.value.dtype))


def add_norm(
    x: Stream, scale: Float[Array, "hidden"], config: LlamaConfig, layout: Layout
) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch tokens hidden"]]:
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
    value, update = x.value, x.update
    if layout is Layout.PORTABLE or not _has_kernel(value, scale):
        value = x.settled().value
        return value, rms_norm(value, scale, config.rms_norm_eps, config.norm_dtype(value.dtype))
    rows = value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
    flat = None if update is None else update.reshape(rows.shape)
    sums, normed = _add_norm(rows, flat, scale, eps=config.rms_norm_eps, layout=layout)
    return sums.reshape(value.shape), normed.reshape(value.shape)


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
