"""Writes GGUF files for tests, as llama.cpp's converter lays them out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from jquant.models import LlamaConfig

NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Spell a Hugging Face name as llama.cpp does."""
    if name in NAMES:
        return NAMES[name]
    _, _, index, rest = name.split(".", maxsplit=3)
    part, kind = rest.rsplit(".", maxsplit=1)
    return f"blk.{index}.{PARTS[part]}.{kind}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows for rotation of neighbours: file row 2 i + j of a head is row j (dim / 2) + i here."""
    dim = values.shape[0] // heads
    rows = [head * dim + j * (dim // 2) + i for head in range(heads) for i in range(dim // 2) for j in (0, 1)]
    return values[rows]


def metadata_of(architecture: str, config: LlamaConfig) -> dict[str, Any]:
    """Return the metadata that describes a configuration."""
    return {
        f"{architecture}.{name}": value
        for name, value in {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope.theta,
            "rope.dimension_count": config.head_dim,
        }.items()
    }


def write_gguf(
    file: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write metadata and tensors (by their GGUF names), some of them quantized; return the file."""
    writer = GGUFWriter(file, architecture)
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        writer.add_array(name, value) if isinstance(value, list) else add[type(value)](name, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name)
        writer.add_tensor(name, values if kind is None else quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(architecture: str, config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Hugging Face's tensors under GGUF names, rotary rows interleaved where llama.cpp does so."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    permuted = architecture == "llama"
    return {
        gguf_name(name): interleave(values, heads[name.split(".")[-2]])
        if permuted and name.split(".")[-2] in heads
        else values
        for name, values in tensors.items()
    }
