"""A run on a store, for tests that kill it: a tiny model of six blocks. `python killed_run.py STORE BLOCK`."""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jquant.blocks import QuantizeWeights, Rule
from jquant.calibration import BlockStore, quantize_blocks
from jquant.formats import QuantizedTensor, UniformFormat
from jquant.models import Llama, random_model, tiny_config
from jquant.quantizers import Diagnostics, Gptq, Rtn, WeightQuantizer
from jquant.report import BlockReport, Report

FINGERPRINT = {"model": "tiny", "recipe": "killed"}


@dataclass(frozen=True)
class Noisy(WeightQuantizer):
    """Round to nearest after adding noise: what a block gives depends on its random key."""

    statistic = None
    separable = True

    def check(self, shape: tuple[int, int]) -> None:
        """Take everything that `Rtn` takes."""

    def __call__(self, weight: jax.Array, statistics: Any, key: jax.Array) -> tuple[QuantizedTensor, Diagnostics]:
        """Round."""
        noise = 0.05 * jax.random.normal(key, weight.shape, weight.dtype)
        return Rtn(UniformFormat(4, 32))(weight + noise, statistics, key)


PASSES = (QuantizeWeights((Rule(".*down_proj", Gptq(UniformFormat(3, 32))), Rule(".*(v|up)_proj", Noisy()))),)


def model() -> Llama:
    return random_model(dataclasses.replace(tiny_config(), num_hidden_layers=6), jax.random.key(0))


def run(store: BlockStore | None, on_block: Any = lambda report: None) -> tuple[Llama, Report]:
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 128)
    return quantize_blocks(model(), tokens, PASSES, key=jax.random.key(2), store=store, on_block=on_block)


def rest_after(block: int) -> Callable[[BlockReport], None]:
    """Return a callback that waits after a block, so that whoever kills this process finds it there at the latest."""

    def rest(report: BlockReport) -> None:
        if report.index == block:
            time.sleep(300)

    return rest


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # as in tests/conftest.py
    run(BlockStore.open(sys.argv[1], FINGERPRINT), rest_after(int(sys.argv[2])))
