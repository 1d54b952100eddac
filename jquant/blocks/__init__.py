"""Block passes: how one decoder block is rewritten. Each file holds one final `BlockPass`."""

from jquant.blocks.activations import ActivationRule as ActivationRule
from jquant.blocks.activations import InputQuantizers as InputQuantizers
from jquant.blocks.attention import calibrated as calibrated
from jquant.blocks.attention import calibration_attention as calibration_attention
from jquant.blocks.base import BlockData as BlockData
from jquant.blocks.base import BlockPass as BlockPass
from jquant.blocks.base import Programs as Programs
from jquant.blocks.base import StatisticStore as StatisticStore
from jquant.blocks.base import Teacher as Teacher
from jquant.blocks.base import outline as outline
from jquant.blocks.base import summarize as summarize
from jquant.blocks.distill import Distill as Distill
from jquant.blocks.distill import Training as Training
from jquant.blocks.lanes import LANES as LANES
from jquant.blocks.lanes import Devices as Devices
from jquant.blocks.lanes import Lanes as Lanes
from jquant.blocks.lanes import lane_runs as lane_runs
from jquant.blocks.offloaded import ActivationPlace as ActivationPlace
from jquant.blocks.offloaded import Offloaded as Offloaded
from jquant.blocks.offloaded import piece_size as piece_size
from jquant.blocks.rules import check_pattern as check_pattern
from jquant.blocks.weights import SITES as SITES
from jquant.blocks.weights import QuantizeWeights as QuantizeWeights
from jquant.blocks.weights import Rule as Rule
from jquant.blocks.weights import collect as collect
from jquant.blocks.weights import collect_all as collect_all
