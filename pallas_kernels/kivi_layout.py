"""Where codes and grids of a KIVI cache lie, as `flash_kivi` reads them; exact and reversible but for the grids.

    keys       [tokens, dim bits / 8]        a token's codes in the order of the channels, the lowest bits first
    values     [tokens, dim bits / 8]        in the order of the threads: 8 pieces, each with its part of every group
    key grids  [tokens / group, 2 dim]       L scale of all channels, then middle; in runs of 32 / bits channels
                                             c, the order c, c + 16 / bits, c + 1, ..
    value grids [tokens / 16, 2 groups 16]   L scale of each group for 16 tokens, then middle; of these 16, rows
                                             4 to 7 of each 8 are swapped in pairs, as in `flash.token_rows`

L = 2^bits, middle = low + (L - 1) / 2 scale; both are rounded to bfloat16, which moves a number by 2^-9 of its middle
and of its distance from it at most.
"""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Integer, Shaped, UInt8

from pallas_kernels.flash import GROUP

PIECES: Final = 8  # threads that share a token's values
PLACES: Final = (0, 1, 2, 3, 5, 4, 7, 6, 8, 9, 10, 11, 13, 12, 15, 14)  # where token t of 16 lies, and which lies at t


def packed_bits(codes: Integer[Array, "*rows dim"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Returns codes as bytes, the first in the lowest bits.

    Example:
      >>> packed_bits(jnp.array([[1, 0, 2, 3]]), 2).tolist()
      [[225]]
    """
    per_byte = 8 // bits
    split = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, per_byte)
    whole = split[..., 0]
    for i in range(1, per_byte):
        whole = whole | split[..., i] << jnp.uint8(bits * i)
    return whole


def unpacked_bits(stored: UInt8[Array, "*rows bytes"], bits: int) -> UInt8[Array, "*rows dim"]:
    """Returns the codes of bytes; the inverse of `packed_bits`."""
    split = jnp.stack([stored >> jnp.uint8(shift) for shift in range(0, 8, bits)], axis=-1) & jnp.uint8(2**bits - 1)
    return split.reshape(*stored.shape[:-1], -1)


def threads_order(values: Shaped[Array, "*rows dim"], group: int) -> Shaped[Array, "*rows dim"]:
    """Returns numbers [.., dim] in the order of the threads that read them.

    Example:
      >>> threads_order(jnp.arange(32), 16).tolist()[:6]
      [0, 1, 16, 17, 2, 3]
    """
    split = values.reshape(*values.shape[:-1], -1, PIECES, group // PIECES)
    return jnp.swapaxes(split, -3, -2).reshape(values.shape)


def channels_order(values: Shaped[Array, "*rows dim"], group: int) -> Shaped[Array, "*rows dim"]:
    """Returns numbers [.., dim] in their own order; the inverse of `threads_order`."""
    split = values.reshape(*values.shape[:-1], PIECES, -1, group // PIECES)
    return jnp.swapaxes(split, -3, -2).reshape(values.shape)


def key_grids(
    scales: Float[Array, "*groups dim"], lows: Float[Array, "*groups dim"], bits: int
) -> BFloat16[Array, "*groups doubled"]:
    """Returns keys' grids as they are kept."""
    parts = _parts(scales, lows, bits)
    apart = 16 // bits
    turned = (jnp.swapaxes(part.reshape(*part.shape[:-1], -1, 2, apart), -2, -1).reshape(part.shape) for part in parts)
    return jnp.concatenate(list(turned), axis=-1)


def value_grids(
    scales: Float[Array, "*rows tokens groups"], lows: Float[Array, "*rows tokens groups"], bits: int
) -> BFloat16[Array, "*rows blocks numbers"]:
    """Returns values' grids of whole 16 tokens as they are kept."""
    both = jnp.stack(_parts(scales, lows, bits), axis=-1)  # [.., tokens, groups, 2]
    *rows, tokens, groups, _ = both.shape
    blocks = both.reshape(*rows, tokens // GROUP, GROUP, groups, 2)[..., jnp.array(PLACES), :, :]
    count = len(rows)
    turned = blocks.transpose(*range(count + 1), count + 3, count + 2, count + 1)
    return turned.reshape(*rows, tokens // GROUP, 2 * groups * GROUP)


def token_grids(
    scales: Float[Array, "*rows groups"], lows: Float[Array, "*rows groups"], bits: int
) -> BFloat16[Array, "*rows doubled"]:
    """Returns one token's values' grids: what `value_grids` has of it, in the same order."""
    return jnp.concatenate(_parts(scales, lows, bits), axis=-1)


def restore_key_grids(
    grids: BFloat16[Array, "*groups doubled"], bits: int
) -> tuple[Float32[Array, "*groups dim"], Float32[Array, "*groups dim"]]:
    """Returns the scales and lows that keys' grids stand for."""
    apart = 16 // bits
    turned = [
        jnp.swapaxes(part.reshape(*part.shape[:-1], -1, apart, 2), -2, -1).reshape(part.shape)
        for part in jnp.split(grids, 2, axis=-1)
    ]
    return _restored(turned, bits)


def restore_value_grids(
    grids: BFloat16[Array, "*rows blocks numbers"], groups: int, bits: int
) -> tuple[Float32[Array, "*rows tokens groups"], Float32[Array, "*rows tokens groups"]]:
    """Returns the scales and lows that values' grids stand for."""
    *rows, blocks, _ = grids.shape
    split = grids.reshape(*rows, blocks, 2, groups, GROUP)[..., jnp.array(PLACES)]
    turned = jnp.swapaxes(jnp.moveaxis(split, -3, 0), -2, -1).reshape(2, *rows, blocks * GROUP, groups)
    return _restored([turned[0], turned[1]], bits)


def _restored(parts: list[jax.Array], bits: int) -> tuple[jax.Array, jax.Array]:
    steps, middles = (part.astype(jnp.float32) for part in parts)
    scales = steps * 2.0**-bits
    return scales, middles - scales * _middle_code(bits)


def _parts(scales: jax.Array, lows: jax.Array, bits: int) -> list[jax.Array]:
    wide = scales.astype(jnp.float32)
    middles = lows.astype(jnp.float32) + wide * _middle_code(bits)
    return [(wide * 2.0**bits).astype(jnp.bfloat16), middles.astype(jnp.bfloat16)]


def _middle_code(bits: int) -> float:
    return (2.0**bits - 1) / 2
