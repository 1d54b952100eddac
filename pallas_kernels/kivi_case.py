"""Attention over KIVI's caches to check and to time: random codes and grids, the kernel, its meaning in float32."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import attention_reference as reference
from pallas_kernels import kivi_layout
from pallas_kernels.attention import KiviPages, PackedCache, kivi_attention
from pallas_kernels.attention_case import attend_rounded
from pallas_kernels.attention_configs import choose_kivi
from pallas_kernels.attention_kernel import AttentionConfig

WINDOW: Final = 192  # room of the window in whole tiles
RECENT: Final = 129  # tokens in it: a residual of 128 and the newest


class KiviOperands(NamedTuple):
    """One attention's operands.

    Attributes:
      queries: after RoPE.
      cache: the coded tokens.
      lengths: of them.
      window: the others.
      window_lengths: of them.
    """

    queries: BFloat16[Array, "rows heads dim"]
    cache: KiviPages
    lengths: Int32[Array, "rows"]
    window: PackedCache
    window_lengths: Int32[Array, "rows"]


@dataclass(frozen=True)
class KiviCase:
    """Attention of one token a row over a random cache of KIVI's.

    Attributes:
      bits: of a code.
      rows: of the batch.
      heads: query heads.
      kv_heads: heads of the cache.
      dim: numbers of a head.
      tokens: coded ones of each row, a multiple of 128.
      group: tokens of a key's grid and channels of a value's.
    """

    bits: int
    rows: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    group: int = 32

    @property
    def kind(self) -> str:
        """Returns the name of the format."""
        return f"kivi{self.bits} g{self.group}"

    @property
    def bytes_of_cache(self) -> float:
        """Returns the bytes of codes and grids of all coded tokens."""
        return self.rows * self.kv_heads * self.tokens * self.dim * (self.bits / 4 + 8 / self.group)

    def config(self) -> AttentionConfig:
        """Returns what the rule chooses."""
        return choose_kivi(self.bits, self.rows, self.kv_heads, self.dim, self.tokens, self.group)

    def operands(self, seed: int) -> KiviOperands:
        """Returns random operands; all tokens are there, and 129 in the window."""
        return _operands(self, jax.random.key(seed))[0]

    def kernel(self, config: AttentionConfig) -> Callable[..., Any]:
        """Returns the kernel as a function of the operands."""
        return functools.partial(kivi_attention, config=config)

    def meaning(self, seed: int) -> Float32[Array, "rows heads dim"]:
        """Returns the attention of the operands of a seed in float32, with grids that are not rounded."""
        return _attended(self, reference.attend, jax.random.key(seed))

    def rounded(self, seed: int) -> BFloat16[Array, "rows heads dim"]:
        """Returns the same by XLA, keys, values, weights and result in bfloat16."""
        return _attended(self, attend_rounded, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _operands(case: KiviCase, key: jax.Array) -> tuple[KiviOperands, tuple[jax.Array, ...]]:
    keys = jax.random.split(key, 5)
    (rows, heads, tokens, dim), group = (case.rows, case.kv_heads, case.tokens, case.dim), case.group
    queries = jax.random.normal(keys[0], (rows, case.heads, dim), jnp.bfloat16)
    codes = jax.random.bits(keys[1], (2, rows, heads, tokens, dim * case.bits // 8), jnp.uint8)
    step = 3.0 / 2**case.bits
    scales = step * jax.random.uniform(keys[2], (rows, heads, tokens // group, dim), jnp.float32, 0.5, 1.5)
    lows = scales * jax.random.uniform(keys[3], scales.shape, jnp.float32, -0.7, -0.3) * 2**case.bits
    of_values = step * jax.random.uniform(keys[4], (rows, heads, tokens, dim // group), jnp.float32, 0.5, 1.5)
    value_lows = -of_values * 2.0 ** (case.bits - 2)
    cache = KiviPages(
        codes[0],
        codes[1],
        kivi_layout.key_grids(scales, lows, case.bits),
        kivi_layout.value_grids(of_values, value_lows, case.bits),
    )
    window = jax.random.normal(keys[3], (2, rows, heads, WINDOW, dim), jnp.bfloat16)
    lengths, others = jnp.full(rows, tokens, jnp.int32), jnp.full(rows, RECENT, jnp.int32)
    given = KiviOperands(queries, cache, lengths, PackedCache(window[0], window[1], None), others)
    return given, (scales, lows, of_values, value_lows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attended(case: KiviCase, attend: Callable[..., jax.Array], key: jax.Array) -> jax.Array:
    given, (scales, lows, of_values, value_lows) = _operands(case, key)
    codes = [reference.codes_of(each, case.dim) for each in (given.cache.keys, given.cache.values)]
    wide = [jnp.repeat(each, case.group, axis=2) for each in (scales, lows)]
    keys = codes[0] * wide[0] + wide[1]
    wide = [jnp.repeat(each, case.group, axis=3) for each in (of_values, value_lows)]
    values = kivi_layout.channels_order(codes[1], case.group) * wide[0] + wide[1]
    window = given.window._replace(values=kivi_layout.channels_order(given.window.values, case.group))
    both = [
        jnp.concatenate([dense, exact[:, :, :RECENT].astype(jnp.float32)], axis=2)
        for dense, exact in ((keys, window.keys), (values, window.values))
    ]
    return attend(given.queries, both[0], both[1], given.lengths + given.window_lengths)
