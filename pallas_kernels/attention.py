"""Attention of one new token over packed caches, bound by the memory: 4 and 8 bits a code, or bfloat16.

    o[h] = sum_t softmax_t(q[h] . K[t] / sqrt(dim)) V[t]      K, V the KV head's that h shares, t below the row's length

A block takes one KV head of one row and one of `splits` parts of its tokens, each warpgroup a part of that:

                tokens of the row, `tile` to a copy, `stages` copies under way
    KV head   | tile | tile | tile | tile | ..        codes of keys, codes of values, grids: three copies by the engine
                 split 0       split 1     ..
    a warp's quarter of a tile: packed words -> registers -> bfloat16 -> S -> P -> O, all inside the warp (`flash`)

and a second kernel joins the splits where there are several (`attention_kernel`). Tokens lie in pages of any multiple
of 16 that divides the tile or that the tile divides: `table` tells which page holds which tokens of a row; without one,
page b is row b.

Roofline: bytes of codes and grids over the memory's bandwidth. Measured 2026-11-23 on an H100 80GB HBM3 (jax 0.11.2,
`python -m pallas_kernels.bench --kinds attention`, kernel time by CUPTI, median, caches beyond the second cache; a copy
of 512 MiB runs at 2940 GB/s), 32 query heads over 8 KV heads of 128 numbers, 4 bits:

    rows x tokens    us      bytes             cuDNN's bfloat16
    16 x 4096        31.3    78 % of the copy   88.6
    16 x 8192        57.3    85 %              173.3
    64 x 4096       109.0    89 %              349.4
    1 x 32768        20.0    61 %               50.8 (the day before)
    1 x 131072       59.1    82 %              180.7 (likewise)

docs/kernels.md has the others, KIVI's, and what limits them.
"""

from typing import Final, NamedTuple

from jaxtyping import Array, BFloat16, Float, Int32, UInt8

from pallas_kernels import compat
from pallas_kernels.attention_kernel import WINDOW_TILE, AttentionConfig, Stream, Window, attend
from pallas_kernels.flash import GROUP, HEADS, WARPS
from pallas_kernels.flash_kivi import KiviWalk
from pallas_kernels.flash_tokens import Grid, TokenWalk

DIMS: Final = (64, 128, 256)  # numbers of a head: a thread's part is a whole load
ROW_OF_GRIDS: Final = 4 * GROUP  # float16 numbers of the grids of 16 tokens: what a copy moves at least
WIDEST_KIVI: Final = 128  # numbers of a head: a copy has at most 256 of a row's grids


class PackedCache(NamedTuple):
    """Keys and values of many rows in pages.

    Attributes:
      keys: uint8 codes, the lower half of a byte first, or bfloat16; [pages, heads, tokens, bytes or numbers].
      values: the same.
      grids: float16 scale and low (or zero) of a token's key, then of its value; None for bfloat16.
    """

    keys: UInt8[Array, "pages heads tokens bytes"] | BFloat16[Array, "pages heads tokens dim"]
    values: UInt8[Array, "pages heads tokens bytes"] | BFloat16[Array, "pages heads tokens dim"]
    grids: Float[Array, "pages heads tokens 4"] | None


class KiviPages(NamedTuple):
    """Coded keys and values in KIVI's grids, in pages, as `kivi_layout` writes them.

    Attributes:
      keys: [pages, heads, tokens, dim * bits / 8].
      values: the same.
      key_grids: [pages, heads, tokens / key group, 2 * dim].
      value_grids: [pages, heads, tokens / 16, 2 * groups * 16].
    """

    keys: UInt8[Array, "pages heads tokens bytes"]
    values: UInt8[Array, "pages heads tokens bytes"]
    key_grids: BFloat16[Array, "pages heads blocks doubled"]
    value_grids: BFloat16[Array, "pages heads sixteens numbers"]


def fault_of_attention(config: AttentionConfig, dim: int, share: int, page: int) -> str | None:
    """Returns why no kernel attends with this configuration; None where one does.

    Args:
      config: how the work is divided.
      dim: numbers of a head.
      share: query heads of a KV head.
      page: tokens of a page.
    """
    fault = fault_of_heads(dim, share)
    if fault is None and (page % GROUP or (page % config.tile and config.tile % page)):
        return f"pages of {page} tokens: give a multiple of {GROUP} that divides {config.tile} or is a multiple of it"
    return fault


def fault_of_heads(dim: int, share: int) -> str | None:
    """Returns why no kernel attends to heads; None where one does.

    Args:
      dim: numbers of a head.
      share: query heads of a KV head.

    Example:
      >>> fault_of_heads(96, 4)
      'heads of 96 numbers, kernels take 64, 128 or 256'
    """
    if dim not in DIMS:
        return f"heads of {dim} numbers, kernels take 64, 128 or 256"
    if share > HEADS:
        return f"{share} query heads share a KV head, kernels take at most {HEADS}"
    return None


def packed_attention(
    queries: BFloat16[Array, "rows heads dim"],
    cache: PackedCache,
    lengths: Int32[Array, "rows"],
    table: Int32[Array, "rows slots"] | None = None,
    *,
    grid: Grid,
    config: AttentionConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "rows heads dim"]:
    """Attends to a packed cache.

    Args:
      queries: after RoPE; neighbouring heads share a KV head.
      cache: what lies behind a row's length may be anything finite.
      lengths: tokens that each row attends to; a row of none gives zeros.
      table: the page that holds a row's tokens i * page to (i + 1) * page; None if page b is all of row b.
      grid: what the second number of a grid is.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: there is no kernel for these shapes.
    """
    (_, heads, dim), (_, kv_heads, page, stored) = queries.shape, cache.keys.shape
    fault = fault_of_attention(config, dim, heads // kv_heads, page)
    if (cache.grids is None) != (grid == "none"):
        fault = f'grids are {"absent" if cache.grids is None else "given"}, but their kind is "{grid}"'
    if fault:
        raise ValueError(f"attention of {heads} heads over {kv_heads} of {dim} with {config}: {fault}")
    bits = 16 if grid == "none" else stored * 8 // dim
    walk = TokenWalk(bits, dim, heads // kv_heads, config.tile, grid, dim)
    streams = [Stream(cache.keys, 1), Stream(cache.values, 1)]
    if cache.grids is not None:
        streams.append(Stream(cache.grids.reshape(-1, kv_heads, page // GROUP, ROW_OF_GRIDS), GROUP))
    return attend(queries, walk, streams, lengths, table, config, simulate)


def kivi_attention(
    queries: BFloat16[Array, "rows heads dim"],
    cache: KiviPages,
    lengths: Int32[Array, "rows"],
    window: PackedCache,
    window_lengths: Int32[Array, "rows"],
    table: Int32[Array, "rows slots"] | None = None,
    *,
    config: AttentionConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "rows heads dim"]:
    """Attends to a KIVI cache: coded tokens, and a window of tokens in bfloat16, in any order.

    Args:
      queries: after RoPE; neighbouring heads share a KV head.
      cache: the coded tokens.
      lengths: of them, for each row.
      window: the others; page b is row b.
      window_lengths: of them, for each row.
      table: the page that holds a row's coded tokens i * page to (i + 1) * page; None if page b is all of row b.
      config: how the work is divided; the blocks of the coded tokens share the window.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: there is no kernel for these shapes.
    """
    (_, heads, dim), (_, kv_heads, page, stored) = queries.shape, cache.keys.shape
    share, bits = heads // kv_heads, stored * 8 // dim
    key_group = page // cache.key_grids.shape[2]
    groups = cache.value_grids.shape[3] // (2 * GROUP)
    fault = fault_of_attention(config, dim, share, page)
    if fault is None and window.keys.shape[2] % WINDOW_TILE:
        fault = f"a window with room for {window.keys.shape[2]} tokens: give whole {WINDOW_TILE}s"
    fault = fault or fault_of_kivi(config, dim, bits, key_group, dim // groups)
    if fault:
        raise ValueError(f"attention of {heads} heads over {kv_heads} of {dim} with {config}: {fault}")
    walk = KiviWalk(bits, dim, share, config.tile, key_group, dim // groups)
    streams = [
        Stream(cache.keys, 1),
        Stream(cache.values, 1),
        Stream(cache.key_grids, key_group),
        Stream(cache.value_grids, GROUP),
    ]
    inside = Window(window.keys, window.values, window_lengths)
    return attend(queries, walk, streams, lengths, table, config, simulate, inside)


def fault_of_kivi(config: AttentionConfig, dim: int, bits: int, key_group: int, group: int) -> str | None:
    """Returns why no kernel attends to a KIVI cache; None where one does.

    Args:
      config: how the work is divided.
      dim: numbers of a head.
      bits: of a code.
      key_group: tokens whose keys share a grid.
      group: channels whose values share a grid.
    """
    if bits not in (2, 4) or dim > WIDEST_KIVI:
        return f"{bits} bits, heads of {dim}: kernels of KIVI take 2 and 4 bits, and heads of at most {WIDEST_KIVI}"
    own = config.tile // WARPS
    if key_group % own or config.tile % key_group or key_group & (key_group - 1):
        return f"keys in groups of {key_group} tokens: kernels take {own}, {2 * own} or {config.tile}"
    if group % GROUP or dim % group or dim // group > HEADS or group & (group - 1):
        return f"values in groups of {group} channels: kernels take 16 and its doubles up to {dim}, 8 groups at most"
    return None
