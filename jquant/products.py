"""What multiplies a linear, in words: what `jquant.targets` chooses and `inspect` shows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """What multiplies one linear's input by its weight.

    Attributes:
      kernel: the kernels' name, such as "W4A16"; None where XLA multiplies.
      note: the shape to which the weight is filled up, or why there is no kernel; empty for neither.
    """

    kernel: str | None
    note: str = ""

    def describe(self) -> str:
        """Returns both in words.

        >>> Product("W4A16").describe(), Product(None, "float32 weights").describe()
        ('W4A16', 'XLA: float32 weights')
        """
        return ": ".join(part for part in (self.kernel or "XLA", self.note) if part)
