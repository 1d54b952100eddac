"""KVQuant in numpy, float64, number by number, in the paper's order."""

import numpy as np


def round_to(x: float, low: float, high: float, codebook: np.ndarray, levels: np.ndarray) -> float:
    """Round one number on a range; one without width stands for itself."""
    middle, half = (high + low) / 2, (high - low) / 2
    steps = (x - middle) / (half or 1.0)
    return half * levels[np.argmin(np.abs(codebook - steps))] + middle


def code_key(
    key: np.ndarray, low: np.ndarray, high: np.ndarray, codebook: np.ndarray, levels: np.ndarray, slots: int
) -> np.ndarray:
    """Round one token's key [channels]; of the outliers the `slots` that stick out most stay."""
    half = np.where(high > low, (high - low) / 2, 1.0)
    distance = np.abs(key - (high + low) / 2) / half
    outliers = [channel for channel in range(len(key)) if key[channel] > high[channel] or key[channel] < low[channel]]
    kept = sorted(outliers, key=lambda channel: -distance[channel])[:slots]
    coded = [round_to(*numbers, codebook, levels) for numbers in zip(key, low, high, strict=True)]
    return np.array([x if channel in kept else coded[channel] for channel, x in enumerate(key)])


def code_value(value: np.ndarray, share: float, codebook: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Round one token's value [channels]; what is at or beyond the quantiles stays, the range is that of the others."""
    high, low = np.quantile(value, 1 - share / 2), np.quantile(value, share / 2)
    outlier = (value >= high) | (value <= low) if share else np.zeros(len(value), bool)
    rest = np.where(outlier, np.median(value), value)
    coded = [round_to(x, rest.min(), rest.max(), codebook, levels) for x in value]
    return np.where(outlier, value, coded)


def kmeans(points: np.ndarray, weights: np.ndarray, clusters: int) -> np.ndarray:
    """Return the means of the best intervals of the sorted points, every border tried."""
    order = np.argsort(points)
    x, w = points[order].astype(np.float64), weights[order].astype(np.float64)
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (w, w * x, w * x * x)]

    def error(first: np.ndarray, last: int) -> np.ndarray:
        mass, moment, square = (one[last] - one[first] for one in sums)
        return square - moment**2 / np.where(mass > 0, mass, 1.0)

    count = len(x)
    best = np.full((clusters + 1, count + 1), np.inf)
    start = np.zeros((clusters + 1, count + 1), int)
    best[0, 0] = 0.0
    for part in range(1, clusters + 1):
        for last in range(part, count + 1):
            first = np.arange(part - 1, last)
            errors = best[part - 1, first] + error(first, last)
            best[part, last], start[part, last] = errors.min(), first[errors.argmin()]
    means, last = [], count
    for part in range(clusters, 0, -1):
        first = start[part, last]
        means.append(np.average(x[first:last], weights=w[first:last]))
        last = first
    return np.array(means[::-1])


def objective(points: np.ndarray, weights: np.ndarray, codebook: np.ndarray) -> float:
    """Return the weighted squared distance of points to the nearest entry."""
    nearest = np.abs(points.reshape(-1, 1) - codebook.reshape(1, -1)).min(axis=1)
    return float(np.sum(weights.reshape(-1).astype(np.float64) * np.square(nearest)))
