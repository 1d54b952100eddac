"""The shapes that tests and benchmarks share: linears of Llama-3.1 and the table of LUT-GEMM."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Linear:
    """A weight's shape.

    Attributes:
      name: where it is found.
      outputs: rows of the weight.
      inputs: columns of the weight, contiguous in memory.
    """

    name: str
    outputs: int
    inputs: int


# Hidden size, intermediate size and key-value width from the models' published config.json.
LLAMA_8B: Final = (
    Linear("llama-3.1-8b q, o", 4096, 4096),
    Linear("llama-3.1-8b k, v", 1024, 4096),
    Linear("llama-3.1-8b gate, up", 14336, 4096),
    Linear("llama-3.1-8b down", 4096, 14336),
)
LLAMA_70B: Final = (
    Linear("llama-3.1-70b q, o", 8192, 8192),
    Linear("llama-3.1-70b k, v", 1024, 8192),
    Linear("llama-3.1-70b gate, up", 28672, 8192),
    Linear("llama-3.1-70b down", 8192, 28672),
)
JOINED: Final = (  # what a runtime multiplies where it joins linears of one input
    Linear("llama-3.1-8b qkv", 6144, 4096),
    Linear("llama-3.1-8b gate and up", 28672, 4096),
    Linear("llama-3.1-70b qkv", 10240, 8192),
    Linear("llama-3.1-70b gate and up", 57344, 8192),
)
LUT_GEMM: Final = tuple(  # arXiv:2206.09557: h outputs of 4 h inputs, one token: its table of kernel times
    Linear(f"lut-gemm {outputs} x {inputs}", outputs, inputs)
    for outputs, inputs in (
        (512, 2048),
        (1024, 4096),
        (2048, 8192),
        (4096, 16384),
        (7168, 28672),
        (8192, 32768),
        (12288, 49152),
    )
)
SMALL: Final = (  # SmolLM2-135M, whose widths are no multiples of 128
    Linear("smollm2-135m q, o", 576, 576),
    Linear("smollm2-135m k, v", 192, 576),
    Linear("smollm2-135m gate, up", 1536, 576),
    Linear("smollm2-135m down", 576, 1536),
)
TOKENS: Final = (1, 8, 16, 64, 256, 2048, 8192)
