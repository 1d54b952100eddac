"""Tables of partial sums: every entry against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics import sign_tables
from tests.oracles import bcq as oracle
from tests.oracles import closed_form


def test_golden_entries() -> None:
    """spec_weights.md section 7, x = X[0]."""
    table = sign_tables(jnp.asarray(closed_form.inputs()[0], jnp.float32))[0]
    np.testing.assert_allclose(table[jnp.array([0, 1, 170])], [-2.044768, -1.647429, 0.938422], atol=1e-6)


def test_every_entry_is_its_signed_sum() -> None:
    x = np.random.default_rng(0).standard_normal((2, 24))
    with jax.enable_x64(True):
        tables = np.asarray(sign_tables(jnp.asarray(x)))
    assert tables.shape == (2, 3, 256)
    for row in range(2):
        for chunk in range(3):
            np.testing.assert_allclose(tables[row, chunk], oracle.table(x[row, 8 * chunk : 8 * chunk + 8]), atol=1e-14)


def test_complement_has_the_other_sign_and_the_last_entry_is_the_sum() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal(16), jnp.float32)
    tables = sign_tables(x)
    np.testing.assert_array_equal(tables, -tables[:, ::-1])
    np.testing.assert_allclose(tables[:, 255], x.reshape(2, 8).sum(axis=1), atol=1e-6)
