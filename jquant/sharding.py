"""Meshes of devices, and models spread over them: rules say by path what each device has.

    data      rows of a batch, and calibration windows
    tensor    attention heads, hidden features of MLPs, and the vocabulary

| linears                  | device t of T has                     | who tells whom what                              |
|--------------------------|---------------------------------------|--------------------------------------------------|
| q, k, v, gate, up        | its outputs                           | nothing                                          |
| o, down                  | the inputs that it made, W[t, :]      | products are summed, float32                     |
| o, down, input rotated,  | its outputs                           | inputs are gathered before, products after: a    |
| or anything rounded, or  |                                       | rotation and a token's grid see the whole token, |
| a float32 model          |                                       | and no sum is cut                                |
| any of QuIP's            | outputs of the rotated basis          | products are gathered before they are turned     |
| embedding, head          | its rows, its columns                 | the row that is there; logits are gathered       |

What cannot be cut is whole on each device, and `Sharded.notes` say why: attention whose KV heads the devices do not
divide, or whose caches look across heads; a linear whose groups they would cut; a vocabulary that they do not divide.
What would be another method over several devices is refused: input quantizers that look across the rows of a batch.

Each device runs the program of an ordinary model of its own heads and features, kernels included (`models/mesh.py`).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jquant.activations import ActivationQuantizer, OutlierQuantizer, RazorQuantizer, TensorQuantizer, TokenQuantizer
from jquant.errors import FormatError, RecipeError
from jquant.formats import (
    DATA,
    TENSOR,
    QuantizedTensor,
    RotatedTensor,
    ShardedTensor,
    cut_inputs,
    cut_outputs,
    input_cut_fault,
    output_cut_fault,
)
from jquant.kv import DynamicRazorKv, ExactKv, Float8Kv, Kivi, KvCodec, KvQuant, PerTokenKv, RazorKv
from jquant.models import BLOCK_LINEARS, Block, Linear, Llama, LlamaConfig, Sharded, blocks, get, model_specs, put

type Way = Literal["outputs", "inputs"]

RULES: Final[tuple[tuple[str, Way], ...]] = (  # the first that matches a linear's path in its block
    (r"self_attn\.[qkv]_proj|mlp\.(gate|up)_proj", "outputs"),
    (r"self_attn\.o_proj|mlp\.down_proj", "inputs"),
)
BYTES_OF_NARROW: Final = 2  # of a number in bfloat16 or float16
CLUSTER: Final = "slurm"
_BY_HEADS: Final = (ExactKv, PerTokenKv, Kivi, RazorKv, Float8Kv)  # each head alone, or by one number for all heads
_ACROSS_HEADS: Final = (KvQuant, DynamicRazorKv)
_BY_TOKEN: Final = (TokenQuantizer, TensorQuantizer)
_LISTS: Final = ("rows", "values")  # of SpQR's outliers: their length differs from device to device


@dataclass(frozen=True)
class Cut:
    """What each device has of one linear.

    Attributes:
      kind: its "outputs"; its "inputs", whose products are summed; outputs of the rotated basis ("rotated"); or the
        "whole" weight.
      gathered: whether the linear asks for the input of all devices.
      why: why the weight is whole; empty where it is not.
    """

    kind: Literal["outputs", "inputs", "rotated", "whole"]
    gathered: bool = False
    why: str = ""

    def describe(self) -> str:
        """Returns it in words.

        >>> Cut("inputs").describe(), Cut("whole", why="QuIP mixes outputs").describe()
        ('inputs, products summed', 'whole: QuIP mixes outputs')
        """
        if self.kind == "whole":
            return f"whole: {self.why}"
        if self.kind == "inputs":
            return "inputs, products summed"
        if self.kind == "rotated":
            return "outputs of the rotated basis, gathered"
        return "outputs, of gathered inputs" if self.gathered else "outputs"


def make_mesh(data: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh with the axes `data` and `tensor`, of the first of all processes' devices.

    Args:
      data: devices over which rows are spread.
      tensor: devices over which heads and features are.

    Raises:
      RecipeError: there are fewer devices, or a number is below 1.

    Example:
      >>> make_mesh(1, 1).axis_names
      ('data', 'tensor')
    """
    known = jax.devices()
    if data < 1 or tensor < 1 or data * tensor > len(known):
        raise RecipeError(
            f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices, there are {len(known)}; on a CPU, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of them"
        )
    grid = np.asarray(known[: data * tensor], dtype=object).reshape(data, tensor)
    return Mesh(grid, (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


def parse_axes(text: str) -> tuple[int, int]:
    """Returns how many devices `data=2,tensor=4` asks for along data and tensor; an axis that is left out has one.

    Raises:
      RecipeError: the text says something else.

    Example:
      >>> parse_axes("data=2,tensor=4"), parse_axes("tensor=2")
      ((2, 4), (1, 2))
    """
    pairs: list[tuple[str, str]] = re.findall(r"(data|tensor)=(\d+)(?:,|$)", text)
    found = dict(pairs)
    if not found or ",".join(f"{axis}={count}" for axis, count in found.items()) != text:
        raise RecipeError(f"--mesh {text}: give axes and devices, such as data=2,tensor=4, data=8 or tensor=2")
    return int(found.get(DATA, 1)), int(found.get(TENSOR, 1))


def describe_mesh(mesh: Mesh) -> str:
    """Returns axes, devices and processes in words.

    >>> describe_mesh(make_mesh()).split(":")[0]
    'data 1 x tensor 1'
    """
    devices = mesh.devices.ravel().tolist()
    processes = len({device.process_index for device in devices})
    extent = " x ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
    more = f" in {processes} processes" if processes > 1 else ""
    return f"{extent}: {len(devices)} x {devices[0].device_kind}{more}"


def choose_cuts(model: Llama, data: int, tensor: int) -> tuple[tuple[str, Cut], ...]:
    """Returns what each device has of each linear, by the path of the linear; abstract arrays will do.

    Args:
      model: portable, its layers a tuple.
      data: devices along `data`.
      tensor: devices along `tensor`.

    Raises:
      FormatError: a cache or an input quantizer is none of those that the rules know, or looks across rows that are
        spread over `data`; it is named.

    Example:
      >>> from jquant.models import abstract_llama, tiny_config
      >>> [(path, cut.describe()) for path, cut in choose_cuts(abstract_llama(tiny_config()), 1, 4)[3:5]]
      [('layers.0.self_attn.o_proj', 'whole: 2 KV heads over 4 devices'), ('layers.0.mlp.gate_proj', 'outputs')]
    """
    heads, whole_sums, found = _attention_fault(model, tensor), _keeps_sums(model), []
    for index, block in enumerate(blocks(model)):
        _check_quantizers(block, data)
        for name in BLOCK_LINEARS:
            attends = name.startswith("self_attn.")
            cut = Cut("whole", why=heads) if attends and heads else None
            cut = cut or _choose_cut(name, get(block, name), tensor, whole_sums=whole_sums)
            found.append((f"layers.{index}.{name}", cut))
    if model.config.intermediate_size % tensor:
        raise FormatError(
            f"{model.config.intermediate_size} features of the MLP over tensor={tensor} devices; give a number that "
            "divides them"
        )
    return tuple(found)


def shard(model: Llama, mesh: Mesh, ready: Callable[[Llama], Llama] = lambda own: own) -> Llama:
    """Spreads a model over a mesh, to be run by `forward`, `prefill`, `decode` and what is built on them.

    Args:
      model: portable, its layers a tuple.
      mesh: from `make_mesh`.
      ready: lays one device's own model out for where it runs: stacks its layers, or writes its weights for kernels.

    Returns:
      The model, its layers `Sharded`.

    Raises:
      FormatError: as `choose_cuts`.

    Example:
      >>> from jquant.models import forward, random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> forward(shard(model, make_mesh()), jax.numpy.ones((1, 4), int)).shape
      (1, 4, 128)
    """
    parts = mesh.shape[TENSOR]
    cuts = dict(choose_cuts(model, mesh.shape[DATA], parts))
    heads = _attention_fault(model, parts) is None
    layers: list[list[Block]] = [[] for _ in range(parts)]
    for index, block in enumerate(blocks(model)):
        own = [block] * parts
        for name in BLOCK_LINEARS:
            if heads or not name.startswith("self_attn."):
                parted = _cut_linear(get(block, name), name, cuts[f"layers.{index}.{name}"], parts)
                own = [put(part, name, linear) for part, linear in zip(own, parted, strict=True)]
        for one, part in zip(layers, own, strict=True):
            one.append(part)
    smaller = [ready(dataclasses.replace(model, layers=tuple(one))) for one in layers]
    vocabulary, config = _cuts_vocabulary(model, parts), smaller[0].config
    spread = Sharded(
        layers=_place([one.layers for one in smaller], mesh),
        mesh=mesh,
        config=_own_config(config, parts if heads else 1),
        vocabulary=vocabulary,
        notes=_notes(model, cuts, vocabulary=vocabulary),
    )
    outline = dataclasses.replace(model, layers=spread, config=config)
    specs = model_specs(outline)

    def put_leaf(leaf: Any, spec: Any) -> Any:
        return put_global(leaf, NamedSharding(mesh, spec))

    return dataclasses.replace(
        outline,
        embed_tokens=put_leaf(model.embed_tokens, specs.embed_tokens),
        norm=put_leaf(model.norm, specs.norm),
        lm_head=jax.tree.map(put_leaf, model.lm_head, specs.lm_head),
    )


def put_global(array: Shaped[Array, "*shape"], sharding: NamedSharding) -> Shaped[Array, "*shape"]:
    """Returns an array that lies on the devices of a mesh; each process gives it whole and keeps its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_quantizers(block: Block, data: int) -> None:
    for name in BLOCK_LINEARS:
        quantizer: ActivationQuantizer | None = get(block, name).input_quantizer
        if quantizer is None or isinstance(quantizer, _BY_TOKEN):
            continue
        if not isinstance(quantizer, OutlierQuantizer | RazorQuantizer):
            raise FormatError(f"{name}: no rule spreads the inputs of {type(quantizer).__name__} over devices")
        across = isinstance(quantizer, OutlierQuantizer) or quantizer.method.scope == "dynamic_tensor"
        if across and data > 1:
            raise FormatError(
                f"{name}: {quantizer.method} looks across the rows of a batch, and over data={data} devices would see "
                "a part of them: give data=1"
            )


def _attention_fault(model: Llama, parts: int) -> str | None:
    """Returns why attention cannot be cut by heads; None where it can."""
    config = model.config
    for count, name in ((config.num_key_value_heads, "KV heads"), (config.num_attention_heads, "query heads")):
        if count % parts:
            return f"{count} {name} over {parts} devices"
    for block in blocks(model):
        codec: KvCodec = block.self_attn.kv_codec
        if isinstance(codec, _ACROSS_HEADS):
            return f"{type(codec).__name__} codes all heads of a token together"
        if not isinstance(codec, _BY_HEADS):
            raise FormatError(f"no rule spreads the caches of {type(codec).__name__} over devices")
    return None


def _keeps_sums(model: Llama) -> bool:
    """Tells whether no sum may be cut: one in another order moves codes, or is all that sets float32 devices apart."""
    return model.norm.dtype.itemsize > BYTES_OF_NARROW or any(
        not isinstance(block.self_attn.kv_codec, ExactKv)
        or any(get(block, name).input_quantizer is not None for name in BLOCK_LINEARS)
        for block in blocks(model)
    )


def _notes(model: Llama, cuts: dict[str, Cut], *, vocabulary: bool) -> tuple[str, ...]:
    """Returns what is whole on each device and why, each once."""
    found = dict.fromkeys(f"{path.split('.', 2)[2]}: {cut.why}" for path, cut in cuts.items() if cut.kind == "whole")
    if not vocabulary:
        found[f"embedding and head: a vocabulary of {model.config.vocab_size}"] = None
    return tuple(found)


def _choose_cut(name: str, layer: Linear, parts: int, *, whole_sums: bool) -> Cut:
    way = next(way for pattern, way in RULES if re.fullmatch(pattern, name))
    apart = way == "inputs" and not whole_sums and layer.input_rotation is None
    if apart and input_cut_fault(layer.kernel, parts) is None:
        return Cut("inputs")
    gathered, fault = way == "inputs", output_cut_fault(layer.kernel, parts)
    if fault is None:
        return Cut("outputs", gathered)
    weight = layer.kernel
    if isinstance(weight, RotatedTensor) and output_cut_fault(weight.inner, parts) is None:
        return Cut("rotated", gathered)
    return Cut("whole", gathered, fault)


def _cut_linear(layer: Linear, name: str, cut: Cut, parts: int) -> list[Linear]:
    """Returns each device's linear."""
    weight: Any = layer.kernel
    inputs, outputs = weight.shape
    way = next(way for pattern, way in RULES if re.fullmatch(pattern, name))
    own = outputs // parts
    seen = (inputs, own) if way == "outputs" else (inputs // parts, outputs)
    kernels: list[Any]
    if cut.kind == "inputs":
        kernels = [ShardedTensor(cut_inputs(weight, part, parts), "own", "summed", seen) for part in range(parts)]
    elif cut.kind == "outputs":
        kernels = cut_outputs(weight, parts)
        if cut.gathered:
            kernels = [ShardedTensor(part, "gathered", "gathered", seen) for part in kernels]
    else:
        whole: list[Any] = [weight] * parts
        if cut.kind == "rotated":
            inner = [ShardedTensor(part, "own", "gathered", weight.shape) for part in cut_outputs(weight.inner, parts)]
            whole = [dataclasses.replace(weight, inner=part) for part in inner]
        if cut.gathered:
            kernels = [ShardedTensor(part, "gathered", "own", seen) for part in whole]
        else:
            kernels = [ShardedTensor(part, "own", "taken", seen) for part in whole]
    biases: list[Any] = [layer.bias] * parts
    if way == "outputs" and layer.bias is not None:
        biases = [layer.bias[part * own : (part + 1) * own] for part in range(parts)]
    pairs = zip(kernels, biases, strict=True)
    return [dataclasses.replace(layer, kernel=kernel, bias=bias) for kernel, bias in pairs]


def _cuts_vocabulary(model: Llama, parts: int) -> bool:
    head = model.lm_head
    plain = head is None or (not isinstance(head.kernel, QuantizedTensor) and head.bias is None)
    return plain and model.config.vocab_size % parts == 0


def _own_config(config: LlamaConfig, parts: int) -> LlamaConfig:
    heads, kv_heads = config.num_attention_heads // parts, config.num_key_value_heads // parts
    return dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)


def _place(trees: Sequence[Any], mesh: Mesh) -> Any:
    """Returns trees that are alike as one whose leaves have an axis of devices first, spread over `tensor`."""
    structure: Any = jax.tree.structure(trees[0])
    if any(structure != jax.tree.structure(tree) for tree in trees):
        raise FormatError("the parts of this model differ in structure from device to device; give target reference")
    columns = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in trees), strict=True)
    placed = [_place_leaf(jax.tree_util.keystr(rows[0][0]), [leaf for _, leaf in rows], mesh) for rows in columns]
    return jax.tree.unflatten(structure, placed)


def _place_leaf(name: str, leaves: list[Any], mesh: Mesh) -> jax.Array:
    shape = tuple(max(sizes) for sizes in zip(*(leaf.shape for leaf in leaves), strict=True))
    if any(leaf.shape != shape for leaf in leaves):
        if not name.endswith(_LISTS):
            raise FormatError(f"{name} has shapes {[leaf.shape for leaf in leaves]} from device to device")
        leaves = [
            np.pad(leaf, [(0, more - own) for more, own in zip(shape, leaf.shape, strict=True)]) for leaf in leaves
        ]
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR))
    own = jax.process_index()
    arrays = [
        jax.device_put(leaf[None], device)
        for leaf, devices in zip(leaves, mesh.devices.T, strict=True)
        for device in devices
        if device.process_index == own
    ]
    return jax.make_array_from_single_device_arrays((len(leaves), *shape), sharding, arrays)


def join_processes(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several whose devices make one mesh; call it before anything else uses JAX.

    Args:
      coordinator: host:port of the first process, which the others can reach; "slurm" (or another cluster that
        `jax.distributed` knows) reads all of it from the job's environment.
      processes: how many there are; None with "slurm".
      process: this one's number, from 0; None with "slurm".

    Raises:
      RecipeError: something is missing, or the others cannot be reached.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = coordinator != CLUSTER
    if explicit and (processes is None or process is None or not 0 <= process < processes or ":" not in coordinator):
        raise RecipeError(
            f"--coordinator {coordinator} --processes {processes} --process {process}: give host:port, how many "
            f"processes there are and which this is, from 0; or --coordinator {CLUSTER} alone inside a job"
        )
    try:
        if explicit:
            jax.distributed.initialize(coordinator, processes, process)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        remedy = "" if explicit else "; a task of a job knows it from its environment (srun), elsewhere give host:port"
        raise RecipeError(f"cannot join the other processes by {coordinator}: {error}{remedy}") from error
