"""Recipes: a method as data. A recipe lists model passes, each a frozen dataclass; strict YAML is its written form.

The dataclasses' types are the schema (`jquant.schema`): a misspelt key, a value of another type and a missing key are
errors that name their path. `to_yaml` is the exact inverse of `parse_recipe`, with every default written out, and
`digest` identifies a recipe by that form. Presets are shipped in `jquant/recipes`.
"""

import copy
import difflib
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import yaml

from jquant.activations import ActivationRazor, OutlierSplit, PerToken, StaticTensor
from jquant.blocks import Distill, QuantizeWeights
from jquant.data import PYTHON_DOCS
from jquant.errors import RecipeError
from jquant.exact_passes import FoldNorms, LearnRotation, Rotate, Smooth, Untie
from jquant.kv import DynamicRazorKv, ExactKv, Kivi, PerTokenKv
from jquant.kv_passes import CalibrateFloat8Kv, CalibrateKvQuant, CalibrateRazorKv, LoadKvCodecs, SetKvCodec
from jquant.passes import ModelPass, QuantizeActivations, QuantizeHead, Sequential
from jquant.quantizers import Bcq, Gptq, GptqRazor, Quip, Razor, Rtn, Spqr, ZeroQuant
from jquant.schema import build, describe, plain, suggest

# What a recipe may choose by name. A new method is one more row.
PARTS: Final[Mapping[str, type]] = {
    "untie": Untie,
    "fold_norms": FoldNorms,
    "rotate": Rotate,
    "learn_rotation": LearnRotation,
    "sequential": Sequential,
    "smooth": Smooth,
    "quantize_weights": QuantizeWeights,
    "quantize_activations": QuantizeActivations,
    "quantize_head": QuantizeHead,
    "distill": Distill,
    "rtn": Rtn,
    "gptq": Gptq,
    "bcq": Bcq,
    "zeroquant": ZeroQuant,
    "razor": Razor,
    "gptq_razor": GptqRazor,
    "quip": Quip,
    "spqr": Spqr,
    "per_token": PerToken,
    "static_tensor": StaticTensor,
    "outlier_split": OutlierSplit,
    "activation_razor": ActivationRazor,
    "set_kv_codec": SetKvCodec,
    "exact_kv": ExactKv,
    "per_token_kv": PerTokenKv,
    "kivi": Kivi,
    "dynamic_razor_kv": DynamicRazorKv,
    "calibrate_razor_kv": CalibrateRazorKv,
    "calibrate_kvquant": CalibrateKvQuant,
    "calibrate_float8_kv": CalibrateFloat8Kv,
    "load_kv_codecs": LoadKvCodecs,
}
_ENDINGS: Final = (".yaml", ".yml")
_ANYWHERE: Final = "*."  # begins a path that stands for every place that ends so
_STEP: Final = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True)
class Calibration:
    """What text calibration reads.

    Attributes:
      dataset: a name or path for `jquant.data.load_text`; its calibration split is used. The default comes with Python.
        A path that ends in .npy holds windows of tokens instead: the first `samples` rows, the first `length` of each.
      samples: windows. 128, as in GPTQ's paper (arXiv:2210.17323, section 4).
      length: tokens in a window. 2048, as there.
    """

    dataset: str = PYTHON_DOCS
    samples: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        """Refuses counts that no calibration can have."""
        if self.samples < 1 or self.length < 2:
            raise RecipeError(f"samples={self.samples}, length={self.length}: give 1 sample of 2 tokens at least")


@dataclass(frozen=True)
class Recipe:
    """A method, ready to run.

    Attributes:
      name: what reports call it.
      passes: the model passes, in order.
      calibration: the text to calibrate on; None for methods that need none.
      seed: of every random choice of the run: calibration windows and methods that draw.
    """

    name: str
    passes: tuple[ModelPass, ...]
    calibration: Calibration | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses a recipe that does nothing, and calibration that is missing or unused."""
        needed = [type(one).__name__ for one in self.passes if one.needs_tokens()]
        if not self.passes:
            raise RecipeError("passes is empty, so there is nothing to do; list at least one pass")
        if needed and self.calibration is None:
            raise RecipeError(f"{needed[0]} needs calibration text; add `calibration: {{}}` for the defaults")
        if not needed and self.calibration is not None:
            raise RecipeError("no pass reads calibration text; remove `calibration`, or set it to null")
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}; give 0 or more")


def presets() -> tuple[str, ...]:
    """Returns the names of the recipes that are shipped with jquant.

    >>> "gptq-w4g128" in presets()
    True
    """
    names = [file.name for file in _presets_folder().iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a preset by its name, or a recipe from a YAML file.

    Args:
      name_or_path: one of `presets()`, or the path of a `.yaml` file.
      overrides: changes such as `calibration.samples=16` or `passes[0].sequential.passes[0].quantize_weights.sequence=
        per_block`; the path must exist in the recipe with its defaults written out, the value is YAML. A path that
        begins with `*.` stands for every place that ends so: `*.scale_dtype=bfloat16`.

    Raises:
      RecipeError: there is no such recipe, it cannot be read, or it is wrong; the path of what is wrong is named.

    Example:
      >>> load_recipe("gptq-w4g128", ["calibration.samples=16"]).calibration.samples
      16
    """
    name = str(name_or_path)
    if name in presets():
        recipe = parse_recipe((_presets_folder() / f"{name}.yaml").read_text("utf-8"), f"preset {name}")
    elif name.endswith(_ENDINGS) or Path(name).exists():
        recipe = parse_recipe(_read(Path(name)), name)
    else:
        near = difflib.get_close_matches(name, presets(), n=1)
        raise RecipeError(
            f"{name!r} is no preset and no file; {f'did you mean {near[0]!r}? ' if near else ''}"
            f"Presets: {', '.join(presets())}. A recipe of your own is a file that ends in {_ENDINGS[0]}"
        )
    return override(recipe, overrides) if overrides else recipe


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Builds a recipe from its YAML text.

    Raises:
      RecipeError: the text is not YAML or a key stands twice (the line is named), or the recipe is wrong (the path is).
    """
    value = _parse_yaml(text, where)
    try:
        recipe: Recipe = build(Recipe, value, "recipe", PARTS)
    except RecipeError as error:
        raise RecipeError(f"{error} [in {where}]" if where != "recipe" else str(error)) from error
    return recipe


def override(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """Returns the recipe with changes of the form `path=value` applied, as `load_recipe` describes them.

    Raises:
      RecipeError: a change has no `=`, its path is not in the recipe, or its value does not fit there.
    """
    raw = plain(recipe, PARTS)
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"--set {change}: expected path=value, such as calibration.samples=16")
        for place in _places(raw, path.strip()):
            raw = _replace(raw, place, _parse_yaml(value, f"--set {change}"))
    built: Recipe = build(Recipe, raw, "recipe", PARTS)
    return built


def to_yaml(recipe: Recipe) -> str:
    """Returns the recipe as YAML with every default written out; `parse_recipe` gives an equal recipe back."""
    return yaml.safe_dump(plain(recipe, PARTS), sort_keys=False, allow_unicode=True, width=120)


def digest(recipe: Recipe) -> str:
    """Returns the sha256 of the recipe's canonical form: the same for equal recipes, however they were written."""
    canonical = json.dumps(plain(recipe, PARTS), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _presets_folder() -> Traversable:
    return importlib.resources.files("jquant") / "recipes"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        choice = f"give a YAML file or one of {', '.join(presets())}"
        raise RecipeError(f"{path}: cannot be read as a recipe ({error}); {choice}") from error


def _parse_yaml(text: str, where: str) -> Any:
    try:
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader), where, set())
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}: {place}not YAML, {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML, {error}") from error


def _refuse_duplicates(node: yaml.Node | None, where: str, seen: set[int]) -> None:
    """Refuses a key that stands twice in one mapping: YAML would silently keep the last."""
    if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _refuse_duplicates(item, where, seen)
        return
    keys: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key.value, str) and key.value in keys:
            first = keys[key.value]
            raise RecipeError(
                f"{where}: line {line}: key {key.value!r} stands twice (first in line {first}); remove one"
            )
        keys[str(key.value)] = line
        _refuse_duplicates(value, where, seen)


def _places(raw: Any, path: str) -> list[str]:
    """Returns the path itself, or where it begins with `*.` all paths in plain data that end as it does."""
    if not path.startswith(_ANYWHERE):
        return [path]
    found = [place for place in map(_spell, _walk(raw, ())) if f".{place}".endswith(path.removeprefix("*"))]
    if not found:
        raise RecipeError(f"--set {path}: nothing in the recipe ends in {path.removeprefix(_ANYWHERE)}")
    return found


def _walk(node: Any, steps: tuple[int | str, ...]) -> Iterator[tuple[int | str, ...]]:
    yield steps
    inner = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ()
    for step, child in inner:
        yield from _walk(child, (*steps, step))


def _replace(raw: Any, path: str, value: Any) -> Any:
    """Returns a copy of plain data with the value at a path replaced; the path must be there."""
    steps = [int(index) if index else name for name, index in _STEP.findall(path.removeprefix("recipe."))]
    if not steps or _spell(steps) != path.removeprefix("recipe."):
        raise RecipeError(f"--set {path}: not a path; write it as passes[0].sequential.passes[0]")
    changed = copy.deepcopy(raw)
    node = changed
    for depth, step in enumerate(steps):
        known = list(range(len(node))) if isinstance(node, list) else list(node) if isinstance(node, dict) else []
        if step not in known:
            above = ".".join(filter(None, ("recipe", _spell(steps[:depth]))))
            hint = suggest(step, map(str, known)) if known else f"{above} is {describe(node)}; set it whole"
            raise RecipeError(f"--set {path}: no {step!r} in {above}; {hint}")
        if depth < len(steps) - 1:
            node = node[step]
    node[steps[-1]] = value
    return changed


def _spell(steps: Sequence[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
