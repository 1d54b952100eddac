"""Generation: equal to the forward pass at every position, independent of the batch, compiled once per shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import runtime
from jquant.errors import DataError, RecipeError
from jquant.machines import Target
from jquant.models import Llama, LlamaConfig, forward, random_model, stack_layers, tiny_config
from jquant.models.random import Family
from jquant.runtime import advance, begin, decode, generate, prefill, stream
from jquant.sampling import GREEDY, Sampler
from jquant.targets import prepare

PROMPTS = [[5, 9, 100, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [64, 32]]

DRAWING = Sampler(1.5, top_k=20, top_p=0.95)
FORWARD = jax.jit(forward)


@functools.cache
def tiny(family: Family = "llama2") -> Llama:
    """Build a random model of 2 layers with 4 query and 2 KV heads."""
    return random_model(tiny_config(family), jax.random.key(0))


def greedy_oracle(model: Llama, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt by running the whole sequence, padded to one shape, through the forward pass for each token."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = np.argmax(FORWARD(model, jnp.asarray(tokens))[0, at - 1])
    return [int(token) for token in tokens[0, len(prompt) : len(prompt) + count]]


@pytest.mark.parametrize("family", ["llama3.1", "mistral", "qwen2", "qwen3"])
def test_prefill_and_decode_equal_forward_at_every_position(family: Family) -> None:
    model = tiny(family)
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, model.config.vocab_size)
    lengths = jnp.array([9, 4])  # ragged: row 1 starts to decode at position 4
    expected = FORWARD(model, tokens)
    logits, cache = prefill(model, tokens[:, :12], lengths, capacity=32)
    for step in range(9):
        at = np.asarray(lengths) + step - 1
        for row in range(2):
            # both sum the same float32 products in another order, over at most 20 positions
            np.testing.assert_allclose(logits[row], expected[row, at[row]], atol=2e-5, rtol=1e-5)
        logits, cache = decode(model, tokens[jnp.arange(2), jnp.asarray(at + 1)], cache)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_ragged_batch_equals_each_prompt_alone(stacked: bool) -> None:
    model = stack_layers(tiny()) if stacked else tiny()
    together = generate(model, PROMPTS, max_tokens=6)
    alone = [generate(model, [prompt], max_tokens=6).tokens[0] for prompt in PROMPTS]
    assert list(together.tokens) == alone
    assert together.stopped == (False,) * 4
    assert list(together.tokens[2]) == greedy_oracle(tiny(), PROMPTS[2], 6)


def test_prompts_that_fill_a_bucket_or_spill_over_it() -> None:
    model = tiny()
    for length in (31, 32, 33):
        prompt = [(7 * i) % 128 for i in range(length)]
        assert list(generate(model, [prompt], max_tokens=3).tokens[0]) == greedy_oracle(model, prompt, 3)


def test_stop_tokens_end_a_row_and_are_not_returned() -> None:
    model = tiny()
    free = generate(model, PROMPTS, max_tokens=8).tokens
    stop = free[1][2]
    stopped = generate(model, PROMPTS, max_tokens=8, stop_tokens=(stop, 127))
    for row, tokens in enumerate(free):
        ends = [i for i, token in enumerate(tokens) if token in (stop, 127)]
        assert stopped.tokens[row] == tokens[: ends[0] if ends else None]
        assert stopped.stopped[row] == bool(ends)
    assert generate(model, [PROMPTS[1]], max_tokens=8, stop_tokens=free[1][:1]).tokens == ((),)


@pytest.mark.parametrize("sampler", [GREEDY, DRAWING])
def test_stream_gives_what_generate_gives(sampler: Sampler) -> None:
    model, key = tiny(), jax.random.key(3)
    tokens = generate(model, [PROMPTS[0]], max_tokens=7, sampler=sampler, key=key).tokens[0]
    assert tuple(stream(model, PROMPTS[0], max_tokens=7, sampler=sampler, key=key)) == tokens
    stop = tokens[3]
    before = tokens[: tokens.index(stop)]
    assert tuple(stream(model, PROMPTS[0], max_tokens=7, sampler=sampler, stop_tokens=[stop], key=key)) == before


def test_sampling_is_deterministic_in_the_key_and_the_first_row_ignores_the_others() -> None:
    model, sampler = tiny(), DRAWING
    first, again, other = (
        generate(model, PROMPTS, max_tokens=8, sampler=sampler, key=jax.random.key(seed)).tokens for seed in (0, 0, 1)
    )
    assert first == again != other
    assert generate(model, PROMPTS[:1], max_tokens=8, sampler=sampler, key=jax.random.key(0)).tokens[0] == first[0]


def programs() -> tuple[int, int]:
    """Return how many programs there are that read prompts, and that write tokens."""
    return runtime.begin._cache_size(), runtime.advance._cache_size()


def test_one_compilation_for_each_shape() -> None:
    model = tiny()
    reading, writing = programs()
    generate(model, [[1, 2], [3], [4]], max_tokens=9)  # three rows: a shape that no other test has
    generate(model, [[3, 4, 5, 6, 7], [8, 9], [1]], max_tokens=20)  # same buckets: other lengths, limit, tokens
    generate(jax.tree.map(jnp.negative, model), [[3], [3], [3]], max_tokens=1)
    assert programs() == (reading + 1, writing + 1)
    generate(model, [[1], [2], list(range(40))], max_tokens=9)
    assert programs() == (reading + 2, writing + 2)


def test_one_program_reads_prompts_of_any_length_in_chunks() -> None:
    model = stack_layers(tiny())
    prompts = [[(7 * i) % 128 for i in range(length)] for length in (70, 97)]
    reading, _ = programs()
    chunked = [generate(model, [prompt], max_tokens=5, prefill_chunk=24).tokens[0] for prompt in prompts]
    assert programs()[0] == reading + 1
    whole = generate(model, prompts, max_tokens=5).tokens
    assert tuple(chunked) == whole


@pytest.mark.parametrize("sampler", [GREEDY, DRAWING])
def test_tokens_do_not_depend_on_how_many_are_written_at_once(sampler: Sampler) -> None:
    model, key = tiny(), jax.random.key(3)
    whole = generate(model, PROMPTS, max_tokens=12, sampler=sampler, key=key)
    stops = jnp.asarray([whole.tokens[1][4], whole.tokens[3][2]])  # rows stop at different steps
    ended = generate(model, PROMPTS, max_tokens=12, sampler=sampler, stop_tokens=stops.tolist(), key=key)
    batch = runtime._pad(model, PROMPTS, 12, None)
    for size, stride in ((1, 1), (5, 1), (11, 1), (4, 3)):
        writing = begin(model, batch.tokens, batch.lengths, stops, key, capacity=batch.capacity, sampler=sampler)
        rows = [[] if stopped else [token] for stopped, token in zip(writing.stopped.tolist(), writing.tokens.tolist())]
        for until in range(1 + size, 12 + size, size):
            options = {"room": 32, "stride": stride, "sampler": sampler}
            written, counts, writing = advance(model, writing, jnp.int32(min(until, 12)), stops, key, **options)
            for row, new, count in zip(rows, written.tolist(), counts.tolist(), strict=True):
                row += new[:count]
        assert tuple(tuple(row[:12]) for row in rows) == ended.tokens
        assert stride > 1 or tuple(writing.stopped.tolist()) == ended.stopped == (
            *ended.stopped[:1],
            True,
            *ended.stopped[2:3],
            True,
        )
    for burst in (1, 3):
        options = {"max_tokens": 12, "sampler": sampler, "burst": burst, "key": key}
        assert tuple(stream(model, PROMPTS[0], **options)) == whole.tokens[0]


def test_strides_of_a_gpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny(), PROMPTS[2:3]
    free = generate(model, prompts, max_tokens=10, stop_tokens=[999])
    stop = free.tokens[0][6]
    expected = generate(model, prompts, max_tokens=10, stop_tokens=[stop])
    monkeypatch.setattr(runtime, "token_stride", lambda: 4)
    assert generate(model, prompts, max_tokens=10, stop_tokens=[999]) == free
    assert generate(model, prompts, max_tokens=10, stop_tokens=[stop]) == expected
    assert tuple(stream(model, prompts[0], max_tokens=10, stop_tokens=[999])) == free.tokens[0]
    assert tuple(stream(model, prompts[0], max_tokens=10, stop_tokens=[stop])) == expected.tokens[0]


def test_a_loop_ends_when_all_rows_have_stopped() -> None:
    model, key = tiny(), jax.random.key(0)
    batch = runtime._pad(model, PROMPTS, 9, None)
    everything = jnp.arange(128)  # any token ends a row
    writing = begin(model, batch.tokens, batch.lengths, everything, key, capacity=batch.capacity)
    _, counts, writing = advance(model, writing, jnp.int32(9), everything, key, room=32)
    assert (int(writing.step), counts.tolist(), writing.stopped.tolist()) == (1, [0] * 4, [True] * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("sampler", [GREEDY, DRAWING])
def test_a_recorded_loop_writes_what_one_that_asks_its_host_does(sampler: Sampler, stride: int) -> None:
    """Called again and again, by kernels; rows stop early, and at last all have."""
    config = LlamaConfig(128, 256, 256, 2, 4, 2, 64, max_position_embeddings=256)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_model(config, jax.random.key(0)))
    ready, key = prepare(model, Target.H100), jax.random.key(1)
    asking = jax.jit(advance.__wrapped__, static_argnames=("room", "stride", "sampler"))
    batch = runtime._pad(ready, PROMPTS, 64, None)

    def written(loop: Any, stops: jax.Array) -> list[Any]:
        writing = begin(ready, batch.tokens, batch.lengths, stops, key, capacity=batch.capacity, sampler=sampler)
        calls = []
        for until in (2, 3, 17, 40):
            room = until + 8
            tokens, counts, writing = loop(
                ready, writing, jnp.int32(until), stops, key, room=room, stride=stride, sampler=sampler
            )
            calls.append((tokens.tolist(), counts.tolist(), writing.stopped.tolist(), int(writing.step)))
        return calls

    free = written(asking, jnp.zeros(0, jnp.int32))
    assert written(advance, jnp.zeros(0, jnp.int32)) == free
    stops = jnp.asarray([row[7] for row in free[2][0]])  # of the third call: all rows stop in it at the latest
    stopped = written(asking, stops)
    assert written(advance, stops) == stopped
    assert all(stopped[-1][2])
    assert stopped[-1][3] < free[-1][3]


def test_a_stream_shares_the_program_of_one_row() -> None:
    model = tiny()
    generate(model, [[1, 2]], max_tokens=2)
    _, writing = programs()
    list(stream(model, [4, 5, 6], max_tokens=25))
    assert programs()[1] == writing


def test_decode_donates_its_cache() -> None:
    model = tiny()
    _, cache = prefill(model, jnp.array([[1, 2, 3, 0]]), jnp.array([3]), capacity=8)
    decode(model, jnp.array([4]), cache)
    assert cache.layers[0].keys.is_deleted()
    stops, key = jnp.zeros(0, jnp.int32), jax.random.key(0)
    writing = begin(model, jnp.array([[1, 2, 3, 0]]), jnp.array([3]), stops, key, capacity=8)
    advance(model, writing, jnp.int32(2), stops, key, room=4)
    assert writing.cache.layers[0].keys.is_deleted()


def test_the_whole_context_can_be_used_and_no_more() -> None:
    model = tiny()
    context = model.config.max_position_embeddings
    prompt = [i % 128 for i in range(context - 3)]
    assert len(generate(model, [prompt], max_tokens=3).tokens[0]) == 3
    with pytest.raises(
        DataError, match=rf"253 tokens; with max_tokens=4 that is 257, but the model's context is {context}"
    ):
        generate(model, [[1], prompt], max_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, DataError, "at least one prompt"),
        ([[1], []], {}, DataError, r"prompts have \[1, 0\] tokens"),
        ([[1, 128]], {}, DataError, r"ids \[128\], but the model has ids 0 to 127"),
        ([[-1]], {}, DataError, r"ids \[-1\]"),
        ([[1]], {"max_tokens": 0}, RecipeError, "max_tokens is 0"),
        ([[1]], {"prefill_chunk": 0}, RecipeError, "prefill_chunk 0; expected at least 1"),
        ([[1]], {"sampler": Sampler(1.0)}, RecipeError, "there is no key"),
    ],
)
def test_bad_requests_say_what_to_do(
    prompts: list[list[int]], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(tiny(), prompts, **{"max_tokens": 2, **options})  # type: ignore[arg-type]
    if len(prompts) == 1:
        with pytest.raises(error, match=message):
            stream(tiny(), prompts[0], **{"max_tokens": 2, **options})  # type: ignore[arg-type]
