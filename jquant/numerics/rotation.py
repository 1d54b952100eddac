"""Random orthogonal transforms that a 32-bit seed determines and that cost O(n (p + q)) for n = p q numbers.

With x permuted by `first` and seen as X [p, q], row by row,

    kronecker    Y = A X B^T                            one A [p, p], one B [q, q]
    butterfly    Y[:, k] = A_k X[:, k], then            q matrices A_k [p, p]
                 Y[k, :] = B_k Y[k, :]                  p matrices B_k [q, q]

and y is Y, row by row, permuted by `last`. The matrices are Haar-distributed. A seed is part of saved models, so what
it stands for must not change with the version of any library: random bits come from the hash below and nothing else,
and every matrix is a product of reflections, which (unlike a QR) is as well determined as its input.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jquant.types import DType, Leaf

type Transform = Literal["kronecker", "butterfly"]


class Rotation(NamedTuple):
    """Hold an orthogonal transform of n = p q numbers.

    Attributes:
        left: A `[p, p]`, or all A_k `[q, p, p]`.
        right: B `[q, q]`, or all B_k `[p, q, q]`.
        first: int32 `[n]`, the number that stands at each place before the matrices act.
        last: int32 `[n]`, likewise after them.
    """

    left: Leaf
    right: Leaf
    first: Leaf
    last: Leaf


def two_factors(size: int) -> tuple[int, int]:
    """Return (p, q) with p q = size: the products of every other prime factor, in rising order.

    A prime size gives (size, 1): one dense matrix.

    Example:
        >>> two_factors(576), two_factors(14336), two_factors(7)
        ((24, 24), (64, 224), (7, 1))

    Reference:
        Chee et al., QuIP (2023), reference code.
    """
    primes, divisor = [], 2
    while size > 1:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    left, right = 1, 1
    for index, prime in enumerate(primes):
        left, right = (left * prime, right) if index % 2 == 0 else (left, right * prime)
    return left, right


@functools.partial(jax.jit, static_argnames=("size", "transform", "dtype"))
def random_rotation(seed: UInt32[Array, ""], size: int, transform: Transform, dtype: DType = "float32") -> Rotation:
    """Draw a transform; the same seed gives the same one, up to the rounding of `dtype`.

    Args:
        seed: what determines it.
        size: n.
        transform: one matrix a side, or one for each column and row.
        dtype: dtype of the matrices.

    Returns:
        The transform, O(p^2 + q^2 + n) numbers, or O(n (p + q)) for a butterfly.

    Example:
        >>> rotation = random_rotation(jnp.uint32(1), 12, "kronecker")
        >>> x = jnp.arange(12.0)
        >>> y = rotate(rotation, x)
        >>> bool(jnp.allclose(y @ y, x @ x)), bool(jnp.allclose(rotate_back(rotation, y), x, atol=1e-5))
        (True, True)
    """
    p, q = two_factors(size)
    lefts, rights = (1, 1) if transform == "kronecker" else (q, p)
    left, right = (
        random_orthogonal(random_bits(seed, stream, 2 * count * order * order), count, order, dtype)
        for stream, count, order in ((0, lefts, p), (1, rights, q))
    )
    if transform == "kronecker":
        left, right = left[0], right[0]
    first, last = (jnp.argsort(random_bits(seed, stream, size), stable=True) for stream in (2, 3))
    return Rotation(left, right, first, last)


@jax.jit
def rotate(rotation: Rotation, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Apply a transform to the last axis, in the dtype of its matrices."""
    x = x.astype(rotation.left.dtype)[..., rotation.first]
    planes = x.reshape(*x.shape[:-1], rotation.left.shape[-1], rotation.right.shape[-1])
    return _act(rotation.left, rotation.right, planes).reshape(x.shape)[..., rotation.last]


@jax.jit
def rotate_back(rotation: Rotation, y: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Apply the inverse, which is the transpose, of a transform to the last axis."""
    y = y.astype(rotation.left.dtype)[..., jnp.argsort(rotation.last)]
    planes = y.reshape(*y.shape[:-1], rotation.left.shape[-1], rotation.right.shape[-1])
    left, right = rotation.left.mT, rotation.right.mT
    if rotation.left.ndim == 2:
        planes = _act(left, right, planes)
    else:  # the second stage first
        planes = _columns(left, _rows(right, planes))
    return planes.reshape(y.shape)[..., jnp.argsort(rotation.first)]


@functools.partial(jax.jit, static_argnames=("count", "order", "dtype"))
def random_orthogonal(
    bits: UInt32[Array, "numbers"], count: int, order: int, dtype: DType = "float32"
) -> Float[Array, "{count} {order} {order}"]:
    """Make Haar-distributed orthogonal matrices of random bits.

    With Gaussian x_k in R^(order - k), Q = H_0 ... H_(order-1) D, where H_k reflects x_k to its first axis and D_kk is
    the sign that makes column k a uniform direction. The product is I - V T^-1 V^T, v_k of unit length as columns of V,
    T = triu(V^T V, 1) + I / 2.

    Args:
        bits: 2 * count * order^2 random numbers.
        count: how many matrices.
        order: their order.
        dtype: float32 or float64.

    Returns:
        The matrices.

    Reference:
        Stewart, The efficient generation of random orthogonal matrices (1980); Joffrain et al., Accumulating
        Householder transformations, revisited (2006).
    """
    gaussian = jnp.tril(_gaussian(bits, dtype).reshape(count, order, order))
    own = jnp.diagonal(gaussian, axis1=-2, axis2=-1)
    signs = jnp.where(own < 0, -1.0, 1.0).astype(dtype)
    lengths = jnp.linalg.norm(gaussian, axis=-2)
    axes = jnp.eye(order, dtype=dtype)[None]
    vectors = gaussian + axes * (signs * lengths)[:, None, :]
    vectors = vectors / jnp.linalg.norm(vectors, axis=-2)[:, None, :]
    overlaps = jnp.matmul(vectors.mT, vectors, precision=jax.lax.Precision.HIGHEST)
    triangle = jnp.triu(overlaps, 1) + axes / 2
    rest = jax.scipy.linalg.solve_triangular(triangle, vectors.mT, lower=False)
    return (axes - jnp.matmul(vectors, rest, precision=jax.lax.Precision.HIGHEST)) * -signs[:, None, :]


@functools.partial(jax.jit, static_argnames=("stream", "count"))
def random_bits(seed: UInt32[Array, ""], stream: int, count: int) -> UInt32[Array, "{count}"]:
    """Return the first numbers of one of a seed's streams: h(h(index * odd + s) ^ s) with s = h(seed ^ h(stream + 1)).

    Args:
        seed: 32 random bits.
        stream: which stream, from 0.
        count: how many numbers.

    Returns:
        Uniform 32-bit numbers.

    Example:
        >>> random_bits(jnp.uint32(7), 0, 2).tolist()
        [273791329, 837501554]
    """
    start = _hash(seed ^ _hash(jnp.uint32(stream + 1)))
    index = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)  # 2^32 / golden ratio: Weyl's sequence
    return _hash(_hash(index + start) ^ start)


def _hash(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finalizer of MurmurHash3, a bijection of 32 bits in which each bit of x moves each bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _gaussian(bits: UInt32[Array, "twice"], dtype: DType) -> Float[Array, "half"]:
    """Box and Muller's transform of two uniform numbers of 24 bits, the first in (0, 1], the second in [0, 1)."""
    radius, angle = ((part >> 8).astype(dtype) / 2**24 for part in jnp.split(bits, 2))
    return jnp.sqrt(-2 * jnp.log(radius + 2**-24)) * jnp.cos(2 * jnp.pi * angle)


def _act(left: jax.Array, right: jax.Array, planes: jax.Array) -> jax.Array:
    if left.ndim == 3:
        return _rows(right, _columns(left, planes))
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("ij,...jk,lk->...il", left, planes, right, precision=precision)


def _columns(matrices: jax.Array, planes: jax.Array) -> jax.Array:
    return jnp.einsum("kij,...jk->...ik", matrices, planes, precision=jax.lax.Precision.HIGHEST)


def _rows(matrices: jax.Array, planes: jax.Array) -> jax.Array:
    return jnp.einsum("ilk,...ik->...il", matrices, planes, precision=jax.lax.Precision.HIGHEST)
