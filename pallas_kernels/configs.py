"""Which kernel multiplies a shape, and how it divides the work: a table of measured shapes, and a rule for others.

The tables `h100.json` and `h200.json` hold rows of a kind, a weight's shape and the least and most tokens that the row
serves, made by `python -m pallas_kernels.bench --tune 8 --table PATH` on the card that it names.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax

from pallas_kernels import compat, order
from pallas_kernels.binary import MOST_TOKENS as BINARY_TOKENS
from pallas_kernels.binary import fault_of_binary
from pallas_kernels.decode_config import MOST_TOKENS, DecodeConfig
from pallas_kernels.decode_rules import (
    LEAST_DEPTH,
    MANY_OF_FEW,
    MULTIPROCESSORS,
    ONE_BLOCK,
    by_warpgroups,
    by_warps,
    fits,
    of_binary,
    of_gate,
    of_spqr,
    rows_of,
)
from pallas_kernels.hadamard import RotationConfig
from pallas_kernels.prefill import PrefillConfig
from pallas_kernels.spqr import MOST_TOKENS as SPQR_TOKENS
from pallas_kernels.spqr import fault_of_spqr

type Kind = Literal["w4a16", "w4a8", "w8a8"]
type NarrowKind = Literal["binary2", "binary3", "binary4", "spqr3"]
type Card = Literal["H100", "H200"]
type Config = DecodeConfig | PrefillConfig

BINARY_KINDS: Final[tuple[NarrowKind, ...]] = ("binary2", "binary3", "binary4")
TABLES: Final[dict[Card, str]] = {"H100": "h100.json", "H200": "h200.json"}
MOST_STAGES: Final = 8
PREFILL_FROM: Final = 32  # tokens from which tuning tries the kernels of prefill.py too
TOGETHER: Final[Any] = {"together": 2, "barriers": "by step"}  # the fastest of some shapes, by some 3 %
FEW_NUMBERS: Final = 64 * 64  # of a token, padded; measured, see the head of hadamard.py
MOST_NUMBERS_OF_THREE: Final = 64 * 128  # of a token in registers, with three warpgroups
TILE_EFFICIENCY: Final = {  # of the tensor cores, by (tokens, warpgroups): estimates that rank tiles of one shape
    (256, 2): 1.0,
    (128, 2): 0.85,
    (64, 2): 0.6,
    (256, 1): 0.8,
    (128, 1): 0.65,
    (64, 1): 0.45,
    (32, 2): 0.35,
    (16, 2): 0.2,
    (8, 2): 0.1,
    (32, 1): 0.25,
    (16, 1): 0.13,
    (8, 1): 0.07,
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      kind: the widths of weight and activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      least: fewest tokens that the line serves.
      most: most tokens that the line serves.
      config: what was fastest.
      microseconds: its time with the most tokens that were measured.
    """

    kind: Kind
    outputs: int
    inputs: int
    least: int
    most: int
    config: Config
    microseconds: float


@functools.cache
def choose(kind: Kind, tokens: int, outputs: int, inputs: int, groups: int, card: Card | None = None) -> Config:
    """Returns the configuration for a product, whose type tells the kernel: the table's where it fits, else the rule's.

    Args:
      kind: the widths of weight and activations.
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the scales.
      card: whose table; None for that of this machine's first device, an H100's where that is neither.

    Raises:
      ValueError: no kernel multiplies this shape.

    Example:
      >>> type(choose("w4a16", 1, 4096, 4096, 32)).__name__, type(choose("w8a8", 1, 4096, 4096, 1)).__name__
      ('DecodeConfig', 'PrefillConfig')
    """
    card = card or card_of(jax.devices()[0].device_kind)
    found = _measured(kind, tokens, outputs, inputs, card)
    if found is not None and found.fault(outputs, inputs, groups) is None:
        return found
    decode = kind != "w8a8" and tokens <= MOST_TOKENS
    ranked: Iterable[Config] = _prefill(kind, tokens, outputs, inputs)
    if decode:
        ranked = by_warpgroups(tokens, outputs, inputs, groups, integer=kind != "w4a16")
    if kind == "w4a16" and tokens <= MANY_OF_FEW and card == "H100":  # where alone warps' instruction was measured
        ranked = [*by_warps(tokens, outputs, inputs, groups), *ranked]
    for config in ranked:
        if config.fault(outputs, inputs, groups) is None and (decode or kind == "w4a16" or groups == 1):
            return config
    raise ValueError(
        f"no {kind} kernel multiplies {tokens} tokens by a weight [{outputs}, {inputs}] in {groups} groups: kernels "
        "want a multiple of 64 outputs and inputs and of 32 inputs in a group, and one group for integers of more than "
        f"{MOST_TOKENS} tokens; keep the portable layout or pad"
    )


def choose_gated(tokens: int, outputs: int, inputs: int, groups: int) -> DecodeConfig:
    """Returns the configuration for a product that ends with a gate.

    Args:
      tokens: rows of the activations.
      outputs: rows of the weight, the gate's and up's.
      inputs: columns of the weight.
      groups: rows of the scales.

    Raises:
      ValueError: no kernel does so with this shape.

    Example:
      >>> config = choose_gated(16, 28672, 4096, 32)
      >>> config.depth, config.stages, config.warpgroups, config.splits, config.rows
      (256, 2, 1, 1, 128)
    """
    ranked = of_gate(tokens, outputs, inputs, groups) if tokens <= MANY_OF_FEW else []
    for config in ranked:
        if config.fault(outputs, inputs, groups) is None:
            return config
    raise ValueError(
        f"no kernel ends {tokens} tokens' product with a weight [{outputs}, {inputs}] in {groups} groups with a gate: "
        f"it wants at most {MANY_OF_FEW} tokens, and a multiple of 128 outputs, half of them the gate's"
    )


def fault(kind: Kind, outputs: int, inputs: int, groups: int) -> str | None:
    """Returns why no kernel multiplies a weight by any number of tokens; None where `choose` finds one for each number.

    Args:
      kind: the widths of weight and activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the scales.

    Example:
      >>> fault("w4a16", 4096, 4096, 32), fault("w8a8", 100, 4096, 1)
      (None, '100 outputs are no multiple of 64')
    """
    for count, what in ((outputs, "outputs"), (inputs, "inputs")):
        if count % LEAST_DEPTH:
            return f"{count} {what} are no multiple of {LEAST_DEPTH}"
    if groups > 1 and kind != "w4a16":
        return f"{groups} groups of inputs, kernels of integers take one scale for each output"
    if inputs % groups or not fits(inputs // groups, LEAST_DEPTH):
        return f"groups of {inputs / groups:g} inputs, kernels take {order.RUN} or a multiple of {LEAST_DEPTH}"
    return None


def choose_narrow(kind: NarrowKind, tokens: int, outputs: int, inputs: int, groups: int) -> DecodeConfig:
    """Returns the configuration for a narrow weight: the deepest copies, and splits where tiles fill blocks badly.

    Args:
      kind: the weight's format.
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the alphas.

    Raises:
      ValueError: no kernel multiplies this shape.

    Example:
      >>> config = choose_narrow("binary3", 1, 7168, 28672, 224)
      >>> config.depth, config.stages, config.warpgroups, config.splits, config.instruction, config.pieces
      (512, 2, 4, 1, 'warp', 'by kernel')
    """
    found = _narrow(kind, tokens, outputs, inputs, groups)
    if found is not None:
        return found
    raise ValueError(
        f"no {kind} kernel multiplies {tokens} tokens by a weight [{outputs}, {inputs}] in {groups} groups: it wants a "
        "multiple of 64 outputs, groups of 16 (SpQR) or at least 64 inputs; keep the portable layout or pad"
    )


def narrow_fault(kind: str, outputs: int, inputs: int, groups: int) -> str | None:
    """Returns why a narrow weight has no kernel for some number of tokens that its kernel takes; None where it has.

    Args:
      kind: the weight's format, as of `NarrowKind`, or with another number of planes.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the alphas, or of SpQR's scales.

    Example:
      >>> narrow_fault("binary3", 4096, 4096, 32), narrow_fault("binary4", 64, 4096, 4096)
      (None, 'groups of 1 inputs, kernels of binary codes take 64, 128 or 256')
    """
    known = next((each for each in BINARY_KINDS if each == kind), None)
    if known is None:
        return f"{kind[-1]} planes of signs, kernels have 2 to 4"
    if any(_narrow(known, tokens, outputs, inputs, groups) is None for tokens in (1, most_tokens(known))):
        return f"groups of {inputs // groups} inputs, kernels of binary codes take 64, 128 or 256"
    return None


def _narrow(kind: NarrowKind, tokens: int, outputs: int, inputs: int, groups: int) -> DecodeConfig | None:
    if tokens > most_tokens(kind):
        return None
    for config in of_spqr(outputs, inputs) if kind == "spqr3" else of_binary(int(kind[-1]), tokens, outputs):
        if kind == "spqr3":
            fault = fault_of_spqr(config, outputs, inputs)
        else:
            fault = fault_of_binary(config, int(kind[-1]), outputs, inputs, groups)
        if fault is None:
            return config
    return None


def most_tokens(kind: NarrowKind) -> int:
    """Returns how many tokens a narrow weight's kernel takes."""
    return SPQR_TOKENS if kind == "spqr3" else BINARY_TOKENS


@functools.cache
def choose_rotation(padded: int, fast: int) -> RotationConfig:
    """Returns the configuration of `hadamard.rotate_quantize`: as many warpgroups as registers allow.

    Args:
      padded: rows of the left matrix.
      fast: rows of the right matrix.

    Example:
      >>> choose_rotation(64, 128).warpgroups, choose_rotation(128, 128).warpgroups
      (3, 2)
    """
    numbers = padded * fast
    if numbers <= FEW_NUMBERS:  # two blocks of a multiprocessor
        return RotationConfig(warpgroups=2, blocks=2 * MULTIPROCESSORS, stages=2)
    return RotationConfig(warpgroups=3 if numbers <= MOST_NUMBERS_OF_THREE else 2, blocks=MULTIPROCESSORS)


def card_of(device: str) -> Card:
    """Returns whose table serves a device, by JAX's `device_kind`.

    >>> card_of("NVIDIA H200"), card_of("NVIDIA H100 80GB HBM3")
    ('H200', 'H100')
    """
    return "H200" if "H200" in device else "H100"


@functools.cache
def table(card: Card) -> tuple[Row, ...]:
    """Returns the rows of a card's table."""
    text = (importlib.resources.files("pallas_kernels") / TABLES[card]).read_text(encoding="utf-8")
    return tuple(_row(fields) for fields in json.loads(text)["rows"])


def merged(device: str, source: str, measured: list[Row]) -> str:
    """Returns the text of a table: this package's rows for the device, but `measured` for the same products."""
    rows = {(row.kind, row.outputs, row.inputs, row.least): row for row in (*table(card_of(device)), *measured)}
    lines = []
    for row in (rows[key] for key in sorted(rows)):
        kernel = "decode" if isinstance(row.config, DecodeConfig) else "prefill"
        set_ = {
            field.name: getattr(row.config, field.name)
            for field in dataclasses.fields(row.config)
            if getattr(row.config, field.name) != field.default
        }
        line = {"kind": row.kind, "outputs": row.outputs, "inputs": row.inputs, "tokens": [row.least, row.most]}
        lines.append(
            "  " + json.dumps(line | {"kernel": kernel, "config": set_, "microseconds": round(row.microseconds, 1)})
        )
    head = f' "device": {json.dumps(device)},\n "source": {json.dumps(source)},\n "rows": [\n'
    return "{\n" + head + ",\n".join(lines) + "\n ]\n}\n"


def in_table(config: Config) -> bool:
    """Tells whether a configuration is a row's own and not the rule's."""
    return any(row.config is config for card in TABLES for row in table(card))


def candidates(kind: Kind, tokens: int, outputs: int, inputs: int, groups: int) -> list[Config]:
    """Returns the configurations among which tuning chooses, the present choice first."""
    found: list[Config] = [choose(kind, tokens, outputs, inputs, groups)]
    if kind == "w4a16" and tokens <= MANY_OF_FEW:
        found += [
            each for each in by_warps(tokens, outputs, inputs, groups) if not each.fault(outputs, inputs, groups)
        ][:2]
    if kind != "w8a8" and tokens <= MOST_TOKENS:
        for rows in rows_of(tokens):
            plain = by_warpgroups(tokens, outputs, inputs, groups, integer=kind != "w4a16", rows=rows)
            plain = plain[: 8 // len(rows_of(tokens)) ** 2]
            found += [each for one in plain for each in (dataclasses.replace(one, **TOGETHER), one)]
    if kind == "w8a8" or tokens >= PREFILL_FROM:
        found += _prefill(kind, tokens, outputs, inputs)[:6]
    return list(dict.fromkeys(config for config in found if config.fault(outputs, inputs, groups) is None))


def _row(fields: dict[str, Any]) -> Row:
    least, most = fields["tokens"]
    config: type[DecodeConfig | PrefillConfig] = DecodeConfig if fields["kernel"] == "decode" else PrefillConfig
    return Row(
        fields["kind"],
        fields["outputs"],
        fields["inputs"],
        least,
        most,
        config(**fields["config"]),
        fields["microseconds"],
    )


def _measured(kind: Kind, tokens: int, outputs: int, inputs: int, card: Card) -> Config | None:
    """Returns the configuration of the first row of a card's table that serves so many tokens."""
    for row in table(card):
        if (row.kind, row.outputs, row.inputs) == (kind, outputs, inputs) and row.least <= tokens <= row.most:
            return row.config
    return None


def _prefill(kind: Kind, tokens: int, outputs: int, inputs: int) -> list[Config]:
    """Returns configurations of prefill.py, those first whose tiles fill the multiprocessors best."""
    of_x, of_codes = (2 if kind == "w4a16" else 1), (1.0 if kind == "w8a8" else 0.5)
    ranked: list[tuple[float, PrefillConfig]] = []
    for (columns, warpgroups), efficiency in TILE_EFFICIENCY.items():
        for cluster in (2, 1):
            side = compat.ROWS_OF_ACCUMULATOR * warpgroups
            if outputs % (side * cluster) or (columns > tokens and columns > 8 * compat.whole_tiles(tokens, 8)):
                continue
            rounds = compat.whole_tiles(compat.whole_tiles(tokens, columns) * (outputs // side), MULTIPROCESSORS)
            cost = rounds * columns * warpgroups / efficiency * (1.0 if cluster == 2 else 1.02)
            for depth in (128, 64) if kind != "w4a16" or columns <= 128 else (64,):
                spill = min(columns, 256 if kind == "w4a16" else 64)
                room = ONE_BLOCK - 2 * side * spill
                most = min(MOST_STAGES, math.floor(room / (depth * (columns * of_x + side * of_codes))))
                stages = max(count for count in range(1, most + 1) if inputs // depth % count == 0)
                if inputs % depth == 0:
                    slower = 1.0 if depth == 128 or kind == "w4a16" else 1.06
                    config = PrefillConfig(columns, depth, stages, warpgroups, cluster, spill=spill)
                    ranked.append((cost * slower, config))
    return [config for _, config in sorted(ranked, key=lambda pair: pair[0])]
