"""Results on stdout; progress on stderr: bars with the time left on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from jquant.progress import OnProgress, Progress

_FILE_WIDTH: Final = 160  # columns where the output is no terminal: a table's row stays a line
_QUIET_SECONDS: Final = 5.0  # between two lines of progress


def stdout() -> Console:
    """Returns the console for results."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def note(text: str) -> None:
    """Prints a line on stderr: what a reader of results may want to know but no program that reads them."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def split_names(given: Sequence[str]) -> tuple[str, ...]:
    """Returns names that were given one by one, with commas between them, or both.

    >>> split_names(["boolq,arc_easy", "piqa"])
    ('boolq', 'arc_easy', 'piqa')
    """
    return tuple(name.strip() for part in given for name in part.split(",") if name.strip())


@contextlib.contextmanager
def show_progress() -> Iterator[OnProgress]:
    """Shows what it is told while the context lasts.

    Yields:
      The callback to hand to a library function.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        yield _bars(bars)


def _bars(bars: Bars) -> OnProgress:
    """Returns a callback that draws one bar for each counted job; what is not counted is a line above it."""
    tasks = {0: bars.add_task("", total=None, visible=False)}

    def update(progress: Progress) -> None:
        if not progress.total:
            bars.console.print(progress.stage, markup=False, highlight=False)
            return
        if progress.total not in tasks or bars.tasks[tasks[progress.total]].finished:
            tasks[progress.total] = bars.add_task(progress.stage, total=progress.total)
        bars.update(tasks[progress.total], description=progress.stage, completed=progress.done)

    return update


def _lines(console: Console) -> OnProgress:
    """Returns a callback that prints a line every few seconds, with the time left as the steps so far suggest."""
    times = {"start": 0.0, "line": 0.0}

    def update(progress: Progress) -> None:
        now = time.monotonic()
        if progress.done <= 1:
            times["start"] = now
        if 0 < progress.done < progress.total and now - times["line"] < _QUIET_SECONDS:
            return
        times["line"] = now
        line = f"{progress.stage} {progress.done}/{progress.total}" if progress.total else progress.stage
        if 1 < progress.done < progress.total:
            left = (now - times["start"]) / (progress.done - 1) * (progress.total - progress.done)
            line += f", {left:.0f} s left"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return update
