"""Attention over packed caches: every thread simulated, with detection of races, against float32; lowering to CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.attention import PackedCache, kivi_attention, packed_attention
from pallas_kernels.attention_case import AttentionCase, bfloat16_attentions, random_legal_attention, relative_error
from pallas_kernels.attention_kernel import AttentionConfig
from pallas_kernels.attention_reference import dense_cache, in_rows
from pallas_kernels.kivi_case import KiviCase
from pallas_kernels.lanes import SimulatedLanes

BF16_ROUNDING = 2.0**-8  # relative, of P or P times a scale, rounded to bfloat16, and of the output
AS_GOOD = 1.1  # of bfloat16's own error: where both are little more than the output's rounding, chance decides

EARLY = "bfloat16, the first tile early"
CASES = {
    "4 bits, pages, two splits of two": (
        AttentionCase("kv4", 2, 6, 2, 64, 192, page=32, ragged=True),
        AttentionConfig(splits=2, tile=64, stages=2, warpgroups=2),
    ),
    "8 bits, zeros, 128 numbers": (
        AttentionCase("kv8", 1, 8, 1, 128, 128, grid="zero", ragged=True),
        AttentionConfig(tile=64, stages=1),
    ),
    EARLY: (
        AttentionCase("kv16", 2, 8, 1, 64, 256, grid="none", ragged=True),
        AttentionConfig(tile=64, stages=2),
    ),
    "bfloat16, tiles in runs": (
        AttentionCase("kv16", 1, 8, 1, 64, 256, grid="none", ragged=True),
        AttentionConfig(splits=2, tile=64, stages=1, tiles="in runs"),
    ),
}
SERVED = (  # Llama-3.1-8B and SmolLM2-135M
    AttentionCase("kv4", 16, 32, 8, 128, 8192),
    AttentionCase("kv4", 1, 32, 8, 128, 32768, page=64),
    AttentionCase("kv8", 16, 32, 8, 128, 8192),
    AttentionCase("kv16", 16, 32, 8, 128, 8192, grid="none"),
    AttentionCase("kv4", 1, 9, 3, 64, 2048),
    KiviCase(2, 16, 32, 8, 128, 32768),
    KiviCase(4, 16, 32, 8, 128, 8192, group=64),
    AttentionCase("kv4", 1, 32, 8, 128, 32768),
)
WIDE = tuple(  # heads of 256 numbers
    AttentionCase(kind, 1, 8, 1, 256, 8192, grid=grid)
    for kind, grid in (("kv4", "low"), ("kv8", "zero"), ("kv16", "none"))
)
RANDOM = (*random_legal_attention(0, 20), *random_legal_attention(1, 4))
REFERENCES = (  # with one query head a KV head, whose products XLA makes without tensor cores on a GPU, and with more
    AttentionCase("kv8", 4, 1, 1, 128, 128, grid="zero", ragged=True),
    AttentionCase("kv16", 3, 8, 8, 128, 768, page=64, grid="none", ragged=True),
    AttentionCase("kv8", 1, 7, 7, 128, 256, ragged=True),
    AttentionCase("kv4", 2, 6, 2, 64, 192, page=32, ragged=True),
)
MORE_THAN_THE_OUTPUT = 2.0**-10  # what rounded weights change, relative


def check(found: jax.Array, case: AttentionCase | KiviCase, seed: int = 0) -> None:
    """The error against float32 is no larger than that of bfloat16 attention over the same numbers."""
    expected = case.meaning(seed)
    error = relative_error(found, expected)
    assert error < BF16_ROUNDING
    assert error < AS_GOOD * relative_error(case.rounded(seed), expected)


@pytest.mark.parametrize("name", CASES)
def test_simulated_threads_attend(name: str) -> None:
    case, config = CASES[name]
    given = case.operands(0)
    found = packed_attention(*given, grid=case.grid, config=config, simulate=compat.Simulation(detect_races=True))
    check(found, case)
    assert not compat.races_found()


def test_a_row_without_tokens_gives_zeros() -> None:
    case, config = CASES[EARLY]
    given = case.operands(0)
    emptied = given._replace(lengths=given.lengths.at[0].set(0))
    found = packed_attention(*emptied, grid="none", config=config, simulate=compat.Simulation())
    assert not found[0].any()
    assert relative_error(found[1:], case.meaning(0)[1:]) < BF16_ROUNDING


def test_simulated_threads_attend_to_kivi() -> None:
    case = KiviCase(2, 1, 8, 1, 64, 256)
    config, simulation = AttentionConfig(splits=2, tile=128, stages=1), compat.Simulation(detect_races=True)
    found = kivi_attention(*case.operands(0), config=config, simulate=simulation)
    check(found, case)
    assert not compat.races_found()


@pytest.mark.parametrize("case", [*(SERVED[index] for index in (0, 1, 3, 4, 5, 7)), *WIDE], ids=str)
def test_what_is_chosen_lowers_to_cuda(case: AttentionCase | KiviCase) -> None:
    given = jax.eval_shape(lambda: case.operands(0))
    text = jax.jit(case.kernel(case.config())).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


def check_reference(case: AttentionCase) -> None:
    """What kernels are compared with rounds keys, values, weights and result, as numpy does in float64 between."""
    given, expected = case.operands(0), np.asarray(case.meaning(0), np.float64)
    keys, values = (
        bfloat16(np.asarray(in_rows(each, given.table), np.float64))
        for each in dense_cache(given.cache, case.dim, case.grid)
    )
    queries = np.asarray(given.queries, np.float64).reshape(case.rows, case.kv_heads, -1, case.dim)
    scores = np.einsum("bhrd,bhtd->bhrt", queries, keys) / np.sqrt(case.dim)
    seen = (np.arange(keys.shape[2]) < np.asarray(given.lengths)[:, None])[:, None, None]
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True, where=seen, initial=-np.inf)), 0.0)
    weights = bfloat16(weights / weights.sum(-1, keepdims=True))
    emulated = bfloat16(np.einsum("bhrt,bhtd->bhrd", weights, values)).reshape(expected.shape)
    found, size = np.asarray(case.rounded(0), np.float64), np.linalg.norm(expected)
    apart = np.linalg.norm(bfloat16(expected) - emulated) / size
    assert apart > MORE_THAN_THE_OUTPUT
    assert np.linalg.norm(found - emulated) / size < apart / 4


@pytest.mark.parametrize("case", REFERENCES, ids=str)
def test_the_reference_is_bfloat16_attention(case: AttentionCase) -> None:
    check_reference(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", REFERENCES, ids=str)
def test_the_reference_is_bfloat16_attention_on_a_gpu(case: AttentionCase) -> None:
    check_reference(case)


def test_xla_attends_to_the_same() -> None:
    case = AttentionCase("kv16", 2, 6, 2, 64, 32, grid="none")
    given = case.operands(0)
    for name in ("xla", "xla, by heads"):
        keys, values = given.cache.keys, given.cache.values
        if name == "xla":
            keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        found = bfloat16_attentions()[name](given.queries, keys, values, given.lengths)
        assert relative_error(found, case.meaning(0)) < BF16_ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SERVED, *WIDE, *RANDOM], ids=str)
def test_kernel_attends_with_the_same_bits_twice(case: AttentionCase | KiviCase) -> None:
    kernel = jax.jit(case.kernel(case.config()))
    given = case.operands(0)
    found = kernel(*given)
    check(found, case)
    assert bool(jnp.all(found == kernel(*given)))


def test_what_does_not_fit_is_refused() -> None:
    struct = jax.ShapeDtypeStruct
    for shape, page, config, message in (
        ((1, 8, 96), 64, AttentionConfig(), "heads of 96 numbers"),
        ((1, 18, 64), 64, AttentionConfig(), "9 query heads share a KV head"),
        ((1, 8, 64), 96, AttentionConfig(), "pages of 96 tokens"),
    ):
        stored = struct((1, 2, page, shape[2] // 2), jnp.uint8)
        cache = PackedCache(stored, stored, struct((1, 2, page, 4), jnp.float16))
        attend = functools.partial(packed_attention, grid="low", config=config)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(attend, struct(shape, jnp.bfloat16), cache, struct((1,), jnp.int32))
    with pytest.raises(ValueError, match='grids are given, but their kind is "none"'):
        jax.eval_shape(
            functools.partial(packed_attention, grid="none", config=AttentionConfig(tile=64)),
            struct((1, 2, 64), jnp.bfloat16),
            PackedCache(
                struct((1, 2, 64, 32), jnp.uint8), struct((1, 2, 64, 32), jnp.uint8), struct((1, 2, 64, 4), jnp.float16)
            ),
            struct((1,), jnp.int32),
        )


def test_simulated_instructions() -> None:
    """A product of small whole numbers, exact in bfloat16, and a transposed matrix."""
    lanes, rng = SimulatedLanes(), np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (4, 16, 16)).astype(np.float32), rng.integers(-8, 8, (4, 16, 8)).astype(np.float32)
    warp, row, quad = lanes.warp, lanes.row, 2 * lanes.quad
    of_a = [lanes.pack(a[warp, row + r, quad + k], a[warp, row + r, quad + k + 1]) for k in (0, 8) for r in (0, 8)]
    of_b = [lanes.pack(b[warp, quad + k, row], b[warp, quad + k + 1, row]) for k in (0, 8)]
    found = lanes.mma(of_a, of_b, [lanes.number(1.0)] * 4)
    expected = a @ b + 1
    for i, value in enumerate(found):
        np.testing.assert_array_equal(value, expected[warp, row + 8 * (i // 2), quad + i % 2])
    turned = lanes.transpose(of_b[0])
    np.testing.assert_array_equal(turned, lanes.pack(b[warp, row, quad], b[warp, row, quad + 1]))
