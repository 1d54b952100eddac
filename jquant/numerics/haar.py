"""Random orthogonal matrices and signs in float64 on the host, which a seed determines for good.

A seed may be part of a saved model. Random numbers therefore come from `numpy.random.RandomState`, whose streams numpy
has frozen, and a matrix is the QR factor whose triangle has a positive diagonal, which is unique.
"""

import functools
from typing import Final

import numpy as np
from jaxtyping import Float

_KEPT: Final = 4  # matrices kept: a model has one or two


@functools.lru_cache(_KEPT)
def haar_matrix(order: int, seed: int) -> Float[np.ndarray, "{order} {order}"]:
    """Draw an orthogonal matrix from the Haar distribution: Q of A = Q R, A Gaussian, R with a positive diagonal.

    Args:
        order: rows and columns.
        seed: what determines it, 0 to 2^32 - 1.

    Returns:
        The matrix, float64 and read-only: it is drawn once.

    Example:
        >>> q = haar_matrix(5, seed=3)
        >>> bool(np.allclose(q @ q.T, np.eye(5), atol=1e-14))
        True

    Reference:
        Mezzadri, How to generate random matrices from the classical compact groups (2007).
    """
    gaussian = np.random.RandomState(seed).standard_normal((order, order))
    orthogonal, triangle = np.linalg.qr(gaussian)
    orthogonal *= np.where(np.diagonal(triangle) < 0, -1.0, 1.0)[None, :]
    orthogonal.flags.writeable = False
    return orthogonal


def random_signs(size: int, seed: int) -> Float[np.ndarray, "{size}"]:
    """Draw independent signs, +1 or -1 with equal chance.

    Args:
        size: how many.
        seed: what determines them, 0 to 2^32 - 1.

    Example:
        >>> random_signs(6, seed=0).tolist()
        [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    """
    return np.random.RandomState(seed).randint(0, 2, size) * 2.0 - 1.0
