r"""A packed model on a GPU's kernels beside the same weights in float32 arithmetic: logits, perplexity, greedy tokens.

SmolLM2-135M-Instruct is quantized by recipes that need no calibration. The reference is the portable tree with float32
activations through XLA: on the same GPU at full precision, for every number; and as `packed_reference.py` made it on a
CPU. Figures of a recipe:

1. "tokens": the packed model reads, one by one, the tokens that the CPU's reference wrote behind each prompt, and for
   each token the reference's logits over *the same packed bytes*: what the kernels themselves are off by; beside it
   what the reference in float32 is off by from itself, a step on a CPU over these bytes. The same
   along the tokens that `begin` and `advance` write: whether the reference, reading the caches that these left, would
   have written them. Then these tokens beside the CPU's, prompt by prompt. Where two choices part, the two tokens'
   logits in both paths: how many steps of bfloat16 each prefers its own by, and whether that is a tie;
2. "logits" and perplexities of all windows, their queries seeing what the recipe shows a prompt: the difference's norm
   over that of the reference's logits, losses beside those of both references.

Codes of caches and of activations in few bits fall elsewhere wherever bfloat16 rounds across a boundary, by whatever
kernel: only steps over the same bytes hold such recipes to bfloat16's rounding. Prompts have the widths and caches that
`generate` gives them. Layers are stacked: eight programs a recipe, compiled in threads, the first needed first.

    JAX_PLATFORMS=cuda,cpu PYTHONPATH=. python benchmarks/packed_agreement.py --model FILE.gguf --windows FILE.npy \
        --reference FOLDER [--recipes ...] [--seconds 150]

JSON lines, one as each figure comes.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from packed_reference import PROMPT, PROMPTS, RECIPES, TOKENS, digest, in_float32, quantized

from eval import OtherChoice, bfloat16_steps, find_other_choices
from jquant import models
from jquant.folders import round_scales, stack_if_alike
from jquant.formats import Layout
from jquant.kv import KvCodec, attention_kernel
from jquant.machines import Target
from jquant.models import Block, Llama, Stacked, blocks
from jquant.runtime import advance, begin, token_stride
from jquant.targets import describe_products, prepare

FIGURES: Final = ("tokens", "logits")
WIDTH: Final = 256  # that `generate` pads the prompts to, and the capacity it gives their caches
CAPACITY: Final = 512
CPU_STRIDE: Final = 8  # every so many tokens the reference steps on a CPU too
THREADS: Final = 12


@final
@struct.dataclass
class _AsGiven(KvCodec):
    """Reads caches that another model has written, the newest token's bytes among them, and writes nothing."""

    inner: Any

    def init(self, capacity: int, heads: int, dim: int, dtype: jax.typing.DTypeLike) -> Any:
        """Returns the inner codec's."""
        return self.inner.init(capacity, heads, dim, dtype)

    def fill(self, cache: Any, *_: Any) -> Any:
        """Returns the cache unchanged."""
        return cache

    def push(self, cache: Any, *_: Any) -> Any:
        """Returns the cache unchanged."""
        return cache

    def read(self, cache: Any, position: Any, rope: Any) -> Any:
        """Returns what the inner codec does."""
        return self.inner.read(cache, position, rope)

    def settle(self, cache: Any, position: Any) -> Any:
        """Returns the cache unchanged."""
        del position
        return cache

    def exact_from(self, position: Any) -> Any:
        """Returns what the inner codec does."""
        return self.inner.exact_from(position)


@dataclass(frozen=True)
class Case:
    """Hold what one recipe is compared with.

    Attributes:
      name: of the recipe.
      packed: as the target's kernels read it.
      reference: portable, in float32.
      beside: the reference with codecs that read the packed model's caches.
      truth: the CPU's file.
      programs: name -> compiled, or being so.
    """

    name: str
    packed: Llama
    reference: Llama
    beside: Llama
    truth: Any
    programs: dict[str, Any]

    def run(self, name: str, *given: Any) -> Any:
        """Runs a program when it is compiled."""
        return self.programs[name].result()(*given)


def main() -> None:
    """Compares every recipe that is asked for; while one is compared, the next one's programs are compiled."""
    arguments = _arguments()
    began = time.monotonic()
    _print(device=jax.devices()[0].device_kind, jax=jax.__version__, target=arguments.target)
    end, windows = began + arguments.seconds, np.load(arguments.windows).astype(np.int32)
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    cases = _cases(windows[: arguments.batch], pool, arguments)
    now = next(cases, None)
    while now is not None and time.monotonic() < end:
        following = next(cases, None)
        for figures in _compare(now, windows, arguments, end):
            _print(recipe=now.name, **figures, t=round(time.monotonic() - began, 1))
        now = following
    if now is not None:
        _print(recipe=now.name, stopped="no time is left; see --seconds")
    pool.shutdown(wait=False, cancel_futures=True)


def _cases(ids: np.ndarray, pool: Any, arguments: argparse.Namespace) -> Iterator[Case]:
    """Yields each recipe's case, its programs being compiled."""
    began, sources = time.monotonic(), quantized(arguments.recipes, arguments.model)
    for _ in arguments.recipes:
        with jax.default_device(jax.devices("cpu")[0]):  # the codes are the CPU's
            name, model = next(sources)
        model = _first_layers(model, arguments.layers)
        truth = np.load(arguments.reference / f"{name}.npz")
        case = _begin_case(name, model, truth, ids, pool, arguments)
        same = bool(np.array_equal(digest(model), truth["digest"]))
        products, seconds = describe_products(case.packed), round(time.monotonic() - began, 1)
        _print(recipe=name, products=products, same_codes_as_the_cpu=same, lowered=len(case.programs), t=seconds)
        yield case


def _compare(case: Case, windows: np.ndarray, arguments: argparse.Namespace, end: float) -> Iterator[dict[str, Any]]:
    if "tokens" in arguments.figures:
        yield from _write(case, windows[:PROMPTS, :PROMPT])
    if "logits" in arguments.figures:
        yield from _read(case, windows[: arguments.count], arguments.batch, end)


def _begin_case(name: str, model: Llama, truth: Any, ids: np.ndarray, pool: Any, arguments: argparse.Namespace) -> Case:
    """Prepares a recipe's models, lowers its programs and has them compiled, the first needed first."""
    target, model = Target(arguments.target), jax.device_put(model, jax.devices()[0])
    packed = prepare(stack_if_alike(round_scales(model, target)), target)
    reference = in_float32(stack_if_alike(model))
    case = Case(name, packed, reference, _over_the_bytes_of(packed, reference), truth, {})
    for one, trace in _traced(case, ids, arguments.figures).items():
        case.programs[one] = pool.submit(trace().lower().compile)
    return case


def _traced(case: Case, ids: np.ndarray, figures: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Returns what traces each of a case's programs."""
    packed, stops, key, stride = case.packed, jnp.zeros(0, jnp.int32), jax.random.key(0), token_stride()
    rows = jax.ShapeDtypeStruct((PROMPTS,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((PROMPTS, WIDTH), jnp.int32)
    writing = jax.eval_shape(partial(begin, capacity=CAPACITY), packed, prompts, rows, stops, key)
    logits = jax.ShapeDtypeStruct((*ids.shape, packed.config.vocab_size), jnp.float32)
    tokens: dict[str, Callable[[], Any]] = {
        "begin": lambda: begin.trace(packed, prompts, rows, stops, key, capacity=CAPACITY),
        "step": lambda: jax.jit(models.decode).trace(packed, rows, writing.cache),
        "step beside": lambda: _exactly(_logits, case.beside, rows, writing.cache),
        "step on the CPU": lambda: _exactly(
            _logits, *_on_cpu(jax.eval_shape(lambda *given: given, case.beside, rows, writing.cache))
        ),
        "advance": lambda: advance.trace(
            packed, writing, jnp.int32(TOKENS), stops, key, room=TOKENS + stride - 1, stride=stride
        ),
    }
    windows: dict[str, Callable[[], Any]] = {
        "read": lambda: jax.jit(models.forward).trace(packed, ids),
        "read exactly": lambda: _exactly(models.forward, case.reference, ids),
        "distances": lambda: jax.jit(_distances).trace(logits, logits, ids),
    }
    return (tokens if "tokens" in figures else {}) | (windows if "logits" in figures else {})


def _logits(model: Llama, tokens: jax.Array, cache: Any) -> jax.Array:
    return models.decode(model, tokens, cache)[0]


def _on_cpu(shapes: Any) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place), shapes)


def _exactly(function: Any, *given: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return jax.jit(function).trace(*given)


def _write(case: Case, prompts: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields what tokens come of prompts, and how far steps along the reference's tokens are from the reference's."""
    padded = jnp.asarray(np.pad(prompts, ((0, 0), (0, WIDTH - PROMPT))))
    lengths, stops, key = jnp.full(PROMPTS, PROMPT, jnp.int32), jnp.zeros(0, jnp.int32), jax.random.key(0)
    writing = case.run("begin", case.packed, padded, lengths, stops, key)
    first = np.asarray(writing.tokens)
    rest, _, written = case.run("advance", case.packed, writing, jnp.int32(TOKENS), stops, key)
    ours = np.concatenate([first[:, None], np.asarray(rest)], axis=1)[:, :TOKENS]
    theirs = case.truth["tokens"]

    start = case.run("begin", case.packed, padded, lengths - 1, stops, key).cache
    rows, steps, elsewhere = np.arange(PROMPTS), _Steps([], [], []), _Steps([], [], [])
    best, values = np.zeros((PROMPTS, TOKENS), np.int32), np.zeros((PROMPTS, TOKENS, 3))
    for at, (found, truth, cpu) in enumerate(_steps_along(theirs, case, start, prompts[:, -1])):
        steps.add(found, truth)
        if cpu is not None:
            elsewhere.add(truth, cpu)
        best[:, at] = found.argmax(-1)
        values[:, at] = np.stack([found[rows, one] for one in (best[:, at], theirs[:, at], ours[:, at])], axis=1)
    yield {"figure": "steps over the same bytes"} | steps.summary()
    yield {"figure": "reference here beside the CPU's, over the same bytes"} | elsewhere.summary()
    yield _check_written(case, ours, written.cache, prompts[:, -1])
    yield from _compare_tokens(case, ours, best, values)


def _steps_along(texts: np.ndarray, case: Case, cache: Any, given: np.ndarray) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the logits before each token of texts: the packed model's, and the reference's over the same bytes.

    The third are the reference's on a CPU, at every `CPU_STRIDE`th token, None at the others.
    """
    cpu = jax.devices("cpu")[0]
    beside = jax.device_put(case.beside, cpu)
    for at in range(TOKENS):
        positions = cache.positions
        logits, cache = case.run("step", case.packed, jnp.asarray(given), cache)
        before = dataclasses.replace(cache, positions=positions)
        elsewhere = None
        if at % CPU_STRIDE == 0:
            elsewhere = np.asarray(
                case.run("step on the CPU", beside, *jax.device_put((jnp.asarray(given), before), cpu))
            )
        truth = case.run("step beside", case.beside, jnp.asarray(given), before)
        yield np.asarray(logits), np.asarray(truth), elsewhere
        given = texts[:, at]


def _check_written(case: Case, texts: np.ndarray, cache: Any, given: np.ndarray) -> dict[str, Any]:
    """Returns where the reference, over the very bytes that `advance` wrote, would have written other tokens.

    What is cached of a token stays: at an earlier position the last cache is that of the step there. Tokens and bytes
    are those of `begin` and `advance`; the packed logits, of which only gaps are told, those of one step over them.
    """
    others: list[dict[str, Any]] = []
    for at in range(TOKENS):
        before = dataclasses.replace(cache, positions=jnp.full(PROMPTS, PROMPT - 1 + at, jnp.int32))
        truth = np.asarray(case.run("step beside", case.beside, jnp.asarray(given), before))
        found = np.asarray(case.run("step", case.packed, jnp.asarray(given), before)[0])
        given = texts[:, at]
        for row in np.flatnonzero(truth.argmax(-1) != given):
            tokens = int(given[row]), int(truth[row].argmax())
            gaps = tuple(bfloat16_steps(*(float(logits[row, one]) for one in tokens)) for logits in (found, truth))
            tie = OtherChoice(int(row), tokens, gaps).is_tie()
            others.append({"prompt": int(row), "at": at, "tokens": tokens, "steps": gaps, "tie": tie})
    return {
        "figure": "written, beside the reference over the same bytes",
        "whole": PROMPTS - len({other["prompt"] for other in others}),
        "other choices": len(others),
        "of these no ties": [other for other in others if not other["tie"]],
        "first": [next(other for other in others if other["prompt"] == row) for row in _prompts(others)],
    }


def _prompts(others: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({other["prompt"] for other in others})


@dataclass(frozen=True)
class _Steps:
    """Collect how far steps are from the reference's over the same bytes, and the choices that differ."""

    apart: list[np.ndarray]
    norm: list[np.ndarray]
    others: list[OtherChoice]

    def add(self, found: np.ndarray, truth: np.ndarray) -> None:
        self.apart.append(np.square(found - truth).sum(-1))
        self.norm.append(np.square(truth).sum(-1))
        self.others.extend(find_other_choices(found, truth))

    def summary(self) -> dict[str, Any]:
        apart, norm = np.stack(self.apart), np.stack(self.norm)
        return {
            "relative": math.sqrt(apart.sum() / norm.sum()),
            "relative, worst token": float(np.sqrt(np.max(apart / norm))),
            "steps": apart.size,
            "other choices": len(self.others),
            "of these no ties": sorted((max(one.gaps) for one in self.others if not one.is_tie()), reverse=True)[:8],
        }


def _compare_tokens(case: Case, ours: np.ndarray, best: np.ndarray, values: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields where tokens of `begin` and `advance` first part from the reference's, and from those of `decode`."""
    theirs, top, logits = (case.truth[name] for name in ("tokens", "top", "top_logits"))
    lines, early = [], []
    for row, at in enumerate(_first_differences(ours, theirs)):
        for index in np.flatnonzero(ours[row, : at + 1] != best[row, : at + 1])[:1]:
            gap = bfloat16_steps(values[row, index, 0], values[row, index, 2])
            early.append({"prompt": row, "at": int(index), "bfloat16 steps": gap})
        line: dict[str, Any] = {"figure": "greedy", "prompt": row, "same": int(at)}
        if at < TOKENS:
            mine = int(ours[row, at])
            known = np.flatnonzero(top[row, at] == mine)  # beyond the best eight: farther than the eighth
            other = logits[row, at, known[0] if len(known) else -1]
            gaps = (
                bfloat16_steps(values[row, at, 2], values[row, at, 1]),
                bfloat16_steps(float(logits[row, at, 0]), float(other)),
            )
            found = OtherChoice(row, (mine, int(theirs[row, at])), gaps)
            line |= {"tokens": found.tokens, "bfloat16 steps, packed and reference": gaps, "tie": found.is_tie()}
        lines.append(line)
    yield from lines
    yield {
        "figure": "greedy, all prompts",
        "whole": sum(line["same"] == TOKENS for line in lines),
        "ties": sum(line.get("tie", False) for line in lines),
        "no ties": sum(not line.get("tie", True) for line in lines),
        "`advance` and `decode` first part": early,
        "choices along the reference's tokens alike": float(np.mean(best == theirs)),
    }


def _first_differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    differs = ours != theirs
    return np.where(differs.any(axis=1), differs.argmax(axis=1), ours.shape[1])


def _read(case: Case, windows: np.ndarray, batch: int, end: float) -> Iterator[dict[str, Any]]:
    """Yields how far the logits of windows are from both references', and the perplexities."""
    parts: list[dict[str, Any]] = []
    places, kept = case.truth["places"], []
    for start in range(0, len(windows), batch):
        if time.monotonic() > end:
            break
        some = windows[start : start + batch]
        ids = jnp.asarray(np.concatenate([some, np.repeat(some[:1], batch - len(some), axis=0)]))
        truth = case.run("read exactly", case.reference, ids)
        found = case.run("read", case.packed, ids)
        sums = jax.device_get(case.run("distances", found, truth, ids))
        parts.append({name: values[: len(some)] for name, values in sums.items()})
        here = [(at, *place) for at, place in enumerate(places) if start <= place[0] < start + len(some)]
        kept += [
            (at, *(np.asarray(one[window - start, place]) for one in (found, truth))) for at, window, place in here
        ]
    if not parts:
        return
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    yield {
        "figure": "logits",
        "windows": len(whole["apart"]),
        "relative": math.sqrt(whole["apart"].sum() / whole["norm"].sum()),
        "largest of largest": float(whole["most"].max() / whole["largest"].max()),
        "same first choice": float(whole["same"].mean()),
    }
    if kept:
        cpu = np.stack([case.truth["logits"][at] for at, *_ in kept]).astype(np.float32)
        ours, theirs = (_relative(np.stack([one[index] for one in kept]), cpu) for index in (1, 2))
        yield {"figure": "logits beside the CPU's", "tokens": len(kept), "packed": ours, "reference here": theirs}
    yield _perplexities(whole["losses"], whole["true losses"], case.truth["losses"])


def _perplexities(losses: np.ndarray, here: np.ndarray, cpu: np.ndarray) -> dict[str, Any]:
    """Returns perplexities: of the packed model and of the reference, here and for what windows the CPU read."""
    ours, truth, count = losses.astype(np.float64), here.astype(np.float64), min(len(losses), len(cpu))
    apart = ours - truth
    return {
        "figure": "perplexity",
        "windows": len(ours),
        "packed": math.exp(ours.mean()),
        "reference here": math.exp(truth.mean()),
        "ratio": math.exp(apart.mean()),
        "standard error of the ratio": float(apart.std(ddof=1) / math.sqrt(len(apart))) if len(apart) > 1 else None,
        "windows of the CPU": count,
        "ratio to the CPU's": math.exp(ours[:count].mean() - cpu[:count].mean()),
        "reference here to the CPU's": math.exp(truth[:count].mean() - cpu[:count].mean()),
    }


def _distances(found: jax.Array, truth: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
    """Returns sums and maxima over the logits of each window, and mean losses."""
    apart = found - truth
    losses = [
        -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(each[:, :-1]), ids[:, 1:, None], axis=-1), axis=(1, 2))
        for each in (found, truth)
    ]
    return {
        "apart": jnp.sum(jnp.square(apart), axis=(1, 2)),
        "norm": jnp.sum(jnp.square(truth), axis=(1, 2)),
        "most": jnp.max(jnp.abs(apart), axis=(1, 2)),
        "largest": jnp.max(jnp.abs(truth), axis=(1, 2)),
        "same": jnp.mean((found.argmax(-1) == truth.argmax(-1)).astype(jnp.float32), axis=1),
        "losses": losses[0],
        "true losses": losses[1],
    }


def _over_the_bytes_of(packed: Llama, reference: Llama) -> Llama:
    """Returns the reference with codecs that read the packed model's caches and write nothing."""

    def with_codec(own: Block, other: Block) -> Block:
        codec: Any = other.self_attn.kv_codec
        if attention_kernel(codec) is not None:
            codec = dataclasses.replace(codec, layout=Layout.PORTABLE)
        return dataclasses.replace(own, self_attn=dataclasses.replace(own.self_attn, kv_codec=_AsGiven(codec)))

    assert isinstance(reference.layers, Stacked)
    assert isinstance(packed.layers, Stacked)
    block = with_codec(reference.layers.block, packed.layers.block)
    return dataclasses.replace(reference, layers=dataclasses.replace(reference.layers, block=block))


def _first_layers(model: Llama, count: int | None) -> Llama:
    if count is None:
        return model
    config = dataclasses.replace(model.config, num_hidden_layers=count)
    return dataclasses.replace(model, layers=blocks(model)[:count], config=config)


def _relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _print(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--figures", nargs="*", choices=FIGURES, default=FIGURES)
    parser.add_argument("--model", type=Path, help="the GGUF file; the demo's if left out")
    parser.add_argument("--windows", type=Path, required=True, help="a .npy file of token ids, that of the reference")
    parser.add_argument("--reference", type=Path, required=True, help="the folder that packed_reference.py wrote")
    parser.add_argument("--count", type=int, help="windows of logits and perplexity; all if left out")
    parser.add_argument("--batch", type=int, default=4, help="windows at once")
    parser.add_argument("--layers", type=int, help="only the first so many, to try the script")
    parser.add_argument("--target", choices=[target.value for target in Target], default=Target.H100.value)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no figure is begun")
    return parser.parse_args()


if __name__ == "__main__":
    main()
