"""QRazor: integers on one absmax scale, cut to few bits group by group (arXiv:2501.13331; spec_weights.md section 8).

Stage 1, for each output (or group of inputs of it), with b base bits:

    absmax   s = max|w| / (2^(b-1) - 1),                q = clip(rne(w / s), -2^(b-1), 2^(b-1) - 1)
    range    s = (max(w, 0) - min(w, 0)) / (2^b - 1),   q = clip(rne(w / s), +-(2^b - 1)), without a zero point

Stage 2 razors q in groups (jquant/numerics/razor.py), w' = s q'. In the paper q and q' are symmetric, so that neither
-2^(b-1) nor the most negative code occurs; the code of QLLM-INFER since June 2025 uses both, with a smaller error.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jquant.errors import FormatError
from jquant.formats import RazoredFormat, RazoredTensor, quantize_razored
from jquant.numerics import RazorFidelity, as_stored, range_of, razor_integers, safe_scale, unrazor
from jquant.quantizers.base import Diagnostics, WeightQuantizer, weight_error
from jquant.quantizers.rtn import Clip
from jquant.types import Key, compute_dtype

type Step = Literal["absmax", "range"]

_AXES: Final = {"in": 0, "out": 1}
_SEARCH_NORM: Final = 2.4  # exponent of the error, number of steps and their fineness: QLLM-INFER, as for uniform grids
_SEARCH_STEPS: Final = 80
_SEARCH_GRID: Final = 100


@final
@dataclass(frozen=True)
class Razor(WeightQuantizer):
    """Rounds to integers and razors them; needs no calibration.

    Attributes:
      format: bits before and after, and groups.
      clip: "none" for the full range, "search" for the scale, of 80 shrunk ones, whose razored weights have the least
        2.4-norm error. Groups of outputs cannot be searched: a scale would change what other outputs drop.
      step: what the scale is fitted to.
      fidelity: whether the most negative integers occur: "paper" no, "reference" yes.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (128, 8))
      >>> tensor, _ = Razor(RazoredFormat(group_size=8))(weight, None, jax.random.key(1))
      >>> tensor.bits_per_weight()
      4.5

    Reference: arXiv:2501.13331, section 4.
    """

    statistic = None
    separable = True

    format: RazoredFormat = RazoredFormat()
    clip: Clip = "none"
    step: Step = "absmax"
    fidelity: RazorFidelity = "reference"

    def __post_init__(self) -> None:
        """Refuses a search over groups of outputs."""
        if self.clip == "search" and self.format.axis == "out":
            raise FormatError('clip="search" takes groups of inputs: give axis="in", or clip="none"')

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if a group size does not divide its axis."""
        self.format.check(shape)

    def __call__(self, weight: Float[Array, "in out"], statistics: Any, key: Key) -> tuple[RazoredTensor, Diagnostics]:
        """Razors a matrix; an all-zero output gives zeros."""
        del statistics, key
        weight = weight.astype(compute_dtype(weight.dtype))
        scales = fit_scales(weight, self.format, self.step)
        if self.clip == "search":
            scales = self._search(weight, scales)
        tensor = razor_to_nearest(weight, scales, self.format, self.step, self.fidelity)
        return tensor, weight_error(weight, tensor)

    def _search(
        self, weight: Float[Array, "in out"], scales: Float[Array, "scale_groups out"]
    ) -> Float[Array, "scale_groups out"]:
        """Returns the scales of least error; ties keep the larger."""

        def error_of(tried: Float[Array, "scale_groups out"]) -> Float[Array, "scale_groups out"]:
            integers = round_to_integers(weight, tried, self.format.base_bits, self.step, self.fidelity)
            razored = razor_integers(integers, self.format.bits, self.format.group_size, axis=0, fidelity=self.fidelity)
            dense = repeat_scales(tried, weight.shape[0]) * unrazor(*razored, axis=0).astype(weight.dtype)
            errors = jnp.abs(dense - weight) ** _SEARCH_NORM
            return jnp.sum(errors.reshape(scales.shape[0], -1, scales.shape[1]), axis=1)

        def shrink(best: tuple[Array, Array], factor: Float[Array, ""]) -> tuple[tuple[Array, Array], None]:
            tried = as_stored(factor * scales, self.format.scale_dtype, positive=True)
            error = error_of(tried)
            better = error < best[1]
            return (jnp.where(better, tried, best[0]), jnp.where(better, error, best[1])), None

        factors = jnp.asarray([1 - step / _SEARCH_GRID for step in range(1, _SEARCH_STEPS)], dtype=weight.dtype)
        (found, _), _ = jax.lax.scan(shrink, (scales, error_of(scales)), factors)
        return found


def fit_scales(
    weight: Float[Array, "in out"], format: RazoredFormat, step: Step = "absmax"
) -> Float[Array, "scale_groups out"]:
    """Returns the integers' steps, already rounded to their stored dtype."""
    groups = format.scale_groups(weight.shape[0])
    low, high = range_of(weight.reshape(groups, -1, weight.shape[1]), axis=1)
    low, high = safe_scale(low, high, format.base_bits)
    if step == "range":
        return as_stored((high - low) / (2**format.base_bits - 1), format.scale_dtype, positive=True)
    largest = jnp.maximum(jnp.abs(low), high)
    return as_stored(largest / (2 ** (format.base_bits - 1) - 1), format.scale_dtype, positive=True)


def round_to_integers(
    weight: Float[Array, "in out"],
    scales: Float[Array, "scale_groups out"],
    base_bits: int,
    step: Step,
    fidelity: RazorFidelity,
) -> Int32[Array, "in out"]:
    """Rounds to the integers of stage 1.

    Args:
      weight: the matrix.
      scales: from `fit_scales`.
      base_bits: bits of an integer, sign included; with "range", without it.
      step: what the scales were fitted to.
      fidelity: whether -2^(base_bits-1) occurs.
    """
    largest = 2 ** (base_bits - 1) - 1 if step == "absmax" else 2**base_bits - 1
    least = -largest - 1 if step == "absmax" and fidelity == "reference" else -largest
    return jnp.clip(jnp.round(weight / repeat_scales(scales, weight.shape[0])), least, largest).astype(jnp.int32)


def repeat_scales(scales: Float[Array, "scale_groups out"], inputs: int) -> Float[Array, "{inputs} out"]:
    """Returns each input's scales."""
    return jnp.repeat(scales, inputs // scales.shape[0], axis=0)


def razor_to_nearest(
    weight: Float[Array, "in out"],
    scales: Float[Array, "scale_groups out"],
    format: RazoredFormat,
    step: Step = "absmax",
    fidelity: RazorFidelity = "reference",
) -> RazoredTensor:
    """Returns the matrix as razored integers on given scales."""
    integers = round_to_integers(weight, scales, format.base_bits, step, fidelity)
    axis = _AXES[format.axis]
    codes, shifts = razor_integers(integers, format.bits, format.group_size, axis=axis, fidelity=fidelity)
    return quantize_razored(codes, shifts, scales, format)
