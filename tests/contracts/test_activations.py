"""What every activation method promises, one row for each way to set it: alone, in a product, and in a model."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import matmul as module
from jquant.activations import (
    ActivationMethod,
    ActivationQuantizer,
    ActivationRazor,
    OutlierSplit,
    PerToken,
    StaticTensor,
)
from jquant.checkpoint import load_tree, save_tree
from jquant.formats import (
    PermutedTensor,
    PreparedIntegerTensor,
    QuantizedActivation,
    RazoredActivation,
    SplitActivation,
    UndividedActivation,
    UniformActivation,
    UniformFormat,
    UniformTensor,
)
from jquant.matmul import dense, matmul
from jquant.models import Linear, Llama, decode, forward, map_linears, prefill, random_model, stack_layers, tiny_config
from jquant.numerics import Symmetry
from jquant.quantizers import Rtn
from jquant.structure import decode_structure, encode_structure
from tests.contracts import test_formats as formats

INPUTS = 48
METHODS: dict[str, ActivationMethod] = {
    "8 bits": PerToken(8),
    "4 bits, clipped, groups": PerToken(4, clip_ratio=0.9, group_size=16),
    "8 bits, asymmetric": PerToken(8, "asymmetric"),
    "4 bits, asymmetric, groups": PerToken(4, "asymmetric", 0.95, 8),
    "zeroquant": PerToken(8, "symmetric_signed"),
    "static": StaticTensor(8),
    "outliers": OutlierSplit(2.0),
    "razor, whole tensor": ActivationRazor(bits=8),
    "razor, static": ActivationRazor(bits=4, scope="static_tensor"),
    "razor, per token": ActivationRazor(bits=4, group_size=16, scope="per_token"),
}
# What the linears of a block get, so that every product of integers is among them: activations and weights.
INTEGERS: dict[str, tuple[str, Symmetry]] = {
    "q_proj": ("8 bits", "symmetric"),
    "k_proj": ("8 bits, asymmetric", "symmetric"),
    "v_proj": ("static", "symmetric"),
    "o_proj": ("outliers", "symmetric"),
    "gate_proj": ("8 bits", "asymmetric"),
    "up_proj": ("8 bits, asymmetric", "asymmetric"),
    "down_proj": ("static", "asymmetric"),
}
# Methods whose result for a token depends on other tokens, by design.
CROSSING = ("outliers", "razor, whole tensor")
UNIFORM = ("8 bits, symmetric", "7 bits, symmetric", "8 bits, asymmetric")
OTHERS = ("razored from 16 bits", "permuted 4 bits", "array")
# Each way to hold integers on grids meets uniform weights; one of them meets others. Razored integers have one rule for
# all weights, and so have split ones; what has no rule of integers has one rule too, so few formats stand for them.
PAIRS = (
    *((x, w) for x in ("8 bits, asymmetric", "4 bits, asymmetric, groups", "static", "outliers") for w in UNIFORM),
    *(("8 bits", w) for w in OTHERS),
    *((x, w) for x in ("razor, per token", "outliers") for w in ("array", "permuted 4 bits")),
)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 5, INPUTS)) + 0.5, jnp.float32)
VALID = jnp.arange(5)[None] < jnp.array([[5], [2]])

every_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def node(name: str, features: int = INPUTS) -> ActivationQuantizer:
    return METHODS[name].fit(jnp.linspace(1.0, 3.0, features) if METHODS[name].needs_absmax() else None)


@functools.cache
def quantized() -> dict[str, QuantizedActivation]:
    """Return every method's activation, from one program."""
    return jax.jit(lambda nodes, x: {name: one(x, None) for name, one in nodes.items()})(
        {name: node(name) for name in METHODS}, X
    )


@functools.cache
def weights() -> dict[str, Any]:
    rows = {name: formats.make(name)[0] for name in (*UNIFORM, *OTHERS) if name in formats.CASES}
    codes = formats.uniform(INPUTS, UniformFormat(8, 16, scale_dtype="float32"))[0]
    return rows | {"8 bits, asymmetric": codes, "array": codes.dequantize()}


@functools.cache
def products() -> dict[tuple[str, str], jax.Array]:
    """Return activations times weights, from one program."""

    def multiply(xs: dict[str, QuantizedActivation], ws: dict[str, Any]) -> list[jax.Array]:
        return [matmul(xs[x], ws[w]) for x, w in PAIRS]

    return dict(zip(PAIRS, jax.jit(multiply)(quantized(), weights()), strict=True))


def test_every_method_and_node_has_a_row() -> None:
    """Those of jquant.activations; what training puts in their place gives no codes."""
    nodes = {one for one in ActivationQuantizer.__subclasses__() if one.__module__.startswith("jquant.activations.")}
    assert {type(method) for method in METHODS.values()} == set(ActivationMethod.__subclasses__())
    assert {type(node(name)) for name in METHODS} == nodes
    by_kernels = {UndividedActivation}  # no quantizer makes it: tests/models/test_stream.py
    assert {type(one) for one in quantized().values()} == set(QuantizedActivation.__subclasses__()) - by_kernels


def test_what_has_no_rule_of_integers_takes_the_numbers_by_the_table() -> None:
    integers = {(UniformActivation, node) for node in (UniformTensor, PermutedTensor, PreparedIntegerTensor)}
    for (x, weight, _), rule in module._RULES.items():
        if x in (UniformActivation, RazoredActivation) and (x, weight) not in integers:
            assert rule is module._dequantized
        if x is SplitActivation:
            assert rule is (module._split_kernel if weight is PreparedIntegerTensor else module._split)


def test_product_is_that_of_the_numbers() -> None:
    """Integers and scales after, or whatever the table says, against both dequantized in float64."""
    for (name, weight), y in products().items():
        x = np.asarray(quantized()[name].dequantize(), np.float64)
        expected = x @ np.asarray(dense(weights()[weight]), np.float64)
        assert (y.shape, y.dtype) == ((2, 5, formats.OUTPUTS), "float32")
        atol = 3e-6 * np.abs(expected).max()  # 48 products of float32
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol, err_msg=f"{name} by {weight}")


@pytest.mark.parametrize("name", ["8 bits", "4 bits, asymmetric, groups", "outliers"])
@pytest.mark.parametrize("weight", ["8 bits, symmetric", "7 bits, symmetric", "permuted 4 bits"])
def test_integers_multiply_as_integers(name: str, weight: str) -> None:
    program = str(jax.make_jaxpr(matmul)(quantized()[name], weights()[weight]))
    if name.endswith("groups") and weight.startswith("permuted"):
        assert "preferred_element_type=int32" not in program  # its groups part: numbers, as the table says
    else:
        assert "preferred_element_type=int32" in program
        assert "i8[" in program


@pytest.mark.parametrize("name", ["8 bits", "outliers", "razor, per token"])
def test_dtypes_of_activations_are_those_of_products(name: str) -> None:
    weight = weights()["8 bits, symmetric"]
    narrow = node(name)(X[0].astype(jnp.bfloat16), None)
    y = matmul(narrow, weight)
    assert y.dtype == jnp.bfloat16
    wide = matmul(replace(narrow, dtype="float32"), weight)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-8)  # one rounding
    with jax.enable_x64(True):
        x = node(name)(X[0].astype(jnp.float64), None)
        dense_x, dense_weight = x.dequantize("float64"), weight.dequantize("float64")
        np.testing.assert_allclose(matmul(x, weight), dense_x @ dense_weight, rtol=1e-9, atol=1e-9)


@every_method
def test_what_is_not_valid_changes_nothing(name: str) -> None:
    junk = jnp.where(VALID[..., None], X, 1e3 * X)
    masked = jax.jit(lambda one, x: one(x, VALID).dequantize())
    np.testing.assert_array_equal(masked(node(name), X)[VALID], masked(node(name), junk)[VALID])
    if name not in CROSSING:
        np.testing.assert_array_equal(quantized()[name].dequantize()[VALID], masked(node(name), junk)[VALID])


def test_nodes_go_through_json_and_checkpoints(tmp_path: Path) -> None:
    nodes = tuple(node(name) for name in METHODS)
    assert decode_structure(json.loads(json.dumps(encode_structure(nodes)))) == jax.eval_shape(lambda one: one, nodes)
    save_tree(nodes, tmp_path / "nodes")
    back = load_tree(tmp_path / "nodes")
    assert jax.tree.structure(back) == jax.tree.structure(nodes)
    jax.tree.map(np.testing.assert_array_equal, back, nodes)


# ---- in a model ----

TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 128)
LENGTHS = jnp.array([9, 4])
STEP = 0.02  # of the largest logit: what one code more or less can do
run = jax.jit(prefill, static_argnums=3)


@functools.cache
def shallow() -> Llama:
    config = replace(tiny_config("qwen2"), num_hidden_layers=1)
    return random_model(config, jax.random.key(1))


@functools.cache
def model(name: str) -> Llama:
    return map_linears(
        shallow(),
        lambda _, layer: replace(layer, input_quantizer=node(name, layer.kernel.shape[0])),
    )


@pytest.mark.parametrize("name", ["4 bits, asymmetric, groups", "outliers", "razor, whole tensor"])
def test_padding_changes_no_logit(name: str) -> None:
    expected, _ = run(model(name), TOKENS, LENGTHS, 12)
    padded = TOKENS.at[1, 4:].set(jnp.array([3, 99, 0, 64, 127]))
    logits, _ = run(model(name), padded, LENGTHS, 12)
    np.testing.assert_array_equal(logits, expected)


def test_llm_int8_depends_on_the_batch() -> None:
    """The method's own, and shown: the other prompt's tokens decide which of this prompt's features are numbers."""
    changes = {}
    for name in ("outliers", "4 bits, asymmetric, groups"):
        beside, _ = run(model(name), TOKENS, LENGTHS, 12)
        other, _ = run(model(name), TOKENS.at[0].set(5), LENGTHS, 12)
        changes[name] = np.abs(beside[1] - other[1]).max()
    assert changes["outliers"] > 1e-4
    assert changes["4 bits, asymmetric, groups"] == 0


def test_a_prompt_read_at_once_is_the_prompt_read_in_steps() -> None:
    """Where tokens stand alone; up to codes that a rounding in the last bit moves by a step."""
    name = "4 bits, asymmetric, groups"
    whole, _ = run(model(name), TOKENS, LENGTHS, 12)
    alone, _ = run(model(name), TOKENS[1:, :4], LENGTHS[1:], 12)
    np.testing.assert_allclose(alone[0], whole[1], rtol=0, atol=STEP * np.abs(whole).max())
    logits, cache = run(model(name), TOKENS[:1, :4], LENGTHS[1:], 12)
    step = jax.jit(decode)
    for position in range(4, 9):
        logits, cache = step(model(name), TOKENS[:1, position], cache)
    np.testing.assert_allclose(logits[0], whole[0], rtol=0, atol=STEP * np.abs(whole).max())


def test_stacked_layers_give_the_same() -> None:
    """A calibrated scale becomes one leaf for all layers."""
    quantized_model = model("static")
    stacked = stack_layers(quantized_model)
    assert stacked.layers.block.mlp.up_proj.input_quantizer.scale.shape == (1,)
    go = jax.jit(forward)
    expected = go(quantized_model, TOKENS)
    np.testing.assert_allclose(go(stacked, TOKENS), expected, rtol=0, atol=STEP * np.abs(expected).max())
    assert np.abs(expected - go(shallow(), TOKENS)).max() > 1e-3


def test_integers_give_the_logits_of_the_numbers() -> None:
    """A model with every product of integers, against its kernels as arrays, which meet what the codes stand for."""
    quantizers = {name: Rtn(UniformFormat(8, None, name)) for name in get_args(Symmetry.__value__)}

    def quantized(path: str, layer: Linear) -> Linear:
        method, symmetry = INTEGERS[path.rsplit(".", 1)[1]]
        kernel, _ = quantizers[symmetry](layer.kernel, None, jax.random.key(0))
        return replace(layer, kernel=kernel, input_quantizer=node(method, layer.kernel.shape[0]))

    packed = jax.jit(lambda model: map_linears(model, quantized))(shallow())
    go = jax.jit(forward)
    expected = go(map_linears(packed, lambda _, layer: replace(layer, kernel=dense(layer.kernel))), TOKENS)
    np.testing.assert_allclose(go(packed, TOKENS), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert str(jax.make_jaxpr(forward)(packed, TOKENS)).count("preferred_element_type=int32") == len(INTEGERS)
