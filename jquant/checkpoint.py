"""Checkpoints: Orbax for the arrays, `structure.json` for the tree. A round trip is exact, packed nodes included.

A checkpoint is a folder: `structure.json` (format version, sha256 of the content and of each file of arrays, node
names, static fields, array shapes and dtypes), `arrays/` (Orbax, one entry for each path) and whatever files go along
(recipe, report, tokenizer). It is written under another name beside its place and renamed when complete: a folder that
loads is whole. The files are hashed before Orbax reads them, as it takes a changed byte for a weight.

A model is written, hashed and read in parts, each of whole nodes (table, blocks, norm, head) that take half a GiB
together where they are small enough, so that memory need not hold more than one. Where there are several,
`structure.json` lists them and `arrays/` has a folder for each.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import orbax.checkpoint as ocp

from jquant.errors import CheckpointError
from jquant.formats import tree_nbytes
from jquant.models import LazyModel, Llama, get, top_nodes
from jquant.structure import decode_structure, encode_structure

VERSION: Final = 2
STRUCTURE: Final = "structure.json"
ARRAYS: Final = "arrays"
PART_NBYTES: Final = 2**29  # of arrays written together; a node that is larger has a part of its own
_ONE_PART: Final = 1  # version of what is not divided, which the first release reads
_PARTS: Final = "parts"

type Content = bytes | Callable[[], bytes]  # what is called is called when all arrays are written
type OnLeaf = Callable[[str, jax.Array], None]  # (path, array)


def save_tree(tree: Any, path: Path | str, *, files: Mapping[str, Content] | None = None) -> str:
    """Writes a tree of nodes as a checkpoint folder, whole or not at all.

    Args:
      tree: nodes of jquant; leaves are arrays.
      path: the folder to make; its parent must exist, it must not.
      files: name inside the folder -> content, such as `recipe.yaml` or `tokenizer/tokenizer.json`.

    Returns:
      The sha256 of structure and arrays, which the folder records.

    Raises:
      CheckpointError: the path exists, the tree holds what is no node of jquant, or it cannot be written (no
        permission, disk full); nothing is left behind.
    """
    is_model = isinstance(tree, Llama) and isinstance(tree.layers, tuple)
    nodes = top_nodes(tree) if is_model else ("",)
    return _save(tree, lambda node: get(tree, node) if node else tree, nodes, Path(path), files)


def save_lazily(model: LazyModel, path: Path | str, *, files: Mapping[str, Content] | None = None) -> str:
    """Writes a model that is read node by node: the folder is the one that `save_model` writes of the whole model.

    Args:
      model: what is read, each node once.
      path: the folder to make; its parent must exist, it must not.
      files: as of `save_tree`.

    Returns:
      The sha256 of structure and arrays.

    Raises:
      CheckpointError: as `save_tree`; and whatever reading an array raises.
    """
    return _save(model.abstract, model.read, top_nodes(model.abstract), Path(path), files)


def _save(
    tree: Any,
    read: Callable[[str], Any],
    nodes: Sequence[str],
    path: Path,
    files: Mapping[str, Content] | None,
) -> str:
    """Writes what `read` returns for the nodes, in their order, of a tree that may be abstract."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; give another path, or delete it first")
    structure = encode_structure(tree)
    parts = _divide(tree, nodes)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise CheckpointError(_cannot_write(path, error)) from error
    try:
        total = _begin_digest(structure)
        for number, part in enumerate(parts):
            leaves = {_join(node, name): _own(leaf) for node in part for name, leaf in _named_leaves(read(node))}
            _update(total, leaves.items())
            with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
                checkpointer.save((partial / ARRAYS / _part_folder(parts, number)).absolute(), leaves)
            del leaves
            gc.collect()  # Orbax keeps what it has written in cycles, which would pile up part by part
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content if isinstance(content, bytes) else content())
        description: dict[str, Any] = {"jquant": _ONE_PART if len(parts) == 1 else VERSION, "sha256": total.hexdigest()}
        description |= {_PARTS: parts} if len(parts) > 1 else {}
        description |= {"files": _hash_files(partial / ARRAYS), "tree": structure}
        (partial / STRUCTURE).write_text(json.dumps(description, indent=1))
        partial.chmod(0o755)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
        raise CheckpointError(_cannot_write(path, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total.hexdigest()


def sweep_unfinished(path: Path) -> None:
    """Removes what killed saves of a checkpoint left beside its place; the caller knows that no other saves there.

    Other checkpoints' unfinished saves stay, also where their names begin with this one's.
    """
    if path.parent.is_dir():
        unfinished = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.partial")  # as mkdtemp draws names
        for stale in [one for one in path.parent.iterdir() if unfinished.fullmatch(one.name)]:
            shutil.rmtree(stale, ignore_errors=True)


def _divide(tree: Any, nodes: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    size = 0
    for node in nodes:
        nbytes = tree_nbytes(get(tree, node) if node else tree)
        if parts[-1] and size + nbytes > PART_NBYTES:
            parts.append([])
            size = 0
        parts[-1].append(node)
        size += nbytes
    return parts


def _part_folder(parts: Sequence[Sequence[str]], number: int) -> str:
    return "" if len(parts) == 1 else f"part-{number:03d}"


def load_tree(path: Path | str) -> Any:
    """Reads back what `save_tree` wrote, bit for bit, onto the first device, wherever it was written.

    Raises:
      CheckpointError: the folder is no checkpoint, was written by a newer jquant, or is damaged.
    """
    path = Path(path)
    tree = abstract_tree(path)
    _check_files(path)
    return _restore(path, tree, "")


def abstract_tree(path: Path | str) -> Any:
    """Returns the tree of a checkpoint with `jax.ShapeDtypeStruct` for arrays; only `structure.json` is read.

    Raises:
      CheckpointError: the folder is no checkpoint, was written by a newer jquant, or its structure is damaged.
    """
    description = _describe(Path(path))
    try:
        return decode_structure(description["tree"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(Path(path), f"{STRUCTURE} is not understood: {error!r}")) from error


def is_checkpoint(path: Path | str) -> bool:
    """Tells whether a folder is a jquant checkpoint."""
    return (Path(path) / STRUCTURE).is_file()


def recorded_digest(path: Path | str) -> str:
    """Returns the sha256 that a checkpoint folder records of its structure and arrays."""
    return _describe(Path(path))["sha256"]


def save_model(model: Llama, path: Path | str, *, files: Mapping[str, Content] | None = None) -> str:
    """Writes a model as a checkpoint; see `save_tree`."""
    return save_tree(model, path, files=files)


def load_model(path: Path | str) -> Llama:
    """Reads a model back; see `load_tree`.

    Raises:
      CheckpointError: as `load_tree`, or the checkpoint holds something else than a model.
    """
    tree = load_tree(path)
    if not isinstance(tree, Llama):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a model")
    return tree


def open_lazily(path: Path | str) -> LazyModel:
    """Returns a model of which only `structure.json` is in memory; its arrays are read where they are asked for.

    The files are hashed here, a piece at a time, so that what is read later is what was written.

    Raises:
      CheckpointError: as `load_model`.
    """
    path = Path(path)
    tree = abstract_tree(path)
    if not isinstance(tree, Llama):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a model")
    _check_files(path)
    return LazyModel(tree, lambda node: _restore(path, get(tree, node), node))


def digest(tree: Any) -> str:
    """Returns the sha256 of a tree's structure and of every byte of its arrays, in order of their paths."""
    total = _begin_digest(encode_structure(tree))
    _update(total, _named_leaves(tree))
    return total.hexdigest()


def digest_lazily(model: LazyModel, on_leaf: OnLeaf = lambda path, leaf: None) -> str:
    """Returns `digest` of a model that is read node by node, each once.

    Args:
      model: what is read.
      on_leaf: called with each array while it is in memory.

    Example:
      >>> from jquant.models import in_memory, random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> digest_lazily(in_memory(model)) == digest(model)
      True
    """
    total = _begin_digest(encode_structure(model.abstract))
    for node in top_nodes(model.abstract):
        leaves = [(_join(node, name), leaf) for name, leaf in _named_leaves(model.read(node))]
        _update(total, leaves)
        for name, leaf in leaves:
            on_leaf(name, leaf)
    return total.hexdigest()


def _begin_digest(structure: Any) -> Any:
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode())


def _update(total: Any, leaves: Iterable[tuple[str, Any]]) -> None:
    for name, leaf in sorted(leaves, key=lambda pair: pair[0]):
        total.update(name.encode())
        total.update(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data)


def _join(below: str, name: str) -> str:
    return ".".join(part for part in (below, name) if part)


def _describe(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / STRUCTURE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no jquant checkpoint: {STRUCTURE} cannot be read ({error})") from error
    version = description.get("jquant") if isinstance(description, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is no jquant checkpoint: {STRUCTURE} has no entry jquant, the format version")
    if version > VERSION:
        raise CheckpointError(f"{path} has format version {version}, this jquant reads up to {VERSION}; upgrade jquant")
    missing = [name for name in ("sha256", "files", "tree") if name not in description]
    if missing:
        raise CheckpointError(_damaged(path, f"{STRUCTURE} has no {', '.join(missing)}"))
    return description


def _check_files(path: Path) -> None:
    recorded, found = _describe(path)["files"], _hash_files(path / ARRAYS)
    damaged = [name for name, sha256 in recorded.items() if found.get(name) != sha256]
    if damaged:
        raise CheckpointError(_damaged(path, f"{', '.join(damaged)} in {ARRAYS} is missing or not as it was written"))


def _restore(path: Path, abstract: Any, below: str) -> Any:
    """Reads the arrays of a node, given without them, at a path below the tree; "" is the whole."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    names = {
        _join(below, name): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in _named_leaves(abstract)
    }
    arrays: dict[str, jax.Array] = {}
    parts = _describe(path).get(_PARTS, [[""]])
    for number, nodes in enumerate(parts):
        inside = tuple(f"{node}." if node else "" for node in nodes)
        wanted = {name: leaf for name, leaf in names.items() if f"{name}.".startswith(inside)}
        if wanted:
            arrays |= _restore_part(path, path / ARRAYS / _part_folder(parts, number), wanted)
    if len(arrays) < len(names):
        raise CheckpointError(_damaged(path, f"no part has {sorted(names.keys() - arrays.keys())[0]}"))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names])


def _restore_part(path: Path, folder: Path, names: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    arguments = ocp.checkpoint_utils.construct_restore_args(names)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
            wanted = ocp.args.PyTreeRestore(names, restore_args=arguments, partial_restore=True)
            arrays = checkpointer.restore(folder.absolute(), wanted)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_damaged(path, str(error))) from error
    absent = sorted(name for name in names if isinstance(arrays[name], jax.ShapeDtypeStruct))
    if absent:
        raise CheckpointError(_damaged(path, f"{folder.relative_to(path)} has no {', '.join(absent[:3])}"))
    return dict(arrays)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns that this process reads and writes without the others, if there are any."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, f"process{own}")


def _own(leaf: Any) -> Any:
    """Returns an array as Orbax writes it: one of several processes may not give it arrays of its own devices."""
    return leaf if jax.process_count() == 1 else np.asarray(leaf)


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _hash_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a folder, by its path in there."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _damaged(path: Path, why: str) -> str:
    return f"the checkpoint {path} is damaged: {why}. Copy it or write it again"


def _cannot_write(path: Path, error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return (
        f"cannot write {path}: {error}. {free / 2**20:.0f} MiB are free there; free space or choose another folder. "
        "Nothing was left half written"
    )
