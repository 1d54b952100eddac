r"""Why logits of models that round activations or caches differ over a mesh: a number beside a border falls across it.

Of a model that `benchmarks/mesh_parity.py --keep` saved, two things that only a tie does:

    in float64, where sums in another order differ by 1e-15, logits over the mesh are those of one device;
    in float32, what blocks over the mesh give is that of one device but for rounding, until a code of the next block,
    or a grid that is stored in float16, differs: it lies as near a border as that rounding is large. From there on the
    mesh goes on with one device's numbers, up to the next such block; what is behind it in this one is not counted.

    python benchmarks/mesh_ties.py FOLDER [--mesh data=1,tensor=8] [--rows 2] [--prompt 160] [--blocks 29]

JSON lines. The distance of a number x from its border is |x / s - border| in float64, s being its grid's scale.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import jax
import jax.numpy as jnp
import numpy as np

from jquant.checkpoint import load_model
from jquant.folders import stack_if_alike
from jquant.formats import UniformActivation
from jquant.kv import ExactKv, Kivi, KiviCache, PerTokenCache
from jquant.kv.vectors import Vectors, unpack_last
from jquant.models import BLOCK_LINEARS, Llama, blocks, forward, get, hidden_states, prompt_block, put
from jquant.sharding import make_mesh, parse_axes, shard

TAPS: Final = {"q_proj": 0, "o_proj": 1, "gate_proj": 2, "down_proj": 3}  # of the linears whose inputs differ


def main() -> None:
    """Prints logits of both widths, then the ties of each block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--mesh", default="data=1,tensor=8")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=160, help="tokens of each row")
    parser.add_argument("--blocks", type=int, default=10**6, help="blocks whose ties are counted")
    arguments = parser.parse_args()
    model, mesh = load_model(arguments.model), make_mesh(*parse_axes(arguments.mesh))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (arguments.rows, arguments.prompt))
    said = {"model": str(arguments.model), "mesh": arguments.mesh, "rows": arguments.rows, "prompt": arguments.prompt}
    for dtype in ("float64", "float32"):
        wide = jax.tree.map(lambda leaf, to=dtype: leaf.astype(to) if leaf.dtype == jnp.float32 else leaf, model)
        one = np.asarray(jax.jit(forward)(stack_if_alike(wide), jnp.asarray(tokens, jnp.int32)))
        many = np.asarray(jax.jit(forward)(shard(wide, mesh, stack_if_alike), jnp.asarray(tokens, jnp.int32)))
        _say(**said, dtype=dtype, largest_logit=float(np.abs(one).max()), apart=float(np.abs(one - many).max()))
    _say(**said, **_count_ties(model, tokens, mesh, arguments.blocks))


def _count_ties(model: Llama, tokens: Any, mesh: Any, count: int) -> dict[str, Any]:
    """Returns sums over blocks of what differs, and the largest of what is measured."""
    plain, spread = jax.jit(hidden_states), jax.jit(hidden_states)
    x = other_x = np.asarray(model.embed_tokens)[tokens]
    sums = {
        "codes": 0,
        "codes that differ": 0,
        "of them by more than one step": 0,
        "grids": 0,
        "grids that differ": 0,
        "of these by more than a step of float16": 0,
    }
    most = {
        "farthest differing code from its border": 0.0,
        "most that any number moved, in steps": 0.0,
        "most that a differing grid moved, in steps of its codes": 0.0,
    }
    layers, rounding, done, falls = blocks(model), 0.0, 0, 0
    for index, layer in enumerate(layers[:-1][:count]):
        alone, other_alone = _alone(model, layer, x), _alone(model, layer, other_x)
        rows = jnp.arange(len(x) * x.shape[1], dtype=jnp.int32).reshape(len(x), -1)
        here, there = np.asarray(plain(alone, rows)), np.asarray(spread(shard(other_alone, mesh), rows))
        rounding = max(rounding, float(np.abs(here - there).max() / np.abs(here).max()))
        fell = False
        coded = (_grids(layers[index + 1], y, model) for y in (here, there))
        for one, other in zip(*coded, strict=True):
            same = np.all(one["grid"] == other["grid"], axis=-1, keepdims=True) | one["floats"]
            differ, steps = (one["codes"] != other["codes"]) & same, np.abs(one["codes"] - other["codes"])
            border = (one["codes"] + other["codes"]) / 2
            near = np.maximum(np.abs(one["place"] - border), np.abs(other["place"] - border))
            away = np.where(same, np.abs(one["place"] - other["place"]), 0.0)
            step = np.maximum(*(np.spacing(np.float16(np.abs(grid))) for grid in (one["grid"], other["grid"])))
            far = ~same & np.any(np.abs(one["grid"] - other["grid"]) > np.float64(step), axis=-1, keepdims=True)
            counts = one["codes"].size, differ.sum(), (differ & (steps > 1)).sum(), same.size, (~same).sum(), far.sum()
            sums = {name: total + int(more) for (name, total), more in zip(sums.items(), counts, strict=True)}
            shift = np.where(
                same, 0.0, np.abs(one["grid"] - other["grid"]).max(-1, keepdims=True) / one["grid"][..., :1]
            )
            largest = np.where(differ, near, 0.0).max(), away.max(), shift.max()
            most = {name: max(old, float(new)) for (name, old), new in zip(most.items(), largest, strict=True)}
            fell = bool(differ.any() or not same.all())
            if fell:
                break
        x, other_x, done = here, here if fell else there, done + 1  # what follows a fall is no rounding
        falls += fell
    return {
        "blocks": done,
        "of them with a tie": falls,
        "a block's output apart, as a share of the largest": rounding,
        **sums,
        **most,
    }


def _alone(model: Llama, layer: Any, x: Any) -> Llama:
    """Returns a model of one block, whose table has the block's inputs: token n is the n-th of them."""
    table = jnp.asarray(x.reshape(-1, x.shape[-1]))
    config = dataclasses.replace(model.config, num_hidden_layers=1, vocab_size=table.shape[0])
    return dataclasses.replace(model, embed_tokens=table, layers=(layer,), lm_head=None, config=config)


def _grids(layer: Any, x: Any, model: Llama) -> list[dict[str, Any]]:
    """Returns codes [.., group], the numbers' places on their grids in float64, and the grids, of all that is coded."""
    config = model.config
    _, cache, taps = _run_block(layer, jnp.asarray(x), config)
    _, raw, _ = _run_block(put(layer, "self_attn.kv_codec", ExactKv()), jnp.asarray(x), config)
    cached = []
    codec: Any = layer.self_attn.kv_codec
    keys, values = (np.asarray(one, np.float64) for one in (raw.keys, raw.values))
    if isinstance(cache, KiviCache):
        assert isinstance(codec, Kivi)
        run = codec.residual_length
        whole = keys.shape[1] // run * run
        shaped = keys[:, :whole].reshape(len(keys), -1, run, *keys.shape[2:]).transpose(0, 1, 3, 4, 2)
        cached.append(_vectors(cache.keys, shaped, codec.key_bits, codec.group_size))
        cached.append(_vectors(cache.values, values[:, : values.shape[1] - run], codec.value_bits, codec.group_size))
    elif isinstance(cache, PerTokenCache):
        cached += [
            _vectors(cache.keys, keys, codec.bits, cache.dim),
            _vectors(cache.values, values, codec.bits, cache.dim),
        ]
    found = []
    for name in BLOCK_LINEARS:
        quantizer, tap = get(layer, name).input_quantizer, TAPS.get(name.split(".")[1])
        if quantizer is not None and tap is not None:
            coded = jax.jit(quantizer)(taps[tap], None)
            assert isinstance(coded, UniformActivation)
            places = np.float64(taps[tap]) / np.float64(coded.scales)
            found.append(_coded(coded.codes, places, coded.scales, floats=True))
    return [*found[:1], *cached, *found[1:]] if found else cached  # as the block makes them


_run_block: Final = jax.jit(
    lambda layer, x, config: prompt_block(layer, x, jnp.full(x.shape[0], x.shape[1], jnp.int32), x.shape[1], config),
    static_argnums=2,
)


def _vectors(stored: Vectors, full: Any, bits: int, group: int) -> dict[str, Any]:
    """Returns `_coded` of a cache's vectors; a grid is as it is stored, in float16."""
    width = full.shape[-1]
    codes = np.asarray(unpack_last(stored.codes, bits, width))[:, : full.shape[1]]
    codes = codes.reshape(*full.shape[:-1], -1, group)
    scales, zeros = (np.asarray(end)[:, : full.shape[1], ..., None] for end in (stored.scales, stored.zeros))
    groups = full.reshape(codes.shape)
    asymmetric = zeros.dtype == np.uint8
    places = groups / np.float64(scales) + zeros if asymmetric else (groups - np.float64(zeros)) / np.float64(scales)
    return _coded(codes, places, np.concatenate([np.float64(scales), np.float64(zeros)], -1), floats=False)


def _coded(codes: Any, places: Any, grid: Any, *, floats: bool) -> dict[str, Any]:
    codes, places, grid = np.asarray(codes, np.int64), np.asarray(places), np.asarray(grid)
    return {"codes": codes, "place": places, "grid": grid, "floats": floats}


def _say(**figures: Any) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
