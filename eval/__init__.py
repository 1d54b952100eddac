"""Measurements of models: perplexity, tasks, statistics, needles, chat. They take a `Llama` and never print."""

from eval.chat import SYSTEM_PROMPT, ChatTokenizer, Message, ReplyTimes, decode_pieces, render, reply
from eval.choices import OtherChoice, bfloat16_steps, find_other_choices
from eval.completion import Completion, Ending, complete
from eval.latency import (
    Latency,
    Lowered,
    Phase,
    Program,
    Programs,
    Workload,
    check_workload,
    lower_latency,
    measure_latency,
    start_decode,
)
from eval.likelihood import Likelihood, log_likelihoods
from eval.magnitudes import Magnitudes, Tap, draw_magnitudes, magnitudes
from eval.needle import NEEDLES, Needle, NeedleGrid, NeedleTest, OnCell, five_needles, needle_grid
from eval.needle_map import draw_map, require_plots, text_map
from eval.perplexity import Perplexity, perplexity
from eval.statistics import (
    BlockDistance,
    Divergence,
    TapStatistics,
    block_distances,
    divergence,
    share_basis,
    tap_statistics,
)
from eval.tasks import TaskOptions, TaskResults, TaskScore, check_tasks, run_tasks

__all__ = [
    "NEEDLES",
    "SYSTEM_PROMPT",
    "BlockDistance",
    "ChatTokenizer",
    "Completion",
    "Divergence",
    "Ending",
    "Latency",
    "Likelihood",
    "Lowered",
    "Magnitudes",
    "Message",
    "Needle",
    "NeedleGrid",
    "NeedleTest",
    "OnCell",
    "OtherChoice",
    "Perplexity",
    "Phase",
    "Program",
    "Programs",
    "ReplyTimes",
    "Tap",
    "TapStatistics",
    "TaskOptions",
    "TaskResults",
    "TaskScore",
    "Workload",
    "bfloat16_steps",
    "block_distances",
    "check_tasks",
    "check_workload",
    "complete",
    "decode_pieces",
    "divergence",
    "draw_magnitudes",
    "draw_map",
    "find_other_choices",
    "five_needles",
    "log_likelihoods",
    "lower_latency",
    "magnitudes",
    "measure_latency",
    "needle_grid",
    "perplexity",
    "render",
    "reply",
    "require_plots",
    "run_tasks",
    "share_basis",
    "start_decode",
    "tap_statistics",
    "text_map",
]
