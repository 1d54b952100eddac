"""jquant: quantize large language models after training, in JAX.

The names below are the public surface; each is loaded when it is first used, so that `import jquant` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jquant.checkpoint import load_model as load_model
    from jquant.checkpoint import save_model as save_model
    from jquant.formats import UniformFormat as UniformFormat
    from jquant.machines import Target as Target
    from jquant.models import forward as forward
    from jquant.models import stack_layers as stack_layers
    from jquant.pipeline import quantize as quantize
    from jquant.quantizers import Gptq as Gptq
    from jquant.quantizers import Rtn as Rtn
    from jquant.recipe import Recipe as Recipe
    from jquant.recipe import load_recipe as load_recipe
    from jquant.runtime import generate as generate
    from jquant.sampling import Sampler as Sampler
    from jquant.targets import prepare as prepare

_HOMES: Final = {
    "load_model": "jquant.checkpoint",
    "save_model": "jquant.checkpoint",
    "UniformFormat": "jquant.formats",
    "Target": "jquant.machines",
    "forward": "jquant.models",
    "stack_layers": "jquant.models",
    "quantize": "jquant.pipeline",
    "Gptq": "jquant.quantizers",
    "Rtn": "jquant.quantizers",
    "Recipe": "jquant.recipe",
    "load_recipe": "jquant.recipe",
    "generate": "jquant.runtime",
    "Sampler": "jquant.sampling",
    "prepare": "jquant.targets",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Returns the public names."""
    return __all__
