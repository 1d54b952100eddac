"""Calibration: block by block through the model, with finished blocks kept on disk."""

from jquant.calibration.absmax import collect_absmax as collect_absmax
from jquant.calibration.ahead import compilers as compilers
from jquant.calibration.kv import KvRange as KvRange
from jquant.calibration.kv import calibrate_float8_kv as calibrate_float8_kv
from jquant.calibration.kv import calibrate_razor_kv as calibrate_razor_kv
from jquant.calibration.kv import fingerprint as fingerprint
from jquant.calibration.kv import kv_ranges as kv_ranges
from jquant.calibration.kv import load_kv_codecs as load_kv_codecs
from jquant.calibration.kv import put_codecs as put_codecs
from jquant.calibration.kvquant import calibrate_kvquant as calibrate_kvquant
from jquant.calibration.learn_rotation import RotationTraining as RotationTraining
from jquant.calibration.learn_rotation import learn_rotation as learn_rotation
from jquant.calibration.sequential import WeightFaults as WeightFaults
from jquant.calibration.sequential import advance_all as advance_all
from jquant.calibration.sequential import check_weights as check_weights
from jquant.calibration.sequential import dense_kernels as dense_kernels
from jquant.calibration.sequential import quantize_blocks as quantize_blocks
from jquant.calibration.sequential import stream_blocks as stream_blocks
from jquant.calibration.shared import SharedStatistics as SharedStatistics
from jquant.calibration.smoothing import AlphaError as AlphaError
from jquant.calibration.smoothing import AlphaSearch as AlphaSearch
from jquant.calibration.smoothing import search_alpha as search_alpha
from jquant.calibration.store import BlockStore as BlockStore
from jquant.calibration.walk import Keeping as Keeping
