"""Block by block through the model: each block sees the inputs that the rewritten blocks before it produce.

A straight loop with jitted pieces. Its random keys come from `fold_in(key, index)` and its inputs from the blocks
alone, so that a run resumed from a store gives the same bits as one that was never stopped.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jquant.blocks import (
    ActivationPlace,
    BlockData,
    BlockPass,
    Devices,
    Lanes,
    Offloaded,
    Programs,
    StatisticStore,
    Stopwatch,
    Teacher,
    calibrated,
    calibration_attention,
    outline,
    summarize,
)
from jquant.calibration.ahead import compile_ahead
from jquant.calibration.store import BlockStore
from jquant.calibration.walk import Keeping, open_inputs
from jquant.errors import CalibrationError, RecipeError
from jquant.formats import QuantizedTensor, compact_outliers
from jquant.kv import ExactKv
from jquant.models import (
    BLOCK_LINEARS,
    Block,
    LazyModel,
    Llama,
    LlamaConfig,
    blocks,
    embed,
    get,
    in_memory,
    linear_paths,
    prompt_block,
    put,
    with_blocks,
)
from jquant.quantizers import Diagnostics
from jquant.report import BlockReport, LinearReport, Report
from jquant.types import Key


def quantize_blocks(
    model: Llama,
    tokens: Int[Array, "samples length"] | None,
    passes: Sequence[BlockPass],
    *,
    key: Key,
    store: BlockStore | None = None,
    statistics: StatisticStore | None = None,
    activations: ActivationPlace = "device",
    devices: Devices = (),
    compilers: int = 0,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> tuple[Llama, Report]:
    """Rewrites the blocks in order.

    Args:
      model: the model, its layers a tuple.
      tokens: calibration windows; None if no pass needs inputs or a teacher.
      passes: what is done to each block, in order.
      key: random key of the run.
      store: see `Keeping`, as the next four.
      statistics: what other runs collected.
      activations: where inputs of blocks are kept.
      devices: over which windows are spread.
      compilers: programs that are compiled at the same time.
      on_block: called with each block's report, also for blocks from the store.

    Returns:
      The rewritten model and one report a block.

    Raises:
      CalibrationError: a solve gave something that is not finite; the linear is named, finished blocks are kept.
      RecipeError: activations shall be kept off the device and a pass needs a teacher.
    """
    blocks(model)
    layers, reports = [], []
    keeping = Keeping(store, statistics, activations, devices, compilers)
    for layer, report in solve_blocks(in_memory(model), tokens, passes, key=key, keeping=keeping):
        layers.append(layer)
        reports.append(report)
        on_block(report)
    return dataclasses.replace(model, layers=tuple(layers)), _report(model, tokens, reports)


def stream_blocks(
    model: LazyModel,
    tokens: Int[Array, "samples length"] | None,
    passes: Sequence[BlockPass],
    *,
    key: Key,
    keeping: Keeping,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> tuple[LazyModel, Report]:
    """Rewrites the blocks in order as `quantize_blocks`, with one of them in memory, and leaves them in the store.

    Args:
      model: what is read, each block once.
      tokens: as of `quantize_blocks`, and so the others.
      passes: what is done to each block.
      key: random key of the run.
      keeping: has a store.
      on_block: called with each block's report.

    Returns:
      A model whose blocks are read from the store, and one report a block.

    Raises:
      CalibrationError: as `quantize_blocks`.
      RecipeError: as `quantize_blocks`.
    """
    store = keeping.store
    assert store is not None
    reports = []
    for _, report in solve_blocks(model, tokens, passes, key=key, keeping=keeping):
        reports.append(report)
        on_block(report)
    layers = tuple(store.abstract(index) for index in range(len(reports)))
    abstract = dataclasses.replace(model.abstract, layers=layers)
    return with_blocks(model, abstract, store.block), _report(model.abstract, tokens, reports)


def _report(model: Llama, tokens: Int[Array, "samples length"] | None, reports: Sequence[BlockReport]) -> Report:
    attention = {} if tokens is None else calibration_attention(model)
    return Report(blocks=tuple(reports), details=tuple(attention.items()))


def solve_blocks(
    model: LazyModel,
    tokens: Int[Array, "samples length"] | None,
    passes: Sequence[BlockPass],
    *,
    key: Key,
    keeping: Keeping,
) -> Iterator[tuple[Block, BlockReport]]:
    """Yields each block rewritten, and its report; holds one block at a time. See `quantize_blocks`."""
    config, store = model.abstract.config, keeping.store
    carried = any(one.needs_inputs() for one in passes)
    taught = any(one.needs_teacher(keeping.statistics) for one in passes)
    if taught and keeping.activations != "device":
        raise RecipeError(
            f"activations are to be kept on {keeping.activations}, but the recipe compares blocks with the source's "
            "own activations, which are on the device: keep all there, or take fewer samples"
        )
    last = len(blocks(model.abstract)) - 1
    with contextlib.ExitStack() as open_files:
        inputs: Any = None
        if carried and tokens is not None:
            inputs = open_files.enter_context(open_inputs(model, tokens, keeping))
        source_inputs = _embed(model, tokens) if taught and tokens is not None else None
        for index in range(last + 1):
            started, layer, watch = time.monotonic(), model.read(f"layers.{index}"), Stopwatch()
            teacher = None if source_inputs is None else watch.time("teach", _teach, layer, source_inputs, config)
            resumed = store.get(index) if store else None
            if resumed is not None:
                layer, report = resumed
                solved = layer
            else:
                data = BlockData(inputs, config, index, teacher, keeping.statistics, watch)
                own = jax.random.fold_in(key, index)
                if keeping.compilers:
                    ahead = _programs(passes, layer, data, own, advanced=index < last)
                    watch.time("compile", compile_ahead, ahead, keeping.compilers)
                solved, rows, losses = _run(passes, layer, data, own)
                layer = watch.time("compact", compact_outliers, jax.block_until_ready(solved))
                seconds, phases = time.monotonic() - started, dict(watch.seconds)
                report = BlockReport(index=index, linears=rows, seconds=seconds, losses=losses, phases=phases)
                if store:
                    store.put(index, layer, report)
            if inputs is not None and index < last:
                inputs = watch.time("advance", _advance_solved, solved, inputs, config)
                report = dataclasses.replace(report, phases=report.phases | watch.seconds)
            source_inputs = None if teacher is None else teacher.outputs
            yield layer, report


def _programs(passes: Sequence[BlockPass], layer: Block, data: BlockData, key: Key, *, advanced: bool) -> Programs:
    """Yields what a block will run, as far as its passes tell; what they share with other blocks included."""
    block: Block | None = outline(layer)
    for number, one in enumerate(passes):
        if block is None:
            return None
        block = yield from one.programs(block, data, jax.random.fold_in(key, number))
    if advanced and block is not None and isinstance(data.inputs, Lanes):
        for tensor in filter(_is_packed, jax.tree.leaves(block, is_leaf=_is_packed)):
            yield _dense.trace(tensor)
        dense = jax.eval_shape(dense_kernels, block)
        for device, part in data.inputs.samples():
            yield advance.trace(outline(dense, device), outline(part), data.config)
    return block


def _embed(model: LazyModel, tokens: Int[Array, "samples length"]) -> Float[Array, "samples length hidden"]:
    return embed(dataclasses.replace(model.abstract, embed_tokens=model.read("embed_tokens")), tokens)


def _advance_solved(solved: Block, inputs: Any, config: LlamaConfig) -> Any:
    """Returns what a block with packed kernels makes of inputs, which is there when this returns."""
    outputs = advance_all(dense_kernels(solved), inputs, config)
    jax.block_until_ready(outputs.parts)
    return outputs


def advance_all(layer: Block, inputs: Any, config: LlamaConfig) -> Any:
    """Returns what a block makes of inputs that may be in `Lanes`, or `Offloaded`, which are then written over."""
    if isinstance(inputs, Lanes):
        return inputs.map(lambda own, part: advance_all(own, part, config), layer)
    if not isinstance(inputs, Offloaded):
        return advance(layer, inputs, config)
    for index, piece in enumerate(inputs.pieces()):
        inputs.put(index, advance(layer, piece, config))
    return inputs


def dense_kernels(layer: Block) -> Block:
    """Returns a block with what its packed kernels stand for, in float32.

    Blocks whose packed shapes differ, as SpQR's lists of outliers do with and without their empty room, then share one
    program: a block from the store gives the next one the same inputs, to the bit, as it gave when it was solved. Each
    kind of kernel is one program, whose roundings do not depend on that room: outliers are put in place after them.
    """
    dense: Block = jax.tree.map(lambda node: _dense(node) if _is_packed(node) else node, layer, is_leaf=_is_packed)
    return dense


def _is_packed(node: object) -> bool:
    return isinstance(node, QuantizedTensor)


@jax.jit
def _dense(tensor: QuantizedTensor) -> Float[Array, "in out"]:
    return tensor.dequantize()


@functools.partial(jax.jit, static_argnums=2)
def advance(
    layer: Block, inputs: Float[Array, "samples tokens hidden"], config: LlamaConfig
) -> Float[Array, "samples tokens hidden"]:
    """Returns what a block makes of all samples, one sample at a time."""
    lengths = jnp.full(1, inputs.shape[1], jnp.int32)
    config = calibrated(layer, config, inputs.dtype)
    return jax.lax.map(lambda x: prompt_block(layer, x[None], lengths, x.shape[0], config)[0][0], inputs)


def _teach(layer: Block, inputs: Float[Array, "samples tokens hidden"], config: LlamaConfig) -> Teacher:
    """Runs a block as it came, but with exact activations and cache, on what the source's blocks before it gave."""
    exact = put(layer, "self_attn.kv_codec", ExactKv())
    for name in BLOCK_LINEARS:
        exact = put(exact, f"{name}.input_quantizer", None)
    return Teacher(inputs=inputs, outputs=advance(dense_kernels(exact), inputs, config))


def check_weights(model: Llama) -> None:
    """Refuses a model whose weights cannot be meant; called before any work.

    Raises:
      CalibrationError: an array is NaN or infinite, or a block's matrix is zero everywhere; all such paths are named.
    """
    faults = WeightFaults(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        faults.look(jax.tree_util.keystr(path, simple=True, separator="."), leaf)
    faults.refuse()


class WeightFaults:
    """Collects what is wrong with weights that are looked at one by one."""

    def __init__(self, model: Llama) -> None:
        """Begins with none; the model may be abstract."""
        self._matrices = {f"{path}.kernel" for path in linear_paths(model)}
        self._faults: list[str] = []

    def look(self, name: str, leaf: Shaped[Array, "*shape"]) -> None:
        """Looks at the array of a path."""
        finite, zero = (bool(answer) for answer in _look_at(leaf))
        if not finite:
            self._faults.append(f"{name.removesuffix('.kernel')} has NaN or infinite weights")
        elif zero and name in self._matrices:
            self._faults.append(f"{name.removesuffix('.kernel')} is zero everywhere")

    def refuse(self) -> None:
        """Raises CalibrationError if there is a fault."""
        if self._faults:
            raise CalibrationError(
                f"{'; '.join(self._faults)}. The checkpoint is damaged or incomplete: fetch or convert it again"
            )


@jax.jit
def _look_at(leaf: Shaped[Array, "*shape"]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Returns whether all entries are finite, and whether all are zero. A maximum will not do: on CPU it loses NaNs."""
    return jnp.all(jnp.isfinite(leaf)), jnp.all(leaf == 0)


def _run(
    passes: Sequence[BlockPass], layer: Block, data: BlockData, key: Key
) -> tuple[Block, tuple[LinearReport, ...], tuple[float, ...]]:
    rows: list[LinearReport] = []
    losses: tuple[float, ...] = ()
    for number, one in enumerate(passes):
        layer, solved = one(layer, data, jax.random.fold_in(key, number))
        for path, diagnostics in solved.items():
            if path == f"layers.{data.index}":
                losses += _curve(path, diagnostics["losses"])
            else:
                rows.append(_row(path, layer, diagnostics))
    return layer, tuple(rows), losses


def _curve(path: str, losses: Float[Array, "steps"]) -> tuple[float, ...]:
    curve = tuple(losses.tolist())
    bad = next((step for step, loss in enumerate(curve) if not math.isfinite(loss)), None)
    if bad is not None:
        raise CalibrationError(
            f"{path}: the training's loss is not finite at step {bad}; set a smaller learning_rate or load the model "
            "in a wider dtype. Finished blocks are kept; run again to go on"
        )
    return curve


def _row(path: str, layer: Block, diagnostics: Diagnostics) -> LinearReport:
    figures = {name: float(value) for name, value in summarize(diagnostics).items()}
    bad = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if bad:
        raise CalibrationError(
            f"{path}: {', '.join(bad)} not finite; damping {figures.get('damping', 0.0):.2f} of the mean diagonal. "
            "Its calibration inputs are degenerate: use more or other calibration text, a larger `damping`, or leave "
            "this linear out by a rule with `quantizer: null`. Finished blocks are kept; run again to go on"
        )
    tensor = compact_outliers(get(layer, path.split(".", 2)[2]).kernel)
    return LinearReport(
        path=path,
        format=type(tensor).__name__,
        bits_per_weight=tensor.bits_per_weight(),
        relative_error=math.sqrt(figures["weight_error"] / figures["weight_norm"]),
        proxy_loss=figures.get("proxy_loss"),
        rtn_proxy_loss=figures.get("rtn_proxy_loss"),
        damping=figures.get("damping"),
    )
