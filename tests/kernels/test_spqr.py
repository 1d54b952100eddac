"""Products with SpQR's weights, simulated on the CPU with detection of races, against their meaning in float32."""

import dataclasses
import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, reference
from pallas_kernels.cases import relative_error
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.narrow import TwoLevelGrids, prepare_spqr, restore_spqr
from pallas_kernels.spqr import spqr_decode

RNG = np.random.default_rng(0)
BF16_ROUNDING = 2.0**-8  # relative, of the output's one rounding; operands are exact, sums float32


WARPS: Final = DecodeConfig(depth=256, stages=1, warpgroups=2, barriers="by step", instruction="warp")
SPLIT: Final = dataclasses.replace(WARPS, warpgroups=1, splits=2, cluster=True)


@pytest.mark.parametrize(
    ("tokens", "config"),
    [(1, SPLIT), (1, dataclasses.replace(SPLIT, cluster=False)), (2, WARPS)],
    ids=["a cluster of two blocks", "two blocks that XLA adds", "two tokens in two warpgroups"],
)
def test_product_is_that_of_float32(tokens: int, config: DecodeConfig) -> None:
    outputs, inputs, slots = 128, 512, 3
    codes = jnp.asarray(RNG.integers(0, 8, (outputs, inputs)), jnp.int8)
    grid_codes = (jnp.asarray(RNG.integers(0, 16, (inputs // 16, outputs)), jnp.int32) for _ in range(2))
    parts = jnp.asarray(RNG.uniform(0.2, 1.0, (4, inputs // 16, outputs // 16)), jnp.float16)
    grids = TwoLevelGrids(*grid_codes, parts)
    values = jnp.asarray(3 * RNG.standard_normal((outputs, slots)), jnp.float16)
    rows = jnp.asarray(RNG.integers(0, inputs, (outputs, slots)), jnp.uint16)
    x = jnp.asarray(RNG.standard_normal((tokens, inputs)), jnp.bfloat16)
    weight = jax.jit(prepare_spqr)(codes, grids, values, rows)
    found = spqr_decode(x, *weight, config=config, simulate=compat.Simulation(detect_races=True))
    dense = reference.spqr_weight(codes, *grids, values, rows)
    expected = jnp.dot(x.astype(jnp.float32), dense.T, precision="highest")
    assert relative_error(found, expected) < BF16_ROUNDING
    assert not compat.races_found()
    for given, restored in zip(jax.tree.leaves((codes, grids)), jax.tree.leaves(restore_spqr(weight)), strict=True):
        np.testing.assert_array_equal(given, restored)


def test_what_does_not_fit_is_refused() -> None:
    struct = jax.ShapeDtypeStruct
    whole = functools.partial(struct, dtype=jnp.int8)
    grids = TwoLevelGrids(whole((8, 64)), whole((8, 64)), struct((4, 8, 4), jnp.float16))
    with pytest.raises(ValueError, match="in 8 groups: the kernel takes"):
        jax.eval_shape(prepare_spqr, whole((64, 128)), grids)
    grids = TwoLevelGrids(whole((16, 64)), whole((16, 64)), struct((4, 16, 4), jnp.float16))
    values = struct((64, 3), jnp.float16)
    with pytest.raises(ValueError, match="values or rows alone"):
        jax.eval_shape(prepare_spqr, whole((64, 256)), grids, values)
    weight = jax.eval_shape(prepare_spqr, whole((64, 256)), grids)
    alone = weight._replace(values=values)
    with pytest.raises(ValueError, match="values or rows alone"):
        jax.eval_shape(functools.partial(spqr_decode, config=SPLIT), struct((1, 256), jnp.bfloat16), *alone)
    for tokens, config, message in (
        (3, dataclasses.replace(WARPS, warpgroups=1), "3 tokens are more than 2"),
        (1, WARPS, "256 inputs are no multiple of 2 ranges of 256"),
        (1, DecodeConfig(), "their own instruction multiplies it"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(spqr_decode, config=config), struct((tokens, 256), jnp.bfloat16), *weight)
