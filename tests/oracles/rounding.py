"""Oracle for uniform grids and their range search, one group at a time: numpy float64."""

import numpy as np


def fit(group: np.ndarray, bits: int, symmetry: str, shrink: float = 1.0) -> tuple[float, float]:
    """Scale and zero of one group, from the range of its values with zero inside."""
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    low, high = shrink * low, shrink * high
    if symmetry == "asymmetric":
        scale = (high - low) / (2**bits - 1)
        return scale, float(np.rint(-low / scale))
    largest = max(abs(low), high)
    scale = largest / (2 ** (bits - 1) - 1) if symmetry == "symmetric" else 2 * largest / (2**bits - 1)
    return scale, float(2 ** (bits - 1))


def encode(group: np.ndarray, scale: float, zero: float, bits: int) -> np.ndarray:
    return np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1)


def rounded(group: np.ndarray, bits: int, symmetry: str, shrink: float = 1.0) -> np.ndarray:
    """The group after rounding to its own grid."""
    scale, zero = fit(group, bits, symmetry, shrink)
    return scale * (encode(group, scale, zero, bits) - zero)


def search(group: np.ndarray, bits: int, symmetry: str) -> tuple[float, float]:
    """Best fraction of the range, and its error sum |w - w_c|^2.4; ties keep the larger fraction."""
    best, best_error = 1.0, np.inf
    for i in range(80):
        shrink = 1 - i / 100
        error = (np.abs(rounded(group, bits, symmetry, shrink) - group) ** 2.4).sum()
        if error < best_error:
            best, best_error = shrink, error
    return best, best_error
