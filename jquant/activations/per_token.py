"""Per token: each token's range, found as it comes, gives it a grid of its own.

For the features of a token, or a group of them, with lo = min(x, 0), hi = max(x, 0) and the clip ratio c

    symmetric              s = c max|x| / (2^(b-1) - 1)                        SmoothQuant, QuaRot
    symmetric_signed       s = c max|x| / 2^(b-1)                              ZeroQuant; +max|x| is clipped
    symmetric_full         s = 2 c max|x| / (2^b - 1)
    asymmetric             s = c (hi - lo) / (2^b - 1),    z = rne(-c lo / s)
    asymmetric_zeroquant   s = c (hi - lo) / 2^b,          z = rne(-c lo / s)  the same with ZeroQuant's divisor

and q = clip(rne(x / s) + z). ZeroQuant's asymmetric grids, as DeepSpeed has them, and asymmetric grids of groups (not
of a whole token), as QuaRot's code has them, take lo = min x and hi = max x as they are: values far from zero keep
their resolution, and the zero may lie outside the codes. A token's result depends on no other token.

QuaRot, arXiv:2404.00456, section 4; SmoothQuant, arXiv:2211.10438; ZeroQuant, arXiv:2206.01861.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.activations.base import ActivationMethod, ActivationQuantizer, check_bits, check_clip, check_groups
from jquant.errors import FormatError
from jquant.formats import UniformActivation
from jquant.numerics import Grid, encode, expand, fit_grid, safe_scale
from jquant.types import compute_dtype

type TokenGrid = Literal["symmetric", "symmetric_signed", "symmetric_full", "asymmetric", "asymmetric_zeroquant"]

# A range narrower than this share of its magnitude takes zero in: its codes would drown in rounding.
_NARROW: Final = 2.0**-12


@final
@dataclass(frozen=True)
class PerToken(ActivationMethod):
    """Rounds each token to nearest on its own grid.

    Attributes:
      bits: bits of one code, 2 to 8.
      symmetry: which grid; "symmetric_signed" and "asymmetric_zeroquant" are ZeroQuant's, which divide by powers of 2.
      clip_ratio: share of the range that the grid covers; what lies outside is clipped.
      group_size: neighbouring features that share a grid; None for one grid for the whole token.

    Example:
      >>> x = jnp.array([[0.1, -0.7, 1.4, 3.2, -2.0, 0.05, 0.9, -1.1]])
      >>> PerToken(bits=4, clip_ratio=0.9).fit(None)(x, None).codes.tolist()
      [[0, -2, 3, 7, -5, 0, 2, -3]]
    """

    bits: int = 8
    symmetry: TokenGrid = "symmetric"
    clip_ratio: float = 1.0
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Refuses settings that no grid has."""
        check_bits(self.bits)
        check_clip(self.clip_ratio)
        if self.group_size is not None and self.group_size < 1:
            raise FormatError(
                f"group_size={self.group_size}: give a positive size, or null for one grid for each token"
            )

    def needs_absmax(self) -> bool:
        """Tells that nothing is calibrated."""
        return False

    def check(self, features: int) -> None:
        """Raises FormatError if the group size does not divide the features."""
        check_groups(features, self.group_size)

    def fit(self, absmax: Float[Array, "features"] | None) -> "TokenQuantizer":
        """Returns the node; it has no arrays."""
        del absmax
        return TokenQuantizer(self)


@final
@struct.dataclass
class TokenQuantizer(ActivationQuantizer):
    """Quantizes each token by its own range."""

    method: PerToken = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> UniformActivation:
        """Rounds; a token of zeros gives zeros."""
        del valid
        bits, size = self.method.bits, self.method.group_size or x.shape[-1]
        groups = x.astype(compute_dtype(x.dtype)).reshape(*x.shape[:-1], x.shape[-1] // size, size)
        grid = self._fit(groups)
        codes = encode(groups, expand(grid, -1), bits).reshape(x.shape).astype(jnp.int16) - 2 ** (bits - 1)
        zeros = grid.zeros - 2 ** (bits - 1) if self.method.symmetry.startswith("asymmetric") else None
        return UniformActivation(codes.astype(jnp.int8), grid.scales, zeros, str(x.dtype))

    def _fit(self, groups: Float[Array, "*batch groups size"]) -> Grid:
        low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
        bits, symmetry, clip = self.method.bits, self.method.symmetry, self.method.clip_ratio
        as_it_is = symmetry == "asymmetric_zeroquant" or (
            symmetry == "asymmetric" and self.method.group_size is not None
        )
        narrow = high - low < _NARROW * jnp.maximum(jnp.abs(low), jnp.abs(high)) if as_it_is else True
        low, high = jnp.where(narrow, jnp.minimum(low, 0), low), jnp.where(narrow, jnp.maximum(high, 0), high)
        if symmetry != "asymmetric_zeroquant":
            return fit_grid(clip * low, clip * high, bits, symmetry)
        low, high = safe_scale(clip * low, clip * high, bits)
        scales = (high - low) / 2**bits
        return Grid(scales, jnp.round(-low / scales))
