"""Attention of whole prompts by others' kernels: the same as the model's own, and a reason where there is none."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import RecipeError
from jquant.kv import ExactKv, Kivi
from jquant.machines import Target
from jquant.models import LlamaConfig, forward, prompt_fault, random_model, tiny_config
from jquant.models.layers import attention, causal_mask
from jquant.models.prompts import attend_by_tokamax, causal_attention
from jquant.targets import prepare

BF16_ROUNDINGS = 2.0**-7  # of norms: of queries, keys and values none, of weights and sums one each


def operands(tokens: int, dim: int, dtype: Any, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries of four heads, and keys and values of two."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((2, tokens, heads, dim) for heads in (4, 2, 2))
    queries, keys, values = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes))
    return queries, keys, values


def own(queries: jax.Array, keys: jax.Array, values: jax.Array, window: int | None, start: int = 0) -> np.ndarray:
    """Return the model's own attention, in float32 on the processor."""
    mask = causal_mask(start + jnp.arange(queries.shape[1]), jnp.arange(keys.shape[1]), window)
    mask = jnp.broadcast_to(mask, (queries.shape[0], *mask.shape))
    arrays = [array.astype(jnp.float32) for array in (queries, keys, values)]
    return np.asarray(jax.jit(attention)(*jax.device_put((*arrays, mask), jax.devices("cpu")[0])))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_the_window_is_the_model_s_own(window: int | None) -> None:
    given = operands(19, 16, jnp.float32)
    found = jax.jit(lambda *arrays: causal_attention(*arrays, "xla", window))(*given)
    np.testing.assert_allclose(found, own(*given, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("start", [0, 7, 12])
def test_a_chunk_sees_what_lies_before_it(start: int, window: int | None) -> None:
    queries, keys, values = operands(19, 16, jnp.float32)
    given = queries[:, start : start + 7], keys, values
    found = jax.jit(lambda *arrays: causal_attention(*arrays[:3], "xla", window, arrays[3]))(*given, jnp.int32(start))
    np.testing.assert_allclose(found, own(*given, window, start), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("start", [None, 7])
def test_tokamax_attends_as_the_model_itself(
    window: int | None, start: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its XLA implementation, which is given what its kernel would be."""
    pytest.importorskip("tokamax")
    by_xla = functools.partial(attend_by_tokamax, kernel="xla")
    monkeypatch.setattr("jquant.models.prompts.attend_by_tokamax", by_xla)
    queries, keys, values = operands(19, 16, jnp.float32)
    given = queries if start is None else queries[:, start : start + 7], keys, values
    position = None if start is None else jnp.int32(start)
    found = jax.jit(lambda *arrays: causal_attention(*arrays, "tokamax", window, position))(*given)
    np.testing.assert_allclose(found, own(*given, window, start or 0), rtol=0, atol=1e-5)


def test_without_tokamax_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(RecipeError, match=r"attention of prompts by tokamax: .*; run pip install 'jquant\[tokamax\]'"):
        causal_attention(*operands(4, 16, jnp.bfloat16), "tokamax")


def test_what_no_kernel_takes_is_said() -> None:
    config = tiny_config()
    assert prompt_fault(ExactKv(), config, "bfloat16") is None
    assert prompt_fault(Kivi(2, 2, prompt="exact"), config, "bfloat16") is None
    assert "float16, kernels take bfloat16" in str(prompt_fault(ExactKv(), config, "float16"))
    assert "its own version" in str(prompt_fault(ExactKv(prompt="streamed"), config, "bfloat16"))
    for dim, taken in ((8, True), (20, False), (256, True), (264, False)):
        assert (prompt_fault(ExactKv(), dataclasses.replace(config, head_dim=dim), "bfloat16") is None) == taken


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cudnn", "tokamax"])
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 200, 256])
@pytest.mark.parametrize(("tokens", "window"), [(1, None), (130, None), (130, 1), (130, 40), (77, 500), (1024, 256)])
def test_kernels_attend_as_the_model_itself(tokens: int, window: int | None, dim: int, implementation: Any) -> None:
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    given = operands(tokens, dim, jnp.bfloat16)
    run = jax.jit(functools.partial(causal_attention, implementation=implementation, window=window))
    found, expected = np.asarray(run(*given), np.float32), own(*given, window)
    assert np.linalg.norm(found - expected) < BF16_ROUNDINGS * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cudnn", "tokamax"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("tokens", "start", "window"), [(512, 0, None), (512, 128, None), (500, 77, 100)])
def test_kernels_attend_for_a_chunk(tokens: int, start: int, window: int | None, dim: int, implementation: Any) -> None:
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    queries, keys, values = operands(tokens, dim, jnp.bfloat16)
    given = queries[:, start : start + 128], keys, values
    run = jax.jit(functools.partial(causal_attention, implementation=implementation, window=window))
    found, expected = np.asarray(run(*given, start=jnp.int32(start)), np.float32), own(*given, window, start)
    assert np.linalg.norm(found - expected) < BF16_ROUNDINGS * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("target", [Target.H100, Target.H100_TOKAMAX])
def test_a_prepared_model_reads_prompts_by_the_target_s_kernel(target: Target, window: int | None) -> None:
    if target is Target.H100_TOKAMAX:
        pytest.importorskip("tokamax")
    config = LlamaConfig(128, 256, 256, 2, 4, 2, 64, max_position_embeddings=256, sliding_window=window)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_model(config, jax.random.key(0)))
    ready, tokens = prepare(model, target), jnp.arange(2 * 100).reshape(2, 100) % 128
    assert ready.config.prompt_attention == target.prompts
    found, expected = (np.asarray(jax.jit(forward)(one, tokens), np.float32) for one in (ready, model))
    assert 0 < np.linalg.norm(found - expected) < 2**-5 * np.linalg.norm(expected)
