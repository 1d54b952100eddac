"""Publishes a comparison: docs/comparison.json, its page and report, and the README's table, all from its rows.

    python benchmarks/publish_comparison.py OUT RECIPE [RECIPE ...] [--note TEXT]

OUT is the folder of `jquant compare`, whose rows may be those of several processes. The note, of what readers must know
beside, ends the caption. A test holds the README's table to docs/comparison.json.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jquant.compare import BASELINE
from jquant.comparison import read_tables
from jquant.pages import comparison_page
from jquant.tables import markdown

ROOT: Final = Path(__file__).resolve().parent.parent
BEGIN: Final = "<!-- comparison: written by benchmarks/publish_comparison.py -->"
END: Final = "<!-- end of the comparison -->"


def between(text: str) -> str:
    """Returns what stands between the marks of the README."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def readme_table(content: Mapping[str, Any]) -> str:
    """Returns the README's table of a comparison."""
    figures = [row.figures for row in content["rows"]]
    texts = list(dict(figures[0].perplexities))
    titles = ["recipe", "bits per weight", "bits per KV value", *texts, "mean of the tasks"]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for row in figures:
        name = row.name if row.name == BASELINE else f"`{row.name}`"
        losses = [f"{dict(row.perplexities)[text]:.2f}" for text in texts]
        score = f"{statistics.fmean(one.value for one in row.scores if one.quoted and not one.part):.3f}"
        cells = [name, f"{row.bits_per_weight:.2f}", f"{row.bits_per_kv_value:.2f}", *losses, score]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(content: Mapping[str, Any]) -> str:
    """Returns the page of a comparison: the whole table, and the command."""
    figures, asked = [row.figures for row in content["rows"]], content["evaluation"]
    recipes = " ".join(f"--recipe {row.name}" for row in figures[1:])
    windows = "" if asked["windows"] is None else f" --windows {asked['windows']}"
    limit = "" if asked["limit"] is None else f" --limit {asked['limit']}"
    return (
        "# Comparison\n\nEvery recipe quantized, saved, loaded again and measured on the same windows and tasks. "
        "[The report](comparison-report.html) has charts by layer, standard errors, recipes and where texts came from; "
        f"[comparison.json](comparison.json) has all of it.\n\n{markdown(figures, content['caption'])}\n"
        f"    jquant compare {content['source']} OUT {recipes} \\\n"
        f"    --perplexity {' '.join(asked['datasets'])}{windows} --tasks {','.join(asked['tasks'])}{limit} "
        "--data DIR --calibration-file WINDOWS.npy\n"
    )


def publish(out: Path, recipes: Sequence[str], root: Path, note: str = "") -> None:
    """Writes all of it below a root that has README.md and docs/."""
    content = json.loads((out / "table.json").read_text("utf-8"))
    rows = {row["name"]: row for row in (json.loads(file.read_text("utf-8")) for file in (out / "rows").glob("*.json"))}
    missing = [name for name in (BASELINE, *recipes) if name not in rows]
    if missing:
        raise SystemExit(f"no row of {', '.join(missing)} in {out / 'rows'}: finish the comparison first")
    content["caption"] = f"{content['caption']} {note}".strip()
    content["rows"] = [rows[name] for name in (BASELINE, *recipes)]
    docs = root / "docs"
    (docs / "comparison.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    known = read_tables(docs / "comparison.json")
    (docs / "comparison.md").write_text(page(known), "utf-8")
    (docs / "comparison-report.html").write_text(comparison_page(known), "utf-8")
    readme = (root / "README.md").read_text("utf-8")
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"{root / 'README.md'} has no place for the table: {BEGIN} and {END}")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    (root / "README.md").write_text(f"{before}{BEGIN}\n\n{readme_table(known)}\n\n{END}{after}", "utf-8")


def main() -> None:
    """Publishes what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    publish(arguments.out, arguments.recipes, ROOT, arguments.note)


if __name__ == "__main__":
    main()
