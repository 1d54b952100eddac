"""Errors that jquant raises on purpose, one class for each boundary where a user can be told what to change.

Every message says what was given, what was expected, and what to do. All of them are `ValueError`s, so that code that
knows nothing of jquant can still catch them.
"""


class JquantError(Exception):
    """Stand for any error that jquant raises on purpose; catch it to catch them all."""


class FormatError(JquantError, ValueError):
    """Report bits, shapes, groups or orders that a quantized format or a transform cannot have."""


class RecipeError(JquantError, ValueError):
    """Report a recipe that is misspelt, incomplete, contradictory, or that matches nothing in the model."""


class CalibrationError(JquantError, ValueError):
    """Report calibration data or statistics that cannot be used: missing, too few, or not finite."""


class ConversionError(JquantError, ValueError):
    """Report a foreign checkpoint that cannot be converted: wrong tensors or shapes, or an unknown setting."""


class CheckpointError(JquantError, ValueError):
    """Report a jquant checkpoint that cannot be written or read back."""


class DataError(JquantError, ValueError):
    """Report a data set that is absent, empty, or too short for what was asked of it."""


class ProcessError(JquantError, ValueError):
    """Report that another process of a run in several is gone."""


__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "FormatError",
    "JquantError",
    "ProcessError",
    "RecipeError",
]
