"""Random orthogonal matrices and signs: orthogonal, uniform in sign, and the same for ever."""

import hashlib

import numpy as np

from jquant.numerics import haar_matrix, random_signs


def test_matrix_is_orthogonal_and_drawn_once() -> None:
    matrix = haar_matrix(37, seed=2)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(37), atol=1e-14)
    assert matrix is haar_matrix(37, seed=2)
    assert not matrix.flags.writeable
    assert np.abs(matrix - haar_matrix(37, seed=3)).max() > 0.1


def test_factor_has_a_positive_diagonal() -> None:
    """Q^T A = R: what makes the factor unique, and the distribution Haar's."""
    gaussian = np.random.RandomState(5).standard_normal((8, 8))
    assert (np.diagonal(haar_matrix(8, seed=5).T @ gaussian) > 0).all()


def test_what_a_seed_stands_for_never_changes() -> None:
    """Seeds are part of saved models."""
    expected = [0.58684003, -0.48538278, 0.6480913]  # the first row of order 3, seed 0
    np.testing.assert_allclose(haar_matrix(3, seed=0)[0], expected, atol=1e-7)
    digest = hashlib.sha256(random_signs(1000, seed=2**32 - 1).astype(np.int8).tobytes()).hexdigest()
    assert digest.startswith("12b3efc2c78ecd3b")


def test_signs_are_signs() -> None:
    signs = random_signs(4096, seed=1)
    np.testing.assert_array_equal(np.abs(signs), 1)
    assert abs(signs.mean()) < 0.05  # three standard deviations of 4096 draws
