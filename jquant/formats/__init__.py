"""Formats: what quantized data is. Each file holds one final `QuantizedTensor`."""

from jquant.formats.base import Layout as Layout
from jquant.formats.base import QuantizedTensor as QuantizedTensor
from jquant.formats.base import split_outputs as split_outputs
from jquant.formats.base import tree_nbytes as tree_nbytes
from jquant.formats.binary import BinaryFormat as BinaryFormat
from jquant.formats.binary import BinaryTensor as BinaryTensor
from jquant.formats.binary import binary_from_uniform as binary_from_uniform
from jquant.formats.binary import quantize_binary as quantize_binary
from jquant.formats.centered import CenteredTensor as CenteredTensor
from jquant.formats.centered import quantize_centered as quantize_centered
from jquant.formats.composed import PermutedTensor as PermutedTensor
from jquant.formats.razored import RazoredFormat as RazoredFormat
from jquant.formats.razored import RazoredTensor as RazoredTensor
from jquant.formats.razored import quantize_razored as quantize_razored
from jquant.formats.rotated import RotatedTensor as RotatedTensor
from jquant.formats.rotated import draw_rotations as draw_rotations
from jquant.formats.rotated import rotated as rotated
from jquant.formats.uniform import ScaleDtype as ScaleDtype
from jquant.formats.uniform import UniformFormat as UniformFormat
from jquant.formats.uniform import UniformTensor as UniformTensor
from jquant.formats.uniform import quantize_uniform as quantize_uniform
