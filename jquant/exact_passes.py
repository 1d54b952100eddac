"""Model passes of exact transforms: each is glue over a function of `jquant.transforms`, one of them learned."""

import dataclasses
from dataclasses import dataclass
from typing import Final, final

import jax
import numpy as np

from jquant.blocks import ActivationRule, InputQuantizers, QuantizeWeights, Rule
from jquant.calibration import RotationTraining, learn_rotation
from jquant.errors import RecipeError
from jquant.formats import OrthogonalMatrix
from jquant.kv import PerTokenKv
from jquant.models import BLOCK_LINEARS, LazyModel, Llama, blocks, rewrite, set_kv_codec, stack_layers
from jquant.numerics import nearest_orthogonal
from jquant.passes import Context, ModelPass
from jquant.quantizers import WeightQuantizer
from jquant.report import Report
from jquant.transforms import (
    ROTATED_PARTS,
    RotatedPart,
    Turns,
    check_foldable,
    check_rotation,
    check_unquantized,
    fold_norms,
    rotate,
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
        kept = None if context.store is None else context.store.get_whole()
        if kept is None:
            rounded = self._rounded(rotate(model, parts=self.parts, matrix=self.matrix, seed=seed))
            matrices, losses = learn_rotation(rounded, context.tokens, self.training, self._quantizers(model))
            del rounded
            told = {"matrix": self.matrix, "parts": list(self.parts), "seed": seed, "losses": list(losses)}
            kept = matrices, Report(details=(("rotation", told),))
            if context.store is not None:
                context.store.put_whole(*kept)
        turns = Turns(*(nearest_orthogonal(np.asarray(matrix)) for matrix in kept[0]))
        return rotate(model, parts=self.parts, matrix=self.matrix, seed=seed, turns=turns), kept[1]

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
