"""Rotation and quantization in one pass, simulated on the CPU with detection of races, against float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import base_matrix, base_order, hadamard_matrix
from pallas_kernels import compat, configs, reference
from pallas_kernels.hadamard import RotationConfig, Symmetry, rotate_quantize
from pallas_kernels.kronecker import Rotation, prepare_rotation, restore_rotation

ORDERS = (4096, 8192, 14336, 11008, 1536, 576)
ONE = np.ones((1, 1), np.int8)


def of_order(order: int) -> Rotation:
    return prepare_rotation(base_matrix(base_order(order)), order)


@pytest.mark.parametrize("order", [576, 1536])
def test_prepared_matrices_are_the_rotation(order: int) -> None:
    whole = np.asarray(restore_rotation(of_order(order), order))
    np.testing.assert_array_equal(whole, np.rint(hadamard_matrix(order) * np.sqrt(order)))


def test_a_stride_mixes_what_lies_apart() -> None:
    rotation = prepare_rotation(ONE, 4, stride=16)
    x = np.random.default_rng(0).standard_normal(64)
    mixed = hadamard_matrix(4) @ x.reshape(4, 16)
    np.testing.assert_allclose(np.asarray(restore_rotation(rotation, 64)) @ x / 2, mixed.reshape(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("order", "symmetry", "bits", "clip_ratio"),
    [(576, "symmetric", 8, 1.0), (1536, "asymmetric", 4, 0.9)],
    ids=["symmetric", "asymmetric 4 bits clipped"],
)
def test_codes_are_those_of_float32(order: int, symmetry: Symmetry, bits: int, clip_ratio: float) -> None:
    rotation, tokens = of_order(order), 3
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, order)), jnp.bfloat16).at[1].set(0)
    codes, scales, zeros = rotate_quantize(
        x,
        *rotation,
        order=order,
        bits=bits,
        clip_ratio=clip_ratio,
        symmetry=symmetry,
        config=RotationConfig(warpgroups=2, blocks=1),
        simulate=compat.Simulation(detect_races=True),
    )
    assert not compat.races_found()
    expected = reference.rotate_quantize(x, restore_rotation(rotation, order), order, bits, clip_ratio, symmetry)
    np.testing.assert_allclose(scales, expected[1], rtol=2**-8)  # bfloat16 between the two products
    off = codes.astype(jnp.float32) - expected[0].astype(jnp.float32)
    if zeros is not None and expected[2] is not None:
        np.testing.assert_allclose(zeros, expected[2], atol=1)
        off = off - (zeros - expected[2])[:, None]
    assert float(jnp.abs(off).max()) <= 1  # a number beside the middle of two codes
    assert float((off != 0).mean()) < 0.1
    assert not bool(off[1].any())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 12 times a power of two"):
        prepare_rotation(base_matrix(12), 100)
    with pytest.raises(ValueError, match="no kernel rotates 28672 numbers"):
        of_order(28672)
    with pytest.raises(ValueError, match="tokens of 100 numbers"):
        rotate_quantize(jnp.zeros((1, 100), jnp.bfloat16), *of_order(576), order=100, config=RotationConfig())


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_lowers_to_cuda(order: int) -> None:
    rotation = jax.eval_shape(lambda: of_order(order))
    config = configs.choose_rotation(*(matrix.shape[0] for matrix in rotation))
    kernel = functools.partial(rotate_quantize, order=order, config=config)
    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((5, order), jnp.bfloat16), *rotation)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("order", ORDERS)
def test_kernel_gives_the_codes_of_float32_twice(order: int, symmetry: Symmetry) -> None:
    rotation = of_order(order)
    config = configs.choose_rotation(*(matrix.shape[0] for matrix in rotation))
    kernel = jax.jit(functools.partial(rotate_quantize, order=order, symmetry=symmetry, config=config))
    for seed, tokens in enumerate((2048, 77)):
        x = jax.random.normal(jax.random.key(seed), (tokens, order), jnp.bfloat16)
        codes, scales, zeros = kernel(x, *rotation)
        expected = reference.rotate_quantize(x, restore_rotation(rotation, order), order, 8, 1.0, symmetry)
        shift = 0.0 if zeros is None or expected[2] is None else (zeros - expected[2])[:, None]
        off = codes.astype(jnp.float32) - expected[0].astype(jnp.float32) - shift
        assert float(jnp.abs(off).max()) <= 1
        assert float((off != 0).mean()) < 0.1
        np.testing.assert_allclose(scales, expected[1], rtol=2**-8)
        assert bool((codes == kernel(x, *rotation)[0]).all())
