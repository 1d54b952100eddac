"""Which linear a target's kernels multiply and why not; prepared models come back bit for bit; products, lowering."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import ActivationMethod, ActivationRazor, OutlierSplit, PerToken, StaticTensor
from jquant.errors import RecipeError
from jquant.folders import make_ready, round_scales
from jquant.formats import (
    BinaryFormat,
    JoinedPart,
    PermutedTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedRotation,
    PreparedWideTensor,
    QuantizedTensor,
    SpqrFormat,
    UniformFormat,
    UniformTensor,
    online_rotation,
    quantize_centered,
    rotated,
)
from jquant.kv import ExactKv
from jquant.machines import Target, choose_target
from jquant.matmul import matmul
from jquant.models import (
    Linear,
    Llama,
    LlamaConfig,
    abstract_llama,
    blocks,
    build,
    decode,
    empty_cache,
    forward,
    get,
    linears,
    map_linears,
    random_model,
    set_kv_codec,
    stack_layers,
    tiny_config,
)
from jquant.models.layers import linears as linears_of_one_input
from jquant.numerics import packed_length
from jquant.targets import choose_product, choose_prompts, describe_products, prepare
from tests.contracts import test_formats as formats

W4, W8 = UniformFormat(4, 32), UniformFormat(8, None, "symmetric")
TOKENS = jax.random.randint(jax.random.key(1), (1, 3), 0, 128)


def uniform(format: UniformFormat, shape: tuple[int, int] = (64, 96)) -> UniformTensor:
    """Return random bytes and steps about which products keep their size; made by numpy, which compiles nothing."""
    rng, groups = np.random.default_rng(0), format.groups(shape[0])
    codes, zeros = (rng.integers(0, 256, (packed_length(rows, format.bits), shape[1])) for rows in (shape[0], groups))
    zeros[-1] >>= 8 * len(zeros) - groups * format.bits  # bits that no zero takes are 0
    scales = rng.uniform(0.5, 1.5, (groups, shape[1])) / (2 ** (format.bits - 2) * shape[0] ** 0.5)
    return UniformTensor(
        codes=jnp.asarray(codes, jnp.uint8),
        scales=jnp.asarray(scales, format.scale_dtype),
        zeros=jnp.asarray(zeros, jnp.uint8) if format.symmetry == "asymmetric" else None,
        format=format,
        shape=shape,
    )


def permuted(inner: QuantizedTensor) -> QuantizedTensor:
    order = jnp.asarray(np.random.default_rng(1).permutation(inner.shape[0]), jnp.int32)[:, None]
    return PermutedTensor(inner=inner, order=order, shape=inner.shape)


def turned(inner: QuantizedTensor) -> QuantizedTensor:
    return rotated(inner, jnp.ones(inner.shape[0]), jnp.uint32(0), "kronecker")


def signs(bits: int, group: int) -> QuantizedTensor:
    return formats.binary(192, BinaryFormat(bits, group))[0]


CENTERED = jax.eval_shape(lambda: quantize_centered(jnp.zeros((64, 64), jnp.uint8), jnp.float32(1), 2))
CHOICES: dict[str, tuple[Any, ActivationMethod | None, str]] = {
    "4 bits": (uniform(W4), None, "W4A16: filled up to 64 x 128"),
    "3 bits, permuted": (permuted(uniform(UniformFormat(3, None), (64, 64))), None, "W4A16"),
    "rotated": (turned(uniform(W4, (576, 192))), None, "W4A16"),
    "one group grows": (uniform(UniformFormat(4, None), (172, 49152)), None, "W4A16: filled up to 192 x 49152"),
    "groups do not": (
        uniform(UniformFormat(4, 43), (172, 64)),
        None,
        "XLA: groups of 43 inputs, kernels take 32 or a multiple of 64",
    ),
    "6 bits": (uniform(UniformFormat(6, None)), None, "XLA: weights of 6 bits for float inputs, kernels have 4"),
    "8 bits": (uniform(W8), None, "W8A16: filled up to 64 x 128, up to 64 tokens, more by XLA"),
    "8 bits in groups": (
        uniform(UniformFormat(8, 32, "symmetric")),
        None,
        "XLA: 2 groups of inputs, kernels of 8 bits take one scale for each output",
    ),
    "8 bits with zeros": (
        uniform(UniformFormat(8, None)),
        None,
        "XLA: weights of 8 bits with zeros for float inputs, kernels take symmetric ones",
    ),
    "centered": (turned(CENTERED), None, "XLA: no kernel for CenteredTensor"),
    "numbers": (jnp.ones((64, 64), jnp.bfloat16), None, "XLA: bfloat16 weights"),
    "W8A8": (uniform(W8, (576, 1536)), PerToken(8, "asymmetric"), "W8A8"),
    "W6A6": (uniform(UniformFormat(6, None, "symmetric"), (64, 64)), StaticTensor(6), "W8A8"),
    "W4A8, permuted": (
        permuted(uniform(UniformFormat(4, None, "symmetric"), (64, 64))),
        PerToken(8),
        "W4A8",
    ),
    "groups of integers": (
        uniform(UniformFormat(4, 32, "symmetric"), (64, 64)),
        PerToken(4),
        "XLA: 2 groups of inputs, kernels of integers take one scale for each output",
    ),
    "weights' zeros take 8 bits": (uniform(UniformFormat(4, None), (64, 64)), PerToken(4), "W8A8"),
    "groups of a token": (
        uniform(W8),
        PerToken(8, group_size=32),
        "XLA: inputs in groups of 32, kernels take one scale for each token",
    ),
    "outliers": (
        uniform(W8),
        OutlierSplit(),
        "W8A8: filled up to 64 x 128, up to 32 features of outliers, more by XLA",
    ),
    "outliers, 4 bits": (
        uniform(UniformFormat(4, None, "symmetric")),
        OutlierSplit(),
        "XLA: outliers beside 4-bit weights, the kernel takes 8 bits",
    ),
    "3 signs": (signs(3, 64), None, "W3A16 binary: filled up to 256 x 64, up to 8 tokens, more by XLA"),
    "5 signs": (signs(5, 64), None, "XLA: 5 planes of signs, kernels have 2 to 4"),
    "signs of small groups": (
        signs(4, 32),
        None,
        "XLA: groups of 32 inputs, kernels of binary codes take 64, 128 or 256",
    ),
    "signs and integers": (signs(4, 64), PerToken(8), "XLA: no kernel multiplies quantized inputs by binary codes"),
    "spqr": (
        formats.sixteen(48, SpqrFormat())[0],
        None,
        "W3A16 SpQR: filled up to 256 x 64, up to 2 tokens, more by XLA",
    ),
    "spqr, permuted": (
        permuted(formats.sixteen(48, SpqrFormat(zero_bits=5))[0]),
        None,
        "XLA: scales and zeros of 3 and 5 bits, the kernel takes at most 4",
    ),
    "razored": (uniform(W8), ActivationRazor(), "XLA: no kernel for inputs of RazorQuantizer"),
    "rotated integers": (turned(uniform(W4)), PerToken(4), "XLA: a rotated weight takes quantized inputs as numbers"),
}


def linear(kernel: Any, method: ActivationMethod | None) -> Linear:
    return Linear(kernel, input_quantizer=None if method is None else method.fit(jnp.ones(1)))


@pytest.mark.parametrize("name", CHOICES)
def test_the_product_is_named_with_its_reason(name: str) -> None:
    kernel, method, expected = CHOICES[name]
    assert choose_product(linear(kernel, method), Target.H100).describe() == expected
    assert choose_product(linear(kernel, method), Target.REFERENCE).describe() == "XLA"


def tiny() -> Llama:
    """Float inputs, but for the keys' 8-bit integers, rotated, and the output's; order of the queries, up as it is."""
    rng = np.random.default_rng(0)
    model = build(tiny_config("qwen2"), lambda path, shape: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32))

    def change(path: str, layer: Linear) -> Linear:
        name = path.rsplit(".", 1)[1]
        integer = {"k_proj": (8, PerToken(8, "asymmetric")), "o_proj": (4, StaticTensor(8))}.get(name)
        format = W4 if integer is None else UniformFormat(integer[0], None, "symmetric")
        if name == "up_proj":
            return layer
        kernel: QuantizedTensor = uniform(format, layer.kernel.shape)
        if name == "q_proj":
            kernel = permuted(kernel)
        quantizer = None if integer is None else integer[1].fit(jnp.full(64, 4.0))
        rotation = online_rotation(64) if name == "k_proj" else None
        return dataclasses.replace(layer, kernel=kernel, input_rotation=rotation, input_quantizer=quantizer)

    return map_linears(model, change)


MODEL = tiny()


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_prepared_model_is_portable_again_bit_for_bit(stacked: bool) -> None:
    model = stack_layers(MODEL) if stacked else MODEL
    prepared = prepare(model, Target.H100)
    assert describe_products(prepared) == "hopper kernels, 12 of 14 linears, prompts by XLA"
    assert prepare(prepared, Target.H200) is prepared
    assert_same(prepare(prepare(prepared, Target.SIMULATED), Target.REFERENCE), model)
    assert prepare(model, Target.REFERENCE) is model
    block = prepared.layers.block if stacked else prepared.layers[1]
    found = {
        name: type(get(block, name).kernel)
        for name in ("self_attn.v_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    }
    assert list(found.values())[:3] == [PreparedFloatTensor, PreparedIntegerTensor, PreparedIntegerTensor]
    assert isinstance(get(block, "self_attn.q_proj").kernel.inner, PreparedFloatTensor)
    assert isinstance(get(block, "self_attn.k_proj").input_rotation, PreparedRotation)
    assert choose_product(get(block, "self_attn.k_proj"), Target.H100).note.endswith(
        "rotated and quantized in one kernel"
    )
    assert (
        get(block, "mlp.up_proj").kernel
        is get(model.layers.block if stacked else model.layers[1], "mlp.up_proj").kernel
    )


def test_what_is_prepared_for_layers_is_stacked_alike() -> None:
    assert_same(stack_layers(prepare(MODEL, Target.H100)), prepare(stack_layers(MODEL), Target.H100))


def test_choices_are_the_same_of_a_prepared_model() -> None:
    prepared = prepare(MODEL, Target.H100)
    for (_, before), (_, after) in zip(linears(MODEL), linears(prepared), strict=True):
        assert choose_product(before, Target.H100) == choose_product(after, Target.H100)


def test_the_kernels_give_the_logits_of_the_portable_model() -> None:
    """In the interpreter, by a scan over layers; each product rounds by 2^-9, and more comes of it.

    Integers of the output and floats of the MLP's: kernels that XLA may run at once hang it (see `Target`).
    """
    prepared = prepare(MODEL, Target.SIMULATED)
    alone = map_linears(
        prepared, lambda path, layer: layer if path.endswith(("o_proj", "down_proj")) else get(MODEL, path)
    )
    assert describe_products(alone) == "simulated kernels, 4 of 14 linears, prompts by XLA"
    logits, expected = (jax.jit(forward)(stack_layers(one), TOKENS) for one in (alone, MODEL))
    assert logits.dtype == jnp.float32
    error = float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected))
    assert 2**-12 < error < 2**-6  # the lower bound: bfloat16 was really computed in


def whole_tiles(method: ActivationMethod | None = None, format: UniformFormat = W4) -> Llama:
    """One layer all of whose linears have whole tiles of outputs."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = dataclasses.replace(tiny_config("qwen2"), **sizes, num_key_value_heads=1, head_dim=64)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    model = build(config, lambda path, shape: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32))
    quantizer = None if method is None else method.fit(jnp.ones(1))
    return map_linears(
        model,
        lambda path, layer: Linear(uniform(format, layer.kernel.shape), layer.bias, input_quantizer=quantizer),
    )


def test_linears_of_one_input_are_one_product() -> None:
    model = stack_layers(whole_tiles())
    prepared = prepare(model, Target.H100)
    attention, mlp = prepared.layers.block.self_attn, prepared.layers.block.mlp
    assert attention.q_proj.kernel.shape == (128, 256)
    assert mlp.gate_proj.kernel.shape == (128, 384)
    assert attention.v_proj.kernel == JoinedPart((128, 64))
    assert describe_products(prepared) == "hopper kernels, 7 of 7 linears, prompts by XLA"
    assert choose_product(attention.k_proj, Target.H100).describe().startswith("joined")
    assert prepare(prepared, Target.H200) is prepared
    assert_same(prepare(prepare(prepared, Target.SIMULATED), Target.REFERENCE), model)
    lowered = jax.jit(forward).trace(prepared, TOKENS).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 4

    def laid_out(method: ActivationMethod, format: UniformFormat) -> Any:
        return jax.eval_shape(lambda: prepare(whole_tiles(method, format), Target.H100)).layers[0]

    integers = laid_out(PerToken(8), UniformFormat(4, None, "symmetric"))
    assert integers.self_attn.q_proj.kernel.shape == (128, 256)  # per token, nothing calibrated: joined too
    static = laid_out(StaticTensor(8), W8)
    assert static.self_attn.q_proj.kernel.shape == (128, 128)  # each has a scale of its own


def test_a_joined_product_gives_what_each_linear_gives() -> None:
    layers = [get(whole_tiles().layers[0], f"self_attn.{name}_proj") for name in "qkv"]
    joined = [get(prepare(whole_tiles(), Target.SIMULATED).layers[0], f"self_attn.{name}_proj") for name in "qkv"]
    x = jax.random.normal(jax.random.key(0), (3, 128))
    found, expected = (jax.jit(lambda own: linears_of_one_input(own, x)[0])(own) for own in (joined, layers))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float(jnp.linalg.norm(one - other)) < 2**-7 * float(jnp.linalg.norm(other))  # rounded to bfloat16


def test_a_head_of_8_bits_has_its_kernel_and_scales_are_kept_once() -> None:
    """The head is prepared and restored as linears are; `make_ready` keeps no second copy of scales."""
    head = Linear(uniform(W8, (128, 192)))
    model = dataclasses.replace(whole_tiles(), lm_head=head)
    prepared = prepare(model, Target.SIMULATED)
    assert isinstance(prepared.lm_head, Linear)
    assert isinstance(prepared.lm_head.kernel, PreparedWideTensor)
    assert describe_products(prepared) == "simulated kernels, 7 of 7 linears and the head, prompts by XLA"
    assert_same(prepare(prepared, Target.REFERENCE), model)
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.bfloat16)
    found, expected = (matmul(x, layer.kernel).astype(jnp.float32) for layer in (prepared.lm_head, head))
    assert float(jnp.linalg.norm(found - expected)) < 2**-7 * float(jnp.linalg.norm(expected))

    down = get(prepared.layers[0], "mlp.down_proj").kernel
    assert down.scales.dtype == jnp.float16
    assert down.portable_scales is None
    assert round_scales(model, Target.SIMULATED) is model


def test_float32_scales_are_rounded_so_that_no_second_copy_is_kept() -> None:
    model = whole_tiles(format=dataclasses.replace(W4, scale_dtype="float32"))
    rounded = round_scales(model, Target.SIMULATED)
    both = [prepare(one, Target.SIMULATED) for one in (model, rounded)]
    down = [get(one.layers[0], "mlp.down_proj").kernel for one in both]
    assert [kernel.portable_scales is None for kernel in down] == [False, True]
    np.testing.assert_array_equal(*(kernel.dequantize() for kernel in down))  # what is multiplied is the same
    assert_same(prepare(both[1], Target.REFERENCE), rounded)
    assert round_scales(model, Target.REFERENCE) is model


def test_a_prepared_model_in_bfloat16_has_a_wide_residual_stream() -> None:
    for dtype, wide in (("bfloat16", True), ("float32", False)):
        own = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, MODEL)
        prepared = prepare(own, Target.H100)
        assert prepared.config.wide_residual == wide
        assert prepare(prepared, Target.REFERENCE).config == own.config


def test_a_step_makes_sums_and_norms_by_one_kernel_each() -> None:
    """Of a width that the kernel takes; attention is by a kernel, so that the block has a layout."""
    config = LlamaConfig(128, 1024, 1024, 2, 8, 4, 128, max_position_embeddings=256)
    model = jax.eval_shape(lambda tree: prepare(tree, Target.H100), abstract_llama(config, "bfloat16"))
    cache = jax.eval_shape(lambda: empty_cache(model, 2, 128))
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = (
        jax.jit(lambda *given: decode(*given)).trace(model, tokens, cache).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert text.count("call @_add_norm") == 5  # two in each layer and the final one


@pytest.mark.gpu
@pytest.mark.parametrize("stacked", [False, True])
def test_the_gpu_gives_the_logits_of_the_portable_model(stacked: bool) -> None:
    """The kernels' roundings made by XLA on a CPU change these logits by 0.024; the portable model runs on a CPU."""
    model = stack_layers(MODEL) if stacked else MODEL
    on_cpu = jax.device_put((prepare(model, Target.REFERENCE), TOKENS), jax.devices("cpu")[0])
    logits, expected = (
        np.asarray(jax.jit(forward)(*given)) for given in ((prepare(model, Target.H100), TOKENS), on_cpu)
    )
    assert np.linalg.norm(logits - expected) < 2**-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 130])
def test_a_prepared_model_lowers_to_cuda(tokens: int) -> None:
    model = jax.eval_shape(lambda: prepare(stack_layers(MODEL), Target.H100))
    exported = jax.export.export(
        jax.jit(forward),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(model, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    text = exported.mlir_module()
    assert text.count("@mosaic_gpu_v2") == 7  # one layer's, which is scanned; up is XLA's, the keys' input is rotated


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "target"),
    [
        ("cpu", "auto", "bfloat16", Target.REFERENCE),
        ("NVIDIA A100-SXM4-80GB", "auto", "bfloat16", Target.REFERENCE),
        ("NVIDIA H100 80GB HBM3", "auto", "bfloat16", Target.H100),
        ("NVIDIA GH200 480GB", "auto", "bfloat16", Target.H200),
        ("NVIDIA H100 80GB HBM3", "auto", "float32", Target.REFERENCE),
        ("NVIDIA H100 80GB HBM3", "h100", "float32", Target.H100),
        ("NVIDIA H200", "reference", "bfloat16", Target.REFERENCE),
        ("NVIDIA H200", "h200+tokamax", "bfloat16", Target.H200_TOKAMAX),
    ],
)
def test_the_target_of_a_name(
    kind: str, name: Any, dtype: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))
    assert choose_target(name, dtype) is target


def test_tokamax_that_is_not_installed_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--target h100\+tokamax: tokamax is not installed; run pip install"):
        choose_target("h100+tokamax", "bfloat16")


def test_prompts_attend_by_what_the_target_names() -> None:
    """Also with a window, and where no kernel reads the caches; streamed prompts are the model's own."""
    config = dataclasses.replace(tiny_config(), sliding_window=8)
    model = abstract_llama(config, "bfloat16")
    ready = prepare(model, Target.H100_TOKAMAX)
    assert (ready.config.prompt_attention, ready.layers is model.layers) == ("tokamax", True)
    assert describe_products(ready) == "XLA, prompts by tokamax"
    assert describe_products(prepare(ready, Target.H100)) == "XLA, prompts by cuDNN"
    assert prepare(ready, Target.REFERENCE).config == config
    assert choose_prompts(model, ExactKv(), Target.H200).describe() == "cuDNN"
    assert choose_prompts(model, ExactKv(), Target.REFERENCE).describe() == "XLA"
    streamed = set_kv_codec(model, ExactKv(prompt="streamed"))
    assert "its own version" in choose_prompts(streamed, blocks(streamed)[0].self_attn.kv_codec, Target.H100).note
    assert prepare(streamed, Target.H100) is streamed


def test_layers_are_stacked_where_xla_multiplies_and_apart_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(make_ready(MODEL, "auto"), stack_layers(MODEL))
    monkeypatch.setattr("jquant.folders.choose_target", lambda name, dtype: Target.H100)
    assert_same(make_ready(MODEL, "auto"), prepare(round_scales(MODEL, Target.H100), Target.H100))
    windowed = random_model(dataclasses.replace(tiny_config(), sliding_window=8), jax.random.key(0))
    windowed = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), windowed)
    assert_same(make_ready(windowed, "auto"), stack_layers(prepare(windowed, Target.H100)))  # prompts alone by a kernel


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="--target h100: this machine has cpu, no H100 or H200; give auto or reference"
    ):
        choose_target("h100", "bfloat16")
