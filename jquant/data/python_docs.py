"""`python-docs`: the text that every Python carries, the help topics of `pydoc_data.topics`, in two disjoint splits.

Topics nest: "compound" contains "if", "while" and others word for word. So a paragraph is kept only in the first
topic, in sorted order, that has it; then whole topics go to one split or the other. The choice hashes the topic's
name, so that a topic stays in its split when a later Python adds or removes others. The wording differs between
Python versions: figures are comparable within one.
"""

import hashlib
import re
import sys
from collections.abc import Mapping
from typing import Final

from jquant.data.text import SEPARATOR, Split, Text, make_text
from jquant.errors import DataError

PYTHON_DOCS: Final = "python-docs"

# One part in three evaluates, the one that has no topic over a quarter of it: 100 of 397 kB in Python 3.12.
_PARTS: Final = 3
_EVALUATION_PART: Final = 2
_UNDERLINES: Final = "*=-~^"  # of headings, which differ between a topic and the same section nested in another
_BLANK_LINES: Final = re.compile(r"\n\s*\n")


def python_docs(split: Split) -> Text:
    """Return one split of the help topics of the running Python, one document a topic.

    Raises:
      DataError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"{PYTHON_DOCS!r} needs the module pydoc_data.topics, which this Python ({sys.executable}) lacks; "
            "use a full Python installation, or give a text file"
        ) from error
    documents = {name: text for name, text in _distinct(topics).items() if _split_of(name) == split}
    provenance = {
        "source": "pydoc_data.topics (CPython documentation, PSF licence)",
        "python": ".".join(str(number) for number in sys.version_info[:3]),
        "topics": " ".join(documents),
    }
    return make_text(PYTHON_DOCS, split, tuple(documents.values()), provenance)


def _distinct(topics: Mapping[str, str]) -> dict[str, str]:
    """Drop each paragraph that an earlier topic has, spaces and underlines aside, then topics with nothing left."""
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics):
        paragraphs = []
        for paragraph in _BLANK_LINES.split(topics[name].strip("\n")):
            words = " ".join(word for word in paragraph.split() if word.strip(_UNDERLINES))
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            kept[name] = SEPARATOR.join(paragraphs)
    return kept


def _split_of(topic: str) -> Split:
    part = hashlib.sha256(topic.encode()).digest()[0] % _PARTS
    return "evaluation" if part == _EVALUATION_PART else "calibration"
