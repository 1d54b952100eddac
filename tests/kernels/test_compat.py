"""What stands between the kernels and Mosaic GPU: unpacked codes in the interpreter, and lowering without a GPU."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, inline
from pallas_kernels.order import stored_bf16, stored_int8

RNG = np.random.default_rng(0)
SHAPE = (64, 64)


def times_identity(
    codes: jax.Array, *rows: jax.Array, given: tuple[str, ...] = (), simulate: compat.Simulation | None = None
) -> jax.Array:
    """Multiply unpacked codes by the identity: what the tensor cores see as their operand."""
    integer = given == ("int8",)
    operand, result = (jnp.int8, jnp.int32) if integer else (jnp.bfloat16, jnp.float32)
    simulated = simulate is not None

    def body(codes_gmem, eye_gmem, *rest, codes_smem, eye_smem, bounce, barrier) -> None:  # noqa: ANN001, ANN002
        *rows_gmem, out_gmem = rest
        compat.copy_in(codes_gmem, codes_smem, barrier)
        compat.copy_in(eye_gmem, eye_smem, barrier)
        compat.wait(barrier)
        found = dict(zip(given, [compat.load(ref, compat.ROWS, checked=False) for ref in rows_gmem]))
        if integer:
            a = inline.unpack_int8(codes_smem, SHAPE, simulated=simulated)
        else:
            a = inline.unpack_bf16(codes_smem, SHAPE, found.get("centers"), found.get("scales"), simulated=simulated)

        def product(accumulator) -> None:  # noqa: ANN001
            compat.multiply(accumulator, a, eye_smem.T, bounce if simulated else None)
            out_gmem[...] = accumulator[...]

        compat.in_scope(product, compat.Accumulator(SHAPE, result))

    scratch = {
        "codes_smem": compat.SharedMemory(SHAPE, jnp.int4, transforms=compat.tiled(SHAPE[1], jnp.int4)),
        "eye_smem": compat.SharedMemory(SHAPE, operand, transforms=compat.tiled(SHAPE[1], operand)),
        "bounce": compat.SharedMemory(SHAPE, operand, transforms=compat.tiled(SHAPE[1], operand)),
        "barrier": compat.Barrier(num_arrivals=2),
    }
    kernel = compat.kernel(
        body, out=jax.ShapeDtypeStruct(SHAPE, result), scratch=scratch, grid={"block": 1}, simulate=simulate
    )
    return kernel(codes, jnp.eye(SHAPE[0], dtype=operand), *rows)


CODES = jnp.asarray(RNG.integers(-8, 8, SHAPE), jnp.int4)
ZEROS = jnp.asarray(RNG.integers(-8, 8, SHAPE[0]), jnp.bfloat16)
SCALES = jnp.asarray(2.0 ** RNG.integers(-3, 3, SHAPE[0]), jnp.bfloat16)
VALUES = np.asarray(CODES, np.float32)
CASES = {
    "int8": ((), 16 * VALUES),
    "": ((), VALUES),
    "centers": ((ZEROS + jnp.bfloat16(136),), VALUES - np.asarray(ZEROS, np.float32)[:, None]),
    "scales": ((SCALES,), VALUES * np.asarray(SCALES, np.float32)[:, None]),
    "centers scales": (
        (ZEROS + jnp.bfloat16(136), SCALES),
        (VALUES - np.asarray(ZEROS, np.float32)[:, None]) * np.asarray(SCALES, np.float32)[:, None],
    ),
}


def unpacking(case: str) -> tuple[Callable[..., jax.Array], jax.Array]:
    order = stored_int8 if case == "int8" else stored_bf16
    return functools.partial(times_identity, given=tuple(case.split())), order.apply(CODES)


@pytest.mark.parametrize("case", ["int8", "centers scales"])
def test_simulated_operand_is_what_the_codes_stand_for(case: str) -> None:
    function, stored = unpacking(case)
    rows, expected = CASES[case]
    np.testing.assert_array_equal(function(stored, *rows, simulate=compat.Simulation(detect_races=True)), expected)
    assert not compat.races_found()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operand_is_what_the_codes_stand_for(case: str) -> None:
    function, stored = unpacking(case)
    rows, expected = CASES[case]
    np.testing.assert_array_equal(jax.jit(function)(stored, *rows), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacking_lowers_to_cuda(case: str) -> None:
    function, stored = unpacking(case)
    text = jax.jit(function).trace(stored, *CASES[case][0]).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
