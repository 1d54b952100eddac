"""Folding norms: which scales go where, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.models import Llama, put, tiny_config
from jquant.transforms import fold_norms, rotate, untie
from tests.transforms.numpy_models import numpy_model, packed_kernel


@pytest.fixture(scope="module")
def model() -> Llama:
    return numpy_model(dataclasses.replace(tiny_config("qwen3"), num_hidden_layers=1), "float32")


def test_scales_go_into_the_readers_and_nowhere_else(model: Llama) -> None:
    source = untie(model)
    folded = fold_norms(source)
    before, after = source.layers[0], folded.layers[0]
    for norm, part, names in (
        ("input_layernorm", "self_attn", "qkv"),
        ("post_attention_layernorm", "mlp", ("gate", "up")),
    ):
        scale = np.asarray(getattr(before, norm), np.float64)
        for name in names:
            kernels = [getattr(getattr(layer, part), f"{name}_proj").kernel for layer in (before, after)]
            np.testing.assert_array_equal(kernels[1], (scale[:, None] * np.asarray(kernels[0])).astype(np.float32))
        np.testing.assert_array_equal(getattr(after, norm), 1)
    np.testing.assert_array_equal(folded.norm, 1)
    np.testing.assert_array_equal(folded.embed_tokens, source.embed_tokens)
    for kept in (("self_attn", "q_norm"), ("self_attn", "k_norm"), ("self_attn", "o_proj"), ("mlp", "down_proj")):
        for one, other in zip(*(jax.tree.leaves(getattr(getattr(x, kept[0]), kept[1])) for x in (before, after))):
            np.testing.assert_array_equal(one, other)
    twice = fold_norms(folded)
    jax.tree.map(np.testing.assert_array_equal, twice, folded)


def test_tied_head_is_refused(model: Llama) -> None:
    with pytest.raises(FormatError, match=r"tied to the embedding table.*`untie: \{\}`"):
        fold_norms(model)


def test_rotated_reader_is_refused(model: Llama) -> None:
    source = untie(model)
    rotation = rotate(source, parts=("mlp",)).layers[0].mlp.down_proj.input_rotation
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj rotates its input: fold norms before"):
        fold_norms(put(source, "layers.0.mlp.up_proj.input_rotation", rotation))


def test_quantized_model_is_refused(model: Llama) -> None:
    with pytest.raises(
        FormatError, match=r"layers\.0\.self_attn\.o_proj is already quantized \(UniformTensor\).*before"
    ):
        fold_norms(put(untie(model), "layers.0.self_attn.o_proj.kernel", packed_kernel(64, 64)))
