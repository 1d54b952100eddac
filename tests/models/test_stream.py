"""The residual stream: updates added and norms begun by kernels, beside what XLA makes of the same."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import Layout, UndividedActivation, UniformFormat, UniformTensor, prepare_float, quantize_uniform
from jquant.machines import Target
from jquant.models import Linear, LlamaConfig, abstract_llama, decode, empty_cache, random_like
from jquant.models.layers import linear
from jquant.models.stream import Stream, add_linear, add_norm
from jquant.plan import outline
from jquant.recipe import load_recipe
from jquant.targets import prepare

CONFIG = LlamaConfig(256, 256, 512, 2, 8, 4, 64, max_position_embeddings=256)
RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8


def weight(inputs: int, outputs: int) -> UniformTensor:
    codes = jnp.asarray(RNG.integers(0, 16, (inputs, outputs)), jnp.uint8)
    scales = jnp.asarray(RNG.uniform(0.01, 0.02, (inputs // 64, outputs)), jnp.float32)
    return quantize_uniform(codes, scales, jnp.full_like(scales, 8), UniformFormat(4, 64, "symmetric"))


def relative(found: jax.Array, expected: jax.Array) -> float:
    expected = expected.astype(jnp.float32)
    return float(jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


def test_a_linear_adds_its_update_and_begins_the_norm() -> None:
    portable = Linear(weight(128, 192)), Linear(weight(192, 64))
    prepared = [Linear(prepare_float(one.kernel, Layout.SIMULATED)) for one in portable]
    value = jnp.asarray(RNG.standard_normal((3, 1, 192)), jnp.float32)
    x = jnp.asarray(RNG.standard_normal((3, 1, 128)), jnp.bfloat16)
    scale = jnp.asarray(RNG.uniform(0.5, 1.5, 192), jnp.bfloat16)

    stream, tap = add_linear(value, prepared[0], x, None, scale, CONFIG)
    assert stream.update is None
    assert isinstance(stream.normed, UndividedActivation)
    expected, plain_tap = add_linear(value, portable[0], x, None, scale, CONFIG)
    assert expected.normed is None
    np.testing.assert_array_equal(tap, plain_tap)
    assert relative(stream.value, expected.settled().value) < BF16_ROUNDING

    _, normed = add_norm(stream, scale, CONFIG, Layout.SIMULATED)
    assert normed is stream.normed
    wide = Stream(stream.value)
    _, truth = add_norm(wide, scale.astype(jnp.float32), CONFIG, Layout.PORTABLE)
    assert relative(normed.dequantize(), truth) < BF16_ROUNDING
    product, tap = linear(prepared[1], normed)
    assert relative(tap, truth) < 2 * BF16_ROUNDING
    assert relative(product, linear(portable[1], truth)[0]) < 2 * BF16_ROUNDING  # scales and the result are rounded
    biased, _ = linear(Linear(prepared[1].kernel, jnp.ones(64, jnp.bfloat16)), normed)
    np.testing.assert_array_equal(biased, product + 1)


@pytest.mark.parametrize("fault", ["bias", "a norm that is not known", "many tokens", "a narrow stream"])
def test_what_no_kernel_adds_is_an_update(fault: str) -> None:
    rows = 17 if fault == "many tokens" else 1
    bias = jnp.ones(192, jnp.bfloat16) if fault == "bias" else None
    layer = Linear(prepare_float(weight(128, 192), Layout.HOPPER), bias)
    dtype = jnp.bfloat16 if fault == "a narrow stream" else jnp.float32
    value, x = jax.ShapeDtypeStruct((rows, 1, 192), dtype), jax.ShapeDtypeStruct((rows, 1, 128), jnp.bfloat16)
    scale = None if fault == "a norm that is not known" else jax.ShapeDtypeStruct((192,), jnp.bfloat16)
    stream, _ = jax.eval_shape(
        lambda *given: add_linear(given[0], layer, given[1], None, given[2], CONFIG), value, x, scale
    )
    assert stream.normed is None
    assert stream.update.shape == value.shape


def test_a_step_of_a_packed_model_has_no_norms_between_its_products() -> None:
    model = jax.eval_shape(
        lambda tree: prepare(tree, Target.H100), outline(abstract_llama(CONFIG, "bfloat16"), load_recipe("rtn-w4g128"))
    )
    cache = jax.eval_shape(lambda: empty_cache(model, 2, 128))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(lambda *given: decode(*given)).trace(model, tokens, cache)
    calls = collections.Counter(
        re.findall(r"call @(\w+?)(?:_\d+)?\(", traced.lower(lowering_platforms=("cuda",)).as_text())
    )
    assert (calls["w4a16_onto"], calls["w4a16_undivided"]) == (3, 1)  # all but the last down, and the first q, k, v
    assert (calls["w4a16_gated"], calls["w4a16"]) == (2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_on_a_gpu_is_that_with_norms_of_their_own(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = outline(abstract_llama(CONFIG, "bfloat16"), load_recipe("rtn-w4g128"))
    model = prepare(random_like(tree, jax.random.key(0)), Target.H100)
    tokens = jnp.arange(rows, dtype=jnp.int32)

    def logits() -> np.ndarray:
        return np.asarray(jax.jit(lambda *given: decode(*given)[0])(model, tokens, empty_cache(model, rows, 128)))

    found = logits()
    np.testing.assert_array_equal(found, logits())
    monkeypatch.setattr("jquant.models.stream.onto_fault", lambda *_: "left out")
    expected = logits()
    assert 0 < np.linalg.norm(found - expected) < 2**-5 * np.linalg.norm(expected)
