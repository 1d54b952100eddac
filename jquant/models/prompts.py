"""Attention of whole prompts by kernels that others keep: cuDNN's, through JAX, and tokamax's, an optional extra."""

import importlib
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.errors import RecipeError
from jquant.kv import KvCodec
from jquant.models.config import LlamaConfig, PromptAttention
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


def causal_attention(
    queries: Float[Array, "batch tokens heads dim"],
    keys: Float[Array, "batch tokens kv_heads dim"],
    values: Float[Array, "batch tokens kv_heads dim"],
    implementation: PromptAttention,
    window: int | None = None,
) -> Float[Array, "batch tokens heads dim"]:
    """Returns `layers.attention` over each token and those before it, inside a window.

    Prompts padded on the right need no other mask: no real token sees the padding.

    Args:
      queries: one for each token.
      keys: likewise.
      values: likewise.
      implementation: "cudnn" and "xla" are those of `jax.nn.dot_product_attention`; "tokamax" is the Mosaic GPU kernel
        of `tokamax.dot_product_attention`.
      window: tokens that a query sees, itself among them; None for all before it.

    Raises:
      RecipeError: tokamax is asked for and not installed.
    """
    attend = attend_by_tokamax if implementation == "tokamax" else _attend_by_jax
    kernel: Any = "mosaic" if implementation == "tokamax" else implementation
    seen = None if window is None else (window - 1, 0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # these functions' own arithmetic
        found: jax.Array = attend(queries, keys.astype(queries.dtype), values.astype(queries.dtype), kernel, seen)
    return found


def attend_by_tokamax(
    queries: Float[Array, "batch tokens heads dim"],
    keys: Float[Array, "batch tokens kv_heads dim"],
    values: Float[Array, "batch tokens kv_heads dim"],
    implementation: Literal["mosaic", "xla"],
    window: tuple[int, int] | None,
) -> Float[Array, "batch tokens heads dim"]:
    """Returns what `tokamax.dot_product_attention` makes of it, causal; by "mosaic" on a GPU, by "xla" anywhere.

    Args:
      queries: one for each token.
      keys: likewise.
      values: likewise.
      implementation: tokamax's name of it.
      window: tokens that a query sees before and behind itself; None for all.

    Raises:
      RecipeError: tokamax is not installed.
    """
    try:
        tokamax = importlib.import_module("tokamax")
    except ModuleNotFoundError as error:
        raise RecipeError(f"attention of prompts by tokamax: {error}; run pip install 'jquant[tokamax]'") from error
    found: jax.Array = tokamax.dot_product_attention(
        queries, keys, values, is_causal=True, local_window_size=window, implementation=implementation
    )
    return found


def _attend_by_jax(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    implementation: Literal["cudnn", "xla"],
    window: tuple[int, int] | None,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, local_window_size=window, implementation=implementation
    )
