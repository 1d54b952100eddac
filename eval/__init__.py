"""Measurements and uses of models: perplexity, needles, chat. Functions take a `Llama`, return values, never print."""

from eval.chat import SYSTEM_PROMPT, ChatTokenizer, Message, decode_pieces, render, reply
from eval.needle import NEEDLES, Needle, NeedleGrid, NeedleTest, OnCell, five_needles, needle_grid
from eval.needle_map import draw_map, require_plots, text_map
from eval.perplexity import Perplexity, perplexity

__all__ = [
    "NEEDLES",
    "SYSTEM_PROMPT",
    "ChatTokenizer",
    "Message",
    "Needle",
    "NeedleGrid",
    "NeedleTest",
    "OnCell",
    "Perplexity",
    "decode_pieces",
    "draw_map",
    "five_needles",
    "needle_grid",
    "perplexity",
    "render",
    "reply",
    "require_plots",
    "text_map",
]
