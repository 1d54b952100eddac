"""Two hundred ways to damage a quantized folder: each is refused with its file and its tensor, none loads or hangs."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export_model, load_model
from convert.damage import describe_damage
from jquant.errors import ConversionError
from jquant.formats import UniformFormat
from tests.convert.quantized_models import quantized_model

INDEX: Final = "model.safetensors.index.json"
type Mutation = tuple[Callable[[Path], None], str, str]  # what to do to the folder; file and tensor to be named

type Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of each format that packs, one of them in shards."""
    root = tmp_path_factory.mktemp("whole")
    model = quantized_model(UniformFormat(4, 32))
    export_model(model, root / "compressed-tensors", format="compressed-tensors", limit=40_000)
    export_model(model, root / "gptq", format="gptq")
    return {folder.name: folder for folder in root.iterdir()}


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_entry(file: str, name: str, change: Change) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header, data = read_header(folder / file)
        change(header[name])
        write_header(folder / file, header, data)

    return apply


ENTRIES: Final[Mapping[str, Change]] = {
    "negative shape": lambda entry: entry.update(shape=[-size for size in entry["shape"]]),
    "huge shape": lambda entry: entry.update(shape=[2**62, 2**62]),
    "no shape": lambda entry: entry.pop("shape"),
    "unknown dtype": lambda entry: entry.update(dtype="F99"),
    "end moved": lambda entry: entry["data_offsets"].__setitem__(1, entry["data_offsets"][1] + 4),
    "turned around": lambda entry: entry["data_offsets"].reverse(),
}


def of_headers(folder: Path) -> Iterator[tuple[str, Mutation]]:
    for file in sorted(folder.glob("*.safetensors")):
        names = [name for name in read_header(file)[0] if name != "__metadata__"]
        for name in names[::3]:
            for kind, change in ENTRIES.items():
                yield f"{kind}: {name}", (change_entry(file.name, name, change), file.name, name)


def set_tensor(file: str, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def poisoned(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[-1] = np.nan
    return array


def of_tensors(folder: Path) -> Iterator[tuple[str, Mutation]]:
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(file).items():
            yield f"missing: {name}", (set_tensor(file.name, name, lambda _: None), "", name)
            yield f"longer: {name}", (set_tensor(file.name, name, lambda x: np.concatenate([x, x])), file.name, name)
            wrong = np.int16 if array.dtype.kind == "f" else np.float32
            yield f"dtype: {name}", (set_tensor(file.name, name, lambda x, to=wrong: x.astype(to)), file.name, name)
            if array.dtype.kind == "f":
                linear = name.removesuffix(".weight_scale").removesuffix(".scales")
                yield f"not finite: {name}", (set_tensor(file.name, name, poisoned), file.name, linear)


def cut(file: str, kept: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(kept * len(content))])

    return apply


def of_files(folder: Path) -> Iterator[tuple[str, Mutation]]:
    headers: dict[str, bytes] = {
        "no JSON": b"{",
        "not UTF-8": b"\xff\xfe{}",
        "a list": b"[1, 2]",
        "deep": b"[" * 200_000,
        "a number for a tensor": b'{"model.norm.weight": 3}',
    }
    for file in sorted(folder.glob("*.safetensors")):
        for kept in (0, 0.0001, 0.01, 0.3, 0.9, 0.9999):
            yield f"{kept} of {file.name}", (cut(file.name, kept), file.name, "")
        for length in (0, 2**31, 2**63, 2**64 - 1):
            yield f"header of {length} in {file.name}", (set_length(file.name, length), file.name, "")
        for kind, text in headers.items():
            apply = lambda folder, name=file.name, text=text: write_header(folder / name, text, b"")  # noqa: E731
            yield f"header: {kind} in {file.name}", (apply, file.name, "")
        yield f"gone: {file.name}", (lambda folder, name=file.name: (folder / name).unlink(), "", "")


def set_length(file: str, length: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(length.to_bytes(8, "little") + content[8:])

    return apply


def of_indexes(folder: Path) -> Iterator[tuple[str, Mutation]]:
    if not (folder / INDEX).exists():
        return
    for name in ("../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:/x", ""):
        apply = lambda folder, name=name: write_index(folder, {"model.norm.weight": name})  # noqa: E731
        yield f"index: {name}", (apply, INDEX, "")
    for content in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"x": 3}}', "[" * 200_000, "\x00"):
        apply = lambda folder, content=content: (folder / INDEX).write_text(content)  # noqa: E731
        yield f"index: {content[:20]}", (apply, INDEX, "")


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def mutations(folder: Path) -> dict[str, Mutation]:
    return dict([*of_headers(folder), *of_tensors(folder), *of_files(folder), *of_indexes(folder)])


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_every_damage_is_named(folders: dict[str, Path], tmp_path: Path, format: str) -> None:
    for index, (what, (damage, file, tensor)) in enumerate(mutations(folders[format]).items()):
        copy = tmp_path / str(index)
        shutil.copytree(folders[format], copy)
        damage(copy)
        with pytest.raises(ConversionError) as raised:
            load_model(copy)
        for part in (str(copy), file, tensor):
            assert part in str(raised.value), f"{what}: {raised.value}"
        shutil.rmtree(copy)


def test_there_are_two_hundred(folders: dict[str, Path]) -> None:
    assert sum(len(mutations(folder)) for folder in folders.values()) >= 200


def test_a_whole_file_has_no_damage(folders: dict[str, Path]) -> None:
    assert describe_damage(folders["gptq"] / "model.safetensors") == ""
