"""Hadamard matrices of many orders from four constructions, and the fast transform by them.

    M(n) = (H_K (x) S_{2^m}) / sqrt(n),   n = K 2^m,   S the Sylvester matrix in natural order, H_K on the slow axis

M(n) is orthogonal, y = M(n) x. It is symmetric only where H_K is: powers of two, and Paley II as 28, 36, 76 and 148.

One rule chooses K: the smallest order K = odd(n) 2^k that divides n and has a construction; but 40 where both 20 and 40
serve. The matrices of 12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156 and 172, and their choice, are those of the
published tables of QuaRot and SpinQuant, bit for bit, so that checkpoints rotated there run here. The same
constructions give orders that those tables lack.

References: Paley, On orthogonal matrices (1933); Williamson, Hadamard's determinant theorem and the sum of four squares
(1944); Ashkboos et al., QuaRot (2024).
"""

import math
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jquant.errors import FormatError
from jquant.types import compute_dtype

# First rows of the four circulant blocks A, B, C, D, most significant bit first, 1 for +1: the tables of QuaRot.
WILLIAMSON: Final = {
    52: (0x14F2, 0x11F8, 0x1A65, 0x1090),
    156: (0x7282619053, 0x7898528647, 0x73452128B3, 0x46A0EDC158),
    172: (0x467AECDD798, 0x6FC29B650FD, 0x7595E85EA6B, 0x63D260192F1),
}
SYLVESTER_FACTOR: Final = 128  # largest Sylvester matrix multiplied at once: fills a matrix unit, small as a constant


def base_order(n: int) -> int:
    """Return K, the order of the construction that M(n) uses on its slow axis; 1 for a power of two.

    Args:
        n: order of the transform.

    Raises:
        FormatError: if no construction serves n.

    Example:
        >>> [base_order(n) for n in (4096, 14336, 11008, 5120)]
        [1, 28, 172, 40]
    """
    if n < 1:
        raise FormatError(
            f"order {n} given for a Hadamard matrix; expected a positive integer: pass the size of an axis"
        )
    odd = n // (n & -n)
    if odd == 1:
        return 1
    if n % 40 == 0 and odd == 5:
        return 40
    for order in (odd << k for k in range(2, (n // odd).bit_length())):
        if _has_construction(order):
            return order
    raise FormatError(
        f"no Hadamard construction for order {n} (odd part {odd}); expected 2^k, or 2^k times an order of Paley or "
        "Williamson: rotate in blocks of a size that has one, or pad"
    )


def base_matrix(order: int) -> Int8[np.ndarray, "{order} {order}"]:
    """Build the Hadamard matrix of one construction: entries +-1, H H^T = order I.

    Order q + 1 with a prime q = 3 mod 4 is Paley I, 2 (q + 1) with a prime q = 1 mod 4 is Paley II; 52, 156 and 172 are
    Williamson's; 40 is doubled from 20.

    Args:
        order: 1, or an order returned by `base_order`, or any other that these constructions reach.

    Raises:
        FormatError: if no construction has this order.

    Example:
        >>> base_matrix(12)[:2, :4].tolist()
        [[1, -1, -1, -1], [1, 1, -1, 1]]
    """
    if order == 1:
        return np.ones((1, 1), dtype=np.int8)
    if order == 40:
        return np.kron(sylvester(2), base_matrix(20))
    if order in WILLIAMSON:
        return _williamson(*(_circulant(row, order // 4) for row in WILLIAMSON[order]))
    if _is_paley_one(order):
        return _paley_one(order - 1)
    if _is_paley_two(order):
        return _paley_two(order // 2 - 1)
    raise FormatError(f"no construction of order {order}; expected an order that `base_order` returns: call it first")


def sylvester(order: int) -> Int8[np.ndarray, "{order} {order}"]:
    """Build the Sylvester matrix of a power of two: entry (i, j) is the parity sign of the bits that i and j share.

    Args:
        order: a power of two.

    Example:
        >>> sylvester(2).tolist()
        [[1, 1], [1, -1]]
    """
    matrix = np.ones((1, 1), dtype=np.int8)
    for _ in range(order.bit_length() - 1):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard_matrix(n: int) -> Float[np.ndarray, "{n} {n}"]:
    """Build the orthogonal matrix M(n) in float64, to fold rotations with on the host.

    Args:
        n: order; see `base_order` for which exist.

    Raises:
        FormatError: if no construction serves n.

    Example:
        >>> hadamard_matrix(4)[1].tolist()
        [0.5, -0.5, 0.5, -0.5]
    """
    base = base_order(n)
    return np.kron(base_matrix(base), sylvester(n // base)).astype(np.float64) / math.sqrt(n)


@jax.jit
def hadamard_transform(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Multiply the last axis by M(n): y = M(n) x, without building M(n).

    View the axis as [K, f, ..., f], the f powers of two up to 128, and multiply each of these axes by its own small
    matrix: n (K + sum f) products instead of n^2.

    Args:
        x: array whose last axis has an order that `base_order` accepts.
            Computed in float32, or float64 where that is given.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        FormatError: if no construction serves n.

    Example:
        >>> hadamard_transform(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    n = x.shape[-1]
    batch = x.shape[:-1]
    compute = compute_dtype(x.dtype)
    result = x.astype(compute)
    fast = n
    for matrix in _factors(n):
        fast //= len(matrix)
        factor = jnp.asarray(matrix, dtype=compute)
        view = result.reshape(*batch, -1, len(matrix), fast)
        result = jnp.einsum("ij,...sjf->...sif", factor, view, precision=jax.lax.Precision.HIGHEST)
    return (result.reshape(x.shape) / math.sqrt(n)).astype(x.dtype)


def hadamard_on_host(x: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
    """Multiply the last axis by M(n) in float64 numpy, factor by factor, to fold rotations into wide weights.

    Args:
        x: float64 array whose last axis has an order that `base_order` accepts.

    Returns:
        Array of the same shape, float64.

    Raises:
        FormatError: if no construction serves n.

    Example:
        >>> hadamard_on_host(np.array([1.0, 0.0, 0.0, 0.0])).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    n = x.shape[-1]
    result = np.asarray(x, np.float64)
    fast = n
    for matrix in _factors(n):
        fast //= len(matrix)
        wide = matrix.astype(np.float64)
        if fast == 1:
            result = result.reshape(-1, len(matrix)) @ wide.T
        else:
            result = wide @ result.reshape(-1, len(matrix), fast)
    return result.reshape(x.shape) / math.sqrt(n)


def _factors(n: int) -> list[Int8[np.ndarray, "order order"]]:
    """The matrices whose Kronecker product is sqrt(n) M(n), slow axis first."""
    base = base_order(n)
    return [base_matrix(base), *(sylvester(order) for order in _sylvester_orders(n // base))]


def _sylvester_orders(order: int) -> list[int]:
    """Split a power of two into factors of at most SYLVESTER_FACTOR, slow axis first."""
    orders = []
    while order > 1:
        orders.append(min(order, SYLVESTER_FACTOR))
        order //= orders[-1]
    return orders


def _has_construction(order: int) -> bool:
    return order in WILLIAMSON or _is_paley_one(order) or _is_paley_two(order)


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_two(order: int) -> bool:
    return order % 4 == 0 and order // 2 % 4 == 2 and _is_prime(order // 2 - 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Int8[np.ndarray, "{prime} {prime}"]:
    """Entry (i, j) is the Legendre symbol of j - i: 0, else 1 for a square modulo the prime, else -1."""
    symbol = np.full(prime, -1, dtype=np.int8)
    symbol[np.arange(1, prime) ** 2 % prime] = 1
    symbol[0] = 0
    index = np.arange(prime)
    return symbol[(index[None, :] - index[:, None]) % prime]


def _paley_one(prime: int) -> Int8[np.ndarray, "order order"]:
    matrix = np.ones((prime + 1, prime + 1), dtype=np.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = np.eye(prime, dtype=np.int8) - _jacobsthal(prime)
    return matrix


def _paley_two(prime: int) -> Int8[np.ndarray, "order order"]:
    identity = np.eye(prime + 1, dtype=np.int8)
    conference = np.ones_like(identity)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(prime)
    return np.block([[conference + identity, conference - identity], [conference - identity, -conference - identity]])


def _circulant(row: int, size: int) -> Int8[np.ndarray, "{size} {size}"]:
    first = np.array([1 if row >> (size - 1 - place) & 1 else -1 for place in range(size)], dtype=np.int8)
    return np.stack([np.roll(first, shift) for shift in range(size)])


def _williamson(
    a: Int8[np.ndarray, "b b"], b: Int8[np.ndarray, "b b"], c: Int8[np.ndarray, "b b"], d: Int8[np.ndarray, "b b"]
) -> Int8[np.ndarray, "order order"]:
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
