"""Which measured configurations become rows of the package's table."""

import math
from typing import Any, Final

from pallas_kernels.cases import Case
from pallas_kernels.configs import Row, in_table
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.grid import product
from pallas_kernels.prefill import PrefillConfig

SERVED: Final = ((1, 8), (9, 16), (17, 64), (65, 512), (513, 4096), (4097, 1 << 30))  # tokens, by a row of the table
LEAST_GAIN: Final = 1.03  # over the rule's time: less is as likely chance


class Tuned:
    """Collects the table's rows of `--grid`: a configuration in place of the rule's has to be worth a row."""

    def __init__(self) -> None:
        self.rows: dict[tuple[Any, ...], Row] = {}
        self._present: dict[tuple[Any, ...], float] = {}

    def add(self, case: Case, row: dict[str, Any]) -> None:
        """Adds a measured row; a product's chosen one comes behind the others."""
        present, served = case.config(), serving(case, row)
        if served.config == present:
            self._present[product(row)] = row["microseconds"]
        gain = self._present.get(product(row), math.inf) / row["microseconds"]
        if "chosen" in row and (in_table(present) or gain > LEAST_GAIN):
            self.rows.setdefault((case.kind, case.outputs, case.inputs, served.least), served)


def serving(case: Case, row: dict[str, Any]) -> Row:
    """Returns the table's row of a measured one, for the numbers of tokens that it stands for."""
    least, most = next(pair for pair in SERVED if pair[0] <= case.tokens <= pair[1])
    config = (DecodeConfig if row["kernel"] == "decode" else PrefillConfig)(**row["config"])
    return Row(case.kind, case.outputs, case.inputs, least, most, config, row["microseconds"])
