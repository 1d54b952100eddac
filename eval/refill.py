"""Many prompts through few rows: a row whose text has ended takes the next prompt, while the others write on.

Prompts are read some at a time, in one shape, into a cache of their own, whose rows then replace those of texts that
have ended; all rows write a round of tokens between two looks at the texts. Three programs serve all prompts of one
width. A token is drawn with the prompt's own key and its place in the text: what is written after a prompt depends
neither on the row nor on its neighbours.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int32

from eval.batches import Batch
from jquant import models
from jquant.models import Llama, Stacked, empty_cache
from jquant.sampling import Sampler
from jquant.types import Key, Leaf

ROUND: Final = 16  # tokens that all rows write between two looks at the texts
_SHARE: Final = 4  # rows that are read at once: one in so many of all rows


@struct.dataclass
class Rows:
    """Hold what rows write on from.

    Attributes:
      tokens: int32 [rows], the token that each row chose last and has not read yet.
      stopped: bool [rows], which have chosen a stop token, or never began.
      steps: int32 [rows], how many tokens each has chosen.
      prompts: int32 [rows], the prompt in each, for its key.
      cache: keys and values of all tokens before.
    """

    tokens: Leaf
    stopped: Leaf
    steps: Leaf
    prompts: Leaf
    cache: models.Cache


def write_all(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    shape: Batch,
    stops: Int32[Array, "stops"],
    key: Key,
    *,
    max_tokens: int,
    sampler: Sampler,
    ended: Callable[[list[int]], bool],
    on_tokens: Callable[[int, list[int]], None],
    on_steps: Callable[[int], None] = lambda run: None,
) -> None:
    """Write on after each prompt that a batch names, be there more of them than it has rows.

    Args:
      model: the model.
      prompts: token ids, of which `shape.members` are written on, in that order.
      shape: rows and width of the program.
      stops: ids that end a row.
      key: of the random choice.
      max_tokens: the most tokens of a text; the last round may have written more.
      sampler: how tokens are chosen.
      ended: tells whether the tokens of a text hold its end.
      on_tokens: called with a prompt's index and its tokens when they end.
      on_steps: called after each round with the row-steps that it ran: rows times tokens.
    """
    rounds = max(1, -(-(max_tokens - 1) // ROUND))  # after the first token
    together = -(-shape.rows // _SHARE)
    rows = _empty(model, shape.rows, shape.width + rounds * ROUND)
    waiting, texts = deque(shape.members), dict[int, tuple[int, list[int]]]()  # row -> (prompt, its tokens)

    def settle(row: int, *, stopped: bool) -> None:
        prompt, tokens = texts[row]
        if stopped or len(tokens) >= max_tokens or ended(tokens):
            on_tokens(prompt, tokens)
            del texts[row]

    while waiting or texts:
        free = [row for row in range(shape.rows) if row not in texts]
        while waiting and (len(free) >= min(together, len(waiting)) or not texts):
            members = [waiting.popleft() for _ in range(min(together, len(waiting), len(free)))]
            places, free = free[: len(members)], free[len(members) :]
            tokens, lengths = Batch(shape.width, together, tuple(members)).pad(prompts)
            filler = [0] * (together - len(members))
            whom = jnp.asarray([*members, *filler], jnp.int32)
            where = jnp.asarray([*places, *(shape.rows for _ in filler)], jnp.int32)  # no row: dropped
            first, rows = _fill(
                model, rows, jnp.asarray(tokens), jnp.asarray(lengths), whom, where, stops, key, sampler
            )
            on_steps(together)
            stopped = np.asarray(rows.stopped).tolist()
            for row, prompt, token in zip(places, members, np.asarray(first).tolist(), strict=False):
                texts[row] = prompt, [] if stopped[row] else [token]
                settle(row, stopped=stopped[row])
            free = [row for row in range(shape.rows) if row not in texts]
        if not texts:
            continue
        written, counts, rows = _advance(model, rows, stops, key, sampler)
        on_steps(shape.rows * ROUND)
        new = np.asarray(written).tolist(), np.asarray(counts).tolist(), np.asarray(rows.stopped).tolist()
        for row in list(texts):
            texts[row][1].extend(new[0][row][: new[1][row]])
            settle(row, stopped=new[2][row])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _empty(model: Llama, count: int, capacity: int) -> Rows:
    nothing = jnp.zeros(count, jnp.int32)
    return Rows(nothing, jnp.ones(count, bool), nothing, nothing, empty_cache(model, count, capacity))


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="rows")
def _fill(
    model: Llama,
    rows: Rows,
    tokens: Int32[Array, "some width"],
    lengths: Int32[Array, "some"],
    whom: Int32[Array, "some"],
    where: Int32[Array, "some"],
    stops: Int32[Array, "stops"],
    key: Key,
    sampler: Sampler,
) -> tuple[Int32[Array, "some"], Rows]:
    """Read prompts, choose their first tokens, and put them into rows; a place beyond the last row drops one."""
    logits, cache = models.prefill(model, tokens, lengths, rows.cache.capacity)
    chosen = _choose(logits, key, whom, jnp.zeros_like(whom), sampler)
    axis = 1 if isinstance(model.layers, Stacked) else 0

    def put(old: Array, new: Array) -> Array:
        return (old.at[where] if axis == 0 else old.at[:, where]).set(new, mode="drop")

    def put_row(old: Array, new: Array) -> Array:
        return old.at[where].set(new, mode="drop")

    kept = models.Cache(
        layers=jax.tree.map(put, rows.cache.layers, cache.layers),
        positions=put_row(rows.cache.positions, cache.positions),
        capacity=rows.cache.capacity,
    )
    return chosen, Rows(
        tokens=put_row(rows.tokens, chosen),
        stopped=put_row(rows.stopped, jnp.isin(chosen, stops)),
        steps=put_row(rows.steps, jnp.ones_like(whom)),
        prompts=put_row(rows.prompts, whom),
        cache=kept,
    )


@functools.partial(jax.jit, static_argnames="sampler", donate_argnames="rows")
def _advance(
    model: Llama, rows: Rows, stops: Int32[Array, "stops"], key: Key, sampler: Sampler
) -> tuple[Int32[Array, "rows round"], Int32[Array, "rows"], Rows]:
    """Choose a round of tokens in each row; return them, and how many of each come before a stop token."""

    def step(now: Rows, _: None) -> tuple[Rows, tuple[Int32[Array, "rows"], Bool[Array, "rows"]]]:
        logits, cache = models.decode(model, now.tokens, now.cache)
        chosen = _choose(logits, key, now.prompts, now.steps, sampler)
        stopped = now.stopped | jnp.isin(chosen, stops)
        return Rows(chosen, stopped, now.steps + 1, now.prompts, cache), (chosen, ~stopped)

    rows, (written, running) = jax.lax.scan(step, rows, None, length=ROUND)
    return written.T, jnp.sum(running, axis=0, dtype=jnp.int32), rows


def _choose(
    logits: Float[Array, "rows vocab"],
    key: Key,
    prompts: Int32[Array, "rows"],
    steps: Int32[Array, "rows"],
    sampler: Sampler,
) -> Int32[Array, "rows"]:
    if sampler.temperature == 0.0:
        return sampler(logits, key)

    def draw(row: Float[Array, "vocab"], prompt: Any, step: Any) -> Int32[Array, ""]:
        return sampler(row[None], jax.random.fold_in(jax.random.fold_in(key, prompt), step))[0]

    return jax.vmap(draw)(logits, prompts, steps)
