"""Input quantizers by rules: what is fitted to what, and what is refused before any work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import OutlierSplit, PerToken, StaticTensor, TensorQuantizer, TokenQuantizer
from jquant.blocks import ActivationRule, InputQuantizers
from jquant.calibration import quantize_blocks
from jquant.errors import CalibrationError, FormatError, RecipeError
from jquant.models import Llama, blocks, embed, get, prompt_block, put, random_model, tiny_config

TOKENS = jax.random.randint(jax.random.key(1), (3, 8), 0, 128)
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(), jax.random.key(0))


def rules(**chosen: object) -> InputQuantizers:
    return InputQuantizers(tuple(ActivationRule(f".*{name}", method) for name, method in chosen.items()))  # type: ignore[arg-type]


def test_dynamic_methods_read_nothing(model: Llama) -> None:
    one = rules(down_proj=None, _proj=PerToken(4))
    assert not one.needs_inputs()
    quantized, _ = quantize_blocks(model, None, (one,), key=KEY)
    layer = quantized.layers[1]
    assert layer.self_attn.o_proj.input_quantizer == TokenQuantizer(PerToken(4))
    assert layer.mlp.down_proj.input_quantizer is None
    assert layer.mlp.up_proj.kernel is model.layers[1].mlp.up_proj.kernel


def test_static_scales_are_of_the_largest_inputs(model: Llama) -> None:
    """The first block's inputs are the embedding; the second's are what the first, quantized, gives."""
    method = StaticTensor(8)
    one = rules(down_proj=method, o_proj=PerToken(8), q_proj=StaticTensor(4))
    assert one.needs_inputs()
    quantized, _ = quantize_blocks(model, TOKENS, (one,), key=KEY)
    x = embed(model, TOKENS)
    run = jax.jit(lambda layer, x: prompt_block(layer, x, jnp.full(3, 8), 8, model.config))
    for before, after in zip(blocks(model), blocks(quantized), strict=True):
        taps = run(before, x)[2]
        down = after.mlp.down_proj.input_quantizer
        assert isinstance(down, TensorQuantizer)
        np.testing.assert_allclose(down.scale, np.abs(taps.mlp_hidden).max() / 127, rtol=1e-5)
        q = after.self_attn.q_proj.input_quantizer
        np.testing.assert_allclose(q.scale, np.abs(taps.attention_input).max() / 7, rtol=1e-5)
        assert after.self_attn.k_proj.input_quantizer is None
        x = run(after, x)[0]


def test_calibration_that_overflows_is_refused(model: Llama) -> None:
    big = put(model, "layers.0.mlp.up_proj.kernel", 1e38 * get(model, "layers.0.mlp.up_proj.kernel"))
    with pytest.raises(
        CalibrationError, match=r"layers\.0\.mlp\.down_proj has NaN or infinite inputs on the calibration text"
    ):
        quantize_blocks(big, TOKENS, (rules(_proj=StaticTensor()),), key=KEY)


def test_calibration_that_is_not_a_number_is_refused(model: Llama) -> None:
    """One NaN in one token: a maximum on CPU would not show it."""
    table = model.embed_tokens.at[TOKENS[1, 2], 3].set(jnp.nan)
    spoiled = dataclasses.replace(model, embed_tokens=table)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj has NaN or infinite inputs"):
        quantize_blocks(spoiled, TOKENS, (rules(_proj=StaticTensor()),), key=KEY)


def test_rules_that_match_nothing_are_refused(model: Llama) -> None:
    with pytest.raises(RecipeError, match=r"rule '\.\*q_prj' is unused"):
        rules(q_prj=PerToken()).check(model)
    with pytest.raises(RecipeError, match="is not a regular expression"):
        ActivationRule("*", PerToken())


def test_groups_that_do_not_fit_name_the_linear(model: Llama) -> None:
    with pytest.raises(
        FormatError, match=r"layers\.0\.mlp\.down_proj, by rule '.*_proj': group_size 64 does not divide"
    ):
        rules(_proj=PerToken(group_size=64)).check(model)


def test_an_input_is_quantized_once(model: Llama) -> None:
    quantized, _ = quantize_blocks(model, None, (rules(_proj=OutlierSplit()),), key=KEY)
    with pytest.raises(
        FormatError, match=r"input of layers\.0\.self_attn\.q_proj is already quantized by OutlierSplit"
    ):
        rules(_proj=PerToken()).check(quantized)
    bare = dataclasses.replace(quantized, layers=model.layers)
    rules(_proj=PerToken()).check(bare)
