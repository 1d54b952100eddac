"""Documents out of a text, JSON Lines or Parquet file, told apart by the end of the name."""

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, Final

from jquant.errors import DataError

LINES: Final = (".jsonl", ".jsonl.gz", ".json.gz")  # allenai/c4 names its JSON Lines .json.gz
ROWS: Final = ".raw"  # the original WikiText distribution: one row a line
SUFFIXES: Final = (".txt", *LINES, ".parquet", ROWS)
_FIELD: Final = "text"


def read_documents(path: Path) -> tuple[str, ...]:
    """Read the documents of a file: all of a `.txt`, each row of `.raw`, field `text` of each row of the others.

    Args:
      path: a file whose name ends in one of `SUFFIXES`.

    Raises:
      DataError: the file is absent, damaged, of another kind, or a row has no `text`; the message names the line.
    """
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of text; expected a name ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        if path.name.endswith(".parquet"):
            return _parquet_rows(path)
        with _open_text(path) as lines:
            if path.name.endswith(LINES):
                return tuple(_json_field(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip())
            if path.name.endswith(ROWS):
                return tuple(line if line.strip() else "" for line in lines)
            return (lines.read(),)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it complete, and is it UTF-8?") from error


def _open_text(path: Path) -> io.TextIOWrapper:
    opener = gzip.open if path.suffix == ".gz" else Path.open
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8")


def _json_field(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one JSON object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get(_FIELD), str):
        given = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: expected an object with a string field {_FIELD!r}, got {given}")
    return str(row[_FIELD])


def _parquet_rows(path: Path) -> tuple[str, ...]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        if _FIELD not in names:
            raise DataError(f"{path}: expected a column {_FIELD!r}, got {names}")
        rows = parquet.read_table(path, columns=[_FIELD]).column(_FIELD).to_pylist()
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}); is it complete?") from error
    if any(not isinstance(row, str) for row in rows):
        raise DataError(f"{path}: column {_FIELD!r} has rows that are not text (null or numbers); remove them")
    return tuple(rows)
