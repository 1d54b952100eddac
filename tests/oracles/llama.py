"""The Llama family in float64 numpy, one token and one head at a time, from a config.json and a table of arrays."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

type Arrays = Mapping[str, np.ndarray]  # path -> array; kernels are [in, out]


def rope_frequencies(config: Mapping[str, Any]) -> np.ndarray:
    """Angle per position of each pair, as Hugging Face documents `rope_scaling` (transformers 4 and 5 keys)."""
    dim = config["head_dim"]
    rules = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rules.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rules.get("rope_type", rules.get("type", "default"))
    frequencies = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        if kind == "linear":
            frequency /= rules["factor"]
        if kind == "llama3":
            original, factor = rules["original_max_position_embeddings"], rules["factor"]
            low, high = rules["low_freq_factor"], rules["high_freq_factor"]
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def rope(head: np.ndarray, position: int, frequencies: np.ndarray) -> np.ndarray:
    """Turn one head's vector: element i with element i + dim / 2, as complex numbers."""
    half = len(head) // 2
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def softmax(scores: np.ndarray) -> np.ndarray:
    terms = np.exp(scores - scores.max())
    return terms / terms.sum()


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None) -> np.ndarray:
    """[tokens, heads, dim] attends to [tokens, kv_heads, dim]; consecutive query heads share a KV head."""
    tokens, heads, dim = queries.shape
    share = heads // keys.shape[1]
    context = np.zeros_like(queries)
    for t in range(tokens):
        first = 0 if window is None else max(0, t - window + 1)
        for head in range(heads):
            seen = keys[first : t + 1, head // share]
            weights = softmax(seen @ queries[t, head] / np.sqrt(dim))
            context[t, head] = weights @ values[first : t + 1, head // share]
    return context


def linear(arrays: Arrays, path: str, x: np.ndarray) -> np.ndarray:
    return x @ arrays[f"{path}.kernel"] + arrays.get(f"{path}.bias", 0.0)


def block(config: Mapping[str, Any], arrays: Arrays, path: str, x: np.ndarray) -> np.ndarray:
    """One decoder layer over [tokens, hidden]."""
    eps, dim, tokens = config["rms_norm_eps"], config["head_dim"], len(x)
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    normed = rms_norm(x, arrays[f"{path}.input_layernorm"], eps)
    heads = {
        name: linear(arrays, f"{path}.self_attn.{name}_proj", normed).reshape(tokens, -1, dim)
        for name in ("q", "k", "v")
    }
    frequencies = rope_frequencies(config)
    for name in ("q", "k"):
        norm = arrays.get(f"{path}.self_attn.{name}_norm")
        if norm is not None:
            heads[name] = rms_norm(heads[name], norm, eps)
        heads[name] = np.array([[rope(head, t, frequencies) for head in row] for t, row in enumerate(heads[name])])
    context = attention(heads["q"], heads["k"], heads["v"], window).reshape(tokens, -1)
    x = x + linear(arrays, f"{path}.self_attn.o_proj", context)
    normed = rms_norm(x, arrays[f"{path}.post_attention_layernorm"], eps)
    gate = linear(arrays, f"{path}.mlp.gate_proj", normed)
    inner = gate / (1 + np.exp(-gate)) * linear(arrays, f"{path}.mlp.up_proj", normed)
    return x + linear(arrays, f"{path}.mlp.down_proj", inner)


def forward(config: Mapping[str, Any], arrays: Arrays, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] of one sequence."""
    x = arrays["embed_tokens"][tokens]
    for layer in range(config["num_hidden_layers"]):
        x = block(config, arrays, f"layers.{layer}", x)
    x = rms_norm(x, arrays["norm"], config["rms_norm_eps"])
    return x @ arrays["embed_tokens"].T if config.get("tie_word_embeddings") else linear(arrays, "lm_head", x)
