"""The choice of kernels: the table's configurations, and the rule's for odd shapes, lower to CUDA without a GPU."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import configs, shapes
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.matmul import integer_matmul, w4a16_matmul
from pallas_kernels.weights import FloatWeight, IntegerWeight

CARDS: tuple[configs.Card, ...] = ("H100", "H200")
ROWS = {dataclasses.replace(row, microseconds=0.0): None for card in CARDS for row in configs.table(card)}  # once each
ODD = (  # kind, tokens, outputs, inputs, group: what the rule chooses where the table has no row
    ("w4a16", 5, 576, 576, 64),
    ("w4a16", 64, 4096, 14336, 32),
    ("w4a16", 100, 1536, 576, 32),
    ("w4a8", 64, 1024, 4096, 64),
    ("w8a8", 1, 576, 1536, 1536),
)


def lowered(
    kind: configs.Kind, tokens: int, outputs: int, inputs: int, group: int, config: configs.Config | None = None
) -> str:
    struct = jax.ShapeDtypeStruct
    wide = (inputs // group, outputs)
    if kind == "w4a16":
        grid = struct(wide, jnp.bfloat16)
        weight = FloatWeight(struct((outputs, inputs), jnp.int4), grid, grid)
        product = functools.partial(w4a16_matmul, config=config)
        traced = jax.jit(product).trace(struct((tokens, inputs), jnp.bfloat16), weight)
    else:
        codes = struct((outputs, inputs), jnp.int4 if kind == "w4a8" else jnp.int8)
        sums, of_tokens = struct((outputs,), jnp.float32), struct((tokens,), jnp.float32)
        grid = struct(wide, jnp.float32)
        integers = IntegerWeight(codes, grid, sums, grid if kind == "w8a8" else None)
        x = struct((tokens, inputs), jnp.int8)
        traced = jax.jit(functools.partial(integer_matmul, config=config)).trace(x, of_tokens, of_tokens, integers)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("card", CARDS)
def test_rows_of_the_table_are_chosen(card: configs.Card) -> None:
    for row in configs.table(card):
        groups = row.inputs // 128 if row.kind == "w4a16" else 1
        for tokens in (row.least, min(row.most, 2048)):
            assert configs.choose(row.kind, tokens, row.outputs, row.inputs, groups, card) is row.config


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind} {row.most} {row.outputs}x{row.inputs}")
def test_rows_of_the_tables_lower_to_cuda(row: configs.Row) -> None:
    most, group = min(row.most, 2048), 128 if row.kind == "w4a16" else row.inputs
    assert "mosaic_gpu" in lowered(row.kind, most, row.outputs, row.inputs, group, row.config)


@pytest.mark.parametrize("case", ODD, ids=lambda case: f"{case[0]} {case[1]} {case[2]}x{case[3]} g{case[4]}")
def test_odd_shapes_lower_to_cuda(case: tuple[configs.Kind, int, int, int, int]) -> None:
    assert "mosaic_gpu" in lowered(*case)


def test_every_named_shape_has_a_configuration() -> None:
    for linear in (*shapes.LLAMA_8B, *shapes.LLAMA_70B, *shapes.LUT_GEMM, *shapes.SMALL):
        group = 128 if linear.inputs % 128 == 0 else 64
        for tokens in shapes.TOKENS:
            for kind, groups in (("w4a16", linear.inputs // group), ("w4a8", 1), ("w8a8", 1)):
                found = configs.candidates(kind, tokens, linear.outputs, linear.inputs, groups)
                assert found[0] == configs.choose(kind, tokens, linear.outputs, linear.inputs, groups)
                assert not any(config.fault(linear.outputs, linear.inputs, groups) for config in found)


def test_the_rule_takes_the_instruction_that_was_fastest_on_each_card() -> None:
    for tokens, outputs, inputs, expected in (
        (1, 10240, 8192, (512, 2, 2, 1)),  # depth, stages, warpgroups, splits
        (16, 10240, 8192, (256, 2, 2, 1)),
        (1, 4096, 11008, (128, 4, 1, 2)),
        (1, 4096, 8192, (256, 4, 2, 2)),
        (16, 13824, 5120, (512, 2, 1, 1)),
    ):
        found = configs.choose("w4a16", tokens, outputs, inputs, inputs // 128, "H100")
        assert isinstance(found, DecodeConfig)
        assert (found.depth, found.stages, found.warpgroups, found.splits) == expected
        assert (found.instruction, found.cluster) == ("warp", found.splits > 1)
        other = configs.choose("w4a16", tokens, outputs, inputs, inputs // 128, "H200")
        assert isinstance(other, DecodeConfig)
        assert other.instruction == "warpgroup"  # of warps nothing was measured there


def test_measured_rows_replace_those_of_the_table() -> None:
    table = configs.table("H200")
    row = dataclasses.replace(table[0], microseconds=1.5)
    text = json.loads(configs.merged("NVIDIA H200", "day", [row]))
    assert len(text["rows"]) == len(table)
    assert [line["microseconds"] for line in text["rows"]].count(1.5) == 1


@pytest.mark.parametrize("kind", ["w4a16", "w4a8", "w8a8"])
def test_a_weight_has_a_kernel_for_every_number_of_tokens_or_a_fault(kind: configs.Kind) -> None:
    for groups in (1, 2, 3, 6, 12):
        for outputs, inputs in ((64, 192), (192, 384), (576, 576), (96, 384), (320, 1152), (64, 200)):
            found = configs.fault(kind, outputs, inputs, groups)
            for tokens in (1, 16, 17, 64, 65, 500) if found is None else ():
                assert configs.choose(kind, tokens, outputs, inputs, groups).fault(outputs, inputs, groups) is None
            if found is not None:
                with pytest.raises(ValueError, match=f"no {kind} kernel multiplies"):
                    configs.choose(kind, 65, outputs, inputs, groups)
