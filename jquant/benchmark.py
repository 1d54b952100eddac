"""Speed and memory of a model as it is and by recipes, in one run: what `jquant bench` prints.

A recipe's row has random codes in the formats that the recipe would leave behind: only time and memory mean something,
but nothing needs to be solved, and a model of which there is only a config.json can be timed.
"""

import functools
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from eval import Latency, Workload, check_workload, measure_latency
from jquant.errors import CheckpointError, RecipeError
from jquant.folders import make_ready, open_abstract, open_for_use
from jquant.inspection import inspect_model
from jquant.machines import TargetName, choose_target
from jquant.models import SHAPES, Llama, LlamaConfig, abstract_llama, random_like
from jquant.plan import outline
from jquant.progress import OnProgress, Progress, ignore
from jquant.recipe import Recipe, load_recipe
from jquant.targets import describe_products
from jquant.types import Key

type RandomDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Shortage:
    """Say that the device's memory did not suffice.

    Attributes:
      workload: what was to be timed.
      message: the allocator's words.
    """

    workload: Workload
    message: str


@dataclass(frozen=True)
class Benchmark:
    """What one model took.

    Attributes:
      name: the recipes, or the source's dtype or name where none was applied.
      weights: "random", or "its own".
      bits_per_weight: of the linears of all blocks, before they were laid out for a target.
      codec: how keys and values are kept.
      products: what multiplied the linears, as `describe_products` says it; "-" where the model itself did not fit.
      latencies: one for each workload; a `Shortage` where memory did not suffice.
    """

    name: str
    weights: Literal["random", "its own"]
    bits_per_weight: float
    codec: str
    products: str
    latencies: tuple[Latency | Shortage, ...]


def bench(
    source: str,
    recipes: Sequence[str],
    workloads: Sequence[Workload],
    *,
    target: TargetName = "auto",
    dtype: RandomDtype = "bfloat16",
    seed: int = 0,
    mesh: Mesh | None = None,
    on_progress: OnProgress = ignore,
) -> Iterator[Benchmark]:
    """Times a model as it is, then by each recipe; what does not fit the device is a `Shortage`, the rest is timed.

    Args:
      source: a name of `jquant.models.SHAPES` or the path of a config.json, for random weights; or what `open_model`
        takes, whose own weights are timed where no recipe is applied.
      recipes: presets or YAML files; several, one after another, are joined by "+", as in "rtn-w4g128+kv4".
      workloads: what is timed of each.
      target: see `jquant.machines.choose_target`.
      dtype: of random models.
      seed: of random numbers.
      mesh: devices over which the model is spread; None for one.
      on_progress: called before each model and each workload.

    Yields:
      The figures of each model.

    Raises:
      RecipeError: a recipe is unknown or does not fit, or the target is not there.
      CheckpointError: the source cannot be read.
      ConversionError: the same, for a foreign one.
      DataError: a workload does not fit the model's context.
    """
    chosen = [(name, [load_recipe(part) for part in name.split("+")]) for name in recipes]
    config = _find_config(source)
    abstract = open_abstract(source) if config is None else abstract_llama(config, dtype)
    for workload in workloads:
        check_workload(abstract.config, workload)
    choose_target(target, abstract.embed_tokens.dtype)
    outlines = [(name, _outline(abstract, parts)) for name, parts in chosen]
    own = str(abstract.embed_tokens.dtype) if config is not None else source
    for name, tree in [(own, abstract), *outlines]:
        is_own = config is None and tree is abstract
        key, facts = jax.random.key(seed), inspect_model(tree)
        if is_own:
            make = functools.partial(open_for_use, source, target=target, mesh=mesh)
        else:
            make = functools.partial(_random, tree, key, target, mesh)
        products, latencies = _timed(name, make, workloads, key, on_progress)
        yield Benchmark(
            name=name,
            weights="its own" if is_own else "random",
            bits_per_weight=facts.bits_per_weight(),
            codec=facts.cache.codec,
            products=products,
            latencies=tuple(latencies),
        )


def _random(abstract: Llama, key: Key, target: TargetName, mesh: Mesh | None) -> Llama:
    return make_ready(random_like(abstract, key), target, mesh)


def _timed(
    name: str, make: Callable[[], Llama], workloads: Sequence[Workload], key: Key, on_progress: OnProgress
) -> tuple[str, list[Latency | Shortage]]:
    """Returns what multiplies a model's linears, and what it took; the model is gone when the next one is made."""
    on_progress(Progress(f"{name}: making the model"))
    gc.collect()  # the traceback of a shortage may hold arrays in a cycle
    try:
        model = jax.block_until_ready(make())
    except jax.errors.JaxRuntimeError as error:
        message = _words_of_shortage(error)
        return "-", [Shortage(workload, message) for workload in workloads]
    found: list[Latency | Shortage] = []
    for workload in workloads:
        on_progress(Progress(f"{name}: {workload.describe()}"))
        gc.collect()
        try:
            found.append(measure_latency(model, workload, key=key))
        except jax.errors.JaxRuntimeError as error:
            found.append(Shortage(workload, _words_of_shortage(error)))
    return describe_products(model), found


def _words_of_shortage(error: jax.errors.JaxRuntimeError) -> str:
    """Returns the first line of an error for want of memory; another error is raised again."""
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
        raise error
    return str(error).splitlines()[0]


def _find_config(source: str) -> LlamaConfig | None:
    """Returns the configuration that a source names without weights; None if it is a checkpoint."""
    if source in SHAPES:
        return SHAPES[source]
    path = Path(source)
    if path.suffix != ".json":
        if not path.exists() and "/" not in source:
            raise CheckpointError(
                f"{source} is no shape and no file; give {', '.join(SHAPES)}, a config.json, a checkpoint, "
                "a Hugging Face folder, a .gguf file or a hub id (owner/name)"
            )
        return None
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be read ({error}); give a config.json, a checkpoint, or one of {', '.join(SHAPES)}"
        ) from error
    return LlamaConfig.from_hf(found)


def _outline(model: Llama, recipes: Sequence[Recipe]) -> Llama:
    for recipe in recipes:
        try:
            model = outline(model, recipe)
        except RecipeError as error:
            raise RecipeError(f"{recipe.name}: {error}") from error
    return model
