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
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.activations import ActivationMethod, PerToken
from jquant.blocks import SITES, collect_all
from jquant.calibration.walk import NOTHING_KEPT, Keeping, all_finite, observe_all, open_inputs, refuse_infinite
from jquant.errors import RecipeError
from jquant.formats import UniformFormat
from jquant.models import BLOCK_LINEARS, Block, LazyModel, Llama, LlamaConfig, blocks, get, lazily, prompt_block, put
from jquant.quantizers import ABSMAX, Rtn, WeightQuantizer
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
    model: Llama | LazyModel, tokens: Int[Array, "samples length"], search: AlphaSearch, keeping: Keeping = NOTHING_KEPT
) -> tuple[tuple[Mapping[str, Float[Array, "_"]], ...], tuple[AlphaError, ...]]:
    """Tries every candidate on every block, in one pass over the model.

    Args:
      model: the full-precision model, its layers a tuple.
      tokens: calibration windows.
      search: candidates and rounding.
      keeping: where activations are kept, and over which devices windows are spread.

    Returns:
      The largest activations, as `collect_absmax` gives them, and the error of each candidate in order.

    Raises:
      CalibrationError: a block gives something that is not finite; it is named.
      FormatError: the layers are stacked.
    """
    model, found, errors = lazily(model), [], []
    config = model.abstract.config

    def observe(own: tuple[Block, Any], windows: Array, before: Any) -> tuple[Array, Any]:
        wide = compute_dtype(windows.dtype)
        begun = (jnp.zeros(len(search.candidates), wide), jnp.zeros((), wide)) if before is None else before[0]
        outputs, sums = measure_rounding(*own, windows, begun, search, config)
        finite = all_finite(outputs)
        return outputs, (sums, finite if before is None else before[1] & finite)

    with open_inputs(model, tokens, keeping) as inputs:
        for index in range(len(blocks(model.abstract))):
            layer = model.read(f"layers.{index}")
            largest = collect_all(layer, inputs, tuple(SITES), ABSMAX, config)
            inputs, ((moved, added), finite) = observe_all((layer, largest), inputs, observe, _sum)
            refuse_infinite(index, finite)
            errors.append(moved / added)
            found.append(largest)
    means = jnp.mean(jnp.stack(errors), axis=0).tolist()
    return tuple(found), tuple(AlphaError(*pair) for pair in zip(search.candidates, means, strict=True))


def _sum(first: Any, second: Any) -> Any:
    """Returns the sums of two lanes, and whether both are of finite activations."""
    return jax.tree.map(jnp.add, first[0], second[0]), first[1] & second[1]


@functools.partial(jax.jit, static_argnums=(4, 5))
def measure_rounding(
    layer: Block,
    absmax: Mapping[str, Float[Array, "_"]],
    inputs: Float[Array, "samples tokens hidden"],
    begun: tuple[Float[Array, "alphas"], Float[Array, ""]],
    search: AlphaSearch,
    config: LlamaConfig,
) -> tuple[Float[Array, "samples tokens hidden"], tuple[Float[Array, "alphas"], Float[Array, ""]]]:
    """Returns B(x), the sums of |B_alpha(x) - B(x)|^2 for each alpha, and that of |B(x) - x|^2, of some windows.

    One program for all blocks.

    Args:
      layer: the block B.
      absmax: the largest magnitudes of its sites.
      inputs: x.
      begun: the sums to go on from.
      search: the alphas, and the rounding.
      config: the model's sizes.
    """
    wide, lengths = begun[1].dtype, jnp.full(1, inputs.shape[1], jnp.int32)

    def run(block: Block, sample: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        return prompt_block(block, sample[None], lengths, sample.shape[0], config)[0][0]

    def square(
        total: Float[Array, ""], found: Float[Array, "tokens hidden"], expected: Float[Array, "tokens hidden"]
    ) -> Float[Array, ""]:
        return total + jnp.sum(jnp.square(found.astype(wide) - expected.astype(wide)))

    def first(added: Float[Array, ""], sample: Float[Array, "tokens hidden"]) -> tuple[Array, Array]:
        output = run(layer, sample)
        return square(added, output, sample), output

    added, outputs = jax.lax.scan(first, begun[1], inputs)

    def error_of(candidate: tuple[Float[Array, ""], Float[Array, ""]]) -> Float[Array, ""]:
        rounded = _round(smooth_block(layer, absmax, candidate[0]), search)

        def add(total: Float[Array, ""], sample: tuple[Array, Array]) -> tuple[Float[Array, ""], None]:
            return square(total, run(rounded, sample[0]), sample[1]), None

        return jax.lax.scan(add, candidate[1], (inputs, outputs))[0]

    return outputs, (jax.lax.map(error_of, (jnp.asarray(search.candidates, wide), begun[0])), added)


def _round(layer: Block, search: AlphaSearch) -> Block:
    """Rounds a block's kernels, kept as numbers, and the inputs of its linears."""
    for name in BLOCK_LINEARS:
        kernel = get(layer, name).kernel
        tensor, _ = search.weights(kernel, None, jax.random.key(0))
        layer = put(layer, f"{name}.kernel", tensor.dequantize(kernel.dtype))
        layer = put(layer, f"{name}.input_quantizer", search.activations.fit(None))
    return layer
