"""Measurements of models: perplexity, tasks, needles, chat. They take a `Llama` and never print."""

from eval.chat import SYSTEM_PROMPT, ChatTokenizer, Message, decode_pieces, render, reply
from eval.completion import Completion, Ending, complete
from eval.likelihood import Likelihood, log_likelihoods
from eval.needle import NEEDLES, Needle, NeedleGrid, NeedleTest, OnCell, five_needles, needle_grid
from eval.needle_map import draw_map, require_plots, text_map
from eval.perplexity import Perplexity, perplexity
from eval.tasks import TaskOptions, TaskResults, TaskScore, check_tasks, run_tasks

__all__ = [
    "NEEDLES",
    "SYSTEM_PROMPT",
    "ChatTokenizer",
    "Completion",
    "Ending",
    "Likelihood",
    "Message",
    "Needle",
    "NeedleGrid",
    "NeedleTest",
    "OnCell",
    "Perplexity",
    "TaskOptions",
    "TaskResults",
    "TaskScore",
    "check_tasks",
    "complete",
    "decode_pieces",
    "draw_map",
    "five_needles",
    "log_likelihoods",
    "needle_grid",
    "perplexity",
    "render",
    "reply",
    "require_plots",
    "run_tasks",
    "text_map",
]
