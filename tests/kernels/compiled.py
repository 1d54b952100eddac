"""Compiles kernels for an H100 without one, and writes the registers and bytes spilled of each, for test_registers.py.

XLA's plugin for CUDA compiles for a GPU that is described; `ptxas` reports what it did.
"""

import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jquant.numerics import base_matrix, base_order
from pallas_kernels import (
    Coding,
    FloatWeight,
    PackedCache,
    Undivided,
    append_attention,
    append_token,
    choose_attention,
    configs,
    w4a16_matmul_gated,
    w4a16_matmul_onto,
    w4a16_matmul_undivided,
)
from pallas_kernels.attention_case import AttentionCase
from pallas_kernels.cases import Case
from pallas_kernels.hadamard import rotate_quantize
from pallas_kernels.kivi_case import KiviCase
from pallas_kernels.kronecker import prepare_rotation
from pallas_kernels.narrow_case import KINDS, NarrowCase, narrow_cases
from pallas_kernels.norm import add_norm

SPQR_SHAPES = ((7168, 28672, 1792), (12288, 49152, 3072), (4096, 4096, 256))
DUMP = Path(os.environ["MOSAIC_GPU_DUMP_TO"])  # read by Mosaic GPU, which writes what `ptxas` says
# What XLA wants to know, of NVIDIA's data sheet and `cudaGetDeviceProperties`
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def programs() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield name, function and arguments of the table's rows and of each other kernel."""
    seen = set()
    for card in configs.TABLES:
        for row in configs.table(card):
            groups = row.inputs // 128 if row.kind == "w4a16" else 1
            case = Case(row.kind, min(row.most, 2048), row.outputs, row.inputs, groups)
            if (case.kind, case.tokens, row.config) not in seen:
                seen.add((case.kind, case.tokens, row.config))
                yield f"{case} {row.config}", case.kernel(row.config), _arguments(case)
    for kind in KINDS:
        for tokens in (1, configs.most_tokens(kind)):
            narrow = next(narrow_cases((kind,), [(8192, 8192)], [tokens]))
            yield str(narrow), narrow.kernel(narrow.config()), _arguments(narrow)
    yield from _of_rules()
    for order in (14336, 576):
        rotation = jax.eval_shape(lambda order=order: prepare_rotation(base_matrix(base_order(order)), order))
        chosen = configs.choose_rotation(*(matrix.shape[0] for matrix in rotation))

        def turn(x: Any, *matrices: Any, order: int = order, config: Any = chosen) -> Any:
            return rotate_quantize(x, *matrices, order=order, config=config)

        yield f"rotation {order}", turn, (jax.ShapeDtypeStruct((64, order), jnp.bfloat16), *rotation)
    coded = [AttentionCase("kv4", *shape) for shape in ((16, 32, 8, 128, 8192), (1, 32, 8, 128, 32768))]
    exact = AttentionCase("kv16", 16, 32, 8, 128, 8192, grid="none")
    for attention in (*coded, exact, *(KiviCase(2, 16, 32, 8, 128, 32768, group=group) for group in (32, 128))):
        given = jax.eval_shape(lambda attention=attention: attention.operands(0))
        yield f"{attention} {attention.config()}", attention.kernel(attention.config()), given
    yield from _between_products()
    yield from _gated()


def _of_rules() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield what rules choose beside the tables: zeros, one group an output, groups of 32, clusters, copies of 512."""
    few = [Case("w4a16", tokens, 8192, 8192, 64, zeros=True) for tokens in (8, 16)]
    few += [Case("w4a16", tokens, *shape) for tokens in (8, 16) for shape in ((10240, 8192, 64), (8192, 8192, 1))]
    few += [Case("w4a16", 16, 13824, 5120, 160, zeros=True), Case("w4a16", 16, 1024, 4096, 32)]
    few += [NarrowCase("spqr3", tokens, *shape) for tokens in (1, 2) for shape in SPQR_SHAPES]
    for case in (*few, NarrowCase("binary3", 1, 12288, 49152, 384)):
        yield f"{case} {case.config()}", case.kernel(case.config()), _arguments(case)


def _between_products() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield our own kernels that a step of Llama-3.1-8B has between its products, and the products that norm."""

    def shaped(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    for bits, heads, coding in ((4, 32, Coding()), (8, 64, Coding("zero", 0.95, "hadamard")), (16, 32, Coding())):
        config = choose_attention(bits, 16, 8, 128, 8192)
        codes = shaped(jnp.bfloat16 if bits == 16 else jnp.uint8, 16, 8, 8192, 16 * bits if bits < 16 else 128)
        cache = PackedCache(codes, codes, None if bits == 16 else shaped(jnp.float16, 16, 8, 8192, 4))
        token = shaped(jnp.bfloat16, 16, (heads + 16) * 128), shaped(jnp.float32, 16, 128), shaped(jnp.int32, 16)
        attend = functools.partial(append_attention, capacity=8192, coding=coding, config=config)
        yield f"append and attend {bits}", attend, (*token, cache)

    def append(projected: Any, angles: Any, positions: Any, cache: PackedCache) -> Any:
        return append_token(projected, angles, positions, cache, coding=Coding())

    for rows in (1, 16):
        given = shaped(jnp.float32, rows, 4096), shaped(jnp.bfloat16, rows, 4096), shaped(jnp.bfloat16, 4096)
        yield f"norm {rows}", functools.partial(add_norm, eps=1e-5), given
        keys, grids = shaped(jnp.uint8, rows, 8, 2176, 64), shaped(jnp.float16, rows, 8, 2176, 4)
        token = shaped(jnp.bfloat16, rows, 6144), shaped(jnp.float32, rows, 128), shaped(jnp.int32, rows)
        yield f"append {rows}", append, (*token, PackedCache(keys, keys, grids))
        for outputs, inputs in ((4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096)):
            codes, scales = shaped(jnp.int4, outputs, inputs), shaped(jnp.float16, inputs // 128, outputs)
            x, weight = shaped(jnp.bfloat16, rows, inputs), FloatWeight(codes, scales, None)
            if outputs == 4096:
                stream = shaped(jnp.float32, rows, outputs), shaped(jnp.bfloat16, outputs)
                yield f"{outputs} x {inputs} onto {rows}", w4a16_matmul_onto, (x, weight, *stream)
            else:
                norm = Undivided(x, shaped(jnp.float32, 64, 8 * -(-rows // 8)))
                yield (
                    f"{outputs} x {inputs} undivided {rows}",
                    functools.partial(w4a16_matmul_undivided, eps=1e-5),
                    (norm, weight),
                )


def _gated() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield products that end with a gate: of Llama-3.1-8B's and 70B's weights, zeros, groups of 64, of a cluster."""
    shapes = ((28672, 4096), (57344, 8192), (3072, 576), (4096, 4096))
    for (outputs, inputs), tokens, zeros in itertools.product(shapes, (1, 5, 16), (False, True)):
        grids = jax.ShapeDtypeStruct((inputs // (64 if zeros or inputs % 128 else 128), outputs), jnp.bfloat16)
        codes, x = (
            jax.ShapeDtypeStruct(*each) for each in (((outputs, inputs), jnp.int4), ((tokens, inputs), jnp.bfloat16))
        )
        squares = jax.ShapeDtypeStruct((64, 8 * -(-tokens // 8)), jnp.float32)
        given = Undivided(x, squares), FloatWeight(codes, grids, grids if zeros else None)
        name = f"{outputs} x {inputs} gated {tokens}{' with zeros' * zeros}"
        yield name, functools.partial(w4a16_matmul_gated, eps=1e-5), given


def _arguments(case: Any) -> tuple[Any, ...]:
    given = jax.eval_shape(lambda: case.operands(0))
    return given.x, given.steps, given.shift, jax.eval_shape(case.prepare, given)


def main() -> None:
    """Write a line of JSON for each program: its name, and [registers, bytes stored by spills] of its kernels."""
    described = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1")
    mesh = topologies.make_mesh(described, (1,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name, function, arguments in programs():
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            jax.jit(function).trace(*given).lower().compile()
        reports = [path.read_text(encoding="utf-8") for path in DUMP.glob("*.ptxas")]
        found = []
        for report in reports:
            registers, spilled = (re.search(each, report) for each in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
            assert registers, report
            assert spilled, report
            found.append([int(registers[1]), int(spilled[1])])
        for path in DUMP.iterdir():
            path.unlink()
        sys.stdout.write(json.dumps({"name": name, "kernels": found}) + "\n")


if __name__ == "__main__":
    main()
