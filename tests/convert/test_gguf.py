import math
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter

from convert import abstract_model, load_model, open_gguf
from jquant.errors import ConversionError
from jquant.models import LlamaConfig, RopeConfig, tiny_hf_config
from tests.convert.folders import random_tensors, tensors_of
from tests.convert.gguf_files import gguf_tensors, metadata_of, write_gguf

KINDS = (("llama", "llama2"), ("llama", "smollm2"), ("qwen2", "qwen2"), ("qwen3", "qwen3"))


def write(
    folder: Path, architecture: str = "llama", family: Any = "llama2", **changes: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a random model of a family; `changes` to the metadata replace, and None removes."""
    config = LlamaConfig.from_hf(tiny_hf_config(family))
    tensors = random_tensors(config)
    fields = metadata_of(architecture, config)
    for name, value in changes.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        fields = {k: v for k, v in fields.items() if k != key} | ({} if value is None else {key: value})
    return write_gguf(folder / "model.gguf", architecture, fields, gguf_tensors(architecture, config, tensors)), tensors


@pytest.mark.parametrize(("architecture", "family"), KINDS)
def test_every_tensor_arrives_in_its_place(tmp_path: Path, architecture: str, family: Any) -> None:
    file, tensors = write(tmp_path, architecture, family)
    model = load_model(file)
    read = tensors_of(model)
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(read[name], expected, err_msg=name)


@pytest.mark.parametrize(("architecture", "family"), KINDS)
def test_configuration_is_the_one_written(tmp_path: Path, architecture: str, family: Any) -> None:
    file, _ = write(tmp_path, architecture, family)
    assert load_model(file).config == LlamaConfig.from_hf(tiny_hf_config(family))


def test_biases_of_architecture_llama_are_reordered_too(tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2") | {"attention_bias": True})
    tensors = random_tensors(config)
    named = gguf_tensors("llama", config, tensors)
    model = load_model(write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama", config), named))
    name = "model.layers.1.self_attn.q_proj.bias"
    assert not np.array_equal(named["blk.1.attn_q.bias"], tensors[name])
    np.testing.assert_array_equal(model.layers[1].self_attn.q_proj.bias, tensors[name])


def test_abstract_model_equals_the_loaded_one(tmp_path: Path) -> None:
    file, _ = write(tmp_path)
    loaded = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), load_model(file))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_model(file)) == loaded


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def test_blocks_are_dequantized_to_float32(tmp_path: Path, kind: str) -> None:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2"))
    tensors = gguf_tensors("llama", config, random_tensors(config))
    stored = GGMLQuantizationType[kind]
    types = {name: stored for name in tensors if "ffn" in name and "norm" not in name}
    file = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama", config), tensors, types)
    kernel = load_model(file).layers[0].mlp.up_proj.kernel
    expected = gguf.dequantize(gguf.quantize(tensors["blk.0.ffn_up.weight"], stored), stored)
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, expected.T)


def test_dtype_may_be_asked_for(tmp_path: Path) -> None:
    assert load_model(write(tmp_path)[0], dtype="bfloat16").layers[0].mlp.up_proj.kernel.dtype == jnp.bfloat16


def test_linear_rope_is_read(tmp_path: Path) -> None:
    file, _ = write(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert load_model(file).config.rope == RopeConfig(theta=10000.0, scaling="linear", factor=4.0)


def test_window_makes_it_a_mistral(tmp_path: Path) -> None:
    file, _ = write(tmp_path, attention__sliding_window=32)
    config = load_model(file).config
    assert (config.model_type, config.sliding_window) == ("mistral", 32)


def llama3_factors(theta: float, dim: int, factor: float) -> np.ndarray:
    """Compute llama.cpp's divisors of the frequencies by its own case distinction, low 1, high 4, original 8192."""
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2.0 * math.pi * theta ** (i / dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_with_factors(folder: Path, factors: np.ndarray) -> Path:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2") | {"rope_theta": 5e5})
    tensors = gguf_tensors("llama", config, random_tensors(config)) | {"rope_freqs.weight": factors}
    return write_gguf(folder / "m.gguf", "llama", metadata_of("llama", config), tensors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognized_by_its_factors(tmp_path: Path, factor: float) -> None:
    factors = llama3_factors(5e5, 16, factor)
    assert np.any((factors > 1.0) & (factors < factor))
    rope = load_model(write_with_factors(tmp_path, factors)).config.rope
    assert rope == RopeConfig(5e5, "llama3", factor, 1.0, 4.0, 8192)


@pytest.mark.parametrize("factors", [np.linspace(1.0, 8.0, 8, dtype=np.float32), np.ones(5, np.float32)])
def test_other_rope_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    with pytest.raises(ConversionError, match=r"rope_freqs\.weight is not what Llama 3's rule gives"):
        load_model(write_with_factors(tmp_path, factors))


def test_smallest_metadata_is_enough(tmp_path: Path) -> None:
    changes = {"attention__key_length": None, "rope__dimension_count": None, "rope__freq_base": None}
    assert load_model(write(tmp_path, **changes)[0]).config.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"embedding_length": None}, r"no metadata llama\.embedding_length"),
        ({"rope__dimension_count": 8}, "rotates 8 of 16 dimensions"),
        ({"expert_count": 4}, "mixture of 4 experts"),
        ({"rope__scaling__type": "yarn"}, "'yarn'"),
        ({"attention__head_count_kv": [2, 1]}, r"attention\.head_count_kv differs by layer"),
        ({"block_count": 3}, r"missing: model\.layers\.2\."),
        ({"feed_forward_length": 100}, "misshapen"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint):
        load_model(write(tmp_path, **changes)[0])


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", "gemma", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(ConversionError, match=r"architecture 'gemma'.*llama, qwen2, qwen3"):
        open_gguf(file)


def test_vocabulary_without_model_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", "llama", {"llama.block_count": 2}, {"x": np.zeros(4, np.float32)})
    with pytest.raises(ConversionError, match=r"no token_embd\.weight"):
        open_gguf(file)


def test_surplus_tensor_is_listed(tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2"))
    tensors = gguf_tensors("llama", config, random_tensors(config)) | {"blk.0.odd.weight": np.zeros(4, np.float32)}
    with pytest.raises(ConversionError, match=r"surplus: blk\.0\.odd\.weight"):
        load_model(write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama", config), tensors))


def test_integers_for_weights_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2"))
    tensors = gguf_tensors("llama", config, random_tensors(config)) | {"output_norm.weight": np.ones(64, np.int32)}
    with pytest.raises(ConversionError, match=r"model\.norm\.weight is in I32, which gguf cannot dequantize"):
        load_model(write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama", config), tensors))


def test_nan_is_named(tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(tiny_hf_config("llama2"))
    tensors = gguf_tensors("llama", config, random_tensors(config))
    tensors["blk.1.attn_norm.weight"][2] = np.nan
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.input_layernorm\.weight is not finite at \[2\]"):
        load_model(write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama", config), tensors))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_truncated_file_is_named_with_its_size(tmp_path: Path, share: float) -> None:
    file, _ = write(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=rf"{file.stat().st_size} bytes and is truncated or damaged"):
        load_model(file)


def test_other_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"PK" * 100)
    with pytest.raises(ConversionError, match=r"cannot be read as GGUF \(GGUF magic invalid\)"):
        open_gguf(file)


def test_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    fields = metadata_of("llama", LlamaConfig.from_hf(tiny_hf_config("llama2"))) | {"split.count": 3}
    file = write_gguf(tmp_path / "m.gguf", "llama", fields, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(ConversionError, match="one of 3 parts; join them"):
        open_gguf(file)


def test_other_byte_order_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="other byte order"):
        open_gguf(tmp_path / "m.gguf")
