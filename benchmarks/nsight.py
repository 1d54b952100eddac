"""What Nsight Compute counts of kernels, by plain names: the metrics asked for, and its table of raw values read."""

import contextlib
import csv
import math
import re
import subprocess
from collections.abc import Sequence
from typing import Any, Final

COPIED: Final = 1 << 28  # numbers of bfloat16
NANOSECONDS: Final = ("ns", "nsecond")  # how versions of ncu write the base unit of time
STALL: Final = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS: Final = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected"),
    *("short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
TIME: Final = "gpu__time_duration.sum"
METRICS: Final = {  # ncu's name: ours; shares are in percent
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "second_cache_percent",
    "lts__t_sectors.sum": "second_cache_sectors",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "smsp__inst_executed.sum": "instructions",
    "sm__cycles_active.avg.pct_of_peak_sustained_elapsed": "active_percent",
    "sm__cycles_elapsed.max": "cycles",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_pipe_percent",
    "sm__inst_executed_pipe_tensor_op_gmma.sum": "warpgroup_products",
    "sm__inst_executed_pipe_tensor_op_hmma.sum": "warp_products",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared_memory",
    "launch__occupancy_limit_registers": "blocks_by_registers",
    "launch__occupancy_limit_shared_mem": "blocks_by_shared_memory",
    "launch__occupancy_limit_warps": "blocks_by_warps",
}
EVERY: Final = (TIME, *METRICS, *(STALL.format(reason) for reason in STALLS))


def kernels(text: str, asked: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each kernel of ncu's page of raw values, in the order of their launches.

    Args:
      text: what ncu wrote, `--csv --page raw --print-units base`, its messages before the table.
      asked: the metrics that ncu was asked for; those of `EVERY` that are not among them are named too.

    Raises:
      ValueError: times are in another unit, so that no row could be trusted.
    """
    start = text.find('"ID",')
    if start < 0:
        return []
    units, *values = csv.DictReader(text[start:].splitlines())
    if units[TIME] not in NANOSECONDS:
        raise ValueError(f"{TIME} is in {units[TIME]!r}, expected one of {NANOSECONDS}")
    found = []
    for line in values:
        numbers = {name: _number(line.get(name)) for name in asked}
        row: dict[str, Any] = {"kernel": line["Kernel Name"], "grid": line["Grid Size"], "block": line["Block Size"]}
        nanoseconds = numbers[TIME]
        row["microseconds"] = None if nanoseconds is None else nanoseconds / 1e3
        row |= {ours: numbers[name] for name, ours in METRICS.items() if numbers.get(name) is not None}
        stalls = {reason: numbers.get(STALL.format(reason)) or 0.0 for reason in STALLS}
        whole = sum(stalls.values())
        largest = sorted(stalls, key=stalls.__getitem__, reverse=True)[:3]
        row["stalls"] = {reason: round(stalls[reason] / whole, 3) for reason in largest} if whole else {}
        row["cycles_of_warp_per_instruction"] = whole or None
        found.append(row | {"not_measured": [name for name in EVERY if numbers.get(name) is None]})
    return found


def beside_copy(profiled: list[dict[str, Any]], nbytes: float) -> list[dict[str, Any]]:
    """Returns the rows of a call with their shares of the copy, which is the first, and a row of the whole.

    Args:
      profiled: of `kernels`, the copy of `COPIED` numbers first.
      nbytes: what the call cannot do without: codes and grids, a cache, or the tensors that it turns.
    """
    copy, *own = profiled
    rate = 4e-3 * COPIED / copy["microseconds"]  # GB/s; two bytes are read and two written
    rows = []
    for row in own:
        moved = [row[name] for name in ("bytes_read", "bytes_written") if name in row]
        share = {"share_of_copy": round(sum(moved) / row["microseconds"] / 1e3 / rate, 3)} if len(moved) == 2 else {}
        rows.append(row | share)
    total = sum(row["microseconds"] for row in own)
    whole = {"kernels": len(own), "microseconds": total, "bytes_of_codes": nbytes, "copy_gigabytes_per_second": rate}
    return [*rows, whole | {"of_copy": round(nbytes / total / 1e3 / rate, 3)}]


def _number(text: str | None) -> float | None:
    """Returns a number of ncu's, None where it gave none: "n/a", "nan", or no column."""
    with contextlib.suppress(ValueError):
        number = float((text or "").replace(",", ""))
        return number if math.isfinite(number) else None
    return None


def known(ncu: str) -> tuple[list[str], str]:
    """Returns the metrics that this ncu knows of those wanted, and why it could not be asked where that is so."""
    command = [ncu, "--query-metrics", "--chip", "gh100"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    names = set(re.findall(r"^\s*\"?(\w+__\w+)", asked.stdout, re.MULTILINE))
    if asked.returncode or TIME.partition(".")[0] not in names:
        return list(EVERY), f"{command} ended with {asked.returncode}: {(asked.stderr or asked.stdout)[-300:]}"
    return [name for name in EVERY if name.startswith("launch__") or name.partition(".")[0] in names], ""
