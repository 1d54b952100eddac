"""RTN: round each weight to the nearest point of its group's grid (spec_weights.md section 2).

For a group of inputs and an output, with lo = min(w, 0) and hi = max(w, 0):
asymmetric      s = (hi - lo) / (2^b - 1),       z = round(-lo / s)
symmetric       s = max|w| / (2^(b-1) - 1),      z = 2^(b-1)
symmetric_full  s = 2 max|w| / (2^b - 1),        z = 2^(b-1)
q = clip(round(w / s) + z, 0, 2^b - 1) and w' = s (q - z). Rounding is half to even.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import jax
from jaxtyping import Array, Float

from jquant.formats import UniformFormat, UniformTensor, quantize_uniform
from jquant.numerics import Grid, cast_scales, encode, fit_grid, range_of, search_range
from jquant.quantizers.base import Diagnostics, WeightQuantizer, weight_error
from jquant.types import Key, compute_dtype

type Clip = Literal["none", "search"]


@final
@dataclass(frozen=True)
class Rtn(WeightQuantizer):
    """Rounds to nearest; needs no calibration.

    Attributes:
      format: bits, groups and grid.
      clip: "none" for the full range of each group, "search" for the range of least 2.4-norm error over 80 steps.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (128, 8))
      >>> tensor, _ = Rtn(UniformFormat(bits=4, group_size=64))(weight, None, jax.random.key(1))
      >>> tensor.bits_per_weight()
      4.3125
    """

    statistic = None
    separable = True

    format: UniformFormat = UniformFormat()
    clip: Clip = "none"

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if the group size does not divide the inputs."""
        self.format.groups(shape[0])

    def __call__(self, weight: Float[Array, "in out"], statistics: Any, key: Key) -> tuple[UniformTensor, Diagnostics]:
        """Rounds a matrix; an all-zero group gives zeros."""
        del statistics, key
        weight = weight.astype(compute_dtype(weight.dtype))
        tensor = round_to_nearest(weight, self.format, self.clip)
        return tensor, weight_error(weight, tensor)


def round_to_nearest(weight: Float[Array, "in out"], format: UniformFormat, clip: Clip) -> UniformTensor:
    """Returns the matrix rounded to the nearest points of the grids that `fit_groups` gives."""
    grid = fit_groups(weight, format, clip)
    groups, inputs = grid.scales.shape[0], weight.shape[0]
    rows = weight.reshape(groups, inputs // groups, -1)
    codes = jax.vmap(lambda values, scales, zeros: encode(values, Grid(scales[None], zeros[None]), format.bits))(
        rows, grid.scales, grid.zeros
    )
    return quantize_uniform(codes.reshape(weight.shape), grid.scales, grid.zeros, format)


def fit_groups(weight: Float[Array, "in out"], format: UniformFormat, clip: Clip) -> Grid:
    """Fits one grid to each group of inputs and each output.

    Args:
      weight: the matrix whose ranges count.
      format: bits, group size, symmetry and how scales are stored.
      clip: whether the range is searched.

    Returns:
      Scales, already rounded to their stored dtype, and zeros, both [groups, out].
    """
    groups = format.groups(weight.shape[0])
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)

    def fit(values: Float[Array, "size out"]) -> Grid:
        if clip == "search":
            return search_range(values, format.bits, format.symmetry)
        low, high = range_of(values, axis=0)
        return fit_grid(low, high, format.bits, format.symmetry)

    return cast_scales(jax.vmap(fit)(rows), format.scale_dtype)
