"""Grids and range search: golden codes, tensors of the reference code, a numpy oracle, and invariances."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.errors import FormatError
from jquant.numerics import (
    Grid,
    Symmetry,
    cast_scales,
    decode,
    encode,
    expand,
    fit_grid,
    range_of,
    search_range,
    straight_through,
)
from tests.oracles import closed_form
from tests.oracles import rounding as oracle

ULPS = 2.4e-7  # relative; XLA multiplies by 1 / (2^b - 1) where the reference divides, so scales differ in the last bit
PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)
SYMMETRIES: tuple[Symmetry, ...] = ("asymmetric", "symmetric", "symmetric_full")
WEIGHT = jnp.asarray(closed_form.weight().T, dtype=jnp.float32)  # [in, out]


def fit(values: jax.Array, bits: int, symmetry: Symmetry) -> Grid:
    """Fit one grid over the first axis."""
    return fit_grid(*range_of(values, axis=0), bits, symmetry)


def round_trip(values: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """Round values to one grid over the first axis."""
    grid = expand(grid, 0)
    return decode(encode(values, grid, bits), grid, values.dtype)


def random_groups(seed: int, group: int = 16, out: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((group, out)) * np.logspace(-3, 3, out)


@pytest.mark.parametrize(("bits", "symmetry"), closed_form.ROUNDED_CODES)
def test_golden_codes(bits: int, symmetry: Symmetry) -> None:
    grid = fit(WEIGHT, bits, symmetry)
    offset = 0 if symmetry == "asymmetric" else 2 ** (bits - 1)
    codes = encode(WEIGHT, expand(grid, 0), bits)
    np.testing.assert_array_equal(codes.T.astype(int) - offset, closed_form.ROUNDED_CODES[bits, symmetry])
    mse = jnp.mean((round_trip(WEIGHT, grid, bits) - WEIGHT) ** 2)
    np.testing.assert_allclose(mse, closed_form.ROUNDED_MSE[bits, symmetry], rtol=1e-5)


@pytest.mark.parametrize(("bits", "symmetry"), closed_form.ROUNDED_SCALES)
def test_golden_scales_and_zeros(bits: int, symmetry: Symmetry) -> None:
    grid = fit(WEIGHT, bits, symmetry)
    np.testing.assert_allclose(grid.scales, closed_form.ROUNDED_SCALES[bits, symmetry], atol=6e-7)
    zeros = closed_form.ROUNDED_ZEROS.get((bits, symmetry), [2 ** (bits - 1)] * 4)
    np.testing.assert_array_equal(grid.zeros, zeros)


def test_golden_groups() -> None:
    groups = WEIGHT.reshape(2, 4, 4)
    grid = fit_grid(*range_of(groups, axis=1), 4, "asymmetric")
    codes = encode(groups, expand(grid, 1), 4).reshape(8, 4)
    np.testing.assert_array_equal(codes.T, closed_form.GROUPED_CODES)
    np.testing.assert_allclose(grid.scales.T.ravel(), closed_form.GROUPED_SCALES, atol=6e-7)
    np.testing.assert_array_equal(grid.zeros.T.ravel(), closed_form.GROUPED_ZEROS)


@pytest.mark.parametrize(("bits", "symmetry"), closed_form.SEARCHED_SHRINKS)
def test_golden_search(bits: int, symmetry: Symmetry) -> None:
    shrinks = search_range(WEIGHT, bits, symmetry).scales / fit(WEIGHT, bits, symmetry).scales
    np.testing.assert_allclose(shrinks, closed_form.SEARCHED_SHRINKS[bits, symmetry], atol=1e-5)


def test_golden_search_errors() -> None:
    error = jnp.abs(round_trip(WEIGHT, search_range(WEIGHT, 4, "symmetric"), 4) - WEIGHT) ** 2.4
    np.testing.assert_allclose(jnp.sum(error, axis=0), closed_form.SEARCHED_ERRORS, atol=6e-7)


def test_golden_search_of_quarot_rows() -> None:
    rows = [[0.01, 0.02, -0.03, 0.5, 0.04, -0.02, 0.03, 0.011], [0.3, -0.2, 0.1, 0.25, -0.15, 0.05, 0.07, -0.29]]
    scales = search_range(jnp.array(rows).T, 4, "symmetric").scales
    np.testing.assert_allclose(scales, [0.07, 0.0415714], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetry", "name"), [("asymmetric", "asym"), ("symmetric", "sym")])
def test_equals_reference_tensors(shared: Path, bits: int, symmetry: Symmetry, name: str) -> None:
    golden = np.load(shared / "golden" / "rtn.npz")
    values = jnp.asarray(golden["W"].T)
    grid = fit(values, bits, symmetry)
    np.testing.assert_allclose(grid.scales, golden[f"scale_{bits}_{name}"][:, 0], rtol=ULPS)
    offset = 0 if symmetry == "asymmetric" else 2 ** (bits - 1)
    np.testing.assert_array_equal(grid.zeros - offset, golden[f"zero_{bits}_{name}"][:, 0])
    np.testing.assert_allclose(round_trip(values, grid, bits).T, golden[f"deq_{bits}_{name}"], rtol=ULPS)


def test_equals_reference_groups_and_search(shared: Path) -> None:
    golden = np.load(shared / "golden" / "rtn.npz")
    values = jnp.asarray(golden["W"].T)
    groups = values.reshape(4, 16, -1)
    grid = expand(fit_grid(*range_of(groups, axis=1), 4, "asymmetric"), 1)
    rounded = decode(encode(groups, grid, 4), grid).reshape(values.shape)
    np.testing.assert_allclose(rounded.T, golden["deq_4_asym_g16"], rtol=ULPS)
    searched = round_trip(values, search_range(values, 4, "asymmetric"), 4)
    np.testing.assert_allclose(searched.T, golden["deq_4_asym_mse"], rtol=2 * ULPS)  # c * low rounds too


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("symmetry", "name"), [("asymmetric", "asym"), ("symmetric", "sym")])
def test_equals_quarot_tensors(shared: Path, bits: int, symmetry: Symmetry, name: str) -> None:
    golden = np.load(shared / "golden" / "quarot_quant.npz")
    values = jnp.asarray(golden["W"].T)
    for grid, suffix in ((fit(values, bits, symmetry), ""), (search_range(values, bits, symmetry), "_clip")):
        key = f"w{bits}_{name}{suffix}"
        np.testing.assert_allclose(grid.scales, golden[f"{key}/scale"][:, 0], rtol=2 * ULPS)
        np.testing.assert_allclose(round_trip(values, grid, bits).T, golden[key], rtol=2 * ULPS)


@PROPERTY
@given(bits=st.integers(2, 8), symmetry=st.sampled_from(SYMMETRIES), seed=st.integers(0, 99))
def test_equals_oracle_in_float64(bits: int, symmetry: Symmetry, seed: int) -> None:
    values = random_groups(seed)
    expected = np.stack([oracle.rounded(group, bits, symmetry) for group in values.T], axis=1)
    with jax.enable_x64(True):
        rounded = round_trip(jnp.asarray(values), fit(jnp.asarray(values), bits, symmetry), bits)
        scales = np.asarray(fit(jnp.asarray(values), bits, symmetry).scales)
    assert rounded.dtype == jnp.float64
    inside = np.ones_like(values, dtype=bool)
    if symmetry == "symmetric_full":  # the largest value lies on a tie, which the last bit of the scale decides
        inside = np.abs(values) < np.abs(values).max(axis=0)
    np.testing.assert_allclose(np.asarray(rounded)[inside], expected[inside], atol=1e-12 * scales.max())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetry", ["asymmetric", "symmetric"])
def test_search_equals_oracle_in_float64(bits: int, symmetry: Symmetry) -> None:
    values = random_groups(bits, group=24)
    with jax.enable_x64(True):
        grid = search_range(jnp.asarray(values), bits, symmetry)
        shrinks = np.asarray(grid.scales / fit(jnp.asarray(values), bits, symmetry).scales)
    expected = [oracle.search(group, bits, symmetry)[0] for group in values.T]
    np.testing.assert_allclose(shrinks, expected, rtol=1e-12)


@PROPERTY
@given(bits=st.integers(2, 8), symmetry=st.sampled_from(["asymmetric", "symmetric"]), seed=st.integers(0, 99))
def test_idempotent_and_within_half_a_step(bits: int, symmetry: Symmetry, seed: int) -> None:
    values = jnp.asarray(random_groups(seed), dtype=jnp.float32)
    grid = fit(values, bits, symmetry)
    once = round_trip(values, grid, bits)
    assert jnp.all(jnp.abs(once - values) <= grid.scales[None] * (0.5 + 1e-4))
    again = round_trip(once, fit(once, bits, symmetry), bits)
    np.testing.assert_allclose(again, once, atol=1e-6 * float(jnp.max(jnp.abs(values))))


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_scaling_by_two_scales_the_result(symmetry: Symmetry) -> None:
    values = jnp.asarray(random_groups(0), dtype=jnp.float32)
    rounded = round_trip(values, search_range(values, 4, symmetry), 4)
    doubled = round_trip(2 * values, search_range(2 * values, 4, symmetry), 4)
    np.testing.assert_allclose(doubled, 2 * rounded, rtol=1e-6)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_search_never_loses_to_the_whole_range(symmetry: Symmetry) -> None:
    values = jnp.asarray(random_groups(1, out=32), dtype=jnp.float32)

    def error(grid: Grid) -> jax.Array:
        return jnp.sum(jnp.abs(round_trip(values, grid, 3) - values) ** 2.4, axis=0)

    searched, whole = error(search_range(values, 3, symmetry)), error(fit(values, 3, symmetry))
    assert jnp.all(searched <= whole * (1 + 1e-6))
    assert jnp.any(searched < 0.9 * whole)


def test_search_keeps_the_larger_range_on_a_tie() -> None:
    values = jnp.array([[-1.0]])  # levels -2..1: exact with scale 1 and with scale 0.5
    assert search_range(values, 2, "symmetric").scales.tolist() == [1.0]


@pytest.mark.parametrize("fitter", [fit, search_range])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_zero_and_vanishing_groups_come_back_as_zero(
    fitter: Callable[[jax.Array, int, Symmetry], Grid], symmetry: Symmetry
) -> None:
    values = jnp.zeros((4, 2)).at[:, 1].set(1e-38)
    grid = fitter(values, 4, symmetry)
    assert jnp.all(grid.scales > 0.1)
    assert not round_trip(values, grid, 4).any()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_zero_is_a_level(symmetry: Symmetry) -> None:
    values = jnp.array([1.0, 2.0, 0.0, 3.0])
    assert round_trip(values, fit(values, 4, symmetry), 4)[2] == 0


def test_full_grid_of_positive_values_does_not_clip_half_of_them() -> None:
    values = jnp.array([0.1, 0.4, 0.9, 1.0])  # GPTQ's code gives [.133, .4, .467, .467]
    np.testing.assert_allclose(round_trip(values, fit(values, 4, "symmetric_full"), 4), values, atol=1 / 15 + 1e-6)


def test_ties_go_to_even_and_ends_are_clipped() -> None:
    grid = Grid(jnp.ones(1), jnp.full(1, 4.0))
    values = jnp.array([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    assert encode(values, grid, 3).tolist() == [0, 2, 4, 4, 6, 6, 7]


def test_bfloat16_values_are_fitted_in_float32() -> None:
    values = WEIGHT.astype(jnp.bfloat16)
    grid = search_range(values, 4, "asymmetric")
    assert grid.scales.dtype == jnp.float32
    widened = values.astype(jnp.float32)
    np.testing.assert_array_equal(encode(values, expand(grid, 0), 4), encode(widened, expand(grid, 0), 4))


def test_values_that_are_not_finite_stay_visible() -> None:
    values = WEIGHT.at[0, 0].set(jnp.nan)
    assert jnp.isnan(search_range(values, 4, "symmetric").scales).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cast_scales_gives_what_the_dtype_holds(dtype: str) -> None:
    grid = Grid(jnp.array([0.1, 1e-12, 3.0]), jnp.array([8.0, 7.0, 0.0]))
    stored = cast_scales(grid, dtype)
    np.testing.assert_array_equal(stored.scales.astype(dtype).astype(jnp.float32), stored.scales)
    np.testing.assert_allclose(stored.scales[jnp.array([0, 2])], [0.1, 3.0], rtol=4e-3)
    assert stored.scales.dtype == jnp.float32
    assert stored.scales[1] > 0
    np.testing.assert_array_equal(stored.zeros, grid.zeros)


def test_straight_through_is_exact_forward_and_identity_backward() -> None:
    values = jnp.linspace(-3.0, 3.0, 13)
    rounded = jnp.round(values * 3) / 3
    np.testing.assert_array_equal(straight_through(values, rounded), rounded)
    gradient = jax.grad(lambda x, y: straight_through(x, y).sum(), argnums=(0, 1))(values, rounded)
    assert (gradient[0] == 1).all()
    assert not gradient[1].any()


@pytest.mark.parametrize(
    ("bits", "symmetry"), [(0, "asymmetric"), (9, "symmetric"), (1, "symmetric"), (1, "symmetric_full")]
)
def test_refuses_bits(bits: int, symmetry: Symmetry) -> None:
    with pytest.raises(FormatError, match=f"{bits} bits given"):
        fit(WEIGHT, bits, symmetry)


@pytest.mark.parametrize("steps", [0, 101])
def test_refuses_steps(steps: int) -> None:
    with pytest.raises(FormatError, match="1 to 100"):
        search_range(WEIGHT, 4, "symmetric", steps=steps)
