"""Inline code of `wide`: 8-bit codes become the tensor cores' operand.

As `inline`, for a GPU alone: in the interpreter the kernel computes the same in jnp.
"""

from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels import compat

# Two's complement: the low seven bits, less 128 where the sign is set; bfloat16 holds 128 + seven bits, 128 and 256.
_PTX: Final = """{ .reg .b32 t, low, sign, bias; mov.b32 bias, 0x43004300; shr.u32 t, $2, 8;
lop3.b32 low, $2, 0x007F007F, bias, 0xEA; lop3.b32 sign, $2, 0x00800080, bias, 0xEA; sub.bf16x2 $0, low, sign;
lop3.b32 low, t, 0x007F007F, bias, 0xEA; lop3.b32 sign, t, 0x00800080, bias, 0xEA; sub.bf16x2 $1, low, sign; }"""


def unpack_bytes(codes: Any, shape: tuple[int, int]) -> Any:
    """Turns stored codes into the tensor cores' bfloat16 operand, in registers.

    Args:
      codes: a reference to int8 `shape` in shared memory, in the order of `wide`.
      shape: (rows, columns).
    """

    def convert(_: Any, packed: Any) -> Any:
        layout = compat.C.to_mgpu()
        out = np.empty(layout.registers_shape(shape), dtype=object)
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        both = llvm.StructType.get_literal([word, word])
        for index, register in np.ndenumerate(packed.registers):
            found = llvm.inline_asm(both, [mgpu.utils.bitcast(register, word)], _PTX, "=r,=r,r")
            for half in range(2):
                place = [0] * out.ndim
                place[0], place[1], place[4] = index[0], 2 * index[1] + half, index[4]
                out[tuple(place)] = mgpu.utils.bitcast(llvm.extractvalue(word, found, (half,)), pair)
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, compat.C)
    inline: Any = plgpu.inline_mgpu(arg_types=(compat.INT8_OPERAND,), return_type=result)
    return inline(convert)(compat.load(codes, compat.INT8_OPERAND))
