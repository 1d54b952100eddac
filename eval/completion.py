"""Texts that models write on until a phrase: the measure behind tasks whose answer is extracted from what was written.

Tokens are written in rounds, after each of which the texts are looked at: a row that has written one of the phrases,
its end of text, or the most tokens there may be, takes the next prompt (`eval.refill`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from eval.batches import BATCH_TOKENS, make_batches
from eval.refill import write_all
from jquant.errors import DataError
from jquant.models import Llama
from jquant.sampling import GREEDY, Sampler
from jquant.types import Key


@runtime_checkable
class Decoder(Protocol):
    """Name what completion needs of a tokenizer; `transformers.PreTrainedTokenizerFast` has it."""

    def decode(self, token_ids: Any, /, **options: Any) -> Any:
        """Return the text of token ids."""
        ...


@dataclass(frozen=True)
class Ending:
    """Say how texts are written and where they end.

    Attributes:
      phrases: texts that end a row, and are cut off with all behind them.
      token: an id that ends a row, such as the tokenizer's end of text; None where there is none.
      max_tokens: the most tokens of a row.
      sampler: how the next token is chosen.
    """

    phrases: tuple[str, ...] = ()
    token: int | None = None
    max_tokens: int = 256
    sampler: Sampler = GREEDY


class Completion(NamedTuple):
    """Hold what was written after one prompt, and how many tokens were cut from the prompt's left."""

    text: str
    dropped: int


def complete(
    model: Llama,
    tokenizer: Decoder,
    prompts: Sequence[Sequence[int]],
    ending: Ending,
    *,
    batch_tokens: int = BATCH_TOKENS,
    key: Key | None = None,
    on_text: Callable[[int, Completion], None] = lambda index, completion: None,
    on_steps: Callable[[int], None] = lambda run: None,
) -> list[Completion]:
    """Write on after each prompt.

    A prompt that leaves no room for `max_tokens` in the model's context loses its left end, as with lm-eval's own
    models; `dropped` says so.

    Args:
      model: the model.
      tokenizer: its own.
      prompts: token ids, at least one in each.
      ending: where texts end, and how tokens are chosen.
      batch_tokens: tokens of prompts, padding counted, that go through the model at once.
      key: of the random choice; may be left out for a greedy sampler.
      on_text: called with a prompt's index and its completion as soon as there is one; in no particular order.
      on_steps: called with the row-steps that were run: after a prompt's first token, each is a token that one row
        could have written.

    Raises:
      DataError: a prompt is empty, has an id outside the vocabulary, or `max_tokens` leaves no room for one.
    """
    room = model.config.max_position_embeddings - ending.max_tokens
    if ending.max_tokens < 1 or room < 1:
        raise DataError(
            f"{ending.max_tokens} tokens are to be written, but the model's context is {room + ending.max_tokens}: "
            "ask for at least 1 and for fewer than the context"
        )
    ids = [token for prompt in prompts for token in prompt]
    if not all(map(len, prompts)) or (ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size):
        raise DataError(
            f"a prompt is empty or has ids outside 0 to {model.config.vocab_size - 1}: encode it with the model's own "
            "tokenizer"
        )
    kept = [list(prompt[-room:]) for prompt in prompts]
    results: dict[int, Completion] = {}
    batches = make_batches([len(prompt) for prompt in kept], longest=room, batch_tokens=batch_tokens)
    stops = jnp.asarray(np.asarray([] if ending.token is None else [ending.token], np.int32))

    def keep(index: int, tokens: list[int]) -> None:
        text = _cut(tokenizer, tokens[: ending.max_tokens], ending)
        results[index] = Completion(text, len(prompts[index]) - len(kept[index]))
        on_text(index, results[index])

    for _, alike in itertools.groupby(batches, key=lambda batch: batch.width):
        first, *others = alike
        members = (*first.members, *(member for batch in others for member in batch.members))
        write_all(
            model,
            kept,
            dataclasses.replace(first, members=members),
            stops,
            jax.random.key(0) if key is None else key,
            max_tokens=ending.max_tokens,
            sampler=ending.sampler,
            ended=lambda tokens: _names_phrase(tokenizer, tokens, ending),
            on_tokens=keep,
            on_steps=on_steps,
        )
    return [results[index] for index in range(len(prompts))]


def _names_phrase(tokenizer: Decoder, tokens: list[int], ending: Ending) -> bool:
    if not ending.phrases:
        return False
    text = str(tokenizer.decode(tokens, skip_special_tokens=False))
    return any(phrase in text for phrase in ending.phrases)


def _cut(tokenizer: Decoder, tokens: list[int], ending: Ending) -> str:
    """Return the text up to the first phrase, which may be a special token's text."""
    if _names_phrase(tokenizer, tokens, ending):
        low, high = 0, len(tokens)  # the fewest tokens that have a phrase: more tokens have it too
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _names_phrase(tokenizer, tokens[:middle], ending) else (middle + 1, high)
        tokens = tokens[:low]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    for phrase in ending.phrases:
        text = text.split(phrase)[0]
    return text
