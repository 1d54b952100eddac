"""Sums and norms of the residual stream in the kernels of the products around them, against their meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Undivided, compat, matmul_onto_fault, reference
from pallas_kernels.cases import relative_error
from pallas_kernels.configs import choose
from pallas_kernels.decode import w4a16_decode, w4a16_onto
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.matmul import w4a16_matmul_onto, w4a16_matmul_undivided
from pallas_kernels.weights import FloatWeight, prepare_w4a16

BF16_ROUNDING = 2.0**-8
EPS = 1e-5


class Sizes:
    """Operands of a product onto a stream, and of the next one, which divides."""

    def __init__(self, tokens: int, inputs: int, hidden: int, outputs: int, *, zeros: bool = False) -> None:
        rng = np.random.default_rng(hidden + tokens)

        def weight(rows: int, columns: int) -> tuple[FloatWeight, jax.Array]:
            codes = jnp.asarray(rng.integers(-8, 8, (rows, columns)), jnp.int4)
            scales = jnp.asarray(rng.uniform(0.01, 0.02, (columns // 64, rows)), jnp.bfloat16)
            shift = jnp.asarray(rng.integers(-8, 8, scales.shape), jnp.float32) if zeros else None
            eye = jnp.eye(columns, dtype=jnp.float32)
            return prepare_w4a16(codes, scales, shift), reference.float_matmul(eye, codes, scales, shift)

        self.x = jnp.asarray(rng.standard_normal((tokens, inputs)), jnp.bfloat16)
        self.stream = jnp.asarray(30 * rng.standard_normal((tokens, hidden)), jnp.float32)
        self.scale = jnp.asarray(rng.uniform(0.5, 1.5, hidden), jnp.bfloat16)
        (self.first, dense), (self.second, self.dense) = weight(hidden, inputs), weight(outputs, hidden)
        with jax.default_matmul_precision("highest"):
            product = self.x.astype(jnp.float32) @ dense
        self.product = product
        self.sums, self.normed = reference.add_norm(self.stream, product, self.scale, EPS)

    def check(self, found: tuple[jax.Array, Undivided]) -> None:
        """Compares a sum and an undivided norm."""
        sums, undivided = found
        largest = float(jnp.max(jnp.abs(self.sums)))
        np.testing.assert_allclose(sums, self.sums, rtol=0, atol=2.0**-20 * largest)
        normed = undivided.numbers.astype(jnp.float32) * undivided.factors(EPS)[:, None]
        assert relative_error(normed, self.normed.astype(jnp.float32)) < BF16_ROUNDING
        np.testing.assert_allclose(
            jnp.sum(undivided.squares, 0)[: len(sums)], jnp.sum(jnp.square(self.sums), 1), rtol=1e-5
        )

    def check_next(self, found: jax.Array) -> None:
        """Compares the product of the norm."""
        with jax.default_matmul_precision("highest"):
            expected = self.normed.astype(jnp.float32) @ self.dense
        assert relative_error(found, expected) < BF16_ROUNDING


@pytest.mark.parametrize(
    ("tokens", "hidden", "config", "zeros"),
    [
        (1, 576, DecodeConfig(depth=64, stages=2, warpgroups=2, barriers="by step", instruction="warp"), False),
        (5, 128, DecodeConfig(depth=64, stages=2, barriers="by copy"), True),
        (16, 4096, DecodeConfig(depth=128, stages=1, barriers="by step", instruction="warp"), False),
        (9, 256, DecodeConfig(depth=64, stages=1, rows=128, barriers="by step"), False),
    ],
    ids=["nine tiles", "zeros, by warpgroups", "64 tiles", "tiles of 128"],
)
def test_a_product_onto_a_stream_and_the_next_one(tokens: int, hidden: int, config: DecodeConfig, zeros: bool) -> None:
    sizes, simulate = Sizes(tokens, 128, hidden, 64, zeros=zeros), compat.Simulation(detect_races=True)
    found = w4a16_onto(sizes.x, *sizes.first, sizes.stream, sizes.scale, config=config, simulate=simulate)
    assert not compat.races_found()
    sizes.check(found)
    undivided = found[1]
    plain = DecodeConfig(depth=64, stages=2, barriers="by step", instruction=config.instruction)
    product = w4a16_decode(
        undivided.numbers, *sizes.second, squares=undivided.squares, eps=EPS, config=plain, simulate=simulate
    )
    assert not compat.races_found()
    sizes.check_next(product)


def test_the_choice_for_a_shape_is_the_same_product() -> None:
    """Simulated, a shape whose choice on a GPU is a cluster has one split."""
    assert choose("w4a16", 3, 4096, 64, 1) != DecodeConfig()
    sizes, simulate = Sizes(3, 64, 192, 64), compat.Simulation()
    found = w4a16_matmul_onto(sizes.x, sizes.first, sizes.stream, sizes.scale, simulate=simulate)
    sizes.check(found)
    sizes.check_next(w4a16_matmul_undivided(found[1], sizes.second, eps=EPS, simulate=simulate))


def test_what_is_not_added_in_a_kernel_is_refused() -> None:
    sizes = Sizes(17, 128, 64, 64)
    with pytest.raises(ValueError, match="17 tokens, kernels that add to a stream take 16"):
        w4a16_matmul_onto(sizes.x, sizes.first, sizes.stream, sizes.scale)
    few, split = Sizes(1, 128, 64, 64), DecodeConfig(depth=64, splits=2)
    with pytest.raises(ValueError, match="XLA would add the 2 splits"):
        w4a16_onto(few.x, *few.first, few.stream, few.scale, config=split)
    assert matmul_onto_fault(16, few.first) is None
    undivided = Undivided(jnp.zeros((4096, 64), jnp.bfloat16), jnp.zeros((64, 4096), jnp.float32))
    with pytest.raises(ValueError, match="4096 undivided tokens: kernels of few tokens divide"):
        w4a16_matmul_undivided(undivided, few.second, eps=EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize(("inputs", "hidden"), [(4096, 4096), (14336, 4096), (1536, 576), (2048, 2048)])
def test_products_onto_a_stream_on_a_gpu(tokens: int, inputs: int, hidden: int) -> None:
    sizes = Sizes(tokens, inputs, hidden, 6144)
    found, again = (w4a16_matmul_onto(sizes.x, sizes.first, sizes.stream, sizes.scale) for _ in range(2))
    sizes.check(found)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    sizes.check_next(w4a16_matmul_undivided(found[1], sizes.second, eps=EPS))
