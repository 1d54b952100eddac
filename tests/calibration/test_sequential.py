"""Block by block: what each block sees, what is reported, what is refused, and how much is compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.blocks import QuantizeWeights, Rule
from jquant.blocks.weights import collect, solve_jointly
from jquant.calibration import BlockStore, check_weights, quantize_blocks
from jquant.calibration.sequential import _dense, advance
from jquant.errors import CalibrationError, FormatError
from jquant.formats import (
    PermutedTensor,
    QuantizedTensor,
    ScaleDtype,
    SpqrFormat,
    StatisticCodes,
    UniformFormat,
    compact_outliers,
    quantize_spqr,
)
from jquant.models import Llama, embed, get, linear_paths, put, random_model, stack_layers, tiny_config
from jquant.quantizers import HESSIAN, Gptq, Rtn
from jquant.report import BlockReport

KEY = jax.random.key(0)
GPTQ = Gptq(UniformFormat(4, 32), order="activation")
EVERYTHING = (QuantizeWeights((Rule(".*_proj", GPTQ),)),)
# Two solves a block: enough to see what flows, half as much to compile.
SOME = (QuantizeWeights((Rule(".*o_proj|.*down_proj", GPTQ), Rule(".*up_proj", Rtn(UniformFormat(3, 32))))),)
TOKENS = jax.random.randint(jax.random.key(2), (2, 16), 0, 128)


def deep(layers: int) -> Llama:
    """A model whose blocks are those of the deeper ones."""
    return random_model(dataclasses.replace(tiny_config(), num_hidden_layers=layers), jax.random.key(1))


@pytest.fixture(scope="module")
def model() -> Llama:
    return deep(2)


def test_one_compiled_solve_for_each_shape_whatever_the_depth() -> None:
    """Four sites have four shapes: q, k and v as one, o, gate and up as one, down."""
    steps = (solve_jointly, collect, _dense, advance)
    for step in steps:
        step.clear_cache()
    model = deep(4)
    for layers in (2, 4):
        quantize_blocks(model.replace(layers=model.layers[:layers]), TOKENS, EVERYTHING, key=KEY)
        assert [step._cache_size() for step in steps] == [4, 4, 4, 1]


@pytest.fixture(scope="module")
def run(model: Llama) -> tuple[Llama, Any, list[BlockReport]]:
    seen: list[BlockReport] = []
    quantized, report = quantize_blocks(model, TOKENS, SOME, key=KEY, on_block=seen.append)
    return quantized, report, seen


def test_each_block_sees_what_the_quantized_blocks_before_it_give(
    model: Llama, run: tuple[Llama, Any, list[BlockReport]]
) -> None:
    """The second block's last solve by hand: inputs through the first block as packed, not as it came."""
    quantized, _, _ = run
    inputs = advance(quantized.layers[0], embed(model, TOKENS), model.config)
    before = put(quantized.layers[1], "mlp.down_proj", model.layers[1].mlp.down_proj)
    moment = collect(before, inputs, ("mlp_hidden",), HESSIAN, model.config)["mlp_hidden"]
    (tensor, _) = solve_jointly(GPTQ, (model.layers[1].mlp.down_proj.kernel,), moment, KEY)
    np.testing.assert_array_equal(tensor.codes, quantized.layers[1].mlp.down_proj.kernel.codes)
    whole = collect(before, embed(model, TOKENS), ("mlp_hidden",), HESSIAN, model.config)["mlp_hidden"]
    assert np.abs(whole.total - moment.total).max() > 1


def test_what_no_rule_names_is_the_models_own(model: Llama, run: tuple[Llama, Any, list[BlockReport]]) -> None:
    quantized, _, _ = run
    packed = {path for path in linear_paths(model) if isinstance(get(quantized, path).kernel, QuantizedTensor)}
    assert packed == {path for path in linear_paths(model) if path.endswith(("o_proj", "up_proj", "down_proj"))}
    for name in ("embed_tokens", "norm", "lm_head", "config"):
        assert getattr(quantized, name) is getattr(model, name)
    assert get(quantized, "layers.1.self_attn.q_proj").kernel is get(model, "layers.1.self_attn.q_proj").kernel


def test_report_has_a_row_for_each_solve(run: tuple[Llama, Any, list[BlockReport]], model: Llama) -> None:
    quantized, report, seen = run
    assert tuple(seen) == report.blocks
    assert [block.index for block in report.blocks] == [0, 1]
    assert all(block.seconds > 0 for block in report.blocks)
    names = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert [row.path for row in report.linears()] == [f"layers.{index}.{name}" for index in (0, 1) for name in names]
    for row in report.linears():
        tensor, dense = get(quantized, row.path).kernel, np.asarray(get(model, row.path).kernel)
        assert row.bits_per_weight == tensor.bits_per_weight()
        error = np.linalg.norm(dense - tensor.dequantize()) / np.linalg.norm(dense)
        np.testing.assert_allclose(row.relative_error, error, rtol=1e-4)
        if row.path.endswith("up_proj"):
            assert row.proxy_loss is row.rtn_proxy_loss is row.damping is None
        else:
            assert row.proxy_loss < row.rtn_proxy_loss
            np.testing.assert_allclose(row.damping, 0.01, rtol=1e-6)


def test_report_tells_what_each_phase_took(run: tuple[Llama, Any, list[BlockReport]]) -> None:
    """The last block advances nothing; rounding to nearest collects nothing."""
    first, last = run[1].blocks
    names = ["collect attention_output", "solve attention_output", "solve mlp_input"]
    names += ["collect mlp_hidden", "solve mlp_hidden", "compact"]
    assert list(first.phases) == [*names, "advance"]
    assert list(last.phases) == names
    for block in (first, last):
        assert all(seconds > 0 for seconds in block.phases.values())
        assert sum(block.phases[name] for name in names) <= block.seconds


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_room_for_outliers_changes_no_bit_of_what_kernels_stand_for(dtype: ScaleDtype) -> None:
    """A block from the store, whose lists have no room, gives the next one the inputs that it gave when solved."""
    keys = jax.random.split(jax.random.key(5), 8)
    statistic = [
        StatisticCodes(
            jax.random.randint(codes, (12, 32), 0, 8).astype(jnp.uint8), *jax.random.normal(numbers, (2, 12, 2))
        )
        for codes, numbers in (keys[:2], keys[2:4])
    ]
    codes = jax.random.randint(keys[4], (192, 32), 0, 8).astype(jnp.uint8)
    outliers = jax.random.bernoulli(keys[5], 0.02, codes.shape), jax.random.normal(keys[6], codes.shape), 500
    inner = quantize_spqr(codes, *statistic, SpqrFormat(dtype=dtype), outliers)
    solved = PermutedTensor(inner, jax.random.permutation(keys[7], 192)[:, None].astype(jnp.uint16), codes.shape)
    kept = compact_outliers(solved)
    assert kept.nbytes() < solved.nbytes()
    np.testing.assert_array_equal(_dense(solved), _dense(kept))
    if dtype == "float16":  # its products are exact in float32, whether they are fused with sums or not
        np.testing.assert_array_equal(_dense(kept), kept.dequantize())


def test_passes_run_in_order_on_one_block(model: Llama) -> None:
    """The second finds what the first packed, and its rows follow."""
    first, second = (QuantizeWeights((Rule(f".*{name}_proj", Rtn(UniformFormat(4, 32))),)) for name in ("up", "gate"))
    quantized, report = quantize_blocks(model, None, (first, second), key=KEY)
    assert isinstance(quantized.layers[1].mlp.up_proj.kernel, QuantizedTensor)
    assert isinstance(quantized.layers[1].mlp.gate_proj.kernel, QuantizedTensor)
    assert [row.path.split(".")[-1] for row in report.linears()] == ["up_proj", "gate_proj"] * 2


def test_stacked_layers_are_refused(model: Llama) -> None:
    with pytest.raises(FormatError, match="the layers are stacked"):
        quantize_blocks(stack_layers(model), TOKENS, SOME, key=KEY)


def test_weights_that_cannot_be_meant_are_all_named(model: Llama) -> None:
    check_weights(model)
    kernel = model.layers[0].mlp.up_proj.kernel
    broken = put(model, "layers.0.mlp.up_proj.kernel", kernel.at[3, 4].set(jnp.nan))
    broken = put(broken, "layers.1.mlp.gate_proj.kernel", kernel.at[0, 0].set(-jnp.inf).astype(jnp.bfloat16))
    broken = put(broken, "layers.1.self_attn.o_proj.kernel", jnp.zeros((64, 64)))
    broken = put(broken, "embed_tokens", model.embed_tokens.at[9].set(jnp.nan))
    with pytest.raises(CalibrationError) as raised:
        check_weights(put(broken, "layers.1.input_layernorm", jnp.full(64, jnp.nan)))
    for fault in (
        "layers.0.mlp.up_proj has NaN or infinite weights",
        "layers.1.mlp.gate_proj has NaN or infinite weights",
        "layers.1.self_attn.o_proj is zero everywhere",
        "embed_tokens has NaN or infinite weights",
        "layers.1.input_layernorm has NaN or infinite weights",
        "fetch or convert it again",
    ):
        assert fault in str(raised.value)
    assert str(raised.value).count(";") == 4


def test_packed_weights_and_zero_biases_are_no_fault(model: Llama, run: tuple[Llama, Any, list[BlockReport]]) -> None:
    check_weights(run[0])
    check_weights(put(model, "layers.0.self_attn.q_proj.bias", jnp.zeros(64)))


def test_a_solve_that_is_not_finite_is_an_error_and_keeps_the_blocks_before(model: Llama, tmp_path: Any) -> None:
    """Calibration inputs overflow in the second block."""
    broken = put(model, "layers.1.mlp.gate_proj.kernel", model.layers[1].mlp.gate_proj.kernel * 1e30)
    store = BlockStore.open(tmp_path / "store", {})
    with store.lock, pytest.raises(CalibrationError) as raised:
        quantize_blocks(broken, TOKENS, SOME, key=KEY, store=store)
    message = str(raised.value)
    assert message.startswith("layers.1.mlp.down_proj: ")
    assert "solve_loss not finite" in message
    assert "a larger `damping`" in message
    assert "Finished blocks are kept; run again to go on" in message
    assert store.finished() == 1
