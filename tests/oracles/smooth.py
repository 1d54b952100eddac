"""Oracle for SmoothQuant: numpy float64, weights [out, in] as in the paper."""

import numpy as np


def factors(absmax: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """s_j = a_j^alpha / w_j^(1 - alpha), w_j the largest |W_ij| of all linears; 1 where a_j is 0."""
    found = np.ones(len(absmax))
    for channel, largest in enumerate(absmax.astype(np.float64)):
        heaviest = max(max(np.abs(weight[:, channel].astype(np.float64)).max() for weight in weights), 1e-5)
        if largest > 0:
            found[channel] = max(largest**alpha / heaviest ** (1 - alpha), 1e-5)
    return found
