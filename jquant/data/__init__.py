"""Text for calibration and evaluation: from a name or a path to documents, from documents to windows of tokens."""

from jquant.data.python_docs import PYTHON_DOCS
from jquant.data.sources import NAMES, load_text
from jquant.data.text import Sampling, Split, Text
from jquant.data.windows import TextTokenizer, load_windows, token_windows

__all__ = [
    "NAMES",
    "PYTHON_DOCS",
    "Sampling",
    "Split",
    "Text",
    "TextTokenizer",
    "load_text",
    "load_windows",
    "token_windows",
]
