"""Compiles roundings to fewer bits and back for an H100 without one and tells what is left of them: test_stored.py."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jquant.kv.float8 import to_float8
from jquant.kv.kvquant import normalize_values
from jquant.numerics import Grid, as_stored, cast_scales, fit_offset_grid
from tests.kernels.compiled import H100

HALVES = {"float16": "f16", "bfloat16": "bf16"}
ROUNDED: dict[str, Callable[[Any, str], Any]] = {  # of numbers [64, 64]
    "as_stored": as_stored,
    "cast_scales": lambda x, dtype: cast_scales(Grid(x, x), dtype).scales,
    "lows": lambda x, dtype: fit_offset_grid(x, 4, dtype).lows.astype(jnp.float32),
    "middles": lambda x, dtype: normalize_values(x[:, None], 0.0, dtype).middles,
}


def left(rounded: Callable[[Any], Any], name: str) -> list[int]:
    """Return how many conversions to a dtype, by XLA's name, a program has, and how many to float32."""
    described = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(described, (1,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=whole)
    traced = jax.jit(lambda x: rounded(3 * x) + 1).trace(given)
    program = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    return [len(re.findall(rf"= {kind}\[[\d,]+\]\S* convert\(", program)) for kind in (name, "f32")]


def main() -> None:
    """Write a line of JSON: for each rounding whether the program still converts, and back."""
    found = {
        f"{name} {dtype}": left(lambda x, rounded=rounded, dtype=dtype: rounded(x, dtype), kind)
        for name, rounded in ROUNDED.items()
        for dtype, kind in HALVES.items()
    }
    found["to_float8"] = left(lambda x: to_float8(x, jnp.float32(2)).astype(jnp.float32), "f8e4m3fn")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
