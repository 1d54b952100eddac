"""Products with binary codes by table: a byte of signs picks a partial sum of eight inputs instead of eight products.

For chunk t of eight inputs, T[t, p] = sum_j (+x[8t + j] if bit j of p else -x[8t + j]), p = 0..255. Then

    y[m] = sum_g ( sum_k alpha[k, g, m] sum_{t in g} T[t, signs[k, t, m]]  +  offset[g, m] sum_{i in g} x[i] )

Park et al. 2022, LUT-GEMM, arXiv:2206.09557, section 3.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

CHUNK: Final = 8  # inputs of one table: the bits of a byte


def sign_tables(x: Float[Array, "*batch in"]) -> Float[Array, "*batch chunks 256"]:
    """Returns the sums of eight inputs under every choice of their signs; `in` is a multiple of 8.

    Example:
      >>> sign_tables(jnp.arange(8.0))[0, [0, 1, 255]].tolist()
      [-28.0, -28.0, 28.0]
    """
    chunks = x.reshape(*x.shape[:-1], x.shape[-1] // CHUNK, CHUNK)
    tables = jnp.zeros_like(chunks[..., :1])
    for position in range(CHUNK):
        one = chunks[..., position : position + 1]
        tables = jnp.concatenate([tables - one, tables + one], axis=-1)
    return tables


def lookup_product(
    x: Float[Array, "*batch in"],
    signs: UInt8[Array, "bits chunks out"],
    alphas: Float[Array, "bits groups out"],
    offsets: Float[Array, "groups out"] | None,
) -> Float[Array, "*batch out"]:
    """Multiplies activations by binary codes; sums are in the dtype of `x`.

    Args:
      x: activations; `in` is a multiple of 8 times the number of groups.
      signs: one bit for each sign, along the inputs.
      alphas: factors of the signs, in the dtype of `x`.
      offsets: added to the weights of each group, in the dtype of `x`; None for nothing.

    Returns:
      The product, in the dtype of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.map(lambda row: _one_row(row, signs, alphas, offsets), rows)
    return y.reshape(*x.shape[:-1], signs.shape[-1])


def _one_row(x: jax.Array, signs: jax.Array, alphas: jax.Array, offsets: jax.Array | None) -> jax.Array:
    bits, chunks, outputs = signs.shape
    groups = alphas.shape[1]
    tables = sign_tables(x)
    starts = 256 * jnp.arange(chunks, dtype=jnp.int32)
    picked = tables.reshape(-1)[signs.astype(jnp.int32) + starts[None, :, None]]  # [bits, chunks, out]
    sums = jnp.sum(picked.reshape(bits, groups, chunks // groups, outputs), axis=2)
    y = jnp.sum(alphas * sums, axis=(0, 1))
    if offsets is None:
        return y
    totals = jnp.sum(x.reshape(groups, -1), axis=1)
    return y + jnp.sum(offsets * totals[:, None], axis=0)
