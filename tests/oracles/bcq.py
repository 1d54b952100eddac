"""Oracle for BCQ and its table lookup, one group or one output at a time: numpy float64."""

import itertools

import numpy as np


def greedy(group: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Alphas [bits] and signs [size, bits]; a zero residual has sign +1."""
    residual = group.astype(np.float64)
    alphas, signs = [], []
    for _ in range(bits):
        sign = np.where(residual >= 0, 1.0, -1.0)
        alphas.append(np.abs(residual).mean())
        signs.append(sign)
        residual = residual - alphas[-1] * sign
    return np.array(alphas), np.stack(signs, axis=1)


def nearest(group: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Signs [size, bits] of the nearest of all 2^bits sums, by trying each; the higher of two equally near."""
    patterns = np.array(list(itertools.product([-1.0, 1.0], repeat=len(alphas))))
    levels = patterns @ alphas
    order = np.argsort(-levels, kind="stable")
    return patterns[order][np.abs(group[:, None] - levels[order]).argmin(axis=1)]


def fit(group: np.ndarray, bits: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Alphas and signs after rounds of least squares (of least norm where they are not unique) and assignment."""
    alphas, signs = greedy(group, bits)
    for _ in range(rounds if bits > 1 else 0):
        alphas = np.sort(np.abs(np.linalg.lstsq(signs, group, rcond=None)[0]))[::-1]
        signs = nearest(group, alphas)
    return alphas, signs


def dequantized(weight: np.ndarray, bits: int, size: int, rounds: int) -> np.ndarray:
    """The weight [out, in] after the fit of each group of `size` inputs."""
    result = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            alphas, signs = fit(weight[row, start : start + size], bits, rounds)
            result[row, start : start + size] = signs @ alphas
    return result


def table(chunk: np.ndarray) -> np.ndarray:
    """The 256 sums of eight inputs: bit j of the entry's number tells the sign of input j."""
    return np.array([sum(x if entry >> j & 1 else -x for j, x in enumerate(chunk)) for entry in range(256)])
