"""Plans: bits and bytes equal what a run gives; work and memory follow their formulas; only shapes are read."""

import jax
import pytest

from jquant.costs import (
    Work,
    forward_operations,
    gradient_nbytes,
    learning_nbytes,
    learning_operations,
    training_nbytes,
    working_nbytes,
)
from jquant.errors import FormatError, RecipeError
from jquant.formats import tree_nbytes
from jquant.inspection import inspect_model
from jquant.models import LlamaConfig, abstract_llama, random_model, tiny_config
from jquant.passes import Context, run_passes
from jquant.plan import UNTOUCHED, plan
from jquant.recipe import Recipe, load_recipe, override, parse_recipe

WEIGHTS = "passes[0].sequential.passes[0].quantize_weights"
FORMAT = f"{WEIGHTS}.rules[0].quantizer.gptq.format"
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192, tie_word_embeddings=True)
STATIC = """
name: static
calibration: {samples: 2, length: 16}
passes:
  - sequential:
      passes:
        - quantize_weights: {rules: [{match: ".*_proj", quantizer: {rtn: {format: {group_size: 32}}}}]}
  - quantize_activations: {rules: [{match: ".*", quantizer: {static_tensor: {}}}]}
"""


def gptq(*changes: str) -> Recipe:
    """Return GPTQ for the tiny model: groups of 32, two windows of 16 tokens."""
    small = (f"{FORMAT}.group_size=32", "calibration.samples=2", "calibration.length=16")
    return load_recipe("gptq-w4g64", [*small, *changes])


@pytest.mark.parametrize(
    "recipe",
    [
        gptq(f"{FORMAT}.bits=3", f"{WEIGHTS}.rules[0].quantizer.gptq.groups=dynamic"),
        load_recipe("rtn-w8"),
        parse_recipe(STATIC),
    ],
    ids=["gptq", "rtn", "rtn, static activations"],
)
def test_bits_and_bytes_are_those_of_the_run(recipe: Recipe) -> None:
    model = random_model(tiny_config(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, model.config.vocab_size)
    result, report = run_passes(recipe.passes, model, Context(jax.random.key(0), tokens))
    figures = plan(abstract_llama(model.config), recipe)
    facts = inspect_model(result)
    assert [row.bits_per_weight() for row in figures.linears] == [row.bits_per_weight for row in facts.linears]
    planned = {row.path: row.bits_per_weight() for row in figures.linears}
    assert planned == {row.path: row.bits_per_weight for row in report.linears()}
    assert figures.bits_per_weight() == pytest.approx(facts.bits_per_weight(), rel=1e-12)
    assert figures.nbytes == tree_nbytes(result)
    assert figures.source_nbytes == tree_nbytes(model)


def test_smollm2_at_4_bits_in_groups_of_64() -> None:
    figures = plan(abstract_llama(SMOLLM2), load_recipe("gptq-w4g64"))
    # 4 bits, and for 64 inputs a 16-bit scale and a 4-bit zero; the 9 zeros of 576 inputs leave half a byte empty.
    bits = {row.path: row.bits_per_weight() for row in figures.linears}
    assert bits["layers.29.mlp.down_proj"] == 4 + 16 / 64 + 4 / 64
    assert bits["layers.0.self_attn.k_proj"] == 4 + 16 / 64 + 40 / 576
    assert figures.solve_shapes == ((576, 960), (576, 576), (576, 3072), (1536, 576))
    assert figures.tokens == 128 * 2048
    assert len(figures.linears) == 7 * 30


def test_rtn_reads_no_text_and_costs_no_work() -> None:
    figures = plan(abstract_llama(SMOLLM2), load_recipe("rtn-w4g64"))
    assert (figures.tokens, figures.work) == (0, Work())
    assert figures.peak_nbytes < 2 * figures.source_nbytes


def test_work_of_one_block_by_hand() -> None:
    config = tiny_config()  # hidden 64, inner 96, 4 heads and 2 KV heads of 16
    block = abstract_llama(config).layers[0]
    attention_output = 2 * 16 * 64 * (64 + 32 + 32) + 4 * 16 * 16 * 64
    mlp_input = attention_output + 2 * 16 * 64 * 64
    mlp_hidden = mlp_input + 2 * 16 * 64 * 2 * 96
    end = mlp_hidden + 2 * 16 * 96 * 64
    assert dict(forward_operations(block, config, 16)) == {
        "attention_input": 0,
        "attention_output": attention_output,
        "mlp_input": mlp_input,
        "mlp_hidden": mlp_hidden,
        "end": end,
    }
    hessians = 2 * 2 * 32 * (3 * 64**2 + 96**2)  # two blocks, 32 tokens
    per_site = plan(abstract_llama(config), gptq()).work
    assert per_site.forward == 2 * (2 * (attention_output + mlp_input + mlp_hidden) + end)  # two windows
    assert per_site.statistics == hessians
    per_block = plan(abstract_llama(config), gptq(f"{WEIGHTS}.sequence=per_block")).work
    assert per_block == Work(2 * (2 * mlp_hidden + end), hessians, per_site.solves)


def test_smoothing_costs_one_pass_over_the_model_a_search_one_more_and_one_for_each_candidate() -> None:
    config = tiny_config()
    text = "{name: mine, calibration: {samples: 2, length: 16}, passes: [{smooth: {}}]}"
    model = abstract_llama(config)
    figures = plan(model, parse_recipe(text))
    assert figures.work == Work(forward=2 * 2 * forward_operations(model.layers[0], config, 16)["end"])
    assert {row.method for row in figures.linears} == {UNTOUCHED}
    assert figures.nbytes == figures.source_nbytes
    searched = plan(model, parse_recipe(text.replace("smooth: {}", "smooth: {alpha: {candidates: [0.4, 0.5]}}")))
    assert searched.work.forward == 4 * figures.work.forward


def test_calibrating_a_cache_costs_one_pass_over_the_model() -> None:
    text = "{name: mine, calibration: {samples: 2, length: 16}, passes: [{calibrate_razor_kv: {}}]}"
    model = abstract_llama(tiny_config())
    figures = plan(model, parse_recipe(text))
    assert figures.work == Work(forward=2 * 2 * forward_operations(model.layers[0], model.config, 16)["end"])
    weights = 64 * (64 + 32 + 32 + 64 + 3 * 96)  # a block with float32 kernels; the cache of a window; its scores
    working = 4 * (weights + 2 * 16 * 2 * 16 + 3 * 4 * 16 * 16)
    scales = 2 * 2 * 4  # keys and values of two layers
    activations = 2 * 2 * 16 * 64 * 4
    layers = figures.store_nbytes
    assert layers == tree_nbytes(model.layers) + scales
    assert figures.peak_nbytes == figures.source_nbytes + layers + activations + working


def test_kvquant_costs_one_pass_for_ranges_and_three_for_gradients() -> None:
    text = "{name: mine, calibration: {samples: 2, length: 16}, passes: [{calibrate_kvquant: {}}]}"
    model = abstract_llama(tiny_config())
    figures = plan(model, parse_recipe(text))
    assert figures.work == Work(forward=4 * 2 * 2 * forward_operations(model.layers[0], model.config, 16)["end"])
    assert figures.nbytes - figures.source_nbytes == 2 * 4 * (2 * 2 * 16 + 4 * 16)  # thresholds, codebooks, levels
    weights = 64 * (64 + 32 + 32 + 64 + 3 * 96)  # of a block, in float32 beside its gradients
    activations, working = 2 * 2 * 16 * 64 * 4, gradient_nbytes(model.config, 16) + 4 * weights
    assert figures.peak_nbytes == figures.source_nbytes + figures.store_nbytes + activations + working


def test_distillation_costs_the_teachers_pass_and_the_steps() -> None:
    text = """{name: mine, calibration: {samples: 4, length: 16}, passes: [{sequential: {passes: [{distill: {
        training: {steps: 5, batch_size: 2},
        rules: [{match: .*_proj, quantizer: {rtn: {format: {group_size: 32}}}}]}}]}}]}"""
    model = abstract_llama(tiny_config())
    block = forward_operations(model.layers[0], model.config, 16)["end"]
    path = "passes[0].sequential.passes[0].distill"
    for change, windows in ((), 2 * (4 + 30)), (("layers=last",), 2 * 4 + 30), (("inputs=student",), 2 * (4 + 30) + 4):
        figures = plan(model, override(parse_recipe(text), [f"{path}.{one}" for one in change]))
        assert figures.work == Work(forward=windows * block)
        assert {row.method for row in figures.linears} == {"Rtn"}
        sets = 4 if change == ("inputs=student",) else 2
        held = figures.source_nbytes + figures.store_nbytes
        learning = training_nbytes(model.layers[0], model.config, 16)
        assert figures.peak_nbytes == held + sets * 4 * 16 * 64 * 4 + learning


def test_learned_rotations_cost_their_steps_and_a_copy_of_the_model() -> None:
    text = """{name: mine, calibration: {samples: 4, length: 16}, passes: [{fold_norms: {}}, {learn_rotation: {
        training: {steps: 5, batch_size: 2}, rules: [{match: .*_proj, quantizer: {per_token: {bits: 4}}}]}}]}"""
    model = abstract_llama(tiny_config())
    figures = plan(model, parse_recipe(text))
    assert figures.work == Work(forward=2 * 5 * 2 * learning_operations(model.layers[0], model.config, 16))
    held = figures.source_nbytes + figures.store_nbytes + 2 * 4 * 16 * 64 * 4
    assert figures.peak_nbytes == held + figures.source_nbytes + learning_nbytes(model.config, 16)


def test_memory_is_the_larger_of_attention_and_solve() -> None:
    config = tiny_config()
    assert working_nbytes(config, 512, [(64, 64)]) == 4 * 3 * 4 * 512 * 512
    assert working_nbytes(config, 16, [(64, 128), (96, 64)]) == 4 * (8 * 96 * 96 + 4 * 96 * 64)


def test_linears_that_no_rule_takes_keep_their_bytes() -> None:
    recipe = parse_recipe(
        'name: some\npasses: [{sequential: {passes: [{quantize_weights: {rules: [{match: ".*mlp.*", quantizer: {rtn: '
        "{format: {bits: 8, group_size: null}}}}]}}]}}]"
    )
    figures = plan(abstract_llama(tiny_config(), "bfloat16"), recipe)
    left = [row for row in figures.linears if row.method == UNTOUCHED]
    assert len(left) == 8
    assert {row.bits_per_weight() for row in left} == {16.0}
    assert 8 < figures.bits_per_weight() < 9


def test_what_cannot_be_run_cannot_be_planned() -> None:
    with pytest.raises(RecipeError, match=r"rule 'model.*' is unused"):
        plan(abstract_llama(tiny_config()), gptq(f"{WEIGHTS}.rules[0].match=model.*"))
    with pytest.raises(FormatError, match=r"layers.0.self_attn.q_proj.*group_size 128 does not divide 64"):
        plan(abstract_llama(tiny_config()), load_recipe("rtn-w4g128"))


def test_calibrating_activations_runs_every_block_to_its_last_site_and_once_whole() -> None:
    figures, config = plan(abstract_llama(tiny_config()), parse_recipe(STATIC)), tiny_config()
    reached = forward_operations(abstract_llama(config).layers[0], config, 16)
    assert figures.work == Work(forward=2 * (2 * reached["mlp_hidden"] + reached["end"]))
