"""Measurements and uses of models: perplexity and chat. Functions take a `Llama`, return values and never print."""

from eval.chat import SYSTEM_PROMPT, ChatTokenizer, Message, decode_pieces, render, reply
from eval.perplexity import Perplexity, perplexity

__all__ = [
    "SYSTEM_PROMPT",
    "ChatTokenizer",
    "Message",
    "Perplexity",
    "decode_pieces",
    "perplexity",
    "render",
    "reply",
]
