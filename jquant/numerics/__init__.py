"""Numerical building blocks: arrays in, arrays out. Nothing here knows a format, a node or a model."""

from jquant.numerics.cayley import CayleyState, cayley_sgd, nearest_orthogonal
from jquant.numerics.haar import haar_matrix, random_signs
from jquant.numerics.hadamard import base_matrix, base_order, hadamard_matrix, hadamard_on_host, hadamard_transform
from jquant.numerics.integer import affine_product, integer_product
from jquant.numerics.kmeans import Histogram, count_values, match_spread, nearest_code, weighted_kmeans
from jquant.numerics.linalg import (
    DAMPING_LIMIT,
    DAMPING_STEP,
    InverseFactor,
    UnitFactor,
    inverse_factor,
    revive_dead,
    unit_factor,
)
from jquant.numerics.lookup import CHUNK, lookup_product, sign_tables
from jquant.numerics.offset import OffsetGrid, decode_offset, encode_offset, fit_offset_grid
from jquant.numerics.packing import pack, packed_length, unpack
from jquant.numerics.razor import Razored, RazorFidelity, razor_integers, shift_bits, unrazor
from jquant.numerics.rotation import Rotation, Transform, random_rotation, rotate, rotate_back, two_factors
from jquant.numerics.rounding import (
    Grid,
    Symmetry,
    as_stored,
    cast_scales,
    decode,
    encode,
    expand,
    fit_grid,
    range_of,
    safe_scale,
    search_range,
    straight_through,
    to_storage,
)

__all__ = [
    "CHUNK",
    "DAMPING_LIMIT",
    "DAMPING_STEP",
    "CayleyState",
    "Grid",
    "Histogram",
    "InverseFactor",
    "OffsetGrid",
    "RazorFidelity",
    "Razored",
    "Rotation",
    "Symmetry",
    "Transform",
    "UnitFactor",
    "affine_product",
    "as_stored",
    "base_matrix",
    "base_order",
    "cast_scales",
    "cayley_sgd",
    "count_values",
    "decode",
    "decode_offset",
    "encode",
    "encode_offset",
    "expand",
    "fit_grid",
    "fit_offset_grid",
    "haar_matrix",
    "hadamard_matrix",
    "hadamard_on_host",
    "hadamard_transform",
    "integer_product",
    "inverse_factor",
    "lookup_product",
    "match_spread",
    "nearest_code",
    "nearest_orthogonal",
    "pack",
    "packed_length",
    "random_rotation",
    "random_signs",
    "range_of",
    "razor_integers",
    "revive_dead",
    "rotate",
    "rotate_back",
    "safe_scale",
    "search_range",
    "shift_bits",
    "sign_tables",
    "straight_through",
    "to_storage",
    "two_factors",
    "unit_factor",
    "unpack",
    "unrazor",
    "weighted_kmeans",
]
