"""Tokenizers: taken as they are from a Hugging Face folder, or built from a GGUF file's vocabulary; no torch."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from convert.gguf_tokenizer import Vocabulary, build_tokenizer, read_vocabulary
from convert.source import locate
from jquant.errors import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes over a second; the functions that need it do

# Everything that belongs to the tokenizer or to how its model generates, and the licence that covers them.
_COPIED: Final = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.j*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, with its special tokens and its chat template.

    Args:
      path: a folder with tokenizer.json (a Hugging Face checkpoint, or ours), a .gguf file, or a hub id.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      ConversionError: there is none, or it is of a kind that cannot be built here.
    """
    from transformers import PreTrainedTokenizerFast

    place = locate(path)
    if place.suffix == ".gguf":
        return _from_vocabulary(read_vocabulary(place))
    if not (place / "tokenizer.json").is_file():
        raise ConversionError(
            f"{place} has no tokenizer.json; where it has tokenizer.model or vocab.json, write one with "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(place)
    except (ValueError, OSError, TypeError) as error:
        raise ConversionError(
            f"the tokenizer files of {place} cannot be read ({error}); download them again"
        ) from error


def save_tokenizer(source: str | Path, out: Path) -> tuple[str, ...]:
    """Writes the tokenizer of a checkpoint into a folder: a folder's files verbatim, a GGUF file's vocabulary rebuilt.

    Args:
      source: what `load_tokenizer` takes.
      out: folder to write into; made if absent.

    Returns:
      The names of the files written, relative to `out`.

    Raises:
      ConversionError: as `load_tokenizer`.
    """
    place = locate(source)
    if place.suffix == ".gguf":
        out.mkdir(parents=True, exist_ok=True)
        written = load_tokenizer(place).save_pretrained(out)
        return tuple(sorted(Path(file).name for file in written if Path(file).is_file()))
    if not (place / "tokenizer.json").is_file():
        load_tokenizer(place)  # raises, saying what is absent
    names = sorted({str(file.relative_to(place)) for pattern in _COPIED for file in place.glob(pattern)})
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if (out / name).resolve() != (place / name).resolve():
            shutil.copyfile(place / name, out / name)
    return tuple(names)


def _from_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    named = {f"{role}_token": vocabulary.tokens[index] for role, index in vocabulary.special.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(vocabulary),
        clean_up_tokenization_spaces=False,
        model_max_length=vocabulary.context_length,
        **named,
    )
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer
