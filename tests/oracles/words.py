"""Oracle for words of 32 bits: each code is added to the words it lies in, one at a time. Python integers."""

import numpy as np

AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # where a word of AWQ holds output 8 w + k


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Words of codes [rows, n] along the last axis, code i at bit i * bits of the row's whole number."""
    count = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes:
        whole = sum(int(code) << index * bits for index, code in enumerate(row))
        rows.append([whole >> 32 * word & 0xFFFFFFFF for word in range(count)])
    return np.array(rows, np.uint32).reshape(len(codes), count).view(np.int32)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """Words of 4-bit codes [rows, n] in AWQ's order."""
    rows = []
    for row in codes:
        words = row.reshape(-1, 8)
        rows.append([sum(int(code) << shift for code, shift in zip(word, AWQ_SHIFTS, strict=True)) for word in words])
    return np.array(rows, np.uint32).view(np.int32)
