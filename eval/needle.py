"""Needle in a haystack: does a model give back a line that was hidden in a long text? Length by depth, exact match.

After LLMTest_NeedleInAHaystack (Kamradt 2023): a prompt of a given number of tokens is

    instruction | haystack up to the depth | needle | the rest of the haystack | question

where the place is moved back to the end of a sentence, and the haystack is repeated where it is too short. There a
larger model marks the answers from 1 to 10; here a needle is found or not: greedy decoding begins with the answer.

`five_needles` is QLLM-INFER's protocol, pass keys in the middle of one line repeated, marked in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np

from jquant.errors import DataError
from jquant.models import Llama
from jquant.runtime import generate

type Arrangement = Literal["alone", "together"]
type OnCell = Callable[[int, int, float], None]  # (prompts answered, prompts in all, share found so far)

# QLLM-INFER, utils/needle_in_a_haystack (spec_acts_kv.md 10.6): the instruction, the filler of 127 lines, five keys.
INSTRUCTION: Final = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
FILLER: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 127
KEYS: Final = ("47x291", "8a3605", "1294k8", "590p37", "68v423")
_CITIES: Final = ("Oslo", "Lima", "Cairo", "Delhi", "Quebec")  # tell needles apart that share a haystack
_SENTENCE_ENDS: Final = (".", "!", "?", "\n")


@runtime_checkable
class NeedleTokenizer(Protocol):
    """Name what this test needs of a tokenizer; `transformers.PreTrainedTokenizerFast` has it."""

    def encode(self, text: str, **options: Any) -> Any:
        """Return the ids of a text."""
        ...

    def decode(self, token_ids: Any, /, **options: Any) -> Any:
        """Return the text of ids."""
        ...


@dataclass(frozen=True)
class Needle:
    """Hold a line to hide, the question that ends the prompt, and how the answer must begin."""

    text: str
    question: str
    answer: str


NEEDLES: Final = tuple(
    Needle(
        f"\nThe pass key of {city} is {key}. Remember it. {key} is the pass key of {city}.\n",
        f"\nWhat is the pass key of {city}? The pass key of {city} is",
        key,
    )
    for city, key in zip(_CITIES, KEYS, strict=True)
)


@dataclass(frozen=True)
class NeedleTest:
    """Say what is hidden where.

    Attributes:
      lengths: tokens of a prompt and its answer together.
      depths: per cent of the haystack that stand before the needle, 0 to 100.
      needles: what is hidden; each is asked for in a prompt of its own.
      arrangement: "alone", one needle in each haystack, or "together", all of them in each, the first at the depth and
        the others spread evenly over what follows, as LLMTest_NeedleInAHaystack does with several.

    Raises:
      DataError: there is nothing to test, a length is below 2, or a depth is outside 0 to 100.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    needles: tuple[Needle, ...] = NEEDLES
    arrangement: Arrangement = "alone"

    def __post_init__(self) -> None:
        """Refuse what cannot be tested."""
        if not (self.lengths and self.depths and self.needles) or min(self.lengths) < 2:
            raise DataError(
                f"lengths {self.lengths}, depths {self.depths} and {len(self.needles)} needles: give one of each at "
                "least, and lengths of at least 2 tokens"
            )
        if not all(0.0 <= depth <= 100.0 for depth in self.depths):
            raise DataError(f"depths {self.depths}: give per cent of the haystack, 0 to 100")


@dataclass(frozen=True)
class NeedleGrid:
    """Hold what was found.

    Attributes:
      lengths: tokens of prompt and answer together.
      depths: per cent of the haystack before the needle.
      found: share of the needles that were found, [depth][length].
      answers: what the model wrote, [depth][length][needle].
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    found: tuple[tuple[float, ...], ...]
    answers: tuple[tuple[tuple[str, ...], ...], ...]

    def share(self) -> float:
        """Return the share of all needles that were found."""
        return float(np.mean(self.found))


def needle_grid(
    model: Llama,
    tokenizer: NeedleTokenizer,
    haystack: str,
    test: NeedleTest,
    *,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    on_cell: OnCell = lambda done, total, share: None,
) -> NeedleGrid:
    """Ask a model for every needle at every length and depth.

    Args:
      model: the model, with whatever KV codec it has.
      tokenizer: its own.
      haystack: the text to hide needles in; repeated where it is too short.
      test: what is hidden where.
      batch_size: prompts that are read at once; changes memory and speed, not the answers.
      prefill_chunk: see `jquant.runtime.generate`.
      on_cell: called after each answer.

    Raises:
      DataError: a length is beyond the model's context or too short for a needle, or the haystack is empty.

    Reference: https://github.com/gkamradt/LLMTest_NeedleInAHaystack
    """
    tokens = max(len(_encode(tokenizer, f" {needle.answer}")) for needle in test.needles)
    _check_lengths(model, test.lengths)
    prompts = {
        length: [
            prompt
            for depth in test.depths
            for prompt in hide_needles(tokenizer, haystack, test, length=length - tokens, depth=depth)
        ]
        for length in test.lengths
    }
    answers: list[list[str]] = []
    marks: list[bool] = []
    total = len(test.lengths) * len(test.depths) * len(test.needles)
    expected = [needle.answer for needle in test.needles] * len(test.depths)
    for length in test.lengths:
        answers.append([])
        for answer in _ask(model, tokenizer, prompts[length], tokens, batch_size, prefill_chunk):
            marks.append(_is_found(answer, expected[len(answers[-1])]))
            answers[-1].append(answer)
            on_cell(len(marks), total, float(np.mean(marks)))
    shape = len(test.lengths), len(test.depths), len(test.needles)
    found = np.asarray(marks, np.float64).reshape(shape).mean(axis=-1).T
    texts = np.asarray(answers, object).reshape(shape).swapaxes(0, 1)
    return NeedleGrid(test.lengths, test.depths, _tuples(found.tolist()), _tuples(texts.tolist()))


def five_needles(
    model: Llama,
    tokenizer: NeedleTokenizer,
    *,
    copies: int = 5,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    on_cell: OnCell = lambda done, total, share: None,
) -> NeedleGrid:
    """Ask for QLLM-INFER's five pass keys, each in the middle of its filler.

    The published run samples by the model's own settings and is marked by eye; here decoding is greedy and the answer
    must begin with the key. As there, as many tokens are written as the key has by itself, specials counted.

    Args:
      model: the model.
      tokenizer: its own.
      copies: of the filler, before the needle and behind it; 5 as published, 33 thousand tokens in all.
      batch_size: prompts that are read at once.
      prefill_chunk: see `jquant.runtime.generate`.
      on_cell: called after each answer.

    Returns:
      A grid of one cell.

    Raises:
      DataError: the prompts are beyond the model's context, or `copies` is below 1.
    """
    if copies < 1:
        raise DataError(f"copies={copies}: give 1 at least")
    prompts = [_encode(tokenizer, pass_key_prompt(key, copies), special=True) for key in KEYS]
    tokens = max(len(_encode(tokenizer, key, special=True)) for key in KEYS)
    length = max(map(len, prompts)) + tokens
    _check_lengths(model, (length,))
    answers: list[str] = []
    for answer in _ask(model, tokenizer, prompts, tokens, batch_size, prefill_chunk):
        answers.append(answer)
        found = float(np.mean([_is_found(one, key) for one, key in zip(answers, KEYS, strict=False)]))
        on_cell(len(answers), len(KEYS), found)
    return NeedleGrid((length,), (50.0,), ((found,),), ((tuple(answers),),))


def pass_key_prompt(key: str, copies: int = 5) -> str:
    """Return QLLM-INFER's prompt for one pass key.

    >>> len(FILLER), pass_key_prompt("47x291").count("47x291")
    (11430, 2)
    """
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    return f"{INSTRUCTION}{FILLER * copies}{needle}{FILLER * copies}What is the pass key? The pass key is "


def hide_needles(
    tokenizer: NeedleTokenizer, haystack: str, test: NeedleTest, *, length: int, depth: float
) -> list[list[int]]:
    """Return one prompt for each needle, of exactly `length` tokens.

    Raises:
      DataError: the haystack is empty, or the length leaves no token for it.
    """
    hay = _encode(tokenizer, haystack)
    if not hay:
        raise DataError("the haystack is empty: give a text")
    start = _encode(tokenizer, INSTRUCTION, special=True)
    hidden = [_encode(tokenizer, needle.text) for needle in test.needles]
    prompts = []
    for index, needle in enumerate(test.needles):
        question = _encode(tokenizer, needle.question)
        inside = hidden if test.arrangement == "together" else [hidden[index]]
        room = length - len(start) - len(question) - sum(map(len, inside))
        if room < 1:
            raise DataError(
                f"a prompt of {length} tokens leaves {room} for the haystack: {length - room} are instruction, needles "
                "and question. Ask for greater lengths or fewer needles"
            )
        body = (hay * (room // len(hay) + 1))[:room]
        depths = [depth + rank * (100.0 - depth) / len(inside) for rank in range(len(inside))]
        for place, part in reversed([(_place(tokenizer, body, at), part) for at, part in zip(depths, inside)]):
            body = body[:place] + part + body[place:]
        prompts.append(start + body + question)
    return prompts


def _place(tokenizer: NeedleTokenizer, body: Sequence[int], depth: float) -> int:
    """Return where a needle goes: behind the last sentence that ends at the depth or before it."""
    place = round(len(body) * depth / 100.0)
    while 0 < place < len(body) and not str(tokenizer.decode([body[place - 1]])).rstrip(" ").endswith(_SENTENCE_ENDS):
        place -= 1
    return place


def _ask(
    model: Llama,
    tokenizer: NeedleTokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batch_size: int,
    prefill_chunk: int | None,
) -> Iterator[str]:
    """Yield the answer to each prompt; the last batch is filled up, so that all have one shape."""
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        filled = batch + batch[:1] * (min(batch_size, len(prompts)) - len(batch))
        written = generate(model, filled, max_tokens=tokens, prefill_chunk=prefill_chunk).tokens
        yield from (str(tokenizer.decode(row)) for row in written[: len(batch)])


def _check_lengths(model: Llama, lengths: Sequence[int]) -> None:
    context = model.config.max_position_embeddings
    if max(lengths) > context:
        raise DataError(
            f"prompts and answers of {max(lengths)} tokens, but the model's context is {context}: ask for shorter ones"
        )


def _is_found(answer: str, expected: str) -> bool:
    return answer.lstrip().startswith(expected)


def _encode(tokenizer: NeedleTokenizer, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
