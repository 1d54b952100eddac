"""Calibration of KVQuant's cache: ranges of keys from one pass over some text, codebooks from gradients in a second.

A signpost's error matters as much as the loss feels it. With L the next-token loss, g = dL / dx of a key or value x,
and n(x) what the codec rounds, the codebook of a layer's keys, and of its values, minimises

    sum over all x that are no outliers of  g^2 |n(x) - nearest signpost|^2

which is the diagonal of the Fisher information in KVQuant (arXiv:2401.18079, section 3.2). The first pass goes block by
block over all windows and takes the thresholds of each channel of the keys; the second goes forward and back, and adds
to a histogram a layer. A model in memory takes one window after another, so that the block inputs of one are the most
that is held. One that is read from disk takes block after block, each read twice, and keeps the inputs of all blocks
(`--activations`). Both run the same programs on each window, and add histograms in one order: the same bits.
"""

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.blocks import Lanes, Offloaded
from jquant.calibration.kv import fingerprint
from jquant.calibration.sequential import advance, dense_kernels
from jquant.calibration.walk import NOTHING_KEPT, Keeping, observe_all, open_inputs, refuse_infinite
from jquant.errors import CalibrationError
from jquant.kv import Codebook, ExactKv, KvQuant, Prompt, check_kvquant, normalize_keys, normalize_values
from jquant.kv.vectors import ScaleDtype
from jquant.models import (
    BLOCK_LINEARS,
    Block,
    LazyModel,
    Llama,
    LlamaConfig,
    blocks,
    embed,
    exact_block,
    lazily,
    next_token_losses,
    put,
)
from jquant.numerics import Histogram, count_values, match_spread, weighted_kmeans

type Ranges = tuple[Float[Array, "heads dim"], Float[Array, "heads dim"]]
type Pair = tuple[Histogram, Histogram]  # of keys and of values


def calibrate_kvquant(
    model: Llama | LazyModel,
    tokens: Int[Array, "samples length"],
    keeping: Keeping = NOTHING_KEPT,
    *,
    bits: int = 4,
    outliers: float = 0.01,
    key_slots: int | None = None,
    sinks: int = 1,
    qnorm: bool = False,
    float_dtype: ScaleDtype = "float16",
    prompt: Prompt = "stored",
) -> tuple[KvQuant, ...]:
    """Returns KVQuant's cache for each layer, calibrated with the weights as they are and exact activations.

    Input quantizers are left out of the calibration: their rounding has no gradient. Each of several processes
    calibrates on its own devices.

    Args:
      model: the model, its layers a tuple; one that is read by path is read a block at a time.
      tokens: calibration windows, longer than `sinks`.
      keeping: where activations are kept, and over which devices windows are spread.
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
    lazy, keeping = lazily(model), keeping.here()
    config = lazy.abstract.config
    check_kvquant(bits, outliers, key_slots, sinks, config.num_key_value_heads * config.head_dim)
    if tokens.shape[1] <= sinks:
        raise CalibrationError(
            f"windows of {tokens.shape[1]} tokens, of which the first {sinks} are kept exact: nothing is left to "
            "calibrate on; give longer windows or fewer sinks"
        )
    ranges = _key_ranges(lazy, tokens, keeping, outliers, sinks)
    work = _Work(config, ranges, outliers, sinks)
    histograms = (
        _by_window(model, tokens, keeping, work) if isinstance(model, Llama) else _by_block(lazy, tokens, keeping, work)
    )
    own = fingerprint(lazy)
    return tuple(
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
    )


def _fit_codebook(histogram: Histogram, bits: int, *, qnorm: bool) -> Codebook:
    signposts = weighted_kmeans(histogram, 2**bits)
    levels = match_spread(histogram, signposts) if qnorm else signposts
    return Codebook(jnp.asarray(signposts, jnp.float32), jnp.asarray(levels, jnp.float32))


def _key_ranges(
    model: LazyModel, tokens: Int[Array, "samples length"], keeping: Keeping, share: float, sinks: int
) -> tuple[Ranges, ...]:
    """Returns the thresholds of every layer's keys, the share / 2 and 1 - share / 2 quantiles of each channel."""
    config, found = model.abstract.config, []

    def observe(layer: Block, windows: Array, before: Any) -> tuple[Array, Any]:
        outputs, keys, finite = _observe_keys(layer, windows, sinks, config)
        return outputs, (*(before or ()), (keys, finite))

    with open_inputs(model, tokens, keeping) as inputs:
        for index in range(len(blocks(model.abstract))):
            layer = _plain(model.read(f"layers.{index}"))
            inputs, seen = observe_all(layer, inputs, observe, lambda first, second: (*first, *second))
            refuse_infinite(index, jnp.all(jnp.stack([finite for _, finite in seen])))
            found.append(_channel_quantiles(tuple(keys for keys, _ in seen), jnp.float32(share)))
    return tuple(found)


@dataclass(frozen=True)
class _Work:
    """What the second pass knows: sizes, thresholds of each layer, share of outliers, sinks."""

    config: LlamaConfig
    ranges: tuple[Ranges, ...]
    share: float
    sinks: int

    def pull(self, layer: Block, index: int, x: Array, slope: Array) -> tuple[Array, Pair]:
        """Returns the gradient before a block, and the histograms of one window's keys and values in it."""
        before, points = _pull_back(layer, x, slope, self.ranges[index], self.config, (self.share, self.sinks))
        keys, values = (count_values(*one) for one in jax.device_get(points))
        return before, (keys, values)


def _by_window(model: Llama, tokens: Int[Array, "samples length"], keeping: Keeping, work: _Work) -> list[Pair]:
    """Returns the histograms of every layer, weighted by squared gradients: each window forward and back."""

    def lane(own: tuple[Llama, tuple[Ranges, ...]], windows: Array) -> list[Pair | None]:
        here, layers = replace(work, ranges=own[1]), blocks(own[0])
        sums: list[Pair | None] = [None] * len(layers)
        for window in windows:
            x, inputs = embed(own[0], window[None]), []
            for layer in layers:
                inputs.append(x)
                x = advance(_plain(layer), x, work.config)
            slope = _loss_slope(_ends(lazily(own[0])), x, window)
            for index in reversed(range(len(layers))):
                slope, found = here.pull(_plain(layers[index]), index, inputs.pop(), slope)
                sums[index] = _plus(sums[index], found)
        return sums

    lanes = Lanes.make(len(tokens), keeping.devices, lambda run: tokens[run])
    parts = lanes.map(lane, (model, work.ranges)).parts
    return [functools.reduce(_plus, pairs) for pairs in zip(*parts, strict=True)]


def _by_block(model: LazyModel, tokens: Int[Array, "samples length"], keeping: Keeping, work: _Work) -> list[Pair]:
    """Returns what `_by_window` does, block by block: all windows forward, then all back."""
    norm = model.read("norm")
    table = replace(model.abstract, layers=(), embed_tokens=model.read("embed_tokens"), norm=norm, lm_head=None)
    windows = Lanes.make(len(tokens), keeping.devices, lambda run: tokens[run])
    found: list[Pair] = []
    with contextlib.ExitStack() as files:
        lanes = windows.map(functools.partial(_begin, len(work.ranges), keeping), table)
        for trail in lanes.parts:
            if isinstance(trail.kept, Offloaded):
                files.enter_context(contextlib.closing(trail.kept.file))
        del table
        for index in range(len(work.ranges)):
            lanes = lanes.map(functools.partial(_forward, index, work), _plain(model.read(f"layers.{index}")))
        lanes = lanes.map(functools.partial(_turn, len(work.ranges)), _ends(model))
        for index in reversed(range(len(work.ranges))):
            own = _plain(model.read(f"layers.{index}")), work.ranges
            found.append(functools.reduce(_plus, lanes.map(functools.partial(_back, index, work), own).parts))
    return found[::-1]


@final
@dataclass(frozen=True)
class _Trail:
    """One lane's windows, with the inputs of all blocks, and then the gradients there, by block and window."""

    windows: Int[Array, "windows length"]
    kept: dict[int, Array] | Offloaded

    def keep(self, index: int, row: int, x: Array) -> None:
        """Keeps what a block sees of a window, or its gradient."""
        at = index * len(self.windows) + row
        if isinstance(self.kept, Offloaded):
            self.kept.put(at, x)
        else:
            self.kept[at] = x

    def take(self, index: int, row: int) -> Array:
        """Returns what is kept."""
        at = index * len(self.windows) + row
        return self.kept.get(at) if isinstance(self.kept, Offloaded) else self.kept[at]

    def drop(self, index: int, row: int) -> None:
        """Forgets what is not needed any more."""
        if not isinstance(self.kept, Offloaded):
            del self.kept[index * len(self.windows) + row]


def _begin(depth: int, keeping: Keeping, table: Llama, windows: Array) -> _Trail:
    """Returns a trail with what the first block sees."""
    kept: dict[int, Array] | Offloaded = {}
    if keeping.activations != "device":
        rows, length = windows.shape
        shape = ((depth + 1) * rows, length, table.config.hidden_size)
        kept = replace(keeping.room(shape, table.embed_tokens.dtype), piece=1)
    trail = _Trail(windows, kept)
    for row, window in enumerate(windows):
        trail.keep(0, row, embed(table, window[None]))
    return trail


def _forward(index: int, work: _Work, layer: Block, trail: _Trail) -> _Trail:
    """Runs a block over a lane's windows."""
    for row in range(len(trail.windows)):
        trail.keep(index + 1, row, advance(layer, trail.take(index, row), work.config))
    return trail


def _turn(depth: int, ends: Llama, trail: _Trail) -> _Trail:
    """Puts the gradients of the loss in the place of the last block's outputs."""
    for row, window in enumerate(trail.windows):
        trail.keep(depth, row, _loss_slope(ends, trail.take(depth, row), window))
    return trail


def _back(index: int, work: _Work, own: tuple[Block, tuple[Ranges, ...]], trail: _Trail) -> Pair:
    """Takes the gradients back through a block; returns the histograms of its keys and values."""
    here, sums = replace(work, ranges=own[1]), None
    for row in range(len(trail.windows)):
        slope, found = here.pull(own[0], index, trail.take(index, row), trail.take(index + 1, row))
        trail.keep(index, row, slope)
        trail.drop(index + 1, row)
        sums = _plus(sums, found)
    assert sums is not None
    return sums


def _plus(old: Pair | None, new: Pair) -> Pair:
    return new if old is None else (old[0].plus(new[0]), old[1].plus(new[1]))


def _ends(model: LazyModel) -> Llama:
    """Returns what of a model the loss of states needs: norm and head, or the table where it is the head."""
    tied = model.abstract.lm_head is None
    table: Any = model.read("embed_tokens") if tied else None
    head = None if tied else model.read("lm_head")
    return replace(model.abstract, layers=(), embed_tokens=table, norm=model.read("norm"), lm_head=head)


def _plain(layer: Block) -> Block:
    """Returns a block with dense weights, exact activations and an exact cache."""
    exact: Block = put(layer, "self_attn.kv_codec", ExactKv())
    for name in BLOCK_LINEARS:
        exact = put(exact, f"{name}.input_quantizer", None)
    return dense_kernels(exact)


def _no_shifts(tokens: int, config: LlamaConfig, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros((tokens, config.num_key_value_heads, config.head_dim), dtype)
    return zeros, zeros


@functools.partial(jax.jit, static_argnums=(2, 3))
def _observe_keys(
    layer: Block, x: Float[Array, "samples tokens hidden"], sinks: int, config: LlamaConfig
) -> tuple[Float[Array, "samples tokens hidden"], Float[Array, "samples rest heads dim"], Bool[Array, ""]]:
    """Runs a block over some windows, one at a time; also returns their keys, and if all is finite."""
    none = _no_shifts(x.shape[1], config, x.dtype)

    def run(sample: Float[Array, "tokens hidden"]) -> tuple[jax.Array, jax.Array]:
        y, (keys, _) = exact_block(layer, sample[None], none, config)
        return y[0], keys[0, sinks:]

    outputs, keys = jax.lax.map(run, x)
    return outputs, keys.astype(jnp.float32), jnp.all(jnp.isfinite(outputs)) & jnp.all(jnp.isfinite(keys))


@jax.jit
def _channel_quantiles(keys: tuple[Float[Array, "_ rest heads dim"], ...], share: Float[Array, ""]) -> Ranges:
    """Returns the quantiles of each channel over all windows."""
    together = jnp.concatenate(keys)
    channels = together.reshape(-1, *together.shape[2:]).transpose(1, 2, 0)
    low, high = jnp.quantile(channels, jnp.stack([share / 2.0, 1.0 - share / 2.0]), axis=-1)
    return low, high


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
