"""SmoothQuant: factors against the oracle, logits unchanged, what is touched, and what is refused."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import PerToken
from jquant.calibration import collect_absmax
from jquant.calibration.absmax import measure_absmax
from jquant.errors import CalibrationError, FormatError, RecipeError
from jquant.exact_passes import Smooth
from jquant.formats import UniformFormat
from jquant.models import (
    BLOCK_LINEARS,
    Block,
    Llama,
    embed,
    forward,
    get,
    prompt_block,
    put,
    random_model,
    stack_layers,
    tiny_config,
)
from jquant.passes import Context, run_passes
from jquant.quantizers import Rtn
from jquant.recipe import parse_recipe
from jquant.transforms import smooth, smooth_block, smoothing_scales
from tests.oracles import smooth as oracle

KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(2), (3, 12), 0, 128)
run = jax.jit(forward)


def loud(family: str = "llama2", dtype: str = "float32") -> Llama:
    """A model with two channels that are far larger than the others after each norm."""
    model = random_model(tiny_config(family), jax.random.key(1), dtype)  # type: ignore[arg-type]
    for index in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            path = f"layers.{index}.{name}"
            model = put(model, path, get(model, path).at[jnp.array([3, 40])].multiply(jnp.asarray(16.0, dtype)))
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return loud()


@pytest.fixture(scope="module")
def absmax(model: Llama) -> tuple[Mapping[str, jax.Array], ...]:
    return collect_absmax(model, TOKENS)


def test_golden_factors() -> None:
    kernel = jnp.array([[0.4, -0.2], [0.1, 0.05], [0.3, -1.0]])
    scales = smoothing_scales(jnp.array([2.0, 10.0, 0.5]), (kernel,), 0.5)
    np.testing.assert_allclose(scales, [2.236068, 10, 0.707107], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.55, 0.85])
def test_reference_tensors(shared: Path, alpha: float) -> None:
    """Three linears of 16 outputs that share one input, after a norm of ones."""
    golden = np.load(shared / "golden" / "smoothquant.npz")
    kernels = tuple(jnp.asarray(part.T) for part in np.split(golden["W"], 3))
    scales = smoothing_scales(jnp.asarray(golden["act_scales"]), kernels, alpha)
    np.testing.assert_allclose(1 / scales, golden[f"ln_{alpha}"], rtol=2e-6)
    folded = np.concatenate([kernel * scales[:, None] for kernel in kernels], axis=1).T
    np.testing.assert_allclose(folded, golden[f"W_{alpha}"], rtol=2e-6)
    np.testing.assert_array_equal(np.abs(golden["X"]).max(axis=0), golden["act_scales"])
    expected = oracle.factors(golden["act_scales"], [golden["W"]], alpha)
    np.testing.assert_allclose(scales, expected, rtol=2e-6)


def test_the_ends_of_alpha() -> None:
    kernels = tuple(jax.random.normal(key, (16, 8)) for key in jax.random.split(KEY, 2))
    absmax = jnp.exp(jax.random.normal(KEY, 16))
    heaviest = np.maximum(*(np.abs(kernel).max(axis=1) for kernel in kernels))
    np.testing.assert_allclose(smoothing_scales(absmax, kernels, 0.0), 1 / heaviest, rtol=1e-6)
    np.testing.assert_allclose(smoothing_scales(absmax, kernels, 1.0), absmax, rtol=1e-6)


def test_dead_channels_and_zero_weights() -> None:
    """A dead channel keeps 1, whatever its weights; zero weights count as 1e-5; no factor is below 1e-5."""
    kernel = jnp.array([[2.0], [0.0], [0.0], [1e4]])
    absmax = jnp.array([0.0, 0.0, 4.0, 1e-20])
    np.testing.assert_allclose(smoothing_scales(absmax, (kernel,), 0.5), [1, 1, 2 / 1e-5**0.5, 1e-5], rtol=1e-6)


@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_logits_stay_and_the_activations_even_out(family: str) -> None:
    """The logits to 1e-4, with channels 16 times the others (sums of 64 products in float32)."""
    source = loud(family)
    before = collect_absmax(source, TOKENS)
    smoothed = smooth(source, before, 0.5)
    expected = np.asarray(run(source, TOKENS))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(run(smoothed, TOKENS), expected, rtol=0, atol=1e-4)
    after = collect_absmax(smoothed, TOKENS)
    for index in range(2):
        for site in ("attention_input", "mlp_input"):
            spread = [np.max(one[index][site]) / np.median(one[index][site]) for one in (before, after)]
            assert spread[1] < spread[0] / 2


def test_logits_stay_to_1e_9_in_float64() -> None:
    with jax.enable_x64(True):
        source = loud("qwen3", "float64")
        smoothed = smooth(source, collect_absmax(source, TOKENS), 0.5)
        assert smoothed.layers[1].mlp.up_proj.kernel.dtype == smoothed.layers[0].input_layernorm.dtype == jnp.float64
        np.testing.assert_allclose(run(smoothed, TOKENS), run(source, TOKENS), rtol=0, atol=1e-9)


def test_only_the_two_pairs_change(model: Llama, absmax: tuple[Mapping[str, jax.Array], ...]) -> None:
    smoothed = smooth(model, absmax, 0.5)
    for name in ("embed_tokens", "norm", "lm_head", "config"):
        assert getattr(smoothed, name) is getattr(model, name)
    for index in range(2):
        changed = {name for name in BLOCK_LINEARS if not _same(model, smoothed, f"layers.{index}.{name}.kernel")}
        assert changed == {name for name in BLOCK_LINEARS if not name.endswith(("o_proj", "down_proj"))}
        for site, norm, names in (
            ("attention_input", "input_layernorm", BLOCK_LINEARS[:3]),
            ("mlp_input", "post_attention_layernorm", BLOCK_LINEARS[4:6]),
        ):
            block, found = model.layers[index], smoothed.layers[index]
            weights = [np.asarray(get(block, name).kernel).T for name in names]
            factors = oracle.factors(np.asarray(absmax[index][site]), weights, 0.5)
            np.testing.assert_allclose(getattr(found, norm), getattr(block, norm) / factors, rtol=2e-6)
            for name, weight in zip(names, weights, strict=True):
                np.testing.assert_allclose(get(found, name).kernel.T, weight * factors, rtol=2e-6)


def _same(left: Llama, right: Llama, path: str) -> bool:
    return np.array_equal(get(left, path), get(right, path))


def test_arrays_keep_their_dtype_and_are_rounded_once() -> None:
    source = loud(dtype="bfloat16")
    largest = {site: jnp.exp(jax.random.normal(KEY, 64)) for site in ("attention_input", "mlp_input")}
    found = jax.jit(smooth_block)(source.layers[0], largest, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    kernels = tuple(get(source.layers[0], name).kernel for name in BLOCK_LINEARS[:3])
    factors = smoothing_scales(largest["attention_input"], kernels, 0.5)
    expected = (kernels[0].astype(jnp.float32) * factors[:, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.self_attn.q_proj.kernel, expected)


def test_absmax_is_that_of_all_tokens(model: Llama, absmax: tuple[Mapping[str, jax.Array], ...]) -> None:
    x = embed(model, TOKENS)
    block = jax.jit(prompt_block, static_argnums=(3, 4))
    for layer, found in zip(model.layers, absmax, strict=True):
        x, _, taps = block(layer, x, jnp.full(3, 12), 12, model.config)
        for site, largest in found.items():
            expected = np.abs(np.asarray(getattr(taps, site))).max(axis=(0, 1))
            np.testing.assert_allclose(largest, expected, rtol=1e-4, atol=1e-6)


def test_one_program_measures_all_layers(model: Llama) -> None:
    measure_absmax.clear_cache()
    collect_absmax(model, TOKENS)
    assert measure_absmax._cache_size() == 1


def test_activations_that_are_not_finite_are_named(model: Llama) -> None:
    broken = put(model, "layers.1.mlp.down_proj.kernel", model.layers[1].mlp.down_proj.kernel.at[0, 0].set(jnp.nan))
    with pytest.raises(CalibrationError, match=r"layers\.1 gives NaN or infinite activations"):
        collect_absmax(broken, TOKENS)


def test_bad_input_is_refused(model: Llama, absmax: tuple[Mapping[str, jax.Array], ...]) -> None:
    with pytest.raises(FormatError, match=r"alpha is 1.5; SmoothQuant takes 0"):
        smooth(model, absmax, 1.5)
    with pytest.raises(FormatError, match="maxima of 1 blocks given for 2"):
        smooth(model, absmax[:1], 0.5)
    with pytest.raises(FormatError, match=r"layers\.1: no maxima of mlp_input, only of attention_input"):
        smooth(model, (absmax[0], {"attention_input": jnp.ones(64)}), 0.5)
    with pytest.raises(FormatError, match=r"shape \(63,\); expected \(64,\)"):
        smooth(model, ({**absmax[0], "mlp_input": jnp.ones(63)}, absmax[1]), 0.5)
    with pytest.raises(FormatError, match="negative or not finite"):
        smooth(model, ({**absmax[0], "mlp_input": absmax[0]["mlp_input"].at[3].set(jnp.nan)}, absmax[1]), 0.5)
    with pytest.raises(FormatError, match="the layers are stacked"):
        smooth(stack_layers(model), absmax, 0.5)
    packed = Rtn(UniformFormat(8, None))(model.layers[1].self_attn.k_proj.kernel, None, KEY)[0]
    quantized = put(model, "layers.1.self_attn.k_proj.kernel", packed)
    with pytest.raises(
        FormatError, match=r"layers\.1\.self_attn\.k_proj is already quantized \(UniformTensor\): smooth"
    ):
        run_passes([Smooth()], quantized, Context(KEY, TOKENS))
    rounded = put(model, "layers.0.mlp.up_proj.input_quantizer", PerToken(8).fit(None))
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj is already quantized \(TokenQuantizer\): smooth"):
        smooth(rounded, absmax, 0.5)


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    """float16 ends at 65504; this factor is 1e5."""
    source = random_model(tiny_config(), jax.random.key(1), "float16")
    source = put(source, "layers.0.mlp.up_proj.kernel", source.layers[0].mlp.up_proj.kernel.at[5].set(30000.0))
    largest = {"attention_input": jnp.ones(64), "mlp_input": jnp.full(64, 1e5)}
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.\w+: a smoothed value is too large for float16"):
        smooth(source, (largest, largest), 1.0)


def test_the_pass_in_a_recipe(model: Llama, absmax: tuple[Mapping[str, jax.Array], ...]) -> None:
    text = "{name: mine, calibration: {samples: 3, length: 12}, passes: [{smooth: {alpha: 0.4}}]}"
    (step,) = parse_recipe(text).passes
    assert step == Smooth(alpha=0.4)
    found, _ = run_passes([step], model, Context(KEY, TOKENS))
    jax.tree.map(np.testing.assert_array_equal, found, smooth(model, absmax, 0.4))
    with pytest.raises(RecipeError, match=r"smooth: alpha is 2.0; SmoothQuant takes 0"):
        parse_recipe(text.replace("0.4", "2.0"))
    with pytest.raises(RecipeError, match="Smooth needs calibration"):
        parse_recipe(text.replace("calibration: {samples: 3, length: 12}, ", ""))


def test_smoothed_linears_round_better_as_activations_even_out(
    model: Llama, absmax: tuple[Mapping[str, jax.Array], ...]
) -> None:
    """W8 with per-token A8 by hand: the products of the smoothed pairs are nearer to the exact ones."""

    def error(layer: Block) -> float:
        _, _, taps = prompt_block(layer, embed(model, TOKENS), jnp.full(3, 12), 12, model.config)
        x = np.asarray(taps.attention_input, np.float64)
        kernel = np.asarray(layer.self_attn.q_proj.kernel, np.float64)
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        step = np.abs(kernel).max(axis=0) / 127
        return float(np.sum((np.rint(x / scale) * scale @ (np.rint(kernel / step) * step) - x @ kernel) ** 2))

    assert error(smooth(model, absmax, 0.5).layers[0]) < error(model.layers[0]) / 4
