"""QuIP in float64 numpy, in the paper's orientation: W [out, in], one column after the other, dense rotations."""

from typing import NamedTuple

import numpy as np

MASK = 2**32 - 1


class Solution(NamedTuple):
    """Codes [out, in] in the model's order of inputs, and tr((q - t) H (q - t)^T)."""

    codes: np.ndarray
    loss: float


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    return hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def rescale(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """D, by which the columns of W are multiplied."""
    norms = np.clip((weight**2).sum(0), 1e-8, None)
    return np.maximum((np.clip(np.diag(hessian / np.abs(hessian).max()), 1e-8, None) / norms) ** 0.25, 1e-8)


def loss(codes: np.ndarray, target: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.trace((codes - target) @ hessian @ (codes - target).T))


def near(target: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.floor(target + 0.5), 0, top)


def order_of(hessian: np.ndarray, order: str) -> np.ndarray:
    if order == "activation":
        return np.argsort(-np.diag(hessian), kind="stable")
    return np.arange(len(hessian)) if order == "natural" else np.arange(len(hessian))[::-1]


def ldlq(target: np.ndarray, hessian: np.ndarray, top: int | None, order: str) -> np.ndarray:
    """Round t column by column; `hessian` is damped already."""
    sequence = order_of(hessian, order)
    ahead = hessian[np.ix_(sequence[::-1], sequence[::-1])]
    root = np.linalg.cholesky(ahead)
    unit = (root / np.diag(root))[::-1, ::-1]  # upper
    codes = target.astype(float).copy()
    for place, column in enumerate(sequence):
        before = sequence[:place]
        feedback = (target[:, before] - codes[:, before]) @ unit[:place, place]
        codes[:, column] = np.floor(target[:, column] + feedback + 0.5)
        if top is not None:
            codes[:, column] = np.clip(codes[:, column], 0, top)
    return codes


def greedy(
    codes: np.ndarray, target: np.ndarray, hessian: np.ndarray, top: int, order: str, passes: int, stale: bool = False
) -> np.ndarray:
    """Coordinate descent from `codes`; `stale` clips after each pass and keeps the errors of before, a bug."""
    codes = codes.astype(float).copy()
    errors = codes - target
    for _ in range(passes):
        for column in order_of(hessian, order):
            new = np.round(codes[:, column] - errors @ hessian[:, column] / hessian[column, column])
            new = new if stale else np.clip(new, 0, top)
            errors[:, column] += new - codes[:, column]
            codes[:, column] = new
        codes = np.clip(codes, 0, top)
    return codes


def mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def bits(seed: int, stream: int, count: int) -> np.ndarray:
    start = mix(seed ^ mix(stream + 1))
    return np.array([mix(mix((index * 0x9E3779B9 + start) & MASK) ^ start) for index in range(count)], np.uint64)


def orthogonal(numbers: np.ndarray, order: int) -> list[np.ndarray]:
    """Haar matrices by Stewart's algorithm, one reflection after the other."""
    radius, angle = np.split((numbers >> np.uint64(8)).astype(float) / 2**24, 2)
    gaussian = (np.sqrt(-2 * np.log(radius + 2**-24)) * np.cos(2 * np.pi * angle)).reshape(-1, order, order)
    matrices = []
    for block in gaussian:
        matrix = np.eye(order)
        signs = np.ones(order)
        for k in range(order):
            x = np.where(np.arange(order) >= k, block[:, k], 0.0)
            signs[k] = -1.0 if x[k] < 0 else 1.0
            v = x + signs[k] * np.linalg.norm(x) * np.eye(order)[k]
            matrix = matrix @ (np.eye(order) - 2 * np.outer(v, v) / (v @ v))
        matrices.append(matrix * -signs)
    return matrices


def rotation(seed: int, p: int, q: int, transform: str) -> np.ndarray:
    """The dense matrix V [p q, p q] that takes a column x to V x."""
    size = p * q
    counts = (1, 1) if transform == "kronecker" else (q, p)
    left = orthogonal(bits(seed, 0, 2 * counts[0] * p * p), p) * (q // counts[0])
    right = orthogonal(bits(seed, 1, 2 * counts[1] * q * q), q) * (p // counts[1])
    columns, rows = np.zeros((size, size)), np.zeros((size, size))
    for k in range(q):
        places = np.arange(p) * q + k
        columns[np.ix_(places, places)] = left[k]
    for k in range(p):
        places = k * q + np.arange(q)
        rows[np.ix_(places, places)] = right[k]
    first, last = (np.eye(size)[np.argsort(bits(seed, stream, size), kind="stable")] for stream in (2, 3))
    return last @ rows @ columns @ first
