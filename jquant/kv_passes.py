"""Model passes that choose how keys and values are kept; weights are left as they are."""

import abc
import dataclasses
import re
from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jquant.blocks import check_pattern
from jquant.calibration import (
    Keeping,
    calibrate_float8_kv,
    calibrate_kvquant,
    calibrate_razor_kv,
    load_kv_codecs,
    put_codecs,
)
from jquant.checkpoint import abstract_tree
from jquant.errors import CheckpointError, RecipeError
from jquant.kv import Codebook, ExactKv, Float8Kv, KvCodec, KvQuant, Prompt, RazorKv
from jquant.kv.vectors import ScaleDtype
from jquant.models import LazyModel, Llama, blocks, rewrite
from jquant.passes import Context, ModelPass
from jquant.report import Report

type Tokens = Int[Array, "samples length"]


@final
@dataclass(frozen=True)
class SetKvCodec(ModelPass):
    r"""Puts a codec that needs no calibration into layers.

    Attributes:
      codec: the codec.
      match: a regular expression for the whole path of a layer, such as `layers\.[0-3]`; all layers if not given.
        Later passes win over earlier ones, so that several of them are rules.
    """

    codec: KvCodec
    match: str = r"layers\.\d+"

    def __post_init__(self) -> None:
        """Refuses a pattern that is not a regular expression."""
        check_pattern(self.match)

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a pattern that no layer matches, and settings that the model's heads do not take."""
        count = len(blocks(model))
        if not any(re.fullmatch(self.match, f"layers.{index}") for index in range(count)):
            raise RecipeError(f"match {self.match!r} is unused: the model has layers.0 to layers.{count - 1}")
        _check_codec(self.codec, model)

    def outline(self, model: Llama) -> Llama:
        """Returns what the pass makes of an abstract model."""
        paths = [f"layers.{index}" for index in range(len(blocks(model)))]
        own = [block.self_attn.kv_codec for block in blocks(model)]
        chosen = [self.codec if re.fullmatch(self.match, path) else old for path, old in zip(paths, own, strict=True)]
        return put_codecs(model, chosen)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Puts the codec."""
        del context
        return self.outline(model), Report()

    def streams(self) -> bool:
        """Tells that each block has its own codec."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Puts the codec as blocks are read."""
        del context
        return rewrite(model, self.outline), Report()


class _CalibrateKv(ModelPass):
    """Measures over the calibration text, with the weights as they are then, and puts the codecs that are fitted."""

    @abc.abstractmethod
    def fit(self, model: Llama | LazyModel, tokens: Tokens, keeping: Keeping) -> tuple[KvCodec, ...]:
        """Returns each layer's codec; blocks are read one after another.

        Args:
          model: as it is when the pass is run.
          tokens: calibration windows.
          keeping: where what is made on the way is kept.
        """

    def needs_tokens(self) -> bool:
        """Tells that keys and values are measured."""
        return True

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Measures and puts the codecs."""
        codecs, report = self._resumed(model, context)
        return put_codecs(model, codecs), report

    def streams(self) -> bool:
        """Tells that blocks are measured one after another."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Measures block by block, and puts the codecs as blocks are read."""
        codecs, report = self._resumed(model, context)
        return rewrite(model, lambda whole: put_codecs(whole, codecs)), report

    def _resumed(self, model: Llama | LazyModel, context: Context) -> tuple[tuple[KvCodec, ...], Report]:
        tokens = context.tokens
        assert tokens is not None
        return context.resumed(lambda: (self.fit(model, tokens, context.keeping()), Report()))


@final
@dataclass(frozen=True)
class CalibrateRazorKv(_CalibrateKv):
    """QRazor's cache in every layer, on scales measured over the calibration text with the weights as they are then.

    Attributes:
      base_bits: bits of the integers, sign included, 2 to 16.
      bits: bits that are kept, sign included, 2 to 8.
      group_size: neighbours of a head that drop the same bits.
      prompt: what a prompt's own queries see.
    """

    base_bits: int = 8
    bits: int = 4
    group_size: int = 8
    prompt: Prompt = "stored"

    def check(self, model: Llama) -> None:
        """Refuses settings that the model's heads do not take."""
        _check_codec(self._abstract(), model)

    def outline(self, model: Llama) -> Llama:
        """Returns what the pass makes of an abstract model."""
        return put_codecs(model, [self._abstract()] * len(blocks(model)))

    def fit(self, model: Llama | LazyModel, tokens: Tokens, keeping: Keeping) -> tuple[KvCodec, ...]:
        """Returns codecs fitted to the text."""
        return calibrate_razor_kv(model, tokens, keeping, **dataclasses.asdict(self))

    def _abstract(self) -> RazorKv:
        settings = dataclasses.asdict(self)
        codec: RazorKv = jax.eval_shape(lambda: RazorKv(jnp.float32(1), jnp.float32(1), **settings))
        return codec


@final
@dataclass(frozen=True)
class CalibrateFloat8Kv(_CalibrateKv):
    """Caches of float8 in every layer, on scales measured over the calibration text with the weights as they are then.

    Attributes:
      prompt: what a prompt's own queries see.
    """

    prompt: Prompt = "stored"

    def check(self, model: Llama) -> None:
        """Refuses nothing: every head has room for a byte."""

    def outline(self, model: Llama) -> Llama:
        """Returns what the pass makes of an abstract model."""
        codec = jax.eval_shape(lambda: Float8Kv(jnp.float32(1), jnp.float32(1), self.prompt))
        return put_codecs(model, [codec] * len(blocks(model)))

    def fit(self, model: Llama | LazyModel, tokens: Tokens, keeping: Keeping) -> tuple[KvCodec, ...]:
        """Returns codecs fitted to the text."""
        return calibrate_float8_kv(model, tokens, keeping, prompt=self.prompt)


@final
@dataclass(frozen=True)
class CalibrateKvQuant(_CalibrateKv):
    """KVQuant's cache in every layer, on ranges and codebooks from the calibration text and the loss's gradients there.

    Attributes:
      bits: bits of a code, 1 to 8.
      outliers: share of the numbers that are kept as they came.
      key_slots: outliers of a token's key that are kept; None for some more than its value has, see `KvQuant`.
      sinks: tokens at the beginning of a sequence that are kept exact.
      qnorm: whether codes stand for levels that keep mean and deviation (Q-Norm), which the paper uses at 2 bits.
      float_dtype: how outliers and the ranges of values are stored.
      prompt: what a prompt's own queries see.
    """

    bits: int = 4
    outliers: float = 0.01
    key_slots: int | None = None
    sinks: int = 1
    qnorm: bool = False
    float_dtype: ScaleDtype = "float16"
    prompt: Prompt = "stored"

    def check(self, model: Llama) -> None:
        """Refuses settings that the model's heads do not take."""
        _check_codec(self._abstract(model), model)

    def outline(self, model: Llama) -> Llama:
        """Returns what the pass makes of an abstract model."""
        return put_codecs(model, [self._abstract(model)] * len(blocks(model)))

    def fit(self, model: Llama | LazyModel, tokens: Tokens, keeping: Keeping) -> tuple[KvCodec, ...]:
        """Returns codecs fitted to the text."""
        return calibrate_kvquant(model, tokens, keeping, **dataclasses.asdict(self))

    def _abstract(self, model: Llama) -> KvQuant:
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "qnorm"}

        def make() -> KvQuant:
            bound = jnp.zeros((model.config.num_key_value_heads, model.config.head_dim))
            book = Codebook(jnp.zeros(2 ** max(self.bits, 0)), jnp.zeros(2 ** max(self.bits, 0)))
            return KvQuant(bound, bound, book, book, **settings)

        codec: KvQuant = jax.eval_shape(make)
        return codec


@final
@dataclass(frozen=True)
class LoadKvCodecs(ModelPass):
    """Takes the KV codecs of another checkpoint; calibrated ones fit the model alone that they were calibrated on.

    Attributes:
      path: of the checkpoint. Where it was quantized too, this pass stands where its recipe calibrated the codecs.
    """

    path: str

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a checkpoint without codecs, and codecs that the model's heads do not take."""
        codecs = self._abstract()
        if all(isinstance(codec, ExactKv) for codec in codecs):
            raise RecipeError(f"{self.path} keeps exact caches in all layers: there is no codec to load")
        if len(codecs) != len(blocks(model)):
            raise RecipeError(f"{self.path} has {len(codecs)} layers, the model {len(blocks(model))}")
        for codec in dict.fromkeys(codecs):
            _check_codec(codec, model)

    def outline(self, model: Llama) -> Llama:
        """Returns what the pass makes of an abstract model."""
        return put_codecs(model, self._abstract())

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Loads the codecs and puts them, unless they were calibrated on another model."""
        del context
        return put_codecs(model, load_kv_codecs(model, self.path)), Report()

    def streams(self) -> bool:
        """Tells that each layer has its own codec."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Loads the codecs, and puts them as blocks are read."""
        del context
        codecs = load_kv_codecs(model, self.path)
        return rewrite(model, lambda whole: put_codecs(whole, codecs)), Report()

    def _abstract(self) -> list[KvCodec]:
        tree = abstract_tree(self.path)
        if not isinstance(tree, Llama):
            raise CheckpointError(f"{self.path} holds a {type(tree).__name__}, not a model")
        return [layer.self_attn.kv_codec for layer in blocks(tree)]


def _check_codec(codec: KvCodec, model: Llama) -> None:
    """Refuses a codec whose empty cache cannot be made for the model."""
    config = model.config
    jax.eval_shape(lambda: codec.init(1, config.num_key_value_heads, config.head_dim, model.embed_tokens.dtype))
