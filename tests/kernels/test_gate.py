"""The gate of an MLP by one kernel, simulated, against its meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, reference
from pallas_kernels.gate import apply_gate, gate_fault

RNG = np.random.default_rng(0)


def products(rows: int, numbers: int) -> jax.Array:
    """Returns gates and ups, some of the gates so large that exp(-gate) or silu's other end is reached."""
    joined = 4 * RNG.standard_normal((rows, 2 * numbers))
    joined[:, :8] = [0, 1, -1, 88, -88, 100, -100, 300]
    return jnp.asarray(joined, jnp.bfloat16)


@pytest.mark.parametrize(("rows", "numbers"), [(1, 2048), (3, 1024)])
def test_the_gate_is_rounded_as_the_portable_path_rounds_it(rows: int, numbers: int) -> None:
    joined = products(rows, numbers)
    found = apply_gate(joined, simulate=compat.Simulation(detect_races=True))
    assert not compat.races_found()
    np.testing.assert_array_equal(found, reference.apply_gate(joined))
    gate, up = jnp.split(joined, 2, axis=1)
    np.testing.assert_array_equal(found, jax.nn.silu(gate) * up)


def test_the_meaning_is_within_its_roundings_of_float64() -> None:
    """Five roundings to bfloat16, each by 2^-8 at most; that of 1 + exp(-gate) tells on gates below 0 too."""
    joined = 4 * RNG.standard_normal((4, 2048))
    joined = jnp.asarray(joined, jnp.bfloat16)
    gate, up = np.split(np.asarray(joined, np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(np.asarray(reference.apply_gate(joined), np.float64), expected, rtol=5.05 * 2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_the_gate_on_a_gpu_is_the_reference_s(rows: int) -> None:
    """Its exp and division are approximations: exp, the sum or the share may round to the neighbour."""
    joined = products(rows, 14336)
    following = jnp.zeros((4096, 14336), jnp.int4)
    expected = np.asarray(reference.apply_gate(jax.device_put(joined, jax.devices("cpu")[0])), np.float32)
    for ahead in (None, following):
        found = np.asarray(apply_gate(joined, ahead=ahead), np.float32)
        np.testing.assert_allclose(found, expected, rtol=3 * 2**-7)


@pytest.mark.parametrize("rows", [1, 16, 65])
def test_the_kernel_lowers_to_cuda(rows: int) -> None:
    """With blocks that ask for codes beside few rows, and without beside many."""
    exported = jax.export.export(
        jax.jit(lambda joined, codes: apply_gate(joined, ahead=codes)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(jax.ShapeDtypeStruct((rows, 28672), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 14336), jnp.int4))
    text = exported.mlir_module()
    assert text.count("@mosaic_gpu_v2") == 1
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
    assert call.count("xi4>") == (rows <= 64)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 1536 numbers, the kernel takes multiples of 1024; let XLA"):
        apply_gate(jnp.zeros((1, 3072), jnp.bfloat16))
    assert gate_fault(1024, jnp.float32) == "float32 rows, the kernel takes bfloat16"
