"""SpinQuant: learn the rotations of residual stream and values on the loss of the quantized model.

From a model rotated as QuaRot does it (`jquant.transforms.rotate`), R its rotation of the residual stream and O that of
value heads, and with the inputs of its linears (and its caches) rounded,

    minimise over T [hidden, hidden] and T_l [head_dim, head_dim] of each layer l, all orthogonal,
        the mean of -log p(token | tokens before it), with T R in place of R and T_l O in place of O

by Cayley SGD from T = I, straight through the rounding, at a rate that falls linearly to zero. The updates commute with
R and O: this is SpinQuant's descent from random Hadamard matrices, and no steps are QuaRot. But for the rounding no T
would matter. So none is multiplied into weights while it is learnt: T stands before each rounding and T^T behind it
(`jquant.calibration.turned`). Weights stay as they are, as in the paper where GPTQ follows, or are rounded too, as
there where they are then rounded to nearest.

The published code lowers its rate by a cosine, rounds o_proj's inputs by heads and has no rotation across heads; here
they are QuaRot's, as are its online rotations.

Liu et al. 2024, SpinQuant: LLM quantization with learned rotations, arXiv:2405.16406, section 3.2.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jquant.calibration.turned import turn_rounding
from jquant.errors import CalibrationError, RecipeError
from jquant.models import Block, Llama, embed, next_token_losses, prompt_block
from jquant.numerics import cayley_sgd
from jquant.quantizers import WeightQuantizer
from jquant.types import compute_dtype

type Weights = tuple[
    tuple[str, WeightQuantizer], ...
]  # linears by their path in a block, and what rounds their weights
type Matrices = dict[str, Float[Array, "..."]]  # "residual" [hidden, hidden], "values" [layers, head_dim, head_dim]


@dataclass(frozen=True)
class RotationTraining:
    """How rotations are learnt; windows are taken in order, again and again, so that nothing is drawn.

    Attributes:
      steps: updates; 0 leaves the rotations as they were drawn. 100 as in the paper.
      learning_rate: of the first update; it falls linearly to 0. 1.5 as in the paper.
      batch_size: windows in one step. 8 as in the paper's runs.
      accumulation: parts of a batch that pass the model one after the other: more take less memory and longer.
    """

    steps: int = 100
    learning_rate: float = 1.5
    batch_size: int = 8
    accumulation: int = 1

    def __post_init__(self) -> None:
        """Refuses what is no training."""
        if self.steps < 0 or self.batch_size < 1:
            raise RecipeError(
                f"steps={self.steps}, batch_size={self.batch_size}: give 0 steps or more, 1 window or more"
            )
        if self.accumulation < 1 or self.batch_size % self.accumulation:
            raise RecipeError(f"accumulation={self.accumulation}: give what divides batch_size={self.batch_size}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise RecipeError(f"learning_rate={self.learning_rate}: give a positive rate")


def learn_rotation(
    model: Llama, tokens: Int[Array, "samples length"], training: RotationTraining, weights: Weights = ()
) -> tuple[tuple[Float[Array, "hidden hidden"], Float[Array, "layers dim dim"]], tuple[float, ...]]:
    """Learns what shall follow the rotations of residual stream and values.

    Args:
      model: rotated, its weights not quantized, its input quantizers and KV codecs those to learn for; its layers are
        stacked.
      tokens: windows of text.
      training: steps, learning rate, batch.
      weights: what rounds weights; those of other linears stay exact.

    Returns:
      T and all T_l, orthogonal up to float32 rounding; and the loss of each step before its update, in nats per token.

    Raises:
      CalibrationError: there are fewer windows than a batch, or the loss is not finite; its step is named.
    """
    if len(tokens) < training.batch_size:
        raise CalibrationError(
            f"batch_size {training.batch_size} for {len(tokens)} calibration windows; set a smaller batch_size or more "
            "calibration samples"
        )
    dtype, config = compute_dtype(model.embed_tokens.dtype), model.config
    matrices = {
        "residual": jnp.eye(config.hidden_size, dtype=dtype),
        "values": jnp.tile(jnp.eye(config.head_dim, dtype=dtype), (config.num_hidden_layers, 1, 1)),
    }
    state, losses = _optimizer(training).init(matrices), []
    for step in range(training.steps):
        rows = (jnp.arange(training.batch_size) + step * training.batch_size) % len(tokens)
        matrices, state, loss = train_step(model, tokens[rows], matrices, state, training, weights)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(
                f"learn_rotation: the loss is not finite at step {step}; set a smaller learning_rate, check the "
                "calibration text, or load the model in a wider dtype"
            )
    return (matrices["residual"], matrices["values"]), tuple(losses)


@functools.partial(jax.jit, static_argnums=(4, 5))
def train_step(
    model: Llama,
    tokens: Int[Array, "batch length"],
    matrices: Matrices,
    state: Any,
    training: RotationTraining,
    weights: Weights,
) -> tuple[Matrices, Any, Float[Array, ""]]:
    """Takes one step of Cayley SGD; one program, whatever the number of layers and steps.

    Args:
      model: as `learn_rotation` has it.
      tokens: the windows of the step.
      matrices: where the descent stands.
      state: the optimizer's.
      training: the settings.
      weights: what rounds weights.

    Returns:
      The matrices after the update, the optimizer's state, and the loss before it.
    """
    loss_of = functools.partial(rounded_loss, weights=weights)

    def add(sums: Any, part: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(matrices, model, part)), None

    parts = tokens.reshape(training.accumulation, -1, tokens.shape[1])
    nothing = jax.tree.map(jnp.zeros_like, (jax.eval_shape(loss_of, matrices, model, parts[0]), matrices))
    sums, _ = jax.lax.scan(add, nothing, parts)
    loss, gradients = jax.tree.map(lambda total: total / training.accumulation, sums)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix counts and floats
        updates, state = _optimizer(training).update(gradients, state, matrices)
    return optax.apply_updates(matrices, updates), state, loss


def rounded_loss(
    matrices: Matrices, model: Llama, windows: Int[Array, "batch length"], weights: Weights
) -> Float[Array, ""]:
    """Returns the mean loss of the windows' tokens in the model whose rotations are turned by the matrices.

    Args:
      matrices: T of the residual stream and T_l of each layer.
      model: as `learn_rotation` has it.
      windows: token ids.
      weights: what rounds weights.
    """
    lengths = jnp.full(windows.shape[0], windows.shape[1], jnp.int32)

    @jax.checkpoint
    def through(x: Float[Array, "batch length hidden"], layer: tuple[Block, Array]) -> tuple[Array, None]:
        turned = turn_rounding(layer[0], matrices["residual"], layer[1], dict(weights))
        return prompt_block(turned, x, lengths, windows.shape[1], model.config)[0], None

    states, _ = jax.lax.scan(through, embed(model, windows), (model.layers.block, matrices["values"]))  # type: ignore[union-attr]
    return jnp.mean(next_token_losses(model, states, windows))


def _optimizer(training: RotationTraining) -> optax.GradientTransformation:
    return cayley_sgd(optax.linear_schedule(training.learning_rate, 0.0, training.steps))
