"""Heat maps of needles found: depth downwards, length to the right, as text or as a picture (PNG)."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from eval.needle import NeedleGrid
from jquant.errors import DataError

_SHADES: Final = "·░▒▓█"  # nothing found to all found
_INCHES: Final = (1.1, 0.7)  # of a cell, across and down
_MARGINS: Final = (1.6, 1.8)  # inches around the cells of a panel


def text_map(grid: NeedleGrid) -> str:
    """Return a grid as lines of text: for each cell a shade and the per cent that was found.

    Example:
      >>> print(text_map(NeedleGrid((512, 1024), (0.0, 50.0), ((1.0, 0.4), (0.8, 0.0)), ())))
      depth    512   1024
         0 % █ 100  ░  40
        50 % ▓  80  ·   0
    """
    lines = ["depth " + "".join(f"{length:>6} " for length in grid.lengths).rstrip()]
    for depth, row in zip(grid.depths, grid.found, strict=True):
        cells = "  ".join(f"{_SHADES[int(share * (len(_SHADES) - 1))]} {100 * share:3.0f}" for share in row)
        lines.append(f"{depth:4g} % {cells}")
    return "\n".join(lines)


def require_plots() -> None:
    """Raises before any work where pictures cannot be drawn.

    Raises:
      DataError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError(
            "a picture needs matplotlib, which is not installed: pip install 'jquant[plots]', or leave the picture out "
            "and draw it later from the JSON"
        )


def draw_map(grids: Mapping[str, NeedleGrid], path: Path) -> None:
    """Draw grids side by side into a PNG.

    Args:
      grids: a title for each.
      path: the file to write.

    Raises:
      DataError: matplotlib is not installed, there is no grid, or the file cannot be written.
    """
    require_plots()
    from matplotlib.figure import Figure

    if not grids:
        raise DataError("there is no grid to draw: give one at least")
    across = sum(len(grid.lengths) * _INCHES[0] + _MARGINS[0] for grid in grids.values())
    down = max(len(grid.depths) for grid in grids.values()) * _INCHES[1] + _MARGINS[1]
    figure = Figure(figsize=(across, down), layout="constrained")
    for panel, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        panel.imshow(grid.found, cmap="RdYlGn", vmin=0.0, vmax=1.0, alpha=0.7, aspect="auto")
        panel.set_title(f"{title}: {100 * grid.share():.0f} %")
        panel.set_xticks(range(len(grid.lengths)), [str(length) for length in grid.lengths])
        panel.set_yticks(range(len(grid.depths)), [f"{depth:g} %" for depth in grid.depths])
        panel.set_xlabel("tokens")
        panel.set_ylabel("depth of the needle")
        for row, shares in enumerate(grid.found):
            for column, share in enumerate(shares):
                panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center")
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}. Choose a folder that you may write to") from error
