"""QRazor in float64 numpy, in the paper's order and orientation: W [out, in], groups of neighbours in a row."""

import numpy as np


def razor(integers: np.ndarray, bits: int, group: int, fidelity: str) -> np.ndarray:
    """Razor the rows of integers; the result is on the integers' own scale again."""
    result = np.empty(integers.shape)
    top = 2 ** (bits - 1) - 1
    for row, values in enumerate(integers):
        for start in range(0, len(values), group):
            members = [int(value) for value in values[start : start + group]]
            union = 0
            for member in members:
                union |= abs(member)
            dropped = max(0, len(f"{union:b}" if union else "") - (bits - 1))
            for place, member in enumerate(members):
                kept = np.rint(abs(member) / 2**dropped)
                limit = top + 1 if member < 0 and fidelity == "reference" else top
                result[row, start + place] = np.sign(member) * min(kept, limit) * 2**dropped
    return result


def scale_of(values: np.ndarray, base_bits: int, step: str) -> float:
    """The step of the integers of one row; a row of zeros counts as [-1, 1]."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    return max(-low, high) / (2 ** (base_bits - 1) - 1) if step == "absmax" else (high - low) / (2**base_bits - 1)


def integers_of(values: np.ndarray, scale: float, base_bits: int, step: str, fidelity: str) -> np.ndarray:
    """The integers of one row on a scale."""
    top = 2 ** (base_bits - 1) - 1 if step == "absmax" else 2**base_bits - 1
    bottom = -top - 1 if step == "absmax" and fidelity == "reference" else -top
    return np.clip(np.rint(values / scale), bottom, top)


def qrazor(
    weight: np.ndarray,
    base_bits: int = 8,
    bits: int = 4,
    group: int = 8,
    *,
    step: str = "absmax",
    clip: str = "none",
    fidelity: str = "reference",
) -> np.ndarray:
    """The dense weight after both stages, one scale for each row; "search" tries 80 shrunk scales."""
    rows = []
    for row in weight.astype(np.float64):
        best, best_error = row, np.inf
        for i in range(80 if clip == "search" else 1):
            scale = (1 - i / 100) * scale_of(row, base_bits, step)
            integers = integers_of(row, scale, base_bits, step, fidelity)
            dense = scale * razor(integers[None], bits, group, fidelity)[0]
            error = (np.abs(dense - row) ** 2.4).sum()
            if error < best_error:
                best, best_error = dense, error
        rows.append(best)
    return np.stack(rows)


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int = 4,
    group: int = 8,
    *,
    base_bits: int = 8,
    order: str = "activation",
    damping: float = 0.01,
    fidelity: str = "reference",
) -> tuple[np.ndarray, float]:
    """GPTQ whose columns are razored in groups of `group` neighbouring rows; the dense weight and the sum of e^2."""
    weight, diagonal = weight.astype(np.float64), np.diag(hessian)
    weight = np.where(diagonal == 0, 0.0, weight)
    alive = hessian + np.diag((diagonal == 0) * diagonal[diagonal > 0].mean())
    damped = alive + damping * np.mean(np.diag(alive)) * np.eye(len(alive))
    sequence = np.argsort(-diagonal, kind="stable") if order == "activation" else np.arange(len(alive))
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(sequence, sequence)])).T
    scales = np.array([scale_of(row, base_bits, "absmax") for row in weight])
    left, dense, loss = weight[:, sequence], np.zeros_like(weight), 0.0
    for j, column in enumerate(sequence):
        integers = integers_of(left[:, j], scales, base_bits, "absmax", fidelity)
        dense[:, column] = scales * razor(integers[None], bits, group, fidelity)[0]
        error = (left[:, j] - dense[:, column]) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
        loss += np.sum(error**2)
    return dense, loss
