"""QRazor's activations: integers of 16 bits on one absmax scale, cut to 8 or 4 bits group by group.

    s = max|x| / (2^(B-1) - 1),    q = clip(rne(x / s), -2^(B-1), 2^(B-1) - 1),    q' = razored q    (B base bits)

Groups are neighbouring features of one token (jquant/numerics/razor.py). The scale's reach is a choice by name:

    dynamic_tensor   max over all valid tokens of the call: the published code. A token's result changes with its
                     neighbours and with tokens after it; a prompt read at once differs from one read token by token.
    static_tensor    max over calibration text: one scale, stored.
    per_token        max over the token's own features.

Lee et al. 2025, arXiv:2501.13331, section 4.
"""

from dataclasses import dataclass
from typing import Literal, final

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.activations.base import ActivationMethod, ActivationQuantizer, check_bits, check_groups
from jquant.errors import FormatError
from jquant.formats import RazoredActivation
from jquant.numerics import RazorFidelity, razor_integers, safe_scale
from jquant.types import Leaf, compute_dtype

type Scope = Literal["dynamic_tensor", "static_tensor", "per_token"]


@final
@dataclass(frozen=True)
class ActivationRazor(ActivationMethod):
    """Rounds to integers and razors them.

    Attributes:
      base_bits: bits of the integers before razoring, sign included, up to 16.
      bits: bits that are kept, sign included, 2 to 8.
      group_size: neighbouring features that drop the same low bits.
      scope: what one scale serves.
      fidelity: whether the most negative integers occur: "paper" no, "reference" yes.

    Example:
      >>> quantizer = ActivationRazor(bits=4, group_size=4).fit(None)
      >>> quantizer(jnp.array([[32767.0, -20000, 1234, -5]]), None).dequantize().tolist()
      [[28672.0, -20480.0, 0.0, 0.0]]
    """

    base_bits: int = 16
    bits: int = 8
    group_size: int = 8
    scope: Scope = "dynamic_tensor"
    fidelity: RazorFidelity = "reference"

    def __post_init__(self) -> None:
        """Refuses widths and groups that cannot be."""
        check_bits(self.base_bits, 16)
        check_bits(self.bits, min(8, self.base_bits))
        if self.group_size < 1:
            raise FormatError(f"group_size={self.group_size}: give a positive size")

    def needs_absmax(self) -> bool:
        """Tells whether the scale is calibrated."""
        return self.scope == "static_tensor"

    def check(self, features: int) -> None:
        """Raises FormatError if the group size does not divide the features."""
        check_groups(features, self.group_size)

    def fit(self, absmax: Float[Array, "features"] | None) -> "RazorQuantizer":
        """Returns the node, with a scale if that is calibrated."""
        if not self.needs_absmax():
            return RazorQuantizer(None, self)
        assert absmax is not None, "calibration gives every method that needs it the largest magnitudes"
        return RazorQuantizer(self.step_of(jnp.max(absmax.astype(compute_dtype(absmax.dtype)))), self)

    def step_of(self, largest: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the integers' step for a largest magnitude; zero counts as one."""
        _, high = safe_scale(-largest, largest, self.base_bits)
        return high / (2 ** (self.base_bits - 1) - 1)


@final
@struct.dataclass
class RazorQuantizer(ActivationQuantizer):
    """Razors an activation.

    Attributes:
      scale: float32 scalar where it is calibrated, else None.
      method: the settings.
    """

    scale: Leaf | None
    method: ActivationRazor = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> RazoredActivation:
        """Rounds and razors; zeros stay zeros."""
        method, wide = self.method, x.astype(compute_dtype(x.dtype))
        scales = self._scales(wide, valid)
        largest = 2 ** (method.base_bits - 1) - 1
        least = -largest - (method.fidelity == "reference")
        integers = jnp.clip(jnp.round(wide / scales), least, largest).astype(jnp.int32)
        codes, shifts = razor_integers(
            integers, method.bits, method.group_size, axis=x.ndim - 1, fidelity=method.fidelity
        )
        return RazoredActivation(codes, shifts, scales, str(x.dtype))

    def _scales(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> Float[Array, "*batch 1"]:
        shape = (*x.shape[:-1], 1)
        if self.scale is not None:
            return jnp.broadcast_to(self.scale.astype(x.dtype), shape)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        if self.method.scope == "per_token":
            return self.method.step_of(largest)
        counted = largest if valid is None else jnp.where(valid[..., None], largest, 0)
        return jnp.broadcast_to(self.method.step_of(jnp.max(counted)), shape)
