"""Activation quantizers: what happens to a linear's input at run time. Each file holds one method and its node."""

from jquant.activations.base import ActivationMethod as ActivationMethod
from jquant.activations.base import ActivationQuantizer as ActivationQuantizer
from jquant.activations.outlier_split import OutlierQuantizer as OutlierQuantizer
from jquant.activations.outlier_split import OutlierSplit as OutlierSplit
from jquant.activations.per_token import PerToken as PerToken
from jquant.activations.per_token import TokenQuantizer as TokenQuantizer
from jquant.activations.razor import ActivationRazor as ActivationRazor
from jquant.activations.razor import RazorQuantizer as RazorQuantizer
from jquant.activations.static import StaticTensor as StaticTensor
from jquant.activations.static import TensorQuantizer as TensorQuantizer
