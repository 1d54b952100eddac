"""Weighted k-means on a line: the codebook of least weighted squared error, found exactly on a histogram.

Sorted, the clusters of an optimum are intervals. With W(i, j) = sum of w and M(i, j) = sum of w x over the bins i to
j - 1, whose error about their mean is sum w x^2 - M^2 / W, the best k intervals of the first j bins gain

    G_k(j) = max over i < j of  G_{k-1}(i) + M(i, j)^2 / W(i, j)

and the best i grows with j, so that halves are searched between the answers of their middle (divide and conquer,
O(k n log n)). Bins keep the sums of their values, so that means are exact; only the borders lie on edges of bins.
There is no start to choose and nothing random, where Lloyd's algorithm (sklearn's KMeans) ends where its start leads.

On the host, in float64: it is a solve of milliseconds whose result shall not depend on the order of a device's sums.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jquant.errors import CalibrationError

BINS: Final = 2**14  # of [-1, 1]; the signposts of 4 bits lie some 2,000 bins apart


class Histogram(NamedTuple):
    """Sums over the values in each bin of [-1, 1], float64 [bins].

    Attributes:
      masses: sum of weights.
      moments: sum of weight * value.
      counts: number of values.
      sums: sum of values.
      squares: sum of squared values.
    """

    masses: np.ndarray
    moments: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    def plus(self, other: "Histogram") -> "Histogram":
        """Returns the histogram of both sets of values."""
        return Histogram(*(mine + its for mine, its in zip(self, other, strict=True)))


def count_values(
    values: Float[np.ndarray, "*shape"], weights: Float[np.ndarray, "*shape"], bins: int = BINS
) -> Histogram:
    """Returns the histogram of the values that lie in [-1, 1]; others are left out.

    Example:
      >>> found = count_values(np.array([-1.0, 0.5, 1.0, 7.0]), np.array([1.0, 2.0, 3.0, 4.0]), bins=2)
      >>> found.masses.tolist(), found.moments.tolist()
      ([1.0, 5.0], [-1.0, 4.0])
    """
    inside = np.abs(values) <= 1.0
    x, w = values[inside].astype(np.float64), weights[inside].astype(np.float64)
    places = np.minimum(((x + 1.0) * (bins / 2)).astype(np.int64), bins - 1)
    return Histogram(*(np.bincount(places, sums, bins) for sums in (w, w * x, np.ones_like(x), x, x * x)))


def weighted_kmeans(histogram: Histogram, clusters: int) -> Float[np.ndarray, "{clusters}"]:
    """Returns the sorted means of the clusters of least weighted squared error.

    Where fewer bins than clusters have weight, the largest mean is repeated.

    Args:
      histogram: of the values.
      clusters: how many means.

    Raises:
      CalibrationError: no value has a weight above zero, or one is not finite.

    Example:
      >>> x, w = np.array([-0.9, -0.8, 0.1, 0.2, 0.9]), np.array([1.0, 1.0, 3.0, 1.0, 1.0])
      >>> weighted_kmeans(count_values(x, w), 3).round(3).tolist()
      [-0.85, 0.125, 0.9]
    """
    occupied = histogram.masses > 0.0
    if not occupied.any() or not np.isfinite(histogram.masses).all():
        raise CalibrationError(
            "a codebook cannot be fitted: no value has a finite weight above zero. The gradients of the calibration "
            "text vanish or overflow: load the model in a wider dtype (--dtype float32) or use more text"
        )
    masses = np.concatenate([[0.0], np.cumsum(histogram.masses[occupied])])
    moments = np.concatenate([[0.0], np.cumsum(histogram.moments[occupied])])
    grows = np.concatenate([[True], np.diff(masses) > 0.0])  # a bin too light to change the sum goes with the next
    masses, moments = masses[grows], moments[grows]
    count = len(masses) - 1

    def gain(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.square(moments[last] - moments[first]) / (masses[last] - masses[first])

    parts = min(clusters, count)
    ends = np.arange(1, count + 1)
    best = np.concatenate([[-np.inf], gain(np.zeros_like(ends), ends)])  # by the number of bins taken
    borders = []
    for part in range(2, parts + 1):
        best, chosen = _split(best, part, gain)
        borders.append(chosen)
    cuts = [count]
    for chosen in reversed(borders):
        cuts.append(int(chosen[cuts[-1]]))
    edges = np.array([0, *reversed(cuts)])
    means = np.diff(moments[edges]) / np.diff(masses[edges])
    return np.concatenate([means, np.repeat(means[-1:], clusters - parts)])


def match_spread(histogram: Histogram, codebook: Float[np.ndarray, "clusters"]) -> Float[np.ndarray, "clusters"]:
    """Returns the levels that give rounded values the mean and the deviation that they had: KVQuant's Q-Norm.

    With m, s of the values and m', s' of the codebook's entries nearest to them, all unweighted,

        level = (entry - m') s / s' + m

    Codes are those of the codebook; only what they stand for is moved.

    Args:
      histogram: of the values.
      codebook: sorted.

    Example:
      >>> values = np.array([-1.0, -0.5, 0.5, 1.0])
      >>> match_spread(count_values(values, np.ones(4)), np.array([-0.75, 0.75])).round(4).tolist()
      [-0.7906, 0.7906]
    """
    counts, total = histogram.counts, histogram.counts.sum()
    mean = histogram.sums.sum() / total
    deviation = np.sqrt(max(histogram.squares.sum() / total - mean**2, 0.0))
    centers = np.where(counts > 0, histogram.sums / np.maximum(counts, 1), 0.0)
    entries = codebook[np.searchsorted(_middles(codebook), centers)]
    rounded_mean = (counts * entries).sum() / total
    rounded = np.sqrt((counts * np.square(entries - rounded_mean)).sum() / total)
    return (codebook - rounded_mean) * (deviation / rounded if rounded > 0.0 else 1.0) + mean


def nearest_code(x: Float[Array, "*shape"], codebook: Float[Array, "clusters"]) -> UInt8[Array, "*shape"]:
    """Returns the places of the nearest entries of a sorted codebook of at most 256; of two as near, the lower.

    Example:
      >>> nearest_code(jnp.array([-2.0, 0.4, 0.5, 0.6]), jnp.array([0.0, 1.0])).tolist()
      [0, 0, 0, 1]
    """
    middles = (codebook[1:] + codebook[:-1]) / 2.0
    passed = x[..., None] > jnp.broadcast_to(middles.astype(x.dtype), (*x.shape, middles.shape[0]))
    return jnp.sum(passed, axis=-1, dtype=jnp.uint8)


def _middles(codebook: np.ndarray) -> np.ndarray:
    return (codebook[1:] + codebook[:-1]) / 2.0


def _split(
    best: np.ndarray, part: int, gain: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best gains of `part` clusters by the number of bins taken, and where the last of them begins.

    All searches of one depth of the recursion are one array: that of the middle of each range of ends, between the
    answers at the range's neighbours.
    """
    count = len(best) - 1
    gains, chosen = np.full(count + 1, -np.inf), np.zeros(count + 1, np.int64)
    low, high, left, right = (np.array([bound]) for bound in (part, count, part - 1, count - 1))
    while len(low):
        middle = (low + high) // 2
        lengths = np.minimum(right, middle - 1) - left + 1
        starts = np.cumsum(lengths) - lengths
        first = np.arange(lengths.sum()) - np.repeat(starts - left, lengths)
        values = best[first] + gain(first, np.repeat(middle, lengths))
        gains[middle] = np.maximum.reduceat(values, starts)
        hits = np.flatnonzero(values == np.repeat(gains[middle], lengths))
        answer = first[hits[np.searchsorted(hits, starts)]]
        chosen[middle] = answer
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        left, right = np.concatenate([left, answer]), np.concatenate([answer, right])
        low, high, left, right = (bound[low <= high] for bound in (low, high, left, right))
    return gains, chosen
