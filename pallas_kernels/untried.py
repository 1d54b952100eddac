"""Configurations of products that no GPU has run yet, to be measured beside those in use.

Of W4A16 by warps' own instruction: blocks of one warpgroup, of which a multiprocessor holds four, so that no block
waits for another to end; blocks of 128 outputs, whose activations are copied half as often; zeros subtracted from sums;
inputs divided between the blocks of a cluster. Of SpQR: x spread over its columns in registers, by warps' instruction,
in place of two XLA kernels before. What is found faster goes into the tables (`bench --untried --table`), or for narrow
weights into the rule of `configs`.
"""

import dataclasses
from typing import Any, Final, Literal

from pallas_kernels.configs import Config
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.narrow_case import NarrowCase

type Shape = tuple[int, int, int, int]  # depth, stages, warpgroups, splits
type Zeros = Literal["of codes", "of sums"]

FEW: Final = 8  # tokens: the instruction's least columns
COLUMNS: Final = 16  # tokens, up to which a warp's instruction costs less than a warpgroup's by count
MULTIPROCESSORS: Final = 132
OF_CODES: Final[dict[tuple[int, int, bool], tuple[Shape, ...]]] = {  # by outputs, inputs, and whether tokens are few
    (8192, 8192, True): ((512, 3, 2, 1), (1024, 2, 2, 1)),
    (14336, 4096, True): ((512, 2, 1, 1), (512, 3, 1, 1), (512, 4, 1, 1), (256, 3, 2, 1), (1024, 2, 1, 1)),
    (4096, 14336, True): (
        (512, 2, 2, 2),
        (512, 3, 2, 2),
        (512, 2, 1, 4),
        (512, 3, 1, 4),
        (256, 4, 2, 2),
        (256, 4, 4, 2),
    ),
    (4096, 4096, True): ((512, 2, 2, 2), (512, 2, 1, 2), (512, 2, 1, 4), (256, 4, 1, 4), (512, 1, 4, 2)),
    (28672, 8192, True): ((512, 2, 2, 1), (512, 2, 1, 1), (512, 3, 1, 1)),
    (8192, 28672, True): ((512, 2, 2, 1), (512, 3, 2, 1), (512, 2, 4, 1), (1024, 2, 2, 1)),
    (8192, 8192, False): ((512, 3, 2, 1), (256, 6, 2, 1)),
    (28672, 4096, False): ((256, 3, 2, 1), (256, 2, 2, 1), (512, 3, 1, 1), (512, 2, 1, 1), (256, 4, 1, 1)),
    (14336, 4096, False): ((512, 3, 1, 1), (512, 2, 1, 1), (256, 4, 1, 1), (256, 3, 2, 1), (256, 2, 2, 1)),
    (4096, 14336, False): ((512, 2, 2, 2), (256, 4, 2, 2), (256, 3, 4, 2), (512, 2, 1, 4), (512, 3, 1, 4)),
    (4096, 4096, False): ((512, 2, 2, 2), (256, 2, 4, 2), (512, 2, 1, 2), (256, 4, 1, 4)),
    (6144, 4096, False): ((256, 3, 2, 1), (256, 6, 2, 1)),
    (28672, 8192, False): ((256, 3, 2, 1), (512, 3, 1, 1), (512, 2, 1, 1), (256, 4, 1, 1)),
    (8192, 28672, False): ((512, 2, 2, 1), (512, 3, 2, 1), (256, 4, 2, 1)),
}
OF_SUMS: Final[dict[tuple[int, int, bool], tuple[Shape, ...]]] = {
    (8192, 8192, True): ((512, 2, 2, 1),),
    (14336, 4096, True): ((512, 3, 1, 1),),
    (4096, 14336, True): ((512, 3, 2, 2),),
    (4096, 4096, True): ((256, 4, 2, 2), (512, 2, 2, 2)),
    (28672, 8192, True): ((512, 3, 1, 1),),
    (8192, 28672, True): ((512, 3, 2, 1),),
    (8192, 8192, False): ((512, 2, 2, 1), (256, 4, 2, 1), (512, 3, 2, 1)),
    (14336, 4096, False): ((512, 3, 1, 1),),
    (4096, 14336, False): ((512, 2, 2, 2),),
    (4096, 4096, False): ((256, 4, 2, 2), (512, 2, 2, 2)),
    (6144, 4096, False): ((256, 4, 2, 1), (512, 2, 2, 1)),
    (8192, 28672, False): ((512, 2, 2, 1),),
}
OF_WIDE: Final[dict[tuple[int, int, bool], tuple[tuple[Shape, Zeros], ...]]] = {  # blocks of 128 outputs
    (28672, inputs, False): (((256, 4, 1, 1), "of codes"), ((512, 2, 1, 1), "of codes"), ((256, 4, 1, 1), "of sums"))
    for inputs in (4096, 8192)
}
OF_SPQR: Final[tuple[Shape, ...]] = ((256, 3, 4, 1), (256, 4, 4, 1), (512, 2, 4, 1), (256, 4, 2, 1))
OF_SPQR_SPLIT: Final[tuple[Shape, ...]] = ((256, 3, 4, 2), (256, 4, 2, 2))


def untried(case: Any, chosen: Config) -> list[Config]:
    """Returns configurations that no GPU has run and that fit a case; none where there are none to try.

    Args:
      case: a `Case` or `NarrowCase`.
      chosen: the configuration in use.

    Example:
      >>> from pallas_kernels.cases import Case
      >>> case = Case("w4a16", 1, 8192, 8192, 64)
      >>> [(each.depth, each.stages, each.zeros) for each in untried(case, case.config())]
      [(512, 3, 'of codes'), (1024, 2, 'of codes'), (512, 2, 'of sums')]
    """
    if not isinstance(chosen, DecodeConfig) or case.tokens > COLUMNS:
        return []
    if isinstance(case, NarrowCase):
        if case.kind != "spqr3":
            return []
        more = OF_SPQR_SPLIT if case.outputs > 64 * MULTIPROCESSORS else ()
        return [_config(shape) for shape in (*OF_SPQR, *more)]
    if case.kind != "w4a16":
        return []
    key = case.outputs, case.inputs, case.tokens <= FEW
    found = [_config(shape) for shape in OF_CODES.get(key, ())]
    found += [_config(shape, "of sums") for shape in OF_SUMS.get(key, ())]
    found += [dataclasses.replace(_config(shape, zeros), rows=128) for shape, zeros in OF_WIDE.get(key, ())]
    return [each for each in found if each.fault(case.outputs, case.inputs, case.groups) is None]


def _config(shape: Shape, zeros: Zeros = "of codes") -> DecodeConfig:
    depth, stages, warpgroups, splits = shape
    return DecodeConfig(
        depth,
        stages,
        warpgroups,
        splits,
        cluster=splits > 1,
        barriers="by step",
        instruction="warp",
        zeros=zeros,
    )
