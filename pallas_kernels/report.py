"""Rows of the benchmark in words."""

from typing import Any, Final

from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.prefill import PrefillConfig
from pallas_kernels.rotation_case import RotationCase

HEAD: Final = f"{'kernel':34s}      us  of peak  x bf16  x best XLA  error    bf16's   target"


def line(case: Any, row: dict[str, Any]) -> str:
    """Returns a product's row in words."""
    zeros = " zeros" if case.zeros else ""
    text = f"{case.kind} {case.tokens:5d} x {case.outputs}x{case.inputs} g{case.inputs // case.groups}{zeros}".ljust(34)
    if "failure" in row:
        return f"{text} FAILED with {row.get('config')}: {row['failure'][:200]}"
    if "rate" in row:
        text += f"{row['microseconds']:8.1f} {row['of_peak']:7.0%} {row['over_bf16']:8.2f} {row['over_best_xla']:10.2f}"
    text += f"   {row['errors'][0]:.2e} {row['bf16_error']:.2e} {row.get('target', '')}"
    changed = {name: value for name, value in row["config"].items() if value != _default(row, name)}
    return (
        f"{text} {'' if row['same_bits'] else 'OTHER BITS '}{row['kernel'] if 'chosen' in row else ' tried'} {changed}"
    )


def rotation_line(case: RotationCase, row: dict[str, Any]) -> str:
    """Returns a rotation's row in words."""
    text = f"rotation {case.tokens:5d} x {case.order} of {case.base}".ljust(34)
    if "failure" in row:
        return f"{text} FAILED: {row['failure'][:200]}"
    return (
        f"{text}{row['microseconds']:8.1f} {row['of_peak']:7.0%} {'':8s} {row['xla'] / row['microseconds']:10.2f}   "
        f"{row['share']:.1%} of codes differ, at most by {row['most']:.0f}; {row['target']}"
    )


def _default(row: dict[str, Any], name: str) -> Any:
    config: Any = DecodeConfig() if row["kernel"] == "decode" else PrefillConfig()
    return getattr(config, name)
