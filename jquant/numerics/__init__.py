"""Numerical building blocks: arrays in, arrays out. Nothing here knows a format, a node or a model."""

from jquant.numerics.hadamard import base_matrix, base_order, hadamard_matrix, hadamard_transform
from jquant.numerics.linalg import DAMPING_LIMIT, DAMPING_STEP, InverseFactor, inverse_factor, revive_dead
from jquant.numerics.lookup import CHUNK, lookup_product, sign_tables
from jquant.numerics.packing import pack, packed_length, unpack
from jquant.numerics.razor import Razored, RazorFidelity, razor_integers, shift_bits, unrazor
from jquant.numerics.rounding import (
    Grid,
    Symmetry,
    cast_scales,
    decode,
    encode,
    expand,
    fit_grid,
    range_of,
    safe_scale,
    search_range,
    straight_through,
)

__all__ = [
    "CHUNK",
    "DAMPING_LIMIT",
    "DAMPING_STEP",
    "Grid",
    "InverseFactor",
    "RazorFidelity",
    "Razored",
    "Symmetry",
    "base_matrix",
    "base_order",
    "cast_scales",
    "decode",
    "encode",
    "expand",
    "fit_grid",
    "hadamard_matrix",
    "hadamard_transform",
    "inverse_factor",
    "lookup_product",
    "pack",
    "packed_length",
    "range_of",
    "razor_integers",
    "revive_dead",
    "safe_scale",
    "search_range",
    "shift_bits",
    "sign_tables",
    "straight_through",
    "unpack",
    "unrazor",
]
