"""Compiles a rounding to fewer bits and back for an H100 without one and tells what is left of it: test_stored.py."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jquant.numerics import as_stored
from tests.kernels.compiled import H100


def main() -> None:
    """Write a line of JSON: for each dtype whether the program still converts from it."""
    described = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(described, (1,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=whole)
    found = {}
    for dtype, name in (("float16", "f16"), ("bfloat16", "bf16")):
        rounded = jax.jit(lambda x, dtype=dtype: as_stored(3 * x, dtype) + 1)
        program = rounded.trace(given).lower(lowering_platforms=("cuda",)).compile().as_text()
        lines = [line for line in program.splitlines() if " convert(" in line]
        found[dtype] = [sum(f"= {kind}[4096]" in line for line in lines) for kind in (name, "f32")]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
