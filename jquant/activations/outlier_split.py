"""LLM.int8()'s split: features with an outlier keep their numbers, all others become int8, one scale for each token.

With the threshold h, over the valid tokens of one call

    O = {i : any token has |x[t, i]| >= h},    s[t] = max_{|x[t, i]| < h} |x[t, i]| / 127,
    q[t, i] = rne(x[t, i] / s[t]) for i not in O,    y = s (q @ w_int8) + x[:, O] @ w[O]

w[O] being the rows of the int8 weight brought back to numbers, as bitsandbytes has it; the paper keeps them in half
precision. Small values of a feature with outliers count in s, as there. Shapes are static: both products run over all
features, with zeros where the other one has numbers.

The set O depends on every token of a call, by design of the method: a token's result changes with its neighbours in the
batch, and a prompt read at once differs from the same prompt read token by token. Padding is left out.

Dettmers et al. 2022, arXiv:2208.07339, section 3.
"""

from dataclasses import dataclass
from typing import final

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.activations.base import ActivationMethod, ActivationQuantizer, check_bits
from jquant.errors import FormatError
from jquant.formats import SplitActivation, UniformActivation
from jquant.numerics import fit_grid
from jquant.types import compute_dtype


@final
@dataclass(frozen=True)
class OutlierSplit(ActivationMethod):
    """Quantizes each token by its own range, but for features with outliers.

    Attributes:
      threshold: magnitude from which on, inclusive, a value is an outlier. 6.0 in the paper.
      bits: bits of one code, 2 to 8.

    Example:
      >>> x = jnp.array([[1.0, -2.0, 7.0, 0.5], [0.5, 1.0, -0.25, 3.0]])
      >>> split = OutlierSplit().fit(None)(x, None)
      >>> split.inner.codes.tolist(), split.outliers[:, 2].tolist()
      ([[64, -127, 0, 32], [21, 42, 0, 127]], [7.0, -0.25])
    """

    threshold: float = 6.0
    bits: int = 8

    def __post_init__(self) -> None:
        """Refuses thresholds that split nothing off."""
        check_bits(self.bits)
        if self.threshold <= 0:
            raise FormatError(f"threshold={self.threshold}: give a positive magnitude; per_token has no outliers")

    def needs_absmax(self) -> bool:
        """Tells that nothing is calibrated."""
        return False

    def check(self, features: int) -> None:
        """Takes any number of features."""
        del features

    def fit(self, absmax: Float[Array, "features"] | None) -> "OutlierQuantizer":
        """Returns the node; it has no arrays."""
        del absmax
        return OutlierQuantizer(self)


@final
@struct.dataclass
class OutlierQuantizer(ActivationQuantizer):
    """Splits the features of a call by what its valid tokens hold."""

    method: OutlierSplit = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> SplitActivation:
        """Splits and rounds."""
        bits, wide = self.method.bits, x.astype(compute_dtype(x.dtype))
        exceeds = jnp.abs(wide) >= self.method.threshold
        counted = exceeds if valid is None else exceeds & valid[..., None]
        columns = jnp.broadcast_to(jnp.any(counted, axis=tuple(range(x.ndim - 1)), keepdims=True), x.shape)
        largest = jnp.max(jnp.where(exceeds, 0, jnp.abs(wide)), axis=-1, keepdims=True)
        scales = fit_grid(-largest, largest, bits, "symmetric").scales
        levels = jnp.clip(jnp.round(wide / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = jnp.where(columns, 0, levels).astype(jnp.int8)
        inner = UniformActivation(codes, scales, None, str(x.dtype))
        return SplitActivation(inner, jnp.where(columns, x, 0), str(x.dtype))
