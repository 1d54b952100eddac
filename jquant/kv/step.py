"""A step's token by kernels: RoPE, codes and their writing, and attention over the packed caches.

Caches that code token by token and exact ones have one kernel for all of it, in bfloat16, where a block has all tokens
of a KV head, and else one that writes and one that attends; where there is none that writes, a codec's own `push`
does, and `attend_packed` attends.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.formats import OnlineRotation
from jquant.kv.base import KvCodec
from jquant.kv.packed import HeadMajorCache, PackedExactKv, PackedKv, PackedPerTokenKv, attend_packed, simulation

EXACT: Final = 16  # bits of bfloat16

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
    """Writes one token of each row and attends to it and those before it; see `append_packed` and `attend_packed`."""
    from pallas_kernels import append_attention, choose_attention, fault_of_append_attention

    batch, kv_heads, slots, _ = cache.keys.shape
    bits = codec.inner.bits if isinstance(codec, PackedPerTokenKv) else EXACT
    config = choose_attention(bits, batch, kv_heads, cache.dim, slots)
    share = token[0].shape[1] // kv_heads
    if fault_of_append_attention(config, cache.dim, share, slots) is not None:
        queries, kept = append_packed(codec, cache, token, angles, positions, rotation)
        return attend_packed(codec, kept, queries, positions), kept
    found, written = append_attention(
        *_given(cache, token, angles, positions),
        cache.capacity,
        coding=_coding(codec, rotation),
        config=config,
        simulate=simulation(codec.layout),
    )
    return found, HeadMajorCache(written.keys, written.values, written.grids, cache.capacity, cache.dim)


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
    from pallas_kernels import append_token

    given, coding = _given(cache, token, angles, positions), _coding(codec, rotation)
    queries, written = append_token(*given, coding=coding, simulate=simulation(codec.layout))
    return queries, HeadMajorCache(written.keys, written.values, written.grids, cache.capacity, cache.dim)


def _given(
    cache: HeadMajorCache, token: Token, angles: Float[Array, "batch dim"], positions: Int[Array, "batch"]
) -> tuple[Any, Any, Any, Any]:
    """Returns a token and the caches as kernels take them."""
    from pallas_kernels import PackedCache

    projected = jnp.concatenate([part.reshape(part.shape[0], -1) for part in token], axis=1)
    stored = PackedCache(jnp.asarray(cache.keys), jnp.asarray(cache.values), cache.grids)
    return projected, angles, positions.astype(jnp.int32), stored


def _coding(codec: PackedKv, rotation: OnlineRotation | None) -> Any:
    """Returns how kernels code a token."""
    from pallas_kernels import Coding

    inner: Any = codec.inner if isinstance(codec, PackedPerTokenKv) else None
    return Coding(
        grid="zero" if inner is not None and inner.grid == "asymmetric" else "low",
        clip=1.0 if inner is None else inner.clip,
        spread="no" if rotation is None else "hadamard",
    )
