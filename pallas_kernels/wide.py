"""Matrix products of a few tokens with int8 weights, bound by the memory: W8A16, m <= 64. What an output head needs.

    y[m, n] = scales[n] * sum_k x[m, k] * codes[n, k]        x bfloat16, codes int8, sums float32

The kernel is that of `decode`, but for its operand: all bytes of a step become bfloat16 in registers, exactly, by

    code = (128 + its low seven bits) - (128 + 128 * its sign)

both bfloat16 by a mask and an `or`. A thread's four bytes are two pairs of neighbouring inputs, so that each run of 16
inputs is stored as

    stored[4 t + 2 e + h] = code[8 h + 2 t + e]      t < 4 the thread of four, e, h < 2

No order of additions depends on time. Roofline: n * k bytes over the memory's bandwidth.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int8

from pallas_kernels import compat, inline_wide, meet
from pallas_kernels.decode_config import MOST_TOKENS, PADDED, DecodeConfig

RUN: Final = 16  # inputs of one permutation
PIECE: Final = 128  # inputs that are unpacked at once
ROOM: Final = 226 * 1024  # bytes of shared memory of a block
DEPTHS: Final = (256, 128, 64)


class WideWeight(NamedTuple):
    """An int8 weight for bfloat16 activations.

    Attributes:
      codes: int8 [out, in], every 16 inputs in the order of this file's head.
      scales: float32 [out].
    """

    codes: Int8[Array, "out in"]
    scales: Float32[Array, "out"]


def prepare_w8a16(codes: Int8[Array, "out in"], scales: Float32[Array, "out"]) -> WideWeight:
    """Returns the weight as the kernel reads it; exact.

    Args:
      codes: in the order of the inputs.
      scales: each output's step.

    Raises:
      ValueError: the number of inputs is no multiple of 16.

    Example:
      >>> codes = jnp.arange(16, dtype=jnp.int8)[None]
      >>> [int(code) for code in prepare_w8a16(codes, jnp.ones(1)).codes[0, :8]]
      [0, 8, 1, 9, 2, 10, 3, 11]
    """
    if codes.shape[1] % RUN:
        raise ValueError(f"{codes.shape[1]} inputs are no multiple of {RUN}: pad them")
    return WideWeight(_permuted(codes, (2, 4, 2), (1, 2, 0)), scales.astype(jnp.float32))


def restore_w8a16(weight: WideWeight) -> tuple[Int8[Array, "out in"], Float32[Array, "out"]]:
    """Returns what `prepare_w8a16` was given."""
    return _permuted(weight.codes, (4, 2, 2), (2, 0, 1)), weight.scales


def wide_fault(outputs: int, inputs: int) -> str | None:
    """Returns why the kernel does not multiply a weight; None where it does.

    >>> wide_fault(128256, 4096), wide_fault(49152, 570)
    (None, '570 inputs are no multiple of 64')
    """
    for count, what in ((outputs, "outputs"), (inputs, "inputs")):
        if count % DEPTHS[-1]:
            return f"{count} {what} are no multiple of {DEPTHS[-1]}"
    return None


@functools.cache
def choose_wide(tokens: int, inputs: int) -> DecodeConfig:
    """Returns how the work is divided: two warpgroups a block, two blocks a multiprocessor where activations let them.

    Args:
      tokens: rows of the activations.
      inputs: of the weight.

    Raises:
      ValueError: no configuration divides the inputs.

    Example:
      >>> config = choose_wide(1, 4096)
      >>> config.depth, config.stages, config.warpgroups
      (256, 2, 2)
    """
    for config in _candidates(tokens, inputs):
        return config
    raise ValueError(f"{inputs} inputs are no multiple of {DEPTHS[-1]}: pad them")


def _candidates(tokens: int, inputs: int) -> Iterator[DecodeConfig]:
    columns = compat.columns_of(tokens, integer=False)
    for depth in DEPTHS:
        for warpgroups in (2, 1):
            stages = min(2, inputs // (depth * warpgroups))
            held = warpgroups * stages * depth * (compat.ROWS_OF_ACCUMULATOR + 2 * columns)
            if inputs % (depth * warpgroups) == 0 and held < ROOM - 2 * compat.ROWS_OF_ACCUMULATOR * columns * 4:
                yield DecodeConfig(depth, stages, warpgroups, barriers="by step")


def w8a16_decode(
    x: BFloat16[Array, "tokens in"],
    weight: WideWeight,
    *,
    config: DecodeConfig | None = None,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies bfloat16 activations of at most 64 tokens by an int8 weight: `reference.float_matmul` up to rounding.

    Args:
      x: activations.
      weight: what `prepare_w8a16` returned.
      config: how the work is divided; None for `choose_wide`.
      simulate: run in the interpreter on the CPU with these settings; None on an H100 or H200.

    Raises:
      ValueError: the weight or the number of tokens does not fit.
    """
    (m, k), n = x.shape, weight.codes.shape[0]
    fault = wide_fault(n, k)
    chosen = config or (choose_wide(m, k) if fault is None else DecodeConfig())
    fault = fault or chosen.fault(n, k, 1)
    if m > MOST_TOKENS:
        fault = f"{m} tokens are more than {MOST_TOKENS}: multiply by XLA"
    if fault:
        raise ValueError(f"decode of an int8 weight [{n}, {k}] with {chosen}: {fault}")
    columns = compat.columns_of(m, integer=False)
    if (m > PADDED or simulate is not None) and columns != m:
        x = jnp.pad(x, ((0, columns - m), (0, 0)))
    kernel = _Kernel(chosen, columns, k, meet.clustered(chosen, simulate), simulate is not None)
    y = meet.launch(kernel, [x, *weight], x.shape[0], n, kernel.scratch, simulate)[0]
    return y[:m] if y.shape[0] != m else y


@dataclass(frozen=True)
class _Kernel:
    """The kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: DecodeConfig
    columns: int
    inputs: int
    clustered: bool
    simulated: bool

    @property
    def by_step(self) -> bool:
        return self.config.barriers == "by step"

    @property
    def steps(self) -> int:
        return self.inputs // (self.config.depth * self.config.splits * self.config.warpgroups)

    @property
    def stages(self) -> int:
        return min(self.config.stages, self.steps)

    @property
    def piece(self) -> int:
        return min(PIECE, self.config.depth)

    def scratch(self, result: Any) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, rows = self.config, compat.SharedMemory, self.config.rows
        slots, swizzled = (c.warpgroups, self.stages), 64 if result == jnp.bfloat16 else 32
        bytes_, halves = compat.tiled(self.piece, jnp.int8), compat.tiled(self.piece, jnp.bfloat16)
        found = {
            "x_smem": shared((*slots, self.columns, c.depth), jnp.bfloat16, transforms=halves),
            "codes_smem": shared((*slots, rows, c.depth), jnp.int8, transforms=bytes_),
            "full": compat.Barrier(num_arrivals=2, num_barriers=c.warpgroups * self.stages),
            "out_smem": shared((self.columns, rows), result, transforms=compat.tiled(swizzled, result)),
        }
        if self.simulated:
            found["bounce"] = shared((c.warpgroups, rows, self.piece), jnp.bfloat16)
        return found | meet.scratch(rows, self.columns, c.warpgroups, c.splits if self.clustered else 1)

    def body(self, x_gmem: Any, codes_gmem: Any, scales_gmem: Any, out_gmem: Any, **memory: Any) -> None:
        """One warpgroup's program."""
        c, m, rows = self.config, self.columns, self.config.rows
        warpgroup, split, tile = lax.axis_index("wg"), lax.axis_index("split"), lax.axis_index("tile")
        first = (split * c.warpgroups + warpgroup) * self.steps
        outputs = pl.ds(tile * rows, rows)

        def full(slot: Any) -> Any:
            return memory["full"].at[warpgroup * self.stages + slot]

        def fetch(step: Any, slot: Any) -> None:
            inputs = pl.ds((first + step) * c.depth, c.depth)
            compat.copy_in(codes_gmem.at[outputs, inputs], memory["codes_smem"].at[warpgroup, slot], full(slot))
            compat.copy_in(x_gmem.at[pl.ds(0, m), inputs], memory["x_smem"].at[warpgroup, slot], full(slot))

        def begun() -> Any:
            return compat.cast(jnp.zeros((rows, m), jnp.float32), compat.C)

        def store(sum_: Any) -> None:
            scales = compat.load(scales_gmem.at[outputs], compat.ROWS, checked=False)
            value, target = sum_ * compat.along_rows(scales, sum_.shape), memory["out_smem"]
            target.T[...] = compat.cast(value.astype(target.dtype), compat.C_TRANSPOSED)
            compat.commit()
            compat.copy_out(target, out_gmem.at[0 if self.clustered else split, pl.ds(0, m), outputs])

        def across_splits(sum_: Any) -> None:
            meet.across_cluster(sum_, split, c.splits if self.clustered else 1, memory, store)

        sum_ = meet.walk(self, fetch, lambda sum_, slot: self._add(sum_, warpgroup, slot, memory), begun, full)
        meet.across_warpgroups(sum_, warpgroup, c.warpgroups, memory, across_splits)
        compat.wait_out(0, wait_read_only=True)

    def _add(self, sum_: Any, warpgroup: Any, slot: Any, memory: dict[str, Any]) -> Any:
        """Returns the sum and the product of one copy, a piece unpacked while the one before it is multiplied."""
        rows = self.config.rows
        bounce = memory["bounce"].at[warpgroup] if self.simulated else None

        def product(accumulator: Any) -> Any:
            for start in range(0, self.config.depth, self.piece):
                inputs = pl.ds(start, self.piece)
                codes = memory["codes_smem"].at[warpgroup, slot, :, inputs]
                if self.simulated:
                    operand = _permuted(codes[...], (4, 2, 2), (2, 0, 1)).astype(jnp.bfloat16)
                else:
                    operand = inline_wide.unpack_bytes(codes, (rows, self.piece))
                compat.multiply(accumulator, operand, memory["x_smem"].at[warpgroup, slot, :, inputs].T, bounce)
                if self.simulated:
                    compat.finish(0)
            return accumulator[...]

        return sum_ + compat.in_scope(product, compat.Accumulator((rows, self.columns), jnp.float32))


def _permuted(codes: jax.Array, lengths: tuple[int, int, int], axes: tuple[int, int, int]) -> jax.Array:
    rows, columns = codes.shape
    runs = codes.reshape(rows, columns // RUN, *lengths)
    return jnp.transpose(runs, (0, 1, *(axis + 2 for axis in axes))).reshape(rows, columns)
