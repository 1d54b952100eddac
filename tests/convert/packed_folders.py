"""Writes folders whose one linear is packed as compressed-tensors, GPTQ or AWQ pack it: codes laid by the oracle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from jquant.models import LlamaConfig, tiny_hf_config
from tests.convert.folders import random_tensors, write_folder
from tests.oracles import words as oracle

CONFIG: Final = tiny_hf_config("llama2")
LINEAR: Final = "model.layers.1.mlp.up_proj"  # the one that is packed
PATH: Final = "layers.1.mlp.up_proj"


@dataclass(frozen=True, eq=False)
class Grids:
    """A linear on uniform grids, [in, out]: codes, and zeros, scales [groups, out]; `groups` of each input."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray
    bits: int

    def dense(self) -> np.ndarray:
        """Return scale * (code - zero) in float32, what every format means."""
        difference = self.codes.astype(np.float32) - self.zeros[self.groups].astype(np.float32)
        return self.scales.astype(np.float32)[self.groups] * difference


def random_grids(bits: int, group_size: int | None, *, symmetric: bool, dtype: Any = np.float16) -> Grids:
    """Return random grids for the linear; zeros avoid 0, which GPTQ's first version cannot hold."""
    random = np.random.default_rng(bits)
    inputs, outputs = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    count = inputs // (group_size or inputs)
    zeros = random.integers(1, 2**bits, (count, outputs), dtype=np.uint8)
    return Grids(
        codes=random.integers(0, 2**bits, (inputs, outputs), dtype=np.uint8),
        zeros=np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=random.uniform(0.01, 0.1, (count, outputs)).astype(dtype),
        groups=np.arange(inputs, dtype=np.int32) // (inputs // count),
        bits=bits,
    )


def pack_quantized(grids: Grids, *, symmetric: bool) -> dict[str, np.ndarray]:
    """Return the tensors of compressed-tensors' pack-quantized."""
    tensors = {
        "weight_packed": oracle.pack(grids.codes.T, grids.bits),
        "weight_scale": np.ascontiguousarray(grids.scales.T),
        "weight_shape": np.array(grids.codes.T.shape, np.int64),
    }
    zeros = np.ascontiguousarray(oracle.pack(grids.zeros, grids.bits).T)
    return tensors if symmetric else tensors | {"weight_zero_point": zeros}


def int_quantized(grids: Grids, *, symmetric: bool) -> dict[str, np.ndarray]:
    """Return the tensors of compressed-tensors' int-quantized."""
    middle = 2 ** (grids.bits - 1)
    tensors = {
        "weight": np.ascontiguousarray((grids.codes.T.astype(np.int16) - middle).astype(np.int8)),
        "weight_scale": np.ascontiguousarray(grids.scales.T),
    }
    zeros = np.ascontiguousarray((grids.zeros.T.astype(np.int16) - middle).astype(np.int8))
    return tensors if symmetric else tensors | {"weight_zero_point": zeros}


def gptq(grids: Grids, *, version: int) -> dict[str, np.ndarray]:
    """Return the tensors of GPTQ."""
    stored = (grids.zeros.astype(np.int16) - (version == 1)) % 2**grids.bits
    return {
        "qweight": np.ascontiguousarray(oracle.pack(grids.codes.T, grids.bits).T),
        "qzeros": oracle.pack(stored, grids.bits),
        "scales": grids.scales,
        "g_idx": grids.groups,
    }


def awq(grids: Grids) -> dict[str, np.ndarray]:
    """Return the tensors of AWQ's GEMM layout."""
    return {
        "qweight": oracle.pack_awq(grids.codes),
        "qzeros": oracle.pack_awq(grids.zeros),
        "scales": grids.scales,
    }


def compressed_section(
    layout: str, bits: int, group_size: int | None, *, symmetric: bool, **more: Any
) -> dict[str, Any]:
    """Return a quantization_config that packs the one linear."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    group = {"targets": ["re:.*layers.1.*up_proj$"], "weights": weights, "input_activations": None} | more
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq_section(bits: int, group_size: int | None, *, symmetric: bool, version: int, **more: Any) -> dict[str, Any]:
    """Return a quantization_config of GPTQ."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size or -1,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    } | more


AWQ_SECTION: Final = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def write_packed(
    folder: Path, section: Mapping[str, Any], packed: Mapping[str, np.ndarray], *, dtype: Any = np.float32
) -> Path:
    """Write a random model with the one linear replaced by its packed tensors; return the folder."""
    tensors = random_tensors(LlamaConfig.from_hf(CONFIG), dtype)
    del tensors[f"{LINEAR}.weight"]
    tensors |= {f"{LINEAR}.{name}": array for name, array in packed.items()}
    return write_folder(folder, CONFIG | {"quantization_config": dict(section)}, tensors)
