"""Activations in pieces, simulated on the CPU with detection of races, against float64 in numpy; lowering to CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pieces import PIECES, pieces_by_kernel, pieces_by_xla


def expected(x: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return whole = 256 high + low of each number, and (step, sum) of each group, [groups, tokens, 2]."""
    apart = x.reshape(len(x), -1, group)
    largest = np.abs(apart).max(axis=2)
    step = np.where(largest == 0, 1.0, 2.0 ** np.floor(np.log2(np.where(largest == 0, 1.0, largest)))) / 2**13
    whole = np.round(apart / step[:, :, None]).reshape(x.shape)
    return whole, np.stack([step * 2.0 ** (2 - bits), apart.sum(axis=2)], axis=2).swapaxes(0, 1)


def test_pieces_are_the_nearest_steps() -> None:
    group, bits = 64, 3
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3 * group)), jnp.bfloat16)
    x = x.at[0, :group].multiply(100).at[1, group : 2 * group].set(0).at[0, group].set(1e-36)
    pieces, grids = pieces_by_kernel(x, group, bits, compat.Simulation(detect_races=True))
    assert not compat.races_found()
    beside, grids_beside = pieces_by_xla(x.at[0, group].set(0), group, bits)  # 1e-36 counts as 0 in the kernel
    np.testing.assert_array_equal(pieces, beside)
    np.testing.assert_allclose(grids[:, :, :4], grids_beside[:, :, :4], rtol=1e-6, atol=1e-35)
    whole, of_groups = expected(np.asarray(x.at[0, group].set(0), np.float64), group, bits)
    pieces, grids = np.asarray(pieces, np.int64), np.asarray(grids, np.float64)
    np.testing.assert_array_equal(256 * pieces[::PIECES] + pieces[1::PIECES], whole)
    for token in range(2):
        high, low = PIECES * token, PIECES * token + 1
        np.testing.assert_array_equal(grids[:, 0, high], 256 * of_groups[:, token, 0])
        np.testing.assert_array_equal(grids[:, 0, low], of_groups[:, token, 0])
        np.testing.assert_allclose(grids[:, 1, high], of_groups[:, token, 1], rtol=1e-5, atol=1e-5)
        assert not grids[:, 1, low].any()


@pytest.mark.parametrize("group", [64, 256])
def test_pieces_lower_to_cuda(group: int) -> None:
    call = jax.jit(functools.partial(pieces_by_kernel, group=group, bits=4))
    traced = call.trace(jax.ShapeDtypeStruct((8, 14 * group), jnp.bfloat16))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
