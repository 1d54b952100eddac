"""Grids with a float zero: goldens, storage in half precision, constant groups, bad bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.numerics import decode_offset, encode_offset, fit_offset_grid
from tests.oracles.kv import offset_group

GROUP = jnp.asarray([0.1, -0.7, 1.4, 3.2])  # the example of specification section 13


@pytest.mark.parametrize(("bits", "scale", "codes"), [(2, 1.3, [1, 0, 2, 3]), (4, 0.26, [3, 0, 8, 15])])
def test_goldens(bits: int, scale: float, codes: list[int]) -> None:
    grid = fit_offset_grid(GROUP, bits, "float32")
    assert float(grid.scales[0]) == pytest.approx(scale)
    assert encode_offset(GROUP, grid, bits).tolist() == codes
    dense = decode_offset(encode_offset(GROUP, grid, bits), grid)
    np.testing.assert_allclose(dense, offset_group(np.asarray(GROUP, np.float64), bits), atol=1e-6)


def test_codes_fit_the_scales_that_are_stored() -> None:
    x = 300.0 + jnp.linspace(0.0, 1.0, 64).reshape(2, 32)
    grid = fit_offset_grid(x, 4, "float16")
    assert grid.scales.dtype == grid.lows.dtype == jnp.float16
    error = jnp.abs(decode_offset(encode_offset(x, grid, 4), grid) - x)
    # half a step, and where the low end in float16 is off, by half of 300's spacing of 0.25
    assert float(error.max()) <= float(grid.scales.max()) / 2 + 0.125


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_constant_groups_come_back(dtype: str) -> None:
    x = jnp.asarray([[0.0] * 4, [-2.5] * 4])
    grid = fit_offset_grid(x, 2, dtype)
    np.testing.assert_array_equal(decode_offset(encode_offset(x, grid, 2), grid), x)


@pytest.mark.parametrize("bits", [0, 9])
def test_bad_bits(bits: int) -> None:
    with pytest.raises(FormatError, match=f"{bits} bits given for a grid with a float offset"):
        fit_offset_grid(GROUP, bits)
