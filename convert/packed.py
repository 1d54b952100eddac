"""What a quantized linear is in a foreign folder: which tensors stand for it, and how they become a node of the tree.

Every format here keeps uniform grids, w = scales * (codes - zeros), so that a linear comes back packed as it was
stored: no weight is dequantized and rounded again.
"""

import abc
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8

from convert import words
from jquant.errors import ConversionError
from jquant.formats import PermutedTensor, QuantizedTensor, UniformFormat, UniformTensor
from jquant.models import Linear
from jquant.numerics import packed_length

FLOATS: Final = ("float32", "bfloat16", "float16")


class Slot(NamedTuple):
    """What a tensor must be to be read.

    Attributes:
      shape: as the file orders it.
      dtypes: those that can be read, as `Header.dtype` spells them.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


class PackedScheme(abc.ABC):
    """How one linear is quantized in a foreign format. Final subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def slots(self, shape: tuple[int, int]) -> Mapping[str, Slot]:
        """Returns the tensors that stand for a linear of shape (in, out), by what follows its name."""

    @abc.abstractmethod
    def decode(self, arrays: Mapping[str, Shaped[np.ndarray, "..."]], shape: tuple[int, int]) -> Linear:
        """Returns the linear that the tensors stand for, without its bias.

        Raises:
          ConversionError: what the tensors hold contradicts the scheme; the tensor is named.
        """

    @abc.abstractmethod
    def abstract(self, shape: tuple[int, int], scale_dtype: str) -> Linear:
        """Returns the linear that `decode` would, with `jax.ShapeDtypeStruct` for arrays."""


def read_flag(section: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Returns an entry that is true or false.

    Raises:
      ConversionError: it is something else.
    """
    value = section.get(key, default)
    if not isinstance(value, bool):
        raise ConversionError(f"{key} is {value!r}, neither true nor false")
    return value


def abstract_uniform(format: UniformFormat, shape: tuple[int, int]) -> UniformTensor:
    """Returns a uniform tensor with `jax.ShapeDtypeStruct` for arrays."""
    inputs, outputs = shape
    groups = format.groups(inputs)

    def make(rows: int, dtype: str = "uint8") -> Any:
        return jax.ShapeDtypeStruct((rows, outputs), jnp.dtype(dtype))

    return UniformTensor(
        codes=make(packed_length(inputs, format.bits)),
        scales=make(groups, format.scale_dtype),
        zeros=make(packed_length(groups, format.bits)) if format.symmetry == "asymmetric" else None,
        format=format,
        shape=shape,
    )


def stream_along_inputs(codes: UInt8[np.ndarray, "in out"], bits: int) -> UInt8[np.ndarray, "bytes out"]:
    """Packs codes along the first axis into the byte stream of `UniformTensor`."""
    packed = words.pack_words(np.ascontiguousarray(codes.T), bits)
    return words.bytes_of_words(np.ascontiguousarray(packed.T), packed_length(len(codes), bits))


def codes_of_stream(stream: UInt8[np.ndarray, "bytes out"], bits: int, count: int) -> UInt8[np.ndarray, "{count} out"]:
    """Unpacks the byte stream of `UniformTensor`; the inverse of `stream_along_inputs`."""
    packed = np.ascontiguousarray(words.words_of_bytes(stream).T)
    return np.ascontiguousarray(words.unpack_words(packed, bits, count).T)


def uniform_of_arrays(
    stream: UInt8[np.ndarray, "bytes out"],
    scales: Float[np.ndarray, "groups out"],
    zeros: UInt8[np.ndarray, "groups out"] | None,
    format: UniformFormat,
    shape: tuple[int, int],
) -> UniformTensor:
    """Returns the node of a packed stream, scales and unpacked zeros.

    Raises:
      ConversionError: a scale is not finite.
    """
    if not np.isfinite(scales.astype(np.float32)).all():
        place = [int(index) for index in np.argwhere(~np.isfinite(scales.astype(np.float32)))[0]]
        raise ConversionError(f"its scale of group {place[0]} and output {place[1]} is not finite")
    return UniformTensor(
        codes=jnp.array(stream),
        scales=jnp.array(scales),
        zeros=None if zeros is None else jnp.array(stream_along_inputs(zeros, format.bits)),
        format=format,
        shape=shape,
    )


def zeros_of(tensor: UniformTensor) -> UInt8[np.ndarray, "groups out"]:
    """Returns the zeros of a uniform tensor, one code for each group and output."""
    if tensor.zeros is None:
        return np.full(tensor.scales.shape, 2 ** (tensor.format.bits - 1), np.uint8)
    return codes_of_stream(np.asarray(tensor.zeros), tensor.format.bits, tensor.scales.shape[0])


def permute(tensor: UniformTensor, groups: Int32[np.ndarray, "in"]) -> PermutedTensor:
    """Returns a tensor whose codes lie in the model's order while each input names its group.

    Args:
      tensor: codes in the model's order, grids in the order of groups.
      groups: the group of each input (`g_idx`).

    Raises:
      ConversionError: a group does not exist or does not have as many inputs as the others.
    """
    inputs, bits = tensor.shape[0], tensor.format.bits
    count = tensor.scales.shape[0]
    members = np.bincount(groups, minlength=count) if groups.min(initial=0) >= 0 else np.zeros(0, np.int64)
    if members.shape != (count,) or (members != inputs // count).any():
        raise ConversionError(
            f"its g_idx does not put {inputs // count} inputs into each of {count} groups; the checkpoint is damaged"
        )
    order = np.argsort(groups, kind="stable").astype(np.int32)
    codes = codes_of_stream(np.asarray(tensor.codes), bits, inputs)[order]
    inner: QuantizedTensor = tensor.replace(codes=jnp.array(stream_along_inputs(codes, bits)))  # type: ignore[attr-defined]
    return PermutedTensor(inner=inner, order=jnp.array(order[:, None]), shape=tensor.shape)


def same_weight(one: Any, other: Any) -> bool:
    """Tells whether two tensors stand for the same weight, bit for bit in float32."""
    plain = isinstance(one, UniformTensor) and isinstance(other, UniformTensor)
    if plain and (one.zeros is None) == (other.zeros is None):
        pairs = ((one.codes, other.codes), (one.zeros, other.zeros), (one.scales, other.scales))
        return all(np.array_equal(_wide(left), _wide(right)) for left, right in pairs if left is not None)
    return np.array_equal(dense_on_host(one), dense_on_host(other))


def dense_on_host(tensor: QuantizedTensor) -> Float[np.ndarray, "in out"]:
    """Returns scales * (codes - zeros) in float32 of a uniform tensor, permuted or not, without compiling anything."""
    if isinstance(tensor, PermutedTensor):
        dense = dense_on_host(tensor.inner)
        return dense[np.argsort(np.asarray(tensor.order)[:, 0])]
    assert isinstance(tensor, UniformTensor), "no other is packed"
    inputs, outputs = tensor.shape
    codes = codes_of_stream(np.asarray(tensor.codes), tensor.format.bits, inputs).astype(np.float32)
    scales, zeros = _wide(tensor.scales)[:, None], zeros_of(tensor).astype(np.float32)[:, None]
    return (scales * (codes.reshape(len(scales), -1, outputs) - zeros)).reshape(inputs, outputs)


def _wide(array: Any) -> np.ndarray:
    """Returns float32 for the narrower floats, which hold the same numbers, and integers as they are."""
    host = np.asarray(array)
    return host if host.dtype == np.uint8 else host.astype(np.float32)
