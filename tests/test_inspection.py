"""What `inspect` says of a linear: its format, its bits, and what happens to its input."""

import jax

from jquant.activations import OutlierSplit, PerToken
from jquant.blocks import ActivationRule
from jquant.inspection import inspect_model
from jquant.models import random_model, tiny_config
from jquant.passes import Context, QuantizeActivations, run_passes
from jquant.tables import facts_table


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
    columns = {column.header: list(column.cells) for column in facts_table(facts, "model").columns}
    assert columns["input"] == [row.input or "-" for row in facts.linears]
