"""ZeroQuant's weights: symmetric round to nearest with a given number of groups (spec_weights.md section 9).

The matrix [out, in], flattened row by row, is cut into `number_of_groups` runs of equal length; for each run

    s = 2 max|w| / 2^b,    q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),    w' = q s

so that -max|w| is exact and +max|w| is clipped. Rounding is half to even. A run may be part of a row, a row, or any
number of rows: 4096 groups of a [14336, 4096] matrix are three and a half rows each. A `UniformTensor` keeps a scale
for each output and each piece of gcd(run, in) inputs: no piece crosses the end of a run or of a row, so this holds
every such grouping exactly, at the cost of keeping a run's scale once for each of its pieces.

Yao et al. 2022, arXiv:2206.01861.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.formats import ScaleDtype, UniformFormat, UniformTensor, quantize_uniform
from jquant.numerics import Grid, cast_scales, encode, fit_grid, range_of
from jquant.quantizers.base import Diagnostics, WeightQuantizer, weight_error
from jquant.types import Key, compute_dtype

FEWEST_BITS: Final = 3  # DeepSpeed makes 2 bits ternary and 1 bit binary, which are other grids


@final
@dataclass(frozen=True)
class ZeroQuant(WeightQuantizer):
    """ZeroQuant's group-wise symmetric rounding; needs no calibration.

    Groups depend on the number of outputs, so every linear is solved alone.

    Attributes:
      bits: bits of one code, 3 to 8.
      number_of_groups: groups in the whole matrix; they divide the number of its weights. 4096 in the published runs.
      scale_dtype: how scales are stored. Codes are computed from the stored scale.
      fidelity: "paper" computes in float32; "reference" divides and rounds in the weight's own dtype, as DeepSpeed
        does: the same for float32 weights; with bfloat16 ones other codes for some weights at 8 bits.

    Example:
      >>> import jax
      >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
      >>> tensor, _ = ZeroQuant(bits=4, number_of_groups=32)(weight, None, jax.random.key(1))
      >>> tensor.bits_per_weight()
      4.25
    """

    statistic = None
    separable = False

    bits: int = 4
    number_of_groups: int = 4096
    scale_dtype: ScaleDtype = "float16"
    fidelity: Literal["paper", "reference"] = "paper"

    def __post_init__(self) -> None:
        """Refuses widths and numbers of groups that mean nothing here."""
        if not FEWEST_BITS <= self.bits <= 8:
            raise FormatError(f"bits={self.bits}: ZeroQuant's grid has {FEWEST_BITS} to 8")
        if self.number_of_groups < 1:
            raise FormatError(f"number_of_groups={self.number_of_groups}: give 1 or more")

    def check(self, shape: tuple[int, int]) -> None:
        """Raises FormatError if the groups do not divide the weights, or scales would outweigh the codes."""
        self.format_of(shape)

    def format_of(self, shape: tuple[int, int]) -> UniformFormat:
        """Returns the format that holds the groups of an (in, out) matrix.

        Raises:
          FormatError: the groups do not divide the weights; or they straddle rows in pieces so short that the scales
            would take more bits than the codes.

        Example:
          >>> ZeroQuant(number_of_groups=4096).format_of((4096, 14336)).group_size
          2048
        """
        inputs, outputs = shape
        if inputs * outputs % self.number_of_groups:
            raise FormatError(
                f"number_of_groups {self.number_of_groups} does not divide the {inputs * outputs} weights of "
                f"{outputs} rows of {inputs}; {outputs} makes a group of each row"
            )
        run = inputs * outputs // self.number_of_groups
        piece = math.gcd(run, inputs)
        straddles = piece < min(run, inputs)
        if straddles and piece * self.bits < 8 * jnp.dtype(self.scale_dtype).itemsize:
            raise FormatError(
                f"number_of_groups {self.number_of_groups} makes groups of {run} weights, which cut rows of {inputs} "
                f"inputs into pieces of {piece}: their scales would outweigh the codes; {outputs} makes a group of "
                "each row"
            )
        return UniformFormat(self.bits, None if piece == inputs else piece, "symmetric_signed", self.scale_dtype)

    def __call__(self, weight: Float[Array, "in out"], statistics: Any, key: Key) -> tuple[UniformTensor, Diagnostics]:
        """Rounds a matrix; an all-zero group gives zeros."""
        del statistics, key
        (inputs, outputs), wide = weight.shape, compute_dtype(weight.dtype)
        format = self.format_of((inputs, outputs))
        pieces = format.groups(inputs)
        low, high = range_of(weight.T.reshape(self.number_of_groups, -1), axis=1)
        grid = cast_scales(fit_grid(low, high, self.bits, format.symmetry), self.scale_dtype)
        scales = jnp.repeat(grid.scales, pieces * outputs // self.number_of_groups).reshape(outputs, pieces).T
        zeros = jnp.full_like(scales, 2 ** (self.bits - 1))
        own = Grid(scales[:, None, :], zeros[:, None, :])
        if self.fidelity == "reference":
            own = Grid(own.scales.astype(weight.dtype), own.zeros.astype(weight.dtype))
        codes = encode(weight.reshape(pieces, inputs // pieces, outputs), own, self.bits).reshape(weight.shape)
        tensor = quantize_uniform(codes, scales, zeros, format)
        return tensor, weight_error(weight.astype(wide), tensor)
