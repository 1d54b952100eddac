"""The sum and norm of the residual stream by one kernel, simulated, against their meaning."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, reference
from pallas_kernels.norm import add_norm

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [1, 3])
def test_sum_and_norm_are_the_reference_s(rows: int) -> None:
    x, update = (jnp.asarray(RNG.standard_normal((rows, 1024)), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    scale = jnp.asarray(RNG.uniform(0.5, 1.5, 1024), jnp.bfloat16)
    for added in (update, None):
        found = add_norm(x, added, scale, eps=1e-5, simulate=compat.Simulation(detect_races=True))
        expected = reference.add_norm(x, added, scale, 1e-5)
        np.testing.assert_array_equal(found[0], expected[0])
        # the mean's sums have another order: a number may fall on the neighbour of its bfloat16
        np.testing.assert_allclose(found[1].astype(jnp.float32), expected[1].astype(jnp.float32), rtol=2**-7)
        assert not compat.races_found()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1024, 4096, 8192])
def test_sum_and_norm_on_a_gpu_are_the_reference_s(size: int) -> None:
    x, update = (jnp.asarray(RNG.standard_normal((16, size)), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    scale = jnp.asarray(RNG.uniform(0.5, 1.5, size), jnp.bfloat16)
    for added in (update, None):
        found = add_norm(x, added, scale, eps=1e-5)
        expected = reference.add_norm(x, added, scale, 1e-5)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1].astype(jnp.float32), expected[1].astype(jnp.float32), rtol=2**-7)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 576 numbers, the kernel takes multiples of 1024 up to 8192; let XLA"):
        add_norm(jnp.zeros((1, 576), jnp.float32), None, jnp.zeros(576, jnp.bfloat16), eps=0.0)
