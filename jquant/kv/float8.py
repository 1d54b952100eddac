"""The cache of servers in 8 bits: floats of 1 sign, 4 exponent and 3 mantissa bits on one scale of keys, one of values.

    code = float8_e4m3fn(clip(x / s, -448, 448)),   x' = s code

Scales belong to a layer and are fixed before, by calibration or by the checkpoint; rounding is half to even. vLLM's and
SGLang's `fp8` caches and compressed-tensors' `kv_cache_scheme` are this, keys after RoPE.

Reference: Micikevicius et al., FP8 formats for deep learning (2022), arXiv:2209.05433.
"""

from typing import ClassVar, Final, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jquant.kv.base import KvCodec, Prompt, Rope
from jquant.kv.exact import ExactCache
from jquant.kv.vectors import write
from jquant.numerics import to_storage
from jquant.types import Leaf, compute_dtype

LARGEST: Final = 448.0  # of float8_e4m3fn, which has no infinity: what is larger would become NaN


@final
@struct.dataclass
class Float8Kv(KvCodec):
    """Codes every token alone; what is larger than 448 scales saturates.

    Made by `jquant.calibration.calibrate_float8_kv`.

    Attributes:
      key_scale: float32 [], what stands for 1 among a layer's keys.
      value_scale: the same of values.
      prompt: see `KvCodec`; "streamed" shows what "stored" shows.
      calibrated_for: the fingerprint of the model that the scales were measured on; "" where they were not measured.

    Example:
      >>> Float8Kv(jnp.float32(0.1), jnp.float32(0.1)).init(8, 2, 64, jnp.float32).keys.dtype
      dtype(float8_e4m3fn)

    Reference: arXiv:2209.05433.
    """

    key_scale: Leaf
    value_scale: Leaf
    prompt: Prompt = struct.field(pytree_node=False, default="stored")
    calibrated_for: str = struct.field(pytree_node=False, default="")
    chunk_prompts: ClassVar[tuple[Prompt, ...]] = ("stored", "streamed")

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> ExactCache:
        """Returns a cache of zeros of one byte, [capacity, heads, dim] twice."""
        del dtype
        empty = jnp.zeros((capacity, heads, dim), jnp.float8_e4m3fn)
        return ExactCache(keys=empty, values=empty)

    def fill(
        self,
        cache: ExactCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        length: Int[Array, ""],
        rope: Rope,
        start: Int[Array, ""] | int = 0,
    ) -> ExactCache:
        """Codes the whole padded prompt; what lies past `length` is overwritten before any step can see it."""
        del length
        return self._write(cache, rope(keys, start + jnp.arange(keys.shape[0])), values, start)

    def push(
        self,
        cache: ExactCache,
        key: Float[Array, "heads dim"],
        value: Float[Array, "heads dim"],
        position: Int[Array, ""],
        rope: Rope,
    ) -> ExactCache:
        """Codes one token; its own query sees it coded."""
        return self._write(cache, rope(key[None], position[None]), value[None], position)

    def read(
        self, cache: ExactCache, position: Int[Array, ""], rope: Rope
    ) -> tuple[Float[Array, "capacity heads dim"], Float[Array, "capacity heads dim"]]:
        """Returns what is stored, in float32; the model masks what lies after `position`."""
        del position, rope
        keys, values = (array.astype(jnp.float32) for array in (cache.keys, cache.values))
        return keys * jnp.broadcast_to(self.key_scale, keys.shape), values * jnp.broadcast_to(
            self.value_scale, values.shape
        )

    def settle(self, cache: ExactCache, position: Int[Array, ""]) -> ExactCache:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Returns the next position: nothing stays exact."""
        return position + 1, position + 1

    def _write(
        self,
        cache: ExactCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        position: Array | int,
    ) -> ExactCache:
        coded = ExactCache(keys=to_float8(keys, self.key_scale), values=to_float8(values, self.value_scale))
        return write(cache, coded, position)


def to_float8(x: Float[Array, "*shape"], scale: Float[Array, ""]) -> Float[Array, "*shape"]:
    """Returns float8_e4m3fn of x / scale, saturated.

    >>> to_float8(jnp.array([1.0, 1.07, 1e6]), jnp.float32(1.0)).tolist()
    [1.0, 1.125, 448.0]
    """
    wide = x.astype(compute_dtype(x.dtype))
    steps = wide / jnp.broadcast_to(scale.astype(wide.dtype), wide.shape)
    return to_storage(jnp.clip(steps, -LARGEST, LARGEST), jnp.float8_e4m3fn)


def fit_float8_scale(largest: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the scale whose largest number is the absmax, in float32; 1 where all is zero.

    >>> float(fit_float8_scale(jnp.float32(896.0))), float(fit_float8_scale(jnp.float32(0.0)))
    (2.0, 1.0)
    """
    wide = largest.astype(jnp.float32)
    return jnp.where(wide > 0, wide / LARGEST, 1.0)
