"""Results as tables: rich ones, which the command line prints, and Markdown and CSV. Nothing is printed here."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final

from rich.table import Table

from eval import Latency, TapStatistics
from jquant.benchmark import Benchmark, Shortage
from jquant.budget import Way, predict
from jquant.inspection import CacheFacts, Facts
from jquant.measure import Analysis, Measurement, ModelFigures, NeedleRow, TaskMeasurement
from jquant.plan import Plan
from jquant.report import LinearReport, Report
from jquant.simulate import RATES, Simulation

_TITLES: Final = ("recipe", "bits per weight", "bits per KV value", "bytes", "quantize seconds")
_SHALLOW: Final = 4  # blocks up to which a report shows every linear
_UNITS: Final = ("", "k", "M", "G", "T", "P", "E")


def report_table(report: Report) -> Table:
    """Returns one row for each linear of a run; of a deep model, one for each kind of linear."""
    rows = report.linears()
    deep = len(report.blocks) > _SHALLOW
    groups: dict[str, list[LinearReport]] = {}
    for row in rows:
        groups.setdefault(_kind(row.path) if deep else row.path, []).append(row)
    table = _table("quantized", "linear", "count", "bits", "relative error", "loss / RTN loss", "largest damping")
    for name, members in groups.items():
        table.add_row(
            name,
            str(len(members)),
            f"{sum(row.bits_per_weight for row in members) / len(members):.3f}",
            f"{math.sqrt(sum(row.relative_error**2 for row in members) / len(members)):.4f}",
            _loss_ratio(members),
            _largest_damping(members),
        )
    return table


def finding_tables(report: Report) -> tuple[Table, ...]:
    """Returns a table for each thing that passes found out: errors of SmoothQuant's alphas, losses of training."""
    tables = []
    smoothing = dict(report.details).get("smoothing")
    if smoothing is not None:
        table = _table("smoothing", "alpha", "error of rounded blocks", "")
        for row in smoothing["errors"]:
            chosen = "chosen" if row["alpha"] == smoothing["alpha"] else ""
            table.add_row(f"{row['alpha']:g}", f"{row['error']:.3e}", chosen)
        tables.append(table)
    trained = [block for block in report.blocks if block.losses]
    curves = {str(block.index): block.losses for block in trained}
    rotation = dict(report.details).get("rotation", {})
    if rotation.get("losses"):
        curves = {"rotations": rotation["losses"]} | curves
    if curves:
        table = _table("training", "block", "steps", "first loss", "last loss")
        for name, losses in curves.items():
            table.add_row(name, str(len(losses)), f"{losses[0]:.3e}", f"{losses[-1]:.3e}")
        tables.append(table)
    return tuple(tables)


def plan_table(plan: Plan, name: str) -> Table:
    """Returns what a run will give and cost."""
    work = plan.work
    table = _table(f"plan for {name}", "figure", "value")
    table.add_row("bits per weight of quantized linears", f"{plan.bits_per_weight():.4f}")
    table.add_row("source in memory", format_bytes(plan.source_nbytes))
    table.add_row("result on disk", format_bytes(plan.nbytes))
    table.add_row("on disk meanwhile, beside it", format_bytes(plan.store_nbytes))
    table.add_row("peak memory, predicted", format_bytes(plan.peak_nbytes))
    blocks = predict(plan, Way("blocks"), has_device=True)
    table.add_row("one block at a time, host", format_bytes(blocks.host))
    table.add_row("one block at a time, device", format_bytes(blocks.device))
    table.add_row("calibration tokens", f"{plan.tokens:,}")
    table.add_row("calibration passes", f"{_scaled(work.forward)}FLOP")
    table.add_row("Hessians", f"{_scaled(work.statistics)}FLOP")
    table.add_row("solves", f"{_scaled(work.solves)}FLOP")
    shapes = ", ".join(f"{inputs} x {outputs}" for inputs, outputs in plan.solve_shapes)
    table.add_row("KV cache", _cache_size(plan.cache))
    table.add_row("its codec", plan.cache.codec)
    table.add_row("distinct solves, each compiled once", f"{len(plan.solve_shapes)} ({shapes})")
    return table


def plan_linears_table(plan: Plan) -> Table:
    """Returns what becomes of each kind of linear: layers that share a row have equal shapes, methods and bits."""
    table = _table("linears", "linear", "count", "in x out", "method", "bits")
    keyed = sorted((_kind(row.path), row.shape, row.method, round(row.bits_per_weight(), 4)) for row in plan.linears)
    for (kind, shape, method, bits), members in groupby(keyed):
        table.add_row(kind, str(len(list(members))), f"{shape[0]} x {shape[1]}", method, f"{bits:.4f}")
    return table


def simulation_table(rows: Sequence[Simulation]) -> Table:
    """Returns what a run should take, one row for each number of devices, and the rates below."""
    titles = ("on each device", "read and write", "calibrate", "solve", "in all", "copies", "a copy's share")
    table = _table("on paper, by measured rates", "GPUs", *titles, "tokens/s of one row")
    for row in rows:
        table.add_row(
            str(row.devices),
            format_bytes(row.device_nbytes),
            *(f"{part:,.0f} s" for part in (row.host_seconds, row.calibration_seconds, row.solve_seconds)),
            f"{row.seconds():,.0f} s",
            str(row.copies),
            format_bytes(row.serving_nbytes),
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "does not fit",
        )
    rates = (f"{name}: {rate.value:.3g} {rate.unit}, {rate.source}".replace(" ,", ",") for name, rate in RATES.items())
    table.caption = "\n".join(rates)
    return table


def benchmark_table(rows: Sequence[Benchmark], workload: int, device: str, width: int) -> Table:
    """Returns one row for each model at one workload, or a column where rows would be wider than the console.

    Times and memory stand beside those of the first model that fitted.

    Args:
      rows: what was measured.
      workload: which one of theirs.
      device: its name.
      width: columns of the console.
    """
    asked = rows[0].latencies[workload].workload
    fitting = [found for row in rows if isinstance(found := row.latencies[workload], Latency)]
    titles = "weights", "prompt tokens/s", "first token ms", "x", "tokens/s", "ms a token", "x", "arrays", "x", "peak"
    lines: list[tuple[str, ...]] = [("model", *titles, "compiled in s", "products by")]
    for row in rows:
        found, first = row.latencies[workload], fitting[0] if fitting else None
        if isinstance(found, Shortage) or first is None:
            lines.append((row.name, row.weights, *["-"] * 8, "too large", "-", row.products))
            continue
        cells: list[str] = []
        for phase, base, steps in (
            (found.prefill, first.prefill, 1),
            (found.decode, first.decode, found.workload.steps()),
        ):
            if phase is None or base is None:
                cells += ["-"] * 3
                continue
            per_step = f"{1e3 * phase.median() / steps:.2f}"
            cells += [f"{phase.tokens_per_second():,.1f}", per_step, f"{base.median() / phase.median():.2f}"]
        arrays, base_arrays = (one.weights_nbytes + one.cache_nbytes for one in (found, first))
        compiled = sum(phase.compile_seconds for phase in (found.prefill, found.decode) if phase is not None)
        sizes = format_bytes(arrays), f"{base_arrays / arrays:.2f}", format_bytes(found.peak_nbytes())
        lines.append((row.name, row.weights, *cells, *sizes, f"{compiled:.1f}", row.products))
    columns = list(zip(*lines, strict=True))
    first_line, *others = lines if sum(max(map(len, each)) + 3 for each in columns) < width else columns
    table = _table(f"{asked.describe()} on {device}", *first_line)
    for line in others:
        table.add_row(*line)
    table.caption = (
        f"medians of {asked.repeats} runs; x: how many times faster, or smaller, than the first row with figures\n"
        "arrays: weights and caches; peak: all that the larger program holds at once, as compiled"
    )
    if len(fitting) < len(rows):
        table.caption += (
            "\ntoo large: the device's memory did not suffice; JAX takes 75 % of a GPU's unless "
            "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
        )
    return table


def facts_table(facts: Facts, name: str) -> Table:
    """Returns one row for each linear of a model; what multiplies it, and what devices have of it, where asked for."""
    asked = [title for title in ("product", "cut") if any(getattr(row, title) for row in facts.linears)]
    titles = ["each device has" if title == "cut" else title for title in asked]
    table = _table(name, "linear", "in x out", "input", "format", "bits", "relative error", *titles)
    for row in facts.linears:
        error = "-" if row.relative_error is None else f"{row.relative_error:.4f}"
        shape, bits = f"{row.shape[0]} x {row.shape[1]}", f"{row.bits_per_weight:.4f}"
        more = (getattr(row, title) for title in asked)
        table.add_row(row.path, shape, row.input or "-", row.format, bits, error, *more)
    structures = f"{facts.structures} distinct block structure{'s' if facts.structures > 1 else ''}"
    sizes = f"{facts.bits_per_weight():.4f} bits per weight, {format_bytes(facts.nbytes)} in all, {structures}"
    rotations = Counter(facts.query_key_rotations)
    turned = ", ".join(f"{name or 'as they are'} in {count} blocks" for name, count in rotations.items())
    cache = f"KV cache: {_cache_size(facts.cache)}, {facts.cache.codec}"
    table.caption = f"{sizes}\n{cache}\nqueries and keys after RoPE: {turned}"
    for place, chosen in (("to the cache", facts.attentions), ("of prompts", facts.prompts)):
        if chosen:
            kernels = ", ".join(f"{name} in {count} blocks" for name, count in Counter(chosen).items())
            table.caption += f"\nattention {place}: {kernels}"
    return table


def measurement_table(rows: Mapping[str, tuple[Measurement, Facts]]) -> Table:
    """Returns one row for each measured model: perplexity, windows, bits, size, seconds."""
    table = _table(
        "perplexity",
        "model",
        "text",
        "perplexity",
        "windows",
        "prompt KV",
        "bits per weight",
        "size",
        "products by",
        "seconds",
    )
    for name, (measured, facts) in rows.items():
        figure = measured.perplexity
        table.add_row(
            name,
            measured.dataset,
            f"{figure.value:.4f}",
            f"{figure.windows} x {figure.window_length}",
            figure.kv_prompt,
            f"{facts.bits_per_weight():.3f}",
            format_bytes(facts.nbytes),
            measured.products,
            f"{measured.seconds:.1f}",
        )
    return table


def tasks_table(measured: TaskMeasurement, name: str) -> Table:
    """Returns the figures of each task or group that was asked for; those of a group's members are in the JSON."""
    results, options = measured.results, measured.options
    table = _table(f"tasks: {name}", "task", "examples", "documents", "metric", "value", "standard error")
    for row in results.scores:
        if not row.part:
            shots = "-" if row.shots is None else str(row.shots)
            metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
            error = "-" if row.error is None else f"{row.error:.4f}"
            table.add_row(row.task, shots, str(row.documents), metric, f"{row.value:.4f}", error)
    products = f"products by {measured.products}"
    said = [
        f"prompt KV {results.kv_prompt}, {products}, {measured.seconds:.1f} seconds, {results.provenance['harness']}"
    ]
    if options.limit is not None:
        said.append(f"the first {options.limit} documents of each task only")
    if options.chat == "template":
        said.append("prompts by the chat template")
    if results.truncated:
        said.append(f"{results.truncated} prompts were longer than the context and lost their left end")
    table.caption = "\n".join([*said, *filter(None, [results.provenance.get("note")])])
    return table


def analysis_tables(analysis: Analysis, name: str) -> tuple[Table, ...]:
    """Returns, for each kind of tap, the median and the worst block; distances after each block; the divergence."""
    tables = []
    for title, rows in ((name, analysis.taps), ("the reference", analysis.reference_taps)):
        if rows:
            tables.append(_taps_table(rows, title))
            tables[-1].caption = f"{analysis.windows} windows of {analysis.length} tokens of {analysis.dataset}"
    if analysis.distances:
        table = _table("states after each block, beside the reference's", "block", "relative error", "cosine")
        for row in analysis.distances:
            table.add_row(str(row.block), f"{row.relative_error:.4f}", f"{row.cosine:.6f}")
        tables.append(table)
    if analysis.divergence is not None:
        found = analysis.divergence
        table = _table("predictions beside the reference's", "figure", "value")
        table.add_row("KL divergence, nats per token", f"{found.kl:.5f}")
        table.add_row("its 99th percentile", f"{found.kl_99:.5f}")
        table.add_row("tokens whose likeliest successor is another", f"{100 * found.flips:.2f} %")
        if analysis.distances is None:
            table.caption = "one of the models is rotated: distances of states would say nothing and are left out"
        tables.append(table)
    return tuple(tables)


def _taps_table(rows: Sequence[TapStatistics], name: str) -> Table:
    columns = "kurtosis: median", "worst", "of block", "least", "greatest", "outlier channels", "peak", "SQNR, least"
    table = _table(f"inputs of linears: {name}", "tap", *columns)
    for tap in dict.fromkeys(row.tap for row in rows):
        members = [row for row in rows if row.tap == tap]
        worst = max(members, key=lambda row: row.kurtosis)
        noises = [row.sqnr for row in members if row.sqnr is not None]
        peaks = [row.peak for row in members if row.peak is not None]
        table.add_row(
            tap,
            f"{statistics.median(row.kurtosis for row in members):.2f}",
            f"{worst.kurtosis:.2f}",
            str(worst.block),
            f"{min(row.low for row in members):.3g}",
            f"{max(row.high for row in members):.3g}",
            str(sum(row.outlier_channels for row in members)),
            f"{max(peaks):.1f}" if peaks else "-",
            f"{min(noises):.1f} dB" if noises else "-",
        )
    return table


def needle_table(rows: Iterable[NeedleRow]) -> Table:
    """Returns one row for each model that was asked for needles: its KV codec, bits, share found, products, seconds."""
    table = _table("needles", "model", "KV codec", "bits per value", "found", "products by", "seconds")
    for row in rows:
        figures = (
            f"{row.cache.bits_per_value:.3f}",
            f"{100 * row.grid.share():.1f} %",
            row.products,
            f"{row.seconds:.1f}",
        )
        table.add_row(row.name, row.cache.codec, *figures)
    return table


def figures_table(rows: Sequence[ModelFigures], title: str, caption: str) -> Table:
    """Returns one row for each model: what was measured of it, bits per weight and KV value, size, seconds to make."""
    measured = list(rows[0].columns()) if rows else []
    table = _table(title, "model", *measured, "bits per weight", "bits per KV value", "size", "seconds")
    for row in rows:
        bits = f"{row.bits_per_weight:.3f}", f"{row.bits_per_kv_value:.3f}"
        figures = map(_format_figure, row.columns().items())
        table.add_row(row.name, *figures, *bits, format_bytes(row.nbytes), f"{row.seconds:.0f}")
    table.caption = caption
    return table


def markdown(rows: Sequence[ModelFigures], caption: str) -> str:
    """Returns the rows as a table in Markdown."""
    titles = _titles(rows)
    lines = [titles, ("---", *["---:"] * (len(titles) - 1)), *map(_rounded, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption}\n"


def comma_separated(rows: Sequence[ModelFigures]) -> str:
    """Returns the rows as CSV, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_titles(rows))
    for row in rows:
        sizes = row.bits_per_weight, row.bits_per_kv_value, row.nbytes, row.seconds
        writer.writerow((row.name, *sizes, *row.columns().values()))
    return text.getvalue()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _titles(rows: Sequence[ModelFigures]) -> tuple[str, ...]:
    return (*_TITLES, *(rows[0].columns() if rows else ()))


def _rounded(row: ModelFigures) -> tuple[str, ...]:
    sizes = f"{row.bits_per_weight:.3f}", f"{row.bits_per_kv_value:.3f}", f"{row.nbytes:,}", f"{row.seconds:.0f}"
    return (row.name, *sizes, *map(_format_figure, row.columns().items()))


def _format_figure(column: tuple[str, float]) -> str:
    """Returns a measured figure with the digits that its title calls for: three of a perplexity, four of a score."""
    title, value = column
    return f"{value:.3f}" if title.startswith("perplexity") else f"{value:.4f}"


def _kind(path: str) -> str:
    """Returns a linear's place inside its block: `layers.3.mlp.up_proj` is `mlp.up_proj`."""
    return path.split(".", 2)[2]


def _cache_size(cache: CacheFacts) -> str:
    """Returns what keys and values take."""
    size = f"{cache.nbytes_per_token:,.0f} bytes per token, {cache.bits_per_value:.3f} bits per value"
    return f"{format_bytes(round(cache.nbytes_per_token * cache.length))} for {cache.length} tokens, {size}"


def _loss_ratio(rows: Sequence[LinearReport]) -> str:
    """Returns the mean of proxy loss / RTN's proxy loss over the rows that have both."""
    pairs = [(row.proxy_loss, row.rtn_proxy_loss) for row in rows]
    ratios = [loss / rtn for loss, rtn in pairs if loss is not None and rtn]
    return f"{sum(ratios) / len(ratios):.3f}" if ratios else "-"


def _largest_damping(rows: Sequence[LinearReport]) -> str:
    dampings = [row.damping for row in rows if row.damping is not None]
    return f"{max(dampings):.2f}" if dampings else "-"


def format_bytes(count: int) -> str:
    """Returns a number of bytes in binary units.

    >>> format_bytes(170_721_280)
    '162.81 MiB'
    """
    power = min(3, int(math.log2(max(count, 1)) // 10))
    return f"{count / 1024**power:.{min(power, 2)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _scaled(count: int) -> str:
    """Returns a number with a decimal prefix, such as 3.1 T."""
    power = min(len(_UNITS) - 1, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:.1f} {_UNITS[power]}"
