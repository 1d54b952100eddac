"""Calibration: block by block through the model, with finished blocks kept on disk."""

from jquant.calibration.absmax import collect_absmax as collect_absmax
from jquant.calibration.sequential import check_weights as check_weights
from jquant.calibration.sequential import dense_kernels as dense_kernels
from jquant.calibration.sequential import quantize_blocks as quantize_blocks
from jquant.calibration.store import BlockStore as BlockStore
