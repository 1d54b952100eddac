"""Folders of others stay packed: the same numbers as the formats' equations, in the nodes that hold them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import abstract_model, lazy_model, load_model
from jquant.activations import PerToken, StaticTensor, TensorQuantizer, TokenQuantizer
from jquant.errors import ConversionError
from jquant.formats import PermutedTensor, UniformFormat, UniformTensor
from jquant.models import get
from tests.convert import packed_folders as given

type Case = tuple[dict[str, Any], given.Grids, dict[str, np.ndarray]]  # section, meaning, tensors


def pack_quantized(bits: int, group_size: int | None, *, symmetric: bool, dtype: Any = np.float16) -> Case:
    grids = given.random_grids(bits, group_size, symmetric=symmetric, dtype=dtype)
    section = given.compressed_section("pack-quantized", bits, group_size, symmetric=symmetric)
    return section, grids, given.pack_quantized(grids, symmetric=symmetric)


def int_quantized(*, symmetric: bool) -> Case:
    grids = given.random_grids(8, None, symmetric=symmetric)
    section = given.compressed_section("int-quantized", 8, None, symmetric=symmetric)
    return section, grids, given.int_quantized(grids, symmetric=symmetric)


def gptq(bits: int, group_size: int | None, *, symmetric: bool, version: int) -> Case:
    grids = given.random_grids(bits, group_size, symmetric=symmetric)
    section = given.gptq_section(bits, group_size, symmetric=symmetric, version=version)
    return section, grids, given.gptq(grids, version=version)


def awq() -> Case:
    grids = given.random_grids(4, 32, symmetric=False)
    return dict(given.AWQ_SECTION), grids, given.awq(grids)


CASES: Final[Mapping[str, Callable[[], Case]]] = {
    "pack-quantized w2g32 asymmetric": lambda: pack_quantized(2, 32, symmetric=False),
    "pack-quantized w3g64 asymmetric": lambda: pack_quantized(3, 64, symmetric=False),
    "pack-quantized w4g32 symmetric": lambda: pack_quantized(4, 32, symmetric=True, dtype=ml_dtypes.bfloat16),
    "pack-quantized w4 channel": lambda: pack_quantized(4, None, symmetric=True),
    "pack-quantized w5g32 symmetric": lambda: pack_quantized(5, 32, symmetric=True, dtype=np.float32),
    "pack-quantized w8 channel asymmetric": lambda: pack_quantized(8, None, symmetric=False),
    "int-quantized w8": lambda: int_quantized(symmetric=True),
    "int-quantized w8 asymmetric": lambda: int_quantized(symmetric=False),
    "gptq w2": lambda: gptq(2, 32, symmetric=True, version=1),
    "gptq w3 asymmetric v2": lambda: gptq(3, 32, symmetric=False, version=2),
    "gptq w4": lambda: gptq(4, 32, symmetric=True, version=1),
    "gptq w4 asymmetric v1": lambda: gptq(4, None, symmetric=False, version=1),
    "gptq w8 asymmetric v2": lambda: gptq(8, 64, symmetric=False, version=2),
    "awq": awq,
}


def dense(kernel: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda tensor: tensor.dequantize())(kernel))


@pytest.mark.parametrize("name", CASES)
def test_packed_linear_means_what_its_format_says(tmp_path: Path, name: str) -> None:
    section, grids, tensors = CASES[name]()
    folder = given.write_packed(tmp_path, section, tensors)
    model = load_model(folder)
    kernel = get(model, given.PATH).kernel
    assert isinstance(kernel, UniformTensor)
    assert kernel.format.bits == grids.bits
    assert kernel.scales.dtype == grids.scales.dtype
    np.testing.assert_array_equal(dense(kernel), grids.dense())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    assert abstract_model(folder) == shapes


def test_a_packed_folder_is_read_by_path(tmp_path: Path) -> None:
    section, _, tensors = CASES["pack-quantized w3g64 asymmetric"]()
    folder = given.write_packed(tmp_path, section, tensors)
    lazy, model = lazy_model(folder), load_model(folder)
    assert lazy.abstract == abstract_model(folder)
    for path in (given.PATH, f"{given.PATH}.kernel.scales", "layers.0.mlp", "layers.0", "embed_tokens"):
        jax.tree.map(np.testing.assert_array_equal, lazy.read(path), get(model, path))


def test_activation_order_becomes_a_permutation(tmp_path: Path) -> None:
    grids = given.random_grids(4, 32, symmetric=True)
    shuffled = np.random.default_rng(0).permutation(grids.groups)
    grids = given.Grids(grids.codes, grids.zeros, grids.scales, shuffled, 4)
    section = given.gptq_section(4, 32, symmetric=True, version=1, desc_act=True)
    folder = given.write_packed(tmp_path, section, given.gptq(grids, version=1))
    kernel = get(load_model(folder), given.PATH).kernel
    assert isinstance(kernel, PermutedTensor)
    np.testing.assert_array_equal(dense(kernel), grids.dense())
    assert isinstance(get(abstract_model(folder), given.PATH).kernel, PermutedTensor)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"num_bits": 4, "symmetric": True, "strategy": "token", "dynamic": True}, PerToken(4, "symmetric_full")),
        ({"num_bits": 8, "symmetric": False, "strategy": "token", "dynamic": True}, PerToken(8, "asymmetric")),
        (
            {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": True},
            PerToken(4, "symmetric_full", group_size=32),
        ),
    ],
)
def test_dynamic_activations_become_a_quantizer(tmp_path: Path, described: dict[str, Any], expected: PerToken) -> None:
    section, _, tensors = pack_quantized(4, 32, symmetric=True)
    section["config_groups"]["group_0"]["input_activations"] = described
    linear = get(load_model(given.write_packed(tmp_path, section, tensors)), given.PATH)
    assert linear.input_quantizer == TokenQuantizer(expected)


def test_static_activations_bring_their_scale(tmp_path: Path) -> None:
    section, _, tensors = int_quantized(symmetric=True)
    described = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}
    section["config_groups"]["group_0"]["input_activations"] = described
    tensors["input_scale"] = np.array([0.25], np.float32)
    quantizer = get(load_model(given.write_packed(tmp_path, section, tensors)), given.PATH).input_quantizer
    assert isinstance(quantizer, TensorQuantizer)
    assert quantizer.method == StaticTensor(8)
    assert float(quantizer.scale) == 0.25


def test_dtype_is_that_of_what_is_not_packed(tmp_path: Path) -> None:
    section, _, tensors = pack_quantized(4, 32, symmetric=True)
    model = load_model(given.write_packed(tmp_path, section, tensors), dtype="bfloat16")
    assert model.norm.dtype == ml_dtypes.bfloat16
    kernel: Any = get(model, given.PATH).kernel
    assert kernel.format == UniformFormat(4, 32, "symmetric_full", "float16")


def test_biases_of_zeros_that_autogptq_adds_are_left_out(tmp_path: Path) -> None:
    section, grids, tensors = gptq(4, 32, symmetric=True, version=1)
    folder = given.write_packed(tmp_path, section, tensors | {"bias": np.zeros(grids.codes.shape[1], np.float16)})
    assert get(load_model(folder), given.PATH).bias is None


def broken(case: Callable[[], Case], change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Any:
    section, _, tensors = case()
    change(section, tensors)
    return section, tensors


def set_section(**values: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda section, tensors: section.update(values)


def set_group(**values: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda section, tensors: section["config_groups"]["group_0"].update(values)


def set_weights(**values: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    return lambda section, tensors: section["config_groups"]["group_0"]["weights"].update(values)


def change_one(name: str, value: Any, at: Any = (0, 0)) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


W4, GPTQ4, INT8 = CASES["pack-quantized w4g32 symmetric"], CASES["gptq w4"], CASES["int-quantized w8"]
IN_ITS_PLACE: Final = rf"model\.safetensors: {given.LINEAR}"


@pytest.mark.parametrize(
    ("case", "change", "complaint"),
    [
        (W4, set_section(quant_method="hqq"), r"config\.json.*'hqq'.*compressed-tensors, gptq, awq"),
        (W4, set_section(config_groups={}), "no config_groups"),
        (
            W4,
            set_section(transform_config={"config_groups": {"R4": {}}}),
            "R4 does not say where it is applied",
        ),
        (W4, set_section(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme .* is not supported"),
        (W4, set_section(quantization_status="frozen"), "not packed"),
        (W4, set_section(format="nvfp4-pack-quantized"), "nvfp4.*supported: pack-quantized"),
        (W4, set_weights(type="float"), "'float'"),
        (W4, set_weights(strategy="block"), "strategy 'block'"),
        (W4, set_weights(symmetric="yes"), "symmetric is 'yes', neither true nor false"),
        (W4, set_weights(dynamic=True), "dynamic True: .* not dynamic"),
        (W4, set_weights(strategy="channel"), "'channel' with group_size 32"),
        (W4, set_weights(actorder="group"), "actorder 'group' is not read"),
        (W4, set_weights(group_size=48), "group_size 48 does not divide"),
        (W4, set_group(targets=["re:("]), "no regular expression"),
        (W4, set_group(input_activations={"num_bits": 8, "type": "float"}), "input_activations .* not supported"),
        (W4, set_group(targets=["Linear"]), "missing: model.layers.0.mlp.down_proj.weight_packed"),
        (W4, change_one("weight_scale", np.nan), rf"{IN_ITS_PLACE}: .*scale of group 0 and output 0 is not finite"),
        (W4, change_one("weight_shape", 7, 0), rf"{IN_ITS_PLACE}: its weight_shape is"),
        (GPTQ4, set_section(bits=5), "bits 5"),
        (GPTQ4, set_section(sym=None), "sym is None, neither"),
        (GPTQ4, set_section(checkpoint_format="marlin"), "'marlin'"),
        (GPTQ4, set_section(dynamic={"+:re": {"bits": 8}}), "dynamic section"),
        (GPTQ4, change_one("qzeros", 0), rf"{IN_ITS_PLACE}: its qzeros are not all 8, yet sym"),
        (GPTQ4, change_one("g_idx", 1, 0), rf"{IN_ITS_PLACE}: .*yet desc_act is false"),
        (
            CASES["gptq w4 asymmetric v1"],
            change_one("qzeros", -1),
            rf"{IN_ITS_PLACE}: its qzeros hold 15.*as gptq_v2",
        ),
        (CASES["awq"], set_section(version="gemv"), "'gemv'"),
        (CASES["awq"], set_section(group_size=None), "group_size None"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, case: Callable[[], Case], change: Callable[..., None], complaint: str
) -> None:
    section, tensors = broken(case, change)
    with pytest.raises(ConversionError, match=complaint):
        load_model(given.write_packed(tmp_path, section, tensors))


def test_words_of_old_compressed_tensors_are_named(tmp_path: Path) -> None:
    section, grids, tensors = CASES["pack-quantized w3g64 asymmetric"]()
    tensors["weight_packed"] = np.zeros((grids.codes.shape[1], -(-grids.codes.shape[0] // 10)), np.int32)
    with pytest.raises(ConversionError, match=r"3-bit weights were packed by compressed-tensors before 0\.18"):
        load_model(given.write_packed(tmp_path, section, tensors))


@pytest.mark.parametrize("groups", [[-1], [9], [0]])
def test_damaged_activation_order_is_named(tmp_path: Path, groups: list[int]) -> None:
    section, _, tensors = GPTQ4()
    section["desc_act"] = True
    change_one("g_idx", groups[0], -1)(section, tensors)
    with pytest.raises(ConversionError, match=rf"{IN_ITS_PLACE}: its g_idx does not put 32 inputs"):
        load_model(given.write_packed(tmp_path, section, tensors))


def test_integers_beyond_their_bits_are_named(tmp_path: Path) -> None:
    section, _, tensors = INT8()
    section["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    with pytest.raises(ConversionError, match=rf"{IN_ITS_PLACE}: its int8 values are not all those of 4 bits"):
        load_model(given.write_packed(tmp_path, section, tensors))
