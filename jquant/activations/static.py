"""Static per tensor: one scale for all tokens, from what calibration saw. Nothing is measured at run time.

    s = c max|x| / (2^(b-1) - 1)    over calibration text,    q = clip(rne(x / s), -2^(b-1), 2^(b-1) - 1)

What exceeds the calibrated range is clipped. A token's result depends on no other token.

SmoothQuant, arXiv:2211.10438, section 4 (O3); Jacob et al. 2018, arXiv:1712.05877.
"""

from dataclasses import dataclass
from typing import Literal, final

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.activations.base import ActivationMethod, ActivationQuantizer, check_bits, check_clip
from jquant.formats import UniformActivation
from jquant.numerics import fit_grid
from jquant.types import Leaf, compute_dtype


@final
@dataclass(frozen=True)
class StaticTensor(ActivationMethod):
    """Rounds to nearest on one calibrated grid for each linear's input.

    Attributes:
      bits: bits of one code, 2 to 8.
      symmetry: "symmetric" divides the largest magnitude by 2^(bits-1) - 1, "symmetric_signed" by 2^(bits-1).
      clip_ratio: share of the calibrated range that the grid covers.

    Example:
      >>> quantizer = StaticTensor(bits=4).fit(jnp.array([3.5, 1.0]))
      >>> quantizer(jnp.array([[1.0, -9.0]]), None).dequantize().tolist()
      [[1.0, -4.0]]
    """

    bits: int = 8
    symmetry: Literal["symmetric", "symmetric_signed"] = "symmetric"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Refuses settings that no grid has."""
        check_bits(self.bits)
        check_clip(self.clip_ratio)

    def needs_absmax(self) -> bool:
        """Tells that the scale is calibrated."""
        return True

    def check(self, features: int) -> None:
        """Takes any number of features."""
        del features

    def fit(self, absmax: Float[Array, "features"] | None) -> "TensorQuantizer":
        """Returns the node; its scale is that of the largest magnitude."""
        assert absmax is not None, "calibration gives every method that needs it the largest magnitudes"
        largest = self.clip_ratio * jnp.max(absmax.astype(compute_dtype(absmax.dtype)))
        return TensorQuantizer(fit_grid(-largest, largest, self.bits, self.symmetry).scales, self)


@final
@struct.dataclass
class TensorQuantizer(ActivationQuantizer):
    """Quantizes every token on one grid.

    Attributes:
      scale: float32 scalar.
      method: the settings.
    """

    scale: Leaf
    method: StaticTensor = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> UniformActivation:
        """Rounds and clips."""
        del valid
        integers = round_on_scale(x, self.scale, self.method.bits)
        return UniformActivation(integers.astype(jnp.int8), repeat_scale(self.scale, x), None, str(x.dtype))


def round_on_scale(x: Float[Array, "*batch in"], scale: Float[Array, ""], bits: int) -> Float[Array, "*batch in"]:
    """Returns clip(rne(x / scale), -2^(bits-1), 2^(bits-1) - 1), whole numbers in float32 or wider."""
    wide = x.astype(compute_dtype(x.dtype))
    largest = 2 ** (bits - 1)
    return jnp.clip(jnp.round(wide / scale.astype(wide.dtype)), -largest, largest - 1)


def repeat_scale(scale: Float[Array, ""], x: Float[Array, "*batch in"]) -> Float[Array, "*batch 1"]:
    """Returns the scale once for each token of `x`, in the dtype that products sum in."""
    repeated: jax.Array = jnp.broadcast_to(scale.astype(compute_dtype(x.dtype)), (*x.shape[:-1], 1))
    return repeated
