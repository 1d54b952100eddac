"""Runs that are killed, starved and misled, for tests/test_faults.py: `python -m tests.faulty_run FOLDER NAME CACHE`.

All is imported once, and each run is a fork of this process: it has one thread and no XLA client yet, which a fork
would break. Children share a cache of compiled programs, so that most of their time is the run's own.
"""

import fcntl
import functools
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import orbax.checkpoint
import transformers  # noqa: F401 (imported late where it is used)

from jquant import exact_passes, kv_passes
from jquant.checkpoint import _check_files, is_checkpoint, recorded_digest
from jquant.errors import JquantError
from jquant.pipeline import export_checkpoint, quantize
from jquant.processes import meet
from jquant.recipe import Recipe, parse_recipe
from jquant.sharding import join_processes

SEED: Final = 20261122
KILLS: Final = 20
PAIRS: Final = 6
SAID: Final = {  # what the other of two processes says: the error's own words, or JAX's where the first was killed
    "gone": "another process of this run is gone",
    "ended by JAX": "JAX distributed service detected fatal errors",
}
RECIPE: Final = """
name: faulty
calibration: {samples: 4, length: 16}
passes:
  - sequential:
      passes:
        - quantize_weights:
            rules:
              - {match: ".*down_proj", quantizer: {gptq: {format: {group_size: 32}}}}
              - {match: ".*up_proj", quantizer: {rtn: {format: {group_size: 32}}}}
"""
MEASURED: Final = """
name: measured
calibration: {samples: 4, length: 16}
passes:
  - smooth: {alpha: {candidates: [0.3, 0.7]}}
  - sequential:
      passes:
        - quantize_weights: {rules: [{match: ".*down_proj", quantizer: {rtn: {format: {group_size: 32}}}}]}
  - calibrate_float8_kv: {}
  - calibrate_kvquant: {bits: 2, outliers: 0.1}
"""
MEASURES: Final[dict[str, Any]] = {  # what goes through the whole model, and what calls it
    "search_alpha": exact_passes,
    "calibrate_float8_kv": kv_passes,
    "calibrate_kvquant": kv_passes,
}
KILLS_WITHIN: Final = 2  # of each
_LONGEST: Final = 60.0  # seconds that a run may take at most
_PATIENCE: Final = 500.0  # seconds after which a process hangs: JAX waits 100 for a lost one, 300 at the end


def recipe() -> Recipe:
    """Return GPTQ and RTN on two linears of each block."""
    return parse_recipe(RECIPE)


def run(folder: Path, devices: int = 1, chosen: Recipe | None = None, **options: Any) -> None:
    """Quantize, block by block, activations in a file, windows spread over devices."""
    spread = tuple(jax.devices()[:devices]) if devices > 1 else ()
    kept: dict[str, Any] = {"memory": "blocks", "activations": "disk"} | options
    quantize(folder / "source", folder / "out", chosen or recipe(), devices=spread, **kept)


def measure(folder: Path, devices: int = 1) -> None:
    """Run passes that measure the whole model."""
    run(folder, devices, parse_recipe(MEASURED))


def start(job: Callable[[], None], out: Path) -> int:
    """Run a job in a child, whose words go to a file; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with out.open("w") as words:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
        job()
        status = 0
    except JquantError as error:
        os.write(1, str(error).encode())
        status = 2
    except BaseException:  # noqa: BLE001 (whatever it is, a fork must not go on as its parent)
        os.write(1, traceback.format_exc().encode())
    os._exit(status)


def fork(job: Callable[[], None], out: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Run a job as `start`; return its exit status, negative for a signal, and seconds."""
    started = time.monotonic()
    child = start(job, out)
    limit = _LONGEST if kill_after is None else kill_after
    while time.monotonic() - started < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - started


def whole(out: Path) -> str:
    """Return the digest of a finished checkpoint, after checking all its files; "" if there is none."""
    if not out.exists():
        return ""
    _check_files(out)
    return recorded_digest(out)


def clear(folder: Path) -> None:
    """Move what is finished away."""
    (folder / "out").rename(folder / f"done-{time.monotonic_ns()}")


def first(folder: Path, times: int = 1, job: Callable[[Path, int], None] = run) -> tuple[str, float]:
    """Run undisturbed on one device, then on two by turns; return the digest and the last run's seconds."""
    found = set()
    for index in range(times):
        status, seconds = fork(lambda devices=1 + index % 2: job(folder, devices), folder / "words")
        assert status == 0, (folder / "words").read_text()
        found.add(whole(folder / "out"))
        clear(folder)
    (expected,) = found
    return expected, seconds


def take(folder: Path, found: set[str]) -> None:
    """Note the digest of what is finished, if anything is, and move it away."""
    if digest := whole(folder / "out"):
        found.add(digest)
        clear(folder)


def finish(folder: Path, found: set[str], job: Callable[[Path, int], None] = run) -> dict[str, Any]:
    """Run once more, undisturbed; return how many digests there were in all, and what is left beside the result."""
    status, _ = fork(lambda: job(folder, 1), folder / "words")
    found.add(whole(folder / "out"))
    left = [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
    return {"digests": len(found), "status": status, "left": left}


def kills(folder: Path) -> dict[str, Any]:
    """Kill a run at random moments, going on each time on another number of devices; one that ends begins anew."""
    expected, seconds = first(folder, 4)
    moments = np.random.default_rng(SEED).uniform(0.1, 1.0, 4 * KILLS) * seconds
    found, killed, blocks = {expected}, 0, []
    for index, moment in enumerate(moments):
        if killed == KILLS:
            break
        status, _ = fork(lambda devices=1 + index % 2: run(folder, devices), folder / "words", moment)
        assert status in (0, -signal.SIGKILL), (folder / "words").read_text()
        killed += status != 0
        blocks.append(sum(map(is_checkpoint, (folder / "out.partial").glob("block-*"))))
        take(folder, found)
    return {"killed": killed, "blocks": blocks} | finish(folder, found)


def watch(folder: Path, devices: int, victim: str, after: float) -> None:
    """Measure; tell what measures and how long it took; be killed so many seconds after one of them began."""

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            began = time.monotonic()
            (folder / "within").write_text(name)
            if name == victim:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            found = real(*given, **options)
            (folder / "within").write_text("")
            (folder / f"took-{name}").write_text(str(time.monotonic() - began))
            return found

        return call

    for name, module in MEASURES.items():
        setattr(module, name, watched(name, getattr(module, name)))
    measure(folder, devices)


def measured(folder: Path) -> dict[str, Any]:
    """Kill a run within each pass that measures the whole model, at random moments of it, on one device and two."""
    expected, _ = first(folder, 2, measure)
    found, within = {expected}, dict.fromkeys(MEASURES, 0)
    status, _ = fork(lambda: watch(folder, 1, "", 0.0), folder / "words")
    assert status == 0, (folder / "words").read_text()
    take(folder, found)
    moments = iter(np.random.default_rng(SEED).uniform(0.05, 0.9, 8 * KILLS_WITHIN * len(MEASURES)))
    for turn, share in enumerate(moments):
        name = next((one for one, times in within.items() if times < KILLS_WITHIN), "")
        if not name:
            break
        moment = share * float((folder / f"took-{name}").read_text())
        job = functools.partial(watch, folder, 1 + turn % 2, name, moment)
        status, _ = fork(job, folder / "words")
        assert status in (0, -signal.SIGKILL), (folder / "words").read_text()
        within[name] += status != 0 and (folder / "within").read_text() == name
        take(folder, found)
    return {"within": within} | finish(folder, found, measure)


def pair(folder: Path, victims: tuple[int, ...] = (), after: float = 0.0) -> tuple[list[int | None], float]:
    """Run in two processes, which talk by gloo; kill some so many seconds after they met.

    Returns:
      Their exit statuses, None for one that hung; and the seconds from when they met.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def job(process: int) -> None:
        join_processes(f"localhost:{port}", 2, process)
        meet("all have begun")
        (folder / f"met-{process}").touch()
        run(folder, jax.device_count(), memory="auto")

    children = [start(lambda process=process: job(process), folder / f"words-{process}") for process in range(2)]
    marks = [folder / f"met-{process}" for process in range(2)]
    begun, met, statuses = time.monotonic(), 0.0, dict[int, int]()
    while len(statuses) < 2 and time.monotonic() - begun < _PATIENCE:
        if not met and all(mark.exists() for mark in marks):
            met = time.monotonic()
        for process in victims if met and time.monotonic() - met >= after else ():
            if process not in statuses:
                os.kill(children[process], signal.SIGKILL)
        for process, child in enumerate(children):
            done, status = os.waitpid(child, os.WNOHANG) if process not in statuses else (0, 0)
            if done:
                statuses[process] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    for process in {0, 1} - statuses.keys():
        os.kill(children[process], signal.SIGKILL)
        os.waitpid(children[process], 0)
    for mark in marks:
        mark.unlink(missing_ok=True)
    return [statuses.get(process) for process in range(2)], time.monotonic() - met


def pairs(folder: Path) -> dict[str, Any]:
    """Kill one of two processes or both at random moments; two go on, and at last one does."""
    found, answers, killed, hung, blocks = {first(folder)[0]}, set(), 0, 0, []
    for _ in range(2):  # the second finds its programs compiled
        statuses, seconds = pair(folder)
        assert statuses == [0, 0], [(folder / f"words-{process}").read_text() for process in range(2)]
        found.add(whole(folder / "out"))
        clear(folder)
    moments = np.random.default_rng(SEED).uniform(0.1, 0.9, 4 * PAIRS) * seconds
    for moment, victims in zip(moments, 4 * PAIRS * ((1,), (0,), (0, 1)), strict=False):
        if killed == PAIRS:
            break
        statuses, _ = pair(folder, victims, moment)
        killed, hung = killed + (-signal.SIGKILL in statuses), hung + (None in statuses)
        for process in {0, 1} - set(victims):
            words = (folder / f"words-{process}").read_text()
            known = [name for name, said in SAID.items() if said in words]
            answers |= {"ended well" if statuses[process] == 0 else (*known, f"{statuses[process]}: {words[-900:]}")[0]}
        blocks.append(sum(map(is_checkpoint, (folder / "out.partial").glob("block-*"))))
        take(folder, found)
    return {"killed": killed, "hung": hung, "answers": sorted(answers), "blocks": blocks} | finish(folder, found)


def disks(folder: Path) -> dict[str, Any]:
    """Let files grow no further than some sizes, then run without a limit; and write where nothing may be written."""
    expected, _ = first(folder)
    words: dict[str, str] = {}
    for limit in (2**14, 2**16):

        def starved(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run(folder)

        status, _ = fork(starved, folder / "words")
        words[str(limit)] = f"{status}: {(folder / 'words').read_text()[:900]}"
        assert not whole(folder / "out")
    locked = folder / "locked"
    locked.mkdir()
    locked.chmod(0o555)

    def refused() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(folder)  # all that is imported late is: another user may not enter the folder that this package is in
        clear(folder)
        if os.geteuid() == 0:
            os.setuid(65534)  # nobody: a folder's mode binds all but root
        quantize(folder / "source", locked / "out", recipe(), memory="blocks")

    status, _ = fork(refused, folder / "words")
    words["read-only"] = f"{status}: {(folder / 'words').read_text()[:900]}"
    status, _ = fork(lambda: run(folder), folder / "words")
    return {"words": words, "status": status, "same": whole(folder / "out") == expected}


def clocks(folder: Path) -> dict[str, Any]:
    """Let the clock jump by years within a run and files be from the future, and let a run meet another on its store.

    Orbax measures its patience by the clock, so that a jump while it writes may end a run: by name, and to be resumed.
    """
    expected, seconds = first(folder, 3)  # the last finds its programs compiled

    def jumping() -> None:
        real, jumps = time.time, iter(range(10**9))
        time.time = lambda: real() + (-1.0) ** (next(jumps) // 100) * 1e8  # years forth and back, every 100 looks
        run(folder)

    for share in (0.8, 0.5, 0.3, 0.2):
        cut, _ = fork(jumping, folder / "words", seconds * share)
        if cut:
            break
        clear(folder)
    future = list((folder / "out.partial").rglob("*"))
    for path in future:
        os.utime(path, (2**32, 2**32))
    misled, _ = fork(jumping, folder / "words")
    said = (folder / "words").read_text()
    status, _ = fork(lambda: run(folder), folder / "words") if misled else (0, 0.0)
    same = whole(folder / "out") == expected
    clear(folder)
    found = {"cut": cut, "future": len(future), "misled": misled, "said": said, "status": status, "same": same}
    (folder / "out.partial").mkdir()
    with (folder / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # this process works on the store
        rival, _ = fork(lambda: run(folder), folder / "words")
        found |= {"rival": rival, "words": (folder / "words").read_text()}
    fork(lambda: run(folder), folder / "words")
    return found | {"after": whole(folder / "out") == expected}


def exports(folder: Path) -> dict[str, Any]:
    """Kill an export at random moments: its folder is there and whole, or not there; the next one is the same."""
    fork(lambda: run(folder), folder / "words")

    def export() -> None:
        export_checkpoint(folder / "out", folder / "theirs", format="compressed-tensors")

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((folder / "theirs").iterdir())}

    status, seconds = fork(export, folder / "words")
    assert status == 0, (folder / "words").read_text()
    expected, killed, halves = content(), 0, 0
    for moment in np.random.default_rng(SEED).uniform(0.2, 1.0, 5) * seconds:
        (folder / "theirs").rename(folder / f"theirs-{time.monotonic_ns()}")
        status, _ = fork(export, folder / "words", moment)
        assert status in (0, -signal.SIGKILL), (folder / "words").read_text()
        killed += status != 0
        if not (folder / "theirs").exists():
            status, _ = fork(export, folder / "words")
            assert status == 0, (folder / "words").read_text()
        halves += content() != expected
    return {"killed": killed, "halves": halves}


SCENARIOS: Final = {
    "kills": kills,
    "measured": measured,
    "pairs": pairs,
    "disks": disks,
    "clocks": clocks,
    "exports": exports,
}


def main() -> None:
    """Run one scenario; print what it found as JSON."""
    folder = Path(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert orbax.checkpoint.__name__  # imported before any fork
    sys.stdout.write(json.dumps(SCENARIOS[sys.argv[2]](folder)))


if __name__ == "__main__":
    main()
