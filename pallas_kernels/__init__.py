"""Matrix products for Hopper GPUs on raw arrays, each beside its meaning in plain jax.numpy (`reference`).

`prepare_*` writes a weight once as the kernels read it; `w4a16_matmul` and `integer_matmul` choose the kernel by shape
(`configs`): `decode` for few tokens, `prefill` for many. `binary_decode` and `spqr_decode` multiply by binary codes
and SpQR's weights, `rotate_quantize` rotates and quantizes activations in one pass. `compat` and `inline` hold what is
unstable in Pallas, `order` and `fields` the places of stored codes, `shapes` what tests and benchmarks share.
`packed_attention` and `kivi_attention` attend to packed caches (`flash`, written for the `lanes` of a warp);
`append_attention` writes a step's token into one and attends in one kernel.
`jquant.prepare` writes a model's weights and caches so.
"""

from pallas_kernels.append import Coding as Coding
from pallas_kernels.append import append_token as append_token
from pallas_kernels.append_attention import append_attention as append_attention
from pallas_kernels.append_attention import fault_of_append_attention as fault_of_append_attention
from pallas_kernels.attention import KiviPages as KiviPages
from pallas_kernels.attention import PackedCache as PackedCache
from pallas_kernels.attention import fault_of_heads as fault_of_heads
from pallas_kernels.attention import fault_of_kivi as fault_of_kivi
from pallas_kernels.attention import kivi_attention as kivi_attention
from pallas_kernels.attention import packed_attention as packed_attention
from pallas_kernels.attention_configs import choose_attention as choose_attention
from pallas_kernels.attention_configs import choose_kivi as choose_kivi
from pallas_kernels.attention_kernel import AttentionConfig as AttentionConfig
from pallas_kernels.binary import binary_decode as binary_decode
from pallas_kernels.feedback import FeedbackConfig as FeedbackConfig
from pallas_kernels.feedback import round_on_grids as round_on_grids
from pallas_kernels.feedback import round_to_steps as round_to_steps
from pallas_kernels.feedback import round_with_outliers as round_with_outliers
from pallas_kernels.flash_tokens import Grid as Grid
from pallas_kernels.hadamard import rotate_quantize as rotate_quantize
from pallas_kernels.kronecker import Rotation as Rotation
from pallas_kernels.kronecker import prepare_rotation as prepare_rotation
from pallas_kernels.kronecker import restore_rotation as restore_rotation
from pallas_kernels.matmul import integer_matmul as integer_matmul
from pallas_kernels.matmul import matmul_gated_fault as matmul_gated_fault
from pallas_kernels.matmul import matmul_onto_fault as matmul_onto_fault
from pallas_kernels.matmul import w4a16_matmul as w4a16_matmul
from pallas_kernels.matmul import w4a16_matmul_gated as w4a16_matmul_gated
from pallas_kernels.matmul import w4a16_matmul_onto as w4a16_matmul_onto
from pallas_kernels.matmul import w4a16_matmul_undivided as w4a16_matmul_undivided
from pallas_kernels.narrow import BinaryWeight as BinaryWeight
from pallas_kernels.narrow import SpqrWeight as SpqrWeight
from pallas_kernels.narrow import TwoLevelGrids as TwoLevelGrids
from pallas_kernels.narrow import prepare_binary as prepare_binary
from pallas_kernels.narrow import prepare_spqr as prepare_spqr
from pallas_kernels.narrow import restore_binary as restore_binary
from pallas_kernels.narrow import restore_spqr as restore_spqr
from pallas_kernels.residual import Undivided as Undivided
from pallas_kernels.spqr import spqr_decode as spqr_decode
from pallas_kernels.weights import FloatWeight as FloatWeight
from pallas_kernels.weights import IntegerWeight as IntegerWeight
from pallas_kernels.weights import prepare_w4a8 as prepare_w4a8
from pallas_kernels.weights import prepare_w4a16 as prepare_w4a16
from pallas_kernels.weights import prepare_w8a8 as prepare_w8a8
from pallas_kernels.weights import restore_integer as restore_integer
from pallas_kernels.weights import restore_w4a16 as restore_w4a16
