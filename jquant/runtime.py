"""Generation: compiled prefill and decode, many tokens a call without a word to the host, whole batches and streams.

`begin` reads prompts and chooses the first token; `advance` goes on for as many tokens as it is told, in a loop on the
device that ends when every row has stopped. Caches are donated from call to call, so that there is one set of them. The
token at step s is drawn with fold_in(key, s): what is written does not depend on how many tokens a call writes.

Prompts of different lengths share a batch: they are left-aligned and padded on the right, and each row has its own
position, so that a row's logits are those of its prompt alone. Lengths are rounded up to powers of two, so that few
shapes are compiled. Long prompts can be read in chunks: memory for activations is then that of one chunk, and one
program serves all prompts that share a capacity.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Int32, Shaped

from jquant import models
from jquant.errors import DataError, RecipeError
from jquant.models import Cache, Llama
from jquant.sampling import GREEDY, Sampler
from jquant.types import Key, Leaf

_SMALLEST_BUCKET: Final = 32  # shorter prompts gain nothing from a shape of their own
GRAPHS: Final = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"  # what XLA records into CUDA graphs
_LOOPS: Final = {"xla_gpu_enable_command_buffer": f"{GRAPHS},WHILE,CONDITIONAL"}  # and whole loops: docs/runtime.md
_GPU_STRIDE: Final = 8  # a loop that is not recorded waits 0.15 ms at each look of its host whether to go on
_BURST_SECONDS: Final = 0.05  # tokens of a stream that come together within it read as if they came one by one


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


@struct.dataclass
class Writing:
    """Hold what `advance` goes on from.

    Attributes:
      tokens: int32 [batch], the token that each row chose last and has not read yet.
      stopped: bool [batch], which rows have chosen a stop token.
      step: int32, how many tokens were chosen so far.
      cache: keys and values of all tokens before.
    """

    tokens: Leaf
    stopped: Leaf
    step: Leaf
    cache: Cache


@partial(jax.jit, static_argnames=("capacity", "chunk", "sampler"))
def begin(
    model: Llama,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch"],
    stops: Int32[Array, "stops"],
    key: Key,
    *,
    capacity: int,
    chunk: int | None = None,
    sampler: Sampler = GREEDY,
) -> Writing:
    """Read right-padded prompts and chooses the first token of each row, compiled.

    Args:
      model: the model.
      tokens: left-aligned prompts, right-padded with any token.
      lengths: real tokens of each row, at least 1.
      stops: ids that end a row.
      key: of the random choice.
      capacity: tokens that the cache holds for each row.
      chunk: tokens of the prompts that go through the model at once; None for all.
      sampler: how tokens are chosen.
    """
    logits, cache = models.prefill(model, tokens, lengths, capacity, chunk)
    chosen = sampler(logits, jax.random.fold_in(key, 0))
    return Writing(tokens=chosen, stopped=jnp.isin(chosen, stops), step=jnp.int32(1), cache=cache)


@partial(jax.jit, static_argnames=("room", "stride", "sampler"), donate_argnames="writing", compiler_options=_LOOPS)
def advance(
    model: Llama,
    writing: Writing,
    until: Int32[Array, ""],
    stops: Int32[Array, "stops"],
    key: Key,
    *,
    room: int,
    stride: int = 1,
    sampler: Sampler = GREEDY,
) -> tuple[Int32[Array, "batch room"], Int32[Array, "batch"], Writing]:
    """Choose tokens until there are `until` of them or all rows have stopped, in one loop on the device.

    Args:
      model: the model.
      writing: where to go on from; it is donated and must not be used again.
      until: tokens of each row, those chosen before counted.
      stops: ids that end a row.
      key: of the random choice.
      room: tokens that the result has room for: whole strides, as many as make up what is asked for.
      stride: tokens between two looks whether to go on, for which a GPU may have to ask its host; what is written
        beyond `until` in the last stride is there, and goes on, like all else.
      sampler: how tokens are chosen.

    Returns:
      The new tokens, how many of each row come before a stop token, and where to go on from.
    """
    first = writing.step

    def running(state: tuple[Writing, Array, Array]) -> Array:
        return (state[0].step < until) & ~jnp.all(state[0].stopped)

    def step(state: tuple[Writing, Array, Array]) -> tuple[Writing, Array, Array]:
        now, written, counts = state
        logits, cache = models.decode(model, now.tokens, now.cache)
        chosen = sampler(logits, jax.random.fold_in(key, now.step))
        stopped = now.stopped | jnp.isin(chosen, stops)
        written = written.at[:, now.step - first].set(chosen)
        return Writing(chosen, stopped, now.step + 1, cache), written, counts + (~stopped).astype(jnp.int32)

    def advance_stride(state: tuple[Writing, Array, Array]) -> tuple[Writing, Array, Array]:
        return step(state) if stride == 1 else jax.lax.fori_loop(0, stride, lambda _, now: step(now), state)

    rows = writing.tokens.shape[0]
    empty = jnp.zeros((rows, room), jnp.int32), jnp.zeros(rows, jnp.int32)
    writing, written, counts = jax.lax.while_loop(running, advance_stride, (writing, *empty))
    return written, counts, writing


def token_stride() -> int:
    """Returns the stride that `advance` should have on this machine's first device.

    >>> token_stride() in (1, 8)
    True
    """
    return _GPU_STRIDE if jax.default_backend() == "gpu" else 1


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
    batch, key = _pad(model, prompts, max_tokens, prefill_chunk), _require_key(sampler, key)
    stops = jnp.asarray(np.asarray(stop_tokens, dtype=np.int32))
    writing = _begin(model, batch, stops, key, prefill_chunk, sampler)
    first, before = _on_host(writing.tokens).tolist(), _on_host(writing.stopped).tolist()
    stride = token_stride()
    rest, counts, writing = advance(
        model, writing, jnp.int32(max_tokens), stops, key, room=_room(max_tokens), stride=stride, sampler=sampler
    )
    rows = zip(first, before, _on_host(rest).tolist(), _on_host(counts).tolist(), strict=True)
    written = [() if stopped else (one, *more[:count])[:max_tokens] for one, stopped, more, count in rows]
    ended = _on_host(writing.stopped).tolist()  # by a stop token beyond the last one, too: those rows are full
    return Generation(
        tuple(written), tuple(stop and len(row) < max_tokens for stop, row in zip(ended, written, strict=True))
    )


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler = GREEDY,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int | None = None,
    burst: int = _SMALLEST_BUCKET,
    key: Key | None = None,
) -> Iterator[int]:
    """Continue one prompt token by token; the tokens are those that `generate` gives for it alone.

    The device writes bursts of tokens by itself: one at first, then twice as many each time until a burst takes a
    twentieth of a second, so that a reader sees a steady stream and a fast device seldom waits for the host.

    Takes the arguments of `generate`, with one prompt, and `burst`, the most tokens that the device writes by itself.
    Raises its errors at once, not when a token is asked for.

    Returns:
      An iterator of new token ids, which ends before a stop token or after `max_tokens`.

    Example:
      >>> model = models.random_model(models.tiny_config(), jax.random.key(0))
      >>> tuple(stream(model, [1, 2], max_tokens=5)) == generate(model, [[1, 2]], max_tokens=5).tokens[0]
      True
    """
    batch, key = _pad(model, [prompt], max_tokens, prefill_chunk), _require_key(sampler, key)
    if burst < 1:
        raise RecipeError(f"burst is {burst}; expected at least 1")
    stops = jnp.asarray(np.asarray(stop_tokens, dtype=np.int32))
    writing = _begin(model, batch, stops, key, prefill_chunk, sampler)
    return _bursts(model, writing, stops, key, sampler, (max_tokens, burst))


class _Batch(NamedTuple):
    """Hold padded prompts [batch, bucket], their lengths [batch] and the cache capacity for them."""

    tokens: jax.Array
    lengths: jax.Array
    capacity: int


def _begin(
    model: Llama, batch: _Batch, stops: Int32[Array, "stops"], key: Key, chunk: int | None, sampler: Sampler
) -> Writing:
    return begin(model, batch.tokens, batch.lengths, stops, key, capacity=batch.capacity, chunk=chunk, sampler=sampler)


def _bursts(
    model: Llama, writing: Writing, stops: Int32[Array, "stops"], key: Key, sampler: Sampler, sizes: tuple[int, int]
) -> Iterator[int]:
    """Yields one row's tokens; `sizes` are the most in all and the most at once."""
    (limit, burst), stride, done, count = sizes, token_stride(), 1, 1
    if bool(writing.stopped[0]):
        return
    yield int(writing.tokens[0])
    while done < limit and not bool(writing.stopped[0]):
        started = time.monotonic()
        until = jnp.int32(min(done + count, limit))
        written, counts, writing = advance(
            model, writing, until, stops, key, room=_room(burst), stride=stride, sampler=sampler
        )
        tokens = np.asarray(written)[0, : int(counts[0])].tolist()[: limit - done]
        done = int(writing.step)
        count = min(2 * count, burst) if time.monotonic() - started < _BURST_SECONDS else max(1, count // 2)
        yield from tokens


def _on_host(array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Returns numbers of which other processes' devices may have a part; every process asks for them."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _room(tokens: int) -> int:
    """Returns room for so many tokens, and for the stride that a loop may end in the middle of."""
    return _bucket(tokens) + token_stride() - 1


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
    beyond = token_stride() - 1  # what the last stride may write more
    width, capacity = min(_bucket(max(lengths)), context), min(_bucket(need + beyond), context + beyond)
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
