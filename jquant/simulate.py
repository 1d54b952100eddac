"""A run on paper: what quantizing a model, and writing with the result, should take on so many GPUs.

Bytes and operations are the plan's; a phase takes its operations over a measured rate. With N devices, each a share of
the calibration windows, blocks one at a time on each:

    read, hash and write     source bytes / host rate                                     (one host, whatever N)
    blocks and Hessians      (forward / r_f + statistics / r_h) / N / efficiency(N)
    solves                   solves / r_s                                                 (each device solves all)
    a token                  bytes read / T / r_b + (sums t_s + gathers t_g) [T > 1]      (T: devices of one model)

Two linears a layer have their products summed over devices, or inputs and products gathered where their input is
rotated, or the model is in float32, or rounds inputs or caches (jquant.sharding).

T is at most what one host has and the key-value heads divide by; further devices are further copies of the model. The
rates are those of `RATES`, each with the log that it is from; what differs from them is not known to this page.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from jquant.blocks import LANES
from jquant.errors import RecipeError
from jquant.models import BLOCK_LINEARS
from jquant.plan import Plan


class Rate(NamedTuple):
    """Hold a measured figure: its value, its unit, and the log in benchmarks/results or the run that it is from."""

    value: float
    unit: str
    source: str


_SOLVE: Final = "2026-11-22-h100-quantize-time.jsonl (parts of one block)"
_MESH: Final = "2026-11-22-h200x2-two-devices.jsonl"
_GATHERS: Final = "2026-11-23-h200x2-two-devices.jsonl (W4A4)"
_RUNTIME: Final = "2026-11-22-h100-runtime.jsonl (run 2, w4)"
_MEMORY: Final = "2026-11-22-cpu-quantize-memory.jsonl (second run, 2 shared cores)"

RATES: Final[Mapping[str, Rate]] = {
    "forward": Rate(2.22e14, "FLOP/s", _SOLVE),  # 2.64e14 of a block in 1.19 s
    "statistics": Rate(5.75e14, "FLOP/s", _SOLVE),  # 1.34e14 in 0.234 s, counted as 2 b n^2
    "solves": Rate(2.65e13, "FLOP/s", _SOLVE),  # 1.32e13 in 0.496 s, factors counted
    "efficiency of 2": Rate(0.973, "", _MESH),  # 1.947 times on two devices
    "compilation": Rate(92.0, "s", _SOLVE),
    "host": Rate(5.8e7, "B/s", _MEMORY),  # 16.06 GB read twice, hashed, and 5.73 GB written, in 277 s
    "decode": Rate(1.47e12, "B/s", _RUNTIME),  # 4.97 GB in 3.38 ms
    "sum": Rate(2.9e-5, "s", _MESH),  # of two a layer: 3.75 ms on two devices, 3.81 on one
    "two gathers": Rate(4.1e-5, "s", _GATHERS),  # of two linears a layer: 4.49 ms on two devices, 3.76 on one
}
DEVICE_NBYTES: Final = 80 * 10**9  # of an H100
_HOST_DEVICES: Final = 8


@dataclass(frozen=True)
class Simulation:
    """What a run should take on so many devices.

    Attributes:
      devices: how many.
      device_nbytes: the most on each while blocks are quantized one at a time.
      host_seconds: reading, hashing and writing.
      calibration_seconds: blocks over all text, and Hessians.
      solve_seconds: solves.
      compile_seconds: programs, once.
      copies: how many whole models the devices hold when they write text.
      serving_nbytes: weights and the cache of one row on each device then.
      tokens_per_second: of one row; 0 where the model does not fit.
    """

    devices: int
    device_nbytes: int
    host_seconds: float
    calibration_seconds: float
    solve_seconds: float
    compile_seconds: float
    copies: int
    serving_nbytes: int
    tokens_per_second: float

    def seconds(self) -> float:
        """Returns what quantizing takes in all."""
        return self.host_seconds + self.calibration_seconds + self.solve_seconds + self.compile_seconds


def token_seconds(nbytes: int, *, tensor: int = 1, sums: int = 0, gathers: int = 0) -> float:
    """Returns the seconds of a decode step.

    Args:
      nbytes: weights and caches that it reads.
      tensor: devices that share the model.
      sums: linears whose products are summed over the devices.
      gathers: linears whose inputs and products are gathered.

    Example:
      >>> round(1 / token_seconds(4_970_000_000))  # Llama-3.1-8B at 4 bits, 2048 tokens in the cache
      296
    """
    wait = sums * RATES["sum"].value + gathers * RATES["two gathers"].value
    return nbytes / tensor / RATES["decode"].value + (wait if tensor > 1 else 0.0)


def simulate(figures: Plan, *, devices: int, table_nbytes: int, kv_heads: int, context: int = 2048) -> Simulation:
    """Simulates a run of a plan.

    Args:
      figures: the plan.
      devices: GPUs, at least 1.
      table_nbytes: of the embedding table, of which a token reads one row.
      kv_heads: heads of keys and values, which divide among the devices of one model.
      context: tokens in the cache of the row that is written.

    Raises:
      RecipeError: there is no device.

    Example:
      >>> from jquant.models import SHAPES, abstract_llama
      >>> from jquant.plan import plan
      >>> from jquant.recipe import load_recipe
      >>> config = SHAPES["llama-3.1-8b"]
      >>> figures = plan(abstract_llama(config, "bfloat16"), load_recipe("gptq-w4g128"))
      >>> found = simulate(figures, devices=1, table_nbytes=2 * config.vocab_size * 4096, kv_heads=8)
      >>> round(found.calibration_seconds + found.solve_seconds), round(found.tokens_per_second)
      (61, 297)
    """
    if devices < 1:
        raise RecipeError(f"{devices} devices: give 1 at least")
    rates = {name: rate.value for name, rate in RATES.items()}
    needs, work = figures.needs, figures.work
    workers = min(devices, LANES)  # windows are cut into so many lanes
    efficiency = rates["efficiency of 2"] ** math.log2(workers)
    activations = needs.sets * needs.activations // workers
    tensor = math.gcd(min(devices, _HOST_DEVICES), kv_heads)
    cache_nbytes = round(figures.cache.nbytes_per_token * context)
    read = figures.nbytes - table_nbytes + cache_nbytes
    serving = (figures.nbytes + cache_nbytes) // tensor
    layers = len(figures.linears) // len(BLOCK_LINEARS)
    token = token_seconds(read, tensor=tensor, sums=2 * layers - figures.gathered, gathers=figures.gathered)
    return Simulation(
        devices=devices,
        device_nbytes=max(needs.block + needs.solved + activations + needs.device_working, needs.node),
        host_seconds=figures.source_nbytes / rates["host"],
        calibration_seconds=(work.forward / rates["forward"] + work.statistics / rates["statistics"])
        / workers
        / efficiency,
        solve_seconds=work.solves / rates["solves"],
        compile_seconds=rates["compilation"] if work.solves else 0.0,
        copies=devices // tensor,
        serving_nbytes=serving,
        tokens_per_second=1.0 / token if serving <= DEVICE_NBYTES else 0.0,
    )
