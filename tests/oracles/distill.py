"""Oracle for one step of layer-by-layer distillation: numpy float64, derivatives by central differences."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracles import llama


def loss(
    config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: str, inputs: np.ndarray, outputs: np.ndarray
) -> float:
    """Mean squared error of a block over [samples, tokens, hidden]."""
    given = np.stack([llama.block(config, arrays, path, sample) for sample in inputs])
    return float(np.mean((given - outputs) ** 2))


def slope(
    config: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    path: str,
    inputs: np.ndarray,
    outputs: np.ndarray,
    at: tuple[str, tuple[int, ...]],
    step: float = 1e-5,
) -> float:
    """The loss's derivative by one entry of one array."""
    name, place = at
    ends = []
    for sign in (1, -1):
        moved = arrays[name].copy()
        moved[place] += sign * step
        ends.append(loss(config, {**arrays, name: moved}, path, inputs, outputs))
    return (ends[0] - ends[1]) / (2 * step)


def first_adamw_step(value: float, slope: float, learning_rate: float, weight_decay: float) -> float:
    """AdamW's first step: both moments are corrected to the slope and its square."""
    return value - learning_rate * (slope / (abs(slope) + 1e-8) + weight_decay * value)
