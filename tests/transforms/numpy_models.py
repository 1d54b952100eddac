"""Models of numpy arrays for tests of transforms: nothing is compiled to make them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.formats import UniformFormat
from jquant.models import Llama, LlamaConfig, build
from jquant.quantizers import Rtn


def numpy_model(config: LlamaConfig, dtype: str = "float64") -> Llama:
    """Return a model whose every array matters: scales other than one, biases, an embedding whose rows have means."""
    source = np.random.default_rng(11)

    def make(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = source.standard_normal(shape)
        if path.endswith("kernel"):
            values = noise / np.sqrt(shape[0])
        else:
            values = 0.3 + 0.3 * noise if path == "embed_tokens" or path.endswith("bias") else 1 + 0.2 * noise
        return values.astype(dtype)

    return build(config, make)


def arrays_of(model: Llama) -> dict[str, np.ndarray]:
    """Return path -> array."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def packed_kernel(inputs: int, outputs: int) -> Any:
    """Return an abstract packed kernel."""
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    return jax.eval_shape(lambda weight: Rtn(UniformFormat(4, None))(weight, None, jax.random.key(0))[0], kernel)
