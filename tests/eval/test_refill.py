"""Rows that take the next prompt when a text ends: the texts of one prompt at a time, few programs, few idle rows."""

import dataclasses
import functools
from typing import Final

import jax
import numpy as np

from eval import refill
from eval.completion import Ending, complete
from jquant.models import Llama, random_model, stack_layers, tiny_config
from jquant.sampling import Sampler
from tests.eval.test_completion import Characters

STOP: Final = 5
PROMPTS: Final = [
    np.random.default_rng(seed).integers(0, 128, 3 + seed % 7).tolist() for seed in range(11)
]  # texts of 1 to 96 tokens


@functools.cache
def tiny(form: str) -> Llama:
    config = dataclasses.replace(tiny_config(), num_hidden_layers=1, max_position_embeddings=160)
    model = random_model(config, jax.random.key(0))
    return stack_layers(model) if form == "stacked" else model


def test_texts_are_those_of_one_prompt_at_a_time_and_rows_are_refilled() -> None:
    ending = Ending(token=STOP, max_tokens=96, sampler=Sampler(1.0))
    alone = [complete(tiny("stacked"), Characters(), [prompt], ending)[0].text for prompt in PROMPTS[:1]]
    for step in (refill._fill, refill._advance):
        step.clear_cache()
    ran: list[int] = []
    seen: list[int] = []
    options = {"batch_tokens": 4 * 32, "on_text": lambda index, one: seen.append(index), "on_steps": ran.append}
    texts = [one.text for one in complete(tiny("stacked"), Characters(), PROMPTS, ending, **options)]
    assert [step._cache_size() for step in (refill._fill, refill._advance)] == [1, 1]
    order = sorted(range(len(PROMPTS)), key=lambda index: -len(PROMPTS[index]))
    assert sorted(seen) == list(range(len(PROMPTS)))
    assert seen != order  # a short text ends before a long one that began earlier
    assert texts[0] == alone[0]  # drawn with the prompt's own key, whatever row it is in
    greedy = Ending(token=STOP, max_tokens=96)
    for form in ("stacked", "tuple"):
        found = complete(tiny(form), Characters(), PROMPTS, greedy, batch_tokens=4 * 32)
        single = [complete(tiny(form), Characters(), [prompt], greedy)[0] for prompt in PROMPTS]
        assert found == single
    assert len({len(text) for text in texts}) > 5
    useful = sum(map(len, texts))
    waiting = sum(
        4 * -(-max(len(texts[i]) for i in order[at : at + 4]) // refill.ROUND) * refill.ROUND for at in range(0, 11, 4)
    )
    assert useful / sum(ran) > useful / waiting
