"""Needles: hidden where they should be, marked by exact match, drawn; the published five prompts to the character."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import NEEDLES, NeedleGrid, NeedleTest, draw_map, five_needles, needle_grid, text_map
from eval.needle import FILLER, INSTRUCTION, KEYS, hide_needles, pass_key_prompt
from jquant.errors import DataError
from jquant.models import Llama, abstract_llama, tiny_config

HAYSTACK = "One sentence. Then comes another one. And a third! "
TEST = NeedleTest(lengths=(900, 1400), depths=(0.0, 40.0, 100.0))


class Characters:
    """A tokenizer of one id a character; `<` is what it adds by its own rule."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not verbose
        return [ord(letter) for letter in ("<" if add_special_tokens else "") + text]

    def decode(self, token_ids: Any, /, **options: Any) -> str:
        return "".join(map(chr, token_ids))


def model(context: int) -> Llama:
    return abstract_llama(dataclasses.replace(tiny_config(), max_position_embeddings=context))


@pytest.mark.parametrize("arrangement", ["alone", "together"])
def test_every_prompt_has_its_length_and_its_needles_behind_whole_sentences(arrangement: Any) -> None:
    test = dataclasses.replace(TEST, arrangement=arrangement)
    for depth, length in ((0.0, 900), (40.0, 900), (100.0, 1500)):
        for asked, prompt in zip(NEEDLES, hide_needles(Characters(), HAYSTACK, test, length=length, depth=depth)):
            text = Characters().decode(prompt)
            assert len(prompt) == length
            assert text.startswith(f"<{INSTRUCTION}")
            assert text.endswith(asked.question)
            body, rest = text.removeprefix(f"<{INSTRUCTION}").removesuffix(asked.question), []
            hidden = [asked] if arrangement == "alone" else list(NEEDLES)
            places = []
            for needle in hidden:
                before, found, body = body.partition(needle.text)
                assert found
                rest.append(before)
                places.append(len("".join(rest)))
                assert depth == 100.0 or not before.strip() or before.rstrip().endswith((".", "!"))
            hay = "".join(rest) + body
            assert (HAYSTACK * 30).startswith(hay)
            share = (100.0 - depth) / len(hidden)
            for rank, place in enumerate(places):
                due = len(hay) * (depth + rank * share) / 100
                assert due - len("Then comes another one. ") <= place <= due + 0.5


def test_a_grid_marks_what_was_found_and_fills_up_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(_: Llama, prompts: Sequence[Sequence[int]], *, max_tokens: int, prefill_chunk: int | None) -> Any:
        assert (max_tokens, prefill_chunk) == (7, 64)
        asked.append((len(prompts), len(prompts[0]) + max_tokens))
        written = []
        for text in map(Characters().decode, prompts):
            needle = next(one for one in NEEDLES if text.endswith(one.question))
            assert needle.text in text
            far = len(text) - text.index(needle.text) > 760
            written.append([ord(letter) for letter in ("no" if far else f" {needle.answer}")])
        return SimpleNamespace(tokens=written)

    monkeypatch.setattr("eval.needle.generate", read)
    seen: list[tuple[int, int, float]] = []
    sizes: dict[str, Any] = {"batch_size": 4, "prefill_chunk": 64, "on_cell": lambda *cell: seen.append(cell)}
    grid = needle_grid(model(1400), Characters(), HAYSTACK, TEST, **sizes)
    assert grid.found == ((1.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    assert asked == [(4, 900)] * 4 + [(4, 1400)] * 4  # fifteen prompts of each length, four at a time
    assert grid.answers[2][0] == tuple(f" {key}" for key in KEYS)
    assert grid.answers[0][1] == ("no",) * 5
    assert grid.share() == pytest.approx(4 / 6)
    assert seen[-1] == (30, 30, pytest.approx(4 / 6))


def test_the_five_keys_are_those_of_qllm_infer(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared / "data" / "needle"
    filler = json.loads((folder / "qllm_infer_haystack_example.jsonl").read_text())["input"]
    rows = [json.loads(line) for line in (folder / "qllm_infer_needle_examples.jsonl").read_text().splitlines()]
    assert filler == FILLER
    for row, key in zip(rows, KEYS, strict=True):
        assert row["target"] == key
        assert pass_key_prompt(key) == INSTRUCTION + filler * 5 + row["input"] + filler * 5 + (
            "What is the pass key? The pass key is "
        )
    assert len(filler) * 10 == 114_300

    def answer(_: Llama, prompts: Sequence[Sequence[int]], *, max_tokens: int, prefill_chunk: int | None) -> Any:
        del prefill_chunk
        assert max_tokens == 7  # a key of six characters and what the tokenizer adds
        key = Characters().decode(prompts[0]).partition("The pass key is ")[2][:6]
        return SimpleNamespace(tokens=[[ord(letter) for letter in (key if key != KEYS[1] else "8a360")]])

    monkeypatch.setattr("eval.needle.generate", answer)
    grid = five_needles(model(24_000), Characters(), copies=1)
    assert (grid.depths, grid.found) == ((50.0,), ((0.8,),))
    assert grid.lengths == (len(pass_key_prompt(KEYS[0], 1)) + 1 + 7,)


def test_maps(tmp_path: Path) -> None:
    grid = NeedleGrid((512, 8192), (0.0, 12.5), ((1.0, 0.5), (0.2, 0.0)), ())
    assert text_map(grid).splitlines() == ["depth    512   8192", "   0 % █ 100  ▒  50", "12.5 % ·  20  ·   0"]
    pytest.importorskip("matplotlib", reason="pictures are drawn with the extra `plots`")
    draw_map({"exact": grid, "kivi-2": grid}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs matplotlib, which is not installed: pip install 'jquant\[plots\]'"):
        draw_map({"exact": NeedleGrid((8,), (0.0,), ((1.0,),), ())}, tmp_path / "map.png")


def test_bad_requests() -> None:
    with pytest.raises(DataError, match="0 needles: give one of each"):
        NeedleTest(needles=())
    with pytest.raises(DataError, match="per cent of the haystack, 0 to 100"):
        NeedleTest(depths=(0.0, 101.0))
    with pytest.raises(DataError, match="1400 tokens, but the model's context is 1000"):
        needle_grid(model(1000), Characters(), HAYSTACK, TEST)
    with pytest.raises(DataError, match=r"of 193 tokens leaves -\d+ for the haystack"):
        needle_grid(model(300), Characters(), HAYSTACK, NeedleTest(lengths=(200,)))
    with pytest.raises(DataError, match="the haystack is empty"):
        needle_grid(model(1400), Characters(), "", TEST)
    with pytest.raises(DataError, match="copies=0"):
        five_needles(model(1400), Characters(), copies=0)
