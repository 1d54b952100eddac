"""Oracles for quantized activations, one token and one group at a time: numpy float64."""

import numpy as np

from tests.oracles import razor as razor_oracle


def rounded(
    values: np.ndarray, bits: int, symmetry: str, clip: float = 1.0, *, group: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes, scales and zeros of the groups of one token; codes are [features]."""
    codes, scales, zeros = [], [], []
    for part in values.reshape(-1, group or len(values)):
        low, high = part.min(), part.max()
        if symmetry != "asymmetric_zeroquant" and (group is None or symmetry != "asymmetric"):
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high == 0:
            low, high = -1.0, 1.0
        low, high = clip * low, clip * high
        largest, half = max(-low, high), 2 ** (bits - 1)
        scale = {
            "symmetric": largest / (half - 1),
            "symmetric_signed": largest / half,
            "symmetric_full": 2 * largest / (2**bits - 1),
            "asymmetric": (high - low) / (2**bits - 1),
            "asymmetric_zeroquant": (high - low) / 2**bits,
        }[symmetry]
        zero = np.rint(-low / scale) if symmetry.startswith("asymmetric") else half
        codes.append(np.clip(np.rint(part / scale) + zero, 0, 2**bits - 1))
        scales.append(scale)
        zeros.append(zero)
    return np.concatenate(codes), np.array(scales), np.array(zeros)


def dequantized(x: np.ndarray, bits: int, symmetry: str, clip: float = 1.0, *, group: int | None = None) -> np.ndarray:
    """The rows of x after rounding."""
    rows = []
    for row in x.astype(np.float64):
        codes, scales, zeros = rounded(row, bits, symmetry, clip, group=group)
        repeats = len(row) // len(scales)
        rows.append(np.repeat(scales, repeats) * (codes - np.repeat(zeros, repeats)))
    return np.stack(rows)


def llm_int8(
    x: np.ndarray, weight: np.ndarray, threshold: float = 6.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, row maxima, outlier features, and the product with a weight [out, in] rounded to int8 per output."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    columns = [i for i in range(x.shape[1]) if any(abs(value) >= threshold for value in x[:, i])]
    maxima = np.array([max([abs(v) for v in row if abs(v) < threshold and v != 0], default=127.0) for row in x])
    codes = np.rint(x * 127 / maxima[:, None])
    codes[:, columns] = 0
    weight_maxima = np.abs(weight).max(axis=1)
    weight_codes = np.rint(weight * 127 / weight_maxima[:, None])
    dense = weight_codes * weight_maxima[:, None] / 127
    product = codes @ weight_codes.T * maxima[:, None] * weight_maxima[None] / 127**2
    return codes, maxima, np.array(columns, int), product + x[:, columns] @ dense[:, columns].T


def razored(
    x: np.ndarray, base_bits: int, bits: int, group: int, scope: str, *, fidelity: str = "reference"
) -> np.ndarray:
    """The rows of x after QRazor, one scale for each row or for all."""
    x = x.astype(np.float64)
    rows = []
    for row in x:
        scale = razor_oracle.scale_of(row if scope == "per_token" else x.ravel(), base_bits, "absmax")
        integers = razor_oracle.integers_of(row, scale, base_bits, "absmax", fidelity)
        rows.append(scale * razor_oracle.razor(integers[None], bits, group, fidelity)[0])
    return np.stack(rows)
