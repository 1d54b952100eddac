"""How kernels of few tokens divide their work: W4A16 and W4A8 of `decode`, W8A16, binary codes and SpQR."""

from dataclasses import dataclass
from typing import Final, Literal

from pallas_kernels import compat, order

MOST_TOKENS: Final = 64
PADDED: Final = 8  # the least number of columns of the instruction, and what they are a multiple of
LEAST_PIECE: Final = 64  # codes, 32 bytes


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is divided.

    Attributes:
      depth: inputs of one copy.
      stages: copies that a warpgroup has under way.
      warpgroups: warpgroups of a block, each with its own range of inputs.
      splits: blocks that share the inputs of the same outputs.
      rows: outputs of a block, 64 or 128: more of them use the activations that a warpgroup has copied.
      cluster: add the splits in the shared memory of a cluster's first block; otherwise XLA adds them.
      together: groups whose products are under way at once, so that one is unpacked while another is multiplied.
      barriers: one before the copies of each step, or Pallas' own, one of all threads for each copy: which is faster
        differs by shape, by some 3 %.
      instruction: what multiplies: wgmma, of a warpgroup, or mma.sync, of each warp, whose cost grows with the tokens.
      pieces: of binary codes alone: what makes integers of the activations.
    """

    depth: int = 256
    stages: int = 4
    warpgroups: int = 1
    splits: int = 1
    rows: int = compat.ROWS_OF_ACCUMULATOR
    cluster: bool = False
    together: int = 1
    barriers: Literal["by step", "by copy"] = "by copy"
    instruction: Literal["warpgroup", "warp"] = "warpgroup"
    pieces: Literal["by XLA", "by kernel"] = "by XLA"

    def fault(self, outputs: int, inputs: int, groups: int) -> str | None:
        """Returns why a weight cannot be multiplied with this configuration; None where it can."""
        group, parts = inputs // groups, self.splits * self.warpgroups
        if outputs % self.rows:
            return f"{outputs} outputs are no multiple of {self.rows}"
        if inputs % (self.depth * parts):
            return f"{inputs} inputs are no multiple of {self.depth * parts}, {parts} ranges of copies of {self.depth}"
        if self.depth % group and group % self.depth:
            return f"groups of {group} inputs and copies of {self.depth} do not divide one another"
        if group % order.RUN or self.depth % LEAST_PIECE:
            return f"groups of {group} are no multiple of {order.RUN}, or copies of {self.depth} none of {LEAST_PIECE}"
        return None
