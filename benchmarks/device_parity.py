"""Trees quantized by the rows of reference_rows.py on the CPU and on the GPU, leaf by leaf, and the losses of both.

    JAX_PLATFORMS=cuda,cpu python benchmarks/device_parity.py --rows qrazor-w4a16-g64 rtn-w4-g64-asym

JSON lines: for each leaf that differs, the share of its numbers that do and how many layers have one; then the mean
loss of one window on the GPU, by the tree of each device. Rounding that falls on a tie moves a few codes in a million;
more is a fault of a compiler or of ours.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference_rows import CALIBRATION, ROWS, SHARED, quantize_by, test_windows

from convert import default_cache, demo_model, load_model
from eval.perplexity import perplexity
from jquant.models import stack_layers


def main() -> None:
    """Compares every row that is asked for."""
    arguments = _arguments()
    jax.config.update("jax_default_matmul_precision", "highest")
    devices = {"cpu": jax.devices("cpu")[0], "gpu": jax.devices("gpu")[0]}
    print(json.dumps({"device": devices["gpu"].device_kind, "jax": jax.__version__}), flush=True)
    source = arguments.model or demo_model(default_cache())
    model, tokens = jax.device_get(load_model(source)), np.load(arguments.calibration)[: arguments.samples]
    windows = (np.load(arguments.windows) if arguments.windows else test_windows(source))[:1]
    for row in arguments.rows:
        trees = {}
        for name, device in devices.items():
            with jax.default_device(device):
                placed = jax.device_put(model, device)
                trees[name] = jax.device_get(stack_layers(quantize_by(placed, ROWS[row], jnp.asarray(tokens), 0)))
        for figures in _differences(trees["cpu"], trees["gpu"]):
            print(json.dumps({"row": row, **figures}), flush=True)
        losses = {f"loss by the tree of the {name}": _loss(tree, windows) for name, tree in trees.items()}
        print(json.dumps({"row": row, **losses}), flush=True)


def _loss(tree: Any, windows: np.ndarray) -> float:
    return perplexity(tree, windows).window_losses[0]


def _differences(left: Any, right: Any) -> list[dict[str, Any]]:
    found = []
    others = jax.tree.leaves(right)
    for (path, one), other in zip(jax.tree_util.tree_flatten_with_path(left)[0], others, strict=True):
        wrong = np.asarray(one) != np.asarray(other)
        if wrong.any():
            layers = sorted({int(index) for index in np.nonzero(wrong)[0]})
            found.append({"leaf": jax.tree_util.keystr(path), "share": float(wrong.mean()), "layers": len(layers)})
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, choices=ROWS)
    parser.add_argument("--samples", type=int, default=1, help="calibration windows")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--calibration", type=Path, default=SHARED / "golden" / CALIBRATION)
    return parser.parse_args()


if __name__ == "__main__":
    main()
