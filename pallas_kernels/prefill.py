"""Matrix products of many tokens, bound by the tensor cores: W4A16, W8A8 and W4A8, one program.

    y[m, n] = sum_k x[m, k] * scales[k // g, n] * (codes[n, k] - zeros[k // g, n])                             W4A16
    y[m, n] = token_scales[m] * (scales[n] * sum_k x[m, k] * codes[n, k] - token_zeros[m] * sums[n]       W8A8, W4A8
                                 - shifts[n] * sum_k x[m, k])

A block stays on its multiprocessor and walks over tiles of `warpgroups` x 64 outputs by `tokens`, in an order that
keeps neighbouring blocks' operands in the second cache; one more warpgroup does nothing but copy, `stages` copies ahead
and from tile to tile without a pause. The blocks of a cluster, side by side along the outputs, get the same activations
by one copy:

                    tokens
                +------------+   A step of depth k: 64 outputs' codes -> registers (int4 to bfloat16 or int8) or, int8,
    64 outputs  | warpgroup 0|   shared memory; wgmma with x.T [k, tokens] from shared memory -> [64, tokens].
    64 outputs  | warpgroup 1|   At a tile's end: scales of rows and columns, transposed through shared memory, stored
                +------------+   [m, out] by the copy engine while the next tile's first operands arrive.

A group's scale, rounded to bfloat16, is multiplied into the bfloat16 weight, which is rounded once more; scales of
integers come after the exact int32 sums. One warpgroup adds all of a tile's inputs in order: the same inputs give the
same bits.

Roofline: 2 m n k over the tensor cores' rate: XLA's bfloat16 product of 8192^3 runs at 821 TFLOP/s on the card that was
measured, its int8 product at 1570. Measured with this kernel's draft, 2026-11-22, on an H100 80GB HBM3 (jax 0.11.2,
kernel time by CUPTI, median; `python -m pallas_kernels.bench` measures anew), m = 2048, n = k = 8192; XLA's bfloat16
product takes 332 us, its int8 product with scales 247:

    W4A16    329.5 us    834 TFLOP/s    1.01 times XLA's bfloat16
    W8A8     168.3 us   1634 TOP/s      1.97 times, and 1.46 times XLA's int8
    W4A8     158.5 us   1734 TOP/s      2.10 times, and 1.56 times XLA's int8

Outliers (LLM.int8) are one more product of a tile's end: 32 features take 191.1 us where W8A8 alone takes 172.2 and XLA
beside it 247.4, one XLA kernel that gathers the weight's columns included (H100, 2026-11-22, one run).
"""

import dataclasses
from dataclasses import dataclass
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int, Int8

from pallas_kernels import compat, order
from pallas_kernels.tiles import LEAST_PIECE, Kind, Tiles
from pallas_kernels.weights import Scales

PADDED: Final = 8  # tokens are a multiple of it
MOST_SHARED: Final = 226 * 1024  # bytes of shared memory that a block may plan with
OUTLIERS: Final = 32  # features kept as numbers are a multiple of it: rows of 64 bytes in shared memory


@dataclass(frozen=True)
class PrefillConfig:
    """How the work is divided.

    Attributes:
      tokens: tokens of a tile, at most 256.
      depth: inputs of one step.
      stages: steps whose operands are under way.
      warpgroups: warpgroups that multiply, each 64 outputs.
      cluster: blocks side by side along the outputs that share their activations.
      blocks: blocks that walk over the tiles; 0 for one block for each tile.
      width: tiles after which the walk turns, so that its operands stay in the second cache.
      along: the direction of the walk's turns.
      spill: tokens that are written at a time.
      splits: 2 for blocks by twos, each with half of the inputs, that exchange their sums and store half of the tokens
        each: for so few tokens that smaller tiles would unpack the weights twice. Of bfloat16 alone, one tile a block.
    """

    tokens: int = 256
    depth: int = 64
    stages: int = 4
    warpgroups: int = 2
    cluster: int = 2
    blocks: int = 132
    width: int = 4
    along: Literal["tokens", "outputs"] = "tokens"
    spill: int = 256
    splits: Literal[1, 2] = 1

    def fault(self, outputs: int, inputs: int, groups: int) -> str | None:
        """Returns why a weight cannot be multiplied with this configuration; None where it can."""
        side = compat.ROWS_OF_ACCUMULATOR * self.warpgroups * self.cluster
        if self.warpgroups not in (1, 2):
            return f"{self.warpgroups} warpgroups: one or two multiply, four did not end on an H100"
        if outputs % side:
            return f"{outputs} outputs are no multiple of {side}"
        group = inputs // groups
        if inputs % self.depth or (group % self.depth and self.depth % group):
            return f"{inputs} inputs in groups of {group} and steps of {self.depth} do not divide one another"
        if group % order.RUN or self.depth % LEAST_PIECE:
            return f"groups of {group} are no multiple of {order.RUN}, or steps of {self.depth} none of {LEAST_PIECE}"
        if self.splits > 1 and (self.cluster > 1 or inputs % (self.depth * self.splits) or (groups % 2 and groups > 1)):
            return f"{inputs} inputs in {groups} groups and steps of {self.depth} have no halves, or clusters two uses"
        if (self.tokens // self.splits) % min(self.spill, self.tokens // self.splits):
            return f"{self.tokens} tokens are no multiple of {self.spill} that are written at a time"
        return None


def fitting(config: PrefillConfig, outliers: int) -> PrefillConfig:
    """Returns a configuration for int8 weights with fewer stages where outliers would not fit beside them.

    Example:
      >>> fitting(PrefillConfig(depth=128, spill=64), 64).stages
      3
    """
    side = compat.ROWS_OF_ACCUMULATOR * config.warpgroups
    room = MOST_SHARED - 2 * (outliers * config.tokens + side * min(config.spill, config.tokens))
    return dataclasses.replace(config, stages=min(config.stages, room // (config.depth * (config.tokens + side))))


def w4a16_prefill(
    x: BFloat16[Array, "tokens in"],
    codes: Int[Array, "out in"],
    scales: Scales,
    centers: BFloat16[Array, "groups out"] | None = None,
    *,
    config: PrefillConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies bfloat16 activations by an int4 weight.

    Args:
      x: activations.
      codes: int4 in the order of `order.stored_bf16`.
      scales: the groups' steps; one group is "per channel".
      centers: 136 + zeros; None where all zeros are 0.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight.
    """
    if simulate is not None:  # where the kernel casts them, the interpreter's threads wait for ever on two cores
        scales = scales.astype(jnp.bfloat16)
    return _run("w4a16", x, codes, [scales] if centers is None else [scales, centers], [], [], [], config, simulate)


def integer_prefill(
    x: Int8[Array, "tokens in"],
    token_scales: Float32[Array, "tokens"],
    token_zeros: Float32[Array, "tokens"] | None,
    codes: Int[Array, "out in"],
    scales: Float32[Array, "out"],
    sums: Float32[Array, "out"] | None = None,
    shifts: Float32[Array, "out"] | None = None,
    outliers: tuple[BFloat16[Array, "tokens kept"], BFloat16[Array, "out kept"]] | None = None,
    *,
    config: PrefillConfig,
    simulate: compat.Simulation | None = None,
) -> BFloat16[Array, "tokens out"]:
    """Multiplies int8 activations by an int8 or int4 weight, the sums exact in int32.

    Args:
      x: codes of the activations; 4-bit codes are int8 too.
      token_scales: the step of each token's grid.
      token_zeros: the code that stands for 0, for each token; None where all are 0.
      codes: int8 as they are, or int4 in the order of `order.stored_int8`.
      scales: the step of each output's grid.
      sums: the sums of the weight over its inputs, wanted where `token_zeros` are given.
      shifts: each output's scale times the code that stands for 0; None where all are 0.
      outliers: features kept as numbers, and their codes of the weight, less its zeros: a multiple of 32 of them, whose
        product, times the outputs' scales, is added; None for none.
      config: how the work is divided.
      simulate: run in the interpreter on the CPU with these settings.

    Raises:
      ValueError: the configuration does not fit the weight, or `sums` are wanting, or the number of outliers is odd.
    """
    if outliers is not None and outliers[0].shape[1] % OUTLIERS:
        raise ValueError(f"{outliers[0].shape[1]} features of outliers are no multiple of {OUTLIERS}: fill up with 0")
    rows, columns = [scales], [token_scales]
    if token_zeros is not None:
        if sums is None:
            raise ValueError("tokens have zeros but the weight no sums: give what prepare_w8a8 or prepare_w4a8 returns")
        rows, columns = [scales, sums], [token_scales, token_zeros]
    if shifts is not None:
        rows.append(shifts)
        columns.append(jnp.sum(x, axis=1, dtype=jnp.int32).astype(jnp.float32))
    kind: Kind = "w4a8" if codes.dtype == jnp.int4 else "w8a8"
    return _run(kind, x, codes, [], rows, columns, [] if outliers is None else [*outliers], config, simulate)


def _run(
    kind: Kind,
    x: jax.Array,
    codes: jax.Array,
    grids: list[jax.Array],
    rows: list[jax.Array],
    columns: list[jax.Array],
    outliers: list[jax.Array],
    config: PrefillConfig,
    simulate: compat.Simulation | None,
) -> jax.Array:
    (m, k), n, simulated = x.shape, codes.shape[0], simulate is not None
    groups = grids[0].shape[0] if grids else 1
    fault = config.fault(n, k, groups)
    if config.splits > 1 and kind != "w4a16":
        fault = "products of integers have no splits"
    if fault:
        raise ValueError(f"prefill of a weight [{n}, {k}] with {config}: {fault}")
    token_tiles = compat.whole_tiles(m, config.tokens)
    whole = token_tiles * config.tokens
    padded = whole if simulated else PADDED * compat.whole_tiles(m, PADDED)  # copies fill and drop what lies outside
    x = _padded(x, padded)
    columns = [jnp.pad(each, (0, whole - m)) if whole != m else each for each in columns]
    if outliers:
        outliers = [_padded(outliers[0], padded), outliers[1]]
    output_tiles = n // (compat.ROWS_OF_ACCUMULATOR * config.warpgroups * config.cluster)
    tiles = token_tiles * output_tiles
    most = tiles if config.splits > 1 else (config.blocks or tiles * config.cluster) // config.cluster
    blocks = compat.whole_tiles(tiles, compat.whole_tiles(tiles, most))
    steps = k // config.depth // config.splits
    stages = min(config.stages, steps)
    kernel = Tiles(  # the interpreter waits for ever where a cluster's copies go on from one tile to the next
        kind=kind,
        config=config,
        steps=steps,
        stages=stages,
        group=k // groups,
        grids=len(grids),
        vectors=len(rows),
        kept=outliers[0].shape[1] if outliers else 0,
        token_tiles=token_tiles,
        output_tiles=output_tiles,
        ahead=tiles // blocks >= 2 and steps % stages == 0 and not (simulated and config.cluster > 1),
        simulated=simulated,
    )
    in_xla = simulated and config.splits > 1  # the interpreter has no copies between blocks
    call = compat.kernel(
        kernel.body,
        out=jax.ShapeDtypeStruct(
            (config.splits, padded, n) if in_xla else (padded, n), jnp.float32 if in_xla else jnp.bfloat16
        ),
        scratch=kernel.scratch(x.dtype),
        grid={"block": blocks} | ({"split": config.splits} if in_xla else {}),
        cluster={"peer": config.cluster}
        if config.cluster > 1
        else {"split": 2}
        if config.splits > 1 and not simulated
        else None,
        warpgroups=config.warpgroups + 1,
        manual_barriers=True,
        simulate=simulate,
    )
    y = call(x, codes, *grids, *rows, *columns, *outliers)
    y = y.sum(0).astype(jnp.bfloat16) if in_xla else y
    return y[:m] if padded != m else y


def _padded(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - len(x)), (0, 0))) if rows != len(x) else x
