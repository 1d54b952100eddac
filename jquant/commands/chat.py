"""`jquant chat`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import jax
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from convert import load_tokenizer
from eval import Message, ReplyTimes, render, reply
from jquant.commands.display import note, stdout
from jquant.errors import DataError
from jquant.folders import open_abstract, open_for_use
from jquant.inspection import CacheFacts, measure_cache
from jquant.machines import TargetName
from jquant.models import Llama
from jquant.sampling import Sampler
from jquant.tables import format_bytes
from jquant.targets import describe_products

_HELP: Final = "/stats: what the last answer took; /clear: forget the conversation; /help: this; an empty line ends"


@dataclass(frozen=True)
class _Side:
    """Hold one of the models that answer: its own conversation, and what its last answer took."""

    name: str
    model: Llama
    tokenizer: Any
    cache: CacheFacts
    messages: list[Message] = field(default_factory=list)
    times: list[ReplyTimes] = field(default_factory=list)

    def describe(self) -> str:
        """Return the line of /stats."""
        if not self.times:
            return f"{self.name}: no answer yet"
        last = self.times[-1]
        count = last.prompt + last.tokens
        size = format_bytes(round(self.cache.nbytes_per_token * count))
        speed = f"{last.prompt} tokens read, {last.tokens} written, the first after {last.first:.2f} s"
        bits = f"{self.cache.bits_per_value:.3f} bits per value, {self.cache.codec}"
        return f"{self.name}: {speed}, then {last.rate():.1f} tokens/s; KV cache {size} for {count} tokens, {bits}"


def run(
    model: str,
    /,
    *,
    against: str | None = None,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    target: TargetName = "auto",
) -> None:
    """Talk with a chat model by its own template; /help tells the commands, an empty line, Ctrl-D or Ctrl-C ends.

    Args:
      model: a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
      against: a second model that answers beside the first, each in a conversation of its own.
      system: what the model is told first; the template's own if not given.
      max_tokens: the most tokens of an answer.
      temperature: 0 takes the likeliest token, above 0 draws.
      top_k: draw from the likeliest K tokens.
      top_p: draw from the likeliest tokens that have this probability together.
      seed: of the draws.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200. With +tokamax,
        prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
    """
    sampler, console = Sampler(temperature, top_k, top_p), stdout()
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    sides = [_open(name, target, start) for name in (model, against) if name is not None]
    while question := _ask(console):
        if question.startswith("/"):
            console.print(_command(question, sides, start), markup=False, highlight=False, soft_wrap=True)
            continue
        for side in sides:
            side.messages.append({"role": "user", "content": question})
        key = jax.random.fold_in(jax.random.key(seed), len(sides[0].messages))
        show = _beside if len(sides) > 1 and console.is_terminal else _below

        def answer(side: _Side, key: jax.Array = key) -> Iterator[str]:
            options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": sampler, "key": key}
            return reply(side.model, side.tokenizer, side.messages, **options, on_end=side.times.append)

        try:
            texts = show(console, sides, answer)
        except DataError as error:  # the question is taken back; what was said before it stays
            console.print(f"{error}; or forget the conversation: /clear", markup=False, highlight=False, soft_wrap=True)
            for side in sides:
                side.messages.pop()
            continue
        for side, text in zip(sides, texts, strict=True):
            side.messages.append({"role": "assistant", "content": text})


def _open(name: str, target: TargetName, start: list[Message]) -> _Side:
    tokenizer: Any = load_tokenizer(name)
    render(tokenizer, [{"role": "user", "content": ""}])  # a tokenizer without a template is refused before any work
    tree = open_for_use(name, target=target)
    note(f"products by {describe_products(tree)}")
    return _Side(name, tree, tokenizer, measure_cache(open_abstract(name)), list(start))


def _command(line: str, sides: list[_Side], start: list[Message]) -> str:
    """Return what a line that begins with / gives."""
    if line == "/stats":
        return "\n".join(side.describe() for side in sides)
    if line == "/clear":
        for side in sides:
            side.messages[:] = start
        return "the conversation is forgotten"
    return _HELP if line == "/help" else f"{line} is no command. {_HELP}"


def _below(console: Console, sides: list[_Side], answer: Callable[[_Side], Iterator[str]]) -> list[str]:
    """Print answers one after the other, piece by piece."""
    texts = []
    for side in sides:
        if len(sides) > 1:
            console.print(f"[{side.name}]", markup=False, highlight=False, soft_wrap=True)
        text = ""
        for piece in answer(side):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            text += piece
        console.print()
        texts.append(text)
    return texts


def _beside(console: Console, sides: list[_Side], answer: Callable[[_Side], Iterator[str]]) -> list[str]:
    """Print answers side by side, both growing piece by piece in turn."""
    texts = [""] * len(sides)

    def panels() -> Columns:
        width = console.width // len(sides) - 1
        shown = (Panel(Text(text), title=side.name, width=width) for side, text in zip(sides, texts, strict=True))
        return Columns(list(shown), padding=0)

    with Live(panels(), console=console, vertical_overflow="visible") as live:
        for pieces in itertools.zip_longest(*map(answer, sides), fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            live.update(panels())
    return texts


def _ask(console: Console) -> str:
    """Reads one line; "" at the end of the input."""
    try:
        return console.input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
