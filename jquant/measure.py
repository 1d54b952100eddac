"""Perplexity of a checkpoint on a named text: opening, tokens and model put together."""

import time
from dataclasses import dataclass
from pathlib import Path

from convert import load_tokenizer
from eval import Perplexity, perplexity
from jquant.data import load_text, token_windows
from jquant.folders import open_for_use
from jquant.progress import OnProgress, Progress, ignore


@dataclass(frozen=True)
class Measurement:
    """A perplexity and what it was measured on.

    Attributes:
      perplexity: the figure and its windows.
      dataset: name or path of the text.
      provenance: where the text came from, as `jquant.data.Text` has it.
      seconds: time that the windows took, compilation included.
    """

    perplexity: Perplexity
    dataset: str
    provenance: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class ModelFigures:
    """What a table says of one model.

    Attributes:
      name: how the table calls it.
      perplexity: on the text that all models of the table are measured on.
      bits_per_weight: of the linears of all blocks.
      nbytes: of all arrays, the embedding table among them.
      seconds: what converting or quantizing it took.
    """

    name: str
    perplexity: float
    bits_per_weight: float
    nbytes: int
    seconds: float


def measure(
    source: str | Path,
    dataset: str,
    *,
    length: int = 2048,
    windows: int | None = None,
    folder: Path | None = None,
    on_progress: OnProgress = ignore,
) -> Measurement:
    """Measures the perplexity of a checkpoint on the evaluation split of a text.

    Args:
      source: what `open_model` takes.
      dataset: a name or path for `jquant.data.load_text`.
      length: tokens of a window.
      windows: how many; None for all of the text.
      folder: where the files of a named data set lie; None to get it from the hub.
      on_progress: called after each window.

    Raises:
      DataError: the text cannot be had or is too short.
      CheckpointError: the model cannot be read.
      ConversionError: the same, for a foreign one.
    """
    text = load_text(dataset, "evaluation", folder=folder)
    tokens = token_windows(text, load_tokenizer(source), length=length, count=windows)
    on_progress(Progress("reading the model"))
    model = open_for_use(source)
    started = time.monotonic()
    figure = perplexity(
        model,
        tokens,
        on_window=lambda done, total, value: on_progress(Progress(f"perplexity {value:.3f} so far", done, total)),
    )
    return Measurement(figure, dataset, dict(text.provenance), time.monotonic() - started)
