"""Model passes: what a recipe lists. Each is a frozen dataclass, at most a few lines of glue over a pure function."""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jquant.blocks import (
    SITES,
    ActivationPlace,
    ActivationRule,
    BlockPass,
    Devices,
    InputQuantizers,
    calibration_attention,
)
from jquant.calibration import (
    BlockStore,
    Keeping,
    SharedStatistics,
    check_weights,
    quantize_blocks,
    stream_blocks,
)
from jquant.checkpoint import digest_lazily
from jquant.errors import FormatError, RecipeError
from jquant.formats import QuantizedTensor
from jquant.models import Block, LazyModel, Linear, Llama, blocks, get, in_memory, put, rewrite, with_head
from jquant.quantizers import WeightQuantizer
from jquant.report import BlockReport, Report
from jquant.transforms import own_head
from jquant.types import Key

_WHOLE: Final = "needs the whole model in memory: it cannot run one block at a time (--memory blocks)"


@dataclass(frozen=True)
class Context:
    """What passes are given besides the model.

    Attributes:
      key: random key of the run.
      tokens: calibration windows [samples, length], or None if no pass needs them.
      store: where finished blocks are kept, or None to keep them in memory alone.
      statistics: folder for statistics of the source's own activations, which other runs share; None to keep none.
      activations: where the inputs of blocks are kept between blocks; no choice changes a bit of the result.
      devices: over which calibration windows are spread, of all processes; no choice changes a bit of the result.
        Empty for the first one of this process.
      compilers: programs of a block that are compiled at the same time before it is begun (`calibration.compilers`);
        0 to compile each as it is used. No choice changes a bit of the result.
      on_block: called after each block, for progress.
    """

    key: Key
    tokens: Int[Array, "samples length"] | None = None
    store: BlockStore | None = None
    statistics: Path | None = None
    activations: ActivationPlace = "device"
    devices: Devices = ()
    compilers: int = 0
    on_block: Callable[[BlockReport], None] = lambda report: None

    def keeping(self, statistics: SharedStatistics | None = None) -> Keeping:
        """Returns where calibration keeps what it makes on the way."""
        return Keeping(self.store, statistics, self.activations, self.devices, self.compilers)

    def resumed[T](self, compute: Callable[[], tuple[T, Report]]) -> tuple[T, Report]:
        """Returns what a pass computes of the whole model: from the store if it is there, else computed and kept."""
        kept = None if self.store is None else self.store.get_whole()
        if kept is None:
            kept = compute()
            if self.store is not None:
                self.store.put_whole(*kept)
        return kept


class ModelPass(abc.ABC):
    """Rewrites the whole tree. Final subclasses are frozen dataclasses of settings."""

    @abc.abstractmethod
    def needs_tokens(self) -> bool:
        """Tells whether the pass reads `context.tokens`."""

    @abc.abstractmethod
    def check(self, model: Llama) -> None:
        """Raises RecipeError or FormatError for what cannot work on this model; abstract models will do."""

    def outline(self, model: Llama) -> Llama:
        """Returns the structure of the result for an abstract model; as it is, unless a pass says otherwise."""
        return model

    @abc.abstractmethod
    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Returns the rewritten model and what there is to report."""

    def streams(self) -> bool:
        """Tells whether the pass can work with one block in memory; if so, `stream` does."""
        return False

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Returns what `__call__` does, bit for bit, of a model that is read node by node.

        Raises:
          RecipeError: the pass needs the whole model in memory.
        """
        raise RecipeError(f"{type(self).__name__} {_WHOLE}")


@final
@dataclass(frozen=True)
class Sequential(ModelPass):
    """Runs block passes over the blocks in order; each block sees what the rewritten blocks before it produce.

    Attributes:
      passes: what is done to each block, in order.
    """

    passes: tuple[BlockPass, ...]

    def needs_tokens(self) -> bool:
        """Tells whether any block pass needs calibration inputs or a teacher."""
        return any(one.needs_inputs() or one.needs_teacher() for one in self.passes)

    def check(self, model: Llama) -> None:
        """Checks every block pass."""
        for one in self.passes:
            one.check(model)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Runs `calibration.quantize_blocks`."""
        return quantize_blocks(
            model,
            context.tokens,
            self.passes,
            key=context.key,
            store=context.store,
            statistics=self._shared(in_memory(model), context),
            activations=context.activations,
            devices=context.devices,
            compilers=context.compilers,
            on_block=context.on_block,
        )

    def streams(self) -> bool:
        """Tells that one block after another is read."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Runs `calibration.stream_blocks`."""
        keeping = context.keeping(self._shared(model, context))
        return stream_blocks(
            model, context.tokens, self.passes, key=context.key, keeping=keeping, on_block=context.on_block
        )

    def _shared(self, model: LazyModel, context: Context) -> SharedStatistics | None:
        taught = any(one.needs_teacher() for one in self.passes)
        return _shared(model, context) if taught else None


def _shared(model: LazyModel, context: Context) -> SharedStatistics | None:
    """Returns where statistics of this model on these windows are kept."""
    if context.statistics is None or context.tokens is None:
        return None
    origin = {
        "model": digest_lazily(model),
        "windows": hashlib.sha256(np.ascontiguousarray(np.asarray(context.tokens)).tobytes()).hexdigest(),
        "device": jax.devices()[0].device_kind,
        **calibration_attention(model.abstract),
        "jax": jax.__version__,
    }
    return SharedStatistics.of(context.statistics, model.abstract.config.num_hidden_layers, origin)


@final
@dataclass(frozen=True)
class QuantizeActivations(ModelPass):
    """Puts input quantizers on the linears by rules; weights stay as they are.

    Attributes:
      rules: the rules, first match wins; a linear that none matches keeps its input.
    """

    rules: tuple[ActivationRule, ...]

    def needs_tokens(self) -> bool:
        """Tells whether any method is calibrated."""
        return self.as_block_pass().needs_inputs()

    def check(self, model: Llama) -> None:
        """Checks the rules on every linear."""
        self.as_block_pass().check(model)

    def as_block_pass(self) -> InputQuantizers:
        """Returns the block pass that does the work."""
        return InputQuantizers(self.rules)

    def outline(self, model: Llama) -> Llama:
        """Returns the abstract model with its quantizers."""

        def place(layers: tuple[Block, ...]) -> tuple[Block, ...]:
            largest = {site: jnp.zeros(get(layers[0], names[0]).kernel.shape[0]) for site, names in SITES.items()}
            return tuple(self.as_block_pass().place(block, index, largest) for index, block in enumerate(layers))

        return dataclasses.replace(model, layers=jax.eval_shape(place, blocks(model)))

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Runs `calibration.quantize_blocks`; there is nothing to report."""
        model, _ = quantize_blocks(
            model,
            context.tokens,
            (self.as_block_pass(),),
            key=context.key,
            store=context.store if self.needs_tokens() else None,
            activations=context.activations,
            devices=context.devices,
            compilers=context.compilers,
        )
        return model, Report()

    def streams(self) -> bool:
        """Tells that one block after another is read."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Runs `calibration.stream_blocks`, or places what needs no calibration as blocks are read."""
        if not self.needs_tokens():
            return rewrite(model, self._place), Report()
        keeping, passes = context.keeping(), (self.as_block_pass(),)
        return stream_blocks(model, context.tokens, passes, key=context.key, keeping=keeping)[0], Report()

    def _place(self, model: Llama) -> Llama:
        place = self.as_block_pass().place
        return dataclasses.replace(
            model, layers=tuple(place(one, index, {}) for index, one in enumerate(blocks(model)))
        )


@final
@dataclass(frozen=True)
class QuantizeHead(ModelPass):
    """Quantizes the output head, which all other passes leave as it is; a tied one becomes a matrix of its own first.

    Attributes:
      quantizer: how; one that needs no statistics of the head's inputs.
    """

    quantizer: WeightQuantizer

    def __post_init__(self) -> None:
        """Refuses a quantizer that must be calibrated."""
        if self.quantizer.statistic is not None:
            raise RecipeError(
                f"{type(self.quantizer).__name__} needs statistics of its inputs, and none are collected for the head: "
                "give rtn"
            )

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a head that is quantized already, and shapes that the quantizer cannot take."""
        kernel: Any = _head(model).kernel
        if isinstance(kernel, QuantizedTensor):
            raise FormatError(f"lm_head is already quantized ({type(kernel).__name__}); start from the source model")
        try:
            self.quantizer.check(kernel.shape)
        except FormatError as error:
            raise FormatError(f"lm_head: {error}") from error

    def outline(self, model: Llama) -> Llama:
        """Returns the abstract model with its head quantized."""
        shape = _head(model).kernel
        kernel = jax.eval_shape(lambda weight: self.quantizer(weight, None, jax.random.key(0))[0], shape)
        return self._placed(model, kernel)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Quantizes the head and reports the norm of its error as a share of the weight's."""
        kernel, report = self._quantized(_head(model).kernel, context)
        return self._placed(model, kernel), report

    def streams(self) -> bool:
        """Tells that the head is a node of its own."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Quantizes the head, keeps it in the store, and reads it from there."""
        store = context.store
        assert store is not None
        abstract = self.outline(model.abstract)

        def solve() -> tuple[Any, Report]:
            name = "embed_tokens" if model.abstract.lm_head is None else "lm_head"
            head = _head(put(model.abstract, name, model.read(name)))
            kernel, report = self._quantized(head.kernel, context)
            return dataclasses.replace(head, kernel=kernel), report

        return with_head(model, abstract, store.whole), context.resumed(solve)[1]

    def _quantized(self, weight: Any, context: Context) -> tuple[Any, Report]:
        kernel, figures = jax.jit(self.quantizer)(weight, None, context.key)
        error = float(jnp.sqrt(jnp.sum(figures["weight_error"]) / jnp.sum(figures["weight_norm"])))
        return kernel, Report(details=(("head", {"relative error of weights": error}),))

    def _placed(self, model: Llama, kernel: Any) -> Llama:
        return dataclasses.replace(own_head(model), lm_head=dataclasses.replace(_head(model), kernel=kernel))


def _head(model: Llama) -> Linear:
    head = own_head(model).lm_head
    assert head is not None
    return head


def run_passes(passes: Sequence[ModelPass], model: Llama, context: Context) -> tuple[Llama, Report]:
    """Applies passes in order, after checking all of them, so that bad input costs no finished work.

    Raises:
      RecipeError: a pass needs calibration tokens and there are none, a rule matches nothing, or a pass keeps its
        activations on the device where they shall be elsewhere.
      FormatError: a shape or a format does not fit.
      CalibrationError: a weight is not finite or is all zero, or a solve failed.
    """
    _check_passes(passes, jax.eval_shape(lambda tree: tree, model), context)
    check_weights(model)
    report = Report()
    for number, one in enumerate(passes):
        model, part = one(model, _own(context, number))
        report = report.merge(part)
    return model, report


def stream_passes(passes: Sequence[ModelPass], model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
    """Applies passes as `run_passes`, with the same result to the bit, to a model of which one block is in memory.

    The caller has looked at the weights (`calibration.WeightFaults`).

    Args:
      passes: each of which `streams`.
      model: what is read, some of it more than once.
      context: has a store, which the result's blocks are read from.

    Raises:
      RecipeError: as `run_passes`, or a pass needs the whole model in memory; it is named.
      FormatError: as `run_passes`.
      CalibrationError: a solve failed.
    """
    check_streaming(passes)
    _check_passes(passes, jax.eval_shape(lambda tree: tree, model.abstract), context)
    report = Report()
    for number, one in enumerate(passes):
        model, part = one.stream(model, _own(context, number))
        report = report.merge(part)
    return model, report


def check_streaming(passes: Sequence[ModelPass]) -> None:
    """Raises RecipeError, naming all of them, if there are passes that need the whole model in memory."""
    whole = [type(one).__name__ for one in passes if not one.streams()]
    if whole:
        raise RecipeError(f"{', '.join(whole)} {_WHOLE}")


def _check_passes(passes: Sequence[ModelPass], outline: Llama, context: Context) -> None:
    for one in passes:
        one.check(outline)
        outline = one.outline(outline)
        if one.needs_tokens() and context.tokens is None:
            raise RecipeError(f"{type(one).__name__} needs calibration data; give the recipe a `calibration` section")
        if one.needs_tokens() and context.activations != "device" and not one.streams():
            raise RecipeError(
                f"{type(one).__name__} keeps its activations on the device; they cannot be kept on "
                f"{context.activations}"
            )


def _own(context: Context, number: int) -> Context:
    """Returns the context of one pass: a key and a store of its own."""
    store = None if context.store is None else dataclasses.replace(context.store, step=number)
    return dataclasses.replace(context, key=jax.random.fold_in(context.key, number), store=store)
