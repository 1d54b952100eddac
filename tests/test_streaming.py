"""Models beyond memory: quantized one block at a time, in parts on disk, with the bits of the whole."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import checkpoint, exact_passes, kv_passes
from jquant.blocks import Offloaded, collect, offloaded, piece_size
from jquant.blocks.weights import collect_all
from jquant.budget import Memory, Way, activations_on_disk, available, choose, measure, predict
from jquant.calibration import BlockStore
from jquant.calibration.sequential import advance, advance_all
from jquant.checkpoint import (
    abstract_tree,
    digest,
    digest_lazily,
    load_model,
    open_lazily,
    recorded_digest,
    save_lazily,
    save_model,
)
from jquant.errors import CheckpointError, RecipeError
from jquant.exact_passes import Smooth
from jquant.folders import open_abstract, read_report
from jquant.formats import UniformFormat
from jquant.kv_passes import CalibrateFloat8Kv
from jquant.models import SHAPES, Llama, abstract_llama, in_memory, random_model, rewrite, tiny_config, top_nodes
from jquant.passes import Context, QuantizeHead, run_passes, stream_passes
from jquant.pipeline import convert_checkpoint, quantize
from jquant.plan import plan
from jquant.quantizers import HESSIAN, Rtn
from jquant.recipe import Recipe, load_recipe, parse_recipe, presets
from jquant.transforms import fold_norms, rotate, untie
from tests.checkpoints import write_checkpoint

EVERYTHING: Final = """
name: everything that streams
calibration: {samples: 4, length: 16}
passes:
  - untie: {}
  - fold_norms: {}
  - rotate: {parts: [residual, values, mlp, keys]}
  - quantize_activations: {rules: [{match: ".*", quantizer: {per_token: {}}}]}
  - sequential:
      passes:
        - quantize_weights:
            rules:
              - {match: ".*o_proj", quantizer: {gptq: {format: {group_size: 32}}}}
              - {match: ".*(up|down)_proj", quantizer: {rtn: {format: {group_size: 32}}}}
  - set_kv_codec: {codec: {per_token_kv: {bits: 4}}}
"""
DISTILLED: Final = """
name: distilled
calibration: {samples: 4, length: 16}
passes: [{sequential: {passes: [{distill: {rules: [{match: ".*", quantizer: {rtn: {format: {group_size: 32}}}}]}}]}}]
"""


MEASURED: Final = (  # 32 windows: 8 lanes, each in two pieces where activations are in a file
    "smooth: {alpha: {candidates: [0.3, 0.7]}}",
    "sequential: {passes: [{quantize_weights: {rules: [{match: '.*down.*', quantizer: {razor: {}}}]}}]}",
    "quantize_head: {quantizer: {rtn: {format: {group_size: null}}}}",
    "calibrate_razor_kv: {}",
    "calibrate_kvquant: {bits: 2, outliers: 0.1}",
)


@pytest.fixture(scope="module")
def tied() -> Llama:
    """Return a model whose head is its table."""
    return random_model(tiny_config("smollm2"), jax.random.key(0))


@pytest.mark.slow
def test_blocks_one_at_a_time_give_the_bits_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    recipe = parse_recipe(EVERYTHING)
    quantize(source, tmp_path / "whole", recipe, memory="whole")
    monkeypatch.setattr(checkpoint, "PART_NBYTES", 2**16)
    told = quantize(source, tmp_path / "blocks", recipe, memory="blocks", activations="disk")
    assert recorded_digest(tmp_path / "blocks") == recorded_digest(tmp_path / "whole")
    parts = json.loads((tmp_path / "blocks" / "structure.json").read_text())["parts"]
    assert parts == [["embed_tokens"], ["layers.0"], ["layers.1"], ["lm_head", "norm"]]
    model = load_model(tmp_path / "blocks")
    assert digest(model) == recorded_digest(tmp_path / "blocks")
    assert jax.tree.structure(abstract_tree(tmp_path / "whole")) == jax.tree.structure(model)
    lazy = open_lazily(tmp_path / "blocks").read("layers.1.mlp.up_proj.kernel.codes")
    np.testing.assert_array_equal(lazy, model.layers[1].mlp.up_proj.kernel.codes)
    memory = read_report(tmp_path / "blocks")["details"]["memory"]
    assert memory == dict(told.details)["memory"]
    assert (memory["model"], memory["activations"]) == ("blocks", "disk")
    assert memory["measured host bytes"] > 2**20 < memory["predicted host bytes"]
    assert read_report(tmp_path / "whole")["details"]["memory"]["model"] == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("tied_head", [True, False])
def test_passes_that_measure_give_the_bits_of_the_whole_on_any_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied_head: bool
) -> None:
    monkeypatch.setattr(offloaded, "PIECE_NBYTES", 2 * 8 * 64 * 4)
    source = write_checkpoint(tmp_path / "source", tie_word_embeddings=tied_head)
    passes = "".join(f"  - {one}\n" for one in (MEASURED if tied_head else MEASURED[:1] + MEASURED[-1:]))
    recipe = parse_recipe(f"name: measured\ncalibration: {{samples: 32, length: 8}}\npasses:\n{passes}")
    ways: dict[str, dict[str, Any]] = {
        "whole": {"memory": "whole"},
        "whole-2": {"memory": "whole", "devices": tuple(jax.devices()[:2])},
        "blocks": {"memory": "blocks"},
        "disk-2": {"memory": "blocks", "activations": "disk", "devices": tuple(jax.devices()[:2])},
    }
    for name, options in ways.items():
        quantize(source, tmp_path / name, recipe, **options)
    assert len({recorded_digest(tmp_path / name) for name in ways}) == 1
    told = [read_report(tmp_path / name)["details"] for name in ways]
    assert told[0].get("smoothing") == told[-1].get("smoothing")
    assert told[0].get("head") == told[-1].get("head")


def test_a_run_goes_on_behind_what_was_measured(tied: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [Smooth(), QuantizeHead(Rtn(UniformFormat(8, None))), CalibrateFloat8Kv()]
    model = dataclasses.replace(
        tied, layers=tied.layers[:1], config=dataclasses.replace(tied.config, num_hidden_layers=1)
    )
    tokens = jax.random.randint(jax.random.key(2), (2, 8), 0, 128)
    whole, said = run_passes(passes, model, Context(jax.random.key(1), tokens))
    with monkeypatch.context() as patches:
        patches.setattr(kv_passes, "calibrate_float8_kv", _stop)
        with pytest.raises(KeyboardInterrupt), _store(tmp_path) as store:
            stream_passes(passes, in_memory(model), Context(jax.random.key(1), tokens, store, activations="disk"))
    assert sorted(one.name for one in tmp_path.glob("whole-*")) == ["whole-pass-0", "whole-pass-1"]
    monkeypatch.setattr(exact_passes, "collect_absmax", _stop)
    with _store(tmp_path) as store:
        lazy, told = stream_passes(passes, in_memory(model), Context(jax.random.key(1), tokens, store))
        assert (digest_lazily(lazy), told) == (digest(whole), said)
        (tmp_path / "whole-pass-1" / "structure.json").unlink()
        with pytest.raises(CheckpointError, match="whole-pass-1 is gone; run again to compute it again"):
            lazy.read("lm_head")


def _stop(*given: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _store(folder: Path) -> Iterator[BlockStore]:
    store = BlockStore.open(folder, {})
    assert store.lock is not None
    with store.lock:
        yield store


def test_every_preset_streams_but_those_that_learn_rotations() -> None:
    for name in presets():
        whole = [type(one).__name__ for one in load_recipe(name).passes if not one.streams()]
        assert whole == (["LearnRotation"] if name.startswith("spinquant") else []), name


def test_passes_that_measure_are_planned_in_blocks() -> None:
    model = abstract_llama(SHAPES["llama-3.1-8b"], "bfloat16")
    for name in ("smoothquant-w8a8-search", "fp8-kv", "kvquant-4"):
        figures = plan(model, load_recipe(name))
        ways = Way("whole", "device"), Way("blocks", "device"), Way("blocks", "disk")
        whole, blocks, disk = (predict(figures, way, has_device=False).host for way in ways)
        assert figures.needs.movable
        assert disk <= blocks
        assert disk < 8 * 10**9 < whole
        sets = 1 + (32 if name == "kvquant-4" else 0)
        assert activations_on_disk(figures, ways[2]) == sets * figures.needs.activations


def test_a_converted_checkpoint_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source")
    abstract = convert_checkpoint(source, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "PART_NBYTES", 2**16)
    convert_checkpoint(source, tmp_path / "many")
    assert recorded_digest(tmp_path / "many") == recorded_digest(tmp_path / "one")
    versions = [json.loads((tmp_path / name / "structure.json").read_text())["jquant"] for name in ("one", "many")]
    assert versions == [1, 2]  # the first release reads what is in one part
    assert jax.tree.structure(load_model(tmp_path / "many")) == jax.tree.structure(abstract)
    files = {file: file.stat().st_size for file in (tmp_path / "many" / "arrays" / "part-002").rglob("*")}
    damaged = max((file for file in files if file.is_file()), key=lambda file: files[file])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"part-002/.* is missing or not as it was written"):
        load_model(tmp_path / "many")
    description = json.loads((tmp_path / "many" / "structure.json").read_text())
    description |= {"files": {}, "parts": description["parts"][::-1]}
    (tmp_path / "many" / "structure.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"damaged: arrays/part-000 has no lm_head\.kernel, norm"):
        load_model(tmp_path / "many")


def test_a_model_written_node_by_node_is_the_model(tied: Llama, tmp_path: Path) -> None:
    assert save_lazily(in_memory(tied), tmp_path / "lazy") == save_model(tied, tmp_path / "whole") == digest(tied)
    assert top_nodes(abstract_llama(dataclasses.replace(tied.config, num_hidden_layers=11)))[1:4] == (
        "layers.0",
        "layers.1",
        "layers.10",
    )


def test_exact_transforms_node_by_node_are_those_of_the_whole(tied: Llama) -> None:
    def transform(model: Llama) -> Llama:
        return rotate(fold_norms(model), seed=3)

    whole, lazy = transform(untie(tied)), rewrite(rewrite(in_memory(tied), untie), transform)
    assert lazy.abstract == jax.eval_shape(lambda tree: tree, whole)
    for node in top_nodes(whole):
        for left, right in zip(jax.tree.leaves(lazy.read(node)), jax.tree.leaves(_at(whole, node)), strict=True):
            np.testing.assert_array_equal(left, right)


def _at(model: Llama, node: str) -> Any:
    return in_memory(model).read(node)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_sums_and_outputs_do_not_depend_on_where_inputs_are_kept(tied: Llama, tmp_path: Path, place: Any) -> None:
    inputs = jax.random.normal(jax.random.key(1), (6, 8, 64))
    kept = dataclasses.replace(Offloaded.empty((6, 8, 64), "float32", place, tmp_path), piece=2)
    for index in range(3):
        kept.put(index, inputs[2 * index : 2 * index + 2])
    block, sites = tied.layers[0], ("attention_input",)
    expected = collect(block, inputs, sites, HESSIAN, tied.config)
    found = collect_all(block, kept, sites, HESSIAN, tied.config)
    np.testing.assert_array_equal(found["attention_input"].total, expected["attention_input"].total)
    after = advance_all(block, kept, tied.config)
    np.testing.assert_array_equal(np.concatenate(list(after.pieces())), advance(block, inputs, tied.config))
    assert not list(tmp_path.iterdir())  # the file has no name: it ends with the process
    kept.file.close()


def test_pieces_divide_the_windows_and_have_two_at_least() -> None:
    assert [piece_size((count, 2048, 4096), jnp.bfloat16) for count in (1, 2, 7, 8, 128)] == [1, 2, 7, 4, 4]
    assert piece_size((6, 2, 2), jnp.float32) == 6


class _Full(io.BytesIO):
    def write(self, content: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_disk_without_room_for_activations_is_named() -> None:
    kept = dataclasses.replace(Offloaded.empty((2, 4, 8), "float32", "host"), file=_Full())
    with pytest.raises(CheckpointError, match=r"activations of 0 MiB cannot be kept on disk: .*No space left.*fewer"):
        kept.put(0, jnp.ones((2, 4, 8)))
    with pytest.raises(CheckpointError, match=r"cannot write to .*nowhere"):
        Offloaded.empty((2, 4, 8), "float32", "disk", Path("/nowhere"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("spinquant-w4a4", {"memory": "blocks"}, "LearnRotation needs the whole model in memory: it cannot run one"),
        ("rtn-w8", {"activations": "host"}, "the device is the CPU, whose memory is the host's"),
        ("rtn-w8", {"activations": "disk"}, "are to be kept on disk, but this recipe has none, or needs them"),
        (DISTILLED, {"activations": "disk"}, "are to be kept on disk, but this recipe has none, or needs them"),
    ],
)
def test_what_cannot_be_bounded_is_refused_before_any_work(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    recipe = parse_recipe(name) if "\n" in name else load_recipe(name, _short(name))
    with pytest.raises(RecipeError, match=message):
        quantize(source, tmp_path / "out", recipe, **options)
    assert not list(tmp_path.glob("out*"))


def _short(name: str) -> list[str]:
    return [] if name.startswith("rtn") else ["calibration.samples=2", "calibration.length=16"]


def _choice(recipe: Recipe, free: Memory, **asked: Any) -> Way:
    figures = plan(abstract_llama(tiny_config()), recipe)
    return choose(figures, recipe, asked.get("memory", "auto"), asked.get("activations", "auto"), free)


def test_the_first_way_that_fits_is_taken() -> None:
    recipe = load_recipe("gptq-w4g64", ["calibration.samples=4096", "calibration.length=256", "*.group_size=32"])
    figures = plan(abstract_llama(tiny_config()), recipe)
    ways = [Way("whole", "device"), Way("blocks", "device"), Way("blocks", "disk")]
    needs = [predict(figures, way, has_device=False).host for way in ways]
    assert needs == sorted(needs, reverse=True)
    for way, need in zip(ways, needs, strict=True):
        assert _choice(recipe, Memory(int(need / 0.8) + 2, 0)) == way
    assert _choice(recipe, Memory(0, 0)) == ways[-1]
    roomy = Memory(2**40, 2**40)
    assert _choice(recipe, roomy, memory="blocks", activations="host") == Way("blocks", "host")
    assert _choice(recipe, roomy, activations="disk") == Way("whole", "disk")
    small = predict(figures, Way("blocks", "host"), has_device=True).device
    assert _choice(recipe, Memory(2**40, int(small / 0.8) + 2)) == Way("blocks", "host")
    learned = load_recipe("spinquant-w4a4", _short("spinquant"))
    assert _choice(learned, Memory(0, 0)) == Way("whole", "device")  # it can go no other way


def test_memory_is_told_by_the_operating_system() -> None:
    assert available().device == measure().device == 0
    assert 2**26 < measure().host < 2**40 > available().host > 2**26


@pytest.mark.slow
def test_a_source_that_was_written_in_parts_is_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(checkpoint, "PART_NBYTES", 2**16)
    convert_checkpoint(source, tmp_path / "parts")
    assert open_abstract(tmp_path / "parts").config == open_abstract(source).config
    recipe = load_recipe("rtn-w4g64", ["*.group_size=32"])
    for name, memory in (("via", "blocks"), ("direct", "whole")):
        quantize(tmp_path / "parts", tmp_path / name, recipe, memory=memory)
    assert recorded_digest(tmp_path / "via") == recorded_digest(tmp_path / "direct")
