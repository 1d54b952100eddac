"""The search for SmoothQuant's alpha: round each block as it will be rounded, for every candidate, and compare.

For block B, its full-precision inputs x, and B_alpha the block smoothed with alpha, its weights and the inputs of all
its linears rounded:

    error(alpha) = mean over blocks of  |B_alpha(x) - B(x)|^2 / |B(x) - x|^2

the norms being over all calibration tokens. Dividing by what the block adds to its input lets each block count alike,
whatever the size of its activations. One alpha serves the whole model, as in the paper.

Xiao et al. 2023, arXiv:2211.10438.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.activations import ActivationMethod, PerToken
from jquant.calibration.absmax import measure_absmax, refuse_infinite
from jquant.errors import RecipeError
from jquant.formats import UniformFormat
from jquant.models import BLOCK_LINEARS, Block, Llama, LlamaConfig, blocks, embed, get, prompt_block, put
from jquant.quantizers import Rtn, WeightQuantizer
from jquant.transforms import check_alpha, smooth_block
from jquant.types import compute_dtype

# SmoothQuant's W8A8, on which its paper measures.
_WEIGHTS: Final = Rtn(UniformFormat(8, None, "symmetric"))
_ACTIVATIONS: Final = PerToken(8)


@dataclass(frozen=True)
class AlphaSearch:
    """Which alphas are tried, and the rounding that they are judged by.

    Attributes:
      candidates: the alphas, each 0 to 1; of equal errors the first wins.
      weights: how kernels are rounded; a quantizer that reads weights alone.
      activations: how the inputs of all linears are rounded; a method that needs no calibration.
    """

    candidates: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    weights: WeightQuantizer = _WEIGHTS
    activations: ActivationMethod = _ACTIVATIONS

    def __post_init__(self) -> None:
        """Refuses an empty search, alphas outside 0..1 and roundings that need statistics."""
        if not self.candidates:
            raise RecipeError("candidates is empty; list the alphas to try")
        for alpha in self.candidates:
            check_alpha(alpha)
        if self.weights.statistic is not None or self.activations.needs_absmax():
            raise RecipeError(
                f"alphas are judged by rounding that needs no statistics, not by {self.weights} and "
                f"{self.activations}; give rtn and per_token of the same bits"
            )


@dataclass(frozen=True)
class AlphaError:
    """One candidate and its error."""

    alpha: float
    error: float


def search_alpha(
    model: Llama, tokens: Int[Array, "samples length"], search: AlphaSearch
) -> tuple[tuple[Mapping[str, Float[Array, "_"]], ...], tuple[AlphaError, ...]]:
    """Tries every candidate on every block, in one pass over the model.

    Args:
      model: the full-precision model, its layers a tuple.
      tokens: calibration windows.
      search: candidates and rounding.

    Returns:
      The largest activations, as `collect_absmax` gives them, and the error of each candidate in order.

    Raises:
      CalibrationError: a block gives something that is not finite; it is named.
      FormatError: the layers are stacked.
    """
    inputs, found, errors = embed(model, tokens), [], []
    candidates = jnp.asarray(search.candidates, compute_dtype(inputs.dtype))
    for index, layer in enumerate(blocks(model)):
        outputs, largest, finite = measure_absmax(layer, inputs, model.config)
        refuse_infinite(index, finite)
        errors.append(measure_rounding(layer, inputs, outputs, largest, candidates, search, model.config))
        found.append(largest)
        inputs = outputs
    means = jnp.mean(jnp.stack(errors), axis=0).tolist()
    return tuple(found), tuple(AlphaError(*pair) for pair in zip(search.candidates, means, strict=True))


@functools.partial(jax.jit, static_argnums=(5, 6))
def measure_rounding(
    layer: Block,
    inputs: Float[Array, "samples tokens hidden"],
    outputs: Float[Array, "samples tokens hidden"],
    absmax: Mapping[str, Float[Array, "_"]],
    candidates: Float[Array, "alphas"],
    search: AlphaSearch,
    config: LlamaConfig,
) -> Float[Array, "alphas"]:
    """Returns |B_alpha(x) - B(x)|^2 / |B(x) - x|^2 of one block for each alpha; one program for all blocks."""
    wide, lengths = candidates.dtype, jnp.full(1, inputs.shape[1], jnp.int32)
    added = jnp.sum(jnp.square((outputs - inputs).astype(wide)))

    def error_of(alpha: Float[Array, ""]) -> Float[Array, ""]:
        rounded = _round(smooth_block(layer, absmax, alpha), search)

        def add(total: Float[Array, ""], sample: tuple[Array, Array]) -> tuple[Float[Array, ""], None]:
            given, expected = sample
            found = prompt_block(rounded, given[None], lengths, given.shape[0], config)[0][0]
            return total + jnp.sum(jnp.square(found.astype(wide) - expected.astype(wide))), None

        return jax.lax.scan(add, jnp.zeros((), wide), (inputs, outputs))[0] / added

    return jax.lax.map(error_of, candidates)


def _round(layer: Block, search: AlphaSearch) -> Block:
    """Rounds a block's kernels, kept as numbers, and the inputs of its linears."""
    for name in BLOCK_LINEARS:
        kernel = get(layer, name).kernel
        tensor, _ = search.weights(kernel, None, jax.random.key(0))
        layer = put(layer, f"{name}.kernel", tensor.dequantize(kernel.dtype))
        layer = put(layer, f"{name}.input_quantizer", search.activations.fit(None))
    return layer
