"""How Flax users hold a model: the nested dict, and the `nnx.Module`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from jquant.formats import UniformFormat, UniformTensor
from jquant.models import Linear, Llama, forward, map_linears, random_model, stack_layers, tiny_config
from jquant.models.views import LlamaModule, from_params_view, params_view
from jquant.quantizers import Rtn

TOKENS = jnp.arange(6)[None] * 7


@pytest.fixture(scope="module")
def model() -> Llama:
    """Return a model of one block whose MLP is packed."""
    plain = random_model(dataclasses.replace(tiny_config("qwen3"), num_hidden_layers=1), jax.random.key(0))
    rtn = jax.jit(Rtn(UniformFormat(4, 16)))

    def pack(path: str, layer: Linear) -> Linear:
        return Linear(rtn(layer.kernel, None, jax.random.key(1))[0]) if ".mlp." in path else layer

    return map_linears(plain, pack)


def assert_same(left: Llama, right: Llama) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_params_view_is_keyed_by_path(model: Llama) -> None:
    flat = traverse_util.flatten_dict(params_view(model), sep=".")
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        assert flat[f"params.{jax.tree_util.keystr(path, simple=True, separator='.')}"] is leaf
    assert flat["params.layers.0.mlp.up_proj.kernel.codes"].dtype == jnp.uint8
    assert flat["params.lm_head"] is None  # tied
    arrays = [value for value in flat.values() if isinstance(value, jax.Array)]
    assert len(arrays) == len(jax.tree.leaves(model))


@pytest.mark.parametrize("form", ["tuple", "stacked"])
def test_params_view_round_trip(model: Llama, form: str) -> None:
    model = stack_layers(model) if form == "stacked" else model
    doubled = jax.tree.map(lambda leaf: leaf + leaf, model)
    assert_same(from_params_view(model, params_view(doubled)), doubled)


def test_params_view_of_another_model_is_refused(model: Llama) -> None:
    other = random_model(tiny_config("llama2"), jax.random.key(0))
    with pytest.raises(ValueError, match=r"do not match, got 1 and 2 at path .*layers"):
        from_params_view(model, params_view(other))


def test_module_computes_the_models_logits_jitted_split_and_merged(model: Llama) -> None:
    module = LlamaModule(model)
    expected = jax.jit(forward)(model, TOKENS)
    np.testing.assert_allclose(nnx.jit(lambda one, tokens: one(tokens))(module, TOKENS), expected, rtol=0, atol=1e-5)
    graph, state = nnx.split(module)
    merged = nnx.merge(graph, state)
    assert_same(merged.model(), model)
    logits = jax.jit(lambda arrays, tokens: nnx.merge(graph, arrays)(tokens))(state, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_module_params_are_the_whole_model(model: Llama) -> None:
    module = LlamaModule(model)
    params = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert len(params) == len(jax.tree.leaves(model))
    assert isinstance(module.model().layers[0].mlp.up_proj.kernel, UniformTensor)


def test_module_can_be_updated(model: Llama) -> None:
    module = LlamaModule(model)
    nnx.update(module, jax.tree.map(jnp.zeros_like, nnx.state(module)))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(module.model()))
    assert (np.asarray(model.embed_tokens) != 0).any()  # what it was made from is as it was
