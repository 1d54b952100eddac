"""What attends while a block is calibrated: the model's own attention, or on Hopper GPUs cuDNN's.

Calibration reads whole windows, keeps no cache, and needs nothing but what the linears multiply. Where keys and values
stay exact and in bfloat16, cuDNN gives the same attention in other roundings; each window goes alone through one
program, so that results are those of any number of devices, as before (docs/solvers.md has what an H100 gave). The
choice is made when a program is traced.
"""

import dataclasses

import jax

from jquant.formats import hopper_card
from jquant.kv import ExactKv
from jquant.models import Block, Llama, LlamaConfig, blocks, prompt_fault
from jquant.types import DType


def cudnn_fault(block: Block, config: LlamaConfig, dtype: DType, device_kind: str) -> str | None:
    """Returns why cuDNN does not attend for a block in calibration; None where it does.

    Args:
      block: with its codec of keys and values.
      config: the model's sizes.
      dtype: of the activations.
      device_kind: JAX's name of the device.

    Example:
      >>> from jquant.models import abstract_llama, blocks, tiny_config
      >>> block = blocks(abstract_llama(tiny_config(), "bfloat16"))[0]
      >>> cudnn_fault(block, tiny_config(), "bfloat16", "cpu")
      'cpu is no Hopper GPU'
    """
    codec = block.self_attn.kv_codec
    if hopper_card(device_kind) is None:
        return f"{device_kind} is no Hopper GPU"
    if not isinstance(codec, ExactKv):
        return f"keys and values are rounded by {type(codec).__name__}"
    return prompt_fault(codec, config, dtype)


def calibration_attention(model: Llama) -> dict[str, str]:
    """Returns what a run has to say of its attention, for its report and for who goes on with it: nothing of the usual.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> calibration_attention(abstract_llama(tiny_config(), "bfloat16"))
      {}
    """
    kind, dtype = jax.devices()[0].device_kind, model.embed_tokens.dtype
    taken = [cudnn_fault(block, model.config, dtype, kind) is None for block in blocks(model)]
    return {"calibration attention": f"cuDNN in {sum(taken)} of {len(taken)} blocks"} if any(taken) else {}


def calibrated(block: Block, config: LlamaConfig, dtype: DType) -> LlamaConfig:
    """Returns the sizes by which a block attends as calibration shall, on JAX's first device; for `prompt_block`.

    Args:
      block: as it is.
      config: the model's sizes.
      dtype: of the activations.
    """
    fault = cudnn_fault(block, config, dtype, jax.devices()[0].device_kind)
    return dataclasses.replace(config, prompt_attention=None if fault else "cudnn")
