"""How fast a model runs and what memory it takes: reading prompts, the first token, and the tokens after it.

    prefill     prompts of one length, from the call until the first tokens are on the host: the time to first token
    decode      so many tokens for each row behind a context, in one loop on the device

Programs are compiled ahead and timed apart; a first run of each is not counted. Runs follow each other: the context of
the second run of decode has the tokens of the first, and so on. Figures are medians.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jquant.errors import DataError
from jquant.formats import tree_nbytes
from jquant.models import Llama, LlamaConfig, Sharded, empty_cache, place_cache, random_like
from jquant.models.mesh import cache_spec
from jquant.runtime import Writing, advance, begin, token_stride
from jquant.types import Key

_MULTIPLE: Final = 128  # tokens of a cache, so that kernels that take many at once find whole tiles
_BEFORE: Final = 2  # runs that do not count: in the second XLA makes a CUDA graph of what it recorded, 15 ms of a loop


@dataclass(frozen=True)
class Workload:
    """Say what is timed.

    Attributes:
      batch: rows.
      prompt: tokens of each row's prompt; 0 leaves prefill out.
      context: tokens in the cache when decode begins; None for as many as the prompt has.
      tokens: tokens that decode writes for each row in one run, rounded up to whole strides of the loop (8 on a GPU); 0
        leaves decode out.
      repeats: runs that count.
    """

    batch: int = 1
    prompt: int = 512
    context: int | None = None
    tokens: int = 64
    repeats: int = 5

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be."""
        behind = self.prompt if self.context is None else self.context
        if min(self.batch, self.repeats) < 1 or min(self.prompt, self.tokens) < 0 or (self.tokens and behind < 1):
            raise DataError(
                f"{self}: give 1 row and 1 repeat at least, prompt and tokens of 0 (left out) or more, and a context "
                "of 1 token at least to decode behind"
            )

    def decode_context(self) -> int:
        """Returns the tokens in the cache when decode begins."""
        return self.prompt if self.context is None else self.context

    def steps(self) -> int:
        """Returns the tokens of one run: whole strides of the loop on this machine's device."""
        return -(-self.tokens // token_stride()) * token_stride()

    def describe(self) -> str:
        """Returns the sizes in words.

        >>> Workload(2, prompt=0, context=2048).describe()
        'batch 2, 64 tokens behind 2048'
        """
        parts = [f"batch {self.batch}"]
        parts += [f"prompt {self.prompt}"] * (self.prompt > 0)
        parts += [f"{self.steps()} tokens behind {self.decode_context()}"] * (self.tokens > 0)
        return ", ".join(parts)


@dataclass(frozen=True)
class Phase:
    """Hold the times of prefill or of decode.

    Attributes:
      seconds: of each run.
      compile_seconds: tracing, lowering and compilation, once.
      tokens: tokens of all rows in one run.
      peak_nbytes: what the compiled program holds at once: arguments, results and temporaries.
    """

    seconds: tuple[float, ...]
    compile_seconds: float
    tokens: int
    peak_nbytes: int

    def median(self) -> float:
        """Returns the median seconds of a run."""
        return statistics.median(self.seconds)

    def tokens_per_second(self) -> float:
        """Returns the tokens of all rows that a second brings."""
        return self.tokens / self.median()


@dataclass(frozen=True)
class Latency:
    """Hold what one workload took.

    Attributes:
      workload: what was timed.
      prefill: reading prompts, up to the first tokens; None if left out.
      decode: the tokens after; None if left out.
      weights_nbytes: bytes of the model's arrays.
      cache_nbytes: bytes of the caches that decode used, or that prefill made.
      live_nbytes: bytes in use when decode was done (or prefill, if alone), of everything in this process.
      live_source: who counted them: the device's own allocator, or the sum over all arrays of this process.
    """

    workload: Workload
    prefill: Phase | None
    decode: Phase | None
    weights_nbytes: int
    cache_nbytes: int
    live_nbytes: int
    live_source: Literal["device", "arrays"]

    def peak_nbytes(self) -> int:
        """Returns the most that a program holds at once."""
        return max(phase.peak_nbytes for phase in (self.prefill, self.decode) if phase is not None)


@dataclass(frozen=True)
class Program:
    """Hold a compiled phase.

    Attributes:
      run: the compiled function.
      compile_seconds: tracing, lowering and compilation.
      peak_nbytes: what it holds at once: arguments, results and temporaries.
    """

    run: Any
    compile_seconds: float
    peak_nbytes: int


@dataclass(frozen=True)
class Programs:
    """Hold the compiled phases of one workload; None for one that is left out."""

    prefill: Program | None
    decode: Program | None


@dataclass(frozen=True)
class Lowered:
    """Hold the phases of one workload, lowered: what is left to do is XLA's, and threads may do it side by side.

    Attributes:
      prefill: lowered, with the seconds that it took; None if left out.
      decode: likewise.
    """

    prefill: tuple[Any, float] | None
    decode: tuple[Any, float] | None

    def compile(self) -> Programs:
        """Compiles both phases."""
        return Programs(*(None if phase is None else _compiled(*phase) for phase in (self.prefill, self.decode)))


def check_workload(config: LlamaConfig, workload: Workload) -> None:
    """Refuses a workload that has nothing to time or does not fit a model's context.

    Args:
      config: of the model.
      workload: what shall be timed.

    Raises:
      DataError: as `measure_latency`.

    Example:
      >>> from jquant.models import tiny_config
      >>> check_workload(tiny_config(), Workload(prompt=16, tokens=8))  # 72 positions of 256
    """
    written = workload.steps() * (workload.repeats + _BEFORE)
    need, context = max(workload.prompt + 1, workload.decode_context() + written), config.max_position_embeddings
    if not workload.prompt and not workload.tokens:
        raise DataError("neither prompt nor tokens are above 0, so there is nothing to time")
    if need > context:
        raise DataError(
            f"{workload.describe()}, {workload.repeats} runs and {_BEFORE} before them, need {need} positions, but the "
            f"model's context is {context}: ask for less"
        )


def lower_latency(model: Llama, workload: Workload) -> Lowered:
    """Lowers what `measure_latency` runs.

    Args:
      model: the model, prepared for the device that it shall run on; abstract arrays will do.
      workload: what shall be timed.

    Raises:
      DataError: as `measure_latency`.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> lower_latency(abstract_llama(tiny_config()), Workload(2, prompt=8, tokens=0)).compile().decode is None
      True
    """
    check_workload(model.config, workload)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows, stops = jax.ShapeDtypeStruct((workload.batch,), jnp.int32), jax.ShapeDtypeStruct((0,), jnp.int32)
    prefill = decode = None
    if workload.prompt:
        prompts = jax.ShapeDtypeStruct((workload.batch, workload.prompt), jnp.int32)
        capacity = _whole(workload.prompt + 1)
        prefill = _timed(lambda: begin.lower(model, prompts, rows, stops, key, capacity=capacity))
    if workload.tokens:
        writing = _abstract_writing(model, workload)
        until, room, stride = jax.ShapeDtypeStruct((), jnp.int32), workload.steps(), token_stride()
        decode = _timed(lambda: advance.lower(model, writing, until, stops, key, room=room, stride=stride))
    return Lowered(prefill, decode)


def measure_latency(model: Llama, workload: Workload, *, programs: Programs | None = None, key: Key) -> Latency:
    """Times a model on random tokens; caches that decode begins with hold random numbers.

    Args:
      model: the model, prepared for the device that it runs on.
      workload: what to time.
      programs: `lower_latency`'s, compiled, for a model of this structure and this workload; None to compile now.
      key: of the tokens.

    Raises:
      DataError: prompt, or context and the tokens of all runs, do not fit the model's context, or nothing is timed.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> found = measure_latency(model, Workload(2, prompt=8, tokens=3, repeats=1), key=jax.random.key(1))
      >>> found.prefill.tokens, found.decode.tokens, len(found.decode.seconds)
      (16, 6, 1)
    """
    programs = lower_latency(model, workload).compile() if programs is None else programs
    prefill = decode = None
    cache_nbytes = live = 0
    if programs.prefill is not None:
        prefill, cache_nbytes, live = _time_prefill(model, workload, programs.prefill, key)
    if programs.decode is not None:
        decode, cache_nbytes, live = _time_decode(model, workload, programs.decode, key)
    source: Literal["device", "arrays"] = "arrays" if jax.devices()[0].memory_stats() is None else "device"
    return Latency(workload, prefill, decode, tree_nbytes(model), cache_nbytes, live, source)


def start_decode(model: Llama, workload: Workload, *, key: Key) -> Writing:
    """Returns what the workload's decode begins with: random tokens, chosen behind caches of random numbers.

    Args:
      model: the model.
      workload: what is timed.
      key: of the numbers.
    """
    abstract = jax.eval_shape(lambda: _empty_writing(model, workload)).cache
    rows, context = workload.batch, workload.decode_context()
    chosen = jax.random.randint(key, (rows,), 0, model.config.vocab_size, jnp.int32)
    layers = place_cache(model, random_like(abstract, key).layers)
    cache = abstract.replace(layers=layers, positions=jnp.full(rows, context, jnp.int32))
    return Writing(tokens=chosen, stopped=jnp.zeros(rows, jnp.bool_), step=jnp.int32(0), cache=cache)


def _time_prefill(model: Llama, workload: Workload, program: Program, key: Key) -> tuple[Phase, int, int]:
    shape = workload.batch, workload.prompt
    tokens = jax.random.randint(key, shape, 0, model.config.vocab_size, jnp.int32)
    lengths, stops = jnp.full(workload.batch, workload.prompt, jnp.int32), jnp.zeros(0, jnp.int32)
    times: list[float] = []
    writing: Any = None
    for _ in range(workload.repeats + _BEFORE):
        del writing  # so that two caches are never alive
        started = time.monotonic()
        writing = program.run(model, tokens, lengths, stops, key)
        jax.device_get(writing.tokens)
        times.append(time.monotonic() - started)
    nbytes = tree_nbytes(writing.cache.layers)
    phase = Phase(tuple(times[_BEFORE:]), program.compile_seconds, shape[0] * shape[1], program.peak_nbytes)
    return phase, nbytes, _live_nbytes()


def _time_decode(model: Llama, workload: Workload, program: Program, key: Key) -> tuple[Phase, int, int]:
    writing, stops, times = start_decode(model, workload, key=key), jnp.zeros(0, jnp.int32), []
    nbytes = tree_nbytes(writing.cache.layers)
    for index in range(workload.repeats + _BEFORE):
        until = jnp.int32((index + 1) * workload.steps())
        started = time.monotonic()
        written, _, writing = program.run(model, writing, until, stops, key)
        jax.device_get(written)
        times.append(time.monotonic() - started)
    tokens = workload.batch * workload.steps()
    return Phase(tuple(times[_BEFORE:]), program.compile_seconds, tokens, program.peak_nbytes), nbytes, _live_nbytes()


def _abstract_writing(model: Llama, workload: Workload) -> Writing:
    """Returns the shapes of what decode begins with, its caches where the model has them."""
    writing = jax.eval_shape(lambda: _empty_writing(model, workload))
    if not isinstance(model.layers, Sharded):
        return writing
    place = NamedSharding(model.layers.mesh, cache_spec(model.layers))
    layers = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), writing.cache.layers
    )
    return dataclasses.replace(writing, cache=writing.cache.replace(layers=layers))


def _empty_writing(model: Llama, workload: Workload) -> Writing:
    rows, none = workload.batch, jnp.zeros(workload.batch, jnp.int32)
    capacity = _whole(workload.decode_context() + workload.steps() * (workload.repeats + _BEFORE))
    cache = empty_cache(model, rows, capacity)
    return Writing(tokens=none, stopped=jnp.zeros(rows, jnp.bool_), step=jnp.int32(0), cache=cache)


def _timed(lower: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return lower(), time.monotonic() - started


def _compiled(lowered: Any, seconds: float) -> Program:
    started = time.monotonic()
    program = lowered.compile()
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Program(program, seconds + time.monotonic() - started, held + sizes.temp_size_in_bytes)


def _live_nbytes() -> int:
    found = jax.devices()[0].memory_stats()
    return sum(tree_nbytes(one) for one in jax.live_arrays()) if found is None else int(found["bytes_in_use"])


def _whole(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE
