"""What every exact transform must satisfy: logits unchanged to 1e-9 in float64, on every family of models."""

import dataclasses
import functools
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.models import Family, Llama, LlamaConfig, abstract_llama, forward, stack_layers, tiny_config, tiny_hf_config
from jquant.transforms import RotatedPart, fold_norms, rotate, smooth, untie
from tests.oracles import llama as oracle
from tests.transforms.numpy_models import arrays_of, numpy_model

TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10) * 37 % 128  # longer than the tiny Mistral's window of 8
ALL: tuple[RotatedPart, ...] = ("residual", "values", "keys", "mlp")
FAMILIES = get_args(Family.__value__)


def smoothed(model: Llama) -> Llama:
    """Smooth by maxima that differ from channel to channel, as every model of width 64 could have them."""
    absmax = {site: jnp.linspace(0.1, 30.0, 64, dtype=jnp.float32) for site in ("attention_input", "mlp_input")}
    return smooth(model, (absmax,) * model.config.num_hidden_layers, 0.5)


# name -> transform. A new one is one more row.
TRANSFORMS: dict[str, Callable[[Llama], Llama]] = {
    "untie": untie,
    "fold_norms": lambda model: fold_norms(untie(model)),
    "rotate": lambda model: rotate(fold_norms(untie(model)), parts=ALL),
    "rotate haar": lambda model: rotate(fold_norms(untie(model)), parts=("residual",), matrix="haar", seed=7),
    "rotate heads alone": lambda model: rotate(model, parts=("values", "keys")),
    "smooth": smoothed,
}


@functools.cache
def wide_logits(family: Family) -> np.ndarray:
    return logits_of(numpy_model(tiny_config(family)))


def logits_of(model: Llama) -> np.ndarray:
    """Return the logits, operation by operation: equal shapes of many models are compiled once."""
    with jax.enable_x64(True):
        return np.asarray(forward(jax.tree.map(jnp.asarray, model), jnp.asarray(TOKENS)))


@pytest.mark.parametrize(
    ("name", "family"),
    [("rotate", family) for family in FAMILIES] + [(name, "qwen3") for name in TRANSFORMS if name != "rotate"],
)
def test_logits_stay_in_float64(name: str, family: Family) -> None:
    with jax.enable_x64(True):
        transformed = TRANSFORMS[name](numpy_model(tiny_config(family)))
    logits = logits_of(transformed)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, wide_logits(family), rtol=0, atol=1e-9)


def test_logits_stay_in_float32() -> None:
    model = numpy_model(tiny_config("qwen2"), "float32")
    logits = jax.jit(forward)(stack_layers(TRANSFORMS["rotate"](model)), jnp.asarray(TOKENS))
    for row, tokens in zip(logits, TOKENS, strict=True):
        expected = oracle.forward(tiny_hf_config("qwen2"), arrays_of(model), tokens)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_stay(name: str, dtype: str) -> None:
    model = TRANSFORMS[name](numpy_model(dataclasses.replace(tiny_config("qwen3"), num_hidden_layers=1), dtype))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {dtype}


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "smooth"])  # which changes no structure
def test_abstract_model_tells_the_structure(name: str) -> None:
    config: LlamaConfig = dataclasses.replace(tiny_config("smollm2"), num_hidden_layers=1)
    done = TRANSFORMS[name](numpy_model(config, "float32"))
    assert TRANSFORMS[name](abstract_llama(config)) == jax.eval_shape(lambda tree: tree, done)
