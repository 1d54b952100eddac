"""`jquant bench`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from cyclopts import Parameter

from eval import Workload
from jquant.benchmark import RandomDtype, Shortage, bench
from jquant.commands.devices import ONE_DEVICE, Devices
from jquant.commands.display import note, show_progress, stdout
from jquant.folders import make_writable, write_text
from jquant.machines import TargetName
from jquant.tables import benchmark_table


def run(
    model: str,
    /,
    *,
    recipe: Annotated[Sequence[str], Parameter(negative="", consume_multiple=True)] = (),
    batch: Annotated[Sequence[int], Parameter(negative="", consume_multiple=True)] = (1,),
    prompt: int = 512,
    context: int | None = None,
    tokens: int = 64,
    repeats: int = 5,
    dtype: RandomDtype = "bfloat16",
    target: TargetName = "auto",
    seed: int = 0,
    json_: Annotated[Path | None, Parameter(name="--json")] = None,
    devices: Devices = ONE_DEVICE,
) -> None:
    """Time a model and what recipes would make of it: prompts, tokens, memory, side by side.

    What does not fit the device's memory is too large in the table, and the rest is timed.

    Args:
      model: llama-3.1-8b, llama-3.1-70b, llama-2-7b, qwen3-8b, smollm2-135m or the path of a config.json, for random
        weights; or a checkpoint, a folder, a GGUF file or a hub id.
      recipe: presets or YAML files, a row each, of random codes in their formats; + joins several, as in
        rtn-w4g128+kv4.
      batch: rows; several batches are measured one after another.
      prompt: tokens of a row's prompt; 0 to time no prompt.
      context: tokens in the cache when decode begins; as many as the prompt has if not given.
      tokens: tokens that decode writes in one run; 0 to time no decode.
      repeats: runs that count, after two that do not; figures are medians.
      dtype: of random weights.
      target: whose kernels multiply; auto is the GPU's own for models in bfloat16 on an H100 or H200. With +tokamax,
        prompts attend by tokamax (jquant[tokamax]), not by cuDNN.
      seed: of random weights and tokens.
      json_: a file to write every run to, after each row.
      devices: which devices of this process.
    """
    mesh = devices.start()
    workloads = [Workload(rows, prompt, context, tokens, repeats) for rows in batch]
    if json_ is not None:
        make_writable(json_.parent)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "model": model, "target": target}
    rows = []
    with show_progress() as on_progress:
        options: dict[str, Any] = {"target": target, "dtype": dtype, "seed": seed, "mesh": mesh}
        for row in bench(model, recipe, workloads, **options, on_progress=on_progress):
            rows.append(row)
            for found in row.latencies:
                if isinstance(found, Shortage):
                    note(f"{row.name}, {found.workload.describe()}: {found.message}")
            if json_ is not None:
                write_text(json_, json.dumps(about | {"rows": [dataclasses.asdict(one) for one in rows]}, indent=1))
    for index in range(len(workloads)):
        stdout().print(benchmark_table(rows, index, about["device"], stdout().width))
