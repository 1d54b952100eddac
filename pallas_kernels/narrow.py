"""What the kernels of narrow weights read: binary codes and SpQR's 3 bits, prepared once, exactly, and the way back."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int, Int8

from pallas_kernels.binary import LEAST_GROUP, UNITS
from pallas_kernels.fields import load_signs, store_signs


class BinaryWeight(NamedTuple):
    """Binary codes: w[n, k] = offsets[k // g, n] + sum_p +-alphas[k // g, p, n].

    Attributes:
      signs: int4 [out, in * bits / 4], the words of `fields.store_signs`.
      alphas: float16 [groups, bits, out], plane p's times 2^(bits - 1 - p): its operand is 2^p times a sign.
      offsets: float16 [groups, out]; None where all are 0.
    """

    signs: Int[Array, "out stored"]
    alphas: Float16[Array, "groups bits out"]
    offsets: Float16[Array, "groups out"] | None


def prepare_binary(
    codes: Int[Array, "out in"],
    alphas: Float[Array, "groups bits out"],
    offsets: Float[Array, "groups out"] | None = None,
) -> BinaryWeight:
    """Returns the weight as the kernel reads it; exact but for alphas and offsets that float16 cannot hold.

    Args:
      codes: the signs of each weight: bit p is 1 where plane p has +1.
      alphas: what each plane's sign is multiplied by; rounded to float16.
      offsets: what is added to a group; rounded to float16. None for nothing.

    Raises:
      ValueError: the number of planes, or the size of the groups, has no kernel.

    Example:
      >>> weight = prepare_binary(jnp.full((64, 128), 3, jnp.int8), jnp.ones((1, 2, 64)))
      >>> weight.signs.shape, weight.alphas[0, :, 0].tolist()
      ((64, 64), [2.0, 1.0])
    """
    (groups, bits, _), inputs = alphas.shape, codes.shape[1]
    if bits not in UNITS or inputs % groups or inputs % UNITS[bits] or inputs // groups < LEAST_GROUP:
        raise ValueError(
            f"{bits} planes of {inputs} inputs in {groups} groups: the kernel takes {tuple(UNITS)} planes, a multiple "
            f"of {UNITS.get(bits, 64)} inputs and groups of at least {LEAST_GROUP}; keep the portable layout"
        )
    scaled = alphas.astype(jnp.float16) * _powers(bits)
    return BinaryWeight(store_signs(codes, bits), scaled, None if offsets is None else offsets.astype(jnp.float16))


def restore_binary(
    weight: BinaryWeight,
) -> tuple[Int8[Array, "out in"], Float16[Array, "groups bits out"], Float16[Array, "groups out"] | None]:
    """Returns the codes, alphas and offsets that `prepare_binary` was given, the last two as rounded there."""
    bits = weight.alphas.shape[1]
    return load_signs(weight.signs, bits), weight.alphas / _powers(bits), weight.offsets


def _powers(bits: int) -> Float16[Array, "1 {bits} 1"]:
    return jnp.exp2(jnp.arange(bits - 1, -1, -1, dtype=jnp.float16))[None, :, None]
