"""Files written a part at a time are what safetensors reads, aligned, and cut where they should be."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from convert.base import Header
from convert.shards import Part, write_shards

ARRAYS = {
    "a": np.arange(6, dtype=np.int8).reshape(2, 3),
    "b": np.arange(4, dtype=np.float32),
    "c": np.ones((3, 1), ml_dtypes.bfloat16),
    "d": np.array([5, 7], np.int64),
    "e": np.zeros((0, 4), np.float16),
    "f": np.arange(9, dtype=np.int32),
}
WORDS = {"int8": "I8", "int32": "I32", "int64": "I64"}


def parts(names: list[str], made: list[str]) -> list[Part]:
    def part(name: str) -> Part:
        array = ARRAYS[name]

        def make() -> dict[str, np.ndarray]:
            made.append(name)
            return {name: array}

        return Part({name: Header(array.shape, WORDS.get(str(array.dtype), str(array.dtype)))}, make)

    return [part(name) for name in names]


def test_one_file(tmp_path: Path) -> None:
    made: list[str] = []
    assert write_shards(tmp_path, parts(list(ARRAYS), made), limit=10**6) == sum(x.nbytes for x in ARRAYS.values())
    assert made == list(ARRAYS)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        for name, array in ARRAYS.items():
            read = tensors.get_tensor(name)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_every_tensor_starts_at_a_multiple_of_its_item(tmp_path: Path) -> None:
    write_shards(tmp_path, parts(list(ARRAYS), []))
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    described = json.loads(content[8 : 8 + length])
    for name, array in ARRAYS.items():
        assert described[name]["data_offsets"][0] % array.itemsize == 0


@pytest.mark.parametrize(("limit", "files"), [(40, 3), (1, 6), (70, 2)])
def test_files_are_cut_at_the_limit(tmp_path: Path, limit: int, files: int) -> None:
    write_shards(tmp_path, parts(list(ARRAYS), []), limit=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    for name, array in ARRAYS.items():
        with safe_open(tmp_path / index["weight_map"][name], framework="numpy") as tensors:
            np.testing.assert_array_equal(tensors.get_tensor(name), array)
