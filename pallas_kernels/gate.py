"""The gate of a feed-forward layer, in the kernel of its product: of a weight that holds the gate's outputs, then up's.

    y[m, n] = silu(p[m, n]) * p[m, half + n],    silu(p) = p / (1 + exp(-p)),    p the product, 2 * half of a token

A block multiplies 64 outputs of the gate and the same 64 of up. Both numbers of a pair then lie with one thread, which
makes one of them: nothing is rounded before, and half as much is stored.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat


def gated(product: Any) -> Any:
    """Returns silu(gate) * up of a product [outputs, tokens] whose first half of the outputs is the gate's.

    >>> gated(jnp.array([[0.0, 50.0], [3.0, 4.0]])).tolist()
    [[0.0, 200.0]]
    """
    half = product.shape[0] // 2
    opening, up = product[:half], product[half:]
    return opening * jax.lax.logistic(opening) * up


def load_rows(numbers: Any) -> Any:
    """Loads a number of each row from a reference: [rows], or [2, rows / 2], the gate's before up's."""
    if len(numbers.shape) == 1:
        return compat.load(numbers, compat.ROWS)
    return jnp.concatenate([compat.load(numbers.at[half], compat.ROWS) for half in range(numbers.shape[0])])
