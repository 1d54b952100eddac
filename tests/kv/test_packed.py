"""Caches in the kernels' order: the same bytes mean the same; who has a kernel; a model's steps by the kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import Layout
from jquant.kv import (
    DynamicRazorKv,
    ExactKv,
    Kivi,
    KvCodec,
    PackedPerTokenKv,
    PerTokenKv,
    append_fault,
    attend_packed,
    attention_kernel,
    pack_codec,
)
from jquant.machines import Target
from jquant.models import Cache, abstract_llama, blocks, decode, put, tiny_config
from jquant.models.layers import attention
from jquant.targets import choose_attention, prepare

CONFIG = dataclasses.replace(tiny_config(), head_dim=64, num_hidden_layers=1)
# of the norm: P is rounded in the one, the decoded cache in the other, and what is gathered in both
BF16_ROUNDING = 2.0**-6


def rope(heads: jax.Array, positions: jax.Array) -> jax.Array:
    return heads + positions[:, None, None].astype(heads.dtype)


def rows(array: jax.Array) -> jax.Array:
    return array[:6]


@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_packed_codes_mean_the_same(grid: Any) -> None:
    codec = PerTokenKv(bits=4, grid=grid)
    keys, values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2, 64)), jnp.float32)

    @jax.jit
    def through(keys: jax.Array, values: jax.Array) -> list[Any]:
        found = []
        for each in (codec, PackedPerTokenKv(codec)):
            cache = each.fill(each.init(7, 2, 64, jnp.float32), keys, values, jnp.int32(5), rope)
            cache = each.push(cache, keys[0], values[1], jnp.int32(5), rope)
            found.append(jax.tree.map(rows, each.read(cache, jnp.int32(5), rope)))
        return found

    jax.tree.map(np.testing.assert_array_equal, *through(keys, values))


def unturned(heads: jax.Array, positions: jax.Array) -> jax.Array:
    del positions
    return heads


CHOICES: dict[str, tuple[KvCodec, str]] = {
    "4 bits": (PerTokenKv(bits=4), "attention over 4-bit caches"),
    "packed": (pack_codec(PerTokenKv(bits=8), Layout.HOPPER), "attention over 8-bit caches"),
    "exact": (ExactKv(), "attention over 16-bit caches"),
    "groups": (
        PerTokenKv(group_size=32),
        "XLA: caches in groups of 32, kernels take one grid for each head of a token",
    ),
    "scales": (PerTokenKv(scale_dtype="float32"), "XLA: caches' scales in float32, kernels take float16"),
    "kivi": (Kivi(key_bits=2, value_bits=2), "attention over KIVI's 2-bit caches: grids rounded to bfloat16"),
    "kivi mixed": (Kivi(key_bits=4, value_bits=2), "XLA: keys of 4 bits and values of 2, kernels take as many of both"),
    "kivi in small groups": (
        Kivi(group_size=16),
        "XLA: keys in groups of 16 tokens: kernels take 32, 64 or 128",
    ),
    "razor": (DynamicRazorKv(), "XLA: no kernel for DynamicRazorKv"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_attention_is_named_with_its_reason(name: str) -> None:
    codec, expected = CHOICES[name]
    model = abstract_llama(CONFIG, "bfloat16")
    assert choose_attention(model, codec, Target.H100).describe() == expected
    assert choose_attention(model, codec, Target.REFERENCE).describe() == "XLA"


def test_no_kernel_where_attention_is_another() -> None:
    wide = abstract_llama(CONFIG, "float32")
    assert "float32 caches" in choose_attention(wide, ExactKv(), Target.H100).describe()
    windowed = abstract_llama(dataclasses.replace(CONFIG, sliding_window=8), "bfloat16")
    assert "sliding window" in choose_attention(windowed, PerTokenKv(), Target.H100).describe()


CODECS = {
    "per token": PerTokenKv(bits=4),
    "kivi": Kivi(2, 2, group_size=32, residual_length=32),
}


@pytest.mark.parametrize("name", CODECS)
def test_the_kernel_attends_to_what_is_read(name: str) -> None:
    """Not in a jitted step: beside other work, what stands for a kernel's threads may wait for ever."""
    codec = pack_codec(CODECS[name], Layout.SIMULATED)
    packed = attention_kernel(codec)
    assert packed is not None
    numbers = np.random.default_rng(0).normal(size=(2, 71, 1, 64))
    keys, values = (jnp.asarray(each, jnp.bfloat16) for each in numbers)
    queries = jnp.asarray(numbers[1, :3, 0], jnp.bfloat16)[None]

    @jax.jit
    def prepared(keys: jax.Array, values: jax.Array) -> tuple[Any, jax.Array]:
        cache = codec.fill(codec.init(72, 1, 64, keys.dtype), keys[:70], values[:70], jnp.int32(70), unturned)
        cache = codec.push(cache, keys[70], values[70], jnp.int32(70), unturned)
        seen = [each[None].astype(jnp.bfloat16) for each in codec.read(cache, jnp.int32(70), unturned)]
        return cache, attention(queries[:, None], *seen, (jnp.arange(72) <= 70)[None, None])[:, 0]

    cache, expected = prepared(keys, values)
    found = attend_packed(packed, jax.tree.map(lambda leaf: leaf[None], cache), queries, jnp.array([70]))
    difference = jnp.linalg.norm((found - expected).astype(jnp.float32))
    assert float(difference / jnp.linalg.norm(expected.astype(jnp.float32))) < BF16_ROUNDING


def test_a_prepared_model_steps_by_the_kernels() -> None:
    """A layer of each kind, lowered for a GPU."""
    model = abstract_llama(dataclasses.replace(CONFIG, num_hidden_layers=2), "bfloat16")
    for index, codec in enumerate(CODECS.values()):
        model = put(model, f"layers.{index}.self_attn.kv_codec", codec)
    ready = prepare(model, Target.H100)
    packed = [block.self_attn.kv_codec for block in blocks(ready)]
    assert packed == [pack_codec(codec, Layout.HOPPER) for codec in CODECS.values()]
    assert ready.config.prompt_attention == "cudnn"
    vector = jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(
        lambda: tuple(jax.vmap(lambda _, one=one: one.init(128, 2, 64, jnp.bfloat16))(jnp.arange(2)) for one in packed)
    )
    text = jax.jit(decode).trace(ready, vector, Cache(cache, vector, 128)).lower(lowering_platforms=("cuda",)).as_text()
    appended = [codec for codec in packed if append_fault(codec, None, jnp.bfloat16) is None]
    assert [type(codec) for codec in appended] == [PackedPerTokenKv]
    assert text.count("mosaic_gpu_v2") == len(packed)  # attention of each layer, in one with a new token's codes
    assert prepare(ready, Target.H100) is ready
    restored = [block.self_attn.kv_codec for block in blocks(prepare(ready, Target.REFERENCE))]
    assert restored == list(CODECS.values())
