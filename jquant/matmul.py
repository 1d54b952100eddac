"""The one multiplication: a rule table says how an activation meets a weight in its format and layout."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jquant import kernels
from jquant.errors import FormatError
from jquant.formats import (
    BinaryTensor,
    CenteredTensor,
    Layout,
    PermutedTensor,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedSpqrTensor,
    PreparedWideTensor,
    QuantizedActivation,
    QuantizedTensor,
    RazoredActivation,
    RazoredTensor,
    RotatedTensor,
    ShardedTensor,
    SplitActivation,
    SpqrTensor,
    UndividedActivation,
    UniformActivation,
    UniformTensor,
)
from jquant.numerics import CHUNK, affine_product, lookup_product, unpack
from jquant.types import compute_dtype

type Weight = Float[Array, "in out"] | QuantizedTensor
type Activation = Float[Array, "*batch in"] | QuantizedActivation
type MatmulRule = Callable[[Any, Any], jax.Array]

MOST_FEATURES: Final = 32  # features of outliers that one kernel takes
LOOKUP_ROWS: Final = 4  # activations up to which tables beat the dense product on CPU: benchmarks/lookup_matmul.py


def dense(weight: Any, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "in out"]:
    """Returns the dense weight [in, out] that a weight in any format stands for, in `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.astype(dtype)


def matmul(x: Activation, weight: Any) -> Float[Array, "*batch out"]:
    """Multiplies an activation by a weight; equals `x @ dense(weight)` up to rounding, whichever rule runs.

    Of a quantized activation, x is what it dequantizes to. Sums are float32 (float64 for float64 activations), of
    products of integers int32 with the scales after; the result has the activation's dtype.

    Weights that are prepared for kernels take x rounded to bfloat16, where it is numbers, and give products rounded to
    bfloat16, whatever the activation's dtype.

    Args:
      x: activations [..., in], as numbers or as a `QuantizedActivation`.
      weight: an array [in, out] or a `QuantizedTensor` of that shape; under `jax.shard_map` a device's part of one.

    Returns:
      The product [..., out], in the dtype of `x`.

    Raises:
      FormatError: the table of rules has no row for the two.

    Example:
      >>> matmul(jnp.ones((1, 2)), jnp.array([[1.0], [2.0]])).tolist()
      [[3.0]]
    """
    if isinstance(weight, ShardedTensor):
        if isinstance(x, UniformActivation) and weight.gathers_products() and _can_scale_late(x, weight.inner):
            return _scaled_late(x, weight)
        return weight.collect(matmul(x, weight.inner))
    operand = type(x) if isinstance(x, QuantizedActivation) else jax.Array
    kind = type(weight) if isinstance(weight, QuantizedTensor) else jax.Array
    layout = weight.layout if isinstance(weight, QuantizedTensor) else Layout.PORTABLE
    rule = _RULES.get((operand, kind, layout))
    if rule is None:
        raise FormatError(
            f"no rule multiplies a {operand.__name__} by a {kind.__name__} in layout {layout.value}: give the table of "
            "jquant/matmul.py a row"
        )
    return rule(x, weight)


def _reference(x: jax.Array, weight: Any) -> jax.Array:
    sums = compute_dtype(x.dtype)
    return jnp.matmul(x, dense(weight, x.dtype), preferred_element_type=sums).astype(x.dtype)


def _permuted(x: jax.Array, weight: PermutedTensor) -> jax.Array:
    return matmul(x[..., weight.order[:, 0]], weight.inner)


def lookup_matmul(x: Float[Array, "*batch in"], weight: BinaryTensor) -> Float[Array, "*batch out"]:
    """Multiplies by tables of partial sums, as LUT-GEMM does; equals `x @ dense(weight)` up to rounding.

    Args:
      x: activations [..., in].
      weight: binary codes whose groups are multiples of 8 inputs.

    Returns:
      The product [..., out], summed in float32 (float64 for float64), in the dtype of `x`.

    Raises:
      FormatError: a group is no multiple of 8 inputs, so that a byte of signs has two alphas.

    Reference: arXiv:2206.09557, section 3.
    """
    if not _has_whole_bytes(weight):
        size = weight.format.group_size or weight.shape[0]
        raise FormatError(f"groups of {size} inputs: table lookup needs multiples of {CHUNK}; use matmul")
    sums = compute_dtype(x.dtype)
    offsets = None if weight.offsets is None else weight.offsets.astype(sums)
    return lookup_product(x.astype(sums), weight.signs, weight.alphas.astype(sums), offsets).astype(x.dtype)


def _has_whole_bytes(weight: BinaryTensor) -> bool:
    return weight.shape[0] % (CHUNK * weight.format.groups(weight.shape[0])) == 0


def _binary(x: jax.Array, weight: BinaryTensor) -> jax.Array:
    if math.prod(x.shape[:-1]) > LOOKUP_ROWS or not _has_whole_bytes(weight):
        return _reference(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=lookup_matmul, default=_reference)


def _rotated(x: jax.Array, weight: RotatedTensor) -> jax.Array:
    return weight.rotate_outputs(matmul(weight.rotate_inputs(x), weight.inner))


def _dequantized(x: QuantizedActivation, weight: Any) -> jax.Array:
    """Multiplies what the activation stands for, in float32 or wider, by the weight's own rule for numbers."""
    return matmul(x.dequantize(compute_dtype(x.dtype)), weight).astype(x.dtype)


def _integer(x: UniformActivation, weight: UniformTensor) -> jax.Array:
    """Multiplies int8 by int8 with int32 sums, one product for each run of inputs on one grid of both."""
    (inputs, outputs), bits = weight.shape, weight.format.bits
    *batch, _ = x.codes.shape
    half, sums = 2 ** (bits - 1), x.scales.dtype
    codes = (unpack(weight.codes, bits, inputs).astype(jnp.int16) - half).astype(jnp.int8)
    zeros = None
    if weight.zeros is not None:
        zeros = unpack(weight.zeros, bits, weight.format.groups(inputs)).astype(jnp.int32) - half
    rows = math.prod(batch)
    y = affine_product(
        x.codes.reshape(rows, inputs),
        x.scales.reshape(rows, -1),
        None if x.zeros is None else x.zeros.reshape(rows, -1),
        codes,
        weight.scales.astype(sums),
        zeros,
    )
    return y.reshape(*batch, outputs).astype(x.dtype)


def _can_scale_late(x: UniformActivation, weight: Any) -> bool:
    """Tells whether a product has one scale for a token and one for an output, and is not rounded to a narrow dtype."""
    one = isinstance(weight, UniformTensor) and weight.scales.shape[0] == x.scales.shape[-1] == 1
    return one and jnp.dtype(x.dtype) == x.scales.dtype


def _scaled_late(x: UniformActivation, weight: ShardedTensor) -> jax.Array:
    """Gathers products of integers, scales of outputs as one more row, and scales them after.

    The sum that follows then stands beside the scaling, as on one device: XLA makes one rounding of both on CPU.
    """
    inner, sums = weight.inner, x.scales.dtype
    plain = dataclasses.replace(x, scales=jnp.ones_like(x.scales), dtype=str(sums))
    *batch, _ = x.codes.shape
    products = matmul(plain, dataclasses.replace(inner, scales=jnp.ones_like(inner.scales)))
    rows = jnp.concatenate([products.reshape(math.prod(batch), -1), inner.scales.astype(sums)])
    *_, outputs = (gathered := weight.collect(rows)).shape
    y = x.scales.reshape(-1, 1) * gathered[-1:] * gathered[:-1]
    return y.reshape(*batch, outputs).astype(x.dtype)


def _permuted_integer(x: UniformActivation, weight: PermutedTensor) -> jax.Array:
    """Permutes the codes of tokens with one grid each; with groups, whose members would part, takes the numbers."""
    if x.scales.shape[-1] > 1:
        return _dequantized(x, weight)
    return matmul(dataclasses.replace(x, codes=x.codes[..., weight.order[:, 0]]), weight.inner)


def _float_kernel(x: jax.Array, weight: PreparedFloatTensor) -> jax.Array:
    """Multiplies numbers by the W4A16 kernel that suits their count; x is rounded to bfloat16, as is the product."""
    *batch, inputs = x.shape
    rows = math.prod(batch)
    y = kernels.w4a16(x.reshape(rows, inputs).astype(jnp.bfloat16), weight) if rows else jnp.zeros((0, weight.shape[1]))
    return y.reshape(*batch, weight.shape[1]).astype(x.dtype)


def _undivided_kernel(x: UndividedActivation, weight: PreparedFloatTensor) -> jax.Array:
    """Multiplies a norm by the W4A16 kernel that divides it; padded weights, more tokens and narrow ones divided."""
    *batch, inputs = x.numbers.shape
    rows = math.prod(batch)
    if weight.codes.shape[1] != inputs or not 0 < rows <= x.squares.shape[1]:
        return _dequantized(x, weight)
    y = kernels.w4a16_undivided(x.numbers.reshape(rows, inputs), x.squares, weight, eps=x.eps)
    return y.reshape(*batch, weight.shape[1]).astype(x.dtype)


def _wide_kernel(x: jax.Array, weight: PreparedWideTensor) -> jax.Array:
    """Multiplies up to 64 tokens, rounded to bfloat16, by the W8A16 kernel, and more of them by XLA."""
    from pallas_kernels.decode_config import MOST_TOKENS

    *batch, inputs = x.shape
    rows = math.prod(batch)
    if not 0 < rows <= MOST_TOKENS:
        return _reference(x, weight)
    return kernels.w8a16(x.reshape(rows, inputs).astype(jnp.bfloat16), weight).reshape(*batch, -1).astype(x.dtype)


def _integer_kernel(x: UniformActivation, weight: PreparedIntegerTensor) -> jax.Array:
    """Multiplies integers by the W4A8 or W8A8 kernel that suits their count; groups of a token's inputs have none."""
    if x.scales.shape[-1] > 1:
        return _dequantized(x, weight)
    *batch, _ = x.codes.shape
    rows = math.prod(batch)
    y = kernels.integers(*_tokens(x), None, weight) if rows else jnp.zeros((0, weight.shape[1]))
    return y.reshape(*batch, weight.shape[1]).astype(x.dtype)


def _split_kernel(x: SplitActivation, weight: PreparedIntegerTensor) -> jax.Array:
    """Multiplies integers and up to `MOST_FEATURES` features of outliers by one W8A8 kernel; more by `_split`."""
    *batch, inputs = x.outliers.shape
    rows = math.prod(batch)
    if weight.codes.dtype == jnp.int4 or not rows:
        return _split(x, weight)
    outliers = x.outliers.reshape(rows, inputs).astype(jnp.bfloat16)
    present = jnp.any(outliers != 0, axis=0)
    (features,) = jnp.nonzero(present, size=MOST_FEATURES, fill_value=inputs)  # beyond the last: numbers of 0
    count = jnp.sum(present)

    def together(_: None) -> jax.Array:
        kept = jnp.take(outliers, features, axis=1, mode="fill", fill_value=0)
        y = kernels.integers(*_tokens(x.inner), (kept, jnp.minimum(features, inputs - 1)), weight)
        return y.reshape(*batch, weight.shape[1]).astype(x.dtype)

    return jax.lax.cond(count <= MOST_FEATURES, together, lambda _: _split(x, weight), None)


def _tokens(x: UniformActivation) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns codes [rows, in], a scale for each row, and a zero if there are any."""
    codes = x.codes.reshape(-1, x.codes.shape[-1])
    zeros = None if x.zeros is None else x.zeros.reshape(-1).astype(jnp.float32)
    return codes, x.scales.reshape(-1).astype(jnp.float32), zeros


def _narrow_kernel(x: jax.Array, weight: PreparedBinaryTensor | PreparedSpqrTensor) -> jax.Array:
    """Multiplies a few tokens, rounded to bfloat16, by the kernel of the weight's format, and more of them by XLA."""
    from pallas_kernels.configs import most_tokens

    *batch, inputs = x.shape
    rows = math.prod(batch)
    if not 0 < rows <= most_tokens("spqr3" if isinstance(weight, PreparedSpqrTensor) else "binary4"):
        return _reference(x, weight)
    y = kernels.narrow(x.reshape(rows, inputs).astype(jnp.bfloat16), weight)
    return y.reshape(*batch, weight.shape[1]).astype(x.dtype)


def _split(x: SplitActivation, weight: Any) -> jax.Array:
    """Adds the product of the integers and that of the outliers, in float32 or wider."""
    wide = compute_dtype(x.dtype)
    inner = dataclasses.replace(x.inner, dtype=str(jnp.dtype(wide)))
    return (matmul(inner, weight) + matmul(x.outliers.astype(wide), weight)).astype(x.dtype)


# Every pair of an activation and a weight. Integers on grids multiply as integers. What `_dequantized` serves has no
# such rule: razored integers have a scale for every few inputs, binary codes eight signs, rotations no integers at all.
# Kernels take what `prepare` gives them: numbers for one of the two prepared tensors, integers for the other.
_PORTABLE: Final = Layout.PORTABLE
_PREPARED: Final = (Layout.HOPPER, Layout.SIMULATED)
_WEIGHTS: Final = (
    jax.Array,
    UniformTensor,
    PermutedTensor,
    BinaryTensor,
    RazoredTensor,
    CenteredTensor,
    RotatedTensor,
    SpqrTensor,
)
_NARROW: Final = (PreparedBinaryTensor, PreparedSpqrTensor)
_OF_NUMBERS: Final = (*_NARROW, PreparedWideTensor)
_RULES: Final[Mapping[tuple[type, type, Layout], MatmulRule]] = {
    (jax.Array, jax.Array, _PORTABLE): _reference,
    (jax.Array, UniformTensor, _PORTABLE): _reference,
    (jax.Array, PermutedTensor, _PORTABLE): _permuted,
    (jax.Array, BinaryTensor, _PORTABLE): _binary,
    (jax.Array, RazoredTensor, _PORTABLE): _reference,
    (jax.Array, CenteredTensor, _PORTABLE): _reference,
    (jax.Array, RotatedTensor, _PORTABLE): _rotated,
    (jax.Array, SpqrTensor, _PORTABLE): _reference,
    **{(UniformActivation, weight, _PORTABLE): _dequantized for weight in _WEIGHTS},
    (UniformActivation, UniformTensor, _PORTABLE): _integer,
    (UniformActivation, PermutedTensor, _PORTABLE): _permuted_integer,
    **{(RazoredActivation, weight, _PORTABLE): _dequantized for weight in _WEIGHTS},
    **{(SplitActivation, weight, _PORTABLE): _split for weight in _WEIGHTS},
    **{(UndividedActivation, weight, _PORTABLE): _dequantized for weight in _WEIGHTS},
    **{(jax.Array, PreparedFloatTensor, layout): _float_kernel for layout in _PREPARED},
    **{(UniformActivation, PreparedFloatTensor, layout): _dequantized for layout in _PREPARED},
    **{(RazoredActivation, PreparedFloatTensor, layout): _dequantized for layout in _PREPARED},
    **{(SplitActivation, PreparedFloatTensor, layout): _split for layout in _PREPARED},
    **{(UndividedActivation, PreparedFloatTensor, layout): _undivided_kernel for layout in _PREPARED},
    **{(jax.Array, PreparedIntegerTensor, layout): _reference for layout in _PREPARED},
    **{(UniformActivation, PreparedIntegerTensor, layout): _integer_kernel for layout in _PREPARED},
    **{(RazoredActivation, PreparedIntegerTensor, layout): _dequantized for layout in _PREPARED},
    **{(SplitActivation, PreparedIntegerTensor, layout): _split_kernel for layout in _PREPARED},
    **{(UndividedActivation, PreparedIntegerTensor, layout): _dequantized for layout in _PREPARED},
    **{(jax.Array, PreparedWideTensor, layout): _wide_kernel for layout in _PREPARED},
    **{(jax.Array, weight, layout): _narrow_kernel for weight in _NARROW for layout in _PREPARED},
    **{
        (x, weight, layout): _dequantized
        for x in (UniformActivation, RazoredActivation, UndividedActivation)
        for weight in _OF_NUMBERS
        for layout in _PREPARED
    },
    **{(SplitActivation, weight, layout): _split for weight in _OF_NUMBERS for layout in _PREPARED},
}
