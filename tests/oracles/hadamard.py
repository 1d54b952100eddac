"""Oracle for the Hadamard transform: definitions entry by entry, numpy float64."""

import numpy as np


def legendre(a: int, prime: int) -> int:
    """Legendre symbol by Euler's criterion."""
    power = pow(a % prime, (prime - 1) // 2, prime)
    return -1 if power == prime - 1 else power


def paley_one(prime: int) -> np.ndarray:
    """Skew Hadamard matrix of order prime + 1, for a prime = 3 mod 4."""
    matrix = np.ones((prime + 1, prime + 1))
    for i in range(prime + 1):
        for j in range(1, prime + 1):
            matrix[i, j] = -1 if i == 0 else (i == j) - legendre(j - i, prime)
    return matrix


def paley_two(prime: int) -> np.ndarray:
    """Symmetric Hadamard matrix of order 2 (prime + 1), for a prime = 1 mod 4."""
    conference = np.zeros((prime + 1, prime + 1))
    for i in range(prime + 1):
        for j in range(prime + 1):
            conference[i, j] = (i != j) if i == 0 or j == 0 else legendre(j - i, prime)
    identity = np.eye(prime + 1)
    return np.vstack(
        [
            np.hstack([conference + identity, conference - identity]),
            np.hstack([conference - identity, -conference - identity]),
        ]
    )


def transform(x: np.ndarray, base: np.ndarray) -> np.ndarray:
    """M(n) x over the last axis: a sum over both digits of the index, base on the slow one, Sylvester on the fast."""
    order, n = len(base), x.shape[-1]
    fast = n // order
    parity = np.array([[(-1) ** (i & j).bit_count() for j in range(fast)] for i in range(fast)])
    view = x.reshape(*x.shape[:-1], order, fast)
    return np.einsum("ab,cd,...bd->...ac", base, parity, view).reshape(x.shape) / np.sqrt(n)
