"""Whole jobs from one checkpoint on disk to another: what the command line, the demo and tests call.

A quantization keeps its finished blocks in `<out>.partial` until the result is saved. Whatever stops it, the same call
goes on from there; blocks are taken over only if model, recipe, tokens and versions are the same.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from convert import Consumer, ExportFormat, Verified, export_model, locate, open_source
from convert.huggingface import StoredDtype
from jquant.blocks import ActivationPlace, Devices, calibration_attention
from jquant.budget import ModelPlace, activations_on_disk, available, choose, describe_memory
from jquant.calibration import BlockStore, WeightFaults, compilers
from jquant.checkpoint import digest, digest_lazily, is_checkpoint, save_lazily, sweep_unfinished
from jquant.data import TextTokenizer, load_text, load_windows, token_windows
from jquant.errors import CalibrationError, CheckpointError, DataError, JquantError, ProcessError, RecipeError
from jquant.folders import (
    RECIPE,
    REPORT,
    open_abstract,
    open_lazily,
    open_model,
    open_tokenizer,
    other_files,
    prepare_output,
    remove_folder,
)
from jquant.formats import tree_nbytes
from jquant.models import LazyModel, Llama, LlamaConfig, abstract_llama, in_memory
from jquant.passes import Context, run_passes, stream_passes
from jquant.plan import Plan, plan
from jquant.processes import meet
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Recipe, to_yaml
from jquant.recipe import digest as recipe_digest
from jquant.report import BlockReport, Report

WINDOWS: Final = ".npy"  # ending of a calibration data set that is windows of tokens
_STORE_FILES: Final = {"lock", "fingerprint.json", "fingerprint.json.partial"}  # what a store may hold besides blocks
_STORE_FOLDERS: Final = ("block-", "whole-")  # how the names of its folders begin
_RESULTS: Final = ("jquant", "jax", "jaxlib", "numpy")  # packages whose version may change a result's bits


def convert_checkpoint(
    source: str | Path, out: Path, *, dtype: StoredDtype = "auto", on_progress: OnProgress = ignore
) -> Llama:
    """Writes a foreign checkpoint as a jquant checkpoint, with its tokenizer; half a GiB of arrays at a time.

    Args:
      source: a Hugging Face folder, a GGUF file or a hub id.
      out: the folder to make; it must not exist, or be empty.
      dtype: of the arrays.
      on_progress: called at each stage.

    Returns:
      The model, with `jax.ShapeDtypeStruct` for arrays.

    Raises:
      ConversionError: the source cannot be read.
      CheckpointError: `out` cannot be written, or the disk has not enough room; said before any work.
    """
    started = time.monotonic()
    prepare_output(out, nbytes=tree_nbytes(open_abstract(source, dtype=dtype)))
    on_progress(Progress("opening the model"))
    _, files = open_tokenizer(source)
    model = open_lazily(source, dtype=dtype)
    on_progress(Progress("reading and saving"))
    nbytes = tree_nbytes(model.abstract)

    def report() -> bytes:  # when all is read and saved
        seconds = time.monotonic() - started
        return Report(details=(("source", str(source)), ("bytes", nbytes), ("seconds", seconds))).to_json().encode()

    save_lazily(model, out, files={**files, REPORT: report})
    return model.abstract


def export_checkpoint(
    source: str | Path,
    out: Path,
    *,
    format: ExportFormat,
    consumer: Consumer | None = None,
    dtype: StoredDtype = "auto",
    on_progress: OnProgress = ignore,
) -> Verified:
    """Writes a checkpoint as a Hugging Face folder that others read, with all its other files; or as a GGUF file.

    Its arrays are read, written and compared one linear after another: the model need not fit in memory.

    Args:
      source: a jquant checkpoint, or whatever `open_model` takes.
      out: the folder to make; it must not exist, or be empty. For gguf the file, which has the tokenizer in it.
      format: of the folder or file.
      consumer: the reader that it is checked for; None for llama.cpp where it is a GGUF file, else for transformers.
      dtype: of the arrays that are not packed; "auto" keeps what they have.
      on_progress: called at each stage.

    Returns:
      What verifying the folder found.

    Raises:
      ConversionError: the source cannot be read, the format cannot hold it, or the reader could not read the result.
      CheckpointError: `out` cannot be written, or the disk has not enough room.
    """
    abstract = open_abstract(source)
    stored = abstract.embed_tokens.dtype if dtype == "auto" else dtype
    whole = abstract_llama(abstract.config, stored) if format == "safetensors" else abstract
    prepare_output(out, nbytes=tree_nbytes(whole))
    on_progress(Progress("opening the model"))
    model = open_lazily(source)
    config = open_source(source).config if locate(source).is_dir() and not is_checkpoint(source) else None
    on_progress(Progress("writing, then reading back"))
    files = other_files(source)
    reader = consumer or ("llama.cpp" if format == "gguf" else "transformers")
    return export_model(model, out, format=format, consumer=reader, dtype=dtype, config=config, files=files)


def quantize(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    dtype: StoredDtype = "auto",
    resume: bool = False,
    statistics: Path | None = None,
    memory: ModelPlace | Literal["auto"] = "auto",
    activations: ActivationPlace | Literal["auto"] = "auto",
    devices: Devices = (),
    on_progress: OnProgress = ignore,
) -> Report:
    """Quantizes a checkpoint by a recipe and saves the result with recipe, report and tokenizer.

    Wherever model and activations are kept, the result is the same to the bit.

    Args:
      source: a Hugging Face folder, a GGUF file, a hub id, or an unquantized jquant checkpoint.
      out: the folder to make; it must not exist, or be empty.
      recipe: the method.
      folder: where the files of a named calibration data set lie; None to get it from the hub.
      dtype: of a foreign checkpoint's arrays, and so of the activations.
      resume: whether a run must be there to go on with; without, one is gone on with if there is one.
      statistics: folder for what is collected on the source's own activations, to share it with other runs.
      memory: "whole" to load the model, "blocks" to read one block at a time from disk; "auto" chooses as
        `jquant.budget` says.
      activations: where calibration activations are kept: "device", "host" or "disk"; "auto" chooses likewise.
      devices: over which calibration windows are spread, of all processes; the result has the same bits on any. Empty
        for one. In several processes every one of them has the whole model.
      on_progress: called at each stage and after each block.

    Returns:
      The report; it is saved as report.json too.

    Raises:
      JquantError: what is wrong with source, recipe, text or disk. What can be known before the work is said before it;
        after that, finished blocks are kept and the message says how to go on.
    """
    started = time.monotonic()
    store_path = store_of(out)
    abstract = open_abstract(source, dtype=dtype)
    _check_length(recipe, abstract)
    figures = plan(abstract, recipe)
    first, several = jax.process_index() == 0, jax.process_count() > 1
    if several and memory == "blocks":
        raise RecipeError("several processes have the whole model each: leave memory=blocks out, or take one process")
    way = choose(figures, recipe, "whole" if several else memory, activations, available())
    needed = figures.nbytes + figures.store_nbytes + activations_on_disk(figures, way)
    if first:
        _check_store(store_path, resume=resume)
        prepare_output(out, nbytes=needed - _size_of(store_path))
    on_progress(Progress("reading tokenizer, calibration text and model"))
    tokenizer, files = open_tokenizer(source)
    tokens, provenance = calibration_tokens(recipe, tokenizer, abstract.config, folder=folder)
    model = open_model(source, dtype=dtype) if way.model == "whole" else open_lazily(source, dtype=dtype)
    fingerprint = _fingerprint(model, recipe, tokens)
    store = _open_store(store_path, fingerprint)
    with store.lock or contextlib.nullcontext(), _kept(store):
        if first:
            sweep_unfinished(out)
        total = abstract.config.num_hidden_layers
        if store.finished():
            on_progress(Progress(f"resuming: {store.finished()} of {total} blocks are finished"))
        context = Context(
            key=jax.random.key(recipe.seed),
            tokens=None if tokens is None else jnp.asarray(tokens),
            store=store,
            statistics=statistics,
            activations=way.activations,
            devices=devices,
            compilers=compilers(),
            on_block=_count_blocks(total, on_progress),
        )
        result, report = _run(recipe, model, context)

        @functools.cache
        def finish() -> Report:
            details = _details(source, recipe, fingerprint, provenance, figures, started)
            return report.merge(Report(details=(*details, ("memory", describe_memory(figures, way)))))

        on_progress(Progress("saving"))
        files |= {RECIPE: to_yaml(recipe).encode()}
        if first:
            save_lazily(result, out, files={**files, REPORT: lambda: finish().to_json().encode()})
    _remove_store(store_path, out)
    return finish()


def _run(recipe: Recipe, model: Llama | LazyModel, context: Context) -> tuple[LazyModel, Report]:
    if isinstance(model, LazyModel):
        return stream_passes(recipe.passes, model, context)
    quantized, report = run_passes(recipe.passes, model, context)
    return in_memory(quantized), report


def calibration_tokens(
    recipe: Recipe, tokenizer: TextTokenizer, config: LlamaConfig, *, folder: Path | None
) -> tuple[Int32[np.ndarray, "samples length"] | None, dict[str, str] | None]:
    """Returns the windows that a recipe asks for and where they are from; (None, None) if it asks for none.

    Raises:
      DataError: the text cannot be had, is too short, or its tokens are not in the model's vocabulary.
    """
    if recipe.calibration is None:
        return None, None
    length, count = recipe.calibration.length, recipe.calibration.samples
    if recipe.calibration.dataset.endswith(WINDOWS):
        tokens = load_windows(Path(recipe.calibration.dataset), length=length, count=count)
        provenance = {"source": recipe.calibration.dataset, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    else:
        text = load_text(recipe.calibration.dataset, "calibration", folder=folder)
        tokens = token_windows(text, tokenizer, length=length, count=count, seed=recipe.seed)
        provenance = dict(text.provenance)
    if tokens.max() >= config.vocab_size:
        raise DataError(
            f"{recipe.calibration.dataset} gives token ids up to {tokens.max()}, the model has {config.vocab_size}: "
            "they do not belong together; give the model's own tokenizer, or windows made with it"
        )
    return tokens, provenance


def _check_length(recipe: Recipe, model: Llama) -> None:
    context = model.config.max_position_embeddings
    if recipe.calibration is not None and recipe.calibration.length > context:
        raise CalibrationError(
            f"calibration windows of {recipe.calibration.length} tokens are longer than the model's context of "
            f"{context}; --set calibration.length={context}"
        )


def _check_store(path: Path, *, resume: bool) -> None:
    """Refuses a folder that is no store (it would be deleted at the end), and `resume` without a store."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise CheckpointError(f"cannot write to {path}: {error}. Choose a folder that you may write to") from error
    if not is_there:
        if resume:
            raise CheckpointError(f"there is no {path} to resume; leave --resume out to begin a run")
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    foreign = sorted(name for name in names - _STORE_FILES if not name.lstrip(".").startswith(_STORE_FOLDERS))
    if foreign:
        raise CheckpointError(
            f"{path} is where finished blocks are kept, but it holds {', '.join(foreign[:3])}; move it away, "
            "or give another output path"
        )


@contextlib.contextmanager
def _kept(store: BlockStore) -> Iterator[None]:
    """Adds to an error that finished work is kept and how to go on; removes a store that has none."""
    try:
        yield
    except JquantError as error:
        finished, measured = store.finished(), store.measured()
        if store.lock is None:
            raise
        if not finished and not measured:
            remove_folder(store.path)
            raise
        what = f"{finished} finished blocks{' and what was measured before' if measured else ''}"
        kept = f"{what} are kept in {store.path}; run the same command again to go on"
        raise type(error)(f"{error}\n{kept}") from error


def _open_store(path: Path, fingerprint: dict[str, str]) -> BlockStore:
    """Returns the store that the first process opens, as this process sees it."""
    own = BlockStore.open(path, fingerprint) if jax.process_index() == 0 else None
    return own if own is not None and jax.process_count() == 1 else BlockStore.share(path, own)


def _remove_store(path: Path, out: Path) -> None:
    """Removes the store of a run whose result is saved, which every process waits for.

    Raises:
      ProcessError: another one is gone; of the first process, whose result is there all the same.
    """
    first, several = jax.process_index() == 0, jax.process_count() > 1
    try:
        if several:
            meet("the result is saved")
    except ProcessError as error:
        if first:
            remove_folder(path)
            raise ProcessError(f"{out} is saved and whole, nothing is left to do; but {error}") from error
        raise
    if first:
        remove_folder(path)


def store_of(out: Path) -> Path:
    """Returns where a quantization keeps its finished blocks until its result is saved.

    >>> store_of(Path("models/out")).name
    'out.partial'
    """
    return out.with_name(out.name + ".partial")


def _count_blocks(total: int, on_progress: OnProgress) -> Callable[[BlockReport], None]:
    return lambda report: on_progress(Progress("quantizing", report.index + 1, total, report))


def _fingerprint(model: Llama | LazyModel, recipe: Recipe, tokens: np.ndarray | None) -> dict[str, str]:
    windows = b"" if tokens is None else np.ascontiguousarray(tokens).tobytes()
    return {
        "recipe": recipe_digest(recipe),
        "model": _look_through(model) if isinstance(model, LazyModel) else digest(model),
        "calibration tokens": hashlib.sha256(windows).hexdigest(),
        "device": jax.devices()[0].device_kind,
        **calibration_attention(model.abstract if isinstance(model, LazyModel) else model),
        **{f"{name} version": importlib.metadata.version(name) for name in _RESULTS},
    }


def _look_through(model: LazyModel) -> str:
    """Returns a model's digest, and refuses weights that cannot be meant; each array is read once for both."""
    faults = WeightFaults(model.abstract)
    found = digest_lazily(model, faults.look)
    faults.refuse()
    return found


def _details(
    source: str | Path,
    recipe: Recipe,
    fingerprint: dict[str, str],
    provenance: dict[str, str] | None,
    figures: Plan,
    started: float,
) -> tuple[tuple[str, Any], ...]:
    return (
        ("source", str(source)),
        ("recipe", recipe.name),
        ("fingerprint", fingerprint),
        ("calibration text", provenance),
        ("bits per weight", figures.bits_per_weight()),
        ("bytes", figures.nbytes),
        ("seconds", time.monotonic() - started),
    )


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
