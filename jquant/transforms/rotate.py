"""QuaRot's rotations: a model that computes the same with activations whose outliers are spread over all channels.

    residual  R1    every vector h of the residual stream becomes R h, R = M(hidden) diag(signs), or Haar-random
    values    R2    every value head becomes O v; across heads M(heads) is applied online, before o_proj
    keys      R3    every query and key head becomes O q, O k after RoPE: q k stays, a quantized KV cache gains
    mlp       R4    the input of down_proj becomes M(inner) z, online

O = M(head_dim). Each M is what `jquant.formats.online_rotation` chooses for its size. Given orthogonal matrices T may
follow R, and each layer's own may follow the O of its values (`Turns`): T R and T O take their places, folded as they
are. For a linear y = x W + b whose input x is now A x and whose output shall be B y, the kernel's columns go through A
and its rows and bias through B:

    W <- A W B^T,    b <- B b

A of o_proj is M(heads) (x) O by construction, never a choice of its own for the whole width: the two differ where,
say, 20 heads take the matrix of order 20 and the width 2560 that of 40. R1 is exact because an RMS norm without scale
commutes with it; so norms are folded first (`fold_norms`). Arithmetic is float64 on the host, with one cast at the end.

Ashkboos et al., QuaRot: outlier-free 4-bit inference in rotated LLMs (2024), arXiv:2404.00456, section 4.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jquant.errors import FormatError
from jquant.formats import OnlineRotation, OrthogonalMatrix, online_rotation, repeat_rotation
from jquant.models import Block, Linear, Llama, LlamaConfig, blocks, get
from jquant.numerics import random_signs
from jquant.transforms.host import Operator, check_unquantized, on_columns, on_host
from jquant.types import Leaf

type RotatedPart = Literal["residual", "values", "keys", "mlp"]

ROTATED_PARTS: Final[tuple[RotatedPart, ...]] = (
    "residual",
    "values",
    "mlp",
)  # "keys" helps quantized caches alone

_ORTHOGONAL: Final = 1e-9  # largest |T^T T - I| of a given matrix: float64 rounding of a few thousand products

_ONLINE: Final = {
    "values": "self_attn.o_proj.input_rotation",
    "keys": "self_attn.query_key_rotation",
    "mlp": "mlp.down_proj.input_rotation",
}


@dataclass(frozen=True)
class Turns:
    """Orthogonal matrices that follow the drawn rotations, float64: h becomes T h.

    Attributes:
      residual: of the residual stream, [hidden, hidden]; None for none.
      values: of each layer's value heads, [layers, head_dim, head_dim]; None for none.
    """

    residual: Float[np.ndarray, "hidden hidden"] | None = None
    values: Float[np.ndarray, "layers dim dim"] | None = None


def rotate(
    model: Llama,
    *,
    parts: Sequence[RotatedPart] = ROTATED_PARTS,
    matrix: OrthogonalMatrix = "hadamard",
    seed: int = 0,
    turns: Turns = Turns(),
) -> Llama:
    """Rotates parts of an unquantized model; its outputs stay the same up to rounding.

    Args:
      model: the model, its layers a tuple; for "residual" its norms must have been folded. An abstract model gives the
        structure of the result.
      parts: which rotations.
      matrix: of the residual stream: a Hadamard matrix with random signs, or a Haar-random one.
      seed: of the signs, or of the Haar matrix.
      turns: what follows the rotations of residual stream and values.

    Returns:
      The model with other weights; what is done online are nodes in it.

    Raises:
      FormatError: the model is quantized or stacked, norms are not folded, a part is rotated already, or a given matrix
        is not orthogonal, has another size, or belongs to a part that is not rotated.

    Example:
      >>> from jquant.models import forward, random_model, tiny_config
      >>> from jquant.transforms import fold_norms
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> rotated = rotate(fold_norms(model))
      >>> tokens = jnp.arange(8)[None]
      >>> bool(jnp.allclose(forward(rotated, tokens), forward(model, tokens), atol=1e-4))
      True
      >>> rotated.layers[0].mlp.down_proj.input_rotation.describe()
      'hadamard 12 x 8'
    """
    check_rotation(model, parts)
    _check_norms(model, parts)
    _check_turns(turns, model.config, parts)
    residual = residual_rotation(model.config.hidden_size, matrix, seed) if "residual" in parts else None
    if residual is not None:
        residual = _then(residual, turns.residual)
    values = [None] * len(blocks(model)) if turns.values is None else turns.values
    return dataclasses.replace(
        model,
        embed_tokens=model.embed_tokens if residual is None else on_host(residual, model.embed_tokens),
        layers=tuple(
            _rotate_block(layer, model.config, parts, residual, turn)
            for layer, turn in zip(blocks(model), values, strict=True)
        ),
        lm_head=None if model.lm_head is None else rotate_linear(model.lm_head, residual, None),
    )


def check_rotation(model: Llama, parts: Sequence[RotatedPart]) -> None:
    """Refuses what cannot be rotated, as far as the structure tells.

    Raises:
      FormatError: the model is quantized or stacked, or has an online rotation where one is asked for.
    """
    check_unquantized(model)
    if not parts or len(set(parts)) < len(parts):
        raise FormatError(f"parts {list(parts)}: name at least one of residual, values, keys, mlp, each once")
    for index, layer in enumerate(blocks(model)):
        for part in parts:
            if part in _ONLINE and get(layer, _ONLINE[part]) is not None:
                raise FormatError(f"layers.{index}.{_ONLINE[part]} is there already: rotate each part once")


def residual_rotation(size: int, matrix: OrthogonalMatrix, seed: int) -> Operator:
    """Returns R1 as an operator on float64 vectors: h to M(size) (signs * h), or to a Haar-random matrix times h."""
    rotation = online_rotation(size, seed=seed)
    if matrix == "haar":
        rotation = OnlineRotation(size=size, order=size, matrix="haar", seed=seed)
    signs = random_signs(size, seed) if rotation.matrix == "hadamard" else np.ones(size)

    def turn(vectors: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
        return rotation.on_host(vectors * signs)

    return turn


def rotate_linear(layer: Linear, inputs: Operator | None, outputs: Operator | None) -> Linear:
    """Rewrites a linear for rotated inputs and outputs: W <- A W B^T, b <- B b, cast once.

    Args:
      layer: a linear with a float kernel [in, out]; abstract will do.
      inputs: A, what its input has gone through; None for the identity.
      outputs: B, what its output shall go through.

    Returns:
      The linear; nothing is done online.
    """
    kernel, bias = layer.kernel, layer.bias
    if inputs is None and outputs is not None:
        kernel = on_host(outputs, kernel)
    elif inputs is not None:
        kernel = on_columns(inputs, kernel) if outputs is None else _on_both(inputs, outputs, kernel)
    if outputs is not None and bias is not None:
        bias = on_host(outputs, bias)
    return dataclasses.replace(layer, kernel=kernel, bias=bias)


def subtract_embedding_mean(model: Llama) -> Llama:
    """Subtracts its mean from each row of the embedding table, as QuaRot's published code does.

    It is a step of a recipe for LayerNorm models and NOT exact for RMS norms: use it to reproduce published figures.

    Raises:
      FormatError: the embedding table is the output projection too.
    """
    if model.lm_head is None:
        raise FormatError("the embedding table is the output projection too: untie the model first (`untie: {}`)")

    def centre(rows: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
        return rows - rows.mean(axis=-1, keepdims=True)

    return dataclasses.replace(model, embed_tokens=on_host(centre, model.embed_tokens))


def _rotate_block(
    layer: Block,
    config: LlamaConfig,
    parts: Sequence[RotatedPart],
    residual: Operator | None,
    turn: Float[np.ndarray, "dim dim"] | None,
) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    heads, dim = config.num_attention_heads, config.head_dim
    own = online_rotation(dim)
    across = online_rotation(heads * dim, stride=dim) if "values" in parts and heads > 1 else None
    inner = online_rotation(config.intermediate_size) if "mlp" in parts else None
    to_values = from_values = None
    if "values" in parts:
        to_values = _then(repeat_rotation(own, config.num_key_value_heads).on_host, turn)
        from_values = _then(repeat_rotation(own, heads).on_host, turn, across)
    o_proj = rotate_linear(attention.o_proj, from_values, residual)
    down_proj = rotate_linear(mlp.down_proj, None if inner is None else inner.on_host, residual)
    return dataclasses.replace(
        layer,
        self_attn=dataclasses.replace(
            attention,
            q_proj=rotate_linear(attention.q_proj, residual, None),
            k_proj=rotate_linear(attention.k_proj, residual, None),
            v_proj=rotate_linear(attention.v_proj, residual, to_values),
            o_proj=o_proj if across is None else dataclasses.replace(o_proj, input_rotation=across),
            query_key_rotation=own if "keys" in parts else attention.query_key_rotation,
        ),
        mlp=dataclasses.replace(
            mlp,
            gate_proj=rotate_linear(mlp.gate_proj, residual, None),
            up_proj=rotate_linear(mlp.up_proj, residual, None),
            down_proj=down_proj if inner is None else dataclasses.replace(down_proj, input_rotation=inner),
        ),
    )


def _then(first: Operator, turn: Float[np.ndarray, "n n"] | None, last: OnlineRotation | None = None) -> Operator:
    """Returns `first`, then a given matrix on each run of its width, then `last`."""

    def act(vectors: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
        turned = first(vectors)
        if turn is not None:
            turned = (turned.reshape(*turned.shape[:-1], -1, len(turn)) @ turn.T).reshape(turned.shape)
        return turned if last is None else last.on_host(turned)

    return act


def _on_both(inputs: Operator, outputs: Operator, kernel: Leaf) -> Leaf:
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return kernel
    source = np.asarray(kernel)
    return jnp.asarray(inputs(outputs(source.astype(np.float64)).T).T.astype(source.dtype))


def _check_turns(turns: Turns, config: LlamaConfig, parts: Sequence[RotatedPart]) -> None:
    """Refuses given matrices that do not fit."""
    layers, dim = config.num_hidden_layers, config.head_dim
    rows: tuple[tuple[RotatedPart, np.ndarray | None, tuple[int, ...]], ...] = (
        ("residual", turns.residual, (config.hidden_size, config.hidden_size)),
        ("values", turns.values, (layers, dim, dim)),
    )
    for part, given, shape in rows:
        if given is None:
            continue
        if part not in parts:
            raise FormatError(f"a matrix is given for {part}, which parts {list(parts)} do not rotate: name {part} too")
        if given.shape != shape or given.dtype != np.float64:
            raise FormatError(f"the matrix for {part} is {given.dtype}{list(given.shape)}: give float64{list(shape)}")
        distance = float(np.abs(given.swapaxes(-1, -2) @ given - np.eye(shape[-1])).max())
        if not distance < _ORTHOGONAL:
            raise FormatError(
                f"the matrix for {part} is not orthogonal: T^T T differs from the identity by {distance:.3g}; pass it "
                "through jquant.numerics.nearest_orthogonal if that is rounding"
            )


def _check_norms(model: Llama, parts: Sequence[RotatedPart]) -> None:
    """Refuses to rotate the residual stream under norms that have scales; abstract norms pass."""
    if "residual" not in parts:
        return
    norms = {"norm": model.norm}
    for index, layer in enumerate(blocks(model)):
        norms[f"layers.{index}.input_layernorm"] = layer.input_layernorm
        norms[f"layers.{index}.post_attention_layernorm"] = layer.post_attention_layernorm
    for path, scale in norms.items():
        if not isinstance(scale, jax.ShapeDtypeStruct) and bool((np.asarray(scale) != 1).any()):
            raise FormatError(
                f"{path} has a scale other than one, which does not commute with a rotation of the residual stream: "
                "fold norms first (`fold_norms: {}` in a recipe)"
            )
