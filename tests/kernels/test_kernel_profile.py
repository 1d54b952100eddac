"""What Nsight Compute says becomes rows by plain names; an ncu that counts nothing stands for the real one."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_profile, nsight

READ, OCCUPANCY = "dram__bytes_read.sum", "sm__warps_active.avg.pct_of_peak_sustained_active"
WAIT, BARRIER = nsight.STALL.format("wait"), nsight.STALL.format("barrier")
ASKED = [nsight.TIME, READ, "dram__bytes_write.sum", OCCUPANCY, WAIT, BARRIER, nsight.STALL.format("gmma")]
COLUMNS = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", *ASKED[:-1]]
UNITS = ["", "", "", "", "", "ns", "byte", "byte", "%", "inst", "inst"]
KERNELS = [  # a copy at 2 bytes a ps, and a kernel of half the rate
    ("0", "7", "add", "(128, 1, 1)", "(64, 1, 1)", "536,870.912", "536,870,912", "536,870,912", "90.5", "1", "nan"),
    (
        "1",
        "7",
        "decode<(int)4, 2>()",
        "(512, 1, 1)",
        "(9, 1, 1)",
        "20,000",
        "19,000,000",
        "1,000,000",
        "24.5",
        "3",
        "1",
    ),
]
MESSAGES = '==PROF== Connected to process 7\n==PROF== Profiling "add" - 0: 0%....100% - 9 passes\n'


def _text(units: list[str] = UNITS) -> str:
    lines = [",".join(f'"{each}"' for each in line) for line in (COLUMNS, units, *KERNELS)]
    return MESSAGES + "\n".join(lines) + "\n"


def test_kernels_have_their_numbers_and_say_what_they_lack() -> None:
    copy, decode = nsight.kernels(_text(), ASKED)
    assert decode["kernel"] == "decode<(int)4, 2>()"
    assert (decode["microseconds"], decode["bytes_read"], decode["occupancy_percent"]) == (20.0, 19e6, 24.5)
    assert dict(list(decode["stalls"].items())[:2]) == {"wait": 0.75, "barrier": 0.25}
    assert nsight.STALL.format("gmma") in decode["not_measured"]  # asked for, and no column
    assert "launch__registers_per_thread" in decode["not_measured"]  # not asked for
    assert BARRIER in copy["not_measured"]  # "nan"
    assert BARRIER not in decode["not_measured"]


def test_shares_are_of_the_copy_and_the_whole_is_the_sum() -> None:
    decode, whole = nsight.beside_copy(nsight.kernels(_text(), ASKED), nbytes=16e6)
    assert decode["share_of_copy"] == 0.5  # 20 MB in 20 us, the copy 2 GB/ms
    assert (whole["kernels"], whole["microseconds"], whole["of_copy"]) == (1, 20.0, 0.4)


def test_other_units_of_time_are_refused_and_messages_alone_are_no_kernel() -> None:
    with pytest.raises(ValueError, match="usecond"):
        nsight.kernels(_text([*UNITS[:5], "usecond", *UNITS[6:]]), ASKED)
    assert nsight.kernels(MESSAGES, ASKED) == []


STAND_IN = """#!{python}
import sys
from pathlib import Path
if "--query-metrics" in sys.argv:
    print("Device NVIDIA\\n  gpu__time_duration  Counter\\ndram__bytes_read  Counter")
else:
    log = Path(sys.argv[sys.argv.index("--log-file") + 1])
    known = "w4a16-8192x8192" in sys.argv
    log.write_text(Path({table!r}).read_text() if known else "==ERROR== no kernels were profiled")
    print("asked " + sys.argv[sys.argv.index("--metrics") + 1])
    sys.exit(0 if known else 3)
"""


def test_rows_of_cases_come_from_ncu_and_failures_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ncu, table, output = tmp_path / "ncu", tmp_path / "table", tmp_path / "rows.jsonl"
    table.write_text(_text(), encoding="utf-8")
    ncu.write_text(STAND_IN.format(python=sys.executable, table=str(table)), encoding="utf-8")
    ncu.chmod(0o755)
    for name in kernel_profile.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that what the script sets is taken back
    cases = ["--cases", "w4a16-8192x8192", "rotation-2048x8192"]
    monkeypatch.setattr(sys, "argv", ["kernel_profile.py", *cases, "--ncu", str(ncu), "--output", str(output)])
    kernel_profile.main()
    head, *rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert capsys.readouterr().out == output.read_text(encoding="utf-8")
    assert head["query_failed"] == ""
    assert OCCUPANCY in head["unknown_metrics"]
    assert READ not in head["unknown_metrics"]
    (failed,) = (row for row in rows if "failure" in row)
    assert (failed["case"], failed["status"]) == ("rotation-2048x8192", 3)
    assert "no kernels were profiled" in failed["failure"]
    assert failed["printed"].startswith(f"asked {nsight.TIME},{READ}")
    decode, whole = (row for row in rows if row["case"] == "w4a16-8192x8192")
    assert (decode["microseconds"], decode["config"]["instruction"]) == (20.0, whole["config"]["instruction"])
    assert "status" not in decode
    assert whole["bytes_of_codes"] == kernel_profile.CASES["w4a16-8192x8192"].bytes_of_codes
