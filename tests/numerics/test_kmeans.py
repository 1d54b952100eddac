"""Weighted k-means on a line: the optimum against every border tried, and against sklearn's in the golden tensors."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import CalibrationError
from jquant.numerics import count_values, match_spread, nearest_code, weighted_kmeans
from tests.oracles import kvquant as oracle


@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
def test_the_optimum_equals_that_of_all_borders(clusters: int) -> None:
    generator = np.random.default_rng(clusters)
    for count in (clusters, clusters + 1, 40):
        # bins of 1/64 with at most one value each, so that the histogram loses nothing
        points = generator.choice(np.arange(-63, 64), count, replace=False) / 64
        weights = generator.exponential(size=count) ** 3
        found = weighted_kmeans(count_values(points, weights, bins=256), clusters)
        expected = oracle.kmeans(points, weights, clusters)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_no_codebook_of_sklearn_is_better(shared: Path) -> None:
    golden = np.load(shared / "golden" / "kvquant.npz")
    x, weights = golden["calib"].astype(np.float64), golden["fisher"]
    ends = {
        "K": (golden["K3/lower"], golden["K3/upper"]),
        "V": tuple(np.quantile(x, [0.005, 0.995], axis=1)[..., None]),
    }
    for name, (low, high) in ends.items():
        points = (x - (high + low) / 2) / ((high - low) / 2)
        inside = np.abs(points) <= 1
        for bits in (2, 3, 4):
            theirs = golden[f"{name}{bits}/lut"].astype(np.float64)
            ours = weighted_kmeans(count_values(points, weights), 2**bits)
            found, reference = (oracle.objective(points[inside], weights[inside], book) for book in (ours, theirs))
            # sklearn's start costs up to 2.4 % here, at 16 clusters; a border on an edge of bins 2^-13 wide costs less
            assert 0.97 * reference < found < (1 + 1e-6) * reference


def test_fewer_values_than_clusters_repeat_the_largest() -> None:
    found = weighted_kmeans(count_values(np.array([0.25, -0.5, 9.0]), np.array([1.0, 2.0, 5.0])), 4)
    assert found.tolist() == [-0.5, 0.25, 0.25, 0.25]


def test_weights_that_are_lost_in_the_sum_are_no_clusters() -> None:
    found = weighted_kmeans(count_values(np.array([-0.75, -0.5, 0.5, 0.625]), np.array([1.0, 1e-30, 1.0, 1e-30])), 4)
    assert found.tolist() == [-0.75, 0.5, 0.5, 0.5]


def test_histograms_add_up() -> None:
    values, weights = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 50)), np.ones((2, 50))
    parts = [count_values(*row) for row in zip(values, weights, strict=True)]
    for both, whole in zip(parts[0].plus(parts[1]), count_values(values, weights), strict=True):
        np.testing.assert_allclose(both, whole, atol=1e-15)


def test_levels_keep_mean_and_deviation() -> None:
    values = np.clip(np.random.default_rng(0).normal(0.2, 0.3, 1000), -1, 1)
    codebook = np.array([-0.8, -0.1, 0.3, 0.9])
    levels = match_spread(count_values(values, np.ones_like(values)), codebook)
    rounded = levels[np.asarray(nearest_code(jnp.asarray(values, jnp.float32), jnp.asarray(codebook, jnp.float32)))]
    # values near a border may fall to another code than the mean of their bin, 2^-13 wide
    assert rounded.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert rounded.std() == pytest.approx(values.std(), rel=1e-3)
    single = match_spread(count_values(values, np.ones_like(values)), np.array([0.7]))
    assert single.tolist() == pytest.approx([values.mean()])


@pytest.mark.parametrize("weight", [0.0, np.nan])
def test_values_without_weights_are_refused(weight: float) -> None:
    with pytest.raises(CalibrationError, match="no value has a finite weight above zero"):
        weighted_kmeans(count_values(np.zeros(3), np.full(3, weight)), 2)
