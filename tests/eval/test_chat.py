"""Chat: the template's own tokens, and text pieces that never split a character."""

import functools
from collections.abc import Sequence

import jax
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from eval.chat import Message, decode_pieces, render, reply
from jquant.errors import DataError
from jquant.models import Llama, random_model, tiny_config
from jquant.runtime import generate
from jquant.sampling import Sampler

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'][0] }}:{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
CONVERSATION: list[Message] = [{"role": "user", "content": "hi"}]


def byte_tokenizer(template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of one id per byte (ids 2 to 257), so that most characters of most scripts span several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index for index, letter in enumerate(letters, start=2)}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def words_tokenizer(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of the SentencePiece kind, which drops the space before a text's first word."""
    core = tokenizers.Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


@functools.cache
def chat_model() -> Llama:
    """Build a random model whose vocabulary has all bytes."""
    config = tiny_config()
    return random_model(type(config)(**{**vars(config), "vocab_size": 258}), jax.random.key(1))


def test_render_is_the_template() -> None:
    tokenizer = byte_tokenizer()
    ids = render(tokenizer, [{"role": "system", "content": "be"}, *CONVERSATION])
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "<s>s:be<s>u:hi<s>a:"
    assert ids.count(0) == 3  # special tokens of the template are tokens, and no BOS is added to them


def test_no_template_and_no_messages_say_what_to_do() -> None:
    with pytest.raises(DataError, match="no chat template"):
        render(byte_tokenizer(None), CONVERSATION)
    with pytest.raises(DataError, match="role 'user'"):
        render(byte_tokenizer(), [])


@pytest.mark.parametrize("text", ["plain", "naïve 你好 🙂!", "🙂", "e\u0301 \ufffd end", ""])
def test_pieces_join_to_the_text_and_split_no_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces = list(decode_pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert len(pieces) == len(text)


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    tokenizer = byte_tokenizer()
    tokens = iter(tokenizer.encode("a🙂b"))
    pieces = decode_pieces(tokenizer, tokens)
    assert next(pieces) == "a"
    assert next(pieces) == "🙂"
    assert tokenizer.decode(list(tokens)) == "b"


def test_an_incomplete_end_is_not_lost() -> None:
    tokenizer = byte_tokenizer()
    assert list(decode_pieces(tokenizer, tokenizer.encode("a🙂")[:3])) == ["a", "\ufffd"]


def test_special_tokens_give_no_text() -> None:
    tokenizer = byte_tokenizer()
    assert "".join(decode_pieces(tokenizer, [0, *tokenizer.encode("hé"), 1])) == "hé"


def test_spaces_between_words_are_kept() -> None:
    tokenizer = words_tokenizer(["\u2581once", "\u2581upon", "a", "\u2581time", "\u2581"])
    tokens = [0, 1, 2, 3, 4, 4, 0]
    assert list(decode_pieces(tokenizer, tokens))[:3] == ["once", " upon", "a"]
    assert "".join(decode_pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0)])
def test_reply_is_the_decoded_generation(sampler: Sampler) -> None:
    model, tokenizer, key = chat_model(), byte_tokenizer(), jax.random.key(5)
    prompt = render(tokenizer, CONVERSATION)
    tokens = generate(model, [prompt], max_tokens=24, sampler=sampler, stop_tokens=(1,), key=key).tokens[0]
    text = "".join(reply(model, tokenizer, CONVERSATION, max_tokens=24, sampler=sampler, key=key))
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_reply_ends_at_the_end_of_text_and_at_further_stop_tokens() -> None:
    model, tokenizer = chat_model(), byte_tokenizer()
    tokens = generate(model, [render(tokenizer, CONVERSATION)], max_tokens=12).tokens[0]
    stop = tokens[4]
    expected = tokenizer.decode(tokens[: tokens.index(stop)], skip_special_tokens=True)
    assert "".join(reply(model, tokenizer, CONVERSATION, max_tokens=12, stop_tokens=[stop])) == expected
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert "".join(reply(model, tokenizer, CONVERSATION, max_tokens=12)) == expected


def test_a_conversation_that_is_too_long_is_refused_at_once() -> None:
    long: list[Message] = [{"role": "user", "content": "x" * 300}]
    with pytest.raises(DataError, match="context is 256"):
        reply(chat_model(), byte_tokenizer(), long, max_tokens=10)
