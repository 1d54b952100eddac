"""What codes a step's token: its division without a branch, against a division in float64."""

import numpy as np
import pytest

from pallas_kernels.append import FAR, quotient
from pallas_kernels.lanes import THREADS, SimulatedLanes

SCALES = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every finite one above 0
CODES = 510  # levels, to twice those of 8 bits: a scale that float16 rounds down to half of what it was
TIES = 16  # of each scale


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_a_quotient_is_rounded_once(off: int) -> None:
    """Of every float16, near the ties of codes and anywhere, from inverses that are units in the last place off."""
    rng, lanes = np.random.default_rng(off + 2), SimulatedLanes()
    ties = (rng.integers(-CODES, CODES, (TIES, len(SCALES))) + 0.5) * SCALES.astype(np.float64)
    bits = ties.astype(np.float32).view(np.int32) + rng.integers(-2, 3, ties.shape, np.int32)
    anywhere = (rng.uniform(-CODES, CODES, (2, len(SCALES))) * SCALES).astype(np.float32)
    a = np.concatenate([bits.view(np.float32), anywhere, np.broadcast_to(0.0, (1, len(SCALES)))])
    scales = np.broadcast_to(SCALES, a.shape)
    inverse = ((1 / scales).view(np.int32) + off).view(np.float32)
    more = -a.size % THREADS
    given = [
        np.pad(each.reshape(-1), (0, more), constant_values=1.0).astype(np.float32).reshape(-1, THREADS)
        for each in (a, scales, inverse)
    ]
    np.testing.assert_array_equal(quotient(lanes, *given), given[0] / given[1])


def test_quotients_of_the_range() -> None:
    """By the last code of 4 and of 8 bits, whose inverse is a constant."""
    lanes, rng = SimulatedLanes(), np.random.default_rng(0)
    reach = np.exp(rng.uniform(np.log(1e-5), np.log(2e5), (4096, THREADS))).astype(np.float32)
    for most in (15.0, 255.0):
        found = quotient(lanes, reach, lanes.number(most), lanes.number(1 / most))
        np.testing.assert_array_equal(found, reach / np.float32(most))


@pytest.mark.parametrize("a", [np.inf, -np.inf, 1e30, np.nan])
@pytest.mark.parametrize("scale", [65504.0, 2.0**-24, np.inf])
def test_what_does_not_fit_has_the_code_of_a_division(a: float, scale: float) -> None:
    lanes = SimulatedLanes()
    given, scales = lanes.number(a), lanes.number(scale)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.fmax(quotient(lanes, given, scales, lanes.reciprocal(scales)), 0.0)
        expected = np.fmax(given / scales, 0.0)  # of nan and 0 a GPU's larger one is 0
    np.testing.assert_array_equal(np.minimum(found, FAR), np.minimum(expected, FAR))
