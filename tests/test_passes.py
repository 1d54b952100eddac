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
from jquant.errors import RecipeError
from jquant.formats import UniformFormat
from jquant.models import Llama, get, random_model, tiny_config
from jquant.passes import Context, QuantizeActivations, Sequential, run_passes
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
