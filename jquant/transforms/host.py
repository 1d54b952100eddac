"""What exact transforms share: float64 arithmetic on the host, and the refusal of packed weights.

Weights are rewritten in float64 numpy and cast once, back to the dtype they came in. Abstract arrays
(`jax.ShapeDtypeStruct`) stay as they are, so that a transform also tells the structure of its result without any work.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jquant.errors import FormatError
from jquant.formats import QuantizedTensor
from jquant.models import Llama, blocks, linears
from jquant.types import Leaf

type Operator = Callable[[Float[np.ndarray, "*batch n"]], Float[np.ndarray, "*batch n"]]  # float64, on the last axis

_CHUNK: Final = 2**24  # numbers in float64 at once: 128 MiB


def on_host(operator: Operator, array: Leaf) -> Leaf:
    """Applies an operator to the last axis of a vector or matrix in float64, some rows at a time.

    Args:
      operator: float64 arrays [..., n] to such arrays; rows must not depend on each other.
      array: [n] or [rows, n]; an abstract array is returned as it is.

    Returns:
      The result, in the dtype of `array`.

    Example:
      >>> on_host(lambda x: x[..., ::-1], jnp.arange(3.0)).tolist()
      [2.0, 1.0, 0.0]
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return array
    source = np.asarray(array)
    if source.ndim == 1:
        return jnp.asarray(operator(source.astype(np.float64)).astype(source.dtype))
    result = np.empty(source.shape, source.dtype)
    rows = max(1, _CHUNK // source.shape[1])
    for start in range(0, len(source), rows):
        result[start : start + rows] = operator(source[start : start + rows].astype(np.float64))
    return jnp.asarray(result)


def on_columns(operator: Operator, kernel: Leaf) -> Leaf:
    """Applies an operator to the input axis of a kernel [in, out]; see `on_host`."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return kernel
    columns: Any = np.asarray(kernel).T
    return on_host(operator, columns).T


def check_unquantized(model: Llama) -> None:
    """Refuses a model whose layers are stacked or whose linears are packed; abstract models will do.

    Raises:
      FormatError: the first such linear is named.
    """
    blocks(model)
    head = [] if model.lm_head is None else [("lm_head", model.lm_head)]
    for path, layer in [*linears(model), *head]:
        if isinstance(layer.kernel, QuantizedTensor):
            raise FormatError(
                f"{path} is already quantized ({type(layer.kernel).__name__}), and exact transforms rewrite float "
                "weights: put them before quantization"
            )
