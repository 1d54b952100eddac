"""GPTQ with QRazor as its rounding (arXiv:2210.17323, arXiv:2501.13331; spec_weights.md section 8).

GPTQ rounds one input at a time, so the weights that drop the same bits are neighbouring outputs of an input: when a row
is reached, all of it is known, and its shifts depend on nothing else. A group of inputs would have to fix its shift
before its later members are updated. This is what the reference implementation does as well.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, final

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jquant.errors import FormatError
from jquant.formats import PermutedTensor, QuantizedTensor, RazoredFormat, quantize_razored
from jquant.numerics import Razored, RazorFidelity, razor_integers, unrazor
from jquant.quantizers.base import Diagnostics, WeightQuantizer, hessian_figures
from jquant.quantizers.gptq import Rounding, processing_order, spread_errors
from jquant.quantizers.razor import fit_scales, razor_to_nearest, round_to_integers
from jquant.quantizers.statistics import HESSIAN, SecondMoment
from jquant.types import Key


@final
@dataclass(frozen=True)
class GptqRazor(WeightQuantizer):
    """GPTQ whose rows are rounded to integers and razored.

    Outputs are independent but for the groups that share a shift, which never reach over the end of a linear, as the
    group size divides each linear's outputs. So linears may still be solved as one matrix.

    Attributes:
      format: bits before and after, and groups, which are of outputs.
      damping: as in GPTQ.
      order: as in GPTQ.
      groups: as in GPTQ, of the groups that share a scale; without them both are the same.
      fidelity: as in `Razor`.
    """

    statistic = HESSIAN
    separable = True

    format: RazoredFormat = RazoredFormat(axis="out")
    damping: float = 0.01  # arXiv:2210.17323 section 3.3
    order: Literal["natural", "activation"] = "natural"
    groups: Literal["static", "dynamic"] = "static"
    fidelity: RazorFidelity = "reference"

    def __post_init__(self) -> None:
        """Refuses groups of inputs."""
        if self.format.axis == "in":
            raise FormatError('GPTQ rounds one input at a time, so shifts are shared by outputs: give axis="out"')

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if a group size does not divide its axis."""
        self.format.check(shape)

    def __call__(
        self, weight: Float[Array, "in out"], statistics: SecondMoment, key: Key
    ) -> tuple[QuantizedTensor, Diagnostics]:
        """Quantizes a matrix; inputs that were always zero get weight zero.

        Diagnostics: as in `Gptq`; `rtn_proxy_loss` is that of razoring without GPTQ in the same groups.
        """
        del key
        hessian = statistics.mean()
        weight = weight.astype(hessian.dtype)
        order = processing_order(hessian, self.order)

        def fit(rows: Float[Array, "size out"], group_size: int | None) -> Float[Array, "scale_groups out"]:
            return fit_scales(rows, dataclasses.replace(self.format, scale_group_size=group_size))

        solution = spread_errors(
            weight,
            hessian,
            order,
            Rounding(fit, self._round),
            damping=self.damping,
            group_size=self.format.scale_group_size,
            groups=self.groups,
        )
        tensor = self._pack(solution.codes, solution.grid, order)
        rounded = razor_to_nearest(weight, fit_scales(weight, self.format), self.format, fidelity=self.fidelity)
        return tensor, hessian_figures(weight, tensor, rounded, hessian) | {
            "solve_loss": jnp.sum(solution.errors**2, axis=0),
            "damping": solution.damping,
        }

    def _round(self, row: Float[Array, "out"], scales: Float[Array, "out"]) -> tuple[Razored, Float[Array, "out"]]:
        """Razors one row; returns its codes and shifts, and what they stand for."""
        integers = round_to_integers(row[None], scales[None], self.format.base_bits, "absmax", self.fidelity)[0]
        kept = razor_integers(integers, self.format.bits, self.format.group_size, axis=0, fidelity=self.fidelity)
        return kept, scales * unrazor(*kept, axis=0).astype(row.dtype)

    def _pack(
        self, kept: Razored, scales: Float[Array, "scale_groups out"], order: Int[Array, "in"]
    ) -> QuantizedTensor:
        if self.groups == "dynamic" and self.order == "activation" and self.format.scale_group_size is not None:
            inner = quantize_razored(kept.codes, kept.shifts, scales, self.format)
            return PermutedTensor(inner=inner, order=order[:, None].astype(jnp.int32), shape=inner.shape)
        codes, shifts = (jnp.zeros_like(leaf).at[order].set(leaf) for leaf in kept)
        return quantize_razored(codes, shifts, scales, self.format)
