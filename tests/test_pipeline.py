"""Quantizing checkpoints on disk: what is kept, what is refused before any work, and how a stopped run goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_tokenizer
from jquant.checkpoint import is_checkpoint, load_model, recorded_digest
from jquant.errors import CalibrationError, CheckpointError, ConversionError, DataError, RecipeError
from jquant.folders import open_abstract, open_for_use, open_model, read_report
from jquant.formats import UniformTensor
from jquant.measure import measure
from jquant.models import Stacked, forward
from jquant.pipeline import convert_checkpoint, export_checkpoint, quantize
from jquant.progress import Progress
from jquant.recipe import Recipe, load_recipe, parse_recipe
from tests.checkpoints import write_checkpoint
from tests.test_demo import write_model

ROOT: Final = Path(__file__).resolve().parent.parent
RULE: Final = "passes[0].sequential.passes[0].quantize_weights.rules[0]"
RTN: Final = (f"{RULE}.quantizer.rtn.format.group_size=32",)
GPTQ: Final = (f"{RULE}.quantizer.gptq.format.group_size=32", "calibration.samples=2", "calibration.length=16")


def rtn(*changes: str) -> Recipe:
    return load_recipe("rtn-w4g64", [*RTN, *changes])


def gptq(*changes: str) -> Recipe:
    return load_recipe("gptq-w4g64", [*GPTQ, *changes])


class Stop(KeyboardInterrupt):
    """What the user presses Ctrl-C for, at a chosen block."""


def stop_after(blocks: int) -> "list[Progress]":
    """Return a callback, as a list that remembers, which interrupts the run after some blocks."""
    return _Stopper(blocks)


class _Stopper(list[Progress]):
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self, progress: Progress) -> None:
        self.append(progress)
        if progress.block is not None and progress.block.index + 1 == self.blocks:
            raise Stop


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a Hugging Face folder of a tiny model."""
    return write_checkpoint(tmp_path / "source")


def test_result_has_model_recipe_report_and_tokenizer(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = quantize(source, tmp_path / "out", gptq(), on_progress=seen.append)
    out = tmp_path / "out"
    kernel = load_model(out).layers[1].mlp.down_proj.kernel
    assert isinstance(kernel, UniformTensor)
    assert parse_recipe((out / "recipe.yaml").read_text()) == gptq()
    kept = read_report(out)
    assert [row["path"] for block in kept["blocks"] for row in block["linears"]] == [
        row.path for row in report.linears()
    ]
    assert kept["details"]["calibration text"]["source"].startswith("pydoc_data.topics")
    assert kept["details"]["bits per weight"] == pytest.approx(kernel.bits_per_weight(), rel=0.05)
    assert load_tokenizer(out).encode("ab\n") == [97, 98, 10]
    assert load_tokenizer(out).chat_template == load_tokenizer(source).chat_template
    assert not list(tmp_path.glob("*.partial"))
    assert [(one.done, one.total) for one in seen if one.block is not None] == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_stopped_run_goes_on_to_the_same_bits(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole", gptq())
    out = tmp_path / "out"
    with pytest.raises(Stop):
        quantize(source, out, gptq(), on_progress=stop_after(1))
    assert not out.exists()
    assert is_checkpoint(tmp_path / "out.partial" / "block-000")
    seen: list[Progress] = []
    quantize(source, out, gptq(), resume=True, on_progress=seen.append)
    assert "resuming: 1 of 2 blocks are finished" in [one.stage for one in seen]
    assert recorded_digest(out) == recorded_digest(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_blocks_of_another_run_are_refused_by_name_and_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", rtn(), on_progress=stop_after(1))
    with pytest.raises(CheckpointError, match=r"out\.partial holds blocks of another run: recipe differ.*Delete"):
        quantize(source, tmp_path / "out", rtn("seed=1"))
    assert is_checkpoint(tmp_path / "out.partial" / "block-000")


def test_resume_insists_on_a_run(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no .*out\.partial to resume"):
        quantize(source, tmp_path / "out", rtn(), resume=True)


def test_folder_that_is_no_store_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex; move it away"):
        quantize(source, tmp_path / "out", rtn())
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_output_that_exists_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match=r"out exists and is not empty; give another path"):
        quantize(source, tmp_path / "out", rtn())
    (tmp_path / "out" / "file").unlink()
    quantize(source, tmp_path / "out", rtn())
    assert is_checkpoint(tmp_path / "out")


def test_folder_that_cannot_be_written_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[Progress] = []
    with pytest.raises(CheckpointError, match=r"cannot write to .*file: .*Choose a folder that you may write to"):
        quantize(source, tmp_path / "file" / "out", rtn(), on_progress=seen.append)
    assert not seen


def test_disk_that_is_too_small_is_refused_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(total=2**20, used=0, free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"has 1 MiB free, 6\d MiB are needed; free space there"):
        quantize(source, tmp_path / "out", rtn())


FULL_DISK: Final = """
import resource, sys
from pathlib import Path
from jquant.errors import CheckpointError
from jquant.pipeline import quantize
from tests.test_pipeline import rtn

resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))  # no file may grow beyond it: the embedding's does
try:
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), rtn())
except CheckpointError as error:
    print(error)
"""


def test_disk_that_fills_up_while_saving_costs_no_finished_block(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", vocab_size=4096)
    command = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"cannot write {tmp_path / 'out'}" in done.stdout, done.stderr
    assert f"2 finished blocks are kept in {tmp_path / 'out.partial'}; run the same command again" in done.stdout
    assert not list(tmp_path.glob(".out*"))
    seen: list[Progress] = []
    quantize(source, tmp_path / "out", rtn(), resume=True, on_progress=seen.append)
    assert "resuming: 2 of 2 blocks are finished" in [one.stage for one in seen]


def test_killed_save_is_swept_up(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.abc_4567.partial").mkdir()
    (tmp_path / ".out.v2.abc_4567.partial").mkdir()  # of a run to out.v2, which may be saving
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", rtn(), on_progress=stop_after(1))
    assert [folder.name for folder in tmp_path.glob(".out*")] == [".out.v2.abc_4567.partial"]
    store = tmp_path / "out.partial"
    (store / ".block-001.abc_4567.partial").mkdir()

    def look(progress: Progress) -> None:
        assert not list(store.glob(".block*"))

    quantize(source, tmp_path / "out", rtn(), on_progress=lambda one: look(one) if one.block else None)


def test_what_was_measured_is_kept_when_the_first_block_fails(source: Path, tmp_path: Path) -> None:
    text = """
name: smoothed
calibration: {samples: 2, length: 8}
passes:
  - smooth: {}
  - sequential: {passes: [{quantize_weights: {rules: [{match: ".*", quantizer: {rtn: {format: {group_size: 32}}}}]}}]}
"""
    recipe = parse_recipe(text)

    def fail(progress: Progress) -> None:
        if progress.block is not None:
            shutil.rmtree(tmp_path / "out.partial" / "block-000-pass-1")
            raise CalibrationError("not finite")

    kept = r"not finite\n0 finished blocks and what was measured before are kept in .*out\.partial; run the same"
    with pytest.raises(CalibrationError, match=kept):
        quantize(source, tmp_path / "out", recipe, on_progress=fail)
    measured = tmp_path / "out.partial" / "whole-pass-0"
    file = max((one for one in measured.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"whole-pass-0 is damaged .*; delete it to compute it again"):
        quantize(source, tmp_path / "out", recipe)


def test_store_half_removed_is_no_damaged_store(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def die(folder: Path, **options: Any) -> None:
        blocks = sorted(Path(folder).glob("block-*"))
        if not blocks:
            remove(folder, **options)
            return
        (blocks[-1] / "report.json").unlink()
        raise Stop

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", die)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "out", rtn())
    expected = recorded_digest(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    quantize(source, tmp_path / "out", rtn())
    assert recorded_digest(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=rf"{shard.name} cannot be read.*truncated or damaged; download it again"):
        quantize(source, tmp_path / "out", rtn())
    assert not list(tmp_path.glob("out*"))


def test_weight_that_is_not_finite(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = np.ones((96, 64), np.float32)
    weight[3, 5] = np.nan
    source = write_checkpoint(tmp_path / "source", tensors={name: weight})
    with pytest.raises(ConversionError, match=rf"{name} is not finite at \[3, 5\]; the checkpoint is damaged"):
        quantize(source, tmp_path / "out", rtn())
    assert not list(tmp_path.glob("out*"))


def test_layer_that_is_all_zero(tmp_path: Path) -> None:
    weight = np.zeros((64, 64), np.float32)
    source = write_checkpoint(tmp_path / "source", tensors={"model.layers.0.self_attn.o_proj.weight": weight})
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.o_proj is zero everywhere\. The checkpoint is"):
        quantize(source, tmp_path / "out", rtn())
    assert not list(tmp_path.glob("out*"))


def test_text_that_is_too_short(source: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text.\nAnd its end.\n")
    recipe = gptq(f"calibration.dataset={tmp_path / 'short.txt'}")
    with pytest.raises(DataError, match=r"short.txt' \(calibration\) has 14 tokens, but 2 windows of 16 need"):
        quantize(source, tmp_path / "out", recipe)
    assert not list(tmp_path.glob("out*"))


def test_windows_longer_than_the_context(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"512 tokens are longer than the model's context of 256; --set"):
        quantize(source, tmp_path / "out", gptq("calibration.length=512"))


def test_rule_that_matches_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rule 'model\.\*' is unused: no path such as 'layers"):
        quantize(source, tmp_path / "out", rtn(f"{RULE}.match=model.*"))
    assert not list(tmp_path.glob("out*"))


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", vocab_size=64)
    with pytest.raises(DataError, match=r"gives token ids up to 12\d, the model has 64"):
        quantize(source, tmp_path / "out", gptq())


def test_converted_checkpoint_is_the_same_model(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "full")
    quantize(source, tmp_path / "direct", rtn())
    quantize(tmp_path / "full", tmp_path / "via", rtn())
    assert recorded_digest(tmp_path / "via") == recorded_digest(tmp_path / "direct")
    with pytest.raises(CheckpointError, match="keeps its dtypes"):
        quantize(tmp_path / "full", tmp_path / "other", rtn(), dtype="bfloat16")
    assert json.loads((tmp_path / "full" / "report.json").read_text())["details"]["source"] == str(source)


def test_model_for_use_is_stacked_and_gives_the_same_logits(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", rtn())
    model, stacked = load_model(tmp_path / "out"), open_for_use(tmp_path / "out")
    assert isinstance(stacked.layers, Stacked)
    tokens = jax.numpy.arange(12, dtype=jax.numpy.int32).reshape(2, 6)
    np.testing.assert_allclose(forward(stacked, tokens), forward(model, tokens), atol=1e-5)
    abstract = open_abstract(tmp_path / "out")
    assert jax.tree.structure(abstract) == jax.tree.structure(model)


def test_model_whose_layers_differ_is_used_unrolled(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", rtn(rf"{RULE}.match='layers\.0\..*'"))
    assert isinstance(open_for_use(tmp_path / "out").layers, tuple)


def test_perplexity_of_a_checkpoint(source: Path) -> None:
    measured = measure(source, "python-docs", length=32, windows=3)
    assert measured.perplexity.windows == 3
    assert 10 < measured.perplexity.value < 10_000
    assert measured.provenance["source"].startswith("pydoc_data.topics")


def test_exported_checkpoint_has_all_other_files_and_goes_on_as_a_source(source: Path, tmp_path: Path) -> None:
    (source / "preprocessor_config.json").write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    quantize(source, tmp_path / "ours", rtn())
    verified = export_checkpoint(tmp_path / "ours", tmp_path / "theirs", format="compressed-tensors")
    assert verified.packed == 14
    kept = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.json"} < set(kept)
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "theirs").chat_template == load_tokenizer(source).chat_template
    kernel = open_model(tmp_path / "theirs").layers[0].mlp.up_proj.kernel
    np.testing.assert_array_equal(kernel.codes, load_model(tmp_path / "ours").layers[0].mlp.up_proj.kernel.codes)

    export_checkpoint(source, tmp_path / "plain", format="safetensors", dtype="bfloat16")
    assert (tmp_path / "plain" / "preprocessor_config.json").exists()
    assert not (tmp_path / "plain" / ".cache").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "plain"))
    assert after == before | {"dtype": "bfloat16", "tie_word_embeddings": False}
    converted = convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert isinstance(converted.layers[0].mlp.up_proj.kernel, UniformTensor)


def test_a_bfloat16_model_with_scales_of_its_dtype_is_exported_as_it_is(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "bfloat16", rtn("*.scale_dtype=bfloat16"), dtype="bfloat16")
    export_checkpoint(tmp_path / "bfloat16", tmp_path / "out", format="compressed-tensors")
    model = open_abstract(tmp_path / "out")
    assert {model.embed_tokens.dtype, model.layers[0].mlp.up_proj.kernel.scales.dtype} == {jnp.dtype("bfloat16")}


def test_export_of_a_gguf_file_rebuilds_its_tokenizer(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf")
    export_checkpoint(file, tmp_path / "out", format="safetensors")
    assert load_tokenizer(tmp_path / "out")("ab")["input_ids"] == load_tokenizer(file)("ab")["input_ids"]
    assert open_abstract(tmp_path / "out").config == open_abstract(file).config
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1)


def test_export_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        export_checkpoint(source, tmp_path / "out", format="safetensors")
