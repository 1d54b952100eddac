"""Oracle for packing: write every code bit by bit into a stream, then collect the bytes. numpy."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of codes [n, out] along axis 0; bit t of the stream is bit t mod 8 of byte t // 8."""
    columns = []
    for column in codes.T:
        stream = [int(code) >> place & 1 for code in column for place in range(bits)]
        columns.append(np.packbits(np.array(stream, dtype=np.uint8), bitorder="little"))
    return np.stack(columns, axis=1)
