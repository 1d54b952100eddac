"""The tree: which arrays a model has, what its paths are, and when its layers can be stacked."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.formats import UniformFormat
from jquant.models import (
    Family,
    Llama,
    Stacked,
    abstract_llama,
    build,
    put,
    random_model,
    stack_layers,
    tiny_config,
)
from jquant.quantizers import Rtn


def tiny(family: Family = "qwen2") -> Llama:
    """A model whose arrays are all ones: nothing to compile."""
    return build(tiny_config(family), lambda path, shape: np.ones(shape, np.float32))


def paths_of(tree: object) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("family", get_args(Family.__value__))
def test_build_asks_for_every_array_by_its_path(family: Family) -> None:
    asked = {}
    model = build(tiny_config(family), lambda path, shape: asked.setdefault(path, np.zeros(shape)))
    assert sorted(asked) == sorted(paths_of(model))
    assert all(asked[path] is leaf for path, leaf in zip(paths_of(model), jax.tree.leaves(model), strict=True))


def test_families_differ_in_the_arrays_that_they_have() -> None:
    paths = {family: set(paths_of(tiny(family))) for family in get_args(Family.__value__)}
    plain = paths["llama2"]
    assert plain == paths["llama3.1"] == paths["mistral"]
    assert plain - paths["smollm2"] == {"lm_head.kernel"}
    assert paths["qwen2"] - plain == {f"layers.{i}.self_attn.{n}_proj.bias" for i in (0, 1) for n in "qkv"}
    assert paths["qwen3"] - plain == {f"layers.{i}.self_attn.{n}_norm" for i in (0, 1) for n in "qk"}


def test_every_bias_can_be_had() -> None:
    config = dataclasses.replace(tiny_config(), attention_bias=True, output_bias=True, mlp_bias=True)
    biases = [path for path in paths_of(abstract_llama(config)) if path.endswith("bias")]
    assert len(biases) == 2 * 7


def test_abstract_and_random_models_have_one_structure() -> None:
    config = tiny_config("qwen3")
    abstract = abstract_llama(config, jnp.bfloat16)
    assert jax.eval_shape(lambda key: random_model(config, key, jnp.bfloat16), jax.random.key(0)) == abstract


def test_random_models_are_drawn_by_key_and_path() -> None:
    config = dataclasses.replace(tiny_config(), num_hidden_layers=1)
    first, again, other = (random_model(config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, other)))
    deeper = random_model(tiny_config(), jax.random.key(0))
    np.testing.assert_array_equal(deeper.layers[0].mlp.up_proj.kernel, first.layers[0].mlp.up_proj.kernel)


def test_stack_layers_keeps_every_array() -> None:
    model = tiny()
    stacked = stack_layers(model)
    assert isinstance(stacked.layers, Stacked)
    assert stacked.layers.depth == 2
    for index, block in enumerate(model.layers):
        for one, leaf in zip(jax.tree.leaves(stacked.layers.block), jax.tree.leaves(block), strict=True):
            np.testing.assert_array_equal(one[index], leaf)
    assert stack_layers(stacked) is stacked


UP = "layers.1.mlp.up_proj.kernel"


def quantized(bits: int) -> object:
    weight = jnp.ones((64, 96))
    return Rtn(UniformFormat(bits, 32, "symmetric"))(weight, None, jax.random.key(0))[0]


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("layers.1.self_attn.q_proj.bias", None, "only one of them has self_attn.q_proj.bias"),
        (
            UP,
            np.ones((64, 96), np.float16),
            r"mlp.up_proj.kernel is float32\[64, 96\] in one, float16\[64, 96\] in the",
        ),
        (
            UP,
            np.ones((64, 80), np.float32),
            r"mlp.up_proj.kernel is float32\[64, 96\] in one, float32\[64, 80\] in the",
        ),
        (UP, quantized(4), r"only one of them has mlp.up_proj.kernel, mlp.up_proj.kernel.codes"),
    ],
    ids=["bias", "dtype", "shape", "format"],
)
def test_stack_layers_names_the_first_difference(path: str, value: object, complaint: str) -> None:
    with pytest.raises(FormatError, match=f"layers 0 and 1 cannot be stacked: {complaint}"):
        stack_layers(put(tiny(), path, value))


def test_stack_layers_names_static_differences() -> None:
    model = put(put(tiny(), "layers.0.mlp.up_proj.kernel", quantized(4)), UP, quantized(4))
    assert stack_layers(model).layers.block.mlp.up_proj.kernel.shape == (64, 96)
    odd = put(model, UP, model.layers[1].mlp.up_proj.kernel.replace(format=UniformFormat(4, 32, "symmetric_full")))
    with pytest.raises(FormatError, match=r"static settings differ: .*'symmetric'.* against .*'symmetric_full'"):
        stack_layers(odd)
