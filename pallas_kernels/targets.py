"""What issue 6 asks of products on an H100: by kind, shape and tokens, and whether a measured row meets it."""

from typing import Any, Final

from pallas_kernels import configs

type Target = tuple[
    configs.Kind | configs.NarrowKind, tuple[int, int], tuple[int, ...], float | None, float | None, float | None
]

TARGETS: Final[
    tuple[Target, ...]
] = (  # kind, shape, tokens; share of the peak, times XLA's bfloat16, times XLA's best: issue 6
    ("w4a16", (8192, 8192), (1, 16), 0.75, 3.0, None),
    ("w8a8", (8192, 8192), (2048,), None, 1.85, 1.3),
    ("w4a8", (8192, 8192), (2048,), None, 1.85, 1.3),
    ("w4a16", (4096, 4096), (1, 16), 0.55, None, 1.0),
    ("w4a16", (8192, 8192), (64,), None, 2.0, None),
    ("w4a16", (8192, 8192), (256,), None, 1.05, None),
    ("w4a8", (8192, 8192), (1, 16, 64), None, 2.5, None),
    ("w4a16", (8192, 8192), (2048,), None, 1.0, None),
    ("w4a16", (28672, 8192), (1, 16), 0.75, 3.0, None),
    ("binary4", (7168, 28672), (1,), None, 2.6, None),
    ("binary4", (8192, 32768), (1,), None, 2.6, None),
    ("binary4", (12288, 49152), (1,), None, 2.6, None),
    ("binary3", (7168, 28672), (1,), None, 3.2, None),
    ("binary3", (8192, 32768), (1,), None, 3.2, None),
    ("binary3", (12288, 49152), (1,), None, 3.2, None),
    ("spqr3", (8192, 8192), (1,), None, 2.2, None),
    ("w4a16", (8192, 28672), (1, 16), 0.75, 3.0, None),
    ("w4a16", (14336, 4096), (1, 16), 0.75, 3.0, None),
    ("w4a16", (4096, 14336), (1, 16), 0.75, 3.0, None),
    ("w8a8", (4096, 4096), (2048,), None, 1.85, 1.3),
    ("w4a8", (4096, 4096), (2048,), None, 1.85, 1.3),
    ("w4a16", (4096, 4096), (2048,), None, 1.0, None),
)


def verdict(case: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Returns which of the issue's targets a right row meets or misses; without times, that it is right."""
    if "rate" not in row:
        return {"target": "right"}
    for kind, shape, tokens, *least in TARGETS:
        if (kind, shape) == (case.kind, (case.outputs, case.inputs)) and case.tokens in tokens:
            names = ("of_peak", "over_bf16", "over_best_xla")
            missed = [
                f"{name} {row[name]:.2f} < {low}" for name, low in zip(names, least) if low and not row[name] >= low
            ]
            return {"target": "missed: " + ", ".join(missed) if missed else "met"}
    return {}
