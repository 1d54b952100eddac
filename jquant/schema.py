"""Strict building of frozen dataclasses from plain data, and back; the dataclasses' types are the schema.

Plain data is what YAML gives: mappings, lists, text, numbers, booleans, null. A class that has entries in `parts` is
written by name, `{gptq: {...}}`: that is how an abstract class is filled. Every error names the path of what is wrong,
what was given and what was expected.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

from jquant.errors import JquantError, RecipeError

type Parts = Mapping[str, type]  # name -> final class

# scalar type -> (its name in messages, the types of plain data that fit)
_SCALARS: Final[Mapping[type, tuple[str, tuple[type, ...]]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
    NoneType: ("null", (NoneType,)),
}


def build(kind: Any, value: Any, path: str, parts: Parts) -> Any:
    """Builds a value of a type from plain data.

    Args:
      kind: a dataclass, a class with entries in `parts`, or bool, int, float, str, None, a Literal, a union,
        `tuple[X, ...]`, or a `type` alias of those.
      value: plain data.
      path: where the data stands, for messages.
      parts: the final classes that may be chosen by name.

    Returns:
      The value; integers given for floats become floats, lists become tuples.

    Raises:
      RecipeError: a key is unknown or missing, or a value is of another type or not allowed.

    Example:
      >>> build(tuple[int, ...], [1, 2], "sizes", {})
      (1, 2)
    """
    if isinstance(kind, TypeAliasType):
        return build(kind.__value__, value, path, parts)
    if get_origin(kind) is Literal:
        return _build_choice(get_args(kind), value, path)
    if get_origin(kind) in (Union, UnionType):
        return _build_union(get_args(kind), value, path, parts)
    if get_origin(kind) is tuple:
        return _build_tuple(get_args(kind)[0], value, path, parts)
    if kind in _SCALARS:
        return _build_scalar(kind, value, path)
    options = {name: part for name, part in parts.items() if issubclass(part, kind)}
    if options:
        return _build_part(options, value, path, parts)
    return _build_fields(kind, value, path, parts)


def plain(value: Any, parts: Parts) -> Any:
    """Returns the plain data that `build` makes the value from, with every field written out."""
    if isinstance(value, tuple):
        return [plain(item, parts) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: plain(getattr(value, field.name), parts) for field in dataclasses.fields(value)}
    name = next((name for name, part in parts.items() if part is type(value)), None)
    return fields if name is None else {name: fields}


def suggest(given: Any, known: Iterable[str]) -> str:
    """Returns a hint for a name that is not known: the nearest known one, or all of them.

    >>> suggest("bitz", ("bits", "group_size"))
    "did you mean 'bits'?"
    """
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"expected {'one of ' if len(names) > 1 else ''}{', '.join(names)}" if names else "expected nothing here"


def describe(value: Any) -> str:
    """Returns how a message shows a given value: itself and its kind, long values by kind alone.

    >>> describe("4"), describe({"bits": 4})
    ("'4' (text)", 'a mapping of bits')
    """
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{value!r} ({_SCALARS.get(type(value), (type(value).__name__, ()))[0]})"


def _build_fields(kind: type, value: Any, path: str, parts: Parts) -> Any:
    given = _require_mapping(value, path)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in given:
        if key not in fields:
            raise RecipeError(f"{path}.{key}: unknown key {key!r}; {suggest(key, fields)}")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path}: missing key {name!r}; add it")
    types = get_type_hints(kind)
    built = {key: build(types[key], item, f"{path}.{key}", parts) for key, item in given.items()}
    try:
        return kind(**built)
    except JquantError as error:
        raise RecipeError(f"{path}: {error}") from error


def _build_part(options: Mapping[str, type], value: Any, path: str, parts: Parts) -> Any:
    given = _require_mapping(value, path)
    if len(given) != 1:
        raise RecipeError(
            f"{path}: given {describe(value)}; expected one of {', '.join(options)}, its settings below it"
        )
    (name, settings), *_ = given.items()
    if name not in options:
        raise RecipeError(f"{path}.{name}: unknown {name!r}; {suggest(name, options)}")
    return _build_fields(options[name], settings, f"{path}.{name}", parts)


def _build_tuple(kind: Any, value: Any, path: str, parts: Parts) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{path}: given {describe(value)}; expected a list")
    return tuple(build(kind, item, f"{path}[{index}]", parts) for index, item in enumerate(value))


def _build_union(kinds: tuple[Any, ...], value: Any, path: str, parts: Parts) -> Any:
    """Takes null where it is allowed, else the first member that fits; a lone other member speaks for itself."""
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return build(kind, value, path, parts)
        except RecipeError:
            continue
    return build(others[-1], value, path, parts)


def _build_choice(allowed: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(value == one and type(value) is type(one) for one in allowed):
        return value
    raise RecipeError(f"{path}: unknown {value!r}; {suggest(value, map(str, allowed))}")


def _build_scalar(kind: type, value: Any, path: str) -> Any:
    expected, fitting = _SCALARS[kind]
    if type(value) not in fitting or value in (math.inf, -math.inf) or value != value:
        hint = f"; YAML reads {value} as text, write {_number(value)!r}" if kind is float and _number(value) else ""
        raise RecipeError(f"{path}: given {describe(value)}; expected {expected}{hint}")
    return float(value) if kind is float else value


def _number(value: Any) -> float | None:
    """Reads what YAML 1.1 takes for text although it is a number, such as 1e-2."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _require_mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path}: given {describe(value)}; expected a mapping of settings ({{}} for the defaults)")
    return value
