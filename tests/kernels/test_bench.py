"""What the benchmark compares: XLA's formulations mean the same, targets are judged; on a GPU, the kernels' results."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, configs, targets
from pallas_kernels.cases import Case, random_legal_cases, relative_error
from pallas_kernels.rotation_case import RotationCase

MEASURED = [
    Case(row.kind, min(row.most, 2048), row.outputs, row.inputs, row.inputs // 128 if row.kind == "w4a16" else 1)
    for row in configs.table(configs.card_of(jax.devices()[0].device_kind))
]


@pytest.mark.parametrize(
    "case",
    [Case("w4a16", 64, 64, 128, 2), Case("w4a8", 3, 64, 128, 1)],
    ids=["int4", "int8"],
)
def test_formulations_of_xla_mean_the_product(case: Case) -> None:
    given = case.operands(0)
    for function, arguments in case.xla().values():
        assert relative_error(function(*arguments(given)), case.meaning(given)) < bench.BF16_ROUNDING


def test_targets_are_judged() -> None:
    case = Case("w4a16", 16, 8192, 8192, 64)
    row = {"rate": 2400.0, "of_peak": 0.8, "over_bf16": 2.5, "over_best_xla": 2.0}
    assert targets.verdict(case, row) == {"target": "missed: over_bf16 2.50 < 3.0"}
    assert targets.verdict(case, row | {"over_bf16": 3.1}) == {"target": "met"}
    assert targets.verdict(case, {"errors": [1e-3, 1e-3]}) == {"target": "right"}


WITH_ZEROS = [  # blocks of 64 outputs and of 128
    Case("w4a16", tokens, *shape, zeros=True)
    for tokens in (1, 16, 17, 64, 100)
    for shape in ((1536, 576, 9), (4096, 4096, 32), (1024, 512, 16))
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*MEASURED, *WITH_ZEROS, *random_legal_cases(0, 20)], ids=str)
def test_kernel_is_the_product_with_the_same_bits_twice(case: Case) -> None:
    kernel = jax.jit(case.kernel(case.config()))
    for seed in range(2):
        given = case.operands(seed)
        arguments = given.x, given.steps, given.shift, case.prepare(given)
        found = kernel(*arguments)
        assert relative_error(found, case.meaning(given)) < bench.BF16_ROUNDING
        assert bool(jnp.all(found == kernel(*arguments)))


def test_the_rotation_of_xla_has_the_codes_of_float32() -> None:
    case = RotationCase(3, 1536, 12)
    found = case.differences(jax.jit(case.xla()), case.operands(0))
    assert found.right()
    assert not found._replace(most=2.0).right()
