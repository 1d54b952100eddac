"""Closed-form inputs and the golden results that the specification of the weight methods gives for them.

Paper orientation: W is [out, in], X is [tokens, in], H = 2 X^T X. Transpose for jquant, whose kernels are [in, out].
numpy float64.
"""

import numpy as np

ACTIVATION_ORDER = [2, 5, 1, 4, 7, 3, 6, 0]  # inputs by falling diagonal of H

ROUNDED_CODES = {  # (bits, symmetry): codes of round to nearest, one grid per output; symmetric codes relative to zero
    (4, "asymmetric"): [
        [15, 9, 0, 10, 6, 1, 15, 9],
        [15, 1, 6, 12, 3, 9, 11, 0],
        [7, 0, 15, 6, 1, 14, 6, 2],
        [5, 13, 14, 3, 13, 15, 0, 15],
    ],
    (3, "asymmetric"): [
        [7, 4, 0, 5, 3, 0, 7, 4],
        [7, 0, 2, 5, 1, 4, 5, 0],
        [3, 0, 7, 3, 0, 6, 2, 0],
        [1, 5, 6, 1, 5, 7, 0, 6],
    ],
    (4, "symmetric"): [
        [7, 2, -7, 3, 0, -5, 7, 2],
        [7, -6, -1, 5, -4, 1, 3, -7],
        [0, -7, 7, -1, -6, 7, -1, -5],
        [-4, 2, 3, -5, 2, 4, -7, 4],
    ],
    (3, "symmetric"): [
        [3, 1, -3, 1, 0, -2, 3, 1],
        [3, -2, 0, 2, -2, 1, 1, -3],
        [0, -3, 3, 0, -3, 3, 0, -2],
        [-2, 1, 1, -2, 1, 2, -3, 2],
    ],
}
ROUNDED_SCALES = {
    (4, "asymmetric"): [0.142833, 0.145352, 0.103212, 0.127776],
    (3, "asymmetric"): [0.306071, 0.311469, 0.221169, 0.273807],
    (4, "symmetric"): [0.155977, 0.158357, 0.113154, 0.174367],
}
ROUNDED_ZEROS = {(4, "asymmetric"): [7, 7, 7, 10], (3, "asymmetric"): [3, 3, 3, 4]}
ROUNDED_MSE = {
    (4, "asymmetric"): 0.002026944,
    (3, "asymmetric"): 0.009249426,
    (4, "symmetric"): 0.001170877,
    (3, "symmetric"): 0.008344801,
}
GROUPED_CODES = [
    [15, 9, 0, 10, 5, 0, 15, 9],
    [15, 0, 6, 13, 4, 12, 15, 0],
    [7, 0, 15, 6, 0, 15, 6, 1],
    [2, 14, 15, 0, 13, 15, 0, 15],
]
GROUPED_SCALES = [
    0.142266,
    0.128404,
    0.133563,
    0.10578,
    0.103212,
    0.093378,
    0.092519,
    0.127776,
]  # 4 bits, groups of 4 inputs
GROUPED_ZEROS = [7, 6, 7, 10, 7, 7, 10, 10]
GROUPED_MSE = 0.001803588

SEARCHED_SHRINKS = {  # (bits, symmetry): the best fraction of the range, one per output
    (4, "symmetric"): [1.0, 0.97, 0.97, 0.99],
    (4, "asymmetric"): [0.98, 1.0, 1.0, 0.98],
    (3, "symmetric"): [1.0, 0.88, 0.93, 0.76],
    (3, "asymmetric"): [0.95, 0.98, 0.93, 1.0],
    (2, "symmetric"): [0.81, 0.75, 0.88, 0.44],
    (2, "asymmetric"): [0.82, 0.94, 1.0, 0.83],
}
SEARCHED_ERRORS = [0.003509, 0.003584, 0.001511, 0.000388]  # 4 bits symmetric, sum |w - w_c|^2.4


def weight() -> np.ndarray:
    """W [4, 8] = [out, in]."""
    i, j = np.meshgrid(np.arange(4.0), np.arange(8.0), indexing="ij")
    return np.sin(0.9 + 1.3 * i + 2.1 * j) + 0.3 * np.cos(0.5 * i * j + j)


def inputs() -> np.ndarray:
    """X [32, 8] = [tokens, in]."""
    t, j = np.meshgrid(np.arange(32.0), np.arange(8.0), indexing="ij")
    return np.sin(0.2 + 0.7 * t + 1.1 * j + 0.05 * t * j) * (1 + 0.5 * (j % 3))


def hessian() -> np.ndarray:
    """H [8, 8] = 2 X^T X: one sequence of 32 tokens."""
    return 2 * inputs().T @ inputs()
