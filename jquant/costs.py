"""What calibration costs, from shapes alone: floating-point operations and memory.

A multiplication and an addition are two operations. With b the tokens of all windows, L those of one, n and m the
inputs and outputs of a linear or of a solve:

    a linear              2 b n m
    attention             4 b L heads head_dim            (scores and context; nothing saved for the causal half)
    a Hessian             2 b n^2
    a GPTQ solve          4/3 n^3 + 6 n^2 m               (factor and inverse; spreading errors; two proxy losses)

Each collection runs its block as far as the last site that it sums; then the solved block runs once over all windows.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import jax

from jquant.blocks import SITES
from jquant.models import Block, LlamaConfig, get

_FLOAT32: Final = 4  # bytes
_SCORES: Final = 3  # copies of one window's attention scores alive at once; memory_analysis of `advance` on CPU
_SOLVE_SQUARES: Final = 8  # arrays [n, n] alive at once in a GPTQ solve; memory_analysis at n, m = 576 to 3072 on CPU
_ROUNDED: Final = 10  # bytes a weight that rounding a matrix takes at once; memory_analysis of RTN's solve on CPU
_TRAINED: Final = 6  # arrays of a trained block's size alive at once; memory_analysis of `train_block` on CPU
_KEPT_HIDDEN: Final = 16  # arrays [tokens, hidden] that one window's gradient keeps, likewise
_KEPT_INNER: Final = 8  # arrays [tokens, inner], likewise
_SEARCHED: Final = 9  # bytes a weight that judging an alpha takes at once; memory_analysis of `measure_rounding` on CPU
_QUANTILES: Final = 12  # bytes a number that a channel's quantiles take: float32, its copy, and that sorted; likewise
_DEVICE_SQUARES: Final = 3  # the same on an H100: 26.2 GB at the peak of Llama-3.1-8B's GPTQ, 2.2 of them working
_SOLVE_WEIGHTS: Final = 4  # arrays [n, m], likewise
_LOGITS: Final = 256  # positions whose logits are alive at once where a loss is differentiated
_SQUARES: Final = 12  # arrays [hidden, hidden] alive at once in a step of Cayley SGD; `train_step` on CPU


class Work(NamedTuple):
    """Operations of a run.

    Attributes:
      forward: blocks run over calibration text.
      statistics: what is summed over it.
      solves: the solves themselves.
    """

    forward: int = 0
    statistics: int = 0
    solves: int = 0

    def plus(self, other: "Work") -> "Work":
        """Returns the sums."""
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))


def forward_operations(block: Block, config: LlamaConfig, length: int) -> Mapping[str, int]:
    """Returns the operations of one window from a block's beginning to each site's inputs, and to its "end".

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      length: tokens of the window.
    """
    attention = 4 * length * length * config.num_attention_heads * config.head_dim
    after = {
        site: 2 * length * sum(math.prod(get(block, name).kernel.shape) for name in names)
        for site, names in SITES.items()
    }
    steps = [0, after["attention_input"] + attention, *list(after.values())[1:]]
    return dict(zip((*SITES, "end"), itertools.accumulate(steps), strict=True))


def hessian_operations(features: int, tokens: int) -> int:
    """Returns the operations of summing x x^T."""
    return 2 * tokens * features**2


def solve_operations(inputs: int, outputs: int) -> int:
    """Returns the operations of one GPTQ solve."""
    return 4 * inputs**3 // 3 + 6 * inputs**2 * outputs


def working_nbytes(config: LlamaConfig, length: int, solves: Iterable[tuple[int, int]]) -> int:
    """Returns the bytes that calibration needs beside models and activations: the larger of attention and a solve.

    Args:
      config: the model's sizes.
      length: tokens of a window; 0 if nothing is run.
      solves: (in, out) of the solves that have a Hessian.
    """
    largest = max((_SOLVE_SQUARES * n * n + _SOLVE_WEIGHTS * n * m for n, m in solves), default=0)
    return _FLOAT32 * max(_scores(config, length), largest)


def device_working_nbytes(config: LlamaConfig, length: int, solves: Iterable[tuple[int, int]]) -> int:
    """Returns `working_nbytes` of a GPU: a solve holds three arrays [n, n], as was measured on an H100."""
    return _FLOAT32 * max(_scores(config, length), max((_DEVICE_SQUARES * n * n for n, _ in solves), default=0))


def rounding_nbytes(inputs: int, outputs: int) -> int:
    """Returns the bytes that a solve without a Hessian needs beside its kernel."""
    return _ROUNDED * inputs * outputs


def searching_nbytes(block: Block, config: LlamaConfig, length: int) -> int:
    """Returns the bytes that a search for SmoothQuant's alpha needs beside a block: it rounded, and a window's scores.

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      length: tokens of a window.
    """
    return _SEARCHED * _weights(block) + _FLOAT32 * _scores(config, length)


def observing_nbytes(block: Block, config: LlamaConfig, length: int) -> int:
    """Returns the bytes that measuring caches needs beside models and activations: a dense block, one window's cache.

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      length: tokens of a window.
    """
    cache = 2 * length * config.num_key_value_heads * config.head_dim
    return _FLOAT32 * (_weights(block) + _scores(config, length) + cache)


def training_nbytes(block: Block, config: LlamaConfig, length: int) -> int:
    """Returns the bytes that training a block needs beside models and activations: weights, moments, one window.

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      length: tokens of a window.
    """
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(block))
    return _FLOAT32 * (_TRAINED * weights + _kept_numbers(config, length))


def gradient_nbytes(config: LlamaConfig, length: int) -> int:
    """Returns the bytes that one window's gradient through all blocks needs beside the model, block by block.

    Args:
      config: the model's sizes.
      length: tokens of the window.
    """
    inputs = config.num_hidden_layers * length * config.hidden_size
    return _FLOAT32 * (inputs + _kept_numbers(config, length))


def codebook_nbytes(block: Block, config: LlamaConfig, samples: int, length: int) -> int:
    """Returns the bytes that fitting KVQuant's codebooks needs beside models and activations.

    The largest of: all keys of a layer, to be sorted; the head in float32 with some positions' logits and their
    gradients; a window's gradient through a block in float32, and the inputs of all blocks for that window.

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      samples: windows.
      length: tokens of a window.
    """
    keys = _QUANTILES * samples * length * config.num_key_value_heads * config.head_dim
    head = _FLOAT32 * config.vocab_size * (config.hidden_size + 2 * min(_LOGITS, length))
    return max(keys, head, gradient_nbytes(config, length) + _FLOAT32 * _weights(block))


def learning_operations(block: Block, config: LlamaConfig, length: int) -> int:
    """Returns the operations of one block and window in a step that learns rotations.

    Three forward passes: one, one to recompute it, and one for the gradient of its input; in each the inputs of two
    sites are turned and turned back.

    Args:
      block: the block; abstract will do.
      config: the model's sizes.
      length: tokens of the window.
    """
    return 3 * (forward_operations(block, config, length)["end"] + 8 * length * config.hidden_size**2)


def learning_nbytes(config: LlamaConfig, length: int) -> int:
    """Returns the bytes that learning rotations needs beside models: a window's gradient, logits, matrices.

    Args:
      config: the model's sizes.
      length: tokens of a window.
    """
    return gradient_nbytes(config, length) + _FLOAT32 * (_LOGITS * config.vocab_size + _SQUARES * config.hidden_size**2)


def _weights(block: Block) -> int:
    return sum(math.prod(get(block, name).kernel.shape) for names in SITES.values() for name in names)


def _scores(config: LlamaConfig, length: int) -> int:
    """Returns how many numbers one window's attention scores are, with their copies that are alive at once."""
    return _SCORES * config.num_attention_heads * length * length


def _kept_numbers(config: LlamaConfig, length: int) -> int:
    """Returns how many numbers the gradient of one block on one window keeps."""
    rows = _KEPT_HIDDEN * config.hidden_size + _KEPT_INNER * config.intermediate_size
    return _scores(config, length) + length * rows
