"""The command line: what it prints, its exit codes, and that mistakes are one line on stderr."""

import gzip
import io
import json
import re
from pathlib import Path
from typing import Final

import pytest
from rich.console import Console

from jquant.cli import main
from jquant.commands import chat
from jquant.commands.display import show_progress
from jquant.progress import Progress
from jquant.report import BlockReport, LinearReport, Report
from jquant.tables import report_table
from tests.checkpoints import write_checkpoint

RULE: Final = "passes[0].sequential.passes[0].quantize_weights.rules[0]"
COMMANDS: Final = (
    "convert",
    "quantize",
    "plan",
    "export",
    "verify",
    "inspect",
    "eval",
    "analyze",
    "bench",
    "needle",
    "compare",
    "generate",
    "chat",
    "demo",
)
SMALL: Final = ("--recipe", "rtn-w4g64", "--set", f"{RULE}.quantizer.rtn.format.group_size=32")


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Return the path of a tiny Hugging Face folder."""
    return str(write_checkpoint(tmp_path / "source"))


@pytest.fixture
def quantized(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the path of a tiny quantized checkpoint."""
    assert run("quantize", source, str(tmp_path / "out"), *SMALL) == 0
    capsys.readouterr()
    return str(tmp_path / "out")


def run(*arguments: str) -> int:
    """Run a command and return its exit code."""
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"│ {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"Usage: jquant {command}" in capsys.readouterr().out


def test_quantize(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "quantize.html"
    assert run("quantize", source, str(tmp_path / "out"), *SMALL, "--report", str(page)) == 0
    assert "layers.1.mlp.down_proj" in page.read_text()
    shown = capsys.readouterr()
    assert "layers.1.mlp.down_proj" in shown.out
    assert f"saved in {tmp_path / 'out'}" in shown.out
    assert "quantizing 2/2" in shown.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["details"]["recipe"] == "rtn-w4g64"


def test_convert(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", source, str(tmp_path / "full"), "--dtype", "bfloat16") == 0
    assert "full: llama, 2 blocks" in capsys.readouterr().out
    assert run("inspect", str(tmp_path / "full")) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_export_then_verify(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "theirs")
    assert run("export", source, out, "--format", "safetensors", "--for", "vllm", "--dtype", "bfloat16") == 0
    assert "theirs: safetensors, 0 linears packed, 21 tensors, verified for vllm" in capsys.readouterr().out
    assert run("verify", out) == 0
    assert "21 tensors, 0 linears packed: transformers can read it" in capsys.readouterr().out
    assert run("export", source, str(tmp_path / "float32"), "--format", "safetensors", "--for", "vllm") == 0
    assert "note: vLLM rounds float32 arrays" in capsys.readouterr().out
    assert run("export", source, str(tmp_path / "refused"), "--format", "gptq") == 2
    assert "nearest: compressed-tensors" in capsys.readouterr().err
    assert run("verify", str(tmp_path)) == 2


def test_plan_writes_nothing(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("plan", source, *SMALL) == 0
    shown = capsys.readouterr().out
    assert "bits per weight of quantized linears" in shown
    assert "4 (64 x 128, 64 x 64, 64 x 192, 96 x 64)" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_has_a_line_for_each_linear(quantized: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", quantized) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "layers." in line]
    assert len(lines) == 14
    assert "Uniform(bits=4, group_size=32, symmetry=asymmetric, scale_dtype=float16)" in lines[0]
    assert "4.6250" in lines[0]  # 4 bits; for 32 inputs a 16-bit scale and a 4-bit zero
    assert "1 distinct block structure" in shown
    assert (
        "KV cache: 128.0 KiB for 256 tokens, 512 bytes per token, 32.000 bits per value, ExactKv(prompt=exact)" in shown
    )


def test_inspect_names_what_multiplies_on_a_target(quantized: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", quantized, "--target", "h200") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "layers.1." in line]
    assert all("W4A16" in line for line in lines)
    assert sum("filled up to 64 x 128" in line for line in lines) == 2  # gate and up, of 96 outputs


def test_a_target_that_is_not_there_is_refused_before_any_work(
    quantized: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = "error: --target h100: this machine has cpu, no H100 or H200; give auto or reference"
    for command in (
        ("eval", quantized),
        ("generate", quantized, "--prompt", "x"),
        ("chat", quantized),
        ("needle", quantized, "--lengths", "200"),
        ("compare", quantized, str(tmp_path / "table"), "--recipe", "rtn-w8"),
    ):
        assert run(*command, "--target", "h100") == 2, command
        assert refused in capsys.readouterr().err


def test_eval_prints_a_table_and_writes_json(
    quantized: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    page = tmp_path / "eval.html"
    sizes = ("--windows", "2", "--length", "16")
    assert run("eval", quantized, *sizes, "--json", str(result), "--report", str(page)) == 0
    assert "mean loss of each window" in page.read_text()
    written = json.loads(result.read_text())
    assert written["perplexity"]["windows"] == 2
    assert written["products"] == "XLA"
    assert f"{written['perplexity']['value']:.4f}" in capsys.readouterr().out
    assert written["provenance"]["source"].startswith("pydoc_data.topics")


def test_eval_runs_tasks_by_name(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"passage": "A bee flies.", "question": f"is {index} odd", "label": index % 2} for index in range(4)]
    file, result = tmp_path / "tasks" / "boolq_validation.jsonl.gz", tmp_path / "result.json"
    file.parent.mkdir()
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    options = ("--tasks", "boolq", "--limit", "3", "--data", str(tmp_path))
    page = ("--report", str(tmp_path / "eval.html"))
    assert run("eval", source, *options, *page, "--cache", str(tmp_path / "kept"), "--json", str(result)) == 0
    shown = capsys.readouterr()
    written = json.loads(result.read_text())
    (score,) = written["tasks"]["results"]["scores"]
    assert f"│ {score['value']:.4f} │" in shown.out
    assert "the first 3 documents of each task only" in shown.out
    assert "the first 3 documents of each task only" in (tmp_path / "eval.html").read_text()
    assert "perplexity" not in written
    assert "requests answered 6/6" in shown.err
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert "did you mean boolq" in fails(capsys, "eval", source, *options[:1], "bolq", *options[2:])
    assert "belong to tasks" in fails(capsys, "eval", source, "--limit", "3")
    assert "belong to tasks" in fails(capsys, "compare", source, "out", *SMALL[:2], "--shots", "3")


@pytest.mark.slow
def test_analyze_prints_tables_and_writes_every_tap(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, page = tmp_path / "result.json", tmp_path / "pages" / "analysis.html"
    picture = tmp_path / "magnitudes.png"
    drawn = ("--picture", str(picture), "--block", "1", "--tap", "mlp_input", "mlp_hidden")
    sizes = ("--windows", "2", "--length", "16", "--report", str(page), *drawn)
    assert run("analyze", source, "--against", source, *sizes, "--json", str(result)) == 0
    assert "states after each block" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    written = json.loads(result.read_text())
    assert [(row["block"], row["tap"]) for row in written["taps"]][3:5] == [(0, "mlp_hidden"), (1, "attention_input")]
    assert written["taps"] == written["reference_taps"]
    assert [row["relative_error"] for row in written["distances"]] == [0.0, 0.0]
    assert written["divergence"]["tokens"] == 32
    assert "inputs of linears: the reference" in shown
    assert "│ tokens whose likeliest successor is another │  0.00 % │" in shown
    assert "3 blocks and 1 taps: give one block" in fails(
        capsys, "analyze", source, "--picture", str(picture), "--block", "0", "1", "2", "--tap", "mlp_input"
    )


@pytest.mark.slow
def test_needle_prints_a_map_for_each_codec_and_shows_a_result_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_checkpoint(tmp_path / "long", max_position_embeddings=512, num_hidden_layers=1))
    result = tmp_path / "result.json"
    sizes = (
        "--lengths",
        "400",
        "--depths",
        "0",
        "100",
        "--needles",
        "1",
        "--batch-size",
        "2",
        "--prefill-chunk",
        "128",
    )
    assert run("needle", source, "--recipe", "kv4", *sizes, "--json", str(result)) == 0
    shown = capsys.readouterr().out
    written = json.loads(result.read_text())
    assert [row["name"] for row in written["rows"]] == ["as it is", "kv4"]
    assert written["rows"][1]["cache"]["bits_per_value"] == 4 + 32 / 16
    assert written["rows"][0]["grid"]["lengths"] == [400]
    assert "\nkv4\ndepth    400\n   0 % ·   0\n 100 % ·   0\n" in shown
    assert run("needle", str(result)) == 0
    assert capsys.readouterr().out == shown
    assert "is a result, which is shown as it is" in fails(capsys, "needle", str(result), "--recipe", "kv4")
    assert "has no needles found" in fails(capsys, "needle", str(tmp_path / "long" / "config.json"))
    assert "leave out what the protocol does not use" in fails(capsys, "needle", source, "--copies", "2")
    assert "needs calibration: quantize by it first" in fails(capsys, "needle", source, "--recipe", "gptq-w4g64")


@pytest.mark.slow
def test_bench_times_a_checkpoint_and_random_codes_of_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, result = str(write_checkpoint(tmp_path / "one", num_hidden_layers=1)), tmp_path / "result.json"
    sizes = ("--batch", "2", "--prompt", "8", "--tokens", "2", "--repeats", "1")
    assert run("bench", source, "--recipe", "rtn-w8+kv4", *sizes, "--json", str(result)) == 0
    own, made = json.loads(result.read_text())["rows"]
    assert (own["weights"], made["weights"], made["name"]) == ("its own", "random", "rtn-w8+kv4")
    assert own["bits_per_weight"] > made["bits_per_weight"] > 8
    (found,) = made["latencies"]
    assert (found["decode"]["tokens"], len(found["prefill"]["seconds"])) == (4, 1)
    assert found["cache_nbytes"] < own["latencies"][0]["cache_nbytes"]
    assert "batch 2, prompt 8, 2 tokens behind 8" in capsys.readouterr().out
    for wrong, word in (("nowhere.json", "llama-3.1-8b"), (str(result), "model_type 'None'")):
        assert run("bench", wrong) == 2
        assert word in capsys.readouterr().err


def test_generate_takes_several_prompts(quantized: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "one [b]", "--prompt", "another")
    options = ("--max-tokens", "3", "--temperature", "1", "--top-k", "5", "--prefill-chunk", "8")
    assert run("generate", quantized, *prompts, *options) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("one [b]")
    assert "\nanother" in shown.out
    assert "products by XLA" in shown.err


def test_chat_answers_line_by_line(
    quantized: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/stats", "hello", "long " * 9999, "and again", "/stats", "/clear", "again", "/stats", "/what"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run("chat", quantized, "--max-tokens", "4", "--system", "be brief") == 0
    shown = capsys.readouterr().out
    assert shown.count("> ") >= 10
    assert "no answer yet" in shown
    assert shown.count("shorten the prompt or ask for fewer tokens; or forget the conversation: /clear") == 1
    reads = [int(count) for count in re.findall(r": (\d+) tokens read, \d written, the first after", shown)]
    assert len(reads) == 2
    assert reads[1] == len("system: be brief\nuser: again\nassistant: ") < reads[0]  # /clear forgot the rest
    assert re.search(r"tokens/s; KV cache [\d.]+ KiB for \d+ tokens, 32\.000 bits per value, ExactKv", shown)
    assert "/what is no command. /stats: " in shown


@pytest.mark.slow
def test_chat_puts_two_models_side_by_side(
    source: str, quantized: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One below the other in a file, in columns on a terminal; the same texts either way, as each alone gives."""
    texts = []
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
        monkeypatch.setattr(chat, "stdout", lambda on=terminal: Console(width=60, force_terminal=on, color_system=None))
        assert run("chat", quantized, "--against", source, "--max-tokens", "3") == 0
        texts.append(capsys.readouterr().out)
    below, beside = texts
    assert [below.count(f"[{name}]") for name in (quantized, source)] == [2, 2]
    assert "\u256e\u256d" in beside.replace(" ", "")  # two boxes in a line


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as a mistake of the user does; return what it says."""
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err
    assert not shown.out
    return shown.err


def test_mistakes_are_said_in_one_line(
    source: str, quantized: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "new")
    wrong = ("--recipe", "rtn-w4g64", "--set", f"{RULE}.quantizer.rtn.format.bitz=4")
    assert "did you mean 'bits'?" in fails(capsys, "quantize", source, out, *wrong)
    assert "is no preset and no file; Presets: " in fails(capsys, "quantize", source, out, "--recipe", "gtpq")
    assert "does not exist" in fails(capsys, "plan", str(tmp_path / "nowhere"), *SMALL)
    assert "already quantized" in fails(capsys, "quantize", quantized, out, *SMALL)
    assert "exists and is not empty" in fails(capsys, "quantize", source, quantized, *SMALL)
    assert "expected one of python-docs" in fails(capsys, "eval", quantized, "--perplexity", "wikitext3")
    assert "temperature 0" in fails(capsys, "generate", quantized, "--prompt", "x", "--top-k", "3")
    below_a_file = str(tmp_path / "source" / "config.json" / "result.json")
    assert "cannot write to" in fails(capsys, "eval", quantized, "--json", below_a_file)


def test_interruption_is_said_and_has_its_own_exit_code(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jquant.commands.quantize.quantize", interrupt)
    assert run("quantize", source, str(tmp_path / "out"), *SMALL) == 130
    assert "goes on from its last finished block" in capsys.readouterr().err


def test_bug_is_not_dressed_up(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("jquant.commands.quantize.quantize", fail)
    with pytest.raises(ZeroDivisionError):
        run("quantize", source, str(tmp_path / "out"), *SMALL)


def test_progress_on_a_terminal_draws_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress() as on_progress:
        on_progress(Progress("reading"))
        for done in (1, 2, 3):
            on_progress(Progress("quantizing", done, 3))
        on_progress(Progress("measuring", 1, 3))
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "3/3" in shown


def test_deep_models_are_reported_by_kind() -> None:
    def row(path: str, damping: float) -> LinearReport:
        return LinearReport(path, "UniformTensor", 4.5, 0.1, 1.0, 2.0, damping)

    blocks = tuple(BlockReport(index, (row(f"layers.{index}.mlp.up_proj", 0.01 * index),), 1.0) for index in range(6))
    deep, shallow = report_table(Report(blocks)), report_table(Report(blocks[:2]))
    assert [list(column.cells) for column in deep.columns] == [
        ["mlp.up_proj"],
        ["6"],
        ["4.500"],
        ["0.1000"],
        ["0.500"],
        ["0.05"],
    ]
    assert list(shallow.columns[0].cells) == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
