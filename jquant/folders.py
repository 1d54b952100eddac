"""Checkpoints of any kind, opened by where they are; and the folder that a result will be written to.

A source is a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.
"""

import contextlib
import dataclasses
import json
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
from jax.sharding import Mesh

from convert import abstract_model, lazy_model, load_tokenizer, locate, save_tokenizer
from convert import load_model as load_foreign
from convert.huggingface import StoredDtype
from jquant.checkpoint import ARRAYS, STRUCTURE, abstract_tree, is_checkpoint, load_model
from jquant.checkpoint import open_lazily as open_checkpoint
from jquant.errors import CheckpointError, FormatError
from jquant.formats import PermutedTensor, RotatedTensor, UniformTensor
from jquant.machines import Target, TargetName, choose_target
from jquant.models import LazyModel, Linear, Llama, Stacked, linears, put, stack_layers
from jquant.sharding import choose_cuts, shard
from jquant.targets import choose_product, prepare

RECIPE: Final = "recipe.yaml"
REPORT: Final = "report.json"
# What a folder of a model holds besides its other files: weights, and what is written anew with them.
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json")
_REWRITTEN: Final = ("config.json", "quantize_config.json", "quant_config.json", STRUCTURE)
_RESERVE: Final = 64 * 2**20  # bytes on disk beyond the arrays: tokenizer, structure, report


def open_model(source: str | Path, *, dtype: StoredDtype = "auto") -> Llama:
    """Loads a model from a jquant checkpoint, a Hugging Face folder, a GGUF file or a hub id.

    Args:
      source: where it is.
      dtype: of the arrays of a foreign checkpoint; "auto" keeps what is stored.

    Raises:
      CheckpointError: a jquant checkpoint is damaged, or another dtype than its own is asked for.
      ConversionError: a foreign checkpoint cannot be read.
    """
    if not is_checkpoint(source):
        return load_foreign(source, dtype=dtype)
    _require_own_dtype(source, dtype)
    return load_model(source)


def open_lazily(source: str | Path, *, dtype: StoredDtype = "auto") -> LazyModel:
    """Opens what `open_model` loads, and leaves its arrays where they are until they are asked for.

    Raises:
      CheckpointError: as `open_model`.
      ConversionError: as `open_model`, as far as headers show; reading an array may raise it too.
    """
    if not is_checkpoint(source):
        return lazy_model(source, dtype=dtype)
    _require_own_dtype(source, dtype)
    return open_checkpoint(source)


def open_abstract(source: str | Path, *, dtype: StoredDtype = "auto") -> Llama:
    """Returns what `open_model` would, with `jax.ShapeDtypeStruct` for arrays; only headers are read.

    Raises:
      CheckpointError: as `open_model`.
      ConversionError: as `open_model`, as far as headers show.
    """
    if not is_checkpoint(source):
        return abstract_model(source, dtype)
    _require_own_dtype(source, dtype)
    tree = abstract_tree(source)
    if not isinstance(tree, Llama):
        raise CheckpointError(f"{source} holds a {type(tree).__name__}, not a model")
    return tree


def open_for_use(source: str | Path, *, target: TargetName = "reference", mesh: Mesh | None = None) -> Llama:
    """Loads a model as `open_model` does and makes it ready to run: see `make_ready`.

    Raises:
      RecipeError: the target is not there; said before the model is read.
      FormatError: the model cannot be spread over the mesh; said before it is read.
    """
    abstract = open_abstract(source)
    choose_target(target, abstract.embed_tokens.dtype)
    if mesh is not None:
        choose_cuts(abstract, *mesh.devices.shape)
    return make_ready(open_model(source), target, mesh)


def make_ready(model: Llama, target: TargetName, mesh: Mesh | None = None) -> Llama:
    """Returns the model prepared for a target, to be run; where XLA alone serves the layers, stacked if they are alike.

    Weights for kernels stay apart: a scan would copy each layer's out of the stack before a kernel could read them. All
    layers share their kernels, so that this compiles fast too. Float32 scales that W4A16 kernels read are kept in
    bfloat16 alone, as they are multiplied: what `prepare` makes of the result for the reference target has these.

    Args:
      model: portable.
      target: see `choose_target`.
      mesh: devices over which the model is spread, see `jquant.sharding`; None for one.

    Raises:
      RecipeError: the target is not there.
      FormatError: the model cannot be spread over the mesh.
    """
    if mesh is not None:
        return shard(model, mesh, lambda own: make_ready(own, target))
    chosen = choose_target(target, model.embed_tokens.dtype)
    prepared = prepare(round_scales(model, chosen), chosen)
    return stack_if_alike(prepared) if prepared.layers is model.layers else prepared


def round_scales(model: Llama, target: Target) -> Llama:
    """Returns a portable model whose scales are those that the target's kernels read: of W4A16 no float32 but bfloat16.

    `prepare` then keeps no second copy of them, and products stay the same, every bit.

    Example:
      >>> import jax
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> round_scales(model, Target.H100) is model
      True
    """

    def change(layer: Linear) -> Linear:
        whole: Any = layer.kernel
        kernel = whole.inner if isinstance(whole, PermutedTensor | RotatedTensor) else whole
        if not isinstance(kernel, UniformTensor) or kernel.format.scale_dtype != "float32":
            return layer
        if choose_product(layer, target).kernel != "W4A16":
            return layer
        scales, format = kernel.scales.astype(jnp.bfloat16), dataclasses.replace(kernel.format, scale_dtype="bfloat16")
        rounded: Any = dataclasses.replace(kernel, scales=scales, format=format)
        return dataclasses.replace(
            layer, kernel=rounded if kernel is whole else dataclasses.replace(whole, inner=rounded)
        )

    if target is Target.REFERENCE or isinstance(model.layers, Stacked):
        return model
    for path, layer in linears(model):
        if (changed := change(layer)) is not layer:
            model = put(model, path, changed)
    return model


def stack_if_alike(model: Llama) -> Llama:
    """Returns the model with its layers stacked where they are alike, and as it is where they are not."""
    try:
        return stack_layers(model)
    except FormatError:  # layers differ: the same model, unrolled
        return model


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads the report of a checkpoint that `quantize` made, {} where a checkpoint has none.

    Raises:
      CheckpointError: the report is damaged.
    """
    try:
        return dict(json.loads((Path(path) / REPORT).read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{Path(path) / REPORT} cannot be read ({error}); delete it or quantize again") from error


def prepare_output(out: Path, *, nbytes: int) -> None:
    """Makes the folder that `out` will stand in, and checks that it can be written and has room.

    Raises:
      CheckpointError: `out` exists and is not empty, cannot be made, or the disk has not enough room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; give another path, or delete it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {out.parent}: {error}. Choose a folder that you may write to"
        ) from error
    if free < nbytes + _RESERVE:
        raise CheckpointError(
            f"{out.parent} has {free / 2**20:.0f} MiB free, {(nbytes + _RESERVE) / 2**20:.0f} MiB are needed; "
            "free space there, or choose another folder"
        )


def make_writable(folder: Path) -> None:
    """Makes a folder if it is not there, and checks that files can be written in it.

    Raises:
      CheckpointError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}. Choose a folder that you may write to") from error


def open_tokenizer(source: str | Path) -> tuple[Any, dict[str, bytes]]:
    """Returns the tokenizer of a checkpoint, and the files to keep it by: name -> content.

    The tokenizer is read back from those files, so that what is kept is what was used.

    Raises:
      ConversionError: there is none, or it is of a kind that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = save_tokenizer(source, Path(folder))
        return load_tokenizer(folder), {name: (Path(folder) / name).read_bytes() for name in names}


def other_files(source: str | Path) -> dict[str, bytes]:
    """Returns all files of a checkpoint but its weights and configuration: name -> content.

    Those of a folder are as they are; a GGUF file gives its tokenizer.

    Raises:
      ConversionError: there is no such checkpoint, or a GGUF file's tokenizer cannot be read.
    """
    place = locate(source)
    if not place.is_dir():
        return open_tokenizer(source)[1]
    names = {file: file.relative_to(place) for file in place.rglob("*") if file.is_file()}
    return {
        name.as_posix(): file.read_bytes()
        for file, name in sorted(names.items())
        if name.parts[0] != ARRAYS and not name.name.startswith(".") and not name.parts[0].startswith(".")
        if not name.name.endswith(_WEIGHTS) and name.as_posix() not in _REWRITTEN
    }


def _require_own_dtype(source: str | Path, dtype: StoredDtype) -> None:
    if dtype != "auto":
        raise CheckpointError(f"{source} is a jquant checkpoint and keeps its dtypes; leave dtype={dtype!r} out")


def remove_folder(folder: Path) -> None:
    """Removes a folder that others read, if it is there: renamed first, so that a kill meanwhile leaves no half of it.

    What such a kill left goes too. A folder that cannot be renamed stays whole.
    """
    stale = folder.with_name(f".{folder.name}.removed.partial")
    shutil.rmtree(stale, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.replace(stale)
    shutil.rmtree(stale, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one step, whatever other processes write it at the same time: the last one wins.

    Raises:
      CheckpointError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}. Choose a folder that you may write to") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
