"""The command line. Each command is a file of `jquant/commands`, imported only when it is called."""

import os
from collections.abc import Sequence
from typing import Final, NoReturn

from cyclopts import App
from rich.console import Console

from jquant.errors import JquantError

# command -> what it does; its function is jquant.commands.<command>:run
_COMMANDS: Final = {
    "convert": "Write a Hugging Face folder, a GGUF file or a hub model as a jquant checkpoint.",
    "quantize": "Quantize a model by a recipe.",
    "plan": "Show what a recipe will give and cost on a model, from headers alone.",
    "export": "Write a checkpoint for transformers, vLLM, SGLang, GPTQModel or llama.cpp.",
    "verify": "Check that a Hugging Face folder, or a GGUF file, is what its reader reads.",
    "inspect": "List the linears of a checkpoint: format, bits, error.",
    "eval": "Measure the perplexity of a model, and tasks of lm-eval.",
    "bench": "Time a model and what recipes would make of it: prompts, tokens, memory.",
    "analyze": "Show what goes into linears, and how far a model is from another.",
    "needle": "Ask a model for needles in haystacks, by length and depth.",
    "compare": "Quantize a model by several recipes and print one table.",
    "generate": "Continue prompts.",
    "chat": "Talk with a chat model.",
    "demo": "Quantize SmolLM2-135M-Instruct to 4 bits, measure it, and ask it something.",
}
_FAILED: Final = 2  # exit code of an error that the user can mend
_INTERRUPTED: Final = 130  # 128 + SIGINT


def make_app() -> App:
    """Returns the command line's parser; commands are not imported yet."""
    app = App(
        name="jquant",
        help="Quantization of large language models in JAX and Flax.",
        suppress_keyboard_interrupt=False,  # `main` says how to go on
    )
    for name, summary in _COMMANDS.items():
        app.command(f"jquant.commands.{name}:run", name=name, help=summary)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors that jquant raises on purpose are one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    try:
        make_app()(arguments)
    except JquantError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        _leave(_FAILED)
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "interrupted; a quantization goes on from its last finished block when it is given again"
        )
        _leave(_INTERRUPTED)


def _leave(status: int) -> NoReturn:
    from jquant.processes import leave  # imports JAX, which a command that failed has done

    leave(status)
