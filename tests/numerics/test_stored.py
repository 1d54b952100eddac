"""What is left of numbers that are stored in fewer bits, on machines whose compiler would rather not round."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import as_stored

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ROOT / ".cache" / "cuda"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_numbers_are_those_of_the_dtype_also_where_they_are_small(dtype: str) -> None:
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    values = jnp.array([0.0, 1 / 3, -1e3 / 7, 2.6 * smallest, 0.4 * smallest])
    found = jax.jit(lambda x: as_stored(x, dtype))(values)
    assert found.dtype == jnp.float32
    expected = np.asarray(values).astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    rows = jax.vmap(lambda x: as_stored(x, dtype))(values[:, None])
    np.testing.assert_array_equal(rows[:, 0], expected)


@pytest.mark.slow
def test_a_gpu_rounds_what_is_stored(tmp_path: Path) -> None:
    if not (COMPILER / ".ready").exists() or shutil.which("ptxas") is None:
        pytest.skip("no compiler for NVIDIA GPUs: run `make cuda-compiler`, and have `ptxas` of CUDA 13 on the PATH")
    folders = os.pathsep.join([str(ROOT), str(COMPILER)])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(tmp_path), "PYTHONPATH": folders}
    command = [sys.executable, str(Path(__file__).with_name("stored_on_gpu.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == 9
    assert all(left == [1, 1] for left in found.values()), found  # to it, and back
