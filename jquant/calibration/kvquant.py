"""Calibration of KVQuant's cache: ranges of keys from one pass over some text, codebooks from gradients in a second.

A signpost's error matters as much as the loss feels it. With L the next-token loss, g = dL / dx of a key or value x,
and n(x) what the codec rounds, the codebook of a layer's keys, and of its values, minimises

    sum over all x that are no outliers of  g^2 |n(x) - nearest signpost|^2

which is the diagonal of the Fisher information in KVQuant (arXiv:2401.18079, section 3.2). The first pass goes block by
block over all windows and takes the thresholds of each channel of the keys; the second goes window by window, forward
and back, and adds to a histogram a layer, so that the block inputs of one window are the most that is held at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.calibration.absmax import refuse_infinite
from jquant.calibration.kv import fingerprint, put_codecs
from jquant.calibration.sequential import advance, dense_kernels
from jquant.errors import CalibrationError
from jquant.kv import Codebook, ExactKv, KvQuant, Prompt, check_kvquant, normalize_keys, normalize_values
from jquant.kv.vectors import ScaleDtype
from jquant.models import BLOCK_LINEARS, Block, Llama, LlamaConfig, blocks, embed, exact_block, next_token_losses, put
from jquant.numerics import Histogram, count_values, match_spread, weighted_kmeans

type Ranges = tuple[Float[Array, "heads dim"], Float[Array, "heads dim"]]


def calibrate_kvquant(
    model: Llama,
    tokens: Int[Array, "samples length"],
    *,
    bits: int = 4,
    outliers: float = 0.01,
    key_slots: int | None = None,
    sinks: int = 1,
    qnorm: bool = False,
    float_dtype: ScaleDtype = "float16",
    prompt: Prompt = "stored",
) -> Llama:
    """Returns the model with KVQuant's cache, calibrated with the weights as they are and exact activations.

    Input quantizers are left out of the calibration: their rounding has no gradient.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows, longer than `sinks`.
      bits: see `KvQuant`, as the others.
      outliers: share of the numbers that are kept as they came.
      key_slots: outliers of a token's key that are kept.
      sinks: tokens at the beginning that are kept exact; they take no part in ranges and codebooks.
      qnorm: whether codes stand for levels that keep mean and deviation, instead of for the signposts.
      float_dtype: how outliers and the ranges of values are stored.
      prompt: what a prompt's own queries see.

    Raises:
      FormatError: a setting is out of its range.
      CalibrationError: activations or gradients are not finite, or the windows are no longer than `sinks`.
    """
    check_kvquant(bits, outliers, key_slots, sinks, model.config.num_key_value_heads * model.config.head_dim)
    if tokens.shape[1] <= sinks:
        raise CalibrationError(
            f"windows of {tokens.shape[1]} tokens, of which the first {sinks} are kept exact: nothing is left to "
            "calibrate on; give longer windows or fewer sinks"
        )
    ranges = _key_ranges(model, tokens, outliers, sinks)
    histograms = _histograms(model, tokens, ranges, outliers, sinks)
    own = fingerprint(model)
    codecs = [
        KvQuant(
            low,
            high,
            _fit_codebook(keys, bits, qnorm=qnorm),
            _fit_codebook(values, bits, qnorm=qnorm),
            bits=bits,
            outliers=outliers,
            key_slots=key_slots,
            sinks=sinks,
            float_dtype=float_dtype,
            prompt=prompt,
            calibrated_for=own,
        )
        for (low, high), (keys, values) in zip(ranges, histograms, strict=True)
    ]
    return put_codecs(model, codecs)


def _fit_codebook(histogram: Histogram, bits: int, *, qnorm: bool) -> Codebook:
    signposts = weighted_kmeans(histogram, 2**bits)
    levels = match_spread(histogram, signposts) if qnorm else signposts
    return Codebook(jnp.asarray(signposts, jnp.float32), jnp.asarray(levels, jnp.float32))


def _key_ranges(model: Llama, tokens: Int[Array, "samples length"], share: float, sinks: int) -> tuple[Ranges, ...]:
    """Returns the thresholds of every layer's keys, the share / 2 and 1 - share / 2 quantiles of each channel."""
    x, found = embed(model, tokens), []
    for index, layer in enumerate(blocks(model)):
        x, ranges, finite = _channel_quantiles(_plain(layer), x, jnp.float32(share), sinks, model.config)
        refuse_infinite(index, finite)
        found.append(ranges)
    return tuple(found)


def _histograms(
    model: Llama, tokens: Int[Array, "samples length"], ranges: tuple[Ranges, ...], share: float, sinks: int
) -> list[tuple[Histogram, Histogram]]:
    """Returns, for every layer, the histograms of normalized keys and values weighted by squared gradients."""
    layers, config = blocks(model), model.config
    sums: list[tuple[Histogram, Histogram] | None] = [None] * len(layers)
    for window in tokens:
        x, inputs = embed(model, window[None]), []
        for layer in layers:
            inputs.append(x)
            x = advance(_plain(layer), x, config)
        slope = _loss_slope(model, x, window)
        for index in reversed(range(len(layers))):
            plain = _plain(layers[index])
            slope, points = _pull_back(plain, inputs.pop(), slope, ranges[index], config, (share, sinks))
            keys, values = (count_values(*one) for one in jax.device_get(points))
            old = sums[index]
            sums[index] = (keys, values) if old is None else (old[0].plus(keys), old[1].plus(values))
    return [pair for pair in sums if pair is not None]


def _plain(layer: Block) -> Block:
    """Returns a block with dense weights, exact activations and an exact cache."""
    exact: Block = put(layer, "self_attn.kv_codec", ExactKv())
    for name in BLOCK_LINEARS:
        exact = put(exact, f"{name}.input_quantizer", None)
    return dense_kernels(exact)


def _no_shifts(tokens: int, config: LlamaConfig, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros((tokens, config.num_key_value_heads, config.head_dim), dtype)
    return zeros, zeros


@functools.partial(jax.jit, static_argnums=(3, 4))
def _channel_quantiles(
    layer: Block, x: Float[Array, "samples tokens hidden"], share: Float[Array, ""], sinks: int, config: LlamaConfig
) -> tuple[Float[Array, "samples tokens hidden"], Ranges, Bool[Array, ""]]:
    """Runs a block over all samples, one at a time; also returns the quantiles of its keys, and if all is finite."""
    none = _no_shifts(x.shape[1], config, x.dtype)

    def run(sample: Float[Array, "tokens hidden"]) -> tuple[jax.Array, jax.Array]:
        y, (keys, _) = exact_block(layer, sample[None], none, config)
        return y[0], keys[0, sinks:]

    outputs, keys = jax.lax.map(run, x)
    channels = keys.astype(jnp.float32).reshape(-1, *keys.shape[2:]).transpose(1, 2, 0)
    low, high = jnp.quantile(channels, jnp.stack([share / 2.0, 1.0 - share / 2.0]), axis=-1)
    return outputs, (low, high), jnp.all(jnp.isfinite(outputs)) & jnp.all(jnp.isfinite(channels))


@jax.jit
def _loss_slope(
    model: Llama, x: Float[Array, "1 tokens hidden"], window: Int[Array, "tokens"]
) -> Float[Array, "1 tokens hidden"]:
    """Returns the gradient of the summed next-token loss with regard to the last block's output.

    The sum instead of the mean: a factor changes no codebook, and squares of small gradients keep their digits.
    """
    return jax.grad(lambda states: jnp.sum(next_token_losses(model, states, window[None])))(x)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _pull_back(
    layer: Block,
    x: Float[Array, "1 tokens hidden"],
    slope: Float[Array, "1 tokens hidden"],
    ranges: Ranges,
    config: LlamaConfig,
    settings: tuple[float, int],
) -> tuple[Float[Array, "1 tokens hidden"], tuple[tuple[jax.Array, jax.Array], ...]]:
    """Returns the gradient with regard to a block's input, and the points of its keys and values with their weights."""
    share, sinks = settings

    def run(x: jax.Array, shifts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return exact_block(layer, x, shifts, config)

    _, pull, seen = jax.vjp(run, x, _no_shifts(x.shape[1], config, x.dtype), has_aux=True)
    before, slopes = pull(slope)
    keys, values = (array[0, sinks:].astype(jnp.float32) for array in seen)
    weights = [jnp.square(array[sinks:].astype(jnp.float32)) for array in slopes]
    points = normalize_keys(keys, *ranges), normalize_values(values, share, "float32").values.reshape(values.shape)
    return before, tuple(zip(points, weights, strict=True))
