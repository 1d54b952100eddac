"""Model passes in a row: each has its own key and its own blocks in the store; all are checked before any works."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import StaticTensor
from jquant.blocks import ActivationRule, QuantizeWeights, Rule
from jquant.calibration import BlockStore
from jquant.checkpoint import load_model, save_model
from jquant.errors import FormatError, RecipeError
from jquant.formats import UniformFormat
from jquant.models import Llama, get, random_model, tiny_config
from jquant.models.random import Family
from jquant.passes import Context, QuantizeActivations, QuantizeHead, Sequential, run_passes
from jquant.quantizers import Gptq, Rtn


def only(match: str) -> Sequential:
    return Sequential((QuantizeWeights((Rule(match, Rtn(UniformFormat(bits=4, group_size=32))),)),))


@pytest.fixture
def model() -> Llama:
    return random_model(tiny_config(), jax.random.key(0))


def test_two_sequential_passes_share_a_store_without_taking_each_others_blocks(model: Llama, tmp_path: Path) -> None:
    passes = [only(".*self_attn.*"), only(".*mlp.*")]
    expected, _ = run_passes(passes, model, Context(key=jax.random.key(1)))
    for _ in range(2):  # the second time every block comes from the store
        store = BlockStore.open(tmp_path / "store", {"run": "one"})
        with store.lock:
            found, report = run_passes(passes, model, Context(key=jax.random.key(1), store=store))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert len(report.blocks) == 4
        assert store.finished() == 4


def test_every_pass_is_checked_before_the_first_works(model: Llama) -> None:
    seen: list[object] = []
    context = Context(key=jax.random.key(1), on_block=seen.append)
    with pytest.raises(RecipeError, match="is unused"):
        run_passes([only(".*self_attn.*"), only(".*nothing.*")], model, context)
    assert not seen


def test_calibration_that_is_missing_is_said_before_any_work(model: Llama) -> None:
    needs = Sequential((QuantizeWeights((Rule(".*_proj", Gptq(UniformFormat(group_size=32))),)),))
    with pytest.raises(RecipeError, match="needs calibration data"):
        run_passes([needs], model, Context(key=jax.random.key(1)))
    run_passes([needs], model, Context(key=jax.random.key(1), tokens=jnp.zeros((1, 8), jnp.int32)))
    assert isinstance(get(model, "layers.0.mlp.up_proj").kernel, jax.Array)


@pytest.mark.parametrize("family", ["llama2", "smollm2"])
def test_the_head_is_quantized_alone_and_a_tied_one_becomes_its_own(family: Family) -> None:
    model = random_model(tiny_config(family), jax.random.key(0))
    pass_ = QuantizeHead(Rtn(UniformFormat(8, None, "symmetric")))
    found, report = run_passes([only(".*_proj"), pass_], model, Context(key=jax.random.key(1)))
    assert found.lm_head is not None
    assert not found.config.tie_word_embeddings
    assert found.embed_tokens is model.embed_tokens
    before = model.embed_tokens.T if model.lm_head is None else model.lm_head.kernel
    error = jnp.linalg.norm(found.lm_head.kernel.dequantize() - before) / jnp.linalg.norm(before)
    assert dict(report.details)["head"]["relative error of weights"] == pytest.approx(float(error), rel=1e-3)
    assert 1e-3 < float(error) < 1e-2
    outline = pass_.outline(jax.eval_shape(lambda tree: tree, model))
    assert jax.tree.structure(outline.lm_head) == jax.tree.structure(found.lm_head)
    with pytest.raises(FormatError, match=r"lm_head is already quantized \(UniformTensor\)"):
        run_passes([pass_], found, Context(key=jax.random.key(1)))


def test_a_head_that_its_quantizer_cannot_take_is_refused(model: Llama) -> None:
    with pytest.raises(FormatError, match="lm_head: group_size 48 does not divide 64 inputs"):
        run_passes([QuantizeHead(Rtn(UniformFormat(8, 48)))], model, Context(key=jax.random.key(1)))
    with pytest.raises(RecipeError, match="Gptq needs statistics of its inputs, and none are collected for the head"):
        QuantizeHead(Gptq())


def test_calibrated_inputs_need_text_and_follow_the_weights(model: Llama, tmp_path: Path) -> None:
    """Dynamic ones need none. The result is the same from a store, and from a checkpoint."""
    passes = [only(".*_proj"), QuantizeActivations((ActivationRule(".*_proj", StaticTensor()),))]
    with pytest.raises(RecipeError, match="QuantizeActivations needs calibration data"):
        run_passes(passes, model, Context(key=jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, 128)
    expected, _ = run_passes(passes, model, Context(key=jax.random.key(1), tokens=tokens))
    for _ in range(2):
        store = BlockStore.open(tmp_path / "store", {"run": "one"})
        with store.lock:
            found, _ = run_passes(passes, model, Context(key=jax.random.key(1), tokens=tokens, store=store))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    save_model(expected, tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, back, expected)
