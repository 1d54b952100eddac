"""What a text is: documents, how windows are cut from them, and where they came from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from jquant.errors import DataError

type Split = Literal["calibration", "evaluation"]
type Sampling = Literal["joined", "documents"]

SEPARATOR: Final = "\n\n"  # GPTQ's data code joins the rows of WikiText-2 so; published perplexities depend on it


@dataclass(frozen=True)
class Text:
    """Hold the documents of one split of a data set.

    Attributes:
      name: the name or path that the text was loaded by.
      split: what it may be used for; the two splits of one name never overlap.
      documents: the documents in order.
      sampling: "joined", one stream with a blank line between documents, or "documents", windows within one document.
      provenance: origin of the text, always with "source" and "sha256" (of the joined documents in UTF-8).
    """

    name: str
    split: Split
    documents: tuple[str, ...]
    sampling: Sampling
    provenance: Mapping[str, str]

    def joined(self) -> str:
        """Return all documents as one string, a blank line between two."""
        return SEPARATOR.join(self.documents)


def make_text(
    name: str, split: Split, documents: Sequence[str], provenance: Mapping[str, str], *, sampling: Sampling = "joined"
) -> Text:
    """Build a `Text`, adding the digest of its documents to `provenance`.

    Raises:
      DataError: there is no document with anything but white space in it.
    """
    if not any(document.strip() for document in documents):
        raise DataError(f"the {split} split of {name!r} is empty: give a file that has text in it")
    digest = hashlib.sha256(SEPARATOR.join(documents).encode("utf-8", "surrogatepass")).hexdigest()
    return Text(name, split, tuple(documents), sampling, {**provenance, "sha256": digest})
