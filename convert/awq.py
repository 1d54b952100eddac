"""AWQ folders in the layout of AutoAWQ's GEMM kernels, read only: compressed-tensors holds the same and is alive.

For a linear M of shape (in, out) and G groups, w[i, o] = scales[g, o] * (u[i, o] - z[g, o]) with 4 bits:

    M.qweight  int32 [in, out / 8]   codes u, interleaved along outputs (`convert.words`)
    M.qzeros   int32 [G, out / 8]    zeros, in the same way
    M.scales   float16 [G, out]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final, override

import numpy as np
from jaxtyping import Shaped

from convert import words
from convert.packed import FLOATS, PackedScheme, Slot, abstract_uniform, stream_along_inputs, uniform_of_arrays
from jquant.errors import ConversionError
from jquant.formats import UniformFormat
from jquant.models import Linear

BITS: Final = 4
_PER_WORD: Final = words.WORD // BITS


@final
@dataclass(frozen=True)
class AwqScheme(PackedScheme):
    """One linear of an AWQ folder.

    Attributes:
      group_size: inputs that share a grid; None for all of them.
    """

    group_size: int | None

    @override
    def slots(self, shape: tuple[int, int]) -> Mapping[str, Slot]:
        inputs, outputs = shape
        groups = self._format("float16").groups(inputs)
        if outputs % _PER_WORD:
            raise ConversionError(f"a linear of {outputs} outputs does not fill AWQ's words of {_PER_WORD}")
        return {
            "qweight": Slot((inputs, outputs // _PER_WORD), ("I32",)),
            "qzeros": Slot((groups, outputs // _PER_WORD), ("I32",)),
            "scales": Slot((groups, outputs), FLOATS),
        }

    @override
    def decode(self, arrays: Mapping[str, Shaped[np.ndarray, "..."]], shape: tuple[int, int]) -> Linear:
        codes = words.unpack_interleaved(np.ascontiguousarray(arrays["qweight"]))
        zeros = words.unpack_interleaved(np.ascontiguousarray(arrays["qzeros"]))
        scales = np.ascontiguousarray(arrays["scales"])
        stream = stream_along_inputs(codes, BITS)
        kernel: Any = uniform_of_arrays(stream, scales, zeros, self._format(str(scales.dtype)), shape)
        return Linear(kernel)

    @override
    def abstract(self, shape: tuple[int, int], scale_dtype: str) -> Linear:
        kernel: Any = abstract_uniform(self._format(scale_dtype), shape)
        return Linear(kernel)

    def _format(self, dtype: str) -> UniformFormat:
        return UniformFormat(BITS, self.group_size, "asymmetric", dtype)  # type: ignore[arg-type]


def read_schemes(config: Mapping[str, Any], names: Sequence[str], packed: frozenset[str]) -> dict[str, AwqScheme]:
    """Reads a `quantization_config`; arguments and result as those of `convert.gptq.read_schemes`.

    Raises:
      ConversionError: the section asks for another layout than GEMM, or for other bits than 4.
    """
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm" or not config.get("zero_point", True):
        raise ConversionError(
            f"AWQ of {bits!r} bits, version {version!r}, zero_point {config.get('zero_point')!r} is not supported; "
            "supported: 4 bits, gemm, true"
        )
    if not isinstance(size, int) or size == 0 or size < -1:
        raise ConversionError(f"group_size {size!r} is no size of a group")
    return {name: AwqScheme(None if size == -1 else size) for name in names if name in packed}
