"""Configurations of products with options that no GPU has run yet, to be measured beside those in use.

Products by each warp's own instruction (`DecodeConfig.instruction`) in place of a warpgroup's, whose cost is that of 64
columns; binary codes' pieces by one kernel in place of three of XLA's. What is found faster goes into the tables
(`bench --untried --table`), or for narrow weights into the rule of `configs`.
"""

import dataclasses
from typing import Any, Final

from pallas_kernels.configs import Config
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.narrow_case import NarrowCase

COLUMNS: Final = 16  # tokens, up to which a warp's instruction costs less than a warpgroup's by count
SHAPES: Final = ((512, 2, 4, 1), (256, 4, 4, 1), (256, 3, 4, 1), (256, 4, 2, 1), (512, 2, 2, 1), (256, 4, 2, 2))
SHAPES_OF_MORE: Final = ((256, 3, 4, 1), (256, 2, 4, 1), (256, 4, 2, 1), (512, 2, 2, 1), (256, 4, 2, 2))
FEW: Final = 8  # tokens, with which the deepest copies have room
MANY_WEIGHTS: Final = 4e7  # from where on a tile's inputs are not divided between blocks


def untried(case: Any, chosen: Config) -> list[Config]:
    """Returns configurations with the new options that fit a case; none where they do not apply.

    Args:
      case: a `Case` or `NarrowCase`.
      chosen: the configuration in use.

    Example:
      >>> from pallas_kernels.cases import Case
      >>> case = Case("w4a16", 1, 8192, 8192, 64)
      >>> [(each.depth, each.warpgroups) for each in untried(case, case.config())]
      [(512, 4), (256, 4), (256, 4), (256, 2), (512, 2)]
    """
    if not isinstance(chosen, DecodeConfig) or case.tokens > COLUMNS:
        return []
    warps = dataclasses.replace(chosen, rows=64, together=1, instruction="warp")
    if isinstance(case, NarrowCase):
        found = [warps]
        if case.kind != "spqr3":
            found = [dataclasses.replace(each, pieces="by kernel") for each in (warps, chosen)]
        return [*found, dataclasses.replace(warps, depth=256, stages=3)]
    large = case.outputs * case.inputs >= MANY_WEIGHTS
    shapes = SHAPES if case.tokens <= FEW else SHAPES_OF_MORE
    tried = [
        DecodeConfig(depth, stages, warpgroups, splits, 64, splits > 1, barriers="by step", instruction="warp")
        for depth, stages, warpgroups, splits in shapes
        if not (large and splits > 1)
    ]
    return [each for each in tried if each.fault(case.outputs, case.inputs, case.groups) is None]
