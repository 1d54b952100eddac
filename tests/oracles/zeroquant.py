"""Oracle for ZeroQuant's group-wise symmetric rounding: numpy float64."""

import numpy as np


def quantized(weight: np.ndarray, bits: int, number_of_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [groups] and signed codes [out, in] of a weight [out, in], flattened row by row."""
    runs = weight.astype(np.float64).reshape(number_of_groups, -1)
    scales = 2 * np.abs(runs).max(axis=1) / 2**bits
    safe = np.where(scales == 0, 1.0, scales)
    codes = np.clip(np.rint(runs / safe[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scales, codes.reshape(weight.shape)
