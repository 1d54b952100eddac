"""What is exported comes back as the same weights, or is refused by name; a folder that exists is whole."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import convert.export
from convert import Consumer, ExportFormat, export_model, load_model
from convert.base import Source
from convert.folder import open_folder
from convert.packed import dense_on_host, same_weight
from jquant.activations import OutlierSplit, PerToken, StaticTensor
from jquant.errors import CheckpointError, ConversionError
from jquant.formats import (
    BinaryFormat,
    CenteredTensor,
    SpqrFormat,
    UniformFormat,
    online_rotation,
    quantize_binary,
    quantize_spqr,
)
from jquant.kv import Codebook, Kivi, KvQuant
from jquant.machines import Target
from jquant.models import Llama, LlamaConfig, Stacked, get, linear_paths, put, set_kv_codec
from jquant.targets import prepare
from tests.convert.quantized_models import dense_model, quantized_model

W4: Final = UniformFormat(4, 32, "symmetric")
W8: Final = UniformFormat(8, None, "symmetric")
PATH: Final = "layers.0.mlp.up_proj"
NAME: Final = "model.layers.0.mlp.up_proj"

type Make = Callable[[], Llama]

CASES: Final[Mapping[str, tuple[ExportFormat, Make]]] = {
    "w2g32 asymmetric": ("compressed-tensors", lambda: quantized_model(UniformFormat(2, 32))),
    "w3 channel": ("compressed-tensors", lambda: quantized_model(UniformFormat(3, None, "symmetric_full"))),
    "w4a4": ("compressed-tensors", lambda: quantized_model(W4, PerToken(4, "symmetric_full"))),
    "w4a8 groups": ("compressed-tensors", lambda: quantized_model(W4, PerToken(8, "symmetric_full", group_size=32))),
    "w8a8": ("compressed-tensors", lambda: quantized_model(W8, PerToken(8, "asymmetric"))),
    "w8a8 static": ("compressed-tensors", lambda: quantized_model(W8, StaticTensor(8))),
    "w8 asymmetric, a8": (
        "compressed-tensors",
        lambda: quantized_model(UniformFormat(8, None), PerToken(8, "symmetric_full")),
    ),
    "some linears": ("compressed-tensors", lambda: quantized_model(lambda path: W4 if "mlp" in path else None)),
    "two widths": ("compressed-tensors", lambda: quantized_model(lambda path: W4 if "mlp" in path else W8)),
    "bfloat16, biases": (
        "compressed-tensors",
        lambda: quantized_model(
            UniformFormat(4, 32, "symmetric", "bfloat16"), family="qwen2", dtype=jnp.dtype("bfloat16")
        ),
    ),
    "gptq w4": ("gptq", lambda: quantized_model(W4)),
    "gptq w3 asymmetric": ("gptq", lambda: quantized_model(UniformFormat(3, None))),
    "gptq w8 in activation order": ("gptq", lambda: quantized_model(UniformFormat(8, 32), permuted=True)),
    "dense": ("safetensors", lambda: dense_model("qwen3")),
    "dequantized": ("safetensors", lambda: quantized_model(lambda path: W4 if "up" in path else None, permuted=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_export_comes_back(tmp_path: Path, name: str) -> None:
    format, make = CASES[name]
    model = make()
    verified = export_model(model, tmp_path / "out", format=format)
    read = load_model(tmp_path / "out")
    assert read.config == model.config
    assert verified.packed == (0 if format == "safetensors" else sum(is_packed(model, path) for path in PATHS))
    for path in PATHS:
        there, here = get(read, path), get(model, path)
        if not is_packed(model, path):
            np.testing.assert_array_equal(there.kernel, here.kernel)
        elif format == "safetensors":
            np.testing.assert_array_equal(there.kernel, dense_on_host(here.kernel))
        else:
            assert same_weight(there.kernel, here.kernel)
            np.testing.assert_array_equal(dense_on_host(there.kernel), dense_on_host(here.kernel))
            assert there.input_quantizer == here.input_quantizer
    np.testing.assert_array_equal(read.embed_tokens, model.embed_tokens)


PATHS: Final = linear_paths(dense_model())


def is_packed(model: Llama, path: str) -> bool:
    return not isinstance(get(model, path).kernel, jax.Array)


def section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_says_no_more_than_readers_take(tmp_path: Path) -> None:
    export_model(quantized_model(W4, PerToken(4, "symmetric_full")), tmp_path / "out", format="compressed-tensors")
    written = section(tmp_path / "out")
    (group,) = written["config_groups"].values()
    keys = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
    assert group["weights"].keys() == group["input_activations"].keys() == keys
    assert group["format"] == written["format"] == "pack-quantized"  # inferred, it would be int-quantized
    assert written["quantization_status"] == "compressed"
    assert written["ignore"] == ["lm_head"]
    assert group["targets"] == ["Linear"]


def test_two_schemes_name_their_linears(tmp_path: Path) -> None:
    model = quantized_model(lambda path: W4 if "mlp" in path else W8)
    export_model(model, tmp_path / "out", format="compressed-tensors")
    groups = section(tmp_path / "out")["config_groups"]
    assert NAME in next(group["targets"] for group in groups.values() if group["weights"]["num_bits"] == 4)


@pytest.mark.parametrize(
    ("format", "version", "word"), [(W4, "gptq", 0x77777777), (UniformFormat(4, 32), "gptq_v2", None)]
)
def test_gptq_is_version_1_where_symmetric(
    tmp_path: Path, format: UniformFormat, version: str, word: int | None
) -> None:
    export_model(quantized_model(format), tmp_path / "out", format="gptq")
    written = section(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == written
    assert written["checkpoint_format"] == version
    assert written["group_size"] == 32
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert word is None or (tensors.get_tensor(f"{NAME}.qzeros") == word).all()


def test_dtype_and_shards_and_files(tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{}", "additional_chat_templates/a.jinja": b"a"}
    config = {"model_type": "llama", "kept": 1, "torch_dtype": "float32", "quantization_config": {}}
    export_model(
        quantized_model(W4),
        tmp_path / "out",
        format="safetensors",
        dtype="bfloat16",
        files=files,
        config=CONFIG | config,
        limit=20_000,
    )
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in files} == files
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    written = json.loads((out / "config.json").read_text())
    assert written["kept"] == 1
    assert written["dtype"] == "bfloat16"
    assert not written.keys() & {"torch_dtype", "quantization_config"}
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(out))} == {jnp.dtype("bfloat16")}


CONFIG: Final = {
    **{field.name: getattr(dense_model().config, field.name) for field in dataclasses.fields(LlamaConfig)},
    "rope": None,
    "tie_word_embeddings": True,  # the model's own is written
}


def test_head_may_be_quantized(tmp_path: Path) -> None:
    model = quantized_model(UniformFormat(4, None, "symmetric"))
    head = dataclasses.replace(model.lm_head, kernel=get(model, "layers.0.mlp.up_proj").kernel)
    narrow = dataclasses.replace(model, lm_head=head, embed_tokens=model.embed_tokens[:96])
    narrow = dataclasses.replace(narrow, config=dataclasses.replace(model.config, vocab_size=96))
    export_model(narrow, tmp_path / "out", format="compressed-tensors")
    assert section(tmp_path / "out")["ignore"] == []
    assert same_weight(load_model(tmp_path / "out").lm_head.kernel, head.kernel)


def with_linear(model: Llama, **values: Any) -> Llama:
    return put(model, PATH, dataclasses.replace(get(model, PATH), **values))


def centered() -> Llama:
    model = quantized_model(W4)
    kernel = get(model, PATH).kernel
    return with_linear(
        model, kernel=CenteredTensor(codes=kernel.codes, scale=jnp.ones((1, 1)), bits=4, shape=kernel.shape)
    )


def kvquant() -> KvQuant:
    bound, book = jnp.ones((2, 16)), Codebook(jnp.linspace(-1.0, 1.0, 4), jnp.linspace(-1.0, 1.0, 4))
    return KvQuant(-bound, bound, book, book, bits=2)


def kinds_without_a_format() -> Llama:
    """Return a model with BCQ's, SpQR's and QuIP's weights in one block."""
    model, shape = quantized_model(W4), (64, 96)
    codes = jnp.zeros(shape, jnp.uint8)
    binary = quantize_binary(codes, jnp.ones((2, 1, 96)), None, BinaryFormat(2, None))
    statistics = jnp.ones((4, 96)), jnp.zeros((4, 96))
    spqr = quantize_spqr(codes, *statistics, SpqrFormat(3, 16, None, None, 1, "float32"))
    kernels = {"gate_proj": binary, "up_proj": spqr}
    for name, kernel in kernels.items():
        path = f"layers.0.mlp.{name}"
        model = put(model, path, dataclasses.replace(get(model, path), kernel=kernel))
    return model


def prepared() -> Llama:
    return prepare(quantized_model(UniformFormat(4, 32)), Target.H100)


REFUSED: Final[Mapping[str, tuple[ExportFormat, Consumer, Make, str]]] = {
    "KIVI": (
        "safetensors",
        "transformers",
        lambda: set_kv_codec(dense_model(), Kivi(2, 2, 32)),
        r"layers\.0\.self_attn: its KV cache is Kivi",
    ),
    "online rotation": (
        "compressed-tensors",
        "transformers",
        lambda: with_linear(quantized_model(W4), input_rotation=online_rotation(64)),
        rf"{PATH}: its input is rotated online \(hadamard.*parts: \[residual\]",
    ),
    "prepared": (
        "safetensors",
        "transformers",
        prepared,
        r"layers.* and 4 more: its weight lies as a GPU",
    ),
    "BCQ and SpQR": (
        "compressed-tensors",
        "vllm",
        kinds_without_a_format,
        "BinaryTensor, which compressed-tensors cannot hold; nearest: safetensors(.|\\n)*SpqrTensor",
    ),
    "KVQuant": (
        "compressed-tensors",
        "vllm",
        lambda: set_kv_codec(quantized_model(W4), kvquant()),
        r"its KV cache is KvQuant, .*nearest: calibrate_float8_kv",
    ),
    "centered": ("compressed-tensors", "vllm", centered, rf"{PATH}: .*CenteredTensor.*nearest: safetensors"),
    "outlier split": (
        "compressed-tensors",
        "transformers",
        lambda: quantized_model(W8, OutlierSplit()),
        "OutlierSplit, which no format here holds",
    ),
    "activation order": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(W4, permuted=True),
        r"layers.* and 4 more: its groups follow the activation order.*nearest: gptq",
    ),
    "token grid": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(W4, PerToken(8, "symmetric_full")),
        r"vllm measures by symmetry symmetric or asymmetric",
    ),
    "clip ratio": (
        "compressed-tensors",
        "transformers",
        lambda: quantized_model(W4, PerToken(4, "symmetric_full", clip_ratio=0.9)),
        "clip_ratio 0.9, but transformers measures",
    ),
    "activations without weights": (
        "compressed-tensors",
        "transformers",
        lambda: with_linear(dense_model(), input_quantizer=PerToken(8).fit(None)),
        rf"{PATH}: its input is quantized but its weight is not",
    ),
    "activations as gptq": (
        "gptq",
        "transformers",
        lambda: quantized_model(W4, PerToken(8, "symmetric_full")),
        "its input is quantized, which gptq cannot say; nearest: compressed-tensors",
    ),
    "5 bits as gptq": (
        "gptq",
        "gptqmodel",
        lambda: quantized_model(UniformFormat(5, 32)),
        "5 bits, gptq has 2, 3, 4, 8; nearest: compressed-tensors",
    ),
    "1 bit": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(UniformFormat(1, 32)),
        "1 bit, .*nearest: safetensors",
    ),
    "odd width as gptq": (
        "gptq",
        "gptqmodel",
        lambda: quantized_model(UniformFormat(4, None), intermediate_size=80),
        "64 x 80 is no multiple of 32",
    ),
    "dense linear as gptq": (
        "gptq",
        "gptqmodel",
        lambda: quantized_model(lambda path: W4 if "mlp" in path else None),
        "all linears of all blocks",
    ),
    "two widths as gptq": (
        "gptq",
        "gptqmodel",
        lambda: quantized_model(lambda path: W4 if "mlp" in path else W8),
        "differ in bits, groups or symmetry",
    ),
    "scales as gptq": (
        "gptq",
        "gptqmodel",
        lambda: quantized_model(UniformFormat(4, 32, "symmetric", "float32")),
        r"its scales \(float32\) are not all float16.*scale_dtype=float16', or nearest: compressed-tensors",
    ),
    "scales of gptq in bfloat16": (
        "gptq",
        "vllm",
        lambda: quantized_model(W4, dtype=jnp.dtype("bfloat16")),
        r"scales \(float16\) are not all bfloat16 numbers.*export with --dtype",
    ),
    "scales of another dtype": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(W4, dtype=jnp.dtype("bfloat16")),
        r"scales \(float16\) are not all bfloat16 numbers.*--set '\*\.scale_dtype=bfloat16', or export with --dtype",
    ),
    "nothing quantized": (
        "compressed-tensors",
        "transformers",
        dense_model,
        "nothing is quantized.*nearest: safetensors",
    ),
    "reader": ("compressed-tensors", "gptqmodel", lambda: quantized_model(W4), "gptqmodel reads gptq"),
    "asymmetric activations of packed zeros": (
        "compressed-tensors",
        "transformers",
        lambda: quantized_model(UniformFormat(4, 32), PerToken(8, "asymmetric")),
        "leaves activations exact",
    ),
    "asymmetric in two widths": (
        "compressed-tensors",
        "transformers",
        lambda: quantized_model(lambda path: UniformFormat(4, 32) if "mlp" in path else W8),
        "takes the first group of the configuration for all",
    ),
    "vLLM's fused linears": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(lambda path: W4 if "q_proj" in path else W8),
        r"layers\.0\.self_attn: vLLM fuses q_proj, k_proj, v_proj",
    ),
    "vLLM's int8": (
        "compressed-tensors",
        "vllm",
        lambda: quantized_model(UniformFormat(8, None), PerToken(8, "symmetric")),
        "int-quantized weights are symmetric",
    ),
    "vLLM's gptq": ("gptq", "vllm", lambda: quantized_model(UniformFormat(4, 32)), "4 or 8 bits, symmetric"),
    "vLLM's desc_act": ("gptq", "vllm", lambda: quantized_model(W4, permuted=True), "no desc_act"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(tmp_path: Path, name: str) -> None:
    format, consumer, make, complaint = REFUSED[name]
    with pytest.raises(ConversionError, match=complaint):
        export_model(make(), tmp_path / "out", format=format, consumer=consumer)
    assert not list(tmp_path.iterdir())


def test_stacked_layers_are_refused(tmp_path: Path) -> None:
    model = dense_model()
    stacked = dataclasses.replace(model, layers=Stacked(block=model.layers[0], depth=1))
    with pytest.raises(ValueError, match="stacked"):
        export_model(stacked, tmp_path / "out", format="safetensors")


def test_value_beyond_the_dtype_is_named(tmp_path: Path) -> None:
    model = put(dense_model(), "norm", jnp.full(64, 1e6, jnp.float32))
    with pytest.raises(ConversionError, match=r"model\.norm\.weight does not fit in float16"):
        export_model(model, tmp_path / "out", format="safetensors", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_full_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="not empty"):
        export_model(dense_model(), tmp_path / "out", format="safetensors")


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        export_model(dense_model(), tmp_path / "absent" / "out", format="safetensors")


def change_reading(source: Source) -> Source:
    return dataclasses.replace(source, read=lambda name: source.read(name) * (name != "model.norm.weight"))


@pytest.mark.parametrize("what", ["packed", "dense"])
def test_what_is_read_back_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "packed":
        monkeypatch.setattr(convert.export, "same_weight", lambda one, other: False)
    else:
        monkeypatch.setattr(convert.export, "open_folder", lambda folder: change_reading(open_folder(folder)))
    with pytest.raises(ConversionError, match="read back, it is not what was written"):
        export_model(quantized_model(W4), tmp_path / "out", format="compressed-tensors")
    assert not list(tmp_path.iterdir())
