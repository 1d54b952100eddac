"""The plan of a run: what it will give and cost, from shapes alone, before any work.

Bits and bytes are not estimated: each quantizer is traced on the shapes of the linears that it will solve
(`jax.eval_shape`), and the bytes of the arrays that it would return are counted; of SpQR, whose outliers are known only
after the solve, the most that it may keep. Work and memory follow the formulas of
`jquant.costs`; peak memory is source, result, two sets of activations (four where blocks learn from a teacher on inputs
of their own) and what calibration needs beside them.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jquant.blocks import SITES, Distill, QuantizeWeights
from jquant.calibration import AlphaSearch
from jquant.costs import Work, forward_operations, hessian_operations, learning_operations, solve_operations
from jquant.errors import RecipeError
from jquant.exact_passes import LearnRotation, Smooth
from jquant.formats import QuantizedTensor, split_outputs, tree_nbytes
from jquant.inspection import CacheFacts, measure_cache
from jquant.kv_passes import CalibrateFloat8Kv, CalibrateKvQuant, CalibrateRazorKv
from jquant.models import Llama, blocks, get, linear_paths, put
from jquant.needs import Needs, measure_needs
from jquant.passes import ModelPass, QuantizeActivations, Sequential
from jquant.quantizers import WeightQuantizer
from jquant.recipe import Calibration, Recipe
from jquant.sharding import choose_cuts

UNTOUCHED = "-"  # the method of a linear that is left as it is


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one linear.

    Attributes:
      path: such as `layers.0.mlp.up_proj`.
      shape: (in, out).
      method: the quantizer's name, or `UNTOUCHED`.
      nbytes: bytes of its kernel afterwards.
    """

    path: str
    shape: tuple[int, int]
    method: str
    nbytes: int

    def bits_per_weight(self) -> float:
        """Returns 8 * bytes / (in * out)."""
        return 8.0 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What a run will give and cost.

    Attributes:
      linears: one row for each linear of the blocks.
      source_nbytes: bytes of the source model's arrays.
      nbytes: bytes of the result's arrays, in memory and on disk.
      store_nbytes: bytes on disk of the store of finished blocks, while the run lasts.
      peak_nbytes: predicted peak of memory.
      tokens: calibration tokens, 0 if none are read.
      work: floating-point operations.
      solve_shapes: distinct (in, out) of the solves; each is compiled once.
      cache: what keys and values will take.
      needs: what is in memory at once.
      gathered: linears whose inputs devices along `tensor` gather, where they sum other linears' products.
    """

    linears: tuple[LinearPlan, ...]
    source_nbytes: int
    nbytes: int
    store_nbytes: int
    peak_nbytes: int
    tokens: int
    work: Work
    solve_shapes: tuple[tuple[int, int], ...]
    cache: CacheFacts
    needs: Needs
    gathered: int

    def bits_per_weight(self) -> float:
        """Returns the bits per weight of all quantized linears taken together, 0 if there is none."""
        chosen = [row for row in self.linears if row.method != UNTOUCHED]
        return 8.0 * sum(row.nbytes for row in chosen) / max(1, sum(math.prod(row.shape) for row in chosen))


@dataclass(frozen=True)
class Solve:
    """One solve of a run.

    Attributes:
      quantizer: what solves it.
      site: whose inputs its linears share.
      paths: the linears, taken as one matrix.
    """

    quantizer: WeightQuantizer
    site: str
    paths: tuple[str, ...]


def plan(model: Llama, recipe: Recipe) -> Plan:
    """Plans a run.

    Args:
      model: the model, or an abstract one with `jax.ShapeDtypeStruct` for arrays; its layers are a tuple.
      recipe: what will be run.

    Returns:
      The plan.

    Raises:
      RecipeError: a rule matches nothing, or the recipe has a pass that cannot be planned.
      FormatError: a shape does not fit; the linear is named.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> from jquant.recipe import load_recipe
      >>> figures = plan(abstract_llama(tiny_config()), load_recipe("rtn-w8"))
      >>> len(figures.linears), figures.solve_shapes
      (14, ((64, 128), (64, 64), (64, 192), (96, 64)))
    """
    result, work = model, Work()
    solves: list[Solve] = []
    for one in recipe.passes:
        one.check(result)
        if isinstance(one, QuantizeActivations):
            work = work.plus(_activation_work(result, one, recipe.calibration))
        work = work.plus(_measuring(one, model, recipe.calibration))
        result = one.outline(result)
        for block_pass in _block_passes(one):
            for index in range(model.config.num_hidden_layers):
                found = tuple(list_solves(_packing(block_pass), index))
                work = work.plus(_block_work(result, block_pass, index, found, recipe.calibration))
                result = functools.reduce(_solved, found, result)
                solves += found
    methods = {path: type(solve.quantizer).__name__ for solve in solves for path in solve.paths}
    kernels = {path: get(result, path).kernel for path in linear_paths(result)}
    length = recipe.calibration.length if recipe.calibration else 0
    samples = recipe.calibration.samples if recipe.calibration else 0
    heavy = {_shape(model, solve) for solve in solves if solve.quantizer.statistic is not None}
    light = {_shape(model, solve) for solve in solves if solve.quantizer.statistic is None}
    needs = measure_needs(model, result, recipe, heavy, light)
    return Plan(
        linears=tuple(
            LinearPlan(path, kernel.shape, methods.get(path, UNTOUCHED), tree_nbytes(kernel))
            for path, kernel in kernels.items()
        ),
        source_nbytes=tree_nbytes(model),
        nbytes=tree_nbytes(result),
        store_nbytes=tree_nbytes(result.layers),
        peak_nbytes=tree_nbytes(model) + tree_nbytes(result.layers) + needs.sets * needs.activations + needs.working,
        tokens=samples * length,
        work=work,
        solve_shapes=tuple(dict.fromkeys(_shape(model, solve) for solve in solves)),
        cache=measure_cache(result),
        needs=needs,
        gathered=sum(cut.gathered for _, cut in choose_cuts(result, 1, 1)),
    )


def outline(model: Llama, recipe: Recipe) -> Llama:
    """Returns what a recipe makes of a model, with `jax.ShapeDtypeStruct` for arrays; no text is read, nothing solved.

    Args:
      model: the model, or an abstract one; its layers are a tuple.
      recipe: what would be run.

    Raises:
      RecipeError: as `plan`.
      FormatError: as `plan`.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> from jquant.recipe import load_recipe
      >>> type(outline(abstract_llama(tiny_config()), load_recipe("gptq-w4")).layers[0].mlp.up_proj.kernel).__name__
      'UniformTensor'
    """
    result = jax.eval_shape(lambda tree: tree, model)
    for one in recipe.passes:
        one.check(result)
        result = one.outline(result)
        for block_pass in _block_passes(one):
            for index in range(model.config.num_hidden_layers):
                result = functools.reduce(_solved, list_solves(_packing(block_pass), index), result)
    return result


def list_solves(block_pass: QuantizeWeights, index: int) -> Iterator[Solve]:
    """Yields the solves of one block in order; linears with an equal quantizer and the same inputs are one solve."""
    for site, names in SITES.items():
        paths = [f"layers.{index}.{name}" for name in names]
        rules = {path: block_pass.rule_for(path) for path in paths}
        chosen = {path: rule.quantizer for path, rule in rules.items() if rule is not None and rule.quantizer}
        for quantizer in dict.fromkeys(chosen.values()):
            group = tuple(path for path, own in chosen.items() if own == quantizer)
            for part in [group] if quantizer.separable else [(path,) for path in group]:
                yield Solve(quantizer, site, part)


def _measuring(one: ModelPass, model: Llama, calibration: Calibration | None) -> Work:
    """Returns the work of a pass that measures the whole model, or learns on it: in runs of all blocks over all text.

    SmoothQuant and QRazor's cache: once; a search once more, and once for each candidate. KVQuant: once for its ranges,
    and three times for its gradients: forward, and block by block again and back, without gradients of weights.
    """
    if calibration is None:
        return Work()
    if isinstance(one, LearnRotation):
        windows = one.training.steps * one.training.batch_size * model.config.num_hidden_layers
        return Work(forward=windows * learning_operations(get(model, "layers.0"), model.config, calibration.length))
    runs = {Smooth: 1, CalibrateFloat8Kv: 1, CalibrateRazorKv: 1, CalibrateKvQuant: 4}.get(type(one), 0)
    if isinstance(one, Smooth) and isinstance(one.alpha, AlphaSearch):
        runs += 1 + len(one.alpha.candidates)
    block = forward_operations(get(model, "layers.0"), model.config, calibration.length)["end"]
    return Work(forward=runs * model.config.num_hidden_layers * calibration.samples * block)


def _block_passes(one: ModelPass) -> tuple[QuantizeWeights | Distill, ...]:
    parts = one.passes if isinstance(one, Sequential) else ()
    for part in parts:
        if not isinstance(part, QuantizeWeights | Distill):
            raise RecipeError(f"{type(part).__name__} cannot be planned: give jquant/plan.py its costs first")
    return tuple(part for part in parts if isinstance(part, QuantizeWeights | Distill))


def _packing(block_pass: QuantizeWeights | Distill) -> QuantizeWeights:
    return block_pass.packing() if isinstance(block_pass, Distill) else block_pass


def _block_work(
    model: Llama,
    block_pass: QuantizeWeights | Distill,
    index: int,
    solves: tuple[Solve, ...],
    calibration: Calibration | None,
) -> Work:
    """Returns the work of one block; training counts three forward passes a step and window, for its two backward."""
    if isinstance(block_pass, QuantizeWeights):
        return _work(model, block_pass, index, solves, calibration)
    if calibration is None:
        return Work()
    last = index + 1 == model.config.num_hidden_layers
    windows = calibration.samples * (1 + (block_pass.needs_inputs() and not last))
    if solves and (last or block_pass.layers == "all"):
        windows += 3 * block_pass.training.steps * block_pass.training.batch_size
    block = get(model, f"layers.{index}")
    return Work(forward=windows * forward_operations(block, model.config, calibration.length)["end"])


def _shape(model: Llama, solve: Solve) -> tuple[int, int]:
    shapes = [get(model, path).kernel.shape for path in solve.paths]
    return shapes[0][0], sum(shape[1] for shape in shapes)


def _work(
    model: Llama, block_pass: QuantizeWeights, index: int, solves: tuple[Solve, ...], calibration: Calibration | None
) -> Work:
    """Returns the work of one block."""
    if calibration is None or not block_pass.wanted():
        return Work()
    samples, length, block = calibration.samples, calibration.length, get(model, f"layers.{index}")
    reached = forward_operations(block, model.config, length)
    heavy = [solve for solve in solves if solve.quantizer.statistic is not None]
    if block_pass.sequence == "per_block":
        collections: list[str] = ["mlp_hidden"] * len({solve.quantizer.statistic for solve in heavy})
        summed = [get(block, names[0]).kernel.shape[0] for names in SITES.values()] * len(collections)
    else:
        collections = [site for _, site in dict.fromkeys((solve.quantizer, solve.site) for solve in heavy)]
        summed = [get(block, SITES[site][0]).kernel.shape[0] for site in collections]
    advances = index + 1 < model.config.num_hidden_layers
    forward = sum(reached[site] for site in collections) + advances * reached["end"]
    return Work(
        forward=samples * forward,
        statistics=sum(hessian_operations(features, samples * length) for features in summed),
        solves=sum(solve_operations(*_shape(model, solve)) for solve in heavy),
    )


def _activation_work(model: Llama, one: QuantizeActivations, calibration: Calibration | None) -> Work:
    """Returns the work of calibrating input quantizers: every block up to its last site, then once whole."""
    if calibration is None or not one.needs_tokens():
        return Work()
    operations = [forward_operations(block, model.config, calibration.length) for block in blocks(model)]
    forward = sum(reached["mlp_hidden"] for reached in operations) + sum(reached["end"] for reached in operations[:-1])
    return Work(forward=calibration.samples * forward)


def _solved(model: Llama, solve: Solve) -> Llama:
    """Returns the abstract model after a solve."""
    kernels = tuple(get(model, path).kernel for path in solve.paths)
    specs = tuple((kernel.shape, jnp.dtype(kernel.dtype)) for kernel in kernels)
    for path, tensor in zip(solve.paths, _abstract_solve(solve.quantizer, specs), strict=True):
        model = put(model, f"{path}.kernel", tensor)
    return model


@functools.cache
def _abstract_solve(
    quantizer: WeightQuantizer, kernels: tuple[tuple[tuple[int, int], jnp.dtype], ...]
) -> tuple[QuantizedTensor, ...]:
    """Traces one solve on abstract kernels; equal solves are traced once."""

    def solve(key: jax.Array, *parts: jax.Array) -> tuple[QuantizedTensor, ...]:
        statistic = quantizer.statistic
        tensor, _ = quantizer(
            jnp.concatenate(parts, axis=1), None if statistic is None else statistic.init(parts[0].shape[0]), key
        )
        return split_outputs(tensor, [part.shape[1] for part in parts])

    return jax.eval_shape(solve, jax.random.key(0), *(jax.ShapeDtypeStruct(*kernel) for kernel in kernels))
