"""InputQuantizers: rules choose what rounds the input of each linear, fitted to calibration text where need be."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.activations import ActivationMethod, ActivationQuantizer
from jquant.blocks.base import BlockData, BlockPass, Programs, StatisticStore, outline
from jquant.blocks.rules import check_pattern, first_match, refuse_unused
from jquant.blocks.weights import SITES, collect_all, programs_of_collect
from jquant.errors import CalibrationError, FormatError
from jquant.models import BLOCK_LINEARS, Block, Llama, get, linear_paths, put
from jquant.quantizers import ABSMAX, Diagnostics
from jquant.types import Key


@dataclass(frozen=True)
class ActivationRule:
    r"""What the inputs of the linears of some paths get.

    Attributes:
      match: regular expression for the whole path, such as `.*_proj` or `layers\.0\..*`; the first rule that
        matches a path wins.
      quantizer: the method; None leaves these inputs as they are.
    """

    match: str
    quantizer: ActivationMethod | None

    def __post_init__(self) -> None:
        """Refuses a pattern that is not a regular expression."""
        check_pattern(self.match)


@final
@dataclass(frozen=True)
class InputQuantizers(BlockPass):
    """Puts an input quantizer on the linears of a block by rules.

    Scales are calibrated on what the block's linears multiply before any of its inputs is quantized; the blocks before
    it are as they were rewritten.

    Attributes:
      rules: the rules, first match wins; a linear that none matches keeps its input.
    """

    rules: tuple[ActivationRule, ...]

    def needs_inputs(self) -> bool:
        """Tells whether any rule's method is calibrated."""
        return any(rule.quantizer is not None and rule.quantizer.needs_absmax() for rule in self.rules)

    def needs_teacher(self, kept: StatisticStore | None = None) -> bool:
        """Tells that nothing is compared with the source."""
        del kept
        return False

    def check(self, model: Llama) -> None:
        """Refuses rules that no linear falls to, inputs that a method cannot take, and inputs already quantized.

        Raises:
          RecipeError: a rule matches nothing, or only linears that rules before it took.
          FormatError: a linear's input cannot be quantized so; its path is named.
        """
        used = set()
        for path in linear_paths(model):
            rule = first_match(self.rules, path)
            used.add(rule)
            if rule is None or rule.quantizer is None:
                continue
            layer = get(model, path)
            if layer.input_quantizer is not None:
                raise FormatError(f"the input of {path} is already quantized by {layer.input_quantizer.method}")
            try:
                rule.quantizer.check(layer.kernel.shape[0])
            except FormatError as error:
                raise FormatError(f"{path}, by rule {rule.match!r}: {error}") from error
        refuse_unused(self.rules, used, linear_paths(model)[0])

    def __call__(self, block: Block, data: BlockData, key: Key) -> tuple[Block, dict[str, Diagnostics]]:
        """Fits and places the quantizers of one block; there is nothing to report.

        Raises:
          CalibrationError: the calibration text overflows the model; the linear is named.
        """
        del key
        sites = self._sites(data.index)
        largest = collect_all(block, data.inputs, sites, ABSMAX, data.config) if sites else {}
        for site, seen in largest.items():
            if not bool(jnp.isfinite(seen).all()):
                raise CalibrationError(
                    f"layers.{data.index}.{SITES[site][0]} has NaN or infinite inputs on the calibration text; load "
                    "the model in a wider dtype (--dtype float32)"
                )
        return self.place(block, data.index, largest), {}

    def place(self, block: Block, index: int, largest: Mapping[str, Float[Array, "_"]]) -> Block:
        """Returns a block with its quantizers, given the largest magnitudes of each site that needs them.

        Args:
          block: the block.
          index: its place, from 0.
          largest: by the names of `SITES`, [features]; abstract under `jax.eval_shape`.
        """
        for site, names in SITES.items():
            for name in names:
                rule = first_match(self.rules, f"layers.{index}.{name}")
                if rule is not None and rule.quantizer is not None:
                    fitted = fit_method(rule.quantizer, largest.get(site) if rule.quantizer.needs_absmax() else None)
                    block = put(block, f"{name}.input_quantizer", fitted)
        return block

    def programs(self, block: Block, data: BlockData, key: Key) -> Programs:
        """Yields what finds the largest magnitudes."""
        del key
        block, sites, largest = outline(block), self._sites(data.index), {}
        if sites:
            largest = yield from programs_of_collect(block, data.inputs, sites, ABSMAX, data.config)
        placed = jax.eval_shape(lambda own, seen: self.place(own, data.index, seen), block, largest)
        for name in BLOCK_LINEARS:
            block = put(block, f"{name}.input_quantizer", get(placed, name).input_quantizer)
        return block

    def _sites(self, index: int) -> tuple[str, ...]:
        return tuple(site for site, names in SITES.items() if any(self._calibrated(index, name) for name in names))

    def _calibrated(self, index: int, name: str) -> bool:
        rule = first_match(self.rules, f"layers.{index}.{name}")
        return rule is not None and rule.quantizer is not None and rule.quantizer.needs_absmax()


@functools.partial(jax.jit, static_argnums=0)
def fit_method(method: ActivationMethod, largest: Any) -> ActivationQuantizer:
    """Returns a method's node, compiled once for each method and width."""
    return method.fit(largest)
