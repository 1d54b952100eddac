"""CHECKPOINT.md is true: its program reads a weight without jquant; its words and its hash are what is written."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
import pytest

from convert.packed import dense_on_host
from jquant.checkpoint import VERSION, save_model
from jquant.formats import UniformFormat
from tests.convert.quantized_models import quantized_model

PAGE: Final = (Path(__file__).resolve().parent.parent / "CHECKPOINT.md").read_text("utf-8")
PROGRAM: Final = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("symmetry", ["asymmetric", "symmetric"])
def test_program_of_the_page_reads_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetry: Any) -> None:
    model = quantized_model(UniformFormat(3, 32, symmetry))
    save_model(model, tmp_path / "checkpoint")
    assert not re.search(r"(import|from) (jquant|convert)", PROGRAM)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(PROGRAM, "CHECKPOINT.md", "exec"), names)
    np.testing.assert_array_equal(names["weight"], dense_on_host(model.layers[0].mlp.up_proj.kernel))


def test_words_and_hash_are_those_of_the_page(tmp_path: Path) -> None:
    model = quantized_model(UniformFormat(4, 32))
    save_model(model, tmp_path / "checkpoint")
    written = json.loads((tmp_path / "checkpoint" / "structure.json").read_text())
    assert f"version {VERSION}" in PAGE
    assert set(written) == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set.union(*kinds(written["tree"])) == {"node", "value", "array", "tuple", "enum"}
    leaves = jax.tree_util.tree_leaves_with_path(model)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    total = hashlib.sha256(json.dumps(written["tree"], sort_keys=True).encode())
    for path in sorted(arrays):
        total.update(path.encode() + np.asarray(arrays[path]).tobytes())
    assert total.hexdigest() == written["sha256"]


def kinds(tree: Any) -> list[set[str]]:
    """Return, for every object below a tree, the keys that say what it is."""
    if not isinstance(tree, dict):
        return []
    below = tree["fields"].values() if "fields" in tree else tree.get("tuple", [])
    return [set(tree) - {"fields", "dtype", "name"}, *(kind for item in below for kind in kinds(item))]
