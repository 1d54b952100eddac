r"""Attention of whole prompts in one run: the model's own by XLA, cuDNN's through JAX, tokamax's Mosaic kernel.

Kernel times by CUPTI, compiled anew for each shape; errors of the first row against float32 at the highest precision.

    pip install 'jquant[tokamax]'; python benchmarks/prompt_attention.py [--seconds 150]

Prints JSON lines, the most important shapes first; what is not begun when the time is over is said to be left out.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant.models.layers import attention, causal_mask
from jquant.models.prompts import causal_attention
from pallas_kernels.measure import kernel_microseconds


@dataclasses.dataclass(frozen=True)
class Shape:
    """Prompts of one length."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None


SHAPES: Final = (
    Shape(4, 2048, 32, 8, 128),  # Llama-3.1-8B
    Shape(1, 16384, 32, 8, 128),
    Shape(1, 16384, 32, 8, 128, window=4096),  # Mistral 7B v0.1
    Shape(4, 2048, 16, 8, 256),
    Shape(4, 2048, 9, 3, 64),  # SmolLM2-135M
    Shape(1, 1000, 32, 8, 128),
    Shape(4, 2048, 32, 8, 128, window=512),
    Shape(4, 2048, 32, 8, 96),
)


def main() -> None:
    """Times every shape by every attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="shapes that would begin later are left out")
    end = time.monotonic() + parser.parse_args().seconds
    show(device=jax.devices()[0].device_kind, jax=jax.__version__)
    for shape in SHAPES:
        if time.monotonic() > end:
            show(**dataclasses.asdict(shape), left_out=True)
            continue
        given = operands(shape)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(functools.partial(own, shape))(*(array[:1].astype(jnp.float32) for array in given))
        ways: dict[str, Callable[..., Any]] = {"own": functools.partial(own, shape)}
        for kernel in ("cudnn", "tokamax"):
            ways[kernel] = functools.partial(causal_attention, implementation=kernel, window=shape.window)
        for name, way in ways.items():
            begun = time.monotonic()
            call = jax.jit(way).lower(*given).compile()
            compiled = time.monotonic() - begun
            difference = call(*given)[:1].astype(jnp.float32) - exact
            error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))
            microseconds, kernels = kernel_microseconds(call, [given] * 2)
            figures = {
                "us": round(microseconds, 1),
                "kernels": kernels,
                "error": error,
                "compile_s": round(compiled, 1),
            }
            show(**dataclasses.asdict(shape), attention=name, **figures)


def operands(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns random queries, keys and values."""
    of_queries, of_keys, of_values = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(of_queries, (shape.rows, shape.tokens, shape.heads, shape.dim), jnp.bfloat16)
    stored = (shape.rows, shape.tokens, shape.kv_heads, shape.dim)
    keys, values = (jax.random.normal(key, stored, jnp.bfloat16) for key in (of_keys, of_values))
    return queries, keys, values


def own(shape: Shape, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the model's own attention."""
    positions = jnp.arange(shape.tokens)
    mask = causal_mask(positions, positions, shape.window)
    return attention(queries, keys, values, jnp.broadcast_to(mask[None], (queries.shape[0], *mask.shape)))


def show(**figures: Any) -> None:
    """Prints a line."""
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
