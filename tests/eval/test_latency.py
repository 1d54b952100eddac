"""Latency: phases that are asked for, sizes that are counted, and the same model whatever is timed."""

import functools

import jax
import jax.numpy as jnp
import pytest

from eval.latency import Workload, measure_latency
from jquant.errors import DataError
from jquant.formats import UniformTensor, tree_nbytes
from jquant.kv import PerTokenCache
from jquant.models import SHAPES, Llama, abstract_llama, empty_cache, random_like, stack_layers, tiny_config
from jquant.plan import outline
from jquant.recipe import load_recipe


@functools.cache
def quantized() -> Llama:
    """Build a model of random codes with a cache of 4 bits."""
    recipe = load_recipe("kv4")
    rounded = outline(abstract_llama(tiny_config("qwen2"), "bfloat16"), load_recipe("rtn-w4g64", ["passes[0]." + GRID]))
    return random_like(outline(rounded, recipe), jax.random.key(0))


GRID = "sequential.passes[0].quantize_weights.rules[0].quantizer.rtn.format.group_size=32"


@pytest.mark.slow
def test_random_models_are_finite_in_the_formats_of_a_recipe() -> None:
    model = quantized()
    kernel = model.layers[1].mlp.down_proj.kernel
    assert isinstance(kernel, UniformTensor)
    assert 0.03 < float(jnp.std(kernel.dequantize() * 96**0.5)) < 2.0  # no product dies out or overflows
    cache = random_like(jax.eval_shape(lambda: empty_cache(model, 2, 8)), jax.random.key(1))
    assert isinstance(cache.layers[0], PerTokenCache)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((model, cache)))


def test_what_is_left_out_is_not_timed_and_sizes_are_those_of_the_arrays() -> None:
    model = stack_layers(quantized())
    found = measure_latency(model, Workload(2, prompt=0, context=9, tokens=3, repeats=2), key=jax.random.key(0))
    assert found.prefill is None
    assert found.decode is not None
    assert (found.decode.tokens, len(found.decode.seconds)) == (6, 2)
    assert found.weights_nbytes == tree_nbytes(model)
    assert found.cache_nbytes == 2 * tree_nbytes(jax.eval_shape(lambda: empty_cache(model, 1, 128).layers))
    assert found.peak_nbytes() > found.weights_nbytes + found.cache_nbytes
    assert found.live_nbytes >= found.weights_nbytes


def test_shapes_have_the_sizes_of_the_models() -> None:
    billions = {name: tree_nbytes(abstract_llama(config, "int8")) / 1e9 for name, config in SHAPES.items()}
    assert {name: round(size, 2) for name, size in billions.items()} == {
        "smollm2-135m": 0.13,
        "llama-2-7b": 6.74,
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "llama-3.1-405b": 405.85,
        "qwen3-8b": 8.19,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "give 1 row"),
        ({"prompt": 0}, "a context of 1 token at least"),
        ({"prompt": 0, "tokens": 0}, "nothing to time"),
        ({"prompt": 8, "tokens": 60}, "need 428 positions, but the model's context is 256"),
    ],
)
def test_what_cannot_be_timed_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_latency(quantized(), Workload(**sizes), key=jax.random.key(0))
