"""QuaRot's rotations: weights by an oracle, logits against the oracle of the unrotated model, and planted mistakes.

The exactness check is shown to be sharp: each mistake of the published code, planted into a model that has what the
mistake hits (20 heads, biases, a tied head, an epsilon that counts, an embedding whose rows have means), is caught.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import FormatError
from jquant.formats import online_rotation, repeat_rotation
from jquant.models import Llama, LlamaConfig, RopeConfig, forward, put, stack_layers
from jquant.numerics import haar_matrix, hadamard_matrix, random_signs
from jquant.transforms import (
    RotatedPart,
    Turns,
    fold_norms,
    on_host,
    rotate,
    rotate_linear,
    subtract_embedding_mean,
    untie,
)
from tests.oracles import llama, quarot
from tests.transforms.numpy_models import arrays_of, numpy_model, packed_kernel

ALL: tuple[RotatedPart, ...] = ("residual", "values", "keys", "mlp")
SEED = 5
TOKENS = np.arange(9) * 37 % 24
# Rope's frequencies are powers of 2^-10, which float32 holds exactly: so the float64 oracle computes the same function.
NINE = LlamaConfig(24, 36, 24, 1, 9, 3, 6, rope=RopeConfig(theta=2.0**30))  # heads and head_dim without Hadamard matrix
TWENTY = LlamaConfig(
    24, 40, 96, 1, 20, 4, 4, rms_norm_eps=1e-2, rope=RopeConfig(theta=2.0**20),
    attention_bias=True, output_bias=True, mlp_bias=True, tie_word_embeddings=True,
)  # fmt: skip
TURNS = Turns(haar_matrix(40, 1), haar_matrix(4, 2)[None])  # for TWENTY
run = jax.jit(forward)


@functools.cache
def expected(config: LlamaConfig) -> np.ndarray:
    """Return the logits of the unrotated model, by the oracle."""
    sizes = {
        name: getattr(config, name)
        for name in ("head_dim", "rms_norm_eps", "num_hidden_layers", "tie_word_embeddings", "model_type")
    }
    return llama.forward(sizes | {"rope_theta": config.rope.theta}, arrays_of(numpy_model(config)), TOKENS)


@functools.cache
def rotated(config: LlamaConfig) -> Llama:
    with jax.enable_x64(True):
        return rotate(fold_norms(untie(numpy_model(config))), parts=ALL, seed=SEED)


def error_of(model: Llama) -> float:
    """Return the largest difference of a logit from those of the unrotated model."""
    source = NINE if model.config.num_attention_heads == 9 else TWENTY
    with jax.enable_x64(True):
        model = jax.tree.map(jnp.asarray, model)
        logits = np.asarray(run(model, jnp.asarray(TOKENS[None])))[0]
    assert logits.dtype == np.float64
    return float(np.abs(logits - expected(source)).max())


@pytest.mark.parametrize("config", [NINE, TWENTY], ids=["9 heads", "20 heads"])
def test_logits_are_the_unrotated_models(config: LlamaConfig) -> None:
    assert np.abs(expected(config)).max() > 1
    assert error_of(rotated(config)) < 1e-9


@functools.cache
def turned() -> Llama:
    """Return a model whose residual stream and values are turned by given matrices after their rotations."""
    with jax.enable_x64(True):
        return rotate(fold_norms(untie(numpy_model(TWENTY))), parts=ALL, seed=SEED, turns=TURNS)


def test_given_matrices_are_exact_too_and_nothing_more_is_online() -> None:
    assert jax.tree.structure(turned()) == jax.tree.structure(rotated(TWENTY))
    assert np.abs(turned().embed_tokens - rotated(TWENTY).embed_tokens).max() > 0.1
    assert error_of(turned()) < 1e-9


def test_given_identities_change_no_bit() -> None:
    source = fold_norms(untie(numpy_model(TWENTY, "float32")))
    none, identity = (rotate(source, turns=one) for one in (Turns(), Turns(np.eye(40), np.eye(4)[None])))
    jax.tree.map(np.testing.assert_array_equal, identity, none)


@pytest.mark.parametrize(
    ("turns", "parts", "complaint"),
    [
        (Turns(np.eye(39)), ALL, r"for residual is float64\[39, 39\]: give float64\[40, 40\]"),
        (Turns(np.eye(40, dtype=np.float32)), ALL, r"for residual is float32\[40, 40\]: give float64"),
        (Turns(values=np.eye(4)[None].repeat(2, 0)), ALL, r"for values is float64\[2, 4, 4\]: give float64\[1, 4, 4\]"),
        (Turns(values=np.full((1, 4, 4), np.nan)), ALL, "for values is not orthogonal"),
        (Turns(np.eye(40) * (1 + 1e-6)), ALL, "for residual is not orthogonal: .*nearest_orthogonal"),
        (Turns(np.eye(40)), ("values",), r"given for residual, which parts \['values'\] do not rotate"),
    ],
    ids=["size", "dtype", "layers", "nan", "stretched", "part"],
)
def test_given_matrices_that_do_not_fit_are_refused(
    turns: Turns, parts: tuple[RotatedPart, ...], complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        rotate(fold_norms(untie(numpy_model(TWENTY))), parts=parts, turns=turns)


def edited(path: str, edit: Callable[[np.ndarray], np.ndarray]) -> Llama:
    """Return the rotated model with one array changed."""
    model, (*nodes, last) = rotated(TWENTY), path.split(".")
    owner: Any = functools.reduce(
        lambda node, name: node[int(name)] if name.isdigit() else getattr(node, name), nodes, model
    )
    return put(model, path, edit(np.asarray(getattr(owner, last))))


def selected_twice(_: np.ndarray) -> np.ndarray:
    """Return o_proj rotated by the Hadamard matrix of its whole width, 40 x 2, with that of 20 heads online."""
    with jax.enable_x64(True):
        source = (
            rotate(fold_norms(untie(numpy_model(TWENTY))), parts=("residual",), seed=SEED).layers[0].self_attn.o_proj
        )
        return np.asarray(rotate_linear(source, online_rotation(80).on_host, None).kernel)


def own_bias(path: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda _: arrays_of(numpy_model(TWENTY))[path]


def scaled_embedding(_: np.ndarray) -> np.ndarray:
    """Return the rotated embedding after the final norm's scale went into it, as into a head that is the same array."""
    arrays = arrays_of(numpy_model(TWENTY))
    rotation, signs = online_rotation(40), random_signs(40, SEED)
    return rotation.on_host(arrays["embed_tokens"] * arrays["norm"] * signs)


def centred_embedding(_: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        centred = subtract_embedding_mean(untie(numpy_model(TWENTY)))
        return np.asarray(rotate(fold_norms(centred), parts=("residual",), seed=SEED).embed_tokens)


V_BIAS, O_BIAS = "layers.0.self_attn.v_proj.bias", "layers.0.self_attn.o_proj.bias"
MISTAKES: dict[str, Callable[[], Llama]] = {
    "embedding's means subtracted": lambda: edited("embed_tokens", centred_embedding),
    "20 heads, selected twice": lambda: edited("layers.0.self_attn.o_proj.kernel", selected_twice),
    "bias of v not rotated": lambda: edited(V_BIAS, own_bias(V_BIAS)),
    "bias of o not rotated": lambda: edited(O_BIAS, own_bias(O_BIAS)),
    "tied embedding takes the scale": lambda: edited("embed_tokens", scaled_embedding),
    "epsilon of 1e-5": lambda: rotated(TWENTY).replace(
        config=dataclasses.replace(rotated(TWENTY).config, rms_norm_eps=1e-5)
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_caught(mistake: str) -> None:
    model = MISTAKES[mistake]()
    assert jax.tree.map(jnp.shape, model.layers) == jax.tree.map(jnp.shape, rotated(TWENTY).layers)
    assert error_of(model) > 1e-3


@pytest.mark.parametrize("config", [NINE, TWENTY], ids=["9 heads", "20 heads"])
def test_weights_equal_the_oracles(config: LlamaConfig) -> None:
    check_weights(rotated(config), config, np.eye(config.hidden_size), np.eye(config.head_dim))


def test_weights_turned_by_given_matrices_equal_the_oracles() -> None:
    assert TURNS.residual is not None
    assert TURNS.values is not None
    check_weights(turned(), TWENTY, TURNS.residual, TURNS.values[0])


def check_weights(model: Llama, config: LlamaConfig, turn: np.ndarray, turn_values: np.ndarray) -> None:
    stream = np.diag(random_signs(config.hidden_size, SEED)) @ hadamard_matrix(config.hidden_size).T @ turn.T
    heads, head = (haar_matrix(9, 0), haar_matrix(6, 0)) if config is NINE else map(hadamard_matrix, (20, 4))
    oracle = quarot.rotate(
        quarot.fold_norms(arrays_of(numpy_model(config)), 1),
        1,
        stream=stream,
        heads=heads,
        head=turn_values @ head,
        inner=hadamard_matrix(config.intermediate_size),
    )
    found = arrays_of(model)
    assert found.keys() == oracle.keys()
    for path, array in oracle.items():
        np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-13, err_msg=path)


def test_online_nodes_say_what_they_are() -> None:
    attention, mlp = rotated(NINE).layers[0].self_attn, rotated(NINE).layers[0].mlp
    assert attention.o_proj.input_rotation == online_rotation(54, stride=6)
    assert attention.o_proj.input_rotation.describe() == "haar 9, stride 6"
    assert attention.query_key_rotation == online_rotation(6)
    assert attention.query_key_rotation.describe() == "haar 6"
    assert mlp.down_proj.input_rotation == online_rotation(24)
    assert all(layer.input_rotation is None for layer in (attention.q_proj, attention.v_proj, mlp.up_proj))
    one = rotate(
        numpy_model(dataclasses.replace(NINE, num_attention_heads=1, num_key_value_heads=1)), parts=("values",)
    )
    assert one.layers[0].self_attn.o_proj.input_rotation is None  # nothing to mix across one head


def test_heads_share_one_factorisation() -> None:
    """M(heads) (x) M(head_dim) is the online factor after the folded one, and not M(heads * head_dim) for 20 heads."""
    across, own = online_rotation(80, stride=4), repeat_rotation(online_rotation(4), 20)
    whole = across.on_host(own.on_host(np.eye(80))).T
    np.testing.assert_allclose(whole, np.kron(hadamard_matrix(20), hadamard_matrix(4)), atol=1e-14)
    assert np.abs(whole - hadamard_matrix(80)).max() > 0.1


def test_seed_and_matrix_choose_the_residual_rotation_alone() -> None:
    source = fold_norms(untie(numpy_model(NINE)))
    first, other = (rotate(source, seed=seed) for seed in (1, 2))
    assert np.abs(first.embed_tokens - other.embed_tokens).max() > 0.1
    assert jax.tree.structure(first) == jax.tree.structure(other)
    haar = rotate(source, matrix="haar", seed=1)
    assert jax.tree.structure(haar) == jax.tree.structure(first)
    assert np.abs(haar.embed_tokens - first.embed_tokens).max() > 0.1
    assert (
        stack_layers(
            rotate(numpy_model(dataclasses.replace(NINE, num_hidden_layers=2)), parts=("values", "mlp"))
        ).layers.depth
        == 2
    )


def test_unfolded_norms_are_refused() -> None:
    with pytest.raises(FormatError, match=r"^norm has a scale other than one.*`fold_norms: \{\}`"):
        rotate(untie(numpy_model(NINE)))


@pytest.mark.parametrize("part", ["values", "keys", "mlp"])
def test_no_part_is_rotated_twice(part: RotatedPart) -> None:
    once = rotate(numpy_model(NINE), parts=(part,))
    with pytest.raises(FormatError, match=r"layers\.0\.\S+_rotation is there already"):
        rotate(once, parts=(part,))


@pytest.mark.parametrize("parts", [(), ("mlp", "mlp")])
def test_no_part_and_the_same_part_twice_are_refused(parts: tuple[RotatedPart, ...]) -> None:
    with pytest.raises(FormatError, match="name at least one of residual, values, keys, mlp, each once"):
        rotate(numpy_model(NINE), parts=parts)


def test_quantized_and_tied_models_are_refused() -> None:
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.down_proj is already quantized \(UniformTensor\)"):
        rotate(put(numpy_model(NINE), "layers.0.mlp.down_proj.kernel", packed_kernel(24, 36)), parts=("mlp",))
    with pytest.raises(FormatError, match="untie the model first"):
        subtract_embedding_mean(numpy_model(TWENTY))


def test_long_arrays_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jquant.transforms.host._CHUNK", 12)
    rows = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    turned = on_host(online_rotation(4).on_host, rows)
    assert turned.dtype == jnp.float32
    np.testing.assert_array_equal(turned, (rows.astype(np.float64) @ hadamard_matrix(4).T).astype(np.float32))
    vector = on_host(online_rotation(4).on_host, jnp.ones(4, jnp.bfloat16))
    assert (vector.dtype, vector.tolist()) == (jnp.bfloat16, [2.0, 0.0, 0.0, 0.0])


def test_one_outlier_channel_is_spread_over_the_stream() -> None:
    """What it is for: the largest activation over the typical one falls from 100 to about 1."""
    source = numpy_model(dataclasses.replace(NINE, hidden_size=64, tie_word_embeddings=False))
    spiked = put(source, "embed_tokens", np.asarray(source.embed_tokens) * np.where(np.arange(64) == 3, 100.0, 1.0))
    table = np.asarray(rotate(fold_norms(spiked), parts=("residual",)).embed_tokens)

    def peak(rows: np.ndarray) -> float:
        return float((np.abs(rows).max(axis=1) / np.sqrt((rows**2).mean(axis=1))).mean())

    assert peak(np.asarray(spiked.embed_tokens)) > 6
    assert peak(table) < 3
