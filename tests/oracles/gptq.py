"""GPTQ in float64 numpy, in the paper's order and orientation: W [out, in], column by column, no blocks."""

import numpy as np


def inverse_upper(hessian: np.ndarray, damping: float) -> np.ndarray:
    """U with inv(H + damping * mean(diag H) * I) = U^T U, by inverting and factoring as the paper does."""
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def asymmetric_grid(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of each row."""
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    scale = (high - low) / (2**bits - 1)
    return scale, np.round(-low / scale)


def gptq(weight, hessian, bits, *, group=None, activation=False, dynamic=False, damping=0.01):
    """Returns (codes, dequantized, sum of squared errors), columns in the model's order."""
    rows, columns = weight.shape
    group = group or columns
    order = np.argsort(-np.diag(hessian), kind="stable") if activation else np.arange(columns)
    grids = [asymmetric_grid(weight[:, start : start + group], bits) for start in range(0, columns, group)]
    left, upper = weight[:, order].astype(np.float64), inverse_upper(hessian[np.ix_(order, order)], damping)
    codes, dense, total = np.zeros((rows, columns)), np.zeros((rows, columns)), 0.0
    for j in range(columns):
        if dynamic and j % group == 0:
            scale, zero = asymmetric_grid(left[:, j : j + group], bits)
        elif not dynamic:
            scale, zero = grids[order[j] // group]
        code = np.clip(np.round(left[:, j] / scale) + zero, 0, 2**bits - 1)
        value = scale * (code - zero)
        error = (left[:, j] - value) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
        codes[:, order[j]], dense[:, order[j]] = code, value
        total += np.sum(error**2)
    return codes.astype(int), dense, total
