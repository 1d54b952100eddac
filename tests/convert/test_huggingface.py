from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert.huggingface
from convert import abstract_model, load_model, open_source
from convert.huggingface import StoredDtype
from jquant.errors import ConversionError
from jquant.models import Family, LlamaConfig, tiny_hf_config
from tests.convert.folders import FAMILIES, random_tensors, tensors_of, write_folder, write_shards

CONFIG = tiny_hf_config("llama2")
TIED = tiny_hf_config("smollm2")


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return random_tensors(LlamaConfig.from_hf(config), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives_in_its_place(tmp_path: Path, family: Family) -> None:
    config = tiny_hf_config(family)
    written = tensors(config)
    model = load_model(write_folder(tmp_path, config, written))
    assert model.config == LlamaConfig.from_hf(config)
    read = tensors_of(model)
    assert read.keys() == written.keys()
    for name, expected in written.items():
        np.testing.assert_array_equal(read[name], expected)


def test_kernels_are_in_by_out(tmp_path: Path) -> None:
    written = tensors(CONFIG)
    model = load_model(write_folder(tmp_path, CONFIG, written))
    expected = written["model.layers.1.self_attn.k_proj.weight"].T
    np.testing.assert_array_equal(model.layers[1].self_attn.k_proj.kernel, expected)


def test_shards_give_the_same_model(tmp_path: Path) -> None:
    written = tensors(CONFIG)
    one = load_model(write_folder(tmp_path / "one", CONFIG, written))
    many = load_model(write_shards(tmp_path / "many", CONFIG, written, shards=4))
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtype_is_as_stored_or_as_asked(tmp_path: Path, stored: Any, dtype: StoredDtype) -> None:
    written = tensors(TIED, stored)
    model = load_model(write_folder(tmp_path, TIED, written), dtype=dtype)
    expected = jnp.dtype(stored if dtype == "auto" else dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {expected}
    np.testing.assert_array_equal(model.norm, written["model.norm.weight"].astype(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_abstract_model_equals_the_loaded_one(tmp_path: Path, family: Family, dtype: StoredDtype) -> None:
    config = tiny_hf_config(family)
    write_folder(tmp_path, config, tensors(config, ml_dtypes.bfloat16))
    loaded = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), load_model(tmp_path, dtype=dtype))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_model(tmp_path, dtype)) == loaded


def test_abstract_model_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> Any:
        opened = open_source(path)
        return type(opened)(opened.location, opened.config, opened.headers, read=refuse)

    def refuse(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    write_folder(tmp_path, CONFIG, tensors(CONFIG))
    monkeypatch.setattr(convert.huggingface, "open_source", unreadable)
    assert abstract_model(tmp_path).embed_tokens.shape == (128, 64)


def test_all_that_is_wrong_is_in_one_error(tmp_path: Path) -> None:
    written = tensors(CONFIG)
    del written["model.layers.1.mlp.up_proj.weight"], written["model.norm.weight"]
    written["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    written["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    written["lm_head.weight"] = np.zeros((100, 64), np.float32)
    written["model.layers.0.input_layernorm.weight"] = np.zeros(64, np.int8)
    with pytest.raises(ConversionError) as raised:
        load_model(write_folder(tmp_path, CONFIG, written))
    message = str(raised.value)
    assert f"{tmp_path}: 6 tensors" in message
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: model.norm.weight",
        "surplus: model.layers.7.mlp.up_proj.weight",
        "surplus: model.layers.0.self_attn.q_proj.bias",
        "misshapen: lm_head.weight is [100, 64], expected [128, 64]",
        "unreadable: model.layers.0.input_layernorm.weight is I8",
    ):
        assert part in message


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"and \d+ more"):
        load_model(write_folder(tmp_path, CONFIG | {"num_hidden_layers": 9}, tensors(CONFIG)))


def test_abstract_model_finds_the_same_problems(tmp_path: Path) -> None:
    written = tensors(CONFIG)
    del written["model.norm.weight"]
    with pytest.raises(ConversionError, match=r"missing: model\.norm\.weight"):
        abstract_model(write_folder(tmp_path, CONFIG, written))


def test_rotary_buffers_are_harmless(tmp_path: Path) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    load_model(write_folder(tmp_path, CONFIG, tensors(CONFIG) | buffers))


def test_tied_head_may_be_repeated_but_not_differ(tmp_path: Path) -> None:
    written = tensors(TIED)
    same = written | {"lm_head.weight": written["model.embed_tokens.weight"].copy()}
    assert load_model(write_folder(tmp_path / "same", TIED, same)).lm_head is None
    other = written | {"lm_head.weight": written["model.embed_tokens.weight"] + np.float32(1.0)}
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs.*set tie_word_embeddings to false"):
        load_model(write_folder(tmp_path / "other", TIED, other))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, dtype: Any) -> None:
    written = tensors(CONFIG, dtype)
    written["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is not finite at \[3, 5\]"):
        load_model(write_folder(tmp_path, CONFIG, written))


def test_weight_that_does_not_fit_the_dtype_is_named(tmp_path: Path) -> None:
    written = tensors(CONFIG)
    written["model.norm.weight"][7] = 1e6
    write_folder(tmp_path, CONFIG, written)
    assert load_model(tmp_path, dtype="bfloat16").norm.dtype == jnp.bfloat16
    with pytest.raises(ConversionError, match=r"model\.norm\.weight does not fit in float16 \(at \[7\]\)"):
        load_model(tmp_path, dtype="float16")


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'gemma'"):
        load_model(write_folder(tmp_path, CONFIG | {"model_type": "gemma"}, tensors(CONFIG)))
