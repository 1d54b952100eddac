"""Programs compiled ahead: the run compiles none of them again, and gives the same bits."""

import collections
import threading
from typing import Any

import jax
import numpy as np

from jquant.activations import StaticTensor
from jquant.blocks import ActivationRule, InputQuantizers, QuantizeWeights, Rule
from jquant.blocks.weights import collect, solve_jointly
from jquant.calibration import quantize_blocks
from jquant.calibration.sequential import _dense, advance
from jquant.formats import UniformFormat
from jquant.models import random_model, tiny_config
from jquant.quantizers import Gptq, Rtn

PASSES = (
    InputQuantizers((ActivationRule(".*down_proj", StaticTensor()),)),
    QuantizeWeights((Rule(".*o_proj", Gptq(UniformFormat(4, 32))), Rule(".*up_proj", Rtn(UniformFormat(3, 32))))),
)
LARGE = ("jit(collect)", "jit(solve_jointly)", "jit(_dense)", "jit(advance)")


def test_a_run_finds_its_programs_compiled() -> None:
    for step in (collect, solve_jointly, _dense, advance):
        step.clear_cache()
    model = random_model(tiny_config(), jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, 128)
    compiled: list[tuple[str, bool]] = []

    def note(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event.endswith("backend_compile_duration") and details.get("fun_name") in LARGE:
            compiled.append((details["fun_name"], threading.current_thread() is threading.main_thread()))

    jax.monitoring.register_event_duration_secs_listener(note)
    ahead, _ = quantize_blocks(model, tokens, PASSES, key=jax.random.key(0), compilers=2)
    counts = dict(zip(LARGE, (2, 2, 2, 1), strict=True))
    assert collections.Counter(compiled) == {(name, False): count for name, count in counts.items()}
    plain, _ = quantize_blocks(model, tokens, PASSES, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ahead, plain)
    assert len(compiled) == 7
