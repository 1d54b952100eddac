"""What attends in calibration: when it is cuDNN, and that the same attention by another implementation is the same."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.blocks.attention import calibrated, calibration_attention, cudnn_fault
from jquant.calibration.store import BlockStore
from jquant.errors import CheckpointError
from jquant.kv import PerTokenKv
from jquant.models import abstract_llama, blocks, embed, prompt_block, put, random_model, tiny_config

H100 = "NVIDIA H100 80GB HBM3"


def test_cudnn_attends_where_numbers_allow() -> None:
    config = tiny_config()
    block = blocks(abstract_llama(config, "bfloat16"))[0]
    assert cudnn_fault(block, config, jnp.bfloat16, H100) is None
    rounded = put(block, "self_attn.kv_codec", PerTokenKv())
    assert cudnn_fault(rounded, config, jnp.bfloat16, H100) == "keys and values are rounded by PerTokenKv"
    assert cudnn_fault(block, config, jnp.float32, H100) == "activations are float32, kernels take bfloat16"
    assert cudnn_fault(block, dataclasses.replace(config, sliding_window=4), jnp.bfloat16, H100) is None
    assert "numbers" in str(cudnn_fault(block, dataclasses.replace(config, head_dim=512), jnp.bfloat16, H100))
    assert cudnn_fault(block, config, jnp.bfloat16, "cpu") == "cpu is no Hopper GPU"


def test_a_run_with_cudnn_says_so_and_takes_no_blocks_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wide = (abstract_llama(tiny_config(), dtype) for dtype in ("bfloat16", "float32"))
    BlockStore.open(tmp_path, calibration_attention(model)).lock.close()
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=H100)])
    assert calibration_attention(wide) == {}
    own = calibration_attention(model)
    assert own == {"calibration attention": "cuDNN in 2 of 2 blocks"}
    with pytest.raises(CheckpointError, match="holds blocks of another run: calibration attention differ"):
        BlockStore.open(tmp_path, own)


def test_a_block_that_attends_otherwise_gives_the_same() -> None:
    model = random_model(tiny_config(), jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    x, lengths = embed(model, jnp.arange(24)[None] % 128), jnp.full(1, 24, jnp.int32)
    block = blocks(model)[0]
    found, expected = (
        jax.jit(lambda x, c=c: prompt_block(block, x, lengths, 24, c)[0])(x).astype(jnp.float32)
        for c in (dataclasses.replace(model.config, prompt_attention="xla"), model.config)
    )
    assert bool((found != expected).any())  # others' roundings
    assert calibrated(block, model.config, x.dtype) == model.config  # here is no GPU
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * float(jnp.abs(expected).max()))  # bfloat16
