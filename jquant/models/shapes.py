"""Sizes of well-known models, from the config.json that each was published with, for plans and benchmarks."""

from collections.abc import Mapping
from typing import Final

from jquant.models.config import LlamaConfig, RopeConfig

_LLAMA3_ROPE: Final = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
SHAPES: Final[Mapping[str, LlamaConfig]] = {
    "smollm2-135m": LlamaConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, RopeConfig(100000.0), tie_word_embeddings=True
    ),
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, _LLAMA3_ROPE),
    "llama-3.1-70b": LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5, _LLAMA3_ROPE),
    "llama-3.1-405b": LlamaConfig(128256, 16384, 53248, 126, 128, 8, 128, 131072, 1e-5, _LLAMA3_ROPE),
    "qwen3-8b": LlamaConfig(
        151936, 4096, 12288, 36, 32, 8, 128, 40960, 1e-6, RopeConfig(1e6), qk_norm=True, model_type="qwen3"
    ),
}
