"""Generation: compiled prefill and decode, whole batches without a host round trip per token, and streams for chat.

Prompts of different lengths share a batch: they are left-aligned and padded on the right, and each row has its own
position, so that a row's logits are those of its prompt alone. Lengths are rounded up to powers of two, so that few
shapes are compiled. Long prompts can be read in chunks: memory for activations is then that of one chunk, and one
program serves all prompts that share a capacity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from jquant import models
from jquant.errors import DataError, RecipeError
from jquant.models import Cache, Llama
from jquant.sampling import GREEDY, Sampler
from jquant.types import Key

_SMALLEST_BUCKET: Final = 32  # shorter prompts gain nothing from a shape of their own


@dataclass(frozen=True)
class Generation:
    """Hold what `generate` wrote.

    Attributes:
      tokens: the new tokens of each prompt, without prompt and without stop token.
      stopped: whether each row ended at a stop token (True) or at `max_tokens` (False).
    """

    tokens: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]


@partial(jax.jit, static_argnames=("capacity", "chunk"))
def prefill(
    model: Llama,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch"],
    *,
    capacity: int,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Read right-padded prompts, compiled; see `jquant.models.prefill`."""
    return models.prefill(model, tokens, lengths, capacity, chunk)


@partial(jax.jit, donate_argnames="cache")
def decode(model: Llama, tokens: Int[Array, "batch"], cache: Cache) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Read one token for each row, compiled; the cache given is donated and must not be used again."""
    return models.decode(model, tokens, cache)


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler = GREEDY,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int | None = None,
    key: Key | None = None,
) -> Generation:
    """Continue every prompt, in one compiled loop that ends when all rows have stopped.

    Args:
      model: the model.
      prompts: token ids, each at least one, of any lengths.
      max_tokens: the most new tokens for each prompt.
      sampler: how the next token is chosen.
      stop_tokens: ids that end a row, such as the tokenizer's end of text.
      prefill_chunk: tokens of the prompts that go through the model at once, to bound memory; None for all.
      key: of the random choice; may be left out for a greedy sampler.

    Returns:
      The new tokens of each prompt. Greedy, they do not depend on the other prompts of the batch, unless the method is
      one whose input quantizer looks across tokens: LLM.int8(), and QRazor with one scale for the whole call.

    Raises:
      DataError: a prompt is empty, has an id outside the vocabulary, or exceeds the context with `max_tokens` more.
      RecipeError: `max_tokens` or `prefill_chunk` is below 1, or the sampler draws and there is no key.
      FormatError: a KV codec cannot read a prompt in chunks in its prompt mode.

    Example:
      >>> model = models.random_model(models.tiny_config(), jax.random.key(0))
      >>> [len(tokens) for tokens in generate(model, [[1, 2, 3], [4]], max_tokens=5).tokens]
      [5, 5]
    """
    batch = _pad(model, prompts, max_tokens, prefill_chunk)
    stops = jnp.asarray(np.asarray(stop_tokens, dtype=np.int32))
    output, counts, stopped = _generate(
        model,
        batch.tokens,
        batch.lengths,
        jnp.int32(max_tokens),
        stops,
        _require_key(sampler, key),
        capacity=batch.capacity,
        buffer=_bucket(max_tokens),
        chunk=prefill_chunk,
        sampler=sampler,
    )
    rows = zip(np.asarray(output).tolist(), np.asarray(counts).tolist(), strict=True)
    return Generation(tuple(tuple(row[:count]) for row, count in rows), tuple(np.asarray(stopped).tolist()))


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler = GREEDY,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int | None = None,
    key: Key | None = None,
) -> Iterator[int]:
    """Continue one prompt token by token; the tokens are those that `generate` gives for it alone.

    Takes the arguments of `generate`, with one prompt; raises its errors at once, not when a token is asked for.

    Returns:
      An iterator of new token ids, which ends before a stop token or after `max_tokens`.

    Example:
      >>> model = models.random_model(models.tiny_config(), jax.random.key(0))
      >>> tuple(stream(model, [1, 2], max_tokens=5)) == generate(model, [[1, 2]], max_tokens=5).tokens[0]
      True
    """
    batch = _pad(model, [prompt], max_tokens, prefill_chunk)
    key = _require_key(sampler, key)
    first = prefill(model, batch.tokens, batch.lengths, capacity=batch.capacity, chunk=prefill_chunk)
    return _steps(model, first, max_tokens, sampler, frozenset(stop_tokens), key)


class _Batch(NamedTuple):
    """Hold padded prompts [batch, bucket], their lengths [batch] and the cache capacity for them."""

    tokens: jax.Array
    lengths: jax.Array
    capacity: int


class _Progress(NamedTuple):
    """Carry the loop's state: `output` has `counts` tokens in each row; `token` is each row's last one."""

    step: Int32[Array, ""]
    token: Int32[Array, "batch"]
    output: Int32[Array, "batch buffer"]
    counts: Int32[Array, "batch"]
    stopped: Bool[Array, "batch"]


@partial(jax.jit, static_argnames=("capacity", "buffer", "sampler", "chunk"))
def _generate(
    model: Llama,
    tokens: Int32[Array, "batch tokens"],
    lengths: Int32[Array, "batch"],
    limit: Int32[Array, ""],
    stops: Int32[Array, "stops"],
    key: Key,
    *,
    capacity: int,
    buffer: int,
    sampler: Sampler,
    chunk: int | None,
) -> tuple[Int32[Array, "batch buffer"], Int32[Array, "batch"], Bool[Array, "batch"]]:
    def choose(logits: Float[Array, "batch vocab"], progress: _Progress) -> _Progress:
        token = sampler(logits, jax.random.fold_in(key, progress.step))
        stopped = progress.stopped | jnp.isin(token, stops)
        return _Progress(
            step=progress.step + 1,
            token=token,
            output=progress.output.at[:, progress.step].set(token),
            counts=progress.counts + (~stopped).astype(jnp.int32),
            stopped=stopped,
        )

    def running(state: tuple[_Progress, Cache]) -> Bool[Array, ""]:
        return (state[0].step < limit) & ~jnp.all(state[0].stopped)

    def advance(state: tuple[_Progress, Cache]) -> tuple[_Progress, Cache]:
        progress, cache = state
        logits, cache = models.decode(model, progress.token, cache)
        return choose(logits, progress), cache

    rows = tokens.shape[0]
    zeros = jnp.zeros(rows, jnp.int32)
    start = _Progress(jnp.int32(0), zeros, jnp.zeros((rows, buffer), jnp.int32), zeros, jnp.zeros(rows, jnp.bool_))
    logits, cache = models.prefill(model, tokens, lengths, capacity, chunk)
    progress, _ = jax.lax.while_loop(running, advance, (choose(logits, start), cache))
    return progress.output, progress.counts, progress.stopped


@partial(jax.jit, static_argnames="sampler")
def _choose(
    logits: Float[Array, "batch vocab"], key: Key, step: Int32[Array, ""], *, sampler: Sampler
) -> Int32[Array, "batch"]:
    return sampler(logits, jax.random.fold_in(key, step))


def _steps(
    model: Llama,
    first: tuple[Float[Array, "batch vocab"], Cache],
    max_tokens: int,
    sampler: Sampler,
    stop_tokens: frozenset[int],
    key: Key,
) -> Iterator[int]:
    logits, cache = first
    for step in range(max_tokens):
        token = _choose(logits, key, jnp.int32(step), sampler=sampler)
        chosen = int(token[0])
        if chosen in stop_tokens:
            return
        yield chosen
        if step + 1 < max_tokens:
            logits, cache = decode(model, token, cache)


def _pad(model: Llama, prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int | None) -> _Batch:
    config = model.config
    if max_tokens < 1 or (chunk is not None and chunk < 1):
        raise RecipeError(f"max_tokens is {max_tokens} and prefill_chunk {chunk}; expected at least 1 of each")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise DataError(f"prompts have {lengths} tokens; expected at least one prompt, and at least one token in each")
    outside = sorted({token for prompt in prompts for token in prompt if not 0 <= token < config.vocab_size})
    if outside:
        raise DataError(
            f"prompts have token ids {outside[:5]}, but the model has ids 0 to {config.vocab_size - 1}: "
            "encode them with the model's own tokenizer"
        )
    need, context = max(lengths) + max_tokens, config.max_position_embeddings
    if need > context:
        raise DataError(
            f"the longest prompt has {max(lengths)} tokens; with max_tokens={max_tokens} that is {need}, "
            f"but the model's context is {context}: shorten the prompt or ask for fewer tokens"
        )
    width, capacity = min(_bucket(max(lengths)), context), min(_bucket(need), context)
    if chunk is not None:  # whole chunks, as many as the cache holds: the loop over them stops where the prompts do
        width = capacity = -(-capacity // chunk) * chunk
    tokens = np.zeros((len(prompts), width), dtype=np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return _Batch(jnp.asarray(tokens), jnp.asarray(lengths, dtype=jnp.int32), capacity)


def _bucket(length: int) -> int:
    """Round a length up to a power of two."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _require_key(sampler: Sampler, key: Key | None) -> Key:
    if key is None and sampler.temperature > 0.0:
        raise RecipeError(
            f"temperature {sampler.temperature} draws at random, but there is no key: pass key=jax.random.key(seed)"
        )
    return jax.random.key(0) if key is None else key
