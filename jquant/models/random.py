"""Small random models for tests, examples and benchmarks."""

import zlib
from collections.abc import Mapping
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from jquant.models.config import LlamaConfig
from jquant.models.tree import Llama, build
from jquant.types import Key

type Family = Literal["llama2", "llama3.1", "linear", "smollm2", "mistral", "qwen2", "qwen3"]

_SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_LLAMA3_ROPE: Final[Mapping[str, Any]] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama2": {"model_type": "llama"},
    "llama3.1": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 1e5},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
}


def tiny_hf_config(family: Family) -> dict[str, Any]:
    """Returns the config.json dictionary of a model with 2 layers and hidden size 64."""
    return {**_SIZES, **_FAMILIES[family]}


def tiny_config(family: Family = "llama2") -> LlamaConfig:
    """Returns the configuration of a model with 2 layers and hidden size 64.

    >>> tiny_config("qwen3").qk_norm
    True
    """
    return LlamaConfig.from_hf(tiny_hf_config(family))


def random_model(config: LlamaConfig, key: Key, dtype: jax.typing.DTypeLike = jnp.float32) -> Llama:
    """Returns a model whose kernels are normal with variance 1 / in, so that activations keep their size.

    Norm scales are 1 plus a small noise and biases are small, so that no term of the forward pass is hidden.

    Example:
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> model.layers[0].self_attn.k_proj.kernel.shape
      (64, 32)
    """

    def make(path: str, shape: tuple[int, ...]) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, jnp.float32)
        if path.endswith("kernel"):
            values = noise / shape[0] ** 0.5
        elif path == "embed_tokens":
            values = noise
        else:
            values = 0.1 * noise + (0.0 if path.endswith("bias") else 1.0)
        return values.astype(dtype)

    return build(config, make)
