"""Decode attention to check and to time: random caches, the kernel, its meaning, what XLA and cuDNN do in bfloat16."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels import attention_reference as reference
from pallas_kernels.attention import PackedCache, packed_attention
from pallas_kernels.attention_configs import choose_attention
from pallas_kernels.attention_kernel import AttentionConfig
from pallas_kernels.flash_tokens import Grid

type Kind = Literal["kv4", "kv8", "kv16"]

BITS: Final[dict[Kind, int]] = {"kv4": 4, "kv8": 8, "kv16": 16}
BYTES_OF_GRIDS: Final = 8  # of a token's head


class Operands(NamedTuple):
    """One attention's operands.

    Attributes:
      queries: after RoPE.
      cache: in pages.
      lengths: tokens of each row.
      table: which page holds what; None where page b is row b.
    """

    queries: BFloat16[Array, "rows heads dim"]
    cache: PackedCache
    lengths: Int32[Array, "rows"]
    table: Int32[Array, "rows slots"] | None


@dataclass(frozen=True)
class AttentionCase:
    """Attention of one token a row over a random cache.

    Attributes:
      kind: how keys and values are stored.
      rows: of the batch.
      heads: query heads.
      kv_heads: heads of the cache.
      dim: numbers of a head.
      tokens: that each row has room for.
      page: tokens of a page; None for one page a row.
      grid: what stands beside a scale.
      ragged: whether rows have fewer tokens than there is room for, each another number.
    """

    kind: Kind
    rows: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    page: int | None = None
    grid: Grid = "low"
    ragged: bool = False

    @property
    def bytes_of_cache(self) -> float:
        """Returns the bytes of codes and grids of all tokens."""
        grids = 0 if self.kind == "kv16" else BYTES_OF_GRIDS
        return self.rows * self.kv_heads * self.tokens * (self.dim * BITS[self.kind] / 4 + grids)

    def config(self) -> AttentionConfig:
        """Returns what the rule chooses."""
        return choose_attention(BITS[self.kind], self.rows, self.kv_heads, self.dim, self.tokens, self.page)

    def operands(self, seed: int) -> Operands:
        """Returns random operands."""
        return _operands(self, jax.random.key(seed))

    def kernel(self, config: AttentionConfig) -> Callable[..., Any]:
        """Returns the kernel as a function of the operands."""
        return functools.partial(packed_attention, grid=self.grid, config=config)

    def meaning(self, seed: int) -> Float32[Array, "rows heads dim"]:
        """Returns the attention of the operands of a seed in float32."""
        return jax.jit(functools.partial(reference.packed_attention, grid=self.grid))(*self.operands(seed))

    def rounded(self, seed: int) -> BFloat16[Array, "rows heads dim"]:
        """Returns the attention of the operands of a seed by XLA, keys, values, weights and result in bfloat16."""
        return _rounded(self, jax.random.key(seed))


def attend_rounded(
    queries: BFloat16[Array, "rows heads dim"],
    keys: Float32[Array, "rows kv_heads context dim"],
    values: Float32[Array, "rows kv_heads context dim"],
    lengths: Int32[Array, "rows"],
) -> BFloat16[Array, "rows heads dim"]:
    """Returns what `attention_reference.attend` does in bfloat16, products summed in float32.

    XLA may leave out a conversion to bfloat16 and back, and does so on a GPU where a KV head has one query head, whose
    products it makes without tensor cores; `reduce_precision` is a rounding that it keeps.
    """
    keys, values = _bfloat16(keys), _bfloat16(values)
    return _gathered(_bfloat16(_weights(queries, keys, lengths)), values, queries.shape)


def bfloat16_attentions() -> dict[str, Callable[..., Any]]:
    """Returns other attentions by name, functions of `bfloat16_operands`, all rows at full length.

    "xla" and "cudnn" are `jax.nn.dot_product_attention`, keys and values token by token; "xla, by heads" is two
    products over keys and values that lie head by head, the best that XLA makes of it.
    """
    return {
        "xla": functools.partial(_dot_product, "xla"),
        "xla, by heads": _by_heads,
        "cudnn": functools.partial(_dot_product, "cudnn"),
    }


def bfloat16_operands(shape: tuple[int, int, int, int, int], name: str, seed: int) -> tuple[Any, ...]:
    """Returns queries, keys, values and lengths for one of these attentions.

    Args:
      shape: rows, heads, kv_heads, dim, tokens.
      name: whose.
      seed: of the random numbers.
    """
    rows, heads, kv_heads, dim, tokens = shape
    stored = (rows, kv_heads, tokens, dim) if name == "xla, by heads" else (rows, tokens, kv_heads, dim)
    of_queries, of_keys, of_values = jax.random.split(jax.random.key(seed), 3)
    queries = jax.random.normal(of_queries, (rows, heads, dim), jnp.bfloat16)
    keys, values = (jax.random.normal(each, stored, jnp.bfloat16) for each in (of_keys, of_values))
    return queries, keys, values, jnp.full(rows, tokens, jnp.int32)


def random_legal_attention(seed: int, count: int) -> Iterator[AttentionCase]:
    """Yields attentions of odd shapes that have a kernel."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        kind: Kind = ("kv4", "kv8", "kv16")[rng.integers(3)]
        kv_heads, share = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        page = int(rng.choice([16, 32, 64, 128])) if rng.integers(2) else None
        tokens = 128 * int(rng.integers(1, 17))
        grid: Grid = "none" if kind == "kv16" else ("low", "zero")[rng.integers(2)]
        dim = int(rng.choice([64, 128]))
        yield AttentionCase(
            kind, int(rng.integers(1, 6)), kv_heads * share, kv_heads, dim, tokens, page, grid, ragged=True
        )


@functools.partial(jax.jit, static_argnums=0)
def _operands(case: AttentionCase, key: jax.Array) -> Operands:
    of_queries, of_keys, of_values, of_grids, of_table, of_lengths = jax.random.split(key, 6)
    page = case.page or case.tokens
    pages = case.rows * case.tokens // page
    queries = jax.random.normal(of_queries, (case.rows, case.heads, case.dim), jnp.bfloat16)
    table = None
    if case.page is not None:
        table = jax.random.permutation(of_table, pages).reshape(case.rows, -1).astype(jnp.int32)
    lengths = jnp.full(case.rows, case.tokens, jnp.int32)
    if case.ragged:
        lengths = jax.random.randint(of_lengths, (case.rows,), 1, case.tokens + 1, jnp.int32)
    shape = (pages, case.kv_heads, page)
    if case.kind == "kv16":
        keys, values = (jax.random.normal(each, (*shape, case.dim), jnp.bfloat16) for each in (of_keys, of_values))
        return Operands(queries, PackedCache(keys, values, None), lengths, table)
    bits = BITS[case.kind]
    stored = (*shape, case.dim * bits // 8)
    key_codes, value_codes = (jax.random.bits(each, stored, jnp.uint8) for each in (of_keys, of_values))
    scales, others = jax.random.uniform(of_grids, (2, *shape, 2), jnp.float32, 0.5, 1.5)
    scales = scales * (4.0 / 2**bits)
    middle = 2.0 ** (bits - 1)
    others = jnp.round(others * middle) if case.grid == "zero" else -others * scales * middle
    grids = jnp.stack([scales, others], axis=-1).reshape(*shape, 4).astype(jnp.float16)
    return Operands(queries, PackedCache(key_codes, value_codes, grids), lengths, table)


@functools.partial(jax.jit, static_argnums=0)
def _rounded(case: AttentionCase, key: jax.Array) -> jax.Array:
    given = _operands(case, key)
    keys, values = (
        reference.in_rows(each, given.table) for each in reference.dense_cache(given.cache, case.dim, case.grid)
    )
    return attend_rounded(given.queries, keys, values, given.lengths)


def _dot_product(
    implementation: Literal["xla", "cudnn"],
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    del lengths
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # that function's own arithmetic
        return jax.nn.dot_product_attention(queries[:, None], keys, values, implementation=implementation)[:, 0]


def _by_heads(queries: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> jax.Array:
    return _gathered(_weights(queries, keys, lengths).astype(jnp.bfloat16), values, queries.shape)


def _weights(queries: jax.Array, keys: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the softmax in float32, [rows, KV heads, query heads of each, context]."""
    rows, _, dim = queries.shape
    grouped = queries.reshape(rows, keys.shape[1], -1, dim)
    scores = jnp.einsum("bhrd,bhtd->bhrt", grouped, keys, preferred_element_type=jnp.float32) / math.sqrt(dim)
    seen = (jnp.arange(keys.shape[2])[None] < lengths[:, None])[:, None, None]
    return jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)


def _gathered(weights: jax.Array, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    found = jnp.einsum("bhrt,bhtd->bhrd", weights, values, preferred_element_type=jnp.float32)
    return found.astype(jnp.bfloat16).reshape(shape)


def _bfloat16(numbers: jax.Array) -> jax.Array:
    kind = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(numbers, kind.nexp, kind.nmant).astype(jnp.bfloat16)


def relative_error(found: Float[Array, "rows heads dim"], expected: Float[Array, "rows heads dim"]) -> float:
    """Returns the norm of the difference over the norm of what was expected."""
    return float(jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))
