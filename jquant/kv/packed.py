"""Caches as the attention kernels of `pallas_kernels` read them, a head's tokens behind one another; by `prepare`.

    codec's own   codes [capacity, heads, bytes], scales [capacity, heads, 1], zeros likewise
    packed        codes [heads, slots, bytes], grids [heads, slots, 4]: scale and low (or zero) of a key, of a value

The codes are the same bytes, the numbers they stand for the same: `read` gives what the codec's own cache would. Slots
are the capacity, filled up to whole tiles of the kernels. In the layouts HOPPER and SIMULATED, `attend` is a kernel's;
in the portable one the model reads the dense numbers and attends itself.
"""

from typing import Any, ClassVar, Final, Literal, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jquant.formats import Layout
from jquant.kv.base import KvCodec, Prompt, Rope
from jquant.kv.exact import ExactKv
from jquant.kv.kivi import Kivi
from jquant.kv.packed_kivi import PackedKivi, PackedKiviCache
from jquant.kv.per_token import PerTokenKv
from jquant.kv.vectors import VectorFormat, Vectors, code_vectors, decode_vectors
from jquant.types import Leaf

TILE: Final = 128  # tokens, which the slots are a multiple of
KERNEL_BITS: Final = (4, 8)


@struct.dataclass
class HeadMajorCache:
    """Keys after RoPE and values of one sequence.

    Attributes:
      keys: uint8 codes [heads, slots, bytes], or numbers [heads, slots, dim].
      values: the same.
      grids: float16 [heads, slots, 4]; None for numbers.
      capacity: tokens that the cache holds, static.
      dim: width of a head, static.
    """

    keys: Leaf
    values: Leaf
    grids: Leaf | None
    capacity: int = struct.field(pytree_node=False)
    dim: int = struct.field(pytree_node=False)


@final
@struct.dataclass
class PackedPerTokenKv(KvCodec):
    """Keeps what `PerTokenKv` keeps, in the kernels' order.

    Attributes:
      inner: how tokens are coded; one grid for each head.
      layout: what attends.
      prompt: the inner codec's.
    """

    inner: PerTokenKv
    layout: Layout = struct.field(pytree_node=False, default=Layout.PORTABLE)
    prompt: Prompt = struct.field(pytree_node=False, default="stored")
    chunk_prompts: ClassVar[tuple[Prompt, ...]] = PerTokenKv.chunk_prompts

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> HeadMajorCache:
        """Returns an empty cache."""
        del dtype
        slots = _slots(capacity)
        codes = jnp.zeros((heads, slots, dim * self.inner.bits // 8), jnp.uint8)
        return HeadMajorCache(codes, codes, jnp.zeros((heads, slots, 4), jnp.float16), capacity, dim)

    def fill(
        self,
        cache: HeadMajorCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        length: Int[Array, ""],
        rope: Rope,
        start: Int[Array, ""] | int = 0,
    ) -> HeadMajorCache:
        """Codes the whole padded prompt; what lies past `length` is overwritten before any step can see it."""
        del length
        return self._write(cache, rope(keys, start + jnp.arange(keys.shape[0])), values, start)

    def push(
        self,
        cache: HeadMajorCache,
        key: Float[Array, "heads dim"],
        value: Float[Array, "heads dim"],
        position: Int[Array, ""],
        rope: Rope,
    ) -> HeadMajorCache:
        """Codes one token; its own query sees it coded."""
        return self._write(cache, rope(key[None], position[None]), value[None], position)

    def read(
        self, cache: HeadMajorCache, position: Int[Array, ""], rope: Rope
    ) -> tuple[Float[Array, "capacity heads dim"], Float[Array, "capacity heads dim"]]:
        """Returns what is stored; the model masks what lies after `position`."""
        del position, rope
        format, grids = self._format(cache.dim), jnp.asarray(cache.grids)
        dense = []
        for index, codes in enumerate((cache.keys, cache.values)):
            scales, zeros = grids[..., 2 * index, None], grids[..., 2 * index + 1, None]
            grid = None if format.grid == "symmetric" else zeros
            dense.append(decode_vectors(Vectors(codes, scales, grid), format).swapaxes(0, 1)[: cache.capacity])
        return dense[0], dense[1]

    def settle(self, cache: HeadMajorCache, position: Int[Array, ""]) -> HeadMajorCache:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Returns the next position: nothing stays exact."""
        return position + 1, position + 1

    def _write(
        self,
        cache: HeadMajorCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        position: Array | int,
    ) -> HeadMajorCache:
        format = self._format(cache.dim)
        both = [code_vectors(each, format) for each in (keys, values)]
        parts = []
        for vectors in both:
            scales = jnp.asarray(vectors.scales)
            middle = jnp.full_like(scales, 2 ** (format.bits - 1))
            parts += [scales, middle if vectors.zeros is None else vectors.zeros.astype(jnp.float16)]
        grids = jnp.concatenate(parts, axis=-1)
        return _written(cache, (both[0].codes, both[1].codes, grids), position)

    def _format(self, dim: int) -> VectorFormat:
        inner = self.inner
        return VectorFormat(dim, inner.bits, dim, inner.grid, inner.clip, inner.scale_dtype)


@final
@struct.dataclass
class PackedExactKv(KvCodec):
    """Keeps keys and values unrounded, in the kernels' order.

    Attributes:
      layout: what attends.
      prompt: see `KvCodec`.
    """

    layout: Layout = struct.field(pytree_node=False, default=Layout.PORTABLE)
    prompt: Prompt = struct.field(pytree_node=False, default="exact")
    chunk_prompts: ClassVar[tuple[Prompt, ...]] = ExactKv.chunk_prompts

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> HeadMajorCache:
        """Returns a cache of zeros."""
        empty = jnp.zeros((heads, _slots(capacity), dim), dtype)
        return HeadMajorCache(empty, empty, None, capacity, dim)

    def fill(
        self,
        cache: HeadMajorCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        length: Int[Array, ""],
        rope: Rope,
        start: Int[Array, ""] | int = 0,
    ) -> HeadMajorCache:
        """Writes the whole padded prompt; what lies past `length` is overwritten before any step can see it."""
        del length
        return _written(cache, (rope(keys, start + jnp.arange(keys.shape[0])), values), start)

    def push(
        self,
        cache: HeadMajorCache,
        key: Float[Array, "heads dim"],
        value: Float[Array, "heads dim"],
        position: Int[Array, ""],
        rope: Rope,
    ) -> HeadMajorCache:
        """Writes one token at its position."""
        return _written(cache, (rope(key[None], position[None]), value[None]), position)

    def read(
        self, cache: HeadMajorCache, position: Int[Array, ""], rope: Rope
    ) -> tuple[Float[Array, "capacity heads dim"], Float[Array, "capacity heads dim"]]:
        """Returns what is stored; the model masks what lies after `position`."""
        del position, rope
        keys, values = (jnp.asarray(each).swapaxes(0, 1)[: cache.capacity] for each in (cache.keys, cache.values))
        return keys, values

    def settle(self, cache: HeadMajorCache, position: Int[Array, ""]) -> HeadMajorCache:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Returns zeros: everything is exact."""
        return jnp.zeros_like(position), jnp.zeros_like(position)


type PackedKv = PackedPerTokenKv | PackedExactKv | PackedKivi


def pack_codec(codec: KvCodec, layout: Layout) -> KvCodec:
    """Returns the codec whose cache lies in a layout: the kernels' for HOPPER and SIMULATED, its own for PORTABLE.

    Example:
      >>> pack_codec(ExactKv(), Layout.HOPPER).layout, pack_codec(pack_codec(ExactKv(), Layout.HOPPER), Layout.PORTABLE)
      (<Layout.HOPPER: 'hopper'>, ExactKv(prompt='exact'))
    """
    own: KvCodec = codec
    if isinstance(codec, PackedPerTokenKv | PackedExactKv | PackedKivi):
        if codec.layout is layout:
            return codec
        own = ExactKv(prompt=codec.prompt) if isinstance(codec, PackedExactKv) else codec.inner
    if layout is Layout.PORTABLE:
        return own
    if isinstance(own, PerTokenKv):
        return PackedPerTokenKv(inner=own, layout=layout, prompt=own.prompt)
    if isinstance(own, Kivi):
        return PackedKivi(inner=own, layout=layout, prompt=own.prompt)
    return PackedExactKv(layout=layout, prompt=own.prompt)


def attention_fault(codec: KvCodec, dim: int, share: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns why no kernel attends to a codec's caches; None where one does.

    Args:
      codec: the model's, or the packed one.
      dim: numbers of a head.
      share: query heads of a KV head.
      dtype: of the model's activations.

    Example:
      >>> attention_fault(PerTokenKv(bits=3), 64, 3, jnp.bfloat16)
      'caches of 3 bits, kernels have 4 and 8'
    """
    from pallas_kernels import choose_kivi, fault_of_heads, fault_of_kivi

    own = pack_codec(codec, Layout.PORTABLE)
    if isinstance(own, PerTokenKv):
        if own.bits not in KERNEL_BITS:
            return f"caches of {own.bits} bits, kernels have 4 and 8"
        if own.group_size not in (None, dim):
            return f"caches in groups of {own.group_size}, kernels take one grid for each head of a token"
        if own.scale_dtype != "float16":
            return f"caches' scales in {own.scale_dtype}, kernels take float16"
    elif isinstance(own, Kivi) and own.key_bits != own.value_bits:
        return f"keys of {own.key_bits} bits and values of {own.value_bits}, kernels take as many of both"
    elif not isinstance(own, ExactKv | Kivi):
        return f"no kernel for {type(own).__name__}"
    elif jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype)} caches, kernels take bfloat16"
    fault = fault_of_heads(dim, share)
    if fault is None and isinstance(own, Kivi):
        bits, group = own.key_bits, own.group_size
        fault = fault_of_kivi(choose_kivi(bits, 1, 1, dim, TILE, group), dim, bits, group, group)
    return fault


def attention_kernel(codec: KvCodec) -> PackedKv | None:
    """Returns the codec if a kernel attends to its caches, by its layout; None where the model attends itself."""
    if isinstance(codec, PackedPerTokenKv | PackedExactKv | PackedKivi) and codec.layout is not Layout.PORTABLE:
        return codec
    return None


def attend_packed(
    codec: PackedKv,
    cache: HeadMajorCache | PackedKiviCache,
    queries: Float[Array, "batch heads dim"],
    positions: Int[Array, "batch"],
) -> Float[Array, "batch heads dim"]:
    """Attends to the caches of a batch by a kernel: each row sees its tokens up to its position.

    Args:
      codec: how they are kept.
      cache: with the token at the position in it; every leaf's first axis is the batch.
      queries: after RoPE; rounded to bfloat16, as is what they gather.
      positions: of the newest token of each row.
    """
    from pallas_kernels import PackedCache, choose_attention, packed_attention

    if isinstance(cache, PackedKiviCache):
        assert isinstance(codec, PackedKivi)
        return _attend_kivi(codec, cache, queries, positions)
    keys, values = jnp.asarray(cache.keys), jnp.asarray(cache.values)
    batch, heads, slots, _ = keys.shape
    grid: Literal["none", "low", "zero"] = "none"
    bits = 16
    if isinstance(codec, PackedPerTokenKv):
        grid, bits = "low" if codec.inner.grid == "float_zero" else "zero", codec.inner.bits
    lengths = jnp.minimum(positions + 1, cache.capacity).astype(jnp.int32)
    found = packed_attention(
        queries.astype(jnp.bfloat16),
        PackedCache(keys, values, cache.grids),
        lengths,
        grid=grid,
        config=choose_attention(bits, batch, heads, cache.dim, slots),
        simulate=simulation(codec.layout),
    )
    return found.astype(queries.dtype)


def _attend_kivi(
    codec: PackedKivi,
    cache: PackedKiviCache,
    queries: Float[Array, "batch heads dim"],
    positions: Int[Array, "batch"],
) -> Float[Array, "batch heads dim"]:
    """Attends to coded tokens and ring by the same blocks."""
    from pallas_kernels import KiviPages, PackedCache, choose_kivi, kivi_attention

    residual, inner = codec.inner.residual_length, codec.inner
    batch, heads, slots, _ = cache.keys.shape
    dim = cache.recent_keys.shape[-1]
    found = kivi_attention(
        queries.astype(jnp.bfloat16),
        KiviPages(*(jnp.asarray(each) for each in (cache.keys, cache.values, cache.key_grids, cache.value_grids))),
        jnp.maximum(positions - residual, 0).astype(jnp.int32),
        PackedCache(jnp.asarray(cache.recent_keys), jnp.asarray(cache.recent_values), None),
        jnp.minimum(positions, residual).astype(jnp.int32) + 1,
        config=choose_kivi(inner.key_bits, batch, heads, dim, slots, inner.group_size),
        simulate=simulation(codec.layout),
    )
    return found.astype(queries.dtype)


def simulation(layout: Layout) -> Any:
    """Returns the settings of the interpreter for the layout SIMULATED; None otherwise."""
    from pallas_kernels.compat import Simulation

    return Simulation() if layout is Layout.SIMULATED else None


def _slots(capacity: int) -> int:
    return -(-capacity // TILE) * TILE


def _written(
    cache: HeadMajorCache, parts: tuple[Float[Array, "tokens heads dim"] | Array, ...], position: Array | int
) -> HeadMajorCache:
    """Returns the cache with tokens [tokens, heads, ..] written from a position on."""
    kept = [leaf for leaf in (cache.keys, cache.values, cache.grids) if leaf is not None]
    new = [
        jax.lax.dynamic_update_slice_in_dim(old, part.swapaxes(0, 1).astype(old.dtype), position, 1)
        for old, part in zip(kept, parts, strict=True)
    ]
    return HeadMajorCache(new[0], new[1], new[2] if len(new) > 2 else None, cache.capacity, cache.dim)
