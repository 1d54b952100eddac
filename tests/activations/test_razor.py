"""QRazor's activations: the reference's tensors, the oracle, and what each scope promises."""

from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import ActivationRazor
from jquant.activations.razor import Scope
from jquant.errors import FormatError
from jquant.formats import RazoredActivation
from tests.oracles import activations as oracle

RNG = np.random.default_rng(0)
X = (RNG.standard_t(4, (6, 48)) * RNG.uniform(0.1, 3.0, (6, 1))).astype(np.float32)

run = jax.jit(lambda quantizer, x, valid: quantizer(x, valid))


def razor(method: ActivationRazor, x: np.ndarray, valid: list[bool] | None = None) -> RazoredActivation:
    absmax = jnp.max(jnp.abs(jnp.asarray(x)), axis=0) if method.needs_absmax() else None
    mask = None if valid is None else jnp.asarray(valid)
    return run(method.fit(absmax), jnp.asarray(x), mask)


def test_reference_tensors(shared: Path) -> None:
    golden = np.load(shared / "golden" / "qrazor_sdr.npz")
    found = razor(ActivationRazor(bits=4), golden["x"])
    np.testing.assert_allclose(found.scales, golden["x_scale"][0], rtol=1e-6)
    np.testing.assert_allclose(found.dequantize(), golden["x_pertensor_sym16to4_g8"], rtol=1e-6)


@pytest.mark.parametrize("scope", get_args(Scope.__value__))
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_oracle(scope: Scope, bits: int) -> None:
    for fidelity in ("reference", "paper"):
        method = ActivationRazor(16, bits, 16, scope, fidelity)  # type: ignore[arg-type]
        expected = oracle.razored(X, 16, bits, 16, scope, fidelity=fidelity)
        np.testing.assert_allclose(razor(method, X).dequantize(), expected, rtol=1e-5, atol=1e-6)


def test_codes_and_shifts_have_their_widths() -> None:
    for bits in (4, 8):
        found = razor(ActivationRazor(bits=bits), X)
        assert (found.codes.dtype, found.shifts.shape) == (jnp.int8, (6, 6))
        assert int(found.codes.min()) >= -(2 ** (bits - 1))
        assert int(found.codes.max()) < 2 ** (bits - 1)
        assert int(found.shifts.max()) <= 16 - (bits - 1)


def test_scopes_differ_in_what_a_token_depends_on() -> None:
    for scope in get_args(Scope.__value__):
        quantizer = ActivationRazor(bits=8, scope=scope).fit(jnp.full(48, 5.0) if scope == "static_tensor" else None)
        alone = run(quantizer, jnp.asarray(X[:1]), None).dequantize()[0]
        beside = run(quantizer, jnp.asarray(X), None).dequantize()[0]
        assert bool(jnp.all(alone == beside)) == (scope != "dynamic_tensor")


def test_padding_is_left_out_of_the_scale() -> None:
    x, valid = np.concatenate([X, 1e3 * X[:1]]), [True] * 6 + [False]
    found, expected = razor(ActivationRazor(bits=4), x, valid), razor(ActivationRazor(bits=4), X)
    np.testing.assert_array_equal(found.dequantize()[:6], expected.dequantize())


def test_zeros_stay_zeros() -> None:
    for scope in get_args(Scope.__value__):
        np.testing.assert_array_equal(
            razor(ActivationRazor(scope=scope), np.zeros((2, 16), np.float32)).dequantize(), 0
        )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_bits": 17}, "bits=17 for an activation: give 2 to 16"),
        ({"bits": 9}, "bits=9 for an activation: give 2 to 8"),
        ({"base_bits": 4, "bits": 6}, "bits=6 for an activation: give 2 to 4"),
        ({"group_size": -8}, "group_size=-8: give a positive size"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, int], complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        ActivationRazor(**settings)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FormatError, match="group_size 20 does not divide an input of 48 features"):
        ActivationRazor(group_size=20).check(48)
