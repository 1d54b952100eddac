"""`jquant demo`."""

from pathlib import Path

from convert import default_cache
from jquant.commands.display import show_progress, stdout
from jquant.demo import QUESTION, run_demo
from jquant.tables import figures_table


def run(*, cache: Path | None = None) -> None:
    """Quantize SmolLM2-135M-Instruct to 4 bits, measure it, and ask it something; a second run reuses the first's.

    Args:
      cache: folder for the download and all results; ~/.cache/jquant if not given.
    """
    with show_progress() as on_progress:
        shown = run_demo(cache or default_cache(), on_progress=on_progress)
    console = stdout()
    console.print(figures_table(shown.rows, "SmolLM2-135M-Instruct", shown.protocol))
    console.print(f"\n> {QUESTION}\n{shown.answer}\n", markup=False, highlight=False)
    console.print(f"more: jquant chat {shown.folder}", markup=False, highlight=False, soft_wrap=True)
