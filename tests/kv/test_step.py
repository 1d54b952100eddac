"""A step's token by kernels: the bytes that `push` writes, the queries that RoPE turns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import Layout, OnlineRotation, online_rotation
from jquant.kv import (
    ExactKv,
    Kivi,
    KvCodec,
    PackedKv,
    PerTokenKv,
    append_fault,
    append_packed,
    attend_packed,
    attention_kernel,
    pack_codec,
    step_packed,
)
from jquant.machines import Target
from jquant.models import RopeConfig, abstract_llama, decode, empty_cache, put, tiny_config
from jquant.models.layers import apply_rope, rope_angles
from jquant.targets import prepare

ROPE = RopeConfig(theta=1e4)
CAPACITY = 130
SHARE_OF_NEIGHBOURS = 0.01  # of numbers or bytes that are not the same
# codec, numbers of a head, query heads, KV heads, rotation; the last has more heads than a warpgroup takes at once
CASES: dict[str, tuple[KvCodec, int, int, int, OnlineRotation | None]] = {
    "4 bits": (PerTokenKv(bits=4), 64, 6, 2, None),
    "QuaRot's": (PerTokenKv(bits=4, grid="asymmetric", clip=0.95), 128, 3, 1, online_rotation(128)),
    "8 bits": (PerTokenKv(bits=8), 256, 8, 1, None),
    "bfloat16": (ExactKv(), 64, 32, 4, None),
}


def packed_codec(codec: KvCodec, layout: Layout = Layout.SIMULATED) -> PackedKv:
    packed = attention_kernel(pack_codec(codec, layout))
    assert packed is not None
    return packed


@pytest.mark.parametrize(
    "name", [name if index < 2 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(CASES)]
)
def test_the_kernel_writes_what_push_writes(name: str) -> None:
    for found, pushed in written_and_pushed(name, Layout.SIMULATED):
        np.testing.assert_array_equal(found, pushed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_writes_what_push_writes_but_for_chance(name: str) -> None:
    """XLA fuses products and sums of RoPE on a GPU, so that a number may be the next one, and so may its code."""
    for found, pushed in written_and_pushed(name, Layout.HOPPER):
        assert np.mean(np.asarray(found) != np.asarray(pushed)) < SHARE_OF_NEIGHBOURS


def token_of(name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, dim, heads, kv_heads, _ = CASES[name]
    rng = np.random.default_rng(0)
    one, two, three = (
        jnp.asarray(rng.normal(size=(2, count, dim)), jnp.bfloat16) for count in (heads, kv_heads, kv_heads)
    )
    return one, two, three


def written_and_pushed(name: str, layout: Layout) -> list[tuple[Any, Any]]:
    own, dim, _, kv_heads, rotation = CASES[name]
    codec, token = packed_codec(own, layout), token_of(name)
    positions = jnp.array([CAPACITY - 1, 0])

    def rope(each: jax.Array, at: jax.Array) -> jax.Array:
        turned = apply_rope(each, at, ROPE)
        return turned if rotation is None else rotation(turned)

    @jax.jit
    def prepared() -> tuple[Any, Any, jax.Array, jax.Array]:
        empty = jax.vmap(lambda _: codec.init(CAPACITY, kv_heads, dim, jnp.bfloat16))(positions)
        pushed = jax.vmap(lambda one, key, value, at: codec.push(one, key, value, at, rope))(
            empty, *token[1:], positions
        )
        queries = jax.vmap(lambda query, at: rope(query[None], at[None])[0])(token[0], positions)
        return empty, pushed, queries, rope_angles(positions, ROPE, dim)

    empty, pushed, queries, angles = prepared()
    found, kept = append_packed(codec, empty, token, angles, positions, rotation)
    return list(zip([*jax.tree.leaves(kept), found], [*jax.tree.leaves(pushed), queries], strict=True))


def check_step(name: str, layout: Layout) -> None:
    """Three tokens, one behind another, up to a full row: what is written, and what it gathers."""
    own, dim, _, kv_heads, rotation = CASES[name]
    codec, token = packed_codec(own, layout), token_of(name)
    kept = expected = jax.jit(jax.vmap(lambda _: codec.init(CAPACITY, kv_heads, dim, jnp.bfloat16)))(jnp.arange(2))
    for start in range(3):
        at = jnp.array([CAPACITY - 2, 0]) + start
        angles = jax.jit(lambda at: rope_angles(at, ROPE, dim))(at)
        found, kept = step_packed(codec, kept, token, angles, at, rotation)
        queries, expected = append_packed(codec, expected, token, angles, at, rotation)
        np.testing.assert_array_equal(found, attend_packed(codec, expected, queries, at))
        for one, two in zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_writes_and_attends(name: str) -> None:
    check_step(name, Layout.SIMULATED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_writes_and_attends_on_a_gpu(name: str) -> None:
    check_step(name, Layout.HOPPER)


@pytest.mark.parametrize(
    ("codec", "rows", "capacity", "kernels"),
    [(PerTokenKv(bits=4), 2, 128, 1), (ExactKv(), 2, 128, 1), (PerTokenKv(bits=4), 1, 8192, 3)],
)
def test_a_step_is_one_kernel_a_layer_or_three(codec: KvCodec, rows: int, capacity: int, kernels: int) -> None:
    """One that writes, in place, and attends; where blocks share a head, one writes, one attends, one joins."""
    config = dataclasses.replace(tiny_config(), head_dim=64, num_hidden_layers=2)
    model = abstract_llama(config, "bfloat16")
    for index in range(2):
        model = put(model, f"layers.{index}.self_attn.kv_codec", codec)
    ready = prepare(model, Target.H100)
    cache = jax.eval_shape(lambda: empty_cache(ready, rows, capacity))
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
    lowered = (
        jax.jit(lambda *given: decode(*given), donate_argnums=2)
        .trace(ready, tokens, cache)
        .lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == kernels  # each written once, for both layers
    assert text.count("#stablehlo.output_operand_alias<") == (
        2 if isinstance(codec, ExactKv) else 3
    )  # keys, values, grids


def test_who_is_written_otherwise() -> None:
    hopper = attention_kernel(pack_codec(ExactKv(), Layout.HOPPER))
    assert hopper is not None
    assert append_fault(hopper, None, jnp.bfloat16) is None
    assert append_fault(packed_codec(PerTokenKv(bits=4)), online_rotation(64), jnp.bfloat16) is None
    for own, rotation, message in (
        (PerTokenKv(bits=4, grid="symmetric"), None, "symmetric grids"),
        (Kivi(2, 2), None, "PackedKivi codes tokens together"),
        (ExactKv(), online_rotation(96), "queries and keys rotated by hadamard 12 x 8"),
        (ExactKv(), OnlineRotation(size=128, order=64), "queries and keys rotated by hadamard 64, 2 blocks"),
    ):
        assert append_fault(packed_codec(own), rotation, jnp.bfloat16) == message
