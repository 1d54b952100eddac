"""Rows rounded in turn by one kernel, simulated on the CPU with detection of races, against the definition."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FeedbackConfig, compat, reference, round_on_grids, round_to_steps, round_with_outliers

ROUNDINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "GPTQ": (round_on_grids, reference.round_on_grids, {"bits": 4}),
    "SpQR": (round_with_outliers, reference.round_with_outliers, {"bits": 3, "dtype": jnp.float16}),
    "LDLQ": (round_to_steps, reference.round_to_steps, {}),
    "stochastic": (round_to_steps, reference.round_to_steps, {}),
}
SLOW = ("SpQR", "stochastic")


def problem(kind: str, rows: int, outputs: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    values, last = (jnp.asarray(rng.standard_normal((rows, outputs)), jnp.float32) for _ in range(2))
    factor = np.triu(0.3 * rng.standard_normal((rows, rows)), 1) + np.diag(rng.uniform(0.5, 1.5, rows))
    factor = jnp.asarray(factor, jnp.float32)
    scales = jnp.asarray(rng.uniform(0.1, 0.4, (3, outputs)), jnp.float32)
    zeros = jnp.asarray(rng.integers(0, 16, (3, outputs)), jnp.float32)
    if kind == "GPTQ":
        return values, factor, jnp.asarray(rng.integers(0, 3, rows), jnp.int32), scales, zeros
    if kind == "SpQR":
        return values, factor, 1 / jnp.diagonal(factor), jnp.float32(0.02), scales[0].at[1].set(0), zeros[0] / 3
    noise = jnp.abs(last) % 1 if kind == "stochastic" else None
    return 2 * values, factor, jnp.array([-1.0, 2.0]), jnp.round(last), noise


@pytest.mark.parametrize("kind", ["GPTQ", "LDLQ", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_simulated_kernel_rounds_as_the_definition(kind: str) -> None:
    kernel, meaning, settings = ROUNDINGS[kind]
    given = problem(kind, 6, 72)
    found = kernel(*given, **settings, config=FeedbackConfig(held=4), simulate=compat.Simulation(detect_races=True))
    assert not compat.races_found()
    expected = jax.jit(functools.partial(meaning, **settings))(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found, expected)  # codes differ by 1


def test_more_rows_than_shared_memory_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 130 rows, kernels take 128"):
        round_to_steps(*problem("LDLQ", 130, 8))


@pytest.mark.parametrize("kind", ["GPTQ", *(pytest.param(each, marks=pytest.mark.slow) for each in ("LDLQ", *SLOW))])
def test_kernels_lower_to_cuda(kind: str) -> None:
    kernel, _, settings = ROUNDINGS[kind]
    shapes = jax.eval_shape(lambda: problem(kind, 128, 4096)) if kind != "SpQR" else problem(kind, 16, 128)
    traced = jax.jit(functools.partial(kernel, **settings)).trace(*shapes)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(ROUNDINGS))
def test_kernel_gives_the_codes_of_the_definition(kind: str) -> None:
    kernel, meaning, settings = ROUNDINGS[kind]
    given = problem(kind, 128 if kind != "SpQR" else 16, 4096)
    found, expected = (jax.jit(functools.partial(each, **settings))(*given) for each in (kernel, meaning))
    codes = [(each[0] if isinstance(each, tuple) else each).astype(jnp.float32) for each in (found, expected)]
    assert float((codes[0] != codes[1]).mean()) < 1e-3  # numbers beside the middle of two codes, and what follows them
