"""A step's new token and attention in one kernel, where a block has all tokens of a KV head.

    last warpgroup      loads  |  copies  |  RoPE, queries -> shared memory   |  codes -> cache
    all                           copies of the tiles without the new token   |  wait for queries, then as
                                                                                 `attention_kernel`
    who has its tile                                                             waits for the codes, copies it

What `append.append_token` and `attention.packed_attention` do in two: the same bytes in the caches, and attention over
these bytes. The copy engine sees stores of threads behind a fence and a barrier (PTX ISA 8.x, "Async proxy"). The new
token's tile is its warpgroup's last, so that only a short row waits for codes. Where the first tile is asked for before
the position is known and turns out to be the one of the new token, it is asked for again.
"""

from typing import Final

import jax
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import compat
from pallas_kernels.append import LOADED, NUMBERS, TURNED, Append, Coding
from pallas_kernels.attention import ROW_OF_GRIDS, PackedCache, fault_of_attention
from pallas_kernels.attention_kernel import AttentionConfig, Stream, attend_to_new
from pallas_kernels.attention_new import NewToken, Writing
from pallas_kernels.flash import GROUP
from pallas_kernels.flash_tokens import Grid, TokenWalk
from pallas_kernels.lanes import THREADS

OF_A_TOKEN: Final = 2  # heads beside those of queries: its key and its value


def fault_of_append_attention(config: AttentionConfig, dim: int, share: int, page: int) -> str | None:
    """Returns why no kernel writes a token and attends with this configuration; None where one does.

    Args:
      config: how the work is divided.
      dim: numbers of a head.
      share: query heads of a KV head.
      page: tokens that a row has room for.

    Example:
      >>> fault_of_append_attention(AttentionConfig(splits=2), 128, 4, 8192)
      '2 blocks share a KV head, of which one has its new token'
    """
    fault = fault_of_attention(config, dim, share, page)
    if fault is None and config.splits > 1:
        return f"{config.splits} blocks share a KV head, of which one has its new token"
    if fault is None and (share + OF_A_TOKEN) * dim > THREADS * NUMBERS:
        return f"{share} query heads of {dim} numbers: a warpgroup takes {THREADS * NUMBERS} with a key and a value"
    return fault


def append_attention(
    projected: BFloat16[Array, "rows numbers"],
    angles: Float32[Array, "rows dim"],
    positions: Int32[Array, "rows"],
    cache: PackedCache,
    capacity: int,
    *,
    coding: Coding,
    config: AttentionConfig,
    simulate: compat.Simulation | None = None,
) -> tuple[BFloat16[Array, "rows heads dim"], PackedCache]:
    """Turns, codes and writes one token of each row, and attends to it and those before it.

    Args:
      projected: queries, keys and values before RoPE; neighbouring query heads share a KV head.
      angles: cosines, then sines, of the pairs (i, i + dim / 2).
      positions: where each row's token goes, 0 at least; one past the end is not kept.
      cache: page b is row b; what lies behind the position may be anything finite.
      capacity: tokens that a row attends to at most, from the first on.
      coding: how a token is coded.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      What the queries gather, and the cache with the tokens in it.

    Raises:
      ValueError: there is no kernel for these shapes.
    """
    (rows, kv_heads, slots, stored), dim = cache.keys.shape, angles.shape[1]
    heads = projected.shape[1] // dim - 2 * kv_heads
    fault = fault_of_append_attention(config, dim, heads // kv_heads, slots)
    if projected.shape[1] != (heads + 2 * kv_heads) * dim or heads < kv_heads or heads % kv_heads:
        fault = (
            f"{projected.shape[1]} numbers, wanted are whole heads: as many queries of each KV head, a key and a value"
        )
    if fault:
        raise ValueError(f"attention of a new token over {kv_heads} KV heads of {dim} with {config}: {fault}")
    share, bits = heads // kv_heads, 16 if cache.grids is None else stored * 8 // dim
    grid: Grid = "none" if cache.grids is None else coding.grid
    shape_of_grids = rows, kv_heads, slots // GROUP, ROW_OF_GRIDS
    kept = [jax.new_ref(each) for each in (cache.keys, cache.values)]
    if cache.grids is not None:
        kept.append(jax.new_ref(cache.grids.reshape(shape_of_grids)))
    streams = [Stream(ref, unit) for ref, unit in zip(kept, (1, 1, GROUP))]
    program = Append(share, 1, dim, GROUP, bits, coding, alone=kv_heads)
    writing = Writing(program.load, program.turn, program.keep, LOADED, TURNED)
    token = NewToken(projected, angles, positions, writing, capacity)
    found = attend_to_new(token, TokenWalk(bits, dim, share, config.tile, grid, dim), streams, config, simulate)
    keys, values, *grids = (ref[...] for ref in kept)
    written = PackedCache(keys, values, grids[0].reshape(rows, kv_heads, slots, 4) if grids else None)
    return found.reshape(rows, heads, dim), written
