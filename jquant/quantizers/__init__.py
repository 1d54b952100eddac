"""Weight quantizers: how a matrix is rounded. Each file holds one final `WeightQuantizer`."""

from jquant.quantizers.base import Diagnostics as Diagnostics
from jquant.quantizers.base import WeightQuantizer as WeightQuantizer
from jquant.quantizers.base import proxy_loss as proxy_loss
from jquant.quantizers.base import weight_error as weight_error
from jquant.quantizers.bcq import Bcq as Bcq
from jquant.quantizers.gptq import Gptq as Gptq
from jquant.quantizers.gptq_razor import GptqRazor as GptqRazor
from jquant.quantizers.quip import Quip as Quip
from jquant.quantizers.razor import Razor as Razor
from jquant.quantizers.rtn import Clip as Clip
from jquant.quantizers.rtn import Rtn as Rtn
from jquant.quantizers.spqr import Spqr as Spqr
from jquant.quantizers.statistics import ABSMAX as ABSMAX
from jquant.quantizers.statistics import HESSIAN as HESSIAN
from jquant.quantizers.statistics import SecondMoment as SecondMoment
from jquant.quantizers.statistics import Statistic as Statistic
from jquant.quantizers.zeroquant import ZeroQuant as ZeroQuant
