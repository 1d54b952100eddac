"""Untie, fold norms and rotate in a recipe: order, plan, seed, checkpoint, inspection, quantization and generation."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.blocks import QuantizeWeights, Rule, collect
from jquant.checkpoint import load_model, save_model
from jquant.errors import FormatError, RecipeError
from jquant.exact_passes import FoldNorms, Rotate, Untie
from jquant.formats import UniformFormat, tree_nbytes
from jquant.inspection import inspect_model
from jquant.models import Llama, abstract_llama, decode, prefill, stack_layers, tiny_config
from jquant.numerics import hadamard_matrix
from jquant.passes import Context, ModelPass, Sequential, run_passes
from jquant.plan import plan
from jquant.quantizers import HESSIAN, Gptq, Rtn
from jquant.recipe import Recipe, load_recipe
from jquant.tables import facts_table
from jquant.transforms import fold_norms, untie
from tests.transforms.numpy_models import numpy_model, packed_kernel

CONFIG = dataclasses.replace(tiny_config("smollm2"), num_hidden_layers=1)
EXACT: tuple[ModelPass, ...] = (Untie(), FoldNorms(), Rotate(parts=("residual", "values", "keys", "mlp")))
FORMAT = UniformFormat(4, None, "symmetric")
RULES = (Rule(".*down_proj", Gptq(FORMAT)), Rule(".*o_proj", Rtn(FORMAT, "search")))  # both behind online rotations
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 128)


@pytest.fixture(scope="module")
def source() -> Llama:
    return jax.tree.map(jnp.asarray, numpy_model(CONFIG, "float32"))


@pytest.fixture(scope="module")
def rotated(source: Llama) -> Llama:
    return run_passes(EXACT, source, Context(jax.random.key(2)))[0]


@pytest.fixture(scope="module")
def quantized(rotated: Llama) -> Llama:
    return run_passes([Sequential((QuantizeWeights(RULES),))], rotated, Context(jax.random.key(3), TOKENS))[0]


def test_presets_rotate_before_they_quantize() -> None:
    for name in ("quarot-w4a16-rtn", "quarot-w4a16"):
        *exact, last = load_recipe(name).passes
        assert exact == [Untie(), FoldNorms(), Rotate()]
        (rule,) = last.passes[0].rules  # type: ignore[attr-defined]
        assert (rule.quantizer.format, rule.quantizer.clip) == (FORMAT, "search")


def test_seed_comes_from_the_run_and_is_reported(source: Llama) -> None:
    folded = fold_norms(untie(source))

    def residual(seed: int) -> tuple[np.ndarray, object]:
        model, report = EXACT[2](folded, Context(jax.random.key(seed)))
        return np.asarray(model.embed_tokens), dict(report.details)["rotation"]

    (first, said), (again, _), (other, _) = residual(0), residual(0), residual(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert said == {"matrix": "hadamard", "parts": EXACT[2].parts, "seed": said["seed"]}  # type: ignore[attr-defined, index]


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ((FoldNorms(),), "untie the model first"),
        ((Untie(), Rotate()), "fold norms first"),
        ((*EXACT, Rotate(parts=("mlp",))), "mlp.down_proj.input_rotation is there already"),
    ],
    ids=["tied", "norms", "twice"],
)
def test_wrong_order_is_refused(source: Llama, passes: tuple[ModelPass, ...], complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        run_passes(passes, source, Context(jax.random.key(0)))


def test_quantized_model_is_refused_by_the_plan() -> None:
    first = Sequential((QuantizeWeights((Rule(".*_proj", Rtn(UniformFormat(4, None))),)),))
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj is already quantized.*before quantization"):
        plan(abstract_llama(CONFIG), Recipe("late", (first, *EXACT)))
    model = abstract_llama(CONFIG)
    packed = model.layers[0].self_attn.q_proj.replace(kernel=packed_kernel(64, 64))
    with pytest.raises(FormatError, match="is already quantized"):
        Untie().check(
            model.replace(layers=(model.layers[0].replace(self_attn=model.layers[0].self_attn.replace(q_proj=packed)),))
        )


def test_parts_are_named_each_once() -> None:
    with pytest.raises(RecipeError, match="each once"):
        Rotate(parts=("mlp", "mlp"))
    with pytest.raises(RecipeError, match=r"rotate\.parts\[0\]: unknown 'mpl'; did you mean 'mlp'"):
        load_recipe("quarot-w4a16", ["passes[2].rotate.parts=[mpl]"])


def test_plan_counts_the_head_that_untying_adds(rotated: Llama) -> None:
    figures = plan(abstract_llama(CONFIG), Recipe("exact", EXACT))
    assert figures.nbytes == tree_nbytes(rotated) == figures.source_nbytes + 4 * 64 * 128
    assert {row.method for row in figures.linears} == {"-"}


def test_checkpoint_and_inspection_keep_the_rotations(quantized: Llama, tmp_path: Path) -> None:
    save_model(quantized, tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert jax.tree.structure(back) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, back, quantized)
    assert back.layers[0].self_attn.query_key_rotation == rotated_keys(quantized)
    facts = inspect_model(back)
    said = {row.path.rsplit(".", 1)[1]: row.input for row in facts.linears}
    plain = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "")
    assert said == plain | {"o_proj": "hadamard 4, stride 16", "down_proj": "hadamard 12 x 8"}
    assert facts.query_key_rotations == ("hadamard 16",)
    assert "queries and keys after RoPE: hadamard 16 in 1 block" in str(facts_table(facts, "model").caption)


def rotated_keys(model: Llama) -> object:
    rotation = model.layers[0].self_attn.query_key_rotation
    assert rotation is not None
    return rotation


def test_calibration_sees_rotated_inputs(source: Llama, rotated: Llama) -> None:
    """The Hessian of down_proj is M H M^T, H that of the unrotated model."""
    site, matrix = "mlp_hidden", hadamard_matrix(96)
    sums = [
        collect(model.layers[0], model.embed_tokens[TOKENS], (site,), HESSIAN, model.config)[site].mean()
        for model in (source, rotated)
    ]
    expected = matrix @ np.asarray(sums[0], np.float64) @ matrix.T
    np.testing.assert_allclose(sums[1], expected, atol=2e-5 * np.abs(expected).max())


def test_quantized_model_generates_what_it_computes(quantized: Llama) -> None:
    model = stack_layers(quantized)
    read, step = jax.jit(prefill, static_argnums=3), jax.jit(decode)
    _, cache = read(model, TOKENS, jnp.asarray([9, 4]), 16)
    for _ in range(3):
        logits, cache = step(model, TOKENS[jnp.arange(2), cache.positions], cache)
        whole, _ = read(model, TOKENS, cache.positions, 16)
        np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-4)
