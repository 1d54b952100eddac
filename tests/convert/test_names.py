from typing import Any

import jax
import jax.numpy as jnp
import pytest

from convert import hf_name, hf_name_of_gguf, is_transposed
from jquant.models import Family, LlamaConfig, build, tiny_hf_config
from tests.convert.folders import FAMILIES
from tests.convert.gguf_files import gguf_name


def paths_of(family: Family, **changes: Any) -> list[str]:
    paths: list[str] = []

    def note(path: str, shape: tuple[int, ...]) -> Any:
        paths.append(path)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    build(LlamaConfig.from_hf(tiny_hf_config(family) | changes), note)
    return paths


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_has_its_own_name(family: Family) -> None:
    paths = paths_of(family)
    assert len({hf_name(path) for path in paths}) == len(paths)


def test_names_are_those_of_transformers() -> None:
    assert hf_name("embed_tokens") == "model.embed_tokens.weight"
    assert hf_name("lm_head.kernel") == "lm_head.weight"
    assert hf_name("layers.11.self_attn.q_norm") == "model.layers.11.self_attn.q_norm.weight"
    assert hf_name("layers.0.self_attn.v_proj.bias") == "model.layers.0.self_attn.v_proj.bias"


def test_unknown_path_is_an_error() -> None:
    with pytest.raises(KeyError):
        hf_name("layers.0.self_attn.z_proj.kernel")


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_names_lead_back_to_the_same_tensors(family: Family) -> None:
    names = [hf_name(path) for path in paths_of(family, mlp_bias=True)]
    assert [hf_name_of_gguf(gguf_name(name)) for name in names] == names


def test_unknown_gguf_tensor_has_no_name() -> None:
    assert hf_name_of_gguf("rope_freqs.weight") is None
    assert hf_name_of_gguf("blk.0.ffn_gate_exps.weight") is None


def test_only_kernels_are_transposed() -> None:
    assert [path for path in paths_of("qwen3") if is_transposed(path) != path.endswith("kernel")] == []
    assert not is_transposed("embed_tokens")
