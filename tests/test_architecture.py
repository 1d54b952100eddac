"""The floors of the house and the rules that a machine can check; each rule is shown to fail on a planted violation."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = ("jquant", "pallas_kernels", "convert", "eval")

# From the ground up. A module may import its own entry and the lower rows: nothing sideways, nothing upward.
FLOORS: Final = (
    ("pallas_kernels", "jquant.types", "jquant.errors"),
    ("jquant.processes",),
    ("jquant.numerics", "jquant.report", "jquant.charts", "jquant.data", "jquant.sampling", "jquant.schema"),
    ("jquant.formats", "jquant.page"),
    ("jquant.kernels",),
    ("jquant.matmul", "jquant.fused"),
    ("jquant.kv", "jquant.activations", "jquant.quantizers"),
    ("jquant.models",),
    ("jquant.structure", "jquant.products", "jquant.machines"),
    ("jquant.transforms", "jquant.blocks", "jquant.runtime", "jquant.targets", "jquant.checkpoint", "jquant.sharding"),
    ("convert", "jquant.calibration", "jquant.costs", "jquant.inspection", "eval"),
    ("jquant.passes", "jquant.folders", "jquant.progress"),
    ("jquant.exact_passes", "jquant.kv_passes"),
    ("jquant.recipe",),
    ("jquant.needs",),
    ("jquant.plan",),
    ("jquant.budget", "jquant.simulate"),
    ("jquant.pipeline", "jquant.measure", "jquant.pictures", "jquant.benchmark"),
    ("jquant.tables",),
    ("jquant.comparison",),
    ("jquant.pages",),
    ("jquant.demo", "jquant.compare"),
    ("jquant.commands",),
    ("jquant",),
    ("jquant.cli",),
)
KNOWS_NOBODY: Final = "pallas_kernels"

MAX_FILE_LINES: Final = 400
MAX_FUNCTION_LINES: Final = 60
MAX_KERNEL_LINES: Final = 150  # a kernel's body is one loop nest that reads worse in pieces
MAY_PRINT: Final = ("jquant.cli", "pallas_kernels.bench")
MAY_READ_ENVIRONMENT: Final = ("jquant.cli", "jquant.demo", "pallas_kernels.bench")
BLANKET: Final = {"Exception", "BaseException"}
BARE_ARRAYS: Final = {"Array", "ArrayLike", "ndarray", "NDArray"}

type Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module: its dotted name, its text and its tree."""

    module: str
    text: str
    tree: ast.Module


def read(path: Path) -> Source:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parse(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text(encoding="utf-8"))


def parse(module: str, text: str) -> Source:
    return Source(module, text, ast.parse(text))


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def unit(module: str) -> str | None:
    """Return the longest entry of FLOORS that the module belongs to; the facade `jquant` holds itself alone."""
    entries = [entry for row in FLOORS for entry in row]
    fitting = [entry for entry in entries if module == entry or (entry != "jquant" and within(module, entry))]
    return max(fitting, key=len, default=None)


def floor(entry: str) -> int:
    return next(index for index, row in enumerate(FLOORS) if entry in row)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import; `from a import b` gives `a.b`, a module or a thing in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yield (qualified name, node) of the public functions, classes and methods of a module or class body."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            dunder = node.name.startswith("__") and node.name.endswith("__")
            if dunder or not node.name.startswith("_"):
                yield f"{owner}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body, f"{node.name}.")


def parameters(node: Function) -> list[ast.arg]:
    given = node.args
    extra = [argument for argument in (given.vararg, given.kwarg) if argument]
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *extra]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


def code_lines(node: Function, text: str) -> int:
    """Count a function's lines without blank lines, comments and its docstring."""
    skipped: set[int] = set()
    if ast.get_docstring(node, clean=False) is not None:
        skipped = set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = text.splitlines()
    numbers = (n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n not in skipped)
    return sum(bool(lines[n - 1].strip()) and not lines[n - 1].lstrip().startswith("#") for n in numbers)


def check_floors(source: Source) -> Iterator[str]:
    own = unit(source.module)
    if own is None:
        yield f"{source.module} stands on no floor: give it a row in FLOORS"
        return
    for line, target in imports(source.tree):
        if target.startswith("."):
            yield f"{line}: relative import {target}: write the whole path"
        other = unit(target) or ("jquant" if within(target, "jquant") else None)
        if other not in (None, own) and (own == KNOWS_NOBODY or floor(other) >= floor(own)):
            yield f"{line}: {own} may not import {target}: {other} does not stand on a lower floor"


def check_imports(source: Source) -> Iterator[str]:
    for line, target in imports(source.tree):
        if within(target, "torch"):
            yield f"{line}: imports torch: nothing here needs it, and a user must not"
        if target.endswith(".*"):
            yield f"{line}: import *: name what is used"


def check_sizes(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, at most {MAX_FILE_LINES}: split the file by idea"
    most = MAX_KERNEL_LINES if within(source.module, "pallas_kernels") else MAX_FUNCTION_LINES
    for node in functions(source.tree):
        count = code_lines(node, source.text)
        if count > most:
            yield f"{node.lineno}: {node.name} has {count} lines of code, at most {most}"


def check_options(source: Source) -> Iterator[str]:
    for node in functions(source.tree):
        positional = [*node.args.posonlyargs, *node.args.args]
        flags = [argument for argument in parameters(node) if _is_bool(argument, node)]
        if len(flags) > 1:
            names = ", ".join(flag.arg for flag in flags)
            yield f"{node.lineno}: {node.name} has the boolean options {names}: at most one, use a Literal or a type"
        for flag in flags:
            if flag in positional:
                yield f"{node.lineno}: {node.name}: boolean option {flag.arg} must be keyword-only"


def _is_bool(argument: ast.arg, node: Function) -> bool:
    positional = [*node.args.posonlyargs, *node.args.args]
    pairs = [
        *zip(reversed(positional), reversed(node.args.defaults)),
        *zip(node.args.kwonlyargs, node.args.kw_defaults),
    ]
    default = next((value for given, value in pairs if given is argument), None)
    if isinstance(default, ast.Constant) and isinstance(default.value, bool):
        return True
    return argument.annotation is not None and bool(re.search(r"\bbool\b", ast.unparse(argument.annotation)))


def check_statements(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global: pass the value"
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else BLANKET
            if caught & BLANKET:
                yield f"{node.lineno}: blanket except: name what can go wrong"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in ("super", "hasattr") or (name == "print" and source.module not in MAY_PRINT):
                yield f"{node.lineno}: {name}() is not used here: see CONTRIBUTING.md"
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        if reads and source.module not in MAY_READ_ENVIRONMENT:
            yield f"{node.lineno}: environment variables are read by the command line alone"


def check_import_effects(source: Source) -> Iterator[str]:
    """Importing a module does nothing: its body holds definitions, constants and imports."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    constants = (ast.Assign, ast.AnnAssign, ast.TypeAlias)
    for node in source.tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        skipped = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        registers = source.module == "jquant.cli" and isinstance(node, ast.Expr)
        if not (isinstance(node, quiet + constants) or docstring or skipped or registers):
            yield f"{node.lineno}: a statement that works at import: {ast.unparse(node).splitlines()[0]}"


def check_words(source: Source) -> Iterator[str]:
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield "1: the file has no docstring"
    for name, node in public(source.tree.body):
        dunder = node.name.startswith("__")
        overrides = any(ast.unparse(decorator).endswith("override") for decorator in node.decorator_list)
        if not (dunder or overrides or ast.get_docstring(node)):
            yield f"{node.lineno}: {name} has no docstring"


def check_annotations(source: Source) -> Iterator[str]:
    for name, node in public(source.tree.body):
        if isinstance(node, ast.ClassDef):
            continue
        missing = [argument.arg for argument in parameters(node) if argument.annotation is None]
        if missing or node.returns is None:
            names = ", ".join([*missing, *([] if node.returns else ["return"])])
            yield f"{node.lineno}: {name} lacks annotations: {names}"
        given = [argument.annotation for argument in parameters(node)] + [node.returns]
        if any(annotation is not None and _has_bare_array(annotation) for annotation in given):
            yield f"{node.lineno}: {name} has an array without a shape: write Float[Array, 'in out']"


def _has_bare_array(annotation: ast.expr) -> bool:
    """Tell whether an annotation names an array type anywhere but as the first item of `Dtype[Array, "shape"]`."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        last = annotation.slice.elts[-1]
        if isinstance(last, ast.Constant) and isinstance(last.value, str):
            return False
    if isinstance(annotation, ast.Name | ast.Attribute):
        return (annotation.id if isinstance(annotation, ast.Name) else annotation.attr) in BARE_ARRAYS
    return any(_has_bare_array(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


CHECKS: Final[tuple[Callable[[Source], Iterator[str]], ...]] = (
    check_floors,
    check_imports,
    check_sizes,
    check_options,
    check_statements,
    check_import_effects,
    check_words,
    check_annotations,
)
FILES: Final = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def violations(source: Source) -> list[str]:
    return [complaint for check in CHECKS for complaint in check(source)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    assert not violations(read(path))


def test_every_package_is_checked() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


def test_tests_mirror_modules_without_init_files() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests are found by path; packages of tests hide that"


CLEAN: Final = '''"""A module."""

import jax
from jaxtyping import Array, Float

from jquant.errors import FormatError

SIZE = 3


def halve(values: Float[Array, "n"], *, exact: bool = False) -> Float[Array, "n"]:
    """Halve the values."""
    if not exact:
        raise FormatError("given, expected, what to do")
    return values / 2


class Thing:
    """A thing."""

    def __call__(self, size: int | None) -> dict[str, int]:
        return {"size": size or SIZE}
'''

PLANTED: Final = (
    ("jquant.formats.new", "from jquant.models import Llama", "may not import jquant.models"),
    (
        "jquant.quantizers.new",
        "def f() -> None:\n    'Doc.'\n    import jquant.calibration.store",
        "jquant.calibration",
    ),
    ("jquant.numerics.new", "from jquant import formats", "may not import jquant.formats"),
    ("jquant.kv.new", "from jquant import quantizers", "may not import jquant.quantizers"),
    ("jquant.models.new", "import jquant", "may not import jquant:"),
    ("jquant.models.new", "from jquant import Rtn", "may not import jquant.Rtn"),
    ("jquant.models.new", "from . import tree", "relative import"),
    ("pallas_kernels.new", "from jquant.types import Leaf", "may not import jquant.types"),
    ("jquant.new_folder.thing", "", "stands on no floor"),
    ("eval.new", "import torch.nn", "imports torch"),
    ("eval.new", "from math import *", "import *"),
    ("eval.new", "\n" * 401, "401 lines"),
    ("eval.new", "def f() -> None:\n    'Doc.'\n" + "    x = 1\n" * 61, "lines of code, at most 60"),
    ("pallas_kernels.new", "def f() -> None:\n    'Doc.'\n" + "    x = 1\n" * 151, "lines of code, at most 150"),
    ("eval.new", "def f(*, a: bool, b: bool) -> None:\n    'Doc.'", "boolean options a, b"),
    ("eval.new", "def f(*, a=True, b: bool | None = None) -> None:\n    'Doc.'", "boolean options a, b"),
    ("eval.new", "def f(a: bool = False) -> None:\n    'Doc.'", "must be keyword-only"),
    ("eval.new", "def f(b: int, a=False) -> None:\n    'Doc.'", "must be keyword-only"),
    ("eval.new", "def f() -> None:\n    'Doc.'\n    global x", "global"),
    ("eval.new", "def _f():\n    try:\n        pass\n    except:\n        pass", "blanket except"),
    (
        "eval.new",
        "def _f():\n    try:\n        pass\n    except (KeyError, Exception):\n        pass",
        "blanket except",
    ),
    ("eval.new", "class A:\n    'Doc.'\n    def __init__(self) -> None:\n        super().__init__()", "super()"),
    ("eval.new", "x = hasattr(1, 'y')", "hasattr()"),
    ("eval.new", "def _f():\n    print(1)", "print()"),
    ("eval.new", "import os\nx = os.environ['HOME']", "environment variables"),
    ("eval.new", "f(3)", "works at import"),
    ("eval.new", "for x in (): pass", "works at import"),
    ("eval.new", "x = 1", "the file has no docstring"),
    ("eval.new", "def f() -> None: pass", "f has no docstring"),
    ("eval.new", "class A: pass", "A has no docstring"),
    ("eval.new", "class A:\n    'Doc.'\n    def f(self) -> None: pass", "A.f has no docstring"),
    ("eval.new", "def f(x) -> None:\n    'Doc.'", "lacks annotations: x"),
    ("eval.new", "def f(*rest: int):\n    'Doc.'", "lacks annotations: return"),
    ("eval.new", "class A:\n    'Doc.'\n    def __call__(self, x) -> int: ...", "lacks annotations: x"),
    ("eval.new", "def f(x: jax.Array) -> None:\n    'Doc.'", "array without a shape"),
    ("eval.new", "def f() -> tuple[int, np.ndarray]:\n    'Doc.'", "array without a shape"),
)


def test_clean_module_passes() -> None:
    assert violations(parse("jquant.formats.clean", CLEAN)) == []


@pytest.mark.parametrize(("module", "text", "complaint"), PLANTED, ids=[f"{row[0]}: {row[2]}" for row in PLANTED])
def test_planted_violation_is_found(module: str, text: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(parse(module, text)))
