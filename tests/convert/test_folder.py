import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import open_folder
from convert.base import Header
from jquant.errors import ConversionError
from jquant.models import LlamaConfig, tiny_hf_config
from tests.convert.folders import random_tensors, write_folder, write_shards

CONFIG = tiny_hf_config("llama2")
TENSORS = random_tensors(LlamaConfig.from_hf(CONFIG))


def test_reads_headers_and_tensors_of_one_file(tmp_path: Path) -> None:
    source = open_folder(write_folder(tmp_path, CONFIG, TENSORS))
    assert source.config == CONFIG
    assert source.headers["model.norm.weight"] == Header((64,), "float32")
    assert source.headers.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), expected)


def test_shards_read_as_one(tmp_path: Path) -> None:
    source = open_folder(write_shards(tmp_path, CONFIG, TENSORS, shards=3))
    assert source.headers.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(source.read(name), expected)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16"), (np.int32, "I32")]
)
def test_dtypes_are_named(tmp_path: Path, dtype: type, name: str) -> None:
    source = open_folder(write_folder(tmp_path, CONFIG, {"x": np.arange(4).astype(dtype)}))
    assert source.headers["x"] == Header((4,), name)
    assert source.read("x").dtype == np.dtype(dtype)


def test_other_weight_files_beside_the_named_ones_are_ignored(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, TENSORS)
    save_file({"surplus": np.zeros(2, np.float32)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert "surplus" not in open_folder(tmp_path).headers


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[type, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConversionError, match=r"pickled files \(pytorch_model\.bin\).*safetensors version"):
        open_folder(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt"])
def test_other_pickles_are_refused_too(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model.{suffix}").write_bytes(b"")
    with pytest.raises(ConversionError, match="pickled"):
        open_folder(tmp_path)


def test_truncated_shard_is_named_with_its_size(tmp_path: Path) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    size = shard.stat().st_size
    with pytest.raises(ConversionError, match=rf"model-00002-of-00002.*{size} bytes.*truncated.*download it again"):
        open_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60])
def test_file_truncated_in_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    file = write_folder(tmp_path, CONFIG, TENSORS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConversionError, match="truncated or damaged"):
        open_folder(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"lacks model-00002-of-00003\.safetensors"):
        open_folder(tmp_path)


def test_shards_without_index_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match="add the index"):
        open_folder(tmp_path)


def test_index_without_weight_map_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="no weight_map"):
        open_folder(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=2)
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"both in model-00001-of-00002\.safetensors and in model-00002"):
        open_folder(tmp_path)


def test_missing_config_is_named(tmp_path: Path) -> None:
    (write_folder(tmp_path, CONFIG, TENSORS) / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json is missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [("{", "not valid JSON"), ("[1]", "holds a list")])
def test_broken_config_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (write_folder(tmp_path, CONFIG, TENSORS) / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=rf"config\.json.*{complaint}"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, CONFIG, TENSORS, shards=2)
    index = {"weight_map": dict.fromkeys(TENSORS, name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="no file of this folder; none is read"):
        open_folder(tmp_path)


def test_folder_of_gguf_files_says_to_give_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"give the file itself, such as .*a\.gguf"):
        open_folder(tmp_path)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is it the folder of a checkpoint"):
        open_folder(tmp_path)
