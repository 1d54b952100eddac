"""Model passes of exact transforms: each is glue over a function of `jquant.transforms`; two measure or learn first."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import jax
import numpy as np

from jquant.blocks import ActivationRule, InputQuantizers, QuantizeWeights, Rule
from jquant.calibration import AlphaSearch, RotationTraining, collect_absmax, learn_rotation, search_alpha
from jquant.errors import RecipeError
from jquant.formats import OrthogonalMatrix
from jquant.kv import PerTokenKv
from jquant.models import BLOCK_LINEARS, LazyModel, Llama, blocks, in_memory, rewrite, set_kv_codec, stack_layers
from jquant.numerics import nearest_orthogonal
from jquant.passes import Context, ModelPass
from jquant.quantizers import WeightQuantizer
from jquant.report import Report
from jquant.transforms import (
    ROTATED_PARTS,
    SMOOTHED,
    RotatedPart,
    Turns,
    check_alpha,
    check_foldable,
    check_rotation,
    check_smoothing,
    check_unquantized,
    fold_norms,
    rotate,
    smooth,
    subtract_embedding_mean,
    untie,
)

_TRAINING: Final = RotationTraining()  # as in SpinQuant's paper


@final
@dataclass(frozen=True)
class Untie(ModelPass):
    """Gives a model with a tied head an output projection of its own; others stay as they are."""

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a quantized model."""
        check_unquantized(model)

    def outline(self, model: Llama) -> Llama:
        """Unties the abstract model."""
        return untie(model)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Runs `transforms.untie`."""
        return untie(model), Report()

    def streams(self) -> bool:
        """Tells that the head is a copy of the table."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Unties the model when its head is read."""
        return rewrite(model, untie), Report()


@final
@dataclass(frozen=True)
class FoldNorms(ModelPass):
    """Moves the scales of the norms into the linears that read them."""

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a quantized or tied model."""
        check_foldable(model)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Runs `transforms.fold_norms`."""
        return fold_norms(model), Report()

    def streams(self) -> bool:
        """Tells that each block has its own norms."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Folds norms as blocks and head are read."""
        return rewrite(model, fold_norms), Report()


@final
@dataclass(frozen=True)
class Rotate(ModelPass):
    """Rotates residual stream, values, keys and MLP as QuaRot does; list `untie` and `fold_norms` before it.

    Attributes:
      matrix: of the residual stream: "hadamard" with signs drawn from the run's seed, or "haar".
      parts: which rotations: "residual", "values", "mlp", and "keys" for quantized KV caches.
      subtract_embedding_mean: whether the embedding's rows lose their means first, as in QuaRot's published code. Not
        exact; only to reproduce published figures.

    Reference: arXiv:2404.00456, section 4.
    """

    matrix: OrthogonalMatrix = "hadamard"
    parts: tuple[RotatedPart, ...] = ROTATED_PARTS
    subtract_embedding_mean: bool = False

    def __post_init__(self) -> None:
        """Refuses no part, and a part twice."""
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise RecipeError(f"parts {list(self.parts)}: name at least one of residual, values, keys, mlp, each once")

    def needs_tokens(self) -> bool:
        """Tells that no text is read."""
        return False

    def check(self, model: Llama) -> None:
        """Refuses a model that is quantized, or rotated already."""
        check_rotation(model, self.parts)

    def outline(self, model: Llama) -> Llama:
        """Adds the online rotations to the abstract model."""
        return rotate(model, parts=self.parts, matrix=self.matrix)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Runs `transforms.rotate` with a seed from the run's key."""
        seed = _seed(context)
        return self._rotate(model, seed), self._report(seed)

    def streams(self) -> bool:
        """Tells that each block is rotated alone."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Rotates table, blocks and head as they are read."""
        seed = _seed(context)
        return rewrite(model, lambda whole: self._rotate(whole, seed)), self._report(seed)

    def _rotate(self, model: Llama, seed: int) -> Llama:
        model = subtract_embedding_mean(model) if self.subtract_embedding_mean else model
        return rotate(model, parts=self.parts, matrix=self.matrix, seed=seed)

    def _report(self, seed: int) -> Report:
        return Report(details=(("rotation", {"matrix": self.matrix, "parts": self.parts, "seed": seed}),))


def _seed(context: Context) -> int:
    return int(jax.random.bits(context.key, dtype="uint32"))


@final
@dataclass(frozen=True)
class LearnRotation(ModelPass):
    """Rotates as `Rotate` does, but with the rotations of residual stream and values learned: SpinQuant.

    List `untie` and `fold_norms` before it, and after it what quantizes: what rounds while rotations are learned is
    taken off again.

    Attributes:
      rules: what rounds the inputs of linears meanwhile, as those of `QuantizeActivations`; methods that need no
        calibration.
      kv_codec: what rounds keys and values meanwhile; None for exact ones.
      training: steps, learning rate, batch.
      matrix: where the residual stream's rotation begins, as in `Rotate`.
      parts: which rotations; "residual" and "values" are the learned ones, "mlp" and "keys" are fixed.
      weights: what rounds weights meanwhile, the same in each block: quantizers that need no calibration. Give what
        will round them afterwards, its range search included: a rotation learned for another rounding is worse than
        none. Exact weights, the default, suit a quantizer to follow that corrects its own errors, such as GPTQ.

    Reference: arXiv:2405.16406, section 3.2.
    """

    rules: tuple[ActivationRule, ...]
    kv_codec: PerTokenKv | None = None
    training: RotationTraining = _TRAINING
    matrix: OrthogonalMatrix = "hadamard"
    parts: tuple[RotatedPart, ...] = ROTATED_PARTS
    weights: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Refuses parts without what is learned, calibrated methods, and rounding that does nothing."""
        Rotate(self.matrix, self.parts)
        if not {"residual", "values"} <= set(self.parts):
            raise RecipeError(f"parts {list(self.parts)}: residual and values are what is learned; name both")
        for rule in self.rules:
            if rule.quantizer is not None and rule.quantizer.needs_absmax():
                raise RecipeError(
                    f"rule {rule.match!r}: {type(rule.quantizer).__name__} is calibrated, and would be old after each "
                    "step; learn with per_token or another method that needs no calibration"
                )
        for one in self.weights:
            if one.quantizer is not None and one.quantizer.statistic is not None:
                raise RecipeError(
                    f"weights, rule {one.match!r}: {type(one.quantizer).__name__} is calibrated, and would be old "
                    "after each step; learn with rtn or another quantizer that needs no calibration"
                )
        rounding = [rule.quantizer for rule in self.rules] + [rule.quantizer for rule in self.weights]
        if self.kv_codec is None and all(quantizer is None for quantizer in rounding):
            raise RecipeError(
                "nothing is rounded, so no rotation is better than another; give rules, weights or a kv_codec"
            )
        if self.kv_codec is not None and self.kv_codec.prompt == "exact":
            raise RecipeError("kv_codec shows a prompt's queries exact keys and values: set its prompt to stored")

    def needs_tokens(self) -> bool:
        """Tells that the loss is that of the calibration text."""
        return True

    def check(self, model: Llama) -> None:
        """Refuses a model that is quantized or rotated already, and rules that do not fit."""
        check_rotation(model, self.parts)
        if self.rules:
            InputQuantizers(self.rules).check(model)
        if self.weights:
            QuantizeWeights(self.weights).check(model)
            self._quantizers(model)

    def outline(self, model: Llama) -> Llama:
        """Adds the online rotations to the abstract model."""
        return rotate(model, parts=self.parts, matrix=self.matrix)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Rotates with a seed from the run's key, learns, and rotates the model as it came by both."""
        assert context.tokens is not None
        seed = _seed(context)
        tokens = context.tokens

        def learn() -> tuple[Any, Report]:
            rounded = self._rounded(rotate(model, parts=self.parts, matrix=self.matrix, seed=seed))
            matrices, losses = learn_rotation(rounded, tokens, self.training, self._quantizers(model))
            told = {"matrix": self.matrix, "parts": list(self.parts), "seed": seed, "losses": list(losses)}
            return matrices, Report(details=(("rotation", told),))

        matrices, report = context.resumed(learn)
        turns = Turns(*(nearest_orthogonal(np.asarray(matrix)) for matrix in matrices))
        return rotate(model, parts=self.parts, matrix=self.matrix, seed=seed, turns=turns), report

    def _quantizers(self, model: Llama) -> tuple[tuple[str, WeightQuantizer], ...]:
        """Returns what rounds the weights of a block's linears, which must be the same in each block."""
        found, rule_for = [], QuantizeWeights(self.weights).rule_for
        for name in BLOCK_LINEARS:
            rules = (rule_for(f"layers.{index}.{name}") for index in range(model.config.num_hidden_layers))
            chosen = {None if rule is None else rule.quantizer for rule in rules}
            if len(chosen) > 1:
                raise RecipeError(f"weights of {name} are not rounded the same way in each block: give all one rule")
            if (quantizer := chosen.pop()) is not None:
                found.append((name, quantizer))
        return tuple(found)

    def _rounded(self, model: Llama) -> Llama:
        """Puts what rounds while rotations are learned into a rotated model, and stacks its layers."""
        place = InputQuantizers(self.rules).place
        layers = tuple(place(block, index, {}) for index, block in enumerate(blocks(model)))
        model = dataclasses.replace(model, layers=layers)
        return stack_layers(model if self.kv_codec is None else set_kv_codec(model, self.kv_codec))


@final
@dataclass(frozen=True)
class Smooth(ModelPass):
    """SmoothQuant: moves large channels from the inputs of q, k, v, gate and up into their weights (arXiv:2211.10438).

    Attributes:
      alpha: how much moves, 0 to 1; or a search, whose candidate of least error is taken and whose table is reported.
    """

    alpha: float | AlphaSearch = 0.5

    def __post_init__(self) -> None:
        """Refuses an alpha outside 0..1."""
        if not isinstance(self.alpha, AlphaSearch):
            check_alpha(self.alpha)

    def needs_tokens(self) -> bool:
        """Tells that the largest activations are measured."""
        return True

    def check(self, model: Llama) -> None:
        """Refuses a model that is quantized already."""
        check_smoothing(model)

    def __call__(self, model: Llama, context: Context) -> tuple[Llama, Report]:
        """Measures the model as it stands, and smooths it."""
        change, report = self._measure(in_memory(model), context)
        return change(model), report

    def streams(self) -> bool:
        """Tells that blocks are measured, and smoothed, one after another."""
        return True

    def stream(self, model: LazyModel, context: Context) -> tuple[LazyModel, Report]:
        """Measures block by block, and smooths blocks as they are read."""
        change, report = self._measure(model, context)
        return rewrite(model, change), report

    def _measure(self, model: LazyModel, context: Context) -> tuple[Callable[[Llama], Llama], Report]:
        """Returns what smooths the model, and what there is to report; what was measured is kept in the store."""
        tokens = context.tokens
        assert tokens is not None

        def measure() -> tuple[Any, Report]:
            if not isinstance(self.alpha, AlphaSearch):
                found, report = collect_absmax(model, tokens, context.keeping()), Report()
            else:
                found, errors = search_alpha(model, tokens, self.alpha, context.keeping())
                best = min(errors, key=lambda one: one.error)
                table = {"alpha": best.alpha, "errors": [dataclasses.asdict(one) for one in errors]}
                report = Report(details=(("smoothing", table),))
            return tuple(tuple(largest[pair.site] for pair in SMOOTHED) for largest in found), report

        kept, report = context.resumed(measure)
        alpha = dict(report.details)["smoothing"]["alpha"] if isinstance(self.alpha, AlphaSearch) else self.alpha
        absmax = [dict(zip((pair.site for pair in SMOOTHED), pairs, strict=True)) for pairs in kept]
        return lambda whole: smooth(whole, absmax, alpha), report
