"""Distill: train each block to give, quantized, what it gave before: ZeroQuant's layer-by-layer knowledge distillation.

For block k with weights W, x_k what the source's own blocks before it produce, Q the quantizer of its rules:

    minimise over W    mean (B(Q(W), x_k) - B(W_0, x_k))^2

B is the model's own block, with its causal mask and positions, and W everything in it that can be trained: kernels,
biases and norms. Q has no useful derivative; straight through, the loss's gradient at Q(W) is applied to W, and
likewise through the rounding of activations. AdamW takes the steps; at the end W is quantized by Q and packed.

Student and teacher both see the full-precision x_k, in the paper and in its published code alike, so that blocks are
learnt independently of one another. `inputs="student"` feeds the student what the rewritten blocks before it produce
instead, against the same outputs, so that it also learns to undo their errors.

The paper goes through all blocks; qllm-infer's runs train the last alone (`layers="last"`), and without a causal mask,
which no model ever sees and which is not offered.

Yao et al. 2022, arXiv:2206.01861.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.activations import ActivationMethod, ActivationQuantizer
from jquant.blocks.base import BlockData, BlockPass, Programs, StatisticStore
from jquant.blocks.lanes import Lanes
from jquant.blocks.weights import QuantizeWeights, Rule
from jquant.errors import CalibrationError, RecipeError
from jquant.formats import QuantizedTensor
from jquant.models import BLOCK_LINEARS, Block, Llama, LlamaConfig, get, prompt_block, put
from jquant.numerics import straight_through
from jquant.quantizers import Diagnostics, WeightQuantizer
from jquant.types import Key, compute_dtype

_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_PARAMETERS: Final = (*_NORMS, *(f"{name}.{part}" for name in BLOCK_LINEARS for part in ("kernel", "bias")))

type Parameters = dict[str, Float[Array, "..."]]  # by their paths in the block


@dataclass(frozen=True)
class Training:
    """How a block is trained; samples are taken in order, again and again, so that nothing is drawn.

    Attributes:
      steps: updates of each block; 0 leaves it as the quantizer alone gives it.
      learning_rate: AdamW's, constant. 5e-6 as in ZeroQuant's runs.
      batch_size: windows in one step.
      weight_decay: AdamW's, on all parameters.
    """

    steps: int = 100
    learning_rate: float = 5e-6
    batch_size: int = 4
    weight_decay: float = 1e-5

    def __post_init__(self) -> None:
        """Refuses what is no training."""
        if self.steps < 0 or self.batch_size < 1:
            raise RecipeError(
                f"steps={self.steps}, batch_size={self.batch_size}: give 0 steps or more, 1 window or more"
            )
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise RecipeError(
                f"learning_rate={self.learning_rate}, weight_decay={self.weight_decay}: give a positive rate and a "
                "decay of 0 or more"
            )


@final
@dataclass(frozen=True)
class Distill(BlockPass):
    """Trains blocks towards what they gave before, then quantizes their linears by rules.

    Attributes:
      rules: as those of `QuantizeWeights`; quantizers that need no calibration statistics.
      training: steps, learning rate, batch, decay.
      layers: which blocks are trained, "all" in turn or the "last" alone; the others are quantized as they are.
      inputs: what the student sees, the "teacher"'s inputs or its own, the "student"'s.
    """

    rules: tuple[Rule, ...]
    training: Training = Training()
    layers: Literal["all", "last"] = "all"
    inputs: Literal["teacher", "student"] = "teacher"

    def needs_inputs(self) -> bool:
        """Tells whether the student sees what the rewritten blocks before it produce."""
        return self.inputs == "student"

    def needs_teacher(self, kept: StatisticStore | None = None) -> bool:
        """Tells that the source's own activations are what is learnt."""
        del kept
        return True

    def packing(self) -> QuantizeWeights:
        """Returns the pass that quantizes a block after its training."""
        return QuantizeWeights(self.rules, "per_block")

    def check(self, model: Llama) -> None:
        """Refuses what `QuantizeWeights` refuses, and quantizers that need statistics.

        Raises:
          RecipeError: a quantizer needs calibration statistics, or a rule matches nothing.
          FormatError: a linear cannot be quantized so; its path is named.
        """
        for rule in self.rules:
            if rule.quantizer is not None and rule.quantizer.statistic is not None:
                raise RecipeError(
                    f"rule {rule.match!r}: {type(rule.quantizer).__name__} needs statistics of the inputs, which would "
                    "be old after each step; distill with one that reads weights alone, such as rtn or zeroquant"
                )
        self.packing().check(model)

    def __call__(self, block: Block, data: BlockData, key: Key) -> tuple[Block, dict[str, Diagnostics]]:
        """Trains and quantizes one block, its inputs rounded as they stand; its loss curve is the entry `layers.3`."""
        quantizers = self._quantizers(data.index)
        is_last = data.index == data.config.num_hidden_layers - 1
        if not quantizers or not self.training.steps or (self.layers == "last" and not is_last):
            return self.packing()(block, data, key)
        assert data.teacher is not None
        inputs = data.inputs if self.inputs == "student" else data.teacher.inputs
        inputs = inputs.whole() if isinstance(inputs, Lanes) else inputs
        samples = data.teacher.outputs.shape[0]
        if samples < self.training.batch_size:
            raise CalibrationError(
                f"batch_size {self.training.batch_size} for {samples} calibration windows; set a smaller batch_size or "
                "more calibration samples"
            )
        trained, losses = train_block(block, inputs, data.teacher.outputs, quantizers, self.training, data.config)
        packed, report = self.packing()(_restore(block, trained, {name for name, _ in quantizers}), data, key)
        return packed, {f"layers.{data.index}": {"losses": losses}} | report

    def programs(self, block: Block, data: BlockData, key: Key) -> Programs:
        """Tells nothing: its training is one program, and what follows is small."""
        del block, data, key
        yield from ()
        return None

    def _quantizers(self, index: int) -> tuple[tuple[str, WeightQuantizer], ...]:
        rules = {name: self.packing().rule_for(f"layers.{index}.{name}") for name in BLOCK_LINEARS}
        return tuple((name, rule.quantizer) for name, rule in rules.items() if rule is not None and rule.quantizer)


@final
@struct.dataclass
class _StraightThrough(ActivationQuantizer):
    """Stands for an input quantizer in training: gives its numbers, with the gradient of what it rounds."""

    method: ActivationMethod = struct.field(pytree_node=False)
    quantizer: ActivationQuantizer

    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> Any:
        return straight_through(x, self.quantizer(x, valid).dequantize(x.dtype))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def train_block(
    block: Block,
    inputs: Float[Array, "samples tokens hidden"],
    outputs: Float[Array, "samples tokens hidden"],
    quantizers: tuple[tuple[str, WeightQuantizer], ...],
    training: Training,
    config: LlamaConfig,
) -> tuple[Parameters, Float[Array, "steps"]]:
    """Trains what a block can learn; one program, whatever the number of steps and of blocks of equal structure.

    Args:
      block: the block, the kernels of `quantizers` dense.
      inputs: what the student sees.
      outputs: what it shall give.
      quantizers: by the path of each linear that will be quantized.
      training: steps, learning rate, batch, decay.
      config: the model's sizes.

    Returns:
      The trained arrays by their paths, in float32 (float64 for a float64 block), not yet quantized; and the loss of
      each step before its update.
    """
    optimizer = optax.adamw(training.learning_rate, weight_decay=training.weight_decay)
    lengths = jnp.full(1, inputs.shape[1], jnp.int32)
    learner = _pass_gradients(block)
    order = (jnp.arange(training.steps * training.batch_size) % inputs.shape[0]).reshape(training.steps, -1)

    def loss_of(parameters: Parameters, sample: Array) -> Float[Array, ""]:
        given, expected = inputs[sample], outputs[sample]
        student = _replace(learner, parameters)
        answer = prompt_block(student, given[None], lengths, given.shape[0], config)[0][0]
        wide = compute_dtype(answer.dtype)
        return jnp.mean(jnp.square(answer.astype(wide) - expected.astype(wide)))

    def step(state: tuple[Parameters, Any], batch: Array) -> tuple[tuple[Parameters, Any], Float[Array, ""]]:
        parameters, moments = state
        rounded = _round(parameters, quantizers)

        def add(sums: Any, sample: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_of)(rounded, sample)), None

        nothing = jax.tree.map(jnp.zeros_like, (jax.eval_shape(loss_of, rounded, batch[0]), rounded))
        (loss, gradients), _ = jax.lax.scan(add, nothing, batch)
        loss, gradients = jax.tree.map(lambda total: total / training.batch_size, (loss, gradients))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            updates, moments = optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), loss

    parameters = _parameters(block)
    (parameters, _), losses = jax.lax.scan(step, (parameters, optimizer.init(parameters)), order)
    return parameters, losses


def _pass_gradients(block: Block) -> Block:
    """Lets gradients through the rounding of the linears' inputs."""
    for name in BLOCK_LINEARS:
        quantizer = get(block, name).input_quantizer
        if quantizer is not None:
            block = put(block, f"{name}.input_quantizer", _StraightThrough(quantizer.method, quantizer))
    return block


def _parameters(block: Block) -> Parameters:
    """Returns what of a block is trained: norms, biases and dense kernels, widened."""
    found = {path: get(block, path) for path in _PARAMETERS}
    arrays = {path: leaf for path, leaf in found.items() if leaf is not None and not isinstance(leaf, QuantizedTensor)}
    return {path: leaf.astype(compute_dtype(leaf.dtype)) for path, leaf in arrays.items()}


def _round(parameters: Parameters, quantizers: tuple[tuple[str, WeightQuantizer], ...]) -> Parameters:
    """Rounds the kernels that will be quantized; a gradient taken at the result is the straight-through gradient."""
    rounded = dict(parameters)
    for name, quantizer in quantizers:
        kernel = parameters[f"{name}.kernel"]
        tensor, _ = quantizer(kernel, None, jax.random.key(0))
        rounded[f"{name}.kernel"] = tensor.dequantize(kernel.dtype)
    return rounded


def _replace(block: Block, parameters: Mapping[str, Any]) -> Block:
    for path, leaf in parameters.items():
        block = put(block, path, leaf)
    return block


def _restore(block: Block, trained: Parameters, quantized: set[str]) -> Block:
    """Returns the trained block: kernels that will be quantized keep their width, all else has the block's dtypes."""
    wide = {f"{name}.kernel" for name in quantized}
    return _replace(
        block, {path: leaf if path in wide else leaf.astype(get(block, path).dtype) for path, leaf in trained.items()}
    )
