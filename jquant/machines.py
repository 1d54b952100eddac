"""What a model may be prepared for, and what a `--target` means on this machine."""

import enum
import importlib.util
from collections.abc import Mapping
from typing import Final, Literal

import jax
import jax.numpy as jnp

from jquant.errors import RecipeError
from jquant.formats import Layout, hopper_card
from jquant.models import PromptAttention
from jquant.types import DType

type TargetName = Literal["auto", "reference", "h100", "h200", "h100+tokamax", "h200+tokamax"]


class Target(enum.Enum):
    """What a model is prepared for.

    Attributes:
      REFERENCE: any machine, through XLA; nothing is rewritten.
      H100: kernels for Hopper GPUs; prompts attend by cuDNN.
      H200: the same.
      H100_TOKAMAX: as H100, but prompts attend by tokamax's kernel, of the extra `jquant[tokamax]`.
      H200_TOKAMAX: the same.
      SIMULATED: as H100 in Pallas' interpreter on a CPU, for tests: slow, and on few cores it waits for ever where XLA
        runs two kernels at once, as those of queries and keys.
    """

    REFERENCE = "reference"
    H100 = "h100"
    H200 = "h200"
    H100_TOKAMAX = "h100+tokamax"
    H200_TOKAMAX = "h200+tokamax"
    SIMULATED = "simulated"

    @property
    def layout(self) -> Layout:
        """How weights and caches lie there.

        >>> Target.H100.layout, Target.REFERENCE.layout
        (<Layout.HOPPER: 'hopper'>, <Layout.PORTABLE: 'portable'>)
        """
        return _LAYOUTS[self]

    @property
    def prompts(self) -> PromptAttention | None:
        """What attends to prompts there, where it takes them; None for the model itself.

        >>> Target.H100.prompts, Target.H200_TOKAMAX.prompts, Target.REFERENCE.prompts
        ('cudnn', 'tokamax', None)
        """
        return _PROMPTS[self]


_LAYOUTS: Final[Mapping[Target, Layout]] = {
    Target.REFERENCE: Layout.PORTABLE,
    Target.H100: Layout.HOPPER,
    Target.H200: Layout.HOPPER,
    Target.H100_TOKAMAX: Layout.HOPPER,
    Target.H200_TOKAMAX: Layout.HOPPER,
    Target.SIMULATED: Layout.SIMULATED,
}
_PROMPTS: Final[Mapping[Target, PromptAttention | None]] = {
    Target.REFERENCE: None,
    Target.H100: "cudnn",
    Target.H200: "cudnn",
    Target.H100_TOKAMAX: "tokamax",
    Target.H200_TOKAMAX: "tokamax",
    Target.SIMULATED: "xla",
}


def choose_target(name: TargetName, dtype: DType) -> Target:
    """Returns the target that a name means on this machine, for activations of a dtype: what every `--target` means.

    "auto" is the GPU's own target where the first device is an H100 or H200 and activations are bfloat16, in which the
    kernels compute; otherwise the reference, so that nothing is computed more coarsely than was asked for. Naming a
    GPU takes its kernels for activations of any dtype.

    Args:
      name: what the command line was given.
      dtype: of the embedding table, and so of the activations.

    Raises:
      RecipeError: a GPU is named that this machine does not have, or tokamax, which is not installed.

    Example:
      >>> choose_target("auto", jnp.float32)
      <Target.REFERENCE: 'reference'>
    """
    kind = jax.devices()[0].device_kind
    card = hopper_card(kind)
    if name == "reference" or (name == "auto" and (card is None or jnp.dtype(dtype) != jnp.bfloat16)):
        return Target.REFERENCE
    if card is None:
        raise RecipeError(f"--target {name}: this machine has {kind}, no H100 or H200; give auto or reference")
    target = Target(card.lower() if name == "auto" else name)
    if target.prompts == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise RecipeError(f"--target {name}: tokamax is not installed; run pip install 'jquant[tokamax]', or give auto")
    return target
