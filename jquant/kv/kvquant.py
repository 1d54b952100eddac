"""KVQuant: keys per channel before RoPE, values per token, codebooks by sensitivity (Hooper et al. 2024, 2401.18079).

A channel of the keys keeps its range from token to token, so calibration finds it once; RoPE would mix it with its
partner, so keys are stored before RoPE and turned when they are read. A value's range is its token's own. With the
middle z and the half width r of the range, and a codebook c of 2^bits signposts that all channels of a layer share,

    code = argmin_j |c_j - (x - z) / r|,    x' = r l_code + z

where the levels l are the signposts, moved under Q-Norm. What lies outside the range is kept as it came, in slots: a
number and its channel. With D = heads * dim and k = floor(share / 2 * (D - 1)) + 1, which are the numbers at or beyond
the quantiles share / 2 and 1 - share / 2,

    values    k largest and k least of each token; the range is that of the others
    keys      beyond the thresholds of their channels; the `key_slots` that stick out most, others are cut to the range.

The first tokens of a sequence, on which all later ones put much attention, are kept exact too; their absolute position
tells them. Every token is coded once, when it comes, so that a step costs one write and prompt and decode agree.

A number takes bits + 32 slots / D bits, of values 32 / D more: 4.5 and 4.4 at 4 bits, D = 1024 and a share of 0.01.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jquant.errors import FormatError
from jquant.kv.base import KvCodec, Prompt, Rope
from jquant.kv.vectors import ScaleDtype, pack_last, unpack_last, write
from jquant.numerics import nearest_code, packed_length, to_storage
from jquant.types import Leaf


@struct.dataclass
class SparseCodes:
    """Codes of tokens, and the few numbers of each that are kept as they came.

    Attributes:
      codes: uint8 [capacity, heads, ceil(dim * bits / 8)], a little-endian bit stream a head.
      outliers: `float_dtype` [capacity, slots].
      places: uint16 [capacity, slots], head * dim + channel of each outlier; heads * dim where a slot is empty.
    """

    codes: Leaf
    outliers: Leaf
    places: Leaf


@struct.dataclass
class KvQuantCache:
    """Keys before RoPE and values of one sequence.

    Attributes:
      keys: codes and outliers of the keys.
      values: the same of the values.
      ranges: `float_dtype` [capacity, 2], middle and half width of each token's values.
      first_keys: [sinks, heads, dim] in the model's dtype, before RoPE.
      first_values: [sinks, heads, dim].
    """

    keys: SparseCodes
    values: SparseCodes
    ranges: Leaf
    first_keys: Leaf
    first_values: Leaf


@struct.dataclass
class Codebook:
    """What a layer's keys, or its values, are rounded to on ranges of [-1, 1].

    Attributes:
      signposts: float32 [2^bits], sorted; a number's code is the place of the nearest.
      levels: float32 [2^bits], what codes stand for: the signposts, or Q-Norm's shift and stretch of them.
    """

    signposts: Leaf
    levels: Leaf


class Normalized(NamedTuple):
    """Values of tokens on their own ranges, float32.

    Attributes:
      values: [tokens, heads * dim], in [-1, 1] but for outliers.
      middles: [tokens].
      half_widths: [tokens].
      places: [tokens, 2 k], where the outliers are; the largest first, then the least.
    """

    values: Leaf
    middles: Leaf
    half_widths: Leaf
    places: Leaf


@final
@struct.dataclass
class KvQuant(KvCodec):
    """Codes every token alone, keys on calibrated ranges, values on their own, both by calibrated codebooks.

    Made by `jquant.calibration.calibrate_kvquant`.

    Attributes:
      key_low: float32 [heads, dim], below which a key is an outlier.
      key_high: float32 [heads, dim], above which it is one.
      key_codebook: of all channels of the keys.
      value_codebook: of all channels of the values.
      bits: bits of a code, 1 to 8.
      outliers: share of the numbers that are kept as they came, half of them on either side; 0 for none.
      key_slots: outliers of a token's key that are kept; None for 2 k and its square root more, as a token's own
        number varies. All of heads * dim is the published simulation, which keeps whatever is beyond the thresholds.
      sinks: tokens at the beginning of a sequence that are kept exact.
      float_dtype: how outliers and the ranges of values are stored; codes are computed from the stored ranges.
      prompt: see `KvCodec`; the published code serves with "exact" and simulates "stored", which is what decoding sees:
        "streamed" shows the same.
      calibrated_for: the fingerprint of the model that it was calibrated on; "" where it was not.

    Example:
      >>> low, signposts = jnp.full((2, 64), -1.0), jnp.linspace(-1.0, 1.0, 8)
      >>> codebook = Codebook(signposts, signposts)
      >>> cache = KvQuant(low, -low, codebook, codebook, bits=3).init(100, 2, 64, jnp.bfloat16)
      >>> cache.keys.codes.shape, cache.keys.outliers.shape, cache.first_keys.shape
      ((100, 2, 24), (100, 4), (1, 2, 64))

    Reference: arXiv:2401.18079, section 3.
    """

    key_low: Leaf
    key_high: Leaf
    key_codebook: Codebook
    value_codebook: Codebook
    bits: int = struct.field(pytree_node=False, default=4)
    outliers: float = struct.field(pytree_node=False, default=0.01)
    key_slots: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=1)
    float_dtype: ScaleDtype = struct.field(pytree_node=False, default="float16")
    prompt: Prompt = struct.field(pytree_node=False, default="stored")
    calibrated_for: str = struct.field(pytree_node=False, default="")
    chunk_prompts: ClassVar[tuple[Prompt, ...]] = ("stored", "streamed")

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> KvQuantCache:
        """Returns an empty cache; the first tokens are kept in `dtype`.

        Raises:
          FormatError: the settings cannot be, or the codec was calibrated for other heads.
        """
        self._check(heads, dim)
        first = jnp.zeros((min(self.sinks, capacity), heads, dim), dtype)

        def empty(slots: int) -> SparseCodes:
            return SparseCodes(
                codes=jnp.zeros((capacity, heads, packed_length(dim, self.bits)), jnp.uint8),
                outliers=jnp.zeros((capacity, slots), self.float_dtype),
                places=jnp.full((capacity, slots), heads * dim, jnp.uint16),
            )

        return KvQuantCache(
            keys=empty(self._key_slots(heads * dim)),
            values=empty(2 * outliers_per_side(self.outliers, heads * dim)),
            ranges=jnp.zeros((capacity, 2), self.float_dtype),
            first_keys=first,
            first_values=first,
        )

    def fill(
        self,
        cache: KvQuantCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        length: Int[Array, ""],
        rope: Rope,
        start: Int[Array, ""] | int = 0,
    ) -> KvQuantCache:
        """Codes the whole padded prompt; what lies past `length` is overwritten before any step can see it."""
        del length, rope
        tokens = keys.shape[0]
        places = jnp.arange(cache.first_keys.shape[0]) - start  # of the first tokens in the chunk
        own = ((places >= 0) & (places < tokens))[:, None, None]

        def keep(first: Array, x: Array) -> Array:
            return jnp.where(own, x[jnp.clip(places, 0, tokens - 1)].astype(first.dtype), first)

        return dataclasses.replace(
            self._write(cache, keys, values, start),
            first_keys=keep(cache.first_keys, keys),
            first_values=keep(cache.first_values, values),
        )

    def push(
        self,
        cache: KvQuantCache,
        key: Float[Array, "heads dim"],
        value: Float[Array, "heads dim"],
        position: Int[Array, ""],
        rope: Rope,
    ) -> KvQuantCache:
        """Codes one token, and keeps it exact if it is one of the first; its own query sees it so."""
        del rope
        chosen = (jnp.arange(cache.first_keys.shape[0]) == position)[:, None, None]
        return dataclasses.replace(
            self._write(cache, key[None], value[None], position),
            first_keys=jnp.where(chosen, key[None].astype(cache.first_keys.dtype), cache.first_keys),
            first_values=jnp.where(chosen, value[None].astype(cache.first_values.dtype), cache.first_values),
        )

    def read(
        self, cache: KvQuantCache, position: Int[Array, ""], rope: Rope
    ) -> tuple[Float[Array, "capacity heads dim"], Float[Array, "capacity heads dim"]]:
        """Returns what is stored, keys turned by their positions; the model masks what lies after `position`."""
        del position
        middle, half = (self.key_high + self.key_low) / 2.0, (self.key_high - self.key_low) / 2.0
        keys = self._decode(cache.keys, self.key_codebook, middle[None], half[None])
        middle, half = (cache.ranges[:, end, None, None].astype(jnp.float32) for end in (0, 1))
        values = self._decode(cache.values, self.value_codebook, middle, half)
        keys, values = write(keys, cache.first_keys, 0), write(values, cache.first_values, 0)
        return rope(keys, jnp.arange(keys.shape[0])), values

    def settle(self, cache: KvQuantCache, position: Int[Array, ""]) -> KvQuantCache:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Returns the next position: what is exact stays so, and is stored."""
        return position + 1, position + 1

    def _write(
        self,
        cache: KvQuantCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        position: Array | int,
    ) -> KvQuantCache:
        coded, ranges = self._code_values(values)
        return dataclasses.replace(
            cache,
            keys=write(cache.keys, self._code_keys(keys), position),
            values=write(cache.values, coded, position),
            ranges=write(cache.ranges, ranges, position),
        )

    def _code_keys(self, keys: Float[Array, "tokens heads dim"]) -> SparseCodes:
        x = keys.astype(jnp.float32)
        steps = normalize_keys(x, self.key_low, self.key_high)
        outside = (x < self.key_low[None]) | (x > self.key_high[None])
        distance = jnp.where(outside, jnp.abs(steps), jnp.zeros_like(steps)).reshape(x.shape[0], -1)
        size = distance.shape[1]
        farthest, places = jax.lax.top_k(distance, self._key_slots(size))
        places = jnp.where(farthest > 0.0, places, jnp.full_like(places, size))
        return self._pack(x, steps, self.key_codebook, places)

    def _code_values(self, values: Float[Array, "tokens heads dim"]) -> tuple[SparseCodes, Float[Array, "tokens 2"]]:
        found = normalize_values(values, self.outliers, self.float_dtype)
        steps = found.values.reshape(values.shape)
        ranges = jnp.stack([found.middles, found.half_widths], axis=1)
        return self._pack(values.astype(jnp.float32), steps, self.value_codebook, found.places), ranges

    def _pack(self, x: Array, steps: Array, codebook: Codebook, places: Array) -> SparseCodes:
        flat = x.reshape(x.shape[0], -1)
        kept = jnp.take_along_axis(flat, places, axis=1, mode="fill", fill_value=0.0)
        return SparseCodes(
            codes=pack_last(nearest_code(steps, codebook.signposts), self.bits),
            outliers=_narrow(kept, self.float_dtype),
            places=places.astype(jnp.uint16),
        )

    def _decode(
        self, stored: SparseCodes, codebook: Codebook, middle: Array, half: Array
    ) -> Float[Array, "capacity heads dim"]:
        capacity, heads, _ = stored.codes.shape
        dim = self.key_low.shape[1]
        dense = codebook.levels[unpack_last(stored.codes, self.bits, dim)]
        middle, half = (jnp.broadcast_to(end, dense.shape) for end in (middle, half))
        flat = (dense * half + middle).reshape(capacity, heads * dim)
        rows = jnp.arange(capacity)[:, None]
        kept = stored.outliers.astype(jnp.float32)
        return flat.at[rows, stored.places.astype(jnp.int32)].set(kept, mode="drop").reshape(dense.shape)

    def _key_slots(self, size: int) -> int:
        expected = 2 * outliers_per_side(self.outliers, size)
        return expected + math.ceil(math.sqrt(expected)) if self.key_slots is None else self.key_slots

    def _check(self, heads: int, dim: int) -> None:
        check_kvquant(self.bits, self.outliers, self.key_slots, self.sinks, heads * dim)
        shapes = [array.shape for array in (self.key_low, self.key_high)]
        books = jax.tree.leaves((self.key_codebook, self.value_codebook))
        if shapes != [(heads, dim)] * 2 or any(book.shape != (2**self.bits,) for book in books):
            raise FormatError(
                f"KVQuant calibrated for {shapes[0]} heads and channels by codebooks of {books[0].shape[0]} entries, "
                f"on a model of {(heads, dim)} by {self.bits} bits: calibrate it on this model"
            )


def check_kvquant(bits: int, outliers: float, key_slots: int | None, sinks: int, size: int) -> None:
    """Refuses settings that cannot be.

    Args:
      bits: see `KvQuant`, as the others.
      outliers: share of the numbers that are kept as they came.
      key_slots: outliers of a token's key that are kept.
      sinks: tokens at the beginning that are kept exact.
      size: numbers of a token's keys, heads * dim.

    Raises:
      FormatError: one is out of its range.
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"bits={bits} for KVQuant: give 1 to 8; a cache without codes is ExactKv")
    if not 0.0 <= outliers < 1.0 or 2 * outliers_per_side(outliers, size) >= size:
        raise FormatError(
            f"outliers={outliers} of the {size} numbers of a token: give a share below 1 that leaves some"
        )
    if key_slots is not None and not 0 <= key_slots <= size:
        raise FormatError(f"key_slots={key_slots}: a key has {size} numbers; give 0 to {size}")
    if sinks < 0:
        raise FormatError(f"sinks={sinks}: give 0 tokens or more")


def outliers_per_side(share: float, size: int) -> int:
    """Returns how many of `size` numbers lie at or beyond one quantile of an outlier share.

    >>> [outliers_per_side(0.01, size) for size in (192, 1024, 4096)], outliers_per_side(0.0, 192)
    ([1, 6, 21], 0)
    """
    return math.floor(share / 2 * (size - 1) + 1e-9) + 1 if share > 0.0 else 0


def normalize_keys(
    keys: Float[Array, "tokens heads dim"], low: Float[Array, "heads dim"], high: Float[Array, "heads dim"]
) -> Float[Array, "tokens heads dim"]:
    """Maps the range of each channel of keys to [-1, 1]; in a range without width every key counts its distance.

    >>> normalize_keys(jnp.array([[[3.0, 2.0]]]), jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])).tolist()
    [[[1.0, 0.0]]]
    """
    return (keys - (high + low)[None] / 2.0) / _nonzero((high - low)[None] / 2.0)


def normalize_values(values: Float[Array, "tokens heads dim"], share: float, dtype: ScaleDtype) -> Normalized:
    """Takes the outliers out of each token's values, and maps the range of the others to [-1, 1].

    Args:
      values: of tokens.
      share: of outliers.
      dtype: what middles and half widths are rounded to.

    Example:
      >>> found = normalize_values(jnp.array([[[0.0, 9.0, 1.0, -9.0, 4.0]]]), 0.1, "float32")
      >>> found.values.tolist(), found.places.tolist()
      ([[-1.0, 3.5, -0.5, -5.5, 1.0]], [[1, 3]])
    """
    flat = values.astype(jnp.float32).reshape(values.shape[0], -1)
    side = outliers_per_side(share, flat.shape[1])
    largest, above = jax.lax.top_k(flat, side + 1)
    least, below = jax.lax.top_k(-flat, side + 1)
    high, low = largest[:, -1], -least[:, -1]
    middles, halves = (_narrow(end / 2.0, dtype).astype(jnp.float32) for end in (high + low, high - low))
    steps = (flat - middles[:, None]) / _nonzero(halves)[:, None]
    return Normalized(steps, middles, halves, jnp.concatenate([above[:, :side], below[:, :side]], axis=1))


def _nonzero(half_widths: Array) -> Array:
    """Returns half widths to divide by: 1 for 0, where every number is the range's middle."""
    return jnp.where(half_widths > 0.0, half_widths, jnp.ones_like(half_widths))


def _narrow(x: Array, dtype: ScaleDtype) -> Array:
    """Rounds for storage; what is too large becomes the largest number of the dtype, not infinite."""
    largest = float(jnp.finfo(dtype).max)
    return to_storage(jnp.clip(x, -largest, largest), dtype)
