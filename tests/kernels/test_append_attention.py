"""A step's new token and attention in one kernel: the bytes and the numbers of the two kernels, threads simulated."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.append import Coding, append_token
from pallas_kernels.append_attention import append_attention, fault_of_append_attention
from pallas_kernels.attention import PackedCache, packed_attention
from pallas_kernels.attention_configs import choose_attention
from pallas_kernels.attention_kernel import AttentionConfig

LOW = Coding()
QUAROT = Coding("zero", 0.95, "hadamard")
GRIDS = {"low": (-0.2, 0.2), "zero": (0.0, 15.0)}  # what stands beside a scale


@dataclass(frozen=True)
class Case:
    """A cache and the tokens that come to it."""

    bits: int
    dim: int
    share: int
    kv_heads: int
    slots: int
    positions: tuple[int, ...]
    config: AttentionConfig
    coding: Coding = LOW
    capacity: int | None = None

    def operands(self) -> tuple[Any, ...]:
        """A key is twice its group's first query, so that a token that is not seen is missed."""
        rng, rows = np.random.default_rng(0), len(self.positions)
        heads = self.share * self.kv_heads
        numbers = rng.normal(size=(rows, heads + 2 * self.kv_heads, self.dim))
        numbers[:, heads : heads + self.kv_heads] = 2 * numbers[:, : heads : self.share]
        turn = rng.uniform(0, 2 * np.pi, (rows, self.dim // 2))
        shape = rows, self.kv_heads, self.slots
        if self.bits == 16:
            both = (jnp.asarray(rng.normal(size=(*shape, self.dim)), jnp.bfloat16) for _ in range(2))
            cache = PackedCache(*both, None)
        else:
            width = self.dim * self.bits // 8
            both = (jnp.asarray(rng.integers(0, 256, (*shape, width)), jnp.uint8) for _ in range(2))
            grids = rng.uniform(0.01, 0.02, (*shape, 4))
            grids[..., 1::2] = rng.uniform(*GRIDS[self.coding.grid], (*shape, 2)).round(1)
            cache = PackedCache(*both, jnp.asarray(grids, jnp.float16))
        return (
            jnp.asarray(numbers.reshape(rows, -1), jnp.bfloat16),
            jnp.asarray(np.concatenate([np.cos(turn), np.sin(turn)], axis=1), jnp.float32),
            jnp.asarray(self.positions, jnp.int32),
            cache,
        )

    @property
    def seen(self) -> int:
        """Tokens that a row attends to at most."""
        return self.slots if self.capacity is None else self.capacity

    def one(self, simulate: compat.Simulation | None) -> Callable[..., Any]:
        """The kernel."""
        return functools.partial(
            append_attention, capacity=self.seen, coding=self.coding, config=self.config, simulate=simulate
        )

    def two(self, simulate: compat.Simulation | None) -> Callable[..., Any]:
        """What it is compared with."""

        def call(projected: Any, angles: Any, positions: Any, cache: PackedCache) -> Any:
            queries, kept = append_token(projected, angles, positions, cache, coding=self.coding, simulate=simulate)
            grid = "none" if cache.grids is None else self.coding.grid
            lengths = jnp.minimum(positions + 1, self.seen)
            return packed_attention(queries, kept, lengths, grid=grid, config=self.config, simulate=simulate), kept

        return call


TWO_OF_TWO = AttentionConfig(tile=64, stages=2, warpgroups=2)
CASES = {
    "4 bits, ends of tiles, a capacity inside one, a full row": Case(
        4, 64, 3, 2, 192, (5, 63, 64, 190, 191, 192), TWO_OF_TWO, capacity=190
    ),
    "QuaRot's, 8 bits": Case(8, 128, 4, 1, 128, (0, 100), AttentionConfig(tile=64, stages=1), QUAROT),
    "8 bits, the tile asked for after another, by who does not write": Case(
        8, 64, 4, 1, 256, (150,), AttentionConfig(tile=64, stages=1, warpgroups=2)
    ),
    "bfloat16, the first tile early": Case(16, 64, 8, 1, 256, (255, 70), AttentionConfig(tile=64, stages=2)),
    "bfloat16, tiles in runs": Case(
        16, 64, 1, 1, 256, (3, 250), AttentionConfig(tile=64, stages=1, warpgroups=2, tiles="in runs")
    ),
}
EARLY_IN_VAIN = Case(4, 64, 8, 1, 512, (3, 120, 512), TWO_OF_TWO)  # the first tile of a warpgroup is the token's
SERVED = tuple(
    Case(bits, 128, 4, 8, slots, tuple(range(slots - rows, slots)), choose_attention(bits, rows, 8, 128, slots), coding)
    for bits, rows, slots, coding in (
        (4, 16, 8192, LOW),
        (4, 32, 4096, LOW),
        (4, 16, 8192, QUAROT),
        (8, 16, 8192, LOW),
        (16, 16, 8192, LOW),
        (4, 16, 512, LOW),
    )
)


def check(case: Case, simulate: compat.Simulation | None, wrap: Callable[..., Any] = lambda call: call) -> None:
    given = case.operands()
    expected = wrap(case.two(None if simulate is None else compat.Simulation()))(*given)
    found = wrap(case.one(simulate))(*given)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))
    assert any((old != new).any() for old, new in zip(jax.tree.leaves(given[3]), jax.tree.leaves(found[1])))


@pytest.mark.parametrize("name", CASES)
def test_simulated_threads_write_and_attend(name: str) -> None:
    check(CASES[name], compat.Simulation(detect_races=True))
    assert not compat.races_found()


def test_a_tile_that_came_too_early_comes_again() -> None:
    """Races with the copy in vain are found; what it brings is not used."""
    check(EARLY_IN_VAIN, compat.Simulation(detect_races=True))
    assert compat.races_found()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES.values(), EARLY_IN_VAIN, *SERVED], ids=str)
def test_the_kernel_writes_and_attends_with_the_same_bits_twice(case: Case) -> None:
    check(case, None, jax.jit)
    given, call = case.operands(), jax.jit(case.one(None))
    for once, twice in zip(jax.tree.leaves(call(*given)), jax.tree.leaves(call(*given)), strict=True):
        assert bool(jnp.all(once == twice))


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_what_is_served_lowers_to_one_kernel(case: Case) -> None:
    struct = jax.ShapeDtypeStruct
    rows, width = len(case.positions), case.dim if case.bits == 16 else case.dim * case.bits // 8
    codes = struct((rows, 8, case.slots, width), jnp.bfloat16 if case.bits == 16 else jnp.uint8)
    grids = None if case.bits == 16 else struct((rows, 8, case.slots, 4), jnp.float16)
    given = (
        struct((rows, 48 * case.dim), jnp.bfloat16),
        struct((rows, case.dim), jnp.float32),
        struct((rows,), jnp.int32),
        PackedCache(codes, codes, grids),
    )
    jitted = jax.jit(case.one(None), donate_argnums=3)
    text = jitted.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert text.count("#stablehlo.output_operand_alias<") == (2 if grids is None else 3)


def test_what_does_not_fit_is_refused() -> None:
    assert fault_of_append_attention(AttentionConfig(), 256, 6, 8192) is None
    message = "7 query heads of 256 numbers: a warpgroup takes 2048 with a key and a value"
    assert fault_of_append_attention(AttentionConfig(), 256, 7, 8192) == message
    case = CASES["QuaRot's, 8 bits"]
    for wrong, message in (
        (Case(8, 96, 4, 1, 128, (0,), case.config), "heads of 96 numbers"),
        (Case(8, 64, 4, 1, 128, (0,), AttentionConfig(splits=2)), "2 blocks share a KV head"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.one(None)(*wrong.operands())
    projected, *rest = case.operands()
    with pytest.raises(ValueError, match="767 numbers"):
        case.one(None)(projected[:, 1:], *rest)
