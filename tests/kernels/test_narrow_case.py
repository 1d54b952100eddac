"""Products with narrow weights: XLA's formulation means the same, kernels lower to CUDA, on a GPU they are right."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import configs
from pallas_kernels.cases import relative_error
from pallas_kernels.narrow_case import KINDS, NarrowCase, narrow_cases

BF16_ROUNDING = 2.0**-8  # relative, of operands and output
FEW = list(narrow_cases(KINDS, [(1024, 4096)], [1]))
MOST = [case for kind in KINDS for case in narrow_cases((kind,), [(1024, 4096)], [configs.most_tokens(kind)])]
LARGE = [*narrow_cases(("binary4", "binary3"), [(7168, 28672)], [1]), *narrow_cases(("spqr3",), [(8192, 8192)], [1])]


@pytest.mark.parametrize("kind", ["binary3", "spqr3"])
def test_the_formulation_of_xla_means_the_product(kind: configs.NarrowKind) -> None:
    case = NarrowCase(kind, 2, 64, 256, 16 if kind == "spqr3" else 2)
    given = case.operands(0)
    function, arguments = case.xla()["bfloat16"]
    assert relative_error(function(*arguments(given)), case.meaning(given)) < BF16_ROUNDING


@pytest.mark.parametrize("kind", ["binary2", "binary3", "spqr3"])
def test_kernels_lower_to_cuda(kind: configs.NarrowKind) -> None:
    case = next(narrow_cases((kind,), [(64, 2048)], [2]))
    given = jax.eval_shape(lambda: case.operands(0))
    weight = jax.eval_shape(case.prepare, given)
    traced = jax.jit(case.kernel(case.config())).trace(given.x, given.steps, given.shift, weight)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*FEW, *MOST, *LARGE], ids=str)
def test_kernel_is_the_product_with_the_same_bits_twice(case: NarrowCase) -> None:
    kernel = jax.jit(case.kernel(case.config()))
    for seed in range(2):
        given = case.operands(seed)
        arguments = given.x, given.steps, given.shift, case.prepare(given)
        found = kernel(*arguments)
        assert relative_error(found, case.meaning(given)) < BF16_ROUNDING
        assert bool(jnp.all(found == kernel(*arguments)))
