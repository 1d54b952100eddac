"""Whole solves with the kernel in the interpreter give the codes of the scan."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import SpqrFormat, UniformFormat
from jquant.numerics import Grid, decode, encode
from jquant.quantizers import Spqr, ldlq
from jquant.quantizers.gptq import Rounding, spread_errors
from jquant.quantizers.ldlq import round_with_feedback
from jquant.quantizers.rtn import fit_groups
from jquant.quantizers.solver import KERNEL_ROWS, Solver

INPUTS, OUTPUTS, SIZE = 40, 32, 8
BOTH = (Solver.SCAN, Solver.SIMULATED)


def problem() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS))
    weight = rng.standard_normal((INPUTS, OUTPUTS))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


def test_a_machine_without_a_hopper_gpu_scans() -> None:
    assert Solver.MACHINE.resolve(jnp.float32) is Solver.SCAN
    assert Solver.HOPPER.resolve(jnp.float32) is Solver.HOPPER


def test_a_hopper_gpu_takes_the_kernel_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")])
    assert Solver.MACHINE.resolve(jnp.float32) is Solver.HOPPER
    assert Solver.MACHINE.resolve(jnp.float64) is Solver.SCAN
    assert Solver.MACHINE.resolve(jnp.float32, KERNEL_ROWS + 1) is Solver.SCAN


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["static", "dynamic"])
def test_gptq_rounds_the_same(groups: str) -> None:
    weight, hessian = problem()
    order = jnp.argsort(-jnp.diagonal(hessian))
    rounding = Rounding(_fit, _apply, bits=4)
    solve = functools.partial(spread_errors, weight, hessian, order, rounding, damping=0.01, group_size=SIZE)
    scan, kernel = (solve(groups=groups, solver=solver) for solver in BOTH)
    np.testing.assert_array_equal(scan.codes, kernel.codes)
    np.testing.assert_allclose(scan.errors, kernel.errors, rtol=0, atol=1e-4)  # sums in another order, of size 1


@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "passes"), [("ldlq", 1), ("stochastic", 0)])
def test_ldlq_rounds_the_same(rounding: ldlq.Rounding, passes: int) -> None:
    weight, hessian = problem()
    solve = functools.partial(round_with_feedback, 3 * weight, hessian, jax.random.key(0), damping=0.01, top=3)
    scan, kernel = (solve(rounding=rounding, greedy_passes=passes, solver=solver) for solver in BOTH)
    np.testing.assert_array_equal(scan.codes, kernel.codes)


@pytest.mark.slow
def test_spqr_rounds_the_same() -> None:
    weight, hessian = problem()
    method = Spqr(SpqrFormat(bits=3, group_size=SIZE), outlier_threshold=0.05)
    given = method.prepare(weight, hessian, jnp.arange(INPUTS))
    scan, kernel = (jax.jit(lambda s=s: method.solve(given._replace(solver=s), jnp.float32(0.2)))() for s in BOTH)
    assert int(scan.outliers.sum()) > 0
    for name in ("codes", "outliers"):
        np.testing.assert_array_equal(getattr(scan, name), getattr(kernel, name))


def _fit(rows: jax.Array, group_size: int | None) -> Grid:
    return fit_groups(rows, UniformFormat(bits=4, group_size=group_size), "none")


def _apply(row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    codes = encode(row, grid, 4)
    return codes, decode(codes, grid, row.dtype)
