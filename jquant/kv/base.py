"""How keys and values are kept between steps: the contract of a KV-cache codec (architecture 3.10)."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
from flax import struct
from jaxtyping import Array, Float, Int

type Rope = Callable[[Float[Array, "tokens heads dim"], Int[Array, "tokens"]], Float[Array, "tokens heads dim"]]
type Prompt = Literal["exact", "stored", "streamed"]
type LayerCache = Any  # a struct node of one layer's arrays; its class belongs to the codec


class KvCodec(abc.ABC):
    """Stores the keys and values of one sequence in one layer; the model maps it over the batch.

    Final subclasses are `flax.struct` dataclasses: calibrated arrays are leaves, settings are static. Positions
    are absolute. Keys arrive before RoPE together with `rope(keys, positions)`: a codec that stores rotated keys
    turns them in `fill` and `push`, one that stores plain keys turns them in `read`.

    Invariants, checked for every subclass by `tests/contracts/test_codecs.py`: prompt and decode equal decode
    alone; nothing written at or after a position is read before it.

    Attributes:
      prompt: what a prompt's own queries see. "exact": keys and values as they come, as servers do that code the
        cache afterwards. "stored": all of them as the cache holds them when the prompt ends. "streamed": each query
        sees what decoding alone would show it. Where every token is coded as it comes, the last two are the same.
      chunk_prompts: the prompt modes in which a prompt may be filled in chunks, as what its queries see is then known
        from the chunks so far; none, unless a codec says otherwise.
    """

    prompt: Prompt = struct.field(pytree_node=False)
    chunk_prompts: ClassVar[tuple[Prompt, ...]] = ()

    @abc.abstractmethod
    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> LayerCache:
        """Returns an empty cache for `capacity` tokens of `heads` KV heads of width `dim`."""

    @abc.abstractmethod
    def fill(
        self,
        cache: LayerCache,
        keys: Float[Array, "tokens heads dim"],
        values: Float[Array, "tokens heads dim"],
        length: Int[Array, ""],
        rope: Rope,
        start: Int[Array, ""] | int = 0,
    ) -> LayerCache:
        """Stores a right-padded prompt, or the chunk of it that begins at the position `start`.

        The cache holds the tokens before `start` and has room for the chunk. The first `length` tokens of the prompt
        are real, so that a chunk may be padding alone.
        """

    @abc.abstractmethod
    def push(
        self,
        cache: LayerCache,
        key: Float[Array, "heads dim"],
        value: Float[Array, "heads dim"],
        position: Int[Array, ""],
        rope: Rope,
    ) -> LayerCache:
        """Stores one token, kept exact for this step if the method says so."""

    @abc.abstractmethod
    def read(
        self, cache: LayerCache, position: Int[Array, ""], rope: Rope
    ) -> tuple[Float[Array, "capacity heads dim"], Float[Array, "capacity heads dim"]]:
        """Returns the dense keys (after RoPE) and values that the token at `position` attends to.

        It is pushed, or yet to be pushed: at the position after a prompt, this is how the prompt is stored.
        """

    @abc.abstractmethod
    def settle(self, cache: LayerCache, position: Int[Array, ""]) -> LayerCache:
        """Codes what left the exact window after the step at `position`; the identity for most codecs."""

    @abc.abstractmethod
    def exact_from(self, position: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Returns from which position on keys, and values, are still exact for the token at `position`.

        `position + 1` says that none are. Values are exact at least as long as keys.
        """
