"""Attention of whole prompts by kernels that others keep: cuDNN's, through JAX, and tokamax's, an optional extra."""

import importlib
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.errors import RecipeError
from jquant.kv import KvCodec, PromptView
from jquant.models.config import LlamaConfig, PromptAttention
from jquant.models.layers import attention, causal_mask
from jquant.types import DType

WIDEST: Final = 256  # numbers of a head that both take on Hopper GPUs
MULTIPLE: Final = 8  # of which cuDNN takes heads


def prompt_fault(codec: KvCodec, config: LlamaConfig, dtype: DType) -> str | None:
    """Returns why no kernel attends to whole prompts; None where one does.

    Args:
      codec: of the block's keys and values.
      config: the model's sizes.
      dtype: of the activations.

    Example:
      >>> from jquant.kv import ExactKv
      >>> from jquant.models import tiny_config
      >>> prompt_fault(ExactKv(), tiny_config(), "float32")
      'activations are float32, kernels take bfloat16'
    """
    if codec.prompt == "streamed":
        return "each query sees its own version of keys and values (prompt=streamed)"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, kernels take bfloat16"
    if config.head_dim > WIDEST or config.head_dim % MULTIPLE:
        return f"heads of {config.head_dim} numbers, kernels take multiples of {MULTIPLE} up to {WIDEST}"
    return None


def attend_prompt(
    queries: Float[Array, "batch tokens heads dim"],
    view: PromptView,
    codec: KvCodec,
    config: LlamaConfig,
    start: Int[Array, ""] | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """Returns what the queries of prompts, or of a chunk of them, gather, by what the model was prepared for.

    Args:
      queries: after RoPE.
      view: what they see, batch first.
      codec: that showed it.
      config: of the model.
      start: the position of a chunk's first token; None for whole prompts.
    """
    kernel, window = config.prompt_attention, config.sliding_window
    if kernel is not None and codec.prompt != "streamed":
        return causal_attention(queries, view.keys, view.values, kernel, window, start)
    positions = jnp.arange(queries.shape[1]) + (0 if start is None else start)
    mask = view.mask & causal_mask(positions, view.positions[0], window)[None]
    return attention(queries, view.keys, view.values, mask)


def causal_attention(
    queries: Float[Array, "batch tokens heads dim"],
    keys: Float[Array, "batch seen kv_heads dim"],
    values: Float[Array, "batch seen kv_heads dim"],
    implementation: PromptAttention,
    window: int | None = None,
    start: Int[Array, ""] | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """Returns `layers.attention` over each token and those before it, inside a window.

    Prompts padded on the right need no other mask: no real token sees the padding.

    Args:
      queries: one for each token.
      keys: of the positions from 0 on.
      values: likewise.
      implementation: "cudnn" and "xla" are those of `jax.nn.dot_product_attention`; "tokamax" is the Mosaic GPU kernel
        of `tokamax.dot_product_attention`.
      window: tokens that a query sees, itself among them; None for all before it.
      start: position of the first query, for a chunk of prompts, by a mask; None for 0, by the kernel's own causality.

    Raises:
      RecipeError: tokamax is asked for and not installed.
    """
    sight: dict[str, Any] = {"is_causal": True, "local_window_size": None if window is None else (window - 1, 0)}
    if start is not None:
        mask = causal_mask(start + jnp.arange(queries.shape[1]), jnp.arange(keys.shape[1]), window)
        sight = {"mask": mask[None, None]}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # these functions' own arithmetic
        keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
        if implementation == "tokamax":
            return attend_by_tokamax(queries, keys, values, **sight)
        found: jax.Array = jax.nn.dot_product_attention(queries, keys, values, implementation=implementation, **sight)
    return found


def attend_by_tokamax(
    queries: Float[Array, "batch tokens heads dim"],
    keys: Float[Array, "batch seen kv_heads dim"],
    values: Float[Array, "batch seen kv_heads dim"],
    *,
    is_causal: bool = False,
    local_window_size: tuple[int, int] | None = None,
    mask: Bool[Array, "1 1 tokens seen"] | None = None,
    kernel: Literal["mosaic", "xla"] = "mosaic",
) -> Float[Array, "batch tokens heads dim"]:
    """Returns what `tokamax.dot_product_attention` makes of it.

    Args:
      queries: one for each token.
      keys: likewise, or more.
      values: likewise.
      is_causal: whether a query sees only the keys before its own.
      local_window_size: tokens that a query sees before and behind itself; None for all.
      mask: which keys each query sees; None for what the others say.
      kernel: tokamax's name of it: "mosaic" on a GPU, "xla" anywhere.

    Raises:
      RecipeError: tokamax is not installed.
    """
    try:
        tokamax = importlib.import_module("tokamax")
    except ModuleNotFoundError as error:
        raise RecipeError(f"attention of prompts by tokamax: {error}; run pip install 'jquant[tokamax]'") from error
    sight = {"is_causal": is_causal, "local_window_size": local_window_size, "mask": mask}
    found: jax.Array = tokamax.dot_product_attention(queries, keys, values, implementation=kernel, **sight)
    return found
