"""What `inspect` says: of a linear its format, bits, and what happens to its input; of caches what they take."""

import jax
import jax.numpy as jnp
import pytest

from jquant.activations import OutlierSplit, PerToken
from jquant.blocks import ActivationRule
from jquant.formats import tree_nbytes
from jquant.inspection import inspect_model
from jquant.kv import Kivi
from jquant.machines import Target
from jquant.models import LlamaConfig, abstract_llama, put, random_model, tiny_config
from jquant.passes import Context, QuantizeActivations, run_passes
from jquant.plan import plan
from jquant.recipe import load_recipe
from jquant.tables import facts_table, plan_table

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192, tie_word_embeddings=True)
TOKENS = 4096
RESIDUAL = 128 * 16  # bits that KIVI's exact keys, and values, take in a channel


def test_input_quantizers_are_shown_with_their_bits() -> None:
    rules = ActivationRule(".*q_proj", PerToken(4, clip_ratio=0.9)), ActivationRule(".*mlp.*", OutlierSplit())
    model = random_model(tiny_config(), jax.random.key(0))
    quantized, report = run_passes([QuantizeActivations(rules)], model, Context(jax.random.key(0)))
    assert not report.blocks
    facts = inspect_model(quantized)
    shown = {row.path: row.input for row in facts.linears}
    assert shown["layers.0.self_attn.q_proj"] == "PerToken(bits=4, symmetry=symmetric, clip_ratio=0.9, group_size=None)"
    assert shown["layers.1.mlp.down_proj"] == "OutlierSplit(threshold=6.0, bits=8)"
    assert shown["layers.1.self_attn.o_proj"] == ""
    assert facts.query_key_rotations == ("", "")
    assert str(facts_table(facts, "model").caption).endswith("after RoPE: as they are in 2 blocks")
    columns = {column.header: list(column.cells) for column in facts_table(facts, "model").columns}
    assert columns["input"] == [row.input or "-" for row in facts.linears]


def test_what_attends_on_a_target_is_shown() -> None:
    """Caches of one block are streamed to its prompts, for which no kernel serves."""
    model = abstract_llama(SMOLLM2, "bfloat16")
    model = put(model, "layers.3.self_attn.kv_codec", Kivi(2, 2, prompt="streamed"))
    caption = str(facts_table(inspect_model(model, target=Target.H200_TOKAMAX), "model").caption)
    assert "attention to the cache: attention over 16-bit caches in 29 blocks, " in caption
    streamed = "XLA: each query sees its own version of keys and values (prompt=streamed) in 1 blocks"
    assert caption.endswith(f"attention of prompts: tokamax in 29 blocks, {streamed}")
    assert "attention" not in str(facts_table(inspect_model(model), "model").caption)


@pytest.mark.parametrize(
    ("preset", "bits"),
    [
        # codes; a scale and a low end in float16 for 32 tokens of a channel or 32 channels of a token; the exact window
        ("kivi-2", ((2 + 32 / 32) * (TOKENS - 128) + RESIDUAL) / TOKENS),
        ("kivi-4", ((4 + 32 / 32) * (TOKENS - 128) + RESIDUAL) / TOKENS),
        ("kv4", 4 + 32 / 64),  # a scale and a low end in float16 for a head of 64
        ("qrazor-w4kv4-g8", 4 + 3 / 8),  # three bits of shift for 8 neighbours
    ],
)
def test_caches_take_the_bytes_of_the_papers(preset: str, bits: float) -> None:
    figures = plan(abstract_llama(SMOLLM2, "bfloat16"), load_recipe(preset))
    assert figures.cache.length == TOKENS
    assert figures.cache.bits_per_value == pytest.approx(bits, rel=0.02 if preset.startswith("kivi") else 1e-12)
    nbytes = figures.cache.nbytes_per_token * TOKENS
    shown = dict(zip(*(list(column.cells) for column in plan_table(figures, preset).columns), strict=True))["KV cache"]
    assert shown.startswith(f"{nbytes / 2**20:.2f} MiB for 4096 tokens, ")
    assert shown.endswith(f"{figures.cache.bits_per_value:.3f} bits per value")


def test_the_bytes_shown_are_those_allocated() -> None:
    codec = load_recipe("kivi-2").passes[0].codec  # type: ignore[attr-defined]
    cache = codec.init(TOKENS, 3, 64, jnp.bfloat16)
    figures = plan(abstract_llama(SMOLLM2, "bfloat16"), load_recipe("kivi-2"))
    assert figures.cache.nbytes_per_token * TOKENS == 30 * tree_nbytes(cache)
