"""Perplexity of SmolLM2-135M-Instruct beside the rows that the methods' reference implementations gave.

Reads what lies in `../shared` (the rows, the calibration windows, WikiText-2), quantizes the model by the same settings
and prints one JSON line a row: ours, theirs, over all windows and over the first 8, bits from bytes, seconds.

    python benchmarks/reference_rows.py [--rows NAME ...] [--seeds 0 1] [--damping 0.01005] [--count 8]

All 148 windows need a GPU; `--count 8` fits a CPU and the reference's own column of the first 8. A machine without
`../shared` is given the files: `--model`, `--windows`, `--calibration`, `--reference`.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from convert import default_cache, demo_model, load_model, load_tokenizer
from eval.perplexity import perplexity
from jquant.activations import ActivationMethod, ActivationRazor, OutlierSplit, PerToken
from jquant.blocks import ActivationRule, InputQuantizers, QuantizeWeights, Rule
from jquant.calibration import calibrate_razor_kv, quantize_blocks
from jquant.data import load_text, token_windows
from jquant.exact_passes import FoldNorms, Rotate, Untie
from jquant.formats import BinaryFormat, RazoredFormat, SpqrFormat, UniformFormat
from jquant.inspection import inspect_model
from jquant.kv import DynamicRazorKv, Kivi, KvCodec, PerTokenKv
from jquant.models import Llama, set_kv_codec, stack_layers
from jquant.passes import Context, run_passes
from jquant.quantizers import Bcq, Gptq, GptqRazor, Quip, Razor, Rtn, Spqr, WeightQuantizer, ZeroQuant

SHARED: Final = Path(__file__).resolve().parents[2] / "shared"
CALIBRATION: Final = "calib_windows_wikitext2_valtrain_n128_s2048_seed0.npy"
# Outputs of SmolLM2-135M's linears: as many groups make each output one group.
MLP: Final = {"gate_proj": 1536, "up_proj": 1536, "down_proj": 576}
ROWS_OF_SMOLLM2: Final = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576} | MLP


def _format(bits: int, group: int | None, symmetry: str = "asymmetric") -> UniformFormat:
    return UniformFormat(bits, group, symmetry, "float32")  # type: ignore[arg-type]


def _gptq(bits: int, group: int | None, order: str = "activation") -> Gptq:
    return Gptq(_format(bits, group), order=order, groups="dynamic")  # type: ignore[arg-type]


def _quip(bits: int, incoherence: str = "butterfly") -> Quip:
    """Returns QuIP as its published code runs it."""
    return Quip(bits, order="reversed", greedy_passes=0, incoherence=incoherence, rho=2.4, fidelity="reference")  # type: ignore[arg-type]


def _zeroquant(groups: Mapping[str, int], attention: int = 8, mlp: int = 4) -> Mapping[str, WeightQuantizer]:
    """Returns ZeroQuant's rules, given a number of groups for some linears and the bits of both halves of a block."""
    linears = {f".*\\.{name}": (mlp if name in MLP else attention, count) for name, count in groups.items()}
    return {match: ZeroQuant(bits, count, "float32") for match, (bits, count) in linears.items()}


ROWS: Final[Mapping[str, tuple[WeightQuantizer | Mapping[str, WeightQuantizer] | None, str]]] = {
    "fp32": (None, "per_block"),
    "rtn-w8-pc-asym": (Rtn(_format(8, None)), "per_block"),
    "rtn-w4-pc-asym": (Rtn(_format(4, None)), "per_block"),
    "rtn-w4-pc-sym": (Rtn(_format(4, None, "symmetric")), "per_block"),
    "rtn-w4-g64-asym": (Rtn(_format(4, 64)), "per_block"),
    "rtn-w4-g32-asym": (Rtn(_format(4, 32)), "per_block"),
    "rtn-w3-pc-asym": (Rtn(_format(3, None)), "per_block"),
    "gptq-w4-pc-noact": (_gptq(4, None, "natural"), "per_block"),
    "gptq-w4-pc-act": (_gptq(4, None), "per_block"),
    "gptq-w4-pc-act-trueseq": (_gptq(4, None), "per_site"),
    "gptq-w4-g64-act": (_gptq(4, 64), "per_block"),
    "gptq-w3-pc-act": (_gptq(3, None), "per_block"),
    "quip-w4-ldlq-incoh": (_quip(4), "per_block"),
    "quip-w3-ldlq-incoh": (_quip(3), "per_block"),
    "quip-w2-ldlq-incoh": (_quip(2), "per_block"),
    "quip-w4-ldlq-noincoh": (_quip(4, "none"), "per_block"),
    "quip-w4": (Quip(4), "per_block"),
    "quip-w3": (Quip(3), "per_block"),
    "quip-w2": (Quip(2), "per_block"),
    "spqr-4bit": (Spqr(SpqrFormat(bits=3, group_size=16), outlier_threshold=0.25), "per_block"),
    "spqr-3bit": (Spqr(SpqrFormat(bits=2, group_size=32), outlier_threshold=0.5), "per_block"),
    "lut-bcq4-g64-r30": (Bcq(BinaryFormat(4, 64), rounds=30), "per_block"),
    "lut-bcq3-g64-r30": (Bcq(BinaryFormat(3, 64), rounds=30), "per_block"),
    "qrazor-w4a16-g8": (Razor(RazoredFormat(group_size=8)), "per_block"),
    "qrazor-w4a16-g64": (Razor(RazoredFormat(group_size=64)), "per_block"),
    "gptq-qrazor-w4a16-g8": (GptqRazor(RazoredFormat(axis="out", group_size=8), order="activation"), "per_block"),
    "zq-w4ffn8attn-a16": (_zeroquant(ROWS_OF_SMOLLM2), "per_block"),
    "zq-w4ffn8attn-a16-g4096": (_zeroquant(dict.fromkeys(ROWS_OF_SMOLLM2, 4096)), "per_block"),
    "rtn-w8a8-token": (Rtn(_format(8, None)), "per_block"),
    "rtn-w6a6-token": (Rtn(_format(6, None)), "per_block"),
    "rtn-w4a4-token": (Rtn(_format(4, None)), "per_block"),
    "llmint8-t6": (Rtn(_format(8, None, "symmetric")), "per_block"),
    "zq-w8a8": (_zeroquant(ROWS_OF_SMOLLM2, 8, 8), "per_block"),
    "zq-w4ffn8attn-a8": (_zeroquant(ROWS_OF_SMOLLM2), "per_block"),
    "zq-w4a4": (_zeroquant(ROWS_OF_SMOLLM2, 4, 4), "per_block"),
    "qrazor-w4a4-g8": (Razor(RazoredFormat(group_size=8)), "per_block"),
    "qrazor-w4a8-g8": (Razor(RazoredFormat(group_size=8)), "per_block"),
    "gptq-w4-g64-act-static-trueseq": (Gptq(_format(4, 64), order="activation"), "per_site"),
    "gptq-w4-g64-act-static-trueseq-float16": (Gptq(UniformFormat(4, 64), order="activation"), "per_site"),
    "qrazor-w4kv4-g8": (Razor(RazoredFormat(group_size=8)), "per_block"),
    "qrazor-w4kv4-g8-static": (Razor(RazoredFormat(group_size=8)), "per_block"),
    "quarot-fp": (None, "per_block"),
    "quarot-fp-keepmean": (None, "per_block"),
    "quarot-w4a16-rtn": (Rtn(_format(4, None, "symmetric"), "search"), "per_block"),
    "quarot-w4a16-rtn-keepmean": (Rtn(_format(4, None, "symmetric"), "search"), "per_block"),
    "quarot-w4a16-gptq": (Gptq(_format(4, None, "symmetric"), clip="search"), "per_site"),
    "quarot-w4a16-gptq-keepmean": (Gptq(_format(4, None, "symmetric"), clip="search"), "per_site"),
}
# What is done before quantizing. QuaRot's code subtracts the means of the embedding's rows, which is not exact, and
# leaves 9 heads unmixed; `keepmean` rows are jquant's presets.
EVERY_PART: Final = ("residual", "values", "keys", "mlp")
ROTATIONS: Final[Mapping[str, Rotate]] = {
    "quarot-kv4": Rotate(parts=EVERY_PART, subtract_embedding_mean=True),
    "quarot-kv4-keepmean": Rotate(parts=EVERY_PART),
    "quarot-fp": Rotate(subtract_embedding_mean=True),
    "quarot-fp-keepmean": Rotate(),
    "quarot-w4a16-rtn": Rotate(subtract_embedding_mean=True),
    "quarot-w4a16-rtn-keepmean": Rotate(),
    "quarot-w4a16-gptq": Rotate(subtract_embedding_mean=True),
    "quarot-w4a16-gptq-keepmean": Rotate(),
}
# KV caches by row; those of no row above leave the weights as they are. Unless "stream" is in its name, a reference row
# shows every query the cache as the whole window is stored.
CACHES: Final[Mapping[str, KvCodec]] = {
    "kv4-token-asym": PerTokenKv(4, grid="asymmetric", scale_dtype="float32"),
    "kv4-token-float-zero": PerTokenKv(4),
    "quarot-kv4": PerTokenKv(4, grid="asymmetric", clip=0.95, scale_dtype="float32"),
    "quarot-kv4-keepmean": PerTokenKv(4, grid="asymmetric", clip=0.95, scale_dtype="float32"),
    "kivi-4": Kivi(4, 4, scale_dtype="float32", prompt="stored"),
    "kivi-2": Kivi(2, 2, scale_dtype="float32", prompt="stored"),
    "kivi-2-float16": Kivi(2, 2, prompt="stored"),
    "kivi-4-stream": Kivi(4, 4, scale_dtype="float32"),
    "kivi-2-stream": Kivi(2, 2, scale_dtype="float32"),
    "kivi-2-stream-float16": Kivi(2, 2),
    "qrazor-w4kv4-g8": DynamicRazorKv(),
}
CALIBRATED_CACHES: Final = ("qrazor-w4kv4-g8-static",)

# What rounds the inputs of all linears, in the rows that have it.
ACTIVATIONS: Final[Mapping[str, ActivationMethod]] = {
    **{f"rtn-w{bits}a{bits}-token": PerToken(bits, "asymmetric") for bits in (8, 6, 4)},
    "llmint8-t6": OutlierSplit(),
    **{f"zq-{name}": PerToken(8, "asymmetric_zeroquant") for name in ("w8a8", "w4ffn8attn-a8")},
    "zq-w4a4": PerToken(4, "asymmetric_zeroquant"),
    "qrazor-w4a4-g8": ActivationRazor(bits=4),
    "qrazor-w4a8-g8": ActivationRazor(bits=8),
}


def main() -> None:
    """Runs every row that is asked for."""
    arguments = _arguments()
    jax.config.update("jax_default_matmul_precision", "highest")
    pattern = r"^\| (\S+) \| ([\d.e+]+) \| ([\d.e+]+) \|"
    theirs = {name: rest for name, *rest in re.findall(pattern, arguments.reference.read_text(), re.MULTILINE)}
    source = arguments.model or demo_model(default_cache())
    model, calibration = load_model(source), jnp.asarray(np.load(arguments.calibration).astype(np.int32))
    windows = np.load(arguments.windows) if arguments.windows else _windows(source)
    windows = windows[: arguments.count]
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "command": sys.argv}), flush=True)
    for name in arguments.rows or (*ROWS, *(row for row in CACHES if row not in ROWS)):
        quantizers, sequence = ROWS[name] if name in ROWS or name not in CACHES else (None, "per_block")
        if arguments.damping is not None:
            quantizers = dataclasses.replace(quantizers, damping=arguments.damping)  # type: ignore[type-var]
        for seed in arguments.seeds:
            started = time.monotonic()
            prepared = _rotate(model, ROTATIONS[name], seed) if name in ROTATIONS else model
            quantized = _quantize(prepared, calibration, quantizers, sequence, seed)
            if name in ACTIVATIONS:
                inputs = InputQuantizers((ActivationRule(".*_proj", ACTIVATIONS[name]),))
                quantized, _ = quantize_blocks(quantized, calibration, (inputs,), key=jax.random.key(seed))
            if name in CACHES:
                quantized = set_kv_codec(quantized, CACHES[name])
            if name in CALIBRATED_CACHES:
                quantized = calibrate_razor_kv(quantized, calibration)
            facts = inspect_model(quantized)
            bits, cache_bits = facts.bits_per_weight(), facts.cache.bits_per_value
            solved = time.monotonic()
            ours = perplexity(stack_layers(quantized), windows)
            first = math.exp(sum(ours.window_losses[:8]) / 8)
            figures: dict[str, Any] = {"windows": ours.windows, "ours": ours.value, "ours_first_8": first, "bits": bits}
            figures |= {"cache_bits_per_value": cache_bits, "prompt": ours.kv_prompt}
            reference = dict(zip(("reference", "reference_first_8"), theirs.get(name, ()), strict=False))
            times = {"quantize_s": solved - started, "evaluate_s": time.monotonic() - solved}
            settings = {"row": name, "seed": seed, "damping": arguments.damping}
            print(json.dumps({**settings, **figures, **reference, **times}), flush=True)


def _rotate(model: Llama, rotation: Rotate, seed: int) -> Llama:
    return run_passes((Untie(), FoldNorms(), rotation), model, Context(jax.random.key(seed)))[0]


def _quantize(
    model: Llama,
    tokens: jax.Array,
    quantizers: WeightQuantizer | Mapping[str, WeightQuantizer] | None,
    sequence: str,
    seed: int,
) -> Llama:
    if quantizers is None:
        return model
    rules = {".*_proj": quantizers} if isinstance(quantizers, WeightQuantizer) else quantizers
    passes = (QuantizeWeights(tuple(Rule(*rule) for rule in rules.items()), sequence),)  # type: ignore[arg-type]
    quantized, _ = quantize_blocks(model, tokens, passes, key=jax.random.key(seed))
    return jax.block_until_ready(quantized)


def _windows(source: Path) -> np.ndarray:
    text = load_text("wikitext2", "evaluation", folder=SHARED / "data" / "text")
    return token_windows(text, load_tokenizer(source), length=2048)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    golden = SHARED / "golden"
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--calibration", type=Path, default=golden / CALIBRATION)
    parser.add_argument("--reference", type=Path, default=golden / "reference_ppl.md")
    parser.add_argument("--count", type=int, help="windows to evaluate; all of them if left out")
    parser.add_argument("--damping", type=float, help="instead of a row's own, to see what rounding decides")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
