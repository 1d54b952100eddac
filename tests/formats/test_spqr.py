"""SpQR's tensors: what giving room back costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.formats import SpqrFormat, quantize_spqr

FORMAT = SpqrFormat(group_size=16, scale_bits=None, zero_bits=None, second_group_size=1)


def test_giving_room_back_compiles_nothing_whatever_the_number_of_outliers() -> None:
    compiled: list[Any] = []

    def note(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event.endswith("backend_compile_duration"):
            compiled.append(details.get("fun_name"))

    one, values = jnp.ones((2, 8)), jax.random.normal(jax.random.key(0), (32, 8))
    masks = [jax.random.bernoulli(jax.random.key(1), share, values.shape) for share in (0.05, 0.1, 0.2)]
    codes = jnp.zeros(values.shape, jnp.uint8)
    tensors = [quantize_spqr(codes, one, one, FORMAT, (mask, values, 100)) for mask in masks]
    jax.monitoring.register_event_duration_secs_listener(note)
    jax.jit(lambda x: x + 1)(one)
    assert len(compiled) == 1
    shrunk = [tensor.compact() for tensor in tensors]
    assert len(compiled) == 1
    counts = [int(np.sum(np.asarray(mask))) for mask in masks]
    assert len(set(counts)) == 3
    assert [tensor.outliers.rows.shape[0] for tensor in shrunk if tensor.outliers is not None] == counts
