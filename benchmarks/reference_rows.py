"""Perplexity of SmolLM2-135M-Instruct beside the rows that the methods' reference implementations gave.

Reads what lies in `../shared` (the rows, the calibration windows, WikiText-2), quantizes the model by the same settings
and prints one JSON line a row: ours, theirs, over all windows and over the first 8, bits from bytes, seconds.

    python benchmarks/reference_rows.py [--rows NAME ...] [--seeds 0 1] [--shuffle] [--samples 16] [--count 8]

All 148 windows need a GPU; `--count 8` fits a CPU and the reference's own column of the first 8. A machine without
`../shared` is given the files: `--model`, `--windows`, `--calibration`, `--reference`.
"""

import argparse
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
from jquant.blocks import ActivationRule, Distill, QuantizeWeights, Rule, Training
from jquant.data import load_text, token_windows
from jquant.exact_passes import FoldNorms, LearnRotation, Rotate, Smooth, Untie
from jquant.formats import BinaryFormat, RazoredFormat, SpqrFormat, UniformFormat
from jquant.inspection import inspect_model
from jquant.kv import DynamicRazorKv, Kivi, KvCodec, PerTokenKv
from jquant.kv_passes import CalibrateKvQuant, CalibrateRazorKv, SetKvCodec
from jquant.models import Llama, stack_layers
from jquant.passes import Context, ModelPass, QuantizeActivations, Sequential, run_passes
from jquant.quantizers import Bcq, Gptq, GptqRazor, Quip, Razor, Rtn, Spqr, WeightQuantizer, ZeroQuant

type Passes = tuple[ModelPass, ...]

SHARED: Final = Path(__file__).resolve().parents[2] / "shared"
CALIBRATION: Final = "calib_windows_wikitext2_valtrain_n128_s2048_seed0.npy"
# Outputs of SmolLM2-135M's linears: as many groups make each output one group.
MLP: Final = {"gate_proj": 1536, "up_proj": 1536, "down_proj": 576}
OUTPUTS: Final = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "o_proj": 576} | MLP


def _format(bits: int, group: int | None = None, symmetry: str = "asymmetric") -> UniformFormat:
    return UniformFormat(bits, group, symmetry, "float32")  # type: ignore[arg-type]


def _weights(quantizer: WeightQuantizer, sequence: str = "per_block") -> Passes:
    return (Sequential((QuantizeWeights((Rule(".*_proj", quantizer),), sequence),)),)  # type: ignore[arg-type]


def _inputs(method: ActivationMethod) -> Passes:
    return (QuantizeActivations((ActivationRule(".*_proj", method),)),)


def _cache(codec: KvCodec) -> Passes:
    return (SetKvCodec(codec),)


def _kvquant(bits: int, **settings: Any) -> Passes:
    return (CalibrateKvQuant(bits, **settings),)


def _rtn(bits: int, group: int | None = None, symmetry: str = "asymmetric") -> Passes:
    return _weights(Rtn(_format(bits, group, symmetry)))


def _gptq(bits: int, group: int | None = None, order: str = "activation", sequence: str = "per_block") -> Passes:
    return _weights(Gptq(_format(bits, group), order=order, groups="dynamic"), sequence)  # type: ignore[arg-type]


def _quip(bits: int, incoherence: str = "butterfly") -> Passes:
    """Returns QuIP as its published code runs it."""
    quip = Quip(bits, order="reversed", greedy_passes=0, incoherence=incoherence, rho=2.4, fidelity="reference")  # type: ignore[arg-type]
    return _weights(quip)


def _zeroquant(groups: Mapping[str, int] = OUTPUTS, *, attention: int = 8, mlp: int = 4) -> tuple[Rule, ...]:
    """Returns ZeroQuant's rules, given a number of groups for some linears and the bits of both halves of a block."""
    linears = {f".*\\.{name}": (mlp if name in MLP else attention, count) for name, count in groups.items()}
    return tuple(Rule(match, ZeroQuant(bits, count, "float32")) for match, (bits, count) in linears.items())


def _zeroquant_weights(*rules: Rule) -> Passes:
    return (Sequential((QuantizeWeights(rules, "per_block"),)),)


def _smoothed(bits: int) -> Passes:
    return (Smooth(0.5), *_rtn(bits), *_inputs(PerToken(bits, "asymmetric")))


def _quarot(*passes: Passes, subtract: bool = False) -> Passes:
    """Rotates first; QuaRot's code subtracts the means of the embedding's rows, and leaves 9 heads unmixed."""
    rotation = Rotate(parts=("residual", "values", "keys", "mlp"), subtract_embedding_mean=subtract)
    return (Untie(), FoldNorms(), rotation, *(one for group in passes for one in group))


def _spinquant(*passes: Passes, codec: PerTokenKv | None = None, weights: tuple[Rule, ...] = ()) -> Passes:
    """Rotates as QuaRot does with the means kept, residual stream and values learned for 4 bits."""
    rules = (ActivationRule(".*_proj", PerToken(4, clip_ratio=0.9)),)
    rotation = LearnRotation(rules, codec, parts=("residual", "values", "keys", "mlp"), weights=weights)
    return (Untie(), FoldNorms(), rotation, *(one for group in passes for one in group))


def _distilled(steps: int, layers: str = "last", activations: Passes = ()) -> Passes:
    """Returns ZeroQuant's W4/8 with distillation, inputs rounded first so that blocks learn with them."""
    return (*activations, Sequential((Distill(_zeroquant(), Training(steps), layers=layers),)))  # type: ignore[arg-type]


def _both(name: str, *passes: Passes) -> dict[str, Passes]:
    """Returns a row of QuaRot as its code has it, and one that keeps the means, as jquant's presets do."""
    return {name: _quarot(*passes, subtract=True), f"{name}-keepmean": _quarot(*passes)}


_ROUNDED: Final = (Rule(".*_proj", Rtn(_format(4, None, "symmetric"), "search")),)
_QUAROT_RTN: Final = (Sequential((QuantizeWeights(_ROUNDED),)),)
_QUAROT_GPTQ: Final = _weights(Gptq(_format(4, None, "symmetric"), clip="search"), "per_site")
_QUAROT_A4: Final = _inputs(PerToken(4, clip_ratio=0.9))
_KV4: Final = PerTokenKv(4, grid="asymmetric", clip=0.95, scale_dtype="float32", prompt="stored")
_QUAROT_KV4: Final = _cache(_KV4)
_ZEROQUANT_A8: Final = _inputs(PerToken(8, "asymmetric_zeroquant"))
_RAZOR: Final = _weights(Razor(RazoredFormat(group_size=8)))

# Unless "stream" is in its name, a reference row of a cache shows every query the cache as the whole window is stored.
ROWS: Final[Mapping[str, Passes]] = {
    "fp32": (),
    "rtn-w8-pc-asym": _rtn(8),
    "rtn-w4-pc-asym": _rtn(4),
    "rtn-w4-pc-sym": _rtn(4, symmetry="symmetric"),
    "rtn-w4-g64-asym": _rtn(4, 64),
    "rtn-w4-g32-asym": _rtn(4, 32),
    "rtn-w3-pc-asym": _rtn(3),
    "rtn-w3-pc-sym": _rtn(3, symmetry="symmetric"),
    "rtn-w2-pc-asym": _rtn(2),
    "gptq-w4-pc-noact": _gptq(4, order="natural"),
    "gptq-w4-pc-act": _gptq(4),
    "gptq-w4-pc-act-trueseq": _gptq(4, sequence="per_site"),
    "gptq-w4-g64-act": _gptq(4, 64),
    "gptq-w4-g64-act-static-trueseq": _weights(Gptq(_format(4, 64), order="activation"), "per_site"),
    "gptq-w3-pc-act": _gptq(3),
    "gptq-w2-pc-act": _gptq(2),
    "quip-w4-ldlq-incoh": _quip(4),
    "quip-w3-ldlq-incoh": _quip(3),
    "quip-w2-ldlq-incoh": _quip(2),
    "quip-w4-ldlq-noincoh": _quip(4, "none"),
    "quip-w2-ldlq-noincoh": _quip(2, "none"),
    "quip-w4": _weights(Quip(4)),
    "quip-w3": _weights(Quip(3)),
    "quip-w2": _weights(Quip(2)),
    "spqr-4bit": _weights(Spqr(SpqrFormat(bits=3, group_size=16), outlier_threshold=0.25)),
    "spqr-3bit": _weights(Spqr(SpqrFormat(bits=2, group_size=32), outlier_threshold=0.5)),
    "spqr-3bit-float32": _weights(Spqr(SpqrFormat(bits=2, group_size=32, dtype="float32"), outlier_threshold=0.5)),
    "lut-bcq4-g64-r30": _weights(Bcq(BinaryFormat(4, 64), rounds=30)),
    "lut-bcq3-g64-r30": _weights(Bcq(BinaryFormat(3, 64), rounds=30)),
    "qrazor-w4a16-g8": _RAZOR,
    "qrazor-w4a16-g64": _weights(Razor(RazoredFormat(group_size=64))),
    "gptq-qrazor-w4a16-g8": _weights(GptqRazor(RazoredFormat(axis="out", group_size=8), order="activation")),
    "qrazor-w4a4-g8": _RAZOR + _inputs(ActivationRazor(bits=4)),
    "qrazor-w4a8-g8": _RAZOR + _inputs(ActivationRazor(bits=8)),
    "qrazor-w4kv4-g8": _RAZOR + _cache(DynamicRazorKv()),
    "qrazor-w4kv4-g8-static": (*_RAZOR, CalibrateRazorKv()),
    "qrazor-w4a4kv4-g8": _RAZOR + _inputs(ActivationRazor(bits=4)) + _cache(DynamicRazorKv()),
    "zq-w4ffn8attn-a16": _zeroquant_weights(*_zeroquant()),
    "zq-w4ffn8attn-a16-g4096": _zeroquant_weights(*_zeroquant(dict.fromkeys(OUTPUTS, 4096))),
    "zq-w4ffn8attn-a16-lkd25": _distilled(25),
    "zq-w4ffn8attn-a16-lkd100": _distilled(100),
    "zq-w4ffn8attn-a16-lkd100-all": _distilled(100, "all"),
    "zq-w4ffn8attn-a8-lkd100": _distilled(100, activations=_ZEROQUANT_A8),
    "zq-w4ffn8attn-a8-lkd100-all": _distilled(100, "all", _ZEROQUANT_A8),
    "zq-w8a8": _zeroquant_weights(*_zeroquant(mlp=8)) + _ZEROQUANT_A8,
    "zq-w4ffn8attn-a8": _zeroquant_weights(*_zeroquant()) + _ZEROQUANT_A8,
    "zq-w4a4": _zeroquant_weights(*_zeroquant(attention=4)) + _inputs(PerToken(4, "asymmetric_zeroquant")),
    **{f"rtn-w{bits}a{bits}-token": _rtn(bits) + _inputs(PerToken(bits, "asymmetric")) for bits in (8, 6, 4)},
    "norot-w4a4-rtn": _QUAROT_RTN + _QUAROT_A4,
    "llmint8-t6": _rtn(8, symmetry="symmetric") + _inputs(OutlierSplit()),
    "smooth-fp-a0.5": (Smooth(0.5),),
    "smooth-w8a8-a0.5": _smoothed(8),
    "smooth-w6a6-a0.5": _smoothed(6),
    **_both("quarot-fp"),
    **_both("quarot-w4a16-rtn", _QUAROT_RTN),
    **_both("quarot-w4a16-gptq", _QUAROT_GPTQ),
    **_both("quarot-w4a4-rtn", _QUAROT_RTN, _QUAROT_A4),
    **_both("quarot-w4a4-gptq", _QUAROT_GPTQ, _QUAROT_A4),
    **_both("quarot-kv4", _QUAROT_KV4),
    **_both("quarot-w4a4kv4-rtn", _QUAROT_RTN, _QUAROT_A4, _QUAROT_KV4),
    **_both("quarot-w4a4kv4-gptq", _QUAROT_GPTQ, _QUAROT_A4, _QUAROT_KV4),
    **_both(
        "quarot-w8a8kv8-rtn",
        _weights(Rtn(_format(8, None, "symmetric"))),
        _inputs(PerToken(8)),
        _cache(PerTokenKv(8, grid="asymmetric", scale_dtype="float32", prompt="stored")),
    ),
    "spinquant-w4a4-rtn": _spinquant(_QUAROT_RTN, _QUAROT_A4, weights=_ROUNDED),
    "spinquant-w4a4-rtn-exact": _spinquant(_QUAROT_RTN, _QUAROT_A4),
    "spinquant-w4a4-gptq": _spinquant(_QUAROT_GPTQ, _QUAROT_A4),
    "spinquant-w4a4kv4-rtn": _spinquant(_QUAROT_RTN, _QUAROT_A4, _QUAROT_KV4, codec=_KV4, weights=_ROUNDED),
    "spinquant-w4a4kv4-gptq": _spinquant(_QUAROT_GPTQ, _QUAROT_A4, _QUAROT_KV4, codec=_KV4),
    "kv4-token-asym": _cache(PerTokenKv(4, grid="asymmetric", scale_dtype="float32", prompt="stored")),
    "kivi-4": _cache(Kivi(4, 4, scale_dtype="float32", prompt="stored")),
    "kivi-2": _cache(Kivi(2, 2, scale_dtype="float32", prompt="stored")),
    "kivi-4-stream": _cache(Kivi(4, 4, scale_dtype="float32")),
    "kivi-2-stream": _cache(Kivi(2, 2, scale_dtype="float32")),
    # The published simulation keeps every key beyond the thresholds of its channel: room for all 192.
    **{f"kvquant-{bits}bit-1pct": _kvquant(bits, key_slots=192, float_dtype="float32") for bits in (4, 3, 2)},
    **{f"kvquant-{bits}": _kvquant(bits, qnorm=True) for bits in (4, 3, 2)},
}


def main() -> None:
    """Runs every row that is asked for."""
    arguments = _arguments()
    jax.config.update("jax_default_matmul_precision", "highest")
    pattern = r"^\| (\S+) \| ([\d.e+]+) \| ([\d.e+]+) \|"
    theirs = {name: rest for name, *rest in re.findall(pattern, arguments.reference.read_text(), re.MULTILINE)}
    source = arguments.model or demo_model(default_cache())
    model, tokens = load_model(source), jnp.asarray(np.load(arguments.calibration).astype(np.int32))
    tokens = tokens[: arguments.samples, : arguments.length]
    windows = np.load(arguments.windows) if arguments.windows else test_windows(source)
    windows = windows[: arguments.count]
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "command": sys.argv}), flush=True)
    for name in arguments.rows or ROWS:
        for seed in arguments.seeds:
            started = time.monotonic()
            ids = jax.random.permutation(jax.random.key(seed), tokens) if arguments.shuffle else tokens
            quantized = quantize_by(model, ROWS[name], ids, seed)
            facts = inspect_model(quantized)
            solved = time.monotonic()
            ours = perplexity(stack_layers(quantized), windows)
            figures: dict[str, Any] = {
                "windows": ours.windows,
                "ours": ours.value,
                "ours_first_8": math.exp(sum(ours.window_losses[:8]) / 8),
                "bits": facts.bits_per_weight(),
                "cache_bits_per_value": facts.cache.bits_per_value,
                "prompt": ours.kv_prompt,
            }
            reference = dict(zip(("reference", "reference_first_8"), theirs.get(name, ()), strict=False))
            times = {"quantize_s": solved - started, "evaluate_s": time.monotonic() - solved}
            settings = {"row": name, "seed": seed, "shuffle": arguments.shuffle, "calibration": tokens.shape}
            print(json.dumps({**settings, **figures, **reference, **times}), flush=True)


def quantize_by(model: Llama, passes: Passes, tokens: jax.Array, seed: int) -> Llama:
    """Returns the model after the passes of a row."""
    if not passes:
        return model
    return jax.block_until_ready(run_passes(passes, model, Context(jax.random.key(seed), tokens))[0])


def test_windows(source: Path) -> np.ndarray:
    """Returns WikiText-2's test text in windows of 2048 token ids."""
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
    parser.add_argument(
        "--shuffle", action="store_true", help="the calibration windows in an order by the seed: what rounding decides"
    )
    parser.add_argument("--samples", type=int, help="calibration windows; all of them if left out")
    parser.add_argument("--length", type=int, help="tokens of a calibration window; all of them if left out")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
