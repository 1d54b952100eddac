"""Model passes of exact transforms: each is glue over a function of `jquant.transforms`."""

from dataclasses import dataclass
from typing import final

import jax

from jquant.errors import RecipeError
from jquant.formats import OrthogonalMatrix
from jquant.models import Llama
from jquant.passes import Context, ModelPass
from jquant.report import Report
from jquant.transforms import (
    ROTATED_PARTS,
    RotatedPart,
    check_foldable,
    check_rotation,
    check_unquantized,
    fold_norms,
    rotate,
    subtract_embedding_mean,
    untie,
)


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
        seed = int(jax.random.bits(context.key, dtype="uint32"))
        model = subtract_embedding_mean(model) if self.subtract_embedding_mean else model
        rotated = rotate(model, parts=self.parts, matrix=self.matrix, seed=seed)
        return rotated, Report(details=(("rotation", {"matrix": self.matrix, "parts": self.parts, "seed": seed}),))
