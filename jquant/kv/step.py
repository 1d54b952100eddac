"""A step's token by kernels: RoPE, codes and their writing in one, then attention over the packed caches.

Caches that code token by token and exact ones have the first kernel, in bfloat16; where there is none, a codec's own
`push` writes, and `attend_packed` attends.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.formats import OnlineRotation
from jquant.kv.base import KvCodec
from jquant.kv.packed import HeadMajorCache, PackedExactKv, PackedKv, PackedPerTokenKv, attend_packed, simulation

type Token = tuple[
    Float[Array, "batch heads dim"], Float[Array, "batch kv_heads dim"], Float[Array, "batch kv_heads dim"]
]  # queries, keys and values


def append_fault(codec: KvCodec, rotation: OnlineRotation | None, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why no kernel writes a step's token into a packed codec's caches; None where one does.

    Args:
      codec: the packed one.
      rotation: of queries and keys, behind RoPE.
      dtype: of the projections.

    Example:
      >>> append_fault(PackedExactKv(), None, jnp.float32)
      'float32 tokens, the kernel takes bfloat16'
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype)} tokens, the kernel takes bfloat16"
    if isinstance(codec, PackedPerTokenKv):
        if codec.inner.grid == "symmetric":
            return "symmetric grids"
    elif not isinstance(codec, PackedExactKv):
        return f"{type(codec).__name__} codes tokens together"
    if rotation is not None and (rotation.matrix, rotation.stride) != ("hadamard", 1):
        return f"queries and keys rotated by {rotation.describe()}"
    if rotation is not None and (rotation.order != rotation.size or rotation.order & (rotation.order - 1)):
        return f"queries and keys rotated by {rotation.describe()}"
    return None


def step_packed(
    codec: PackedKv,
    cache: HeadMajorCache,
    token: Token,
    angles: Float[Array, "batch dim"],
    positions: Int[Array, "batch"],
    rotation: OnlineRotation | None = None,
) -> tuple[Float[Array, "batch heads dim"], HeadMajorCache]:
    """Writes one token of each row and attends to it and those before it; see `append_packed`."""
    queries, kept = append_packed(codec, cache, token, angles, positions, rotation)
    return attend_packed(codec, kept, queries, positions), kept


def append_packed(
    codec: PackedKv,
    cache: HeadMajorCache,
    token: Token,
    angles: Float[Array, "batch dim"],
    positions: Int[Array, "batch"],
    rotation: OnlineRotation | None = None,
) -> tuple[Float[Array, "batch heads dim"], HeadMajorCache]:
    """Turns queries and keys of one token of each row and writes what `push` writes, where `append_fault` is None.

    Args:
      codec: how the caches are kept.
      cache: every leaf's first axis is the batch.
      token: queries, keys and values before RoPE, in bfloat16.
      angles: of RoPE at the positions, cosines, then sines; float32.
      positions: of the tokens.
      rotation: of queries and keys, behind RoPE.

    Returns:
      The queries behind RoPE and rotation, and the caches with the tokens in them.
    """
    from pallas_kernels import Coding, PackedCache, append_token

    projected = jnp.concatenate([part.reshape(part.shape[0], -1) for part in token], axis=1)
    inner: Any = codec.inner if isinstance(codec, PackedPerTokenKv) else None
    coding = Coding(
        grid="zero" if inner is not None and inner.grid == "asymmetric" else "low",
        clip=1.0 if inner is None else inner.clip,
        spread="no" if rotation is None else "hadamard",
    )
    stored = PackedCache(jnp.asarray(cache.keys), jnp.asarray(cache.values), cache.grids)
    at = positions.astype(jnp.int32)
    queries, written = append_token(projected, angles, at, stored, coding=coding, simulate=simulation(codec.layout))
    return queries, HeadMajorCache(written.keys, written.values, written.grids, cache.capacity, cache.dim)
