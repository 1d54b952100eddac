"""SpQR in float64 numpy, in the paper's order and orientation: W [out, in], column by column, no blocks.

Every fit and every leave-one-out fit is a plain loop. `degenerate` tells what a range without width becomes: "exact",
or "unit", the reference's [-1, 1].
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.gptq import damped


class Solution(NamedTuple):
    """Codes, outliers and weights [out, in] in processing order, the order, the threshold and the sum of e^2."""

    codes: np.ndarray
    outliers: np.ndarray
    dense: np.ndarray
    order: np.ndarray
    threshold: float
    loss: float

    def restored(self) -> np.ndarray:
        """The weights in the model's order of inputs."""
        result = np.zeros_like(self.dense)
        result[:, self.order] = self.dense
        return result


def fit(values: np.ndarray, bits: int, degenerate: str) -> tuple[float, float]:
    """Scale and real zero of one group; zero need not be in its range."""
    low, high = values.min(), values.max()
    if high - low <= 2**-10 * max(abs(low), abs(high)) and degenerate == "exact":
        middle = (low + high) / 2
        return abs(middle), 2 ** (bits - 1) - (1.0 if middle > 0 else 0.0)
    if low == high:
        low, high = -1.0, 1.0
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale


def nearest(values: np.ndarray, scale: float, zero: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the values that they stand for."""
    codes = np.clip(np.round(values / (scale or 1.0) + zero), 0, 2**bits - 1)
    return codes, scale * (codes - zero)


def second(statistic: np.ndarray, bits: int | None, group: int, degenerate: str) -> np.ndarray:
    """One statistic of all outputs, rounded on the grid of each run of `group` outputs."""
    if bits is None:
        return statistic
    rounded = np.zeros_like(statistic)
    for start in range(0, len(statistic), group):
        values = statistic[start : start + group]
        low, high = values.min(), values.max()
        if low == high and degenerate == "unit":
            low, high = -1.0, 1.0
        step = (high - low) / (2**bits - 1)
        codes = np.clip(np.round((values - low) / step), 0, 2**bits - 1) if step else np.zeros_like(values)
        rounded[start : start + group] = low + step * codes
    return rounded


def leave_one_out(
    group: np.ndarray, removed: np.ndarray, weights: np.ndarray, bits: int, limit: float, degenerate: str
) -> np.ndarray:
    """Which values of one group would lower its squared error by more than `limit` if the grid had not to fit them."""

    def errors(kept: np.ndarray) -> np.ndarray:
        return ((nearest(group, *fit(group[kept], bits, degenerate), bits)[1] - group) * weights) ** 2

    everything = np.ones(len(group), bool)
    whole, gains = errors(everything).sum(), np.zeros(len(group))
    for one in range(len(group)):
        others = everything & (np.arange(len(group)) != one)
        gains[one] = whole - errors(others)[others].sum()
    if degenerate == "exact" and np.all((gains > limit) | removed):
        return gains == gains.max()
    return gains > limit


def fill(group: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The group with what is removed replaced by the mean of the rest."""
    return np.where(removed, group[~removed].sum() / max((~removed).sum(), 1), group)


def spqr(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group: int,
    scale_bits: int | None = 3,
    zero_bits: int | None = 3,
    second_group: int = 16,
    threshold: float = np.inf,
    order: str = "activation",
    damping: float = 0.01,
    search: str = "leave_one_out",
    degenerate: str = "exact",
) -> Solution:
    """Round the columns of W in turn; a column's errors beyond the threshold stay as they are."""
    rows, columns = weight.shape
    diagonal = np.diag(hessian)
    sequence = np.argsort(-diagonal, kind="stable") if order == "activation" else np.arange(columns)
    left = np.where(diagonal == 0, 0.0, weight.astype(np.float64))[:, sequence]
    revived = hessian.astype(np.float64) + np.diag((diagonal == 0) * diagonal[diagonal > 0].mean())  # dead: as the mean
    upper = np.linalg.cholesky(np.linalg.inv(damped(revived, damping)[np.ix_(sequence, sequence)])).T
    alive = diagonal[sequence] > 0
    inverse = alive / np.diag(upper)
    limit = threshold * np.mean(left.var(axis=0, ddof=1) * inverse**2) if threshold < np.inf else np.inf
    codes, outliers = np.zeros((rows, columns), int), np.zeros((rows, columns), bool)
    dense, loss = np.zeros((rows, columns)), 0.0
    for j in range(columns):
        if j % group == 0:
            part, own = slice(j, j + group), inverse[j : j + group]
            fits = []
            for row in left[:, part]:
                removed = ~alive[part]
                if search == "leave_one_out" and limit < np.inf:
                    removed = removed | leave_one_out(fill(row, removed), removed, own, bits, limit, degenerate)
                fits.append(fit(fill(row, removed), bits, degenerate))
            scale = second(np.array([one[0] for one in fits]), scale_bits, second_group, degenerate)
            zero = second(np.array([one[1] for one in fits]), zero_bits, second_group, degenerate)
        for i in range(rows):
            _, value = nearest(left[i, j], scale[i], zero[i], bits)
            outliers[i, j] = ((left[i, j] - value) * inverse[j]) ** 2 > limit
            codes[i, j], value = nearest(0.0 if outliers[i, j] else left[i, j], scale[i], zero[i], bits)
            dense[i, j] = left[i, j] if outliers[i, j] else value
        error = (left[:, j] - dense[:, j]) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
        loss += np.sum(error**2)
    return Solution(codes, outliers, dense, sequence, limit, loss)
