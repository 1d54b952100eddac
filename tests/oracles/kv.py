"""KV caches in numpy, float64, token by token: lists that grow, as the papers tell it."""

import numpy as np


def offset_group(x: np.ndarray, bits: int) -> np.ndarray:
    """Round one group on the grid that begins at its least number; the range counts as 1e-5 at least."""
    scale = max(x.max() - x.min(), 1e-5) / (2**bits - 1)
    return np.clip(np.round((x - x.min()) / scale), 0, 2**bits - 1) * scale + x.min()


def zero_group(x: np.ndarray, bits: int, clip: float) -> np.ndarray:
    """Round one group on a grid through zero with an integer zero, its range shrunk by `clip` (QuaRot)."""
    low, high = clip * min(x.min(), 0.0), clip * max(x.max(), 0.0)
    if low == high == 0.0:
        low, high = -1.0, 1.0
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def symmetric_group(x: np.ndarray, bits: int, clip: float) -> np.ndarray:
    """Round one group on the restricted symmetric grid."""
    largest = clip * np.abs(x).max() or 1.0
    scale = largest / (2 ** (bits - 1) - 1)
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


class KiviOracle:
    """One sequence's cache as KIVI's code keeps it: coded arrays and exact lists, changed after each attention."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        self.coded_keys: list[np.ndarray] = []
        self.coded_values: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def prompt(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Store a whole prompt [tokens, heads, dim]."""
        whole = len(keys) // self.residual * self.residual
        behind = max(0, len(values) - self.residual)
        self._code_keys(keys[:whole])
        self.keys = list(keys[whole:])
        self.coded_values = [self._code_value(value) for value in values[:behind]]
        self.values = list(values[behind:])

    def step(self, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add one token; return what its query sees, and code what is due behind it."""
        self.keys.append(key)
        self.values.append(value)
        seen = self.rest()
        if len(self.keys) == self.residual:
            self._code_keys(np.stack(self.keys))
            self.keys = []
        if len(self.values) > self.residual:
            self.coded_values.append(self._code_value(self.values.pop(0)))
        return seen

    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and values as they are stored."""
        return np.stack(self.coded_keys + self.keys), np.stack(self.coded_values + self.values)

    def _code_keys(self, keys: np.ndarray) -> None:
        coded = keys.copy()
        for start in range(0, len(keys), self.group):
            for head, channel in np.ndindex(keys.shape[1:]):
                group = keys[start : start + self.group, head, channel]
                coded[start : start + self.group, head, channel] = offset_group(group, self.bits)
        self.coded_keys += list(coded)

    def _code_value(self, value: np.ndarray) -> np.ndarray:
        groups = value.reshape(-1, self.group)
        return np.stack([offset_group(group, self.bits) for group in groups]).reshape(value.shape)
