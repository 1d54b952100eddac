"""What goes into a model's linears, and how far one model is from another.

For each block and tap, over text: range, moments, and the excess kurtosis E(x - m)^4 / (E(x - m)^2)^2 - 3, which is 0
for a normal distribution and large where few values are large; channels that carry far more than others; and, where the
input is quantized, the signal over the noise that this adds, SQNR = 10 log10(sum x^2 / sum (x - q)^2).

Between two models: the states after each block, the second model fed its own, and the divergence of what they predict,
KL(p || q) = sum_v p(v) log(p(v) / q(v)).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jquant.errors import DataError
from jquant.models import Block, Linear, Llama, LlamaConfig, blocks, embed, head, hidden_states, prompt_block

type OnBlock = Callable[[int, int], None]  # (blocks done, blocks in all)

OUTLIER: Final = 6.0  # times the median channel's root mean square that make a channel an outlier; LLM.int8()'s number
_ROTATED: Final = 0.5  # relative difference of embeddings from which two models are not in one basis
_POSITIONS: Final = 64  # whose logits of both models are held at once


@dataclass(frozen=True)
class TapStatistics:
    """Hold what one block's linears of one site are given.

    Attributes:
      block: the block, from 0.
      tap: the site: attention_input, attention_output, mlp_input or mlp_hidden; rotated, if the linear rotates it.
      low: the least value.
      high: the greatest.
      mean: of all values.
      deviation: their standard deviation.
      kurtosis: their excess kurtosis, biased, as `scipy.stats.kurtosis`.
      outlier_channels: channels whose root mean square is 6 times that of the median channel, or more.
      peak: the largest root mean square of a channel over that of the median channel; None where that one is silent.
      sqnr: of the input quantizer, in dB; None where there is none, and where nothing is lost.
    """

    block: int
    tap: str
    low: float
    high: float
    mean: float
    deviation: float
    kurtosis: float
    outlier_channels: int
    peak: float | None
    sqnr: float | None


@dataclass(frozen=True)
class BlockDistance:
    """Hold how far the states after one block are from the reference's.

    Attributes:
      block: the block, from 0.
      relative_error: |y - r| / |r| over all states.
      cosine: <y, r> / (|y| |r|).
    """

    block: int
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class Divergence:
    """Hold how what two models predict differs on text.

    Attributes:
      kl: mean of KL(reference || model), nats per token.
      kl_99: its 99th percentile over tokens.
      flips: share of tokens whose likeliest successor is another.
      tokens: how many tokens were looked at.
    """

    kl: float
    kl_99: float
    flips: float
    tokens: int


def tap_statistics(
    model: Llama, windows: Integer[np.ndarray, "count length"], *, on_block: OnBlock = lambda done, total: None
) -> tuple[TapStatistics, ...]:
    """Measure what each block's linears are given.

    Args:
      model: the model, its layers a tuple.
      windows: token ids.
      on_block: called after each block.

    Raises:
      DataError: there is no window, or ids are outside the vocabulary.
      FormatError: the layers are stacked.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> rows = tap_statistics(random_model(tiny_config(), jax.random.key(0)), np.ones((1, 8), np.int32))
      >>> len(rows), rows[0].tap, rows[0].sqnr
      (8, 'attention_input', None)
    """
    states = _embedded(model, windows)
    rows: list[TapStatistics] = []
    layers = blocks(model)
    for index, block in enumerate(layers):
        states, sums = _tap_sums(block, states, config=model.config)
        for tap in _linears(block):
            means = {name: np.asarray(value, np.float64) for name, value in sums[tap].items()}
            rows.append(_statistics(index, tap, means))
        on_block(index + 1, len(layers))
    return tuple(rows)


def share_basis(reference: Llama, model: Llama) -> bool:
    """Tell whether two models keep their residual streams in one basis; one that was rotated does not."""
    ours, theirs = (np.asarray(one.embed_tokens, np.float64) for one in (model, reference))
    return ours.shape == theirs.shape and bool(np.linalg.norm(ours - theirs) < _ROTATED * np.linalg.norm(theirs))


def block_distances(
    reference: Llama,
    model: Llama,
    windows: Integer[np.ndarray, "count length"],
    *,
    on_block: OnBlock = lambda done, total: None,
) -> tuple[BlockDistance, ...]:
    """Measure how far the states after each block are from a reference's; each model is fed its own.

    Args:
      reference: the model to be near to, its layers a tuple.
      model: the other one.
      windows: token ids.
      on_block: called after each block.

    Raises:
      DataError: as `tap_statistics`; or the models have other sizes or are not in one basis, so that a distance would
        say nothing.
    """
    if len(blocks(reference)) != len(blocks(model)) or not share_basis(reference, model):
        raise DataError(
            "the models differ in size, or one of them is rotated: distances of states would say nothing; look at the "
            "divergence of what they predict"
        )
    theirs, ours = _embedded(reference, windows), _embedded(model, windows)
    rows = []
    layers = list(zip(blocks(reference), blocks(model), strict=True))
    for index, (right, left) in enumerate(layers):
        theirs, ours = (
            _run_block(block, states, config=config)
            for block, states, config in ((right, theirs, reference.config), (left, ours, model.config))
        )
        r, y = (np.asarray(states, np.float64).ravel() for states in (theirs, ours))
        lengths = np.linalg.norm(r), np.linalg.norm(y)
        rows.append(BlockDistance(index, float(np.linalg.norm(y - r) / lengths[0]), float(y @ r / np.prod(lengths))))
        on_block(index + 1, len(layers))
    return tuple(rows)


def divergence(
    reference: Llama,
    model: Llama,
    windows: Integer[np.ndarray, "count length"],
    *,
    on_window: OnBlock = lambda done, total: None,
) -> Divergence:
    """Measure how what two models predict differs, in any basis.

    Args:
      reference: the model to be near to.
      model: the other one.
      windows: token ids.
      on_window: called after each window with the windows done and all windows.

    Raises:
      DataError: as `tap_statistics`, or the vocabularies differ in size.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> divergence(model, model, np.ones((1, 8), np.int32)).flips
      0.0
    """
    if reference.config.vocab_size != model.config.vocab_size:
        raise DataError(
            f"vocabularies of {reference.config.vocab_size} and {model.config.vocab_size} tokens: compare a model with "
            "the one that it was made from"
        )
    _check(model, windows)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for index, window in enumerate(windows.astype(np.int32)):
        losses, flips = _predictions(reference, model, jnp.asarray(window[None]))
        found.append((np.asarray(losses, np.float64), np.asarray(flips)))
        on_window(index + 1, len(windows))
    kl, flipped = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Divergence(float(kl.mean()), float(np.quantile(kl, 0.99)), float(flipped.mean()), len(kl))


def _check(model: Llama, windows: np.ndarray) -> None:
    if windows.size == 0 or windows.min() < 0 or windows.max() >= model.config.vocab_size:
        raise DataError(
            f"windows of shape {windows.shape} with ids outside 0 to {model.config.vocab_size - 1}, or none: tokenise "
            "a text with the model's own tokenizer"
        )


def _embedded(model: Llama, windows: np.ndarray) -> jax.Array:
    _check(model, windows)
    return embed(model, jnp.asarray(windows.astype(np.int32)))


def _linears(block: Block) -> dict[str, Linear]:
    """Return a linear of each tap, whose input quantizer is the site's."""
    return {
        "attention_input": block.self_attn.q_proj,
        "attention_output": block.self_attn.o_proj,
        "mlp_input": block.mlp.up_proj,
        "mlp_hidden": block.mlp.down_proj,
    }


@partial(jax.jit, static_argnames="config")
def _run_block(
    block: Block, states: Float[Array, "count length hidden"], *, config: LlamaConfig
) -> Float[Array, "count length hidden"]:
    length = jnp.asarray([states.shape[1]], jnp.int32)
    return jax.lax.map(lambda x: prompt_block(block, x[None], length, states.shape[1], config)[0][0], states)


@partial(jax.jit, static_argnames="config")
def _tap_sums(
    block: Block, states: Float[Array, "count length hidden"], *, config: LlamaConfig
) -> tuple[Float[Array, "count length hidden"], dict[str, dict[str, Array]]]:
    """Run a block window by window; return its output and each window's means at each tap."""
    length = jnp.asarray([states.shape[1]], jnp.int32)

    def run(x: Float[Array, "length hidden"]) -> tuple[Array, dict[str, dict[str, Array]]]:
        y, _, taps = prompt_block(block, x[None], length, states.shape[1], config)
        sums = {name: _means(getattr(taps, name)[0], layer.input_quantizer) for name, layer in _linears(block).items()}
        return y[0], sums

    return jax.lax.map(run, states)


def _means(tap: Float[Array, "length features"], quantizer: Any) -> dict[str, Array]:
    x = tap.astype(jnp.float32)
    means = {f"power_{power}": jnp.mean(x**power) for power in (1, 2, 3, 4)}
    means |= {"low": jnp.min(x), "high": jnp.max(x), "channels": jnp.mean(jnp.square(x), axis=0)}
    if quantizer is not None:
        means["noise"] = jnp.mean(jnp.square(x - quantizer(tap, None).dequantize(jnp.float32)))
    return means


def _statistics(block: int, tap: str, means: dict[str, np.ndarray]) -> TapStatistics:
    """Return the figures of a tap from its means in each window, all of one length."""
    mean, second, third, fourth = (float(means[f"power_{power}"].mean()) for power in (1, 2, 3, 4))
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    channels = np.sqrt(means["channels"].mean(axis=0))
    median = float(np.median(channels))
    noise = float(means["noise"].mean()) if "noise" in means else 0.0
    return TapStatistics(
        block=block,
        tap=tap,
        low=float(means["low"].min()),
        high=float(means["high"].max()),
        mean=mean,
        deviation=float(np.sqrt(max(variance, 0.0))),
        kurtosis=central / variance**2 - 3.0 if variance > 0.0 else 0.0,
        outlier_channels=int(np.sum((channels >= OUTLIER * median) & (channels > 0.0))),
        peak=float(channels.max() / median) if median > 0.0 else None,
        sqnr=float(10.0 * np.log10(second / noise)) if noise else None,
    )


@jax.jit
def _predictions(
    reference: Llama, model: Llama, window: Int[Array, "1 length"]
) -> tuple[Float[Array, "length"], Array]:
    """Return KL(reference || model) after each token, and whether the likeliest successors differ."""
    theirs, ours = (hidden_states(one, window)[0] for one in (reference, model))
    count = window.shape[1]
    size = min(_POSITIONS, count)
    padding = -count % size

    def look(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        p, q = (
            jax.nn.log_softmax(head(one, part).astype(jnp.float32), axis=-1)
            for one, part in zip((reference, model), piece, strict=True)
        )
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1), jnp.argmax(p, axis=-1) != jnp.argmax(q, axis=-1)

    pieces = tuple(jnp.pad(part, ((0, padding), (0, 0))).reshape(-1, size, part.shape[-1]) for part in (theirs, ours))
    losses, flips = jax.lax.map(look, pieces)
    return losses.reshape(-1)[:count], flips.reshape(-1)[:count]
