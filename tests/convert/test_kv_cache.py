"""Scales of float8 caches go along with packed weights, come back, and are refused where no reader has them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import Consumer, ExportFormat, abstract_model, export_model, lazy_model, load_model, verify_folder
from jquant.errors import ConversionError
from jquant.formats import UniformFormat, online_rotation
from jquant.kv import Float8Kv, KvCodec, PerTokenKv
from jquant.models import Llama, get, put, set_kv_codec
from tests.convert.quantized_models import dense_model, quantized_model

W4: Final = UniformFormat(4, 32, "symmetric")
CODEC: Final = Float8Kv(jnp.float32(0.25), jnp.float32(0.125), calibrated_for="this very model")
LAYER: Final = "layers.0.self_attn"


def cached(codec: KvCodec = CODEC) -> Llama:
    return set_kv_codec(quantized_model(W4), codec)


@pytest.mark.parametrize("consumer", ["transformers", "vllm"])
def test_scales_come_back(tmp_path: Path, consumer: Consumer) -> None:
    export_model(cached(), tmp_path / "out", format="compressed-tensors", consumer=consumer)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"model.{LAYER}.k_scale"].tolist() == [0.25]
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None}
    assert section["kv_cache_scheme"] == scheme | {"dynamic": False}
    expected = dataclasses.replace(CODEC, calibrated_for="")
    assert get(load_model(tmp_path / "out"), f"{LAYER}.kv_codec") == expected
    lazy = lazy_model(tmp_path / "out")
    assert lazy.abstract == abstract_model(tmp_path / "out")
    assert lazy.read(f"{LAYER}.kv_codec") == lazy.read(LAYER.split(".self_attn")[0]).self_attn.kv_codec == expected
    assert verify_folder(tmp_path / "out", consumer).packed == 7


def turned_keys() -> Llama:
    model = cached()
    return put(model, LAYER, dataclasses.replace(get(model, LAYER), query_key_rotation=online_rotation(16)))


REFUSED: Final[Mapping[str, tuple[ExportFormat, Callable[[], Llama], str]]] = {
    "as gptq": ("gptq", cached, f"{LAYER}: its KV cache is Float8Kv, which gptq cannot say"),
    "another cache": (
        "compressed-tensors",
        lambda: cached(PerTokenKv(4)),
        "its KV cache is PerTokenKv, .*nearest: calibrate_float8_kv",
    ),
    "exact prompts": (
        "compressed-tensors",
        lambda: cached(dataclasses.replace(CODEC, prompt="exact")),
        "for prompts too",
    ),
    "rotated keys": ("compressed-tensors", turned_keys, r"rotate without parts: \[keys\]"),
    "dense weights": ("compressed-tensors", lambda: set_kv_codec(dense_model(), CODEC), "nothing is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_has_is_refused_by_name(tmp_path: Path, name: str) -> None:
    format, make, complaint = REFUSED[name]
    with pytest.raises(ConversionError, match=complaint):
        export_model(make(), tmp_path / "out", format=format)


def test_damaged_scales_and_other_schemes_are_named(tmp_path: Path) -> None:
    export_model(cached(), tmp_path / "out", format="compressed-tensors")
    file, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    whole = load_file(file)
    for value in (0.0, -1.0, np.nan):
        save_file(whole | {f"model.{LAYER}.v_scale": np.array([value], np.float32)}, file, metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=rf"model\.safetensors: model\.{LAYER}\.v_scale is .*positive number"):
            load_model(tmp_path / "out")
    described: dict[str, Any] = json.loads(config.read_text())
    described["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    config.write_text(json.dumps(described))
    with pytest.raises(ConversionError, match=r"kv_cache_scheme .*attn_head.* is not supported; supported: float, 8"):
        load_model(tmp_path / "out")
