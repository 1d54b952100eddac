"""GPTQ in float64 numpy, in the paper's order and orientation: W [out, in], column by column, no blocks."""

from typing import NamedTuple

import numpy as np


class Solution(NamedTuple):
    """Codes and weights [out, in] in the model's order of inputs, and the sum of the squared errors e."""

    codes: np.ndarray
    dense: np.ndarray
    loss: float


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """H + damping * mean(diag H) * I, inputs that were always zero given the mean of the others as H_jj."""
    diagonal = np.diag(hessian)
    alive = hessian + np.diag((diagonal == 0) * diagonal[diagonal > 0].mean())
    return alive + damping * np.mean(np.diag(alive)) * np.eye(len(alive))


def fit(values: np.ndarray, bits: int, symmetry: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of each row, zero inside its range; a row of zeros counts as [-1, 1]."""
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    empty = (low == 0) & (high == 0)
    low, high = np.where(empty, -1.0, low), np.where(empty, 1.0, high)
    if symmetry == "asymmetric":
        scale = (high - low) / (2**bits - 1)
        return scale, np.round(-low / scale)
    largest = np.maximum(-low, high)
    scale = largest / (2 ** (bits - 1) - 1) if symmetry == "symmetric" else 2 * largest / (2**bits - 1)
    return scale, np.full_like(scale, 2.0 ** (bits - 1))


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    symmetry: str = "asymmetric",
    group: int | None = None,
    order: str = "natural",
    groups: str = "static",
    damping: float = 0.01,
) -> Solution:
    """Round the columns of W in turn, each error spread over the columns to come by the upper factor of H^-1."""
    rows, columns = weight.shape
    group = group or columns
    diagonal = np.diag(hessian)
    sequence = np.argsort(-diagonal, kind="stable") if order == "activation" else np.arange(columns)
    weight = np.where(diagonal == 0, 0.0, weight.astype(np.float64))
    grids = [fit(weight[:, start : start + group], bits, symmetry) for start in range(0, columns, group)]
    left = weight[:, sequence]
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, damping)[np.ix_(sequence, sequence)])).T
    codes, dense, loss = np.zeros((rows, columns), int), np.zeros((rows, columns)), 0.0
    for j, column in enumerate(sequence):
        if groups == "static":
            scale, zero = grids[column // group]
        elif j % group == 0:
            scale, zero = fit(left[:, j : j + group], bits, symmetry)  # the weight as updated by now
        code = np.clip(np.round(left[:, j] / scale) + zero, 0, 2**bits - 1)
        value = scale * (code - zero)
        error = (left[:, j] - value) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
        codes[:, column], dense[:, column] = code, value
        loss += np.sum(error**2)
    return Solution(codes, dense, loss)
