"""Oracle for Cayley SGD: numpy float64, in the order of the published algorithm, its fixed-point iteration and all."""

import numpy as np


def update(
    matrix: np.ndarray,
    momentum: np.ndarray,
    gradient: np.ndarray,
    *,
    learning_rate: float,
    decay: float = 0.0,
    iterations: int = 60,
) -> tuple[np.ndarray, np.ndarray]:
    """One update of an orthogonal T, the transpose of the published X; 60 iterations reach the exact transform."""
    rows = matrix.T
    v = decay * momentum - gradient
    mx = v @ rows
    w_hat = mx - 0.5 * rows.T @ (rows @ mx)
    w = w_hat - w_hat.T
    alpha = min(1 / (np.abs(w).sum(axis=0).max() + 1e-8), learning_rate)
    y = rows.T + alpha * v
    for _ in range(iterations):
        y = rows.T + alpha * (w @ (rows.T + y)) / 2
    return y, w @ rows.T
