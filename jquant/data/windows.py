"""Windows of tokens out of a text: consecutive ones for perplexity, random ones for calibration.

The protocols are GPTQ's, as quantization papers use them. WikiText-2: rows joined by a blank line, tokenised once
(one BOS, if the tokenizer adds one), consecutive windows, the tail dropped. C4: documents drawn at random until one
is longer than a window, then a random window of it; its tokens keep a BOS only where the window begins at the
document's first token.
"""

import random
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from jquant.data.text import Text
from jquant.errors import DataError

_C4_WINDOWS: Final = 256  # GPTQ's and QLLM-INFER's C4 evaluation
_C4_SEED: Final = 0


@runtime_checkable
class TextTokenizer(Protocol):
    """Name the one method that windows need of a tokenizer; `transformers.PreTrainedTokenizerFast` has it."""

    def encode(self, text: str, *, verbose: bool) -> list[int]:
        """Return the ids of `text`, with the special tokens that the tokenizer adds by its own rule."""
        ...


def token_windows(
    text: Text, tokenizer: TextTokenizer, *, length: int, count: int | None = None, seed: int | None = None
) -> Int32[np.ndarray, "count length"]:
    """Cut windows of `length` tokens out of a text, by the protocol that its `sampling` and `seed` ask for.

    Joined text without a seed gives consecutive windows from its beginning, which is how perplexity is measured; with
    a seed, `count` windows at distinct random places, which is how calibration data is drawn. Text of sampling
    "documents" gives random windows of random long documents (seed 0 unless told, 256 windows unless told); fewer are
    the first of more.

    Args:
      text: what `load_text` returned.
      tokenizer: the model's tokenizer.
      length: tokens in a window.
      count: how many windows; None for all consecutive ones, or for 256 of documents.
      seed: of the random choice; None for the evaluation protocol.

    Returns:
      Token ids [count, length].

    Raises:
      DataError: the text is too short; the message says how many tokens there are and how many are needed.

    Example:
      >>> from types import SimpleNamespace
      >>> characters = SimpleNamespace(encode=lambda text, verbose: [ord(letter) for letter in text])
      >>> letters = Text("letters", "evaluation", ("abcdefg",), "joined", {})
      >>> token_windows(letters, characters, length=3).tolist()
      [[97, 98, 99], [100, 101, 102]]
    """
    if length < 2 or (count is not None and count < 1):
        raise DataError(f"windows need a length of at least 2 and a count of at least 1, got {length} and {count}")
    if text.sampling == "documents":
        return _of_documents(text, tokenizer, length, count or _C4_WINDOWS, _C4_SEED if seed is None else seed)
    stream = np.asarray(tokenizer.encode(text.joined(), verbose=False), dtype=np.int32)
    if seed is None:
        return _consecutive(text, stream, length, count)
    if count is None:
        raise DataError(f"random windows of {text.name!r} (seed {seed}) need a count: say how many")
    return _random_crops(text, stream, length, count, seed)


def load_windows(path: Path, *, length: int, count: int) -> Int32[np.ndarray, "count length"]:
    """Load windows of tokens that someone else has cut: the first tokens of the first rows of a `.npy` file.

    Args:
      path: a file of whole numbers [rows, tokens].
      length: tokens in a window.
      count: how many windows.

    Returns:
      Token ids [count, length].

    Raises:
      DataError: the file cannot be read, holds something else, or is too small.
    """
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as windows of tokens: {error}; give what numpy.save wrote") from error
    if not isinstance(stored, np.ndarray) or stored.ndim != 2 or stored.dtype.kind not in "iu":
        raise DataError(f"{path} holds no windows of tokens: give one array of whole numbers [windows, tokens]")
    rows, tokens = stored.shape
    if rows < count or tokens < length:
        raise DataError(
            f"{path} has {rows} windows of {tokens} tokens, but {count} of {length} are asked for: "
            "ask for fewer or shorter windows"
        )
    if stored.min() < 0 or stored.max() > np.iinfo(np.int32).max:
        raise DataError(f"{path} has token ids from {stored.min()} to {stored.max()}: give 32-bit ids, 0 and above")
    return np.ascontiguousarray(stored[:count, :length], dtype=np.int32)


def _consecutive(text: Text, stream: np.ndarray, length: int, count: int | None) -> np.ndarray:
    available = len(stream) // length
    if available < (count or 1):
        raise _too_short(text, len(stream), length, count or 1, (count or 1) * length)
    windows = available if count is None else count
    return stream[: windows * length].reshape(windows, length)


def _random_crops(text: Text, stream: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    places = len(stream) - length + 1
    if places < count:
        raise _too_short(text, len(stream), length, count, length + count - 1)
    starts = np.random.default_rng(seed).choice(places, size=count, replace=False)
    return np.stack([stream[start : start + length] for start in starts])


def _of_documents(text: Text, tokenizer: TextTokenizer, length: int, count: int, seed: int) -> np.ndarray:
    """Draw as GPTQ's data code does, with Python's generator, so that the windows are the published ones."""
    generator = random.Random(seed)
    lengths: dict[int, int] = {}
    windows = np.empty((count, length), dtype=np.int32)
    for row in range(count):
        ids: list[int] = []
        while len(ids) <= length:
            index = generator.randint(0, len(text.documents) - 1)
            if lengths.get(index, length + 1) > length:
                ids = tokenizer.encode(text.documents[index], verbose=False)
                lengths[index] = len(ids)
            if len(lengths) == len(text.documents) and max(lengths.values()) <= length:
                raise DataError(
                    f"{text.name!r} ({text.split}): the longest of its {len(lengths)} documents has "
                    f"{max(lengths.values())} tokens, but a window needs a document of at least {length + 1}: "
                    "ask for shorter windows or give longer documents"
                )
        start = generator.randint(0, len(ids) - length - 1)
        windows[row] = ids[start : start + length]
    return windows


def _too_short(text: Text, have: int, length: int, count: int, need: int) -> DataError:
    return DataError(
        f"{text.name!r} ({text.split}) has {have} tokens, but {count} windows of {length} need {need}: "
        "give a longer text, or ask for fewer or shorter windows"
    )
