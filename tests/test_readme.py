"""The README is true: its Python blocks run in order, its commands parse, its make targets and files exist."""

import re
import shlex
from pathlib import Path
from typing import Final

import cyclopts
import pytest

from jquant.cli import make_app

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"\]\((?!https?://|#)([^)#]+)")
BLOCKS: Final = [(match[1], match[2]) for match in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def shell_lines() -> list[str]:
    """Return the commands of the shell blocks: no prompt, no output, continued lines joined."""
    blocks = (text.replace("\\\n", " ") for language, text in BLOCKS if language in ("sh", "bash", "console"))
    return [line.strip().removeprefix("$ ") for text in blocks for line in text.splitlines() if line.strip()]


COMMANDS: Final = [line for line in shell_lines() if re.match(r"(\.venv/bin/)?jquant\b", line)]
TARGETS: Final = [line.split()[1] for line in shell_lines() if line.startswith("make ")]


def test_readme_has_something_to_check() -> None:
    assert COMMANDS
    assert TARGETS
    assert any(language == "python" for language, _ in BLOCKS)


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for number, (language, text) in enumerate(BLOCKS):
        if language == "python":
            exec(compile(text, f"README.md, block {number}", "exec"), names)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str) -> None:
    words = shlex.split(line.split(" #")[0])[1:]
    make_app().parse_args(words, exit_on_error=False, print_error=False)


def test_the_parser_refuses_a_misspelt_command() -> None:
    with pytest.raises(cyclopts.CycloptsError):
        make_app().parse_args(["quantize", "--no-such-option", "3"], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_linked_files_exist() -> None:
    linked = LINK.findall(README.read_text(encoding="utf-8"))
    assert linked
    assert not [name for name in linked if not (ROOT / name).exists()]
