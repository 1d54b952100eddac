"""Exact transforms: pure functions that rewrite a model and leave its outputs as they are."""

from jquant.transforms.fold_norms import check_foldable as check_foldable
from jquant.transforms.fold_norms import fold_norms as fold_norms
from jquant.transforms.host import Operator as Operator
from jquant.transforms.host import check_unquantized as check_unquantized
from jquant.transforms.host import on_host as on_host
from jquant.transforms.rotate import ROTATED_PARTS as ROTATED_PARTS
from jquant.transforms.rotate import RotatedPart as RotatedPart
from jquant.transforms.rotate import Turns as Turns
from jquant.transforms.rotate import check_rotation as check_rotation
from jquant.transforms.rotate import residual_rotation as residual_rotation
from jquant.transforms.rotate import rotate as rotate
from jquant.transforms.rotate import rotate_linear as rotate_linear
from jquant.transforms.rotate import subtract_embedding_mean as subtract_embedding_mean
from jquant.transforms.smooth import SMOOTHED as SMOOTHED
from jquant.transforms.smooth import check_alpha as check_alpha
from jquant.transforms.smooth import check_smoothing as check_smoothing
from jquant.transforms.smooth import smooth as smooth
from jquant.transforms.smooth import smooth_block as smooth_block
from jquant.transforms.smooth import smoothing_scales as smoothing_scales
from jquant.transforms.untie import own_head as own_head
from jquant.transforms.untie import untie as untie
