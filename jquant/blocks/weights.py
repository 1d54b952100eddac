"""QuantizeWeights: rules choose a quantizer for each linear; linears that share an input share its statistics."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.blocks.attention import calibrated
from jquant.blocks.base import BlockData, BlockPass, Programs, StatisticStore, outline, split_diagnostics
from jquant.blocks.lanes import Lanes
from jquant.blocks.offloaded import Offloaded
from jquant.blocks.rules import check_pattern, first_match, refuse_unused
from jquant.errors import CalibrationError, FormatError, RecipeError
from jquant.formats import QuantizedTensor, split_outputs
from jquant.models import Block, Linear, Llama, LlamaConfig, get, linear_paths, prompt_block, put
from jquant.quantizers import Diagnostics, Statistic, WeightQuantizer
from jquant.types import Key

# The four inputs of a block and the linears that multiply them, in the order of the forward pass.
SITES: Final[Mapping[str, tuple[str, ...]]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}

# Of XLA, for solves. For each of their float32 products it would compile and try Triton's kernels, beside cuBLAS, which
# is all that is left without: on an H100 a shape took 10 to 20 s (docs/solvers.md). Of no effect on other machines.
OPTIONS: Final = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Rule:
    r"""Which quantizer the linears of some paths get.

    Attributes:
      match: regular expression for the whole path, such as `.*_proj` or `layers\.0\..*`; the first rule that
        matches a path wins.
      quantizer: the quantizer; None leaves these linears as they are.
    """

    match: str
    quantizer: WeightQuantizer | None

    def __post_init__(self) -> None:
        """Refuses a pattern that is not a regular expression."""
        check_pattern(self.match)


@final
@dataclass(frozen=True)
class QuantizeWeights(BlockPass):
    """Quantizes the linears of a block by rules.

    Attributes:
      rules: the rules, first match wins; a linear that none matches stays as it is.
      inputs: "quantized" collects statistics of what the rewritten blocks before produce, as published methods do;
        "source" of what the source's own blocks produce, with sequence "per_block": then recipes that differ in their
        quantizers alone share one set of statistics (`jquant compare --share-hessians`).
      sequence: "per_site" solves the sites in the order of the forward pass, each on inputs that the block
        produces with the sites before it already quantized (GPTQ's true_sequential); "per_block" collects all
        four statistics from the block as it came.
    """

    rules: tuple[Rule, ...]
    sequence: Literal["per_site", "per_block"] = "per_site"
    inputs: Literal["quantized", "source"] = "quantized"

    def __post_init__(self) -> None:
        """Refuses sites in turn on inputs that their turn does not change."""
        if self.inputs == "source" and self.sequence != "per_block":
            raise RecipeError(
                'sequence "per_site" collects statistics after each solved site, inputs "source" before any: '
                "set sequence: per_block"
            )

    def needs_inputs(self) -> bool:
        """Tells whether any rule's quantizer needs statistics of the rewritten blocks' outputs."""
        return self.inputs == "quantized" and bool(self.wanted())

    def needs_teacher(self, kept: StatisticStore | None = None) -> bool:
        """Tells whether statistics of the source's activations are needed that are not kept yet."""
        missing = [one for one in self.wanted() if kept is None or not kept.complete(one.name)]
        return self.inputs == "source" and bool(missing)

    def wanted(self) -> set[Statistic]:
        """Returns what the rules' quantizers need to know of the inputs."""
        return {rule.quantizer.statistic for rule in self.rules if rule.quantizer and rule.quantizer.statistic}

    def check(self, model: Llama) -> None:
        """Refuses rules that no linear falls to, and shapes or weights that a rule's quantizer cannot take.

        Raises:
          RecipeError: a rule matches nothing, or only linears that rules before it took.
          FormatError: a linear cannot be quantized so; its path is named.
        """
        used = set()
        for path in linear_paths(model):
            rule = self.rule_for(path)
            used.add(rule)
            if rule is None or rule.quantizer is None:
                continue
            kernel = get(model, path).kernel
            if isinstance(kernel, QuantizedTensor):
                raise FormatError(f"{path} is already quantized ({type(kernel).__name__}); start from the source model")
            try:
                rule.quantizer.check(kernel.shape)
            except FormatError as error:
                raise FormatError(f"{path}, by rule {rule.match!r}: {error}") from error
        refuse_unused(self.rules, used, linear_paths(model)[0])

    def rule_for(self, path: str) -> Rule | None:
        """Returns the first rule that matches a path."""
        return first_match(self.rules, path)

    def __call__(self, block: Block, data: BlockData, key: Key) -> tuple[Block, dict[str, Diagnostics]]:
        """Quantizes one block; see the class for what the order of sites means."""
        report: dict[str, Diagnostics] = {}
        whole: dict[str, dict[str, Any]] = {}  # per_block: statistic's name -> sums of all sites of the source block
        if self.sequence == "per_block":
            of = self._of_source if self.inputs == "source" else _of_inputs
            whole = {one.name: data.watch.time("collect", of, block, data, one) for one in self.wanted()}
        for site, names in SITES.items():
            for quantizer, group in self._groups(names, data.index):
                statistics = self._statistics(quantizer.statistic, block, data, site, whole)
                for part in [group] if quantizer.separable else [(name,) for name in group]:
                    seed = jax.random.fold_in(key, zlib.crc32(part[0].encode()))
                    solved = data.watch.time(f"solve {site}", _solve, quantizer, block, part, statistics, seed)
                    for name, kernel, diagnostics in solved:
                        block = put(block, f"{name}.kernel", kernel)
                        report[f"layers.{data.index}.{name}"] = diagnostics
        return block, report

    def programs(self, block: Block, data: BlockData, key: Key) -> Programs:
        """Yields what collects and what solves, linears of equal shape being one program."""
        block, key = outline(block), outline(key)
        whole = {}
        if self.sequence == "per_block":
            inputs = data.inputs if self.inputs == "quantized" else None
            for one in self.wanted():
                whole[one.name] = yield from programs_of_collect(block, inputs, tuple(SITES), one, data.config)
        for site, names in SITES.items():
            for quantizer, group in self._groups(names, data.index):
                sums, statistic = None, quantizer.statistic
                if statistic is not None and self.sequence == "per_block":
                    sums = whole[statistic.name][site]
                elif statistic is not None:
                    found = yield from programs_of_collect(block, data.inputs, (site,), statistic, data.config)
                    sums = found[site]
                for part in [group] if quantizer.separable else [(name,) for name in group]:
                    kernels = tuple(get(block, name).kernel for name in part)
                    traced = solve_jointly.trace(quantizer, kernels, sums, key)
                    yield traced
                    sizes = tuple(kernel.shape[1] for kernel in kernels)
                    tensors = jax.eval_shape(functools.partial(split_outputs, sizes=sizes), traced.out_info[0])
                    for name, tensor in zip(part, tensors, strict=True):
                        block = put(block, f"{name}.kernel", _placed(tensor, sums))
        return block

    def _of_source(self, block: Block, data: BlockData, statistic: Statistic) -> dict[str, Any]:
        """Returns a statistic of all sites on the source's activations: the one that is kept, or a new one, kept."""
        if data.statistics is not None:
            features = {site: get(block, names[0]).kernel.shape[0] for site, names in SITES.items()}
            empty = jax.eval_shape(lambda: {site: statistic.init(count) for site, count in features.items()})
            known: dict[str, Any] | None = data.statistics.get(data.index, statistic.name, empty)
            if known is not None:
                return known
        if data.teacher is None:
            raise CalibrationError(f"layers.{data.index} has no source activations; was a kept statistic deleted?")
        sums = _of_inputs(block, dataclasses.replace(data, inputs=data.teacher.inputs), statistic)
        if data.statistics is not None:
            data.statistics.put(data.index, statistic.name, sums)
        return sums

    def _groups(self, names: tuple[str, ...], index: int) -> Iterator[tuple[WeightQuantizer, tuple[str, ...]]]:
        rules = {name: self.rule_for(f"layers.{index}.{name}") for name in names}
        chosen = {name: rule.quantizer for name, rule in rules.items() if rule is not None and rule.quantizer}
        for quantizer in dict.fromkeys(chosen.values()):
            yield quantizer, tuple(name for name, own in chosen.items() if own == quantizer)

    def _statistics(
        self, statistic: Statistic | None, block: Block, data: BlockData, site: str, whole: dict[str, dict[str, Any]]
    ) -> Any:
        if statistic is None:
            return None
        if self.sequence == "per_block":
            return whole[statistic.name][site]
        taken = (block, data.inputs, (site,), statistic, data.config)
        return data.watch.time(f"collect {site}", collect_all, *taken)[site]


def _placed[T](outlined: T, sums: Any) -> T:
    """Returns an outline bound to the device to which the statistics' is bound, as what is solved with them will be."""
    bound = next((leaf.sharding for leaf in jax.tree.leaves(sums)), None)
    placed: T = jax.tree.map(lambda leaf: leaf.update(sharding=bound), outlined)
    return placed


def _of_inputs(block: Block, data: BlockData, statistic: Statistic) -> dict[str, Any]:
    return collect_all(block, data.inputs, tuple(SITES), statistic, data.config)


def collect_all(
    block: Block, inputs: Any, sites: tuple[str, ...], statistic: Statistic, config: LlamaConfig
) -> dict[str, Any]:
    """Returns what `collect` does, of inputs that may be `Offloaded`: the same sums in the same order.

    Inputs in `Lanes` are summed lane by lane, each by its device, then all in order.
    """
    if isinstance(inputs, Lanes):
        return inputs.merge(
            lambda own, part: collect_all(own, part, sites, statistic, config), block, _combine_sites(statistic)
        )
    if not isinstance(inputs, Offloaded):
        found: dict[str, Any] = collect(block, inputs, sites, statistic, config)
        return found
    sums = {site: statistic.init(get(block, SITES[site][0]).kernel.shape[0]) for site in sites}
    for piece in inputs.pieces():
        sums = collect(block, piece, sites, statistic, config, sums)
    return sums


def programs_of_collect(
    block: Block, inputs: Any, sites: tuple[str, ...], statistic: Statistic, config: LlamaConfig
) -> Generator[jax.stages.Traced, None, dict[str, Any]]:
    """Yields the programs that `collect_all` runs on inputs in lanes on devices; returns the outline of its sums."""
    for device, part in inputs.samples() if isinstance(inputs, Lanes) else ():
        yield collect.trace(outline(block, device), outline(part), sites, statistic, config)
    features = {site: get(block, SITES[site][0]).kernel.shape[0] for site in sites}
    sums = {site: jax.eval_shape(functools.partial(statistic.init, count)) for site, count in features.items()}
    return outline(sums, jax.local_devices()[0] if isinstance(inputs, Lanes) else None)


@functools.cache
def _combine_sites(statistic: Statistic) -> Callable[[Any, Any], Any]:
    """Returns what combines a statistic of each site; one function for each, as it is compiled."""
    return lambda total, more: {site: statistic.combine(total[site], more[site]) for site in total}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def collect(
    block: Block,
    inputs: Any,
    sites: tuple[str, ...],
    statistic: Statistic,
    config: LlamaConfig,
    sums: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Sums a statistic of what the linears of each site multiply, over all samples.

    Args:
      block: the block as it is now.
      inputs: [samples, tokens, hidden].
      sites: names of `SITES`; what the others need is not computed.
      statistic: what to sum.
      config: the model's sizes.
      sums: what to go on from; None to begin.

    Returns:
      The sum for each site.
    """
    lengths = jnp.full(1, inputs.shape[1], jnp.int32)
    attending = calibrated(block, config, inputs.dtype)

    def step(sums: dict[str, Any], sample: Float[Array, "tokens hidden"]) -> tuple[dict[str, Any], None]:
        taps = prompt_block(block, sample[None], lengths, sample.shape[0], attending)[2]
        return {site: statistic.update(sums[site], getattr(taps, site)[0]) for site in sites}, None

    features = {site: get(block, SITES[site][0]).kernel.shape[0] for site in sites}
    begun = {site: statistic.init(features[site]) for site in sites} if sums is None else sums
    return jax.lax.scan(step, begun, inputs)[0]


def _solve(
    quantizer: WeightQuantizer, block: Block, names: tuple[str, ...], statistics: Any, key: Key
) -> list[tuple[str, QuantizedTensor, Diagnostics]]:
    """Solves the linears of one group as one matrix and cuts the result apart."""
    linears: list[Linear] = [get(block, name) for name in names]
    sizes = tuple(layer.kernel.shape[1] for layer in linears)
    whole = solve_jointly(quantizer, tuple(layer.kernel for layer in linears), statistics, key)
    parts = [whole] if len(names) == 1 else _cut(*whole, sizes)
    return [(name, *part) for name, part in zip(names, parts, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _cut(
    tensor: QuantizedTensor, diagnostics: Diagnostics, sizes: tuple[int, ...]
) -> list[tuple[QuantizedTensor, Diagnostics]]:
    """Cuts what was solved as one matrix into what each linear gets: one program, which rounds nothing."""
    return list(zip(split_outputs(tensor, sizes), split_diagnostics(diagnostics, sizes), strict=True))


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
def solve_jointly(
    quantizer: WeightQuantizer, kernels: tuple[Float[Array, "in _"], ...], statistics: Any, key: Key
) -> tuple[QuantizedTensor, Diagnostics]:
    """Quantizes linears of one input as one matrix, in the order in which they are given."""
    return quantizer(jnp.concatenate(kernels, axis=1), statistics, key)
