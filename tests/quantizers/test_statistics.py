"""Sums of x x^T: exact products of 16-bit numbers, and which of them a GPU's tensor cores are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantizers import HESSIAN
from jquant.quantizers.statistics import gram


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_those_of_float64(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 24)), dtype)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(gram(x), wide.T @ wide, rtol=0, atol=64 * 100 * 2**-24)  # 64 sums below 100


@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_a_gpu_multiplies_numbers_as_they_are(dtype: str, products: str) -> None:
    """No float32 copy of bfloat16 for the tensor cores; no tensor cores for float32, which they would round."""
    update = jax.jit(lambda x: HESSIAN.update(HESSIAN.init(24), x))
    lowered = update.trace(jax.ShapeDtypeStruct((64, 24), dtype)).lower(lowering_platforms=("cuda",)).as_text()
    (product,) = (line for line in lowered.splitlines() if "dot_general" in line)
    assert f"tensor<24x64x{products}>" in product
    assert "tensor<24x24xf32>" in product
    assert ("HIGHEST" in product) == (dtype == "float32")
