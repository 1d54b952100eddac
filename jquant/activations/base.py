"""The contracts: a method is what a recipe chooses, a quantizer is the node that it becomes on one linear."""

import abc

from flax import struct
from jaxtyping import Array, Bool, Float

from jquant.errors import FormatError
from jquant.formats import QuantizedActivation


class ActivationMethod(abc.ABC):
    """How the input of linears is quantized. Final subclasses are frozen dataclasses of settings.

    Attributes:
      bits: bits of one code.
    """

    bits: int

    @abc.abstractmethod
    def needs_absmax(self) -> bool:
        """Tells whether `fit` reads what calibration saw."""

    @abc.abstractmethod
    def check(self, features: int) -> None:
        """Raises FormatError if an input of this many features cannot be quantized so; called before any work."""

    @abc.abstractmethod
    def fit(self, absmax: Float[Array, "features"] | None) -> "ActivationQuantizer":
        """Returns the node for one linear.

        Args:
          absmax: the largest magnitude of each feature over calibration text; None unless `needs_absmax`.
        """


class ActivationQuantizer(abc.ABC):
    """Quantizes the input of one linear. Final subclasses are `flax.struct` dataclasses: fitted arrays are leaves.

    Invariant, checked for every subclass by `tests/contracts/test_activations.py`: what tokens that are not valid
    hold changes the result of no other token.

    Attributes:
      method: the settings, static.
    """

    method: ActivationMethod = struct.field(pytree_node=False)

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch in"], valid: Bool[Array, "*batch"] | None) -> QuantizedActivation:
        """Quantizes an activation. Pure and jittable.

        Args:
          x: the linear's input.
          valid: which tokens are real; statistics that cross tokens leave the others out. None if all are.

        Returns:
          The integers and what brings them back.
        """


def check_groups(features: int, group_size: int | None) -> None:
    """Refuses groups that do not divide the features.

    Raises:
      FormatError: they do not; sizes that do are named.
    """
    if group_size is not None and features % group_size:
        near = [size for size in (8, 16, 32, 64, 96, 128) if features % size == 0]
        hint = f"; sizes that do: {', '.join(map(str, near))}" if near else ""
        raise FormatError(f"group_size {group_size} does not divide an input of {features} features{hint}")


def check_bits(bits: int, most: int = 8) -> None:
    """Refuses widths that no code here has.

    Raises:
      FormatError: the bits are not 2 to `most`.
    """
    if not 2 <= bits <= most:
        raise FormatError(f"bits={bits} for an activation: give 2 to {most}")


def check_clip(clip_ratio: float) -> None:
    """Refuses a share of the range that is none.

    Raises:
      FormatError: it is not above 0 and at most 1.
    """
    if not 0 < clip_ratio <= 1:
        raise FormatError(f"clip_ratio={clip_ratio}: give a share of the range, above 0 and at most 1")
