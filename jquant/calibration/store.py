"""The block store: finished blocks of a run on disk, each a whole checkpoint of its own, so that a run can resume."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from jquant.checkpoint import abstract_tree, is_checkpoint, load_tree, save_tree
from jquant.errors import CheckpointError
from jquant.models import Block
from jquant.processes import meet
from jquant.report import BlockReport, Report, block_report_from_dict

FINGERPRINT: Final = "fingerprint.json"
REPORT: Final = "report.json"


@dataclass(frozen=True)
class BlockStore:
    """A folder of finished blocks, `block-000` onwards, and the fingerprint of the run that they belong to.

    Attributes:
      path: the folder.
      lock: an open file whose lock this process holds; a second run on the store is refused. None in the processes of
        a run that leave writing to its first.
      step: the model pass that the blocks come from, counted from 0; each has its own.
      known: names of the only folders that are read; None for all. Several processes agree on them when they begin.
    """

    path: Path
    lock: IO[str] | None
    step: int = 0
    known: frozenset[str] | None = None

    @classmethod
    def open(cls, path: Path | str, fingerprint: Mapping[str, str]) -> "BlockStore":
        """Opens a store, making it if it is not there.

        Args:
          path: the folder.
          fingerprint: whatever decides the result: digests of model, recipe and tokens, versions.

        Raises:
          CheckpointError: the folder cannot be written, another process works on it, or it belongs to a run with
            another fingerprint; the entries that differ are named.
        """
        path = Path(path)
        with contextlib.ExitStack() as stack:  # closes the lock unless all goes well
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((path / "lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                recorded = _record(path / FINGERPRINT, fingerprint)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process is working on {path}; wait for it, or give another path"
                ) from error
            except OSError as error:
                raise CheckpointError(
                    f"cannot write to {path}: {error}. Choose a folder that you may write to"
                ) from error
            different = sorted(
                name for name in {*recorded, *fingerprint} if recorded.get(name) != fingerprint.get(name)
            )
            if different:
                raise CheckpointError(
                    f"{path} holds blocks of another run: {', '.join(different)} differ. Delete {path} to start anew, "
                    "or give another output path"
                )
            stack.pop_all()
        for unfinished in path.glob(".*.partial"):  # blocks that were being stored when a run was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls(path=path, lock=lock)

    @classmethod
    def share(cls, path: Path | str, own: "BlockStore | None") -> "BlockStore":
        """Returns a run's store as each of its processes sees it; all call this once, before any block is put.

        Args:
          path: the folder, which all processes see.
          own: the store that the first process opened; None in the others.

        Raises:
          ProcessError: another process is gone.
        """
        meet("the store is open")
        names = frozenset(folder.name for folder in Path(path).iterdir() if is_checkpoint(folder))
        meet("all know what is in the store")
        return dataclasses.replace(own or cls(path=Path(path), lock=None), known=names)

    def get(self, index: int) -> tuple[Block, BlockReport] | None:
        """Returns a finished block and its report, or None if it is not in the store.

        Raises:
          CheckpointError: the block is damaged; delete its folder to solve it again.
        """
        folder = self._folder(index)
        if not self._has(folder):
            return None
        try:
            report = block_report_from_dict(json.loads((folder / REPORT).read_text()))
            return load_tree(folder), report
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}); delete it to solve this block again") from error

    def block(self, index: int) -> Block:
        """Returns a finished block.

        Raises:
          CheckpointError: it is damaged.
        """
        found = self.get(index)
        if found is None:
            raise CheckpointError(f"{self._folder(index)} is gone; run again to solve this block again")
        return found[0]

    def abstract(self, index: int) -> Block:
        """Returns a finished block with `jax.ShapeDtypeStruct` for arrays.

        Raises:
          CheckpointError: it is damaged.
        """
        block: Block = abstract_tree(self._folder(index))
        return block

    def put(self, index: int, block: Block, report: BlockReport) -> None:
        """Stores a finished block, whole or not at all.

        Raises:
          CheckpointError: it cannot be written; the blocks stored before stay.
        """
        if self.lock is None:
            return
        save_tree(block, self._folder(index), files={REPORT: json.dumps(dataclasses.asdict(report)).encode()})

    def get_whole(self) -> tuple[Any, Report] | None:
        """Returns what `put_whole` kept of this step, or None.

        Raises:
          CheckpointError: it is damaged; delete its folder to compute it again.
        """
        folder = self._whole()
        if not self._has(folder):
            return None
        try:
            details = json.loads((folder / REPORT).read_text())
            return load_tree(folder), Report(details=tuple(details.items()))
        except (CheckpointError, OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}); delete it to compute it again") from error

    def whole(self) -> Any:
        """Returns the tree that `put_whole` kept of this step.

        Raises:
          CheckpointError: it is not there, or damaged.
        """
        found = self.get_whole()
        if found is None:
            raise CheckpointError(f"{self._whole()} is gone; run again to compute it again")
        return found[0]

    def put_whole(self, tree: Any, report: Report) -> None:
        """Keeps what a pass over the whole model computed, so that a run that goes on has the same, bit for bit.

        Args:
          tree: a tree that a checkpoint can hold.
          report: of which the details are kept.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self.lock is None:
            return
        save_tree(tree, self._whole(), files={REPORT: json.dumps(dict(report.details)).encode()})

    def finished(self) -> int:
        """Returns how many blocks are in the store."""
        return sum(is_checkpoint(folder) for folder in self.path.glob("block-*"))

    def measured(self) -> int:
        """Returns how many passes over the whole model have what they computed in the store."""
        return sum(is_checkpoint(folder) for folder in self.path.glob("whole-*"))

    def _has(self, folder: Path) -> bool:
        return is_checkpoint(folder) and (self.known is None or folder.name in self.known)

    def _folder(self, index: int) -> Path:
        return self.path / (f"block-{index:03d}" if self.step == 0 else f"block-{index:03d}-pass-{self.step}")

    def _whole(self) -> Path:
        return self.path / f"whole-pass-{self.step}"


def _record(known: Path, fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Returns the fingerprint that a store was made with; a new store records the one given."""
    if not known.exists():
        temporary = known.with_name(f"{known.name}.partial")
        temporary.write_text(json.dumps(dict(fingerprint), indent=1))
        temporary.replace(known)
    try:
        return dict(json.loads(known.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{known} is damaged ({error}); delete {known.parent} to start anew") from error
