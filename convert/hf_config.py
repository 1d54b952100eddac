"""Hugging Face's config.json of a model of the tree: the inverse of `LlamaConfig.from_hf`."""

from collections.abc import Mapping
from typing import Any, Final

from jquant.models import LlamaConfig

_CLASSES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SAME: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "model_type",
)
_LLAMA3: Final = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def hf_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Returns the dictionary of a config.json from which `LlamaConfig.from_hf` reads the same configuration.

    Args:
      config: sizes and switches.
      dtype: of the arrays that are not packed, which readers take as the model's.

    Example:
      >>> from jquant.models import tiny_config
      >>> hf_config(tiny_config("qwen3"), "bfloat16")["architectures"]
      ['Qwen3ForCausalLM']
    """
    written: dict[str, Any] = {"architectures": [_CLASSES[config.model_type]], "dtype": dtype, "hidden_act": "silu"}
    written |= {name: getattr(config, name) for name in _SAME}
    written["rope_parameters"] = {"rope_theta": config.rope.theta, "rope_type": config.rope.scaling}
    if config.rope.scaling != "default":
        written["rope_parameters"]["factor"] = config.rope.factor
    if config.rope.scaling == "llama3":
        written["rope_parameters"] |= {name: getattr(config.rope, name) for name in _LLAMA3}
    if config.model_type in ("llama", "qwen3"):
        written["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        written["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        written["sliding_window"] = config.sliding_window
    return written
