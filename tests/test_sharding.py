"""Models over a mesh: the same logits and tokens as on one device, weights and caches cut by rules or whole by name."""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import sharding
from jquant.activations import OutlierSplit, PerToken
from jquant.calibration.turned import TurnedKv
from jquant.errors import DataError, FormatError, RecipeError
from jquant.formats import (
    UniformFormat,
    cut_inputs,
    cut_outputs,
    input_cut_fault,
    online_rotation,
    quantize_centered,
    rotated,
)
from jquant.kv import DynamicRazorKv, Float8Kv, Kivi, KvCodec, PerTokenKv
from jquant.models import Llama, LlamaConfig, Sharded, blocks, forward, map_linears, random_model, set_kv_codec
from jquant.quantizers import Rtn
from jquant.runtime import generate
from jquant.sharding import choose_cuts, describe_mesh, make_mesh, parse_axes, shard
from jquant.structure import encode_structure
from jquant.targets import describe_products

LIMIT: Final = 2e-5  # of logits of size 1, float32: sums over devices are taken in another order
CONFIG: Final = LlamaConfig(64, 64, 96, 2, 4, 2, 16, 128, attention_bias=True, tie_word_embeddings=True)
TOKENS: Final = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


@pytest.fixture(scope="module")
def source() -> Llama:
    return random_model(CONFIG, jax.random.key(0))


def mixed(source: Llama) -> Llama:
    """Return a model whose linears go every way that the rules have: grids, rotated inputs, QuIP, plain numbers."""
    grid = Rtn(UniformFormat(4, 16))
    codes = np.random.default_rng(1).integers(0, 16, (64, 32)).astype(np.uint8)
    quip = rotated(
        quantize_centered(jnp.asarray(codes), jnp.float32(0.02), 4), jnp.ones(64), jnp.uint32(3), "kronecker"
    )

    def change(path: str, layer: Any) -> Any:
        if path == "layers.0.self_attn.v_proj":
            return dataclasses.replace(layer, kernel=quip)
        if path == "layers.0.mlp.down_proj":
            return layer
        quantized = dataclasses.replace(layer, kernel=grid(layer.kernel, None, jax.random.key(1))[0])
        if path.endswith("down_proj"):
            return dataclasses.replace(
                quantized, input_rotation=online_rotation(96), input_quantizer=PerToken(8).fit(None)
            )
        return quantized

    return set_kv_codec(map_linears(source, change), Kivi(2, 2, 16, 16))


@pytest.mark.slow
def test_logits_and_tokens_are_those_of_one_device(source: Llama) -> None:
    model = mixed(source)
    spread = shard(model, make_mesh(1, 2))
    expected = np.asarray(jax.jit(forward)(model, TOKENS))
    np.testing.assert_allclose(np.asarray(jax.jit(forward)(spread, TOKENS)), expected, rtol=0, atol=LIMIT)
    prompts = TOKENS[:, :9].tolist()
    assert generate(spread, prompts, max_tokens=5).tokens == generate(model, prompts, max_tokens=5).tokens
    rows = np.asarray(jax.jit(forward)(shard(model, make_mesh(2, 1)), TOKENS))
    assert (rows == expected).all()  # no device has a part of a sum
    layers: Any = spread.layers
    q, o, down = (layers.layers[1].self_attn.q_proj, layers.layers[1].self_attn.o_proj, layers.layers[1].mlp.down_proj)
    assert q.kernel.codes.shape == (2, 32, 32)  # devices, bytes of 64 inputs, half the outputs
    assert (o.kernel.inputs, o.kernel.outputs) == ("gathered", "gathered")  # KIVI rounds: no sum is cut
    assert o.kernel.inner.codes.shape == (2, 32, 32)
    assert (down.kernel.inputs, down.kernel.inner.shape) == ("gathered", (96, 32))
    assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(layers)} == {"tensor"}
    assert (layers.config.num_key_value_heads, layers.notes) == (1, ())
    assert "on data 1 x tensor 2 devices" in describe_products(spread)


def narrow(model: Llama) -> Llama:
    """Return the model in bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, model)


def test_sums_are_cut_only_in_16_bits_and_where_nothing_is_rounded(source: Llama) -> None:
    def ways(model: Llama) -> set[str]:
        return {cut.describe() for path, cut in choose_cuts(model, 1, 2) if path.endswith(("o_proj", "down_proj"))}

    def first(path: str, layer: Any) -> Any:
        rounded = PerToken(8).fit(None) if path == "layers.0.mlp.up_proj" else None
        return dataclasses.replace(layer, input_quantizer=rounded)

    assert ways(source) == {"outputs, of gathered inputs"}
    source = narrow(source)
    assert ways(source) == {"inputs, products summed"}
    for codec in (Kivi(2, 2, 16, 16), PerTokenKv(4), Float8Kv(jnp.float32(1.0), jnp.float32(1.0))):
        assert ways(set_kv_codec(source, codec)) == {"outputs, of gathered inputs"}
    assert ways(map_linears(source, first)) == {"outputs, of gathered inputs"}


def test_summed_products_are_those_of_one_device_but_for_rounding(source: Llama) -> None:
    grid = Rtn(UniformFormat(4, 16))
    model = map_linears(
        source,
        lambda _, layer: dataclasses.replace(layer, kernel=grid(layer.kernel, None, jax.random.key(1))[0]),
    )
    expected = np.asarray(jax.jit(forward)(model, TOKENS))
    wide = np.asarray(jax.jit(forward)(shard(model, make_mesh(1, 2)), TOKENS))
    np.testing.assert_allclose(wide, expected, rtol=0, atol=LIMIT)  # of float32 no sum is cut
    spread = shard(narrow(model), make_mesh(1, 2))
    o = spread.layers.layers[1].self_attn.o_proj.kernel  # type: ignore[union-attr]
    assert (o.outputs, o.inner.codes.shape) == ("summed", (2, 16, 64))
    found, alone = (np.asarray(jax.jit(forward)(one, TOKENS), np.float32) for one in (spread, narrow(model)))
    apart = [np.linalg.norm(one - expected) for one in (found, alone)]
    assert apart[0] < 1.5 * apart[1]  # bfloat16 itself is as far from float32


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_products_of_integers_are_scaled_where_one_device_scales_them(symmetry: Any) -> None:
    """A gathered product is a rounded one; one device's scale and residual sum have one rounding on CPU.

    Attention and head are whole, whose products of numbers XLA may sum in another order for fewer columns.
    """
    source = random_model(dataclasses.replace(CONFIG, vocab_size=65, num_key_value_heads=1), jax.random.key(0))
    grid, rounding = Rtn(UniformFormat(4, None, symmetry)), PerToken(4, symmetry).fit(None)

    def change(_: str, layer: Any) -> Any:
        kernel = grid(layer.kernel, None, jax.random.key(1))[0]
        return dataclasses.replace(layer, kernel=kernel, input_quantizer=rounding)

    model = set_kv_codec(map_linears(source, change), PerTokenKv(4))
    expected = np.asarray(jax.jit(forward)(model, TOKENS))
    np.testing.assert_array_equal(np.asarray(jax.jit(forward)(shard(model, make_mesh(1, 2)), TOKENS)), expected)


def test_devices_that_have_whole_weights_tell_each_other_nothing(source: Llama) -> None:
    """A gathered array would be laid out anew, and summed in another order than on one device."""
    for spread in (shard(mixed(source), make_mesh(2, 1)), shard(mixed(source), make_mesh(1, 2))):
        told = "all_gather" in str(jax.make_jaxpr(forward)(spread, TOKENS))
        assert told == (spread.layers.mesh.shape["tensor"] > 1)  # type: ignore[union-attr]


def test_rows_are_spread_over_data(source: Llama) -> None:
    spread = shard(set_kv_codec(source, PerTokenKv(4)), make_mesh(2, 1))
    whole = jax.jit(forward)(set_kv_codec(source, PerTokenKv(4)), TOKENS)
    np.testing.assert_allclose(np.asarray(jax.jit(forward)(spread, TOKENS)), np.asarray(whole), rtol=0, atol=LIMIT)
    assert forward(spread, TOKENS[:1]).shape == (1, 12, 64)  # filled up, and cut
    with pytest.raises(DataError, match=r"a batch of 1 rows over data=2 devices: give a multiple of 2"):
        generate(spread, [[1, 2]], max_tokens=2)
    split = OutlierSplit().fit(None)
    across = map_linears(source, lambda path, layer: dataclasses.replace(layer, input_quantizer=split))
    with pytest.raises(FormatError, match=r"q_proj: OutlierSplit.* looks across the rows of a batch.*give data=1"):
        shard(across, make_mesh(2, 1))
    choose_cuts(across, 1, 2)


def test_what_devices_do_not_divide_is_whole_and_named(source: Llama) -> None:
    def whys(model: Llama, tensor: int) -> set[str]:
        return {cut.why for path, cut in choose_cuts(model, 1, tensor) if path.endswith(("o_proj", "gate_proj"))}

    assert whys(source, 4) == {"2 KV heads over 4 devices", ""}
    assert whys(set_kv_codec(source, DynamicRazorKv(group_size=8)), 2) == {
        "DynamicRazorKv codes all heads of a token together",
        "",
    }
    with pytest.raises(FormatError, match=r"96 features of the MLP over tensor=5 devices"):
        choose_cuts(source, 1, 5)
    odd = random_model(dataclasses.replace(CONFIG, vocab_size=65, num_key_value_heads=4), jax.random.key(1))
    spread = shard(odd, make_mesh(1, 2))
    assert isinstance(spread.layers, Sharded)
    assert spread.layers.notes == ("embedding and head: a vocabulary of 65",)
    with pytest.raises(FormatError, match=r"spread over the devices of a mesh; edit the model before `shard`"):
        blocks(spread)
    with pytest.raises(ValueError, match=r"cannot save a .*Sharded"):
        encode_structure(spread)


def test_every_codec_has_a_rule(source: Llama) -> None:
    """A new one must be put among those that are cut by heads, or those that look across them."""
    known = {*sharding._BY_HEADS, *sharding._ACROSS_HEADS}
    portable = {codec for codec in KvCodec.__subclasses__() if codec.__module__.startswith("jquant.kv.")}
    assert {codec for codec in portable if not codec.__name__.startswith("Packed")} == known
    with pytest.raises(FormatError, match="no rule spreads the caches of TurnedKv"):
        choose_cuts(set_kv_codec(source, TurnedKv(PerTokenKv(4), jnp.eye(16), "stored")), 1, 2)


def test_cut_weights_join_to_the_whole() -> None:
    weight = jax.random.normal(jax.random.key(2), (48, 8))
    tensor = Rtn(UniformFormat(3, 8))(weight, None, jax.random.key(0))[0]
    whole = np.asarray(tensor.dequantize())
    rows = [np.asarray(cut_inputs(tensor, part, 3).dequantize()) for part in range(3)]
    columns = [np.asarray(part.dequantize()) for part in cut_outputs(tensor, 4)]
    assert (np.concatenate(rows) == whole).all()
    assert (np.concatenate(columns, axis=1) == whole).all()
    assert input_cut_fault(tensor, 4) == "48 inputs over 4 devices cut groups of 8"
    with pytest.raises(FormatError, match=r"along its inputs: 48 inputs over 5 devices"):
        cut_inputs(tensor, 0, 5)
    with pytest.raises(FormatError, match=r"along its outputs: 8 outputs over 3 devices"):
        cut_outputs(tensor, 3)


@pytest.mark.parametrize("text", ["", "data", "data=2;tensor=1", "rows=2", "data=2,data=1", "tensor=0", "data=64"])
def test_meshes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"give axes and devices, such as data=2,tensor=4|needs \d+ devices, there"):
        make_mesh(*parse_axes(text))


def test_meshes_are_described() -> None:
    mesh = make_mesh(*parse_axes("tensor=2"))
    assert dict(mesh.shape) == {"data": 1, "tensor": 2}
    assert describe_mesh(mesh) == "data 1 x tensor 2: 2 x cpu"
