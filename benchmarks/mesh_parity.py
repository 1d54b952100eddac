r"""The same model on one device and on many: codes to the bit, logits to rounding.

For each recipe: the sha256 of the result on 1, 2, 4 and 8 devices; of a run that is stopped on 8 devices after some
blocks and goes on with 2; of two processes that share the windows; and how far the logits are from those of one device,
over meshes of 8 devices and over those of two processes with two devices each, which talk by gloo.

    python benchmarks/mesh_parity.py [--model tiny | FILE.gguf] [--recipes rtn gptq quip spqr quarot kivi] [--layers 4]
        [--samples 16] [--length 64] [--stop 1] [--prompt 48] [--set PATH=VALUE ..] [--keep FOLDER]
        [--logits] [--seconds 600] [--port 29917]

With --logits, logits alone are compared, of what --keep has or, where it has nothing, one device quantizes; the two
processes read what is kept instead of quantizing it. What is kept is not asked by which options it was made.

JSON lines, each as soon as it is known; the exit code is 1 if a sha256 differs, or logits by more than 2e-5 of the
largest. Unless XLA_FLAGS is set, products on the CPU are Eigen's, not YNNPACK's, whose bits depend on how many columns
are asked for: KIVI's logits need it, docs/meshes.md says why. With the threads of 8 devices, Eigen's depend on how many
rows there are, below some 128: give --prompt 128 or more to see the mesh's part alone over 8 x 1.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type=")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from convert import load_model
from jquant import checkpoint
from jquant.calibration import BlockStore
from jquant.checkpoint import digest, save_model
from jquant.folders import stack_if_alike
from jquant.formats import SpqrTensor, align_outliers
from jquant.models import BLOCK_LINEARS, Llama, LlamaConfig, blocks, forward, get, put, random_model
from jquant.passes import Context, run_passes
from jquant.recipe import Recipe, load_recipe
from jquant.report import BlockReport
from jquant.sharding import join_processes, make_mesh, shard

RECIPES: Final[Mapping[str, str]] = {
    "rtn": "rtn-w4g64",
    "gptq": "gptq-w4g64",
    "quip": "quip-w4",
    "spqr": "spqr-w3",
    "quarot": "quarot-w4a4kv4",
    "kivi": "kivi-2",
}
TINY: Final = LlamaConfig(64, 128, 256, 2, 8, 4, 16, 256, tie_word_embeddings=True)
SMALL: Final[Mapping[str, tuple[str, ...]]] = {  # what the tiny model's sizes ask for
    "rtn": ("passes[0].sequential.passes[0].quantize_weights.rules[0].quantizer.rtn.format.group_size=32",),
    "gptq": ("passes[0].sequential.passes[0].quantize_weights.rules[0].quantizer.gptq.format.group_size=32",),
    "kivi": ("passes[0].set_kv_codec.codec.kivi.group_size=16", "passes[0].set_kv_codec.codec.kivi.residual_length=16"),
}
COUNTS: Final = (1, 2, 4, 8)
MESHES: Final = ((2, 4), (4, 2), (1, 8), (8, 1))
MESHES_OF_TWO: Final = ((2, 2), (1, 4), (4, 1))  # processes, two devices each
LIMIT: Final = 2e-5  # of the largest logit, float32


class _StopError(Exception):
    """What stops a run after its first block."""


def main() -> None:
    """Runs the recipes that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--stop", type=int, default=1, help="blocks after which the run on 8 devices is stopped")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of each of the 8 rows whose logits are compared")
    parser.add_argument(
        "--logits", action="store_true", help="compare logits alone, of what --keep has or one device quantizes"
    )
    parser.add_argument("--set", nargs="+", default=[], help="of the recipe, such as calibration.samples=8")
    parser.add_argument("--keep", type=Path, help="folder in which the quantized models are saved, by recipe")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--process", type=int, help="of a child: which of two processes it is")
    parser.add_argument("--port", type=int, default=29917)
    arguments = parser.parse_args()
    if arguments.process is not None:
        join_processes(f"localhost:{arguments.port}", 2, arguments.process)
    source, started, failed = _open(arguments), time.monotonic(), False
    with tempfile.TemporaryDirectory() as folder:
        if arguments.logits and arguments.keep is None:
            arguments.keep = Path(folder)  # where the two processes find it
        for name in arguments.recipes:
            if time.monotonic() - started > arguments.seconds:
                _say(recipe=name, left_out="no time left")
            elif arguments.process is not None:
                _answer(source, name, arguments)
            else:
                failed |= not _compare(source, name, arguments)
    sys.exit(failed)


def _answer(source: Llama, name: str, arguments: argparse.Namespace) -> None:
    """Says what one of two processes finds."""
    if arguments.logits:
        model = checkpoint.load_model(arguments.keep / name)
        sha256 = digest(model)
    else:
        model, sha256 = _quantize(source, name, arguments, tuple(jax.devices()))
    largest, apart, _ = _compare_logits(model, arguments.prompt, MESHES_OF_TWO)
    _say(recipe=name, process=arguments.process, sha256=sha256, largest_logit=largest, apart=apart)


def _compare(source: Llama, name: str, arguments: argparse.Namespace) -> bool:
    begun = time.monotonic()
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    model = source

    def note(way: str, sha256: str) -> None:
        found[way], seconds[way] = sha256, round(time.monotonic() - begun - sum(seconds.values()), 1)
        sys.stderr.write(f"{name} {way} {sha256} {seconds[way]} s\n")

    kept = None if arguments.keep is None else arguments.keep / name
    if arguments.logits and kept is not None and kept.exists():
        model = checkpoint.load_model(kept)
        note("kept", digest(model))
    else:
        for count in (1,) if arguments.logits else arguments.counts:
            model, sha256 = _quantize(source, name, arguments, tuple(jax.devices()[:count]))
            note(f"{count} devices", sha256)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, kept)
    if _recipe(name, arguments).calibration is not None and not arguments.logits:
        note(f"stopped on 8 after {arguments.stop}, went on with 2", _resume(source, name, arguments))
    answered, apart_of_two = _two_processes(name, arguments)
    note("read by two processes" if arguments.logits else "two processes", answered)
    _say(recipe=name, model=arguments.model, layers=len(blocks(source)), sha256=found, seconds=seconds)
    largest, apart, whole = _compare_logits(model, arguments.prompt, MESHES)
    _say(
        recipe=name,
        largest_logit=largest,
        apart=apart,
        apart_in_two_processes=apart_of_two,
        whole=whole,
        prompt=arguments.prompt,
    )
    limit = LIMIT * max(1.0, largest)
    near = all(figure <= limit for figure in (*apart.values(), *apart_of_two.values()))  # NaN is not
    return len(set(found.values())) == 1 and near


def _compare_logits(
    model: Llama, prompt: int, meshes: Sequence[tuple[int, int]]
) -> tuple[float, dict[str, float], Sequence[str]]:
    """Returns one device's largest logit, how far each mesh's are from one device's, and what any mesh left whole."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, prompt)).astype(np.int32)
    model = _align(model)
    expected = np.asarray(jax.jit(forward)(stack_if_alike(model), tokens))
    apart: dict[str, float] = {}
    whole: dict[str, None] = {}
    for shape in meshes:
        spread = shard(model, make_mesh(*shape), stack_if_alike)
        logits = multihost_utils.process_allgather(jax.jit(forward)(spread, tokens), tiled=True)
        apart["x".join(map(str, shape))] = float(np.abs(logits - expected).max())
        whole |= dict.fromkeys(getattr(spread.layers, "notes", ()))
    return float(np.abs(expected).max()), apart, tuple(whole)


def _align(model: Llama) -> Llama:
    """Returns a model whose blocks' lists of outliers are of one length, so that one program serves all blocks."""
    layers = list(blocks(model))
    for name in BLOCK_LINEARS:
        kernels: list[Any] = [get(layer, name).kernel for layer in layers]
        if all(isinstance(kernel, SpqrTensor) for kernel in kernels):
            aligned = align_outliers(kernels)
            layers = [put(layer, f"{name}.kernel", kernel) for layer, kernel in zip(layers, aligned, strict=True)]
    return dataclasses.replace(model, layers=tuple(layers))


def _quantize(
    source: Llama, name: str, arguments: argparse.Namespace, devices: tuple[Any, ...], **options: Any
) -> tuple[Llama, str]:
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, source.config.vocab_size, (arguments.samples, arguments.length)), jnp.int32)
    context = Context(jax.random.key(0), tokens, devices=devices, **options)
    model, _ = run_passes(_recipe(name, arguments).passes, source, context)
    return model, digest(model)


def _resume(source: Llama, name: str, arguments: argparse.Namespace) -> str:
    def stop(report: BlockReport) -> None:
        if report.index + 1 == arguments.stop:
            raise _StopError

    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore.open(f"{folder}/store", {})
        with contextlib.suppress(_StopError):
            _quantize(source, name, arguments, tuple(jax.devices()), store=store, on_block=stop)
        assert store.finished() == arguments.stop
        return _quantize(source, name, arguments, tuple(jax.devices()[:2]), store=store)[1]


def _two_processes(name: str, arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Returns the sha256 of two processes, and how far from one device's the logits of either are at most."""
    options: Sequence[str] = [
        *("--model", arguments.model, "--recipes", name, "--port", str(arguments.port)),
        *("--samples", str(arguments.samples), "--length", str(arguments.length), "--prompt", str(arguments.prompt)),
        *(() if arguments.layers is None else ("--layers", str(arguments.layers))),
        *(("--set", *arguments.set) if arguments.set else ()),
        *(("--logits", "--keep", str(arguments.keep)) if arguments.logits else ()),
    ]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    threads = str(len(jax.devices()))  # as many as this process has: Eigen's sums depend on it
    environment = os.environ | {"XLA_FLAGS": flags, "PJRT_NPROC": threads}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *options, "--process", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    answers = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    found = sorted({answer["sha256"] for answer in answers})
    apart = {mesh: float(np.max([answer["apart"][mesh] for answer in answers])) for mesh in answers[0]["apart"]}
    return found[0] if len(found) == 1 else f"processes differ: {found}", apart


def _recipe(name: str, arguments: argparse.Namespace) -> Recipe:
    return load_recipe(RECIPES[name], (*(SMALL.get(name, ()) if arguments.model == "tiny" else ()), *arguments.set))


def _open(arguments: argparse.Namespace) -> Llama:
    if arguments.model == "tiny":
        return random_model(TINY, jax.random.key(0))
    model = load_model(Path(arguments.model), dtype="float32")
    count = arguments.layers or model.config.num_hidden_layers
    config = dataclasses.replace(model.config, num_hidden_layers=count)
    return dataclasses.replace(model, layers=blocks(model)[:count], config=config)


def _say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
