"""How long a user waits before anything happens: `import jquant` and `jquant --help`, each in a new process.

    .venv/bin/python benchmarks/startup.py

The bounds of issue 2, on 2 cores: 1.5 s and 2 s. Timings are printed here and asserted nowhere.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

RUNS: Final = 5
COMMANDS: Final = {
    "import jax": [sys.executable, "-c", "import jax"],
    "import jquant": [sys.executable, "-c", "import jquant"],
    "jquant --help": [str(Path(sys.executable).with_name("jquant")), "--help"],
}


def seconds(command: list[str]) -> list[float]:
    """Run a command once to warm the disk cache, then `RUNS` times; return the sorted wall-clock times."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def main() -> None:
    """Print the least and the median time of each command."""
    print(f"Python {sys.version.split()[0]}, {RUNS} runs each, seconds")
    for name, command in COMMANDS.items():
        times = seconds(command)
        print(f"{name:<16} least {times[0]:5.2f}   median {statistics.median(times):5.2f}")


if __name__ == "__main__":
    main()
