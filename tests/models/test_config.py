"""Configurations: what each family's config.json means, in old and new spelling, and what is refused by name."""

from typing import Any, get_args

import pytest

from jquant.errors import ConversionError
from jquant.models import Family, LlamaConfig, RopeConfig, tiny_config, tiny_hf_config

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_32_1B = {  # the entries of meta-llama/Llama-3.2-1B that say anything of the architecture
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_real_config_is_read_whole() -> None:
    assert LlamaConfig.from_hf(LLAMA_32_1B) == LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
    )


def test_rope_in_the_spellings_of_three_transformers() -> None:
    expected = LlamaConfig.from_hf(LLAMA_32_1B)
    newest = without(LLAMA_32_1B, "rope_scaling", "rope_theta") | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}
    oldest = LLAMA_32_1B | {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}}
    assert LlamaConfig.from_hf(newest) == LlamaConfig.from_hf(oldest) == expected
    plain = without(LLAMA_32_1B, "rope_scaling", "rope_theta")
    for spelling in ({}, {"rope_scaling": None}, {"rope_scaling": {"rope_type": "default"}}):
        assert LlamaConfig.from_hf(plain | spelling).rope == RopeConfig(theta=10000.0)
    linear = plain | {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert LlamaConfig.from_hf(linear).rope == RopeConfig(1e6, "linear", 4.0)


def test_sizes_that_old_configs_leave_out() -> None:
    config = LlamaConfig.from_hf(without(LLAMA_32_1B, "num_key_value_heads", "head_dim", "rms_norm_eps"))
    assert (config.num_key_value_heads, config.head_dim) == (32, 64)
    assert config.rms_norm_eps == 1e-6  # the default of these four families in transformers
    assert LlamaConfig.from_hf(LLAMA_32_1B | {"head_dim": None}).head_dim == 64
    assert LlamaConfig.from_hf(LLAMA_32_1B | {"head_dim": 128}).head_dim == 128  # Mistral Nemo: not hidden / heads


BIASES = ("attention_bias", "output_bias", "mlp_bias", "qk_norm")


@pytest.mark.parametrize(
    ("family", "given", "switched_on"),
    [
        ("llama", {}, ()),
        ("llama", {"attention_bias": True}, ("attention_bias", "output_bias")),
        ("llama", {"mlp_bias": True}, ("mlp_bias",)),
        ("mistral", {}, ()),
        ("qwen2", {}, ("attention_bias",)),
        ("qwen3", {}, ("qk_norm",)),
        ("qwen3", {"attention_bias": True}, ("attention_bias", "output_bias", "qk_norm")),
    ],
)
def test_biases_and_norms_by_family(family: str, given: dict[str, bool], switched_on: tuple[str, ...]) -> None:
    config = LlamaConfig.from_hf(without(LLAMA_32_1B, "attention_bias") | {"model_type": family} | given)
    assert tuple(name for name in BIASES if getattr(config, name)) == switched_on
    assert config.model_type == family


def test_windows() -> None:
    mistral = LLAMA_32_1B | {"model_type": "mistral"}
    assert LlamaConfig.from_hf(mistral | {"sliding_window": 4096}).sliding_window == 4096
    assert LlamaConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None
    qwen = LLAMA_32_1B | {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False}
    assert LlamaConfig.from_hf(qwen).sliding_window is None  # written by Qwen2.5 and not meant


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"type": "dynamic"}, "rope_scaling": None}, "rope scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' has no low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' has no factor"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint):
        LlamaConfig.from_hf(LLAMA_32_1B | change)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_missing_sizes_are_named(key: str) -> None:
    with pytest.raises(ConversionError, match=f"config.json of this llama model has no '{key}'"):
        LlamaConfig.from_hf(without(LLAMA_32_1B, key))


@pytest.mark.parametrize("family", get_args(Family.__value__))
def test_tiny_configs_are_the_families(family: Family) -> None:
    config = tiny_config(family)
    assert config == LlamaConfig.from_hf(tiny_hf_config(family))
    assert (config.num_hidden_layers, config.hidden_size) == (2, 64)
    assert hash(config) == hash(tiny_config(family))  # static in a tree
