"""Where texts come from: named data sets (in a folder or on the hub), files, Python's own documentation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jquant.data.files import SUFFIXES, read_documents
from jquant.data.python_docs import PYTHON_DOCS, python_docs
from jquant.data.text import Sampling, Split, Text, make_text
from jquant.errors import DataError

_CALIBRATION_PERCENT: Final = 80  # the first part of a file without splits of its own; the rest evaluates


@dataclass(frozen=True)
class _Origin:
    """Say where one split of a data set is: its rows on the hub, and patterns of file names in a folder, best first."""

    hub_split: str
    hub_file: str | None
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class _Dataset:
    """Describe a named data set: its place on the hub, how windows are cut, the origin of each split."""

    repository: str
    configuration: str | None
    sampling: Sampling
    origins: Mapping[Split, _Origin]


_DATASETS: Final[Mapping[str, _Dataset]] = {
    "wikitext2": _Dataset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "joined",
        {
            "calibration": _Origin(
                "train",
                None,
                (
                    "wikitext2_raw_train.jsonl.gz",
                    "wikitext-2-raw-v1/train-*.parquet",
                    "train-*.parquet",
                    "wiki.train.raw",
                    "wikitext2_raw_train_head.jsonl.gz",
                ),
            ),
            "evaluation": _Origin(
                "test",
                None,
                (
                    "wikitext2_raw_test.jsonl.gz",
                    "wikitext-2-raw-v1/test-*.parquet",
                    "test-*.parquet",
                    "wiki.test.raw",
                ),
            ),
        },
    ),
    "c4": _Dataset(
        "allenai/c4",
        None,
        "documents",
        {
            "calibration": _Origin(
                "train",
                "en/c4-train.00000-of-01024.json.gz",
                (
                    "en/c4-train.00000-of-01024.json.gz",
                    "c4-train.00000-of-01024.json.gz",
                    "c4_en_sample_300.jsonl.gz",
                ),
            ),
            "evaluation": _Origin(
                "validation",
                "en/c4-validation.00000-of-00008.json.gz",
                (
                    "en/c4-validation.00000-of-00008.json.gz",
                    "c4-validation.00000-of-00008.json.gz",
                    "c4_realnewslike_validation_1000.jsonl.gz",
                ),
            ),
        },
    ),
}
NAMES: Final = (PYTHON_DOCS, *_DATASETS)

_NOTES: Final[Mapping[str, str]] = {
    "wikitext2_raw_train_head.jsonl.gz": "only the first 3279 of the 36718 rows of the raw train split",
    "c4_en_sample_300.jsonl.gz": "300 English C4 documents, not shard 0 of the train split",
    "c4_realnewslike_validation_1000.jsonl.gz": "C4 realnewslike, not en: not comparable with published C4 figures",
}


def load_text(name: str | Path, split: Split, *, folder: Path | None = None) -> Text:
    """Load one split of a text, by the name of a data set or by the path of a file.

    The two splits never overlap. `wikitext2` calibrates on the raw train split and evaluates on the raw test split,
    `c4` on the first shard of train and of validation. A file has no splits, so its first 80 % (of the documents; of
    the characters, up to a line's end, of a `.txt`) calibrates and the rest evaluates.

    Args:
      name: one of `NAMES`, or a path ending in `.txt`, `.jsonl`, `.jsonl.gz` or `.parquet` (field `text` in the rows).
      split: "calibration" or "evaluation".
      folder: where the files of a named data set lie, itself or its folder `text`; without it they come from the hub
        through `datasets`.

    Returns:
      The documents, with their origin in `provenance` ("note" warns where a local file is less than the genuine split).

    Raises:
      DataError: the name is unknown, the file or the hub is out of reach, or the text is damaged or empty.

    Example:
      >>> load_text("python-docs", "evaluation").documents[0].splitlines()[0]
      'Assignment statements'
    """
    dataset = _DATASETS.get(str(name))
    if dataset is not None:
        if folder is None:
            return _from_hub(str(name), dataset, split)
        return _from_folder(str(name), dataset, split, folder)
    if name == PYTHON_DOCS:
        return python_docs(split)
    if isinstance(name, str) and not name.endswith(SUFFIXES) and not Path(name).exists():
        raise DataError(
            f"{name!r} is neither a data set nor a file: expected one of {', '.join(NAMES)}, "
            f"or a path ending in {', '.join(SUFFIXES)}"
        )
    return _from_file(Path(name), split)


def _from_hub(name: str, dataset: _Dataset, split: Split) -> Text:
    import datasets

    origin = dataset.origins[split]
    files = None if origin.hub_file is None else {origin.hub_split: origin.hub_file}
    try:
        where = (dataset.repository, dataset.configuration)
        rows = datasets.load_dataset(*where, data_files=files, split=origin.hub_split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name!r} ({split}) could not be loaded from {dataset.repository} on the Hugging Face hub: {error}. "
            f"Offline, give folder= with one of {', '.join(origin.patterns)} in it, or use {PYTHON_DOCS!r}"
        ) from error
    source = " ".join(filter(None, (dataset.repository, dataset.configuration, origin.hub_split, origin.hub_file)))
    return make_text(name, split, list(rows["text"]), {"source": source}, sampling=dataset.sampling)


def _from_folder(name: str, dataset: _Dataset, split: Split, folder: Path) -> Text:
    patterns = dataset.origins[split].patterns
    places = (place for pattern in patterns for place in (folder.glob(pattern), folder.glob(f"text/{pattern}")))
    paths = next((found for place in places if (found := sorted(place))), [])
    if not paths:
        raise DataError(
            f"{folder}: no {split} text of {name!r} here or in text/; expected one of {', '.join(patterns)}"
        )
    documents = tuple(document for path in paths for document in read_documents(path))
    provenance = {"source": " ".join(map(str, paths)), "file_sha256": " ".join(map(_file_digest, paths))}
    notes = {path.name: _NOTES[path.name] for path in paths if path.name in _NOTES}
    if notes:
        provenance["note"] = "; ".join(notes.values())
    return make_text(name, split, documents, provenance, sampling=dataset.sampling)


def _from_file(path: Path, split: Split) -> Text:
    documents = read_documents(path)
    if path.name.endswith(".txt"):
        calibration, evaluation = _cut_characters(documents[0])
        chosen: tuple[str, ...] = (calibration,) if split == "calibration" else (evaluation,)
        unit = "characters"
    else:
        cut = len(documents) * _CALIBRATION_PERCENT // 100
        chosen = documents[:cut] if split == "calibration" else documents[cut:]
        unit = "documents"
    if not any(document.strip() for document in chosen):
        raise DataError(
            f"{path}: too short to be split in calibration and evaluation text; it has {len(documents)} documents"
        )
    percent = f"first {_CALIBRATION_PERCENT}" if split == "calibration" else f"last {100 - _CALIBRATION_PERCENT}"
    provenance = {"source": str(path), "file_sha256": _file_digest(path), "part": f"{percent} % of the {unit}"}
    return make_text(str(path), split, chosen, provenance)


def _cut_characters(text: str) -> tuple[str, str]:
    target = len(text) * _CALIBRATION_PERCENT // 100
    line_end = text.rfind("\n", 0, target) + 1
    cut = line_end or target
    return text[:cut], text[cut:]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
