"""Edits by path: new trees, errors that name the part that is missing."""

import dataclasses
from typing import Literal

import jax
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.kv import ExactKv
from jquant.models import (
    BLOCK_LINEARS,
    Linear,
    Llama,
    blocks,
    build,
    get,
    linear_paths,
    linears,
    map_linears,
    put,
    set_kv_codec,
    stack_layers,
    tiny_config,
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return build(tiny_config(), lambda path, shape: np.full(shape, hash(path) % 97, np.float32))


def test_paths_are_those_of_hugging_face(model: Llama) -> None:
    paths = linear_paths(model)
    assert len(paths) == 2 * 7
    assert paths[:7] == tuple(f"layers.0.{name}" for name in BLOCK_LINEARS)
    assert dict(linears(model))["layers.1.mlp.down_proj"] is model.layers[1].mlp.down_proj


def test_get_follows_fields_and_indices(model: Llama) -> None:
    assert get(model, "layers.1.mlp.up_proj.kernel") is model.layers[1].mlp.up_proj.kernel
    assert get(model.layers[0], "self_attn.o_proj") is model.layers[0].self_attn.o_proj
    assert get(model, "norm") is model.norm


def test_put_changes_one_place_of_a_copy(model: Llama) -> None:
    new = np.zeros((64, 96), np.float32)
    changed = put(model, "layers.1.mlp.up_proj.kernel", new)
    assert changed.layers[1].mlp.up_proj.kernel is new
    assert get(model, "layers.1.mlp.up_proj.kernel") is not new
    for path, layer in linears(changed):
        if path != "layers.1.mlp.up_proj":
            assert layer is get(model, path)
    assert put(model, "lm_head", None).lm_head is None
    assert put(model, "layers.0", model.layers[1]).layers == (model.layers[1], model.layers[1])


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("layers.0.mlp.upp_proj", "no 'upp_proj' in path 'layers.0.mlp.upp_proj': Mlp has none"),
        ("layers.2.mlp", "no '2' in path 'layers.2.mlp': tuple has none"),
        ("layer.0", "no 'layer' in path 'layer.0': Llama has none"),
        ("layers.first", "no 'first' in path 'layers.first': tuple has none"),
        ("lm_head.0", "no '0' in path 'lm_head.0': Linear has none"),
        ("lm_head.bias.kernel", "no 'kernel' in path 'lm_head.bias.kernel': NoneType has none"),
    ],
)
def test_missing_paths_are_named(model: Llama, path: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        get(model, path)
    with pytest.raises(FormatError, match=complaint):
        put(model, path, None)


def test_map_linears_sees_each_path_once(model: Llama) -> None:
    seen = []

    def negate(path: str, layer: Linear) -> Linear:
        seen.append(path)
        return dataclasses.replace(layer, kernel=-layer.kernel)

    negated = map_linears(model, negate)
    assert tuple(seen) == linear_paths(model)
    for path, layer in linears(negated):
        np.testing.assert_array_equal(layer.kernel, -get(model, path).kernel)
    assert negated.lm_head is model.lm_head
    assert negated.embed_tokens is model.embed_tokens


def test_kv_codec_is_set_in_every_layer(model: Llama) -> None:
    prompt: Literal["stored"] = "stored"
    changed = set_kv_codec(model, ExactKv(prompt=prompt))
    assert {layer.self_attn.kv_codec for layer in changed.layers} == {ExactKv(prompt="stored")}
    assert jax.tree.leaves(changed) == jax.tree.leaves(model)


def test_stacked_layers_are_refused(model: Llama) -> None:
    stacked = stack_layers(model)
    edits = (
        blocks,
        linear_paths,
        lambda one: set_kv_codec(one, ExactKv()),
        lambda one: map_linears(one, lambda path, layer: layer),
    )
    for edit in edits:
        with pytest.raises(FormatError, match="the layers are stacked; edit the model before stack_layers"):
            edit(stacked)
