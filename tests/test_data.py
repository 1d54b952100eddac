"""Texts and windows: documents out of every kind of file, disjoint splits, and the published protocols."""

import gzip
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from jquant.data import PYTHON_DOCS, Text, load_text, load_windows, token_windows
from jquant.errors import DataError

CHARACTERS = SimpleNamespace(encode=lambda text, verbose: [ord(letter) for letter in text])
ROWS = [f"row {i} of the file" for i in range(10)]


def words_tokenizer(*, bos: bool) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of one id per word, with a BOS in front where asked, and a short `model_max_length`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "c": 4}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=4)


def write_rows(path: Path, rows: list[str]) -> Path:
    """Write rows in the format that the name asks for."""
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "other": list(range(len(rows)))}), path)
    else:
        path.write_text(lines)
    return path


def paragraphs(text: Text) -> set[str]:
    """Return the paragraphs of a text, spaces and underlines of headings aside."""
    return {
        re.sub(r"[*=~^-]{2,}|\s", "", part) for document in text.documents for part in re.split(r"\n\s*\n", document)
    }


def test_python_docs_splits_share_no_paragraph_and_are_large_enough() -> None:
    calibration, evaluation = load_text(PYTHON_DOCS, "calibration"), load_text(PYTHON_DOCS, "evaluation")
    assert not paragraphs(calibration) & paragraphs(evaluation)
    assert len(evaluation.joined()) > 8 * 2048 * 5  # 8 windows of 2048 tokens, were a token 5 characters
    assert len(calibration.joined()) > 2 * len(evaluation.joined())
    assert evaluation == load_text(PYTHON_DOCS, "evaluation")
    assert evaluation.provenance["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


def test_python_docs_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"lacks; use a full Python"):
        load_text(PYTHON_DOCS, "evaluation")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_files_are_split_by_documents_without_overlap(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    calibration, evaluation = load_text(path, "calibration"), load_text(str(path), "evaluation")
    assert list(calibration.documents) == ROWS[:8]
    assert list(evaluation.documents) == ROWS[8:]
    assert calibration.provenance["part"] == "first 80 % of the documents"
    assert calibration.provenance["file_sha256"] == evaluation.provenance["file_sha256"]
    assert calibration.provenance["sha256"] != evaluation.provenance["sha256"]


def test_text_file_is_split_at_a_line_end(tmp_path: Path) -> None:
    content = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "lines.txt").write_text(content)
    first, last = (load_text(tmp_path / "lines.txt", split).joined() for split in ("calibration", "evaluation"))
    assert first + last == content
    assert first.endswith("\n")
    assert 0.78 < len(first) / len(content) <= 0.8


@pytest.mark.parametrize("evaluation_name", ["wikitext2_raw_test.jsonl.gz", "test-00000-of-00001.parquet"])
def test_wikitext2_from_a_folder(tmp_path: Path, evaluation_name: str) -> None:
    write_rows(tmp_path / evaluation_name, ["", " = Title = \n", "body\n"])
    write_rows(tmp_path / "wikitext2_raw_train_head.jsonl.gz", ["", "training\n"])
    evaluation = load_text("wikitext2", "evaluation", folder=tmp_path)
    assert evaluation.documents == ("", " = Title = \n", "body\n")
    assert "note" not in evaluation.provenance
    assert "3279" in load_text("wikitext2", "calibration", folder=tmp_path).provenance["note"]


def test_raw_wikitext_lines_become_the_rows_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \nbody\n")
    assert load_text("wikitext2", "evaluation", folder=tmp_path).documents == ("", " = Title = \n", "", "body\n")


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_rows(tmp_path / f"train-{shard:05d}-of-00002.parquet", [f"shard {shard}"])
    assert load_text("wikitext2", "calibration", folder=tmp_path).documents == ("shard 0", "shard 1")


def test_hub_is_asked_for_the_published_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*names: str | None, **options: object) -> dict[str, list[str]]:
        asked.append((names, options))
        return {"text": ROWS}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = load_text("c4", "evaluation")
    shard = "en/c4-validation.00000-of-00008.json.gz"
    assert asked == [(("allenai/c4", None), {"data_files": {"validation": shard}, "split": "validation"})]
    assert text.sampling == "documents"
    assert text.provenance["source"].endswith(shard)


def test_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*names: str | None, **options: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach.*folder=.*wikitext2_raw_test\.jsonl\.gz.*python-docs"):
        load_text("wikitext2", "evaluation")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"a\.jsonl:2: expected .*'text', got fields \['body'\]"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected .* got list"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"", "too short to be split in"),
        ("a.jsonl", b'{"text": "only one"}\n', "too short to be split in"),
        ("a.parquet", b"PAR?", "not a Parquet file"),
        ("a.csv", b"text", "expected a name ending in"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / name, "calibration")


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ROWS}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [*ROWS, None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"expected a column 'text', got \['body'\]"):
        load_text(tmp_path / "a.parquet", "evaluation")
    with pytest.raises(DataError, match="not text"):
        load_text(tmp_path / "b.parquet", "evaluation")


def test_unknown_names_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one of python-docs, wikitext2, c4"):
        load_text("wikitext", "evaluation")
    with pytest.raises(DataError, match="no such file"):
        load_text(tmp_path / "absent.txt", "evaluation")
    with pytest.raises(DataError, match=r"no evaluation text of 'c4' here"):
        load_text("c4", "evaluation", folder=tmp_path)


def test_consecutive_windows_are_of_the_stream_tokenised_once() -> None:
    text = Text("t", "evaluation", ("a b", "", "c a b c a"), "joined", {})
    windows = token_windows(text, words_tokenizer(bos=True), length=3)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[1, 2, 3], [4, 2, 3]]  # one BOS, the tail "c a" dropped
    assert token_windows(text, words_tokenizer(bos=False), length=3, count=1).tolist() == [[2, 3, 4]]


def test_long_text_does_not_warn(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    text = Text("t", "evaluation", ("a b c " * 20,), "joined", {})
    token_windows(text, words_tokenizer(bos=True), length=10)
    assert not caplog.records
    assert "longer than" not in capfd.readouterr().err


def test_random_crops_are_distinct_seeded_pieces_of_the_stream() -> None:
    letters = "".join(chr(200 + i) for i in range(60))
    text = Text("t", "calibration", (letters,), "joined", {})
    windows = token_windows(text, CHARACTERS, length=8, count=53, seed=1)
    assert len({int(window[0]) for window in windows}) == 53
    assert all("".join(map(chr, window)) in letters for window in windows)
    again = token_windows(text, CHARACTERS, length=8, count=53, seed=1)
    other = token_windows(text, CHARACTERS, length=8, count=53, seed=2)
    np.testing.assert_array_equal(windows, again)
    assert (windows != other).any()


def test_document_windows_follow_the_published_draw() -> None:
    """Spec 10.4 written with the module-level generator, as GPTQ's data code has it."""
    documents = tuple(chr(300 + i) * (3 * i) for i in range(8))
    windows = token_windows(Text("c4", "evaluation", documents, "documents", {}), CHARACTERS, length=9)
    state = random.getstate()
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = [ord(letter) for letter in documents[random.randint(0, len(documents) - 1)]]
            if len(ids) > 9:
                break
        start = random.randint(0, len(ids) - 9 - 1)
        expected.append(ids[start : start + 9])
    random.setstate(state)
    assert windows.tolist() == expected
    fewer = token_windows(Text("c4", "evaluation", documents, "documents", {}), CHARACTERS, length=9, count=5)
    assert fewer.tolist() == expected[:5]


@pytest.mark.parametrize(
    ("sampling", "count", "seed", "message"),
    [
        ("joined", None, None, "has 7 tokens, but 1 windows of 8 need 8"),
        ("joined", 2, None, "has 7 tokens, but 2 windows of 8 need 16"),
        ("joined", 3, 0, "has 7 tokens, but 3 windows of 8 need 10"),
        ("joined", None, 0, "need a count"),
        ("joined", 0, 0, "count of at least 1"),
        ("documents", 1, 0, r"longest of its 2 documents has 4 tokens, but .* at least 9"),
    ],
)
def test_too_short_text_is_measured(sampling: str, count: int | None, seed: int | None, message: str) -> None:
    text = Text("t", "calibration", ("abcd", "e"), sampling, {})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        token_windows(text, CHARACTERS, length=8, count=count, seed=seed)


def test_stored_windows_are_cut_to_size(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int64).reshape(4, 6)
    np.save(tmp_path / "windows.npy", stored)
    windows = load_windows(tmp_path / "windows.npy", length=5, count=3)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, stored[:3, :5])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((2, 9), np.int32), "has 2 windows of 9 tokens, but 3 of 5 are asked for"),
        (np.zeros((3, 4), np.int32), "has 3 windows of 4 tokens"),
        (np.zeros((3, 5), np.float32), "holds no windows of tokens"),
        (np.zeros(15, np.int32), "give one array of whole numbers"),
        (np.full((3, 5), -1), "has token ids from -1 to -1"),
        (np.full((3, 5), 2**31), "give 32-bit ids"),
    ],
)
def test_stored_windows_that_cannot_be_used(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    np.save(tmp_path / "windows.npy", stored)
    with pytest.raises(DataError, match=message):
        load_windows(tmp_path / "windows.npy", length=5, count=3)


def test_stored_windows_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as windows of tokens"):
        load_windows(tmp_path / "absent.npy", length=5, count=3)
    (tmp_path / "damaged.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"give what numpy\.save wrote"):
        load_windows(tmp_path / "damaged.npy", length=5, count=3)
