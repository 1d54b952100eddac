"""The search for SmoothQuant's alpha: errors by hand, what is chosen, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import PerToken, StaticTensor
from jquant.calibration import AlphaSearch, collect_absmax, search_alpha
from jquant.calibration.sequential import advance
from jquant.calibration.smoothing import measure_rounding
from jquant.errors import RecipeError
from jquant.exact_passes import Smooth
from jquant.formats import UniformFormat
from jquant.models import Linear, Llama, embed, get, map_linears, put, random_model, tiny_config
from jquant.passes import Context, run_passes
from jquant.quantizers import Gptq, Rtn
from jquant.recipe import parse_recipe, to_yaml
from jquant.report import Report
from jquant.tables import finding_tables
from jquant.transforms import smooth

KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(2), (3, 12), 0, 128)
SEARCH = AlphaSearch((0.0, 0.5, 1.0), Rtn(UniformFormat(4, None, "symmetric")), PerToken(4))


@pytest.fixture(scope="module")
def model() -> Llama:
    """A model with two channels that are far larger than the others after each norm."""
    model = random_model(tiny_config(), jax.random.key(1))
    for path in (
        f"layers.{index}.{name}" for index in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    ):
        model = put(model, path, get(model, path).at[jnp.array([3, 40])].multiply(16.0))
    return model


def rounded(path: str, layer: Linear) -> Linear:
    kernel = SEARCH.weights(layer.kernel, None, KEY)[0].dequantize()
    return layer.replace(kernel=kernel, input_quantizer=SEARCH.activations.fit(None))


@pytest.mark.slow
def test_errors_are_those_of_the_rounded_blocks(model: Llama) -> None:
    """By hand: the model smoothed whole, rounded, and each block run on the source's inputs."""
    measure_rounding.clear_cache()
    absmax, errors = search_alpha(model, TOKENS, SEARCH)
    assert measure_rounding._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, absmax, collect_absmax(model, TOKENS))
    assert [one.alpha for one in errors] == [0.0, 0.5, 1.0]
    for one in errors:
        student, x, shares = map_linears(smooth(model, absmax, one.alpha), rounded), embed(model, TOKENS), []
        for source, layer in zip(model.layers, student.layers, strict=True):
            y = advance(source, x, model.config)
            moved = advance(layer, x, model.config) - y
            shares.append(float(jnp.sum(moved**2) / jnp.sum((y - x) ** 2)))
            x = y
        np.testing.assert_allclose(one.error, np.mean(shares), rtol=0.02)  # values near ties round either way
    assert errors[1].error < min(errors[0].error, errors[2].error)


def test_the_pass_takes_the_least_error_and_reports_the_table(model: Llama) -> None:
    found, report = run_passes([Smooth(SEARCH)], model, Context(KEY, TOKENS))
    jax.tree.map(np.testing.assert_array_equal, found, smooth(model, collect_absmax(model, TOKENS), 0.5))
    table = dict(report.details)["smoothing"]
    assert table["alpha"] == 0.5
    assert [row["alpha"] for row in table["errors"]] == [0.0, 0.5, 1.0]
    (shown,) = finding_tables(report)
    assert list(shown.columns[2].cells) == ["", "chosen", ""]
    assert finding_tables(Report()) == ()


def test_recipe() -> None:
    text = """
name: mine
calibration: {samples: 3, length: 12}
passes:
  - smooth: {alpha: {candidates: [0.4, 0.6], activations: {per_token: {bits: 6}}}}
"""
    recipe = parse_recipe(text)
    assert recipe.passes == (Smooth(AlphaSearch((0.4, 0.6), activations=PerToken(6))),)
    assert parse_recipe(to_yaml(recipe)) == recipe
    for given, message in (
        ("[0.4, 1.6]", "alpha is 1.6; SmoothQuant takes 0"),
        ("[]", "candidates is empty; list the alphas"),
        ("[high]", r"candidates\[0\]: given 'high' \(text\); expected a number"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(text.replace("[0.4, 0.6]", given))


def test_rounding_that_needs_statistics_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rounding that needs no statistics, not by Gptq\("):
        AlphaSearch(weights=Gptq(UniformFormat(4, 32)))
    with pytest.raises(RecipeError, match=r"and StaticTensor\("):
        AlphaSearch(activations=StaticTensor(8))
