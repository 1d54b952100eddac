"""A written config.json is read as the configuration that it was written from."""

import pytest

from convert.hf_config import hf_config
from jquant.models import Family, LlamaConfig, tiny_hf_config
from tests.convert.folders import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}, {"sliding_window": None}])
def test_config_comes_back(family: Family, settings: dict[str, bool | None]) -> None:
    biases = {"mlp_bias": True} if tiny_hf_config(family)["model_type"] == "llama" and settings else {}
    config = LlamaConfig.from_hf(tiny_hf_config(family) | settings | biases)
    written = hf_config(config, "bfloat16")
    assert LlamaConfig.from_hf(written) == config
    assert written["dtype"] == "bfloat16"
