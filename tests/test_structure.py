"""structure.json: what a tree becomes and how it comes back, without running anything that the file says."""

import dataclasses
import json
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.activations import ActivationQuantizer
from jquant.errors import CheckpointError
from jquant.formats import Layout, QuantizedTensor, UniformFormat
from jquant.kv import KvCodec
from jquant.models import Family, Linear, abstract_llama, build, stack_layers, tiny_config
from jquant.quantizers import Rtn
from jquant.structure import decode_structure, encode_structure


def through_json(tree: Any) -> Any:
    return decode_structure(json.loads(json.dumps(encode_structure(tree))))


@pytest.mark.parametrize("family", get_args(Family.__value__))
def test_models_of_every_family(family: Family) -> None:
    model = abstract_llama(tiny_config(family), jnp.bfloat16)
    assert through_json(model) == model


def test_stacked_and_packed_models() -> None:
    model = build(tiny_config(), lambda path, shape: np.ones(shape, np.float32))
    stacked = stack_layers(model)
    assert through_json(stacked) == jax.eval_shape(lambda tree: tree, stacked)
    packed = Linear(Rtn(UniformFormat(3, 16))(jnp.ones((32, 4)), None, jax.random.key(0))[0])
    back = through_json(packed)
    assert back.kernel.format == UniformFormat(3, 16)
    assert back.kernel.layout is Layout.PORTABLE
    assert back == jax.eval_shape(lambda tree: tree, packed)


def test_every_node_that_a_model_may_hold_is_known() -> None:
    """One without a row in the tables could be made and not be saved; what stands in for it in training never is."""
    nodes = (*KvCodec.__subclasses__(), *ActivationQuantizer.__subclasses__())
    held = (kind for kind in nodes if kind.__module__.startswith(("jquant.kv.", "jquant.activations.")))
    for kind in (*QuantizedTensor.__subclasses__(), *held):
        with pytest.raises(CheckpointError, match=f"{kind.__name__} has no surprise"):
            decode_structure({"node": kind.__name__, "fields": {"surprise": None}})


def test_a_field_that_came_later_changes_no_older_checkpoint() -> None:
    config = tiny_config()
    assert not {"wide_residual", "prompt_attention"} & set(encode_structure(config)["fields"])
    wide = dataclasses.replace(config, wide_residual=True, prompt_attention="cudnn")
    assert (through_json(config), through_json(wide)) == (config, wide)


def test_plain_values_and_arrays() -> None:
    tree = (None, True, 3, 0.1, "text", (), (1, (2,)))
    assert through_json(tree) == tree
    assert through_json((np.ones((2, 3), np.int8), jnp.ones(4, jnp.bfloat16))) == (
        jax.ShapeDtypeStruct((2, 3), jnp.int8),
        jax.ShapeDtypeStruct((4,), jnp.bfloat16),
    )


@pytest.mark.parametrize("thing", [object(), [1, 2], {"a": 1}, Rtn()], ids=["object", "list", "dict", "quantizer"])
def test_strangers_are_not_saved(thing: object) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot save a [\w.]*{type(thing).__name__}: it is no node"):
        encode_structure((thing,))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"node": "Evil", "fields": {}}, "unknown 'Evil' in structure.json; known: .*Llama.*Upgrade jquant"),
        ({"value": "Path", "fields": {}}, "unknown 'Path'"),
        ({"enum": "Colour", "name": "RED"}, "unknown 'Colour'"),
        ({"enum": "Layout", "name": "SPIRAL"}, "unknown 'SPIRAL'"),
        ({"node": "Linear", "fields": {"kernel": None, "rotation": None}}, "Linear has no rotation; a newer jquant"),
        ({"node": "Linear", "fields": {}}, "Linear lacks kernel"),
    ],
    ids=["node", "value", "enum", "member", "surplus field", "missing field"],
)
def test_unknown_names_are_refused(value: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        decode_structure(value)
