"""The forward pass of every family against a float64 oracle, and its other forms against itself."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import PermutedTensor, UniformFormat
from jquant.matmul import dense
from jquant.models import (
    Family,
    Linear,
    Llama,
    decode,
    embed,
    forward,
    get,
    head,
    hidden_states,
    map_linears,
    prefill,
    prompt_block,
    random_model,
    stack_layers,
    tiny_config,
    tiny_hf_config,
)
from jquant.quantizers import Rtn
from tests.oracles import llama as oracle

TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 128)  # longer than the tiny Mistral's window of 8
run = jax.jit(forward)


def shallow(family: Family = "qwen3", dtype: str = "float32") -> Llama:
    """A model of one block."""
    return random_model(dataclasses.replace(tiny_config(family), num_hidden_layers=1), jax.random.key(1), dtype)


def arrays_of(model: Llama) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }


@pytest.mark.parametrize("family", get_args(Family.__value__))
def test_logits_equal_the_oracles(family: Family) -> None:
    model = random_model(tiny_config(family), jax.random.key(1))
    logits = run(model, TOKENS)
    assert logits.dtype == jnp.float32
    for row, tokens in zip(logits, np.asarray(TOKENS), strict=True):
        expected = oracle.forward(tiny_hf_config(family), arrays_of(model), tokens)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)


def test_logits_of_every_bias_equal_the_oracles() -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
    hf = tiny_hf_config("llama2") | changes
    model = random_model(dataclasses.replace(tiny_config(), output_bias=True, **changes), jax.random.key(2))
    assert {"layers.0.mlp.down_proj.bias", "layers.0.self_attn.o_proj.bias"} <= set(arrays_of(model))
    expected = oracle.forward(hf, arrays_of(model), np.asarray(TOKENS[0]))
    np.testing.assert_allclose(run(model, TOKENS)[0], expected, rtol=0, atol=1e-4)


def test_stacked_layers_give_the_same() -> None:
    """Prompt, steps and whole sequences: a scan over layers is the unrolled loop."""
    model = random_model(tiny_config("mistral"), jax.random.key(1))
    stacked = stack_layers(model)
    whole = run(model, TOKENS)
    np.testing.assert_allclose(run(stacked, TOKENS), whole, rtol=0, atol=2e-5)
    lengths = jnp.asarray([9, 4])
    logits, cache = jax.jit(prefill, static_argnums=3)(stacked, TOKENS[:, :9], lengths, 12)
    assert cache.layers.keys.shape == (2, 2, 12, 2, 16)  # layers, batch, capacity, heads, dim
    step = jax.jit(decode)
    for _ in range(3):
        np.testing.assert_allclose(logits, whole[jnp.arange(2), cache.positions - 1], rtol=0, atol=2e-5)
        logits, cache = step(stacked, TOKENS[jnp.arange(2), cache.positions], cache)
    np.testing.assert_array_equal(cache.positions, [12, 7])


def test_forward_is_its_parts() -> None:
    model = shallow()
    x = jax.jit(hidden_states)(model, TOKENS)
    np.testing.assert_allclose(head(model, x), run(model, TOKENS), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(embed(model, TOKENS)[1, 3], model.embed_tokens[TOKENS[1, 3]])


def test_taps_are_what_the_kernels_multiply() -> None:
    model = shallow()
    layer, x = model.layers[0], embed(model, TOKENS)

    @jax.jit
    def taps_and_output(block: object) -> tuple[object, jax.Array]:
        y, _, taps = prompt_block(block, x, jnp.full(2, 12), 12, model.config)
        return taps, y

    taps, y = taps_and_output(layer)
    middle = x + taps.attention_output @ layer.self_attn.o_proj.kernel
    np.testing.assert_allclose(y, middle + taps.mlp_hidden @ layer.mlp.down_proj.kernel, rtol=0, atol=2e-5)
    gate, up = (taps.mlp_input @ get(layer, f"mlp.{name}_proj.kernel") for name in ("gate", "up"))
    np.testing.assert_allclose(taps.mlp_hidden, jax.nn.silu(gate) * up, rtol=0, atol=2e-5)
    scale = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + model.config.rms_norm_eps)
    expected = x / scale * layer.input_layernorm[None, None]
    np.testing.assert_allclose(taps.attention_input, expected, rtol=0, atol=1e-5)


def test_bfloat16_model_computes_near_float32_and_gives_float32_logits() -> None:
    model = shallow(dtype="bfloat16")
    logits = run(model, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))  # or the two best would often be equal
    wide = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model), TOKENS)
    assert 0 < np.abs(logits - wide).mean() / np.abs(wide).mean() < 0.02  # 8 bits of mantissa


def test_a_wide_residual_is_float32_in_every_form_and_lowers_the_error() -> None:
    """Prompts, chunks and steps of one model agree to bfloat16's rounding; the logits come nearer to float32's."""
    config = dataclasses.replace(tiny_config(), num_hidden_layers=8)
    model = stack_layers(random_model(config, jax.random.key(1), "bfloat16"))
    wide = dataclasses.replace(model, config=dataclasses.replace(config, wide_residual=True))
    exact = run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model), TOKENS)
    errors = [float(jnp.linalg.norm(run(one, TOKENS) - exact) / jnp.linalg.norm(exact)) for one in (model, wide)]
    assert 2**-10 < errors[1] < 0.8 * errors[0]
    assert embed(wide, TOKENS).dtype == hidden_states(wide, TOKENS).dtype == jnp.float32
    lengths = jnp.asarray([9, 4])
    for chunk in (None, 5):
        logits, cache = jax.jit(prefill, static_argnums=(3, 4))(wide, TOKENS[:, :9], lengths, 12, chunk)
        assert cache.layers.keys.dtype == jnp.bfloat16  # what linears give is as it was
        found, _ = jax.jit(decode)(wide, TOKENS[jnp.arange(2), lengths], cache)
        for one, at in ((logits, lengths - 1), (found, lengths)):
            np.testing.assert_allclose(one, run(wide, TOKENS)[jnp.arange(2), at], rtol=0, atol=0.05)


def test_float64_model_computes_in_float64() -> None:
    with jax.enable_x64(True):
        model = shallow("llama2", "float64")
        logits = run(model, TOKENS[:1])
        assert logits.dtype == jnp.float64
    hf = tiny_hf_config("llama2") | {"num_hidden_layers": 1}
    expected = oracle.forward(hf, arrays_of(model), np.asarray(TOKENS[0]))
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=2e-5)  # rope's frequencies are float32


def test_quantized_model_is_the_model_of_its_dequantized_weights() -> None:
    model = shallow()
    rtn = jax.jit(lambda kernel: Rtn(UniformFormat(4, 16))(kernel, None, jax.random.key(3))[0])

    def quantize(path: str, layer: Linear) -> Linear:
        if path.endswith(("k_proj", "v_proj", "down_proj")):
            return layer
        tensor = rtn(layer.kernel)
        if path.endswith("gate_proj"):
            order = jnp.arange(64, dtype=jnp.int32)[::-1, None]
            tensor = PermutedTensor(inner=rtn(layer.kernel[::-1]), order=order, shape=tensor.shape)
        return dataclasses.replace(layer, kernel=tensor)

    packed = map_linears(model, quantize)
    unpacked = map_linears(packed, lambda _, layer: dataclasses.replace(layer, kernel=dense(layer.kernel)))
    assert len(jax.tree.leaves(packed)) > len(jax.tree.leaves(unpacked))
    logits = run(packed, TOKENS)
    np.testing.assert_allclose(logits, run(unpacked, TOKENS), rtol=0, atol=2e-5)
    assert np.abs(logits - run(model, TOKENS)).max() > 0.1
    np.testing.assert_allclose(run(stack_layers(packed), TOKENS), logits, rtol=0, atol=2e-5)
