"""silu(gate) * up by the kernel, simulated, is what it is by XLA, of the same joined product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.formats import JoinedPart, Layout, UniformFormat, UniformTensor, join_weights, prepare_float
from jquant.models import Linear
from jquant.models.gate import gated
from jquant.models.tree import Mlp
from pallas_kernels import gate as kernel

HIDDEN, INNER = 64, 1024


def mlp() -> Mlp:
    """Returns gate and up as one weight, in the interpreter's layout."""
    rng = np.random.default_rng(0)

    def weight() -> UniformTensor:
        codes = jnp.asarray(rng.integers(0, 256, (HIDDEN // 2, INNER)), jnp.uint8)
        scales, format = jnp.full((1, INNER), 0.1), UniformFormat(4, None, "symmetric")
        return UniformTensor(codes=codes, scales=scales, zeros=None, format=format, shape=(HIDDEN, INNER))

    whole = join_weights([prepare_float(weight(), Layout.SIMULATED) for _ in range(2)])
    down = jnp.zeros((INNER, HIDDEN), jnp.bfloat16)
    return Mlp(Linear(whole), Linear(JoinedPart((HIDDEN, INNER))), Linear(down))


@pytest.mark.parametrize(("bias", "calls"), [(False, 1), (True, 0)])
def test_the_kernel_s_gate_is_xla_s(bias: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit; where a linear has a bias, XLA makes the gate."""
    own, made = mlp(), []
    if bias:
        own = dataclasses.replace(own, up_proj=dataclasses.replace(own.up_proj, bias=jnp.ones(INNER, jnp.bfloat16)))
    real = kernel.apply_gate
    monkeypatch.setattr(kernel, "apply_gate", lambda *given, **named: made.append(1) or real(*given, **named))
    x = jax.random.normal(jax.random.key(0), (2, 1, HIDDEN), jnp.bfloat16)
    (found, tap), (expected, _) = (gated(own, x, None, layout) for layout in (Layout.SIMULATED, Layout.PORTABLE))
    assert found.shape == (2, 1, INNER)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(tap, x)
    assert len(made) == calls
