"""How long a whole GPTQ run compiles, and how many programs: every trace, lowering and compilation of one process.

    python benchmarks/compile_time.py MODEL [--recipe gptq-w4g64] [--samples 2] [--length 512]

The number of samples does not change what is compiled; few are enough.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import jax

from jquant.pipeline import quantize
from jquant.recipe import load_recipe


def main() -> None:
    """Runs one quantization and prints the sums as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="gptq-w4g64")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    changes = (f"calibration.samples={arguments.samples}", f"calibration.length={arguments.length}")
    seconds: collections.Counter[str] = collections.Counter()
    events: collections.Counter[str] = collections.Counter()

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds[event.removeprefix("/jax/core/compile/")] += duration_secs  # type: ignore[assignment]
            events[event.removeprefix("/jax/core/compile/")] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        quantize(arguments.model, Path(folder) / "out", load_recipe(arguments.recipe, changes))
    total = time.monotonic() - started
    figures = {name: {"seconds": round(seconds[name], 2), "times": events[name]} for name in sorted(seconds)}
    print(json.dumps({"recipe": arguments.recipe, "total_s": round(total, 1), "jax": jax.__version__, **figures}))


if __name__ == "__main__":
    main()
