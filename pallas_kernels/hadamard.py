"""Hadamard rotation and quantization of activations in one pass: bfloat16 in, integer codes and a scale per token out.

    Y = (L X R^T) / sqrt(order),    a token's n numbers seen as X [slow, fast]
    symmetric    scale = clip * max|Y| / q,  q = 2^(bits - 1) - 1,    code = round(Y / scale)
    asymmetric   low = clip * min(Y, 0), high = clip * max(Y, 0), scale = (high - low) / (2^bits - 1),
                 zero = round(-low / scale) - 2^(bits - 1),           code = round(Y / scale) + zero

A Hadamard matrix of order K 2^p is the Kronecker product of L = H_K (x) Sylvester [slow, slow] and R = Sylvester
[fast, fast]; all entries are +-1, exact in bfloat16, so both products run on the tensor cores. R = identity mixes
across a stride instead (the heads of attention). A warpgroup keeps a token from its load to its codes:

                 fast             L [slow, slow] and R [fast, fast] stay in shared memory for the kernel's life.
            +------------+        64 rows of L, with X from shared memory -> T [64, fast], float32 -> bfloat16 in
    64 rows | L X -> T   |        registers, which are the next product's operand: T R^T -> Y [64, fast], float32, and
    of slow | T R^T -> Y |        all of Y [slow, fast] stays in registers. Its largest magnitude goes over threads by
            |     :      |        shuffles and over warps through 256 bytes of shared memory; the codes leave by one
            +------------+        copy. The next token's X is copied as soon as the last T is there.

Rounding T to bfloat16 moves Y by 2^-9 of itself: one code in twenty differs by one from that of float32 at 8 bits.

Roofline: 2 n bytes read and n written for each token, over the memory's bandwidth; the products take less (3.1 million
operations for the 24 KB of a token of 8192 numbers). Measured 2026-11-22 on an H100 80GB HBM3 (jax 0.11.2, kernel time
by CUPTI, median, tokens beyond the cache; a copy runs at 2937 GB/s; `python -m pallas_kernels.bench --kinds rotation`
measures anew), 2048 tokens of bfloat16, 8-bit codes:

    n       slow x fast   us     bytes moved           XLA, two products and the grid
    4096    64 x 64       10.5   2390 GB/s, 81 %        52.9
    8192    64 x 128      20.9   2409 GB/s, 82 %       116.1
    14336   112 x 128     36.2   2434 GB/s, 83 %       211.5
    11008   172 x 64      94.1   XLA pads 172 rows to 176 before and cuts them after: 34.0 without; XLA alone 190.1

and on an H200 (a copy runs at 3361 GB/s there): 4096 9.2 us, 8192 16.6 (90 %), 14336 31.5, 1536 (48 x 32) 6.9; XLA
takes 3.4 to 5.5 times as long.

The W4A4 product of 8192 inputs takes 26 times as long with 28672 outputs, and 7.6 times with 8192; there, no rotation
that reads its tokens from memory could take less than a tenth.
"""

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32, Int8

from pallas_kernels import compat

SIDE: Final = compat.ROWS_OF_ACCUMULATOR
ROW_TILE: Final = 8  # rows of a tile of shared memory
WIDEST_TILE: Final = 64  # bfloat16 numbers of a swizzled row of 128 bytes
MOST_IN_REGISTERS: Final = 128 * 128  # numbers of Y, padded: 128 registers of a thread
FASTS: Final = (16, 32, 64, 128)
ROUNDER: Final = 1.5 * 2.0**23  # float32: a small number added to it is rounded, half to even, into its last bits

type Symmetry = Literal["symmetric", "asymmetric"]


@dataclass(frozen=True)
class RotationConfig:
    """How the work is divided.

    Attributes:
      warpgroups: warpgroups of a block, each with tokens of its own.
      blocks: blocks; each takes every `blocks`-th token.
      stages: tokens that a warpgroup has in shared memory or under way.
    """

    warpgroups: int = 2
    blocks: int = 132
    stages: int = 1


def rotate_quantize(
    x: BFloat16[Array, "tokens n"],
    left: BFloat16[Array, "padded padded"],
    right: BFloat16[Array, "fast fast"],
    *,
    order: int,
    bits: int = 8,
    clip_ratio: float = 1.0,
    symmetry: Symmetry = "symmetric",
    config: RotationConfig,
    simulate: compat.Simulation | None = None,
) -> tuple[Int8[Array, "tokens n"], Float32[Array, "tokens"], Float32[Array, "tokens"] | None]:
    """Rotates each token's numbers and quantizes them on the token's own grid.

    Args:
      x: activations.
      left: L, its rows and columns padded with zeros to a multiple of 64, from `prepare_rotation`.
      right: R, likewise.
      order: how many numbers the rotation mixes; it divides by the root of it.
      bits: of a code, 2 to 8.
      clip_ratio: share of the range that the grid covers.
      symmetry: which grid.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Returns:
      Codes, scales, and the codes that stand for 0 (None on a symmetric grid).

    Raises:
      ValueError: the matrices do not make up a token, or it has too many numbers.
    """
    (m, n), (padded, fast), simulated = x.shape, (left.shape[0], right.shape[0]), simulate is not None
    slow = n // fast
    if slow * fast != n or compat.whole_tiles(slow, SIDE) * SIDE != padded or fast not in FASTS:
        raise ValueError(f"tokens of {n} numbers, left {left.shape}, right {right.shape}: use `prepare_rotation`")
    if padded * fast > MOST_IN_REGISTERS:
        raise ValueError(f"{padded} x {fast} numbers of a token, at most {MOST_IN_REGISTERS}: rotate in XLA")
    rows = padded if simulated else ROW_TILE * compat.whole_tiles(slow, ROW_TILE)  # copies fill what lies outside
    view = x.reshape(m, slow, fast)
    view = jnp.pad(view, ((0, 0), (0, rows - slow), (0, 0))) if rows != slow else view
    kernel = _Kernel(config, m, rows, padded, fast, order, bits, clip_ratio, symmetry, simulated)
    of_tokens = jax.ShapeDtypeStruct((m,), jnp.float32)
    stored = jax.ShapeDtypeStruct((m, rows, fast), jnp.int8)
    call = compat.kernel(
        kernel.body,
        out=(stored, of_tokens) if symmetry == "symmetric" else (stored, of_tokens, of_tokens),
        scratch=kernel.scratch(),
        grid={"block": config.blocks},
        warpgroups=config.warpgroups,
        simulate=simulate,
    )
    codes, scales, *zeros = call(view, left, right)
    return codes[:, :slow].reshape(m, n), scales, zeros[0] if zeros else None


@dataclass(frozen=True)
class _Kernel:
    """One kernel's sizes and program; `_gmem` names what lies in the GPU's memory, `_smem` in a block's own."""

    config: RotationConfig
    tokens: int
    rows: int
    slow: int
    fast: int
    order: int
    bits: int
    clip_ratio: float
    symmetry: Symmetry
    simulated: bool

    def scratch(self) -> dict[str, Any]:
        """Returns the shared memory and barriers, by the names of the body's arguments."""
        c, shared, bf16 = self.config, compat.SharedMemory, jnp.bfloat16
        inner = compat.tiled(min(self.fast, WIDEST_TILE), bf16)
        plain = self.fast * compat.bits_of(jnp.int8) < compat.LEAST_SWIZZLE
        found = {
            "x_smem": shared((c.warpgroups, c.stages, self.slow, self.fast), bf16, transforms=inner),
            "left_smem": shared((self.slow, self.slow), bf16, transforms=inner),
            "right_smem": shared((self.fast, self.fast), bf16, transforms=inner),
            "out_smem": shared(
                (c.warpgroups, self.slow, self.fast),
                jnp.int8,
                transforms=() if plain else compat.tiled(self.fast, jnp.int8),
            ),
            "largest_smem": shared((c.warpgroups, SIDE), jnp.float32),
            "full": compat.Barrier(num_arrivals=1, num_barriers=c.warpgroups * c.stages),
            "matrices": compat.Barrier(num_arrivals=2),
        }
        return found | ({"bounce": shared((c.warpgroups, SIDE, self.fast), bf16)} if self.simulated else {})

    def body(
        self,
        x_gmem: Any,
        left_gmem: Any,
        right_gmem: Any,
        codes_gmem: Any,
        scales_gmem: Any,
        *zeros_gmem: Any,
        **memory: Any,
    ) -> None:
        """One warpgroup's program."""
        c = self.config
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        x_smem, out_smem = memory["x_smem"].at[warpgroup], memory["out_smem"].at[warpgroup]
        stride = c.blocks * c.warpgroups
        first = block + c.blocks * warpgroup
        steps = lax.div(self.tokens - first + stride - 1, stride)

        def fetch(step: Any, slot: Any) -> None:
            whole = x_gmem.at[first + step * stride, pl.ds(0, self.slow)]
            compat.copy_in(whole, x_smem.at[slot], memory["full"].at[warpgroup * c.stages + slot])

        for slot in range(c.stages):
            pl.when(slot < steps)(functools.partial(fetch, slot, slot))

        @pl.when(warpgroup == 0)
        def _() -> None:
            compat.copy_in(left_gmem, memory["left_smem"], memory["matrices"])
            compat.copy_in(right_gmem, memory["right_smem"], memory["matrices"])

        compat.wait(memory["matrices"])

        def rotate(step: Any, _: Any) -> Any:
            slot, token = lax.rem(step, c.stages), first + step * stride
            compat.wait(memory["full"].at[warpgroup * c.stages + slot])
            turned = []
            for start in range(0, self.slow, SIDE):
                part = self._left(memory["left_smem"].at[pl.ds(start, SIDE)], x_smem.at[slot])
                if start + SIDE == self.slow:
                    pl.when(step + c.stages < steps)(functools.partial(fetch, step + c.stages, slot))
                turned.append(self._right(part, memory, warpgroup))
            scale, factor, shift = self._grid(turned, memory["largest_smem"].at[warpgroup])
            scales_gmem[token] = scale
            if zeros_gmem:
                zeros_gmem[0][token] = shift
            compat.wait_out(0, wait_read_only=True)
            for index, part in enumerate(turned):
                out_smem[index * SIDE : (index + 1) * SIDE] = self._codes(part, factor, shift)
            compat.commit()
            compat.copy_out(out_smem.at[pl.ds(0, self.rows)], codes_gmem.at[token])
            return 0

        lax.fori_loop(0, steps, rotate, 0)
        compat.wait_out(0, wait_read_only=True)

    def _left(self, rows: Any, x_smem: Any) -> Any:
        """Returns 64 rows of L X, rounded to bfloat16."""

        def product(accumulator: Any) -> Any:
            compat.multiply(accumulator, rows, x_smem)
            return accumulator[...]

        return compat.in_scope(product, compat.Accumulator((SIDE, self.fast), jnp.float32)).astype(jnp.bfloat16)

    def _right(self, part: Any, memory: dict[str, Any], warpgroup: Any) -> Any:
        """Returns the part times R^T."""

        def product(accumulator: Any) -> Any:
            bounce = memory["bounce"].at[warpgroup] if self.simulated else None
            compat.multiply(accumulator, part, memory["right_smem"].T, bounce)
            return accumulator[...]

        return compat.in_scope(product, compat.Accumulator((SIDE, self.fast), jnp.float32))

    def _grid(self, parts: list[Any], largest_smem: Any) -> tuple[Any, Any, Any]:
        """Returns the scale, what turns a part's numbers into steps, and the code that stands for 0."""
        share = self.clip_ratio / self.order**0.5
        levels = 2.0**self.bits - 1
        if self.symmetry == "symmetric":
            high = _largest([jnp.abs(part) for part in parts], largest_smem)
            high = jnp.where(high == 0.0, jnp.float32(1 / share), high)  # a token of zeros counts as [-1, 1]
            scale = high * jnp.float32(share / (2 ** (self.bits - 1) - 1))
            return scale, jnp.float32(self.order**-0.5) / scale, jnp.float32(0)
        high = jnp.maximum(_largest(parts, largest_smem), jnp.float32(0))
        low = -jnp.maximum(_largest([-part for part in parts], largest_smem), jnp.float32(0))
        flat = high == low
        high = jnp.where(flat, jnp.float32(1 / share), high)
        low = jnp.where(flat, jnp.float32(-1 / share), low)
        scale = (high - low) * jnp.float32(share / levels)
        zero = jnp.round(-low * jnp.float32(share) / scale) - jnp.float32(2 ** (self.bits - 1))
        return scale, jnp.float32(self.order**-0.5) / scale, zero

    def _codes(self, part: Any, factor: Any, shift: Any) -> Any:
        """Returns round(part * factor) + shift within the grid, as the last byte of a float32 near `ROUNDER`."""
        half = 2 ** (self.bits - 1)
        values = part * factor + (shift + jnp.float32(ROUNDER))
        if self.symmetry == "asymmetric" or self.clip_ratio < 1:
            values = jnp.clip(values, jnp.float32(ROUNDER - half), jnp.float32(ROUNDER + half - 1))
        return lax.bitcast_convert_type(values, jnp.int32).astype(jnp.int8)


def _largest(parts: list[Any], largest_smem: Any) -> Any:
    """Returns the largest number of all parts, the same in every thread.

    Rows are reduced by the four threads that share one. Then every warp reads all 64 of them: Pallas' own reduction
    over warps uses one scratch memory for all warpgroups of a block, which would mix their tokens.
    """
    top = parts[0]
    for part in parts[1:]:
        top = jnp.maximum(top, part)
    largest_smem[...] = jnp.max(top, axis=1)
    return jnp.max(compat.load(largest_smem, compat.COLUMNS), axis=0)
