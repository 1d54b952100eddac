"""SmoothQuant: move the large channels of activations into the weights that multiply them.

Per-token rounding suffers from channels that are large for every token; weights are rounded per output and bear a large
input row well. For the normed input x of some linears W [in, out], and one factor for each input channel j,

    s_j = max(a_j^alpha / w_j^(1 - alpha), 1e-5),    a_j = max over tokens |x_j|,    w_j = max(max |W_j|, 1e-5)

the last maximum being over the outputs of all linears that share x. x / s and s W have the same product; the norm
before them takes up the division in its scale g, so nothing is left to do at run time:

    g_j <- g_j / s_j,    W_j <- s_j W_j

A channel that calibration never saw alive, a_j = 0, keeps s_j = 1 (the formula would give 1e-5 and a scale 1e5 times as
large); a channel whose weights are all zero counts as w_j = 1e-5.

Only inputs that come from a norm are smoothed: those of q, k, v and of gate, up. The inputs of o_proj and down_proj
come from products with other tokens or channels, and stay.

Xiao et al. 2023, arXiv:2211.10438, equation 4.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant.errors import FormatError
from jquant.formats import QuantizedTensor
from jquant.models import Block, Linear, Llama, blocks, get, put
from jquant.types import compute_dtype

SMALLEST: Final = 1e-5  # floor of weights' maxima and of factors: the published code


class Smoothed(NamedTuple):
    """One smoothed input: whose maxima count, the norm that gives it, and the linears that multiply it."""

    site: str
    norm: str
    linears: tuple[str, ...]


SMOOTHED: Final = (
    Smoothed("attention_input", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Smoothed("mlp_input", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)


def smooth(model: Llama, absmax: Sequence[Mapping[str, Float[Array, "_"]]], alpha: float) -> Llama:
    """Smooths every block of an unquantized model; its outputs stay the same up to rounding.

    Computed in float32 (float64 for a float64 model) and rounded once, to the dtypes that the arrays have.

    Args:
      model: the model, its layers a tuple; abstract blocks stay as they are.
      absmax: for each block, the largest magnitude of each channel of "attention_input" and of "mlp_input", [hidden],
        such as `jquant.calibration.collect_absmax` gives for the full-precision model.
      alpha: how much of the difficulty moves to the weights: 0 evens out the weights' rows, 1 the activations.

    Returns:
      The model with other norms' scales and other kernels of q, k, v, gate and up.

    Raises:
      FormatError: alpha is not in 0..1, the model is quantized or stacked, maxima are missing or do not fit, or a
        smoothed array cannot be held by its dtype.

    Example:
      >>> from jquant.models import forward, random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> ones = jnp.ones(64)
      >>> smoothed = smooth(model, [{"attention_input": 9 * ones, "mlp_input": 4 * ones}] * 2, alpha=0.5)
      >>> tokens = jnp.arange(8)[None]
      >>> bool(jnp.allclose(forward(smoothed, tokens), forward(model, tokens), atol=1e-4))
      True
    """
    check_smoothing(model)
    check_alpha(alpha)
    layers = blocks(model)
    if len(absmax) != len(layers):
        raise FormatError(f"maxima of {len(absmax)} blocks given for {len(layers)}; give one mapping for each block")
    smoothed = []
    for index, (layer, largest) in enumerate(zip(layers, absmax, strict=True)):
        if isinstance(layer.input_layernorm, jax.ShapeDtypeStruct):
            smoothed.append(layer)
            continue
        _check_maxima(layer, largest, f"layers.{index}")
        smoothed.append(_smooth_block_jitted(layer, {pair.site: largest[pair.site] for pair in SMOOTHED}, alpha))
        _check_result(smoothed[-1], f"layers.{index}")
    return dataclasses.replace(model, layers=tuple(smoothed))


def check_alpha(alpha: float) -> None:
    """Raises FormatError unless alpha is in 0..1."""
    if not 0 <= alpha <= 1:
        raise FormatError(f"alpha is {alpha}; SmoothQuant takes 0 (even weights) to 1 (even activations), often 0.5")


def check_smoothing(model: Llama) -> None:
    """Refuses a model whose smoothed linears are quantized; abstract models will do.

    Raises:
      FormatError: a kernel of q, k, v, gate or up is packed or its input rounded, or the layers are stacked.
    """
    for index, layer in enumerate(blocks(model)):
        for pair in SMOOTHED:
            for name in pair.linears:
                one: Linear = get(layer, name)
                found = one.kernel if isinstance(one.kernel, QuantizedTensor) else one.input_quantizer
                if found is not None:
                    raise FormatError(
                        f"layers.{index}.{name} is already quantized ({type(found).__name__}): smooth the source "
                        "model, and quantize after it"
                    )


def smooth_block(layer: Block, absmax: Mapping[str, Float[Array, "_"]], alpha: float | Float[Array, ""]) -> Block:
    """Smooths one block; pure and jittable, without checks. See `smooth`."""
    for pair in SMOOTHED:
        kernels = tuple(get(layer, name).kernel for name in pair.linears)
        norm = getattr(layer, pair.norm)
        wide = compute_dtype(kernels[0].dtype)
        factors = smoothing_scales(absmax[pair.site].astype(wide), kernels, alpha)
        layer = put(layer, pair.norm, (norm.astype(wide) / factors).astype(norm.dtype))
        for name, kernel in zip(pair.linears, kernels, strict=True):
            layer = put(layer, f"{name}.kernel", (kernel.astype(wide) * factors[:, None]).astype(kernel.dtype))
    return layer


def smoothing_scales(
    absmax: Float[Array, "in"], kernels: tuple[Float[Array, "in _"], ...], alpha: float | Float[Array, ""]
) -> Float[Array, "in"]:
    """Returns the factors s of the input channels, in the dtype of `absmax`; 1 where absmax is 0.

    Args:
      absmax: largest magnitude of each channel of the shared input.
      kernels: the matrices [in, out] that multiply it.
      alpha: the exponent.

    Example:
      >>> kernel = jnp.array([[0.4], [0.1], [1.0], [1.0]])
      >>> [round(float(s), 4) for s in smoothing_scales(jnp.array([2.0, 10.0, 0.5, 0.0]), (kernel,), 0.5)]
      [2.2361, 10.0, 0.7071, 1.0]
    """
    own = absmax.dtype
    exponent = jnp.asarray(alpha, own)
    largest = jnp.stack([jnp.max(jnp.abs(kernel.astype(own)), axis=1) for kernel in kernels]).max(axis=0)
    weights = jnp.maximum(largest, jnp.asarray(SMALLEST, own))
    alive = absmax > 0
    factors = jnp.where(alive, absmax, 1.0).astype(own) ** exponent / weights ** (1 - exponent)
    return jnp.where(alive, jnp.maximum(factors, jnp.asarray(SMALLEST, own)), 1.0).astype(own)


_smooth_block_jitted = jax.jit(smooth_block)


def _check_maxima(layer: Block, absmax: Mapping[str, Float[Array, "_"]], path: str) -> None:
    for pair in SMOOTHED:
        if pair.site not in absmax:
            raise FormatError(
                f"{path}: no maxima of {pair.site}, only of {', '.join(absmax) or 'nothing'}; collect them"
            )
        largest, features = absmax[pair.site], getattr(layer, pair.norm).shape[0]
        if largest.shape != (features,):
            raise FormatError(f"{path}: maxima of {pair.site} have shape {largest.shape}; expected ({features},)")
        if not bool(jnp.all(jnp.isfinite(largest) & (largest >= 0))):
            raise FormatError(f"{path}: maxima of {pair.site} are negative or not finite; collect them again")


def _check_result(layer: Block, path: str) -> None:
    for pair in SMOOTHED:
        arrays = {pair.norm: getattr(layer, pair.norm)} | {name: get(layer, name).kernel for name in pair.linears}
        for name, array in arrays.items():
            if not bool(jnp.all(jnp.isfinite(array))):
                raise FormatError(
                    f"{path}.{name}: a smoothed value is too large for {array.dtype}; load the model in float32 or "
                    "bfloat16, or bring alpha nearer to 0.5"
                )
