"""Sizes and switches of the Llama family, under the names that Hugging Face's config.json uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from jquant.errors import ConversionError
from jquant.types import DType

type RopeScaling = Literal["default", "linear", "llama3"]
type PromptAttention = Literal["cudnn", "tokamax", "xla"]  # see `prompts.causal_attention`; XLA's for tests

# What a scaling rule cannot do without, as in transformers.
_ROPE_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# What each family's code in transformers does beyond its config.json: (bias of q, k, v; bias of o; q/k norm).
# None: the config's own `attention_bias` decides.
_FAMILIES: Final[Mapping[str, tuple[bool | None, bool | None, bool]]] = {
    "llama": (None, None, False),
    "mistral": (False, False, False),
    "qwen2": (True, False, False),
    "qwen3": (None, None, True),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and scaling rule.

    Attributes:
      theta: base of the geometric series of wavelengths.
      scaling: "default", "linear" (positions divided by `factor`) or "llama3" (long wavelengths divided by it).
      factor: the divisor.
      low_freq_factor: llama3: wavelengths above original / low_freq_factor are divided whole.
      high_freq_factor: llama3: wavelengths below original / high_freq_factor are kept.
      original_max_position_embeddings: llama3: the context that the model was first trained on.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises:
          ConversionError: the scaling rule is none of ours, or lacks an entry.
        """
        rules = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        kind: Any = rules.get("rope_type") or rules.get("type") or "default"
        if kind not in _ROPE_KEYS:
            raise ConversionError(f"rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
        missing = [name for name in _ROPE_KEYS[kind] if rules.get(name) is None]
        if missing:
            raise ConversionError(f"rope scaling {kind!r} has no {', '.join(missing)}; is config.json complete?")
        return cls(
            theta=float(rules.get("rope_theta") or config.get("rope_theta") or cls.theta),
            scaling=kind,
            factor=float(rules.get("factor", cls.factor)),
            low_freq_factor=float(rules.get("low_freq_factor", cls.low_freq_factor)),
            high_freq_factor=float(rules.get("high_freq_factor", cls.high_freq_factor)),
            original_max_position_embeddings=int(
                rules.get("original_max_position_embeddings", cls.original_max_position_embeddings)
            ),
        )


@dataclass(frozen=True)
class LlamaConfig:
    """Everything static about a model of the Llama family; Mistral, Qwen2, Qwen3 and SmolLM2 are values of it.

    Attributes are named and meant as in Hugging Face's config.json; beyond those:
      attention_bias: whether q_proj, k_proj and v_proj have a bias.
      output_bias: whether o_proj has one.
      qk_norm: whether each query and key head is RMS-normalised before RoPE (Qwen3).
      sliding_window: tokens that a query sees, itself among them; None for all before it.
      wide_residual: whether the residual stream of a model in bfloat16 is float32 between blocks and up to the norms,
        which round once: `jquant.targets.prepare` decides it.
      prompt_attention: what attends to whole prompts, but for codecs whose prompts are streamed; None for the model
        itself. `prepare` decides this too.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    model_type: str = "llama"
    wide_residual: bool = False
    prompt_attention: PromptAttention | None = None

    def residual_dtype(self, dtype: DType) -> DType:
        """Returns the dtype of the residual stream of a model whose embedding table has a dtype."""
        return "float32" if self.wide_residual else dtype

    def norm_dtype(self, dtype: DType) -> DType:
        """Returns the dtype of what norms give, and so of all activations, of a residual stream of a dtype."""
        return "bfloat16" if self.wide_residual else dtype

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dictionary of a config.json.

        Raises:
          ConversionError: a key is missing, or the model needs something that is not built here; it is named.
        """
        family = str(config.get("model_type"))
        if family not in _FAMILIES:
            raise ConversionError(f"model_type {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ConversionError(f"hidden_act {config['hidden_act']!r} is not supported; supported: silu")
        if config.get("use_sliding_window"):
            raise ConversionError("use_sliding_window=true (a window in some layers only) is not supported")
        qkv_bias, output_bias, qk_norm = _FAMILIES[family]
        own_bias = bool(config.get("attention_bias", False))
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_hidden_layers=int(config["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                max_position_embeddings=int(config.get("max_position_embeddings", cls.max_position_embeddings)),
                rms_norm_eps=float(config.get("rms_norm_eps", cls.rms_norm_eps)),
                rope=RopeConfig.from_hf(config),
                attention_bias=own_bias if qkv_bias is None else qkv_bias,
                output_bias=own_bias if output_bias is None else output_bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
                qk_norm=qk_norm,
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                sliding_window=config.get("sliding_window") if family == "mistral" else None,
                model_type=family,
            )
        except KeyError as error:
            raise ConversionError(
                f"config.json of this {family} model has no {error}; is the folder complete?"
            ) from error
