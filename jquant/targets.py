"""Where a model runs and what multiplies there: `prepare` writes weights as the target's kernels read them, and back.

On an H100 or H200 a linear is multiplied by

    W2A16, W3A16  binary codes of 2 to 4 planes up to 8 tokens, SpQR's weights up to 2: more of them by XLA
    W4A16         uniform weights of at most 4 bits, input as numbers: rounded to bfloat16, as is the product
    W8A16         weights of 8 bits, symmetric, one scale an output, up to 64 tokens: likewise, more of them by XLA
    W4A8, W8A8    one scale an output, input quantized with one scale a token (4 bits are int8 codes too); int4 codes
                  symmetric only; product as above. A Hadamard rotation of the input is made by one kernel with its
                  grid; W8A8 adds up to 32 features of outliers

of `pallas_kernels`, the head too, also inside an input order or rotations; queries, keys and values, and gate and up,
in one product where their inputs are treated alike. Whatever else there is stays portable, and XLA multiplies it as on
the reference target. Which it is depends on formats and shapes alone: `choose_product` tells it, with the
reason, before any work. Widths that kernels do not take are filled up where groups allow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp

from jquant.activations import OutlierQuantizer, TensorQuantizer, TokenQuantizer
from jquant.errors import FormatError
from jquant.formats import (
    SYMMETRIES,
    WIDE_BITS,
    BinaryTensor,
    JoinedPart,
    Layout,
    OnlineRotation,
    PermutedTensor,
    PreparedBinaryTensor,
    PreparedFloatTensor,
    PreparedIntegerTensor,
    PreparedRotation,
    PreparedSpqrTensor,
    PreparedWideTensor,
    QuantizedTensor,
    RotatedTensor,
    ShardedTensor,
    SpqrTensor,
    UniformTensor,
    binary_fault,
    float_fault,
    integer_fault,
    integer_kind,
    most_outliers,
    padded_binary,
    padded_shape,
    padded_spqr,
    prepare_float,
    prepare_integer,
    prepare_online,
    prepare_outliers,
    prepare_signs,
    prepare_wide,
    rotation_fault,
    spqr_fault,
    wide_fault,
)
from jquant.kv import Kivi, KvCodec, PerTokenKv, attention_fault, pack_codec
from jquant.machines import Target
from jquant.matmul import MOST_FEATURES
from jquant.models import (
    BLOCK_LINEARS,
    Block,
    Linear,
    Llama,
    PromptAttention,
    Sharded,
    Stacked,
    get,
    join_shared,
    prompt_fault,
    put,
    split_shared,
)
from jquant.products import Product

_UNIFORM: Final = (UniformTensor, PreparedFloatTensor, PreparedIntegerTensor, PreparedWideTensor)
_BINARY: Final = (BinaryTensor, PreparedBinaryTensor)
_SPQR: Final = (SpqrTensor, PreparedSpqrTensor)
_PREPARED: Final = (*_UNIFORM[1:], PreparedBinaryTensor, PreparedSpqrTensor)
_OF_NUMBERS: Final = {"W4A16": prepare_float, "W8A16": prepare_wide}
_INTEGERS: Final = ("W4A8", "W8A8")
_WRAPPERS: Final = (PermutedTensor, RotatedTensor, ShardedTensor)  # their rules multiply by the inner tensor
_PROMPT_KERNELS: Final[Mapping[PromptAttention, str]] = {
    "cudnn": "cuDNN",
    "tokamax": "tokamax",
    "xla": "jax.nn.dot_product_attention",
}


def choose_product(layer: Linear, target: Target) -> Product:
    """Returns what multiplies a linear on a target, from formats and shapes alone; abstract arrays will do.

    Example:
      >>> choose_product(Linear(jnp.ones((64, 64))), Target.H100).describe()
      'XLA: float32 weights'
    """
    if target is Target.REFERENCE:
        return Product(None)
    weight, rotated = layer.kernel, False
    while isinstance(weight, _WRAPPERS):
        rotated = rotated or isinstance(weight, RotatedTensor)
        weight = weight.inner
    if isinstance(weight, JoinedPart):
        return Product("joined", "multiplied with the first linear of its input")
    if not isinstance(weight, QuantizedTensor):
        return Product(None, f"{weight.dtype} weights")
    if isinstance(weight, (*_BINARY, *_SPQR)):
        return _choose_narrow(weight, integer=layer.input_quantizer is not None)
    if not isinstance(weight, _UNIFORM):
        return Product(None, f"no kernel for {type(weight).__name__}")
    integer, wide = layer.input_quantizer is not None, weight.format.bits == WIDE_BITS
    fault = (_input_fault(layer, weight, rotated=rotated) if integer else None) or (
        integer_fault if integer else wide_fault if wide else float_fault
    )(weight.format, weight.shape)
    if fault is not None:
        return Product(None, fault)
    kernel = integer_kind(weight.format) if integer else "w8a16" if wide else "w4a16"
    notes = [_filled(padded_shape(weight.format, weight.shape), weight.shape)]
    notes += ["up to 64 tokens, more by XLA"] * (wide and not integer)
    if integer and layer.input_rotation is not None:
        fault = _rotation_fault(layer)
        notes.append(f"rotated by XLA: {fault}" if fault else "rotated and quantized in one kernel")
    if isinstance(layer.input_quantizer, OutlierQuantizer):
        notes.append(f"up to {MOST_FEATURES} features of outliers, more by XLA")
    return Product(kernel.upper(), ", ".join(note for note in notes if note))


def _choose_narrow(weight: Any, *, integer: bool) -> Product:
    from pallas_kernels.configs import most_tokens

    binary = isinstance(weight, _BINARY)
    if integer:
        return Product(None, f"no kernel multiplies quantized inputs by {'binary codes' if binary else 'SpQR weights'}")
    fault = (binary_fault if binary else spqr_fault)(weight.format, weight.shape)
    if fault is not None:
        return Product(None, fault)
    padded = padded_binary(weight.format, weight.shape) if binary else padded_spqr(weight.shape)
    most = most_tokens("binary4" if binary else "spqr3")
    notes = (_filled(padded, weight.shape), f"up to {most} tokens, more by XLA")
    return Product(f"W{weight.format.bits}A16 {'binary' if binary else 'SpQR'}", ", ".join(filter(None, notes)))


def _filled(padded: tuple[int, int], shape: tuple[int, int]) -> str:
    return "" if padded == shape else f"filled up to {padded[0]} x {padded[1]}"


def choose_attention(model: Llama, codec: KvCodec, target: Target) -> Product:
    """Returns what attends to a codec's caches in a model's decode steps on a target; abstract arrays will do.

    Example:
      >>> from jquant.kv import ExactKv
      >>> from jquant.models import abstract_llama, tiny_config
      >>> choose_attention(abstract_llama(tiny_config(), "bfloat16"), ExactKv(), Target.H100).describe()
      'XLA: heads of 16 numbers, kernels take 64, 128 or 256'
    """
    config = model.config
    if target is Target.REFERENCE:
        return Product(None)
    if config.sliding_window is not None:
        return Product(None, "a sliding window, kernels attend to all tokens")
    share = config.num_attention_heads // config.num_key_value_heads
    fault = attention_fault(codec, config.head_dim, share, model.embed_tokens.dtype)
    if fault is not None:
        return Product(None, fault)
    own = pack_codec(codec, Layout.PORTABLE)
    if isinstance(own, Kivi):
        return Product(f"attention over KIVI's {own.key_bits}-bit caches", "grids rounded to bfloat16")
    return Product(f"attention over {own.bits if isinstance(own, PerTokenKv) else 16}-bit caches")


def choose_prompts(model: Llama, codec: KvCodec, target: Target) -> Product:
    """Returns what attends to whole prompts of a block with a codec on a target; abstract arrays will do.

    Example:
      >>> from jquant.kv import ExactKv
      >>> from jquant.models import abstract_llama, tiny_config
      >>> choose_prompts(abstract_llama(tiny_config(), "bfloat16"), ExactKv(), Target.H100).describe()
      'cuDNN'
    """
    if target.prompts is None:
        return Product(None)
    fault = prompt_fault(codec, model.config, model.embed_tokens.dtype)
    return Product(None, fault) if fault else Product(_PROMPT_KERNELS[target.prompts])


def prepare(model: Llama, target: Target) -> Llama:
    """Writes every linear's weight, and the head's, as the target's kernels read it, where `choose_product` names one.

    Caches too: where `choose_attention` names a kernel, layers get the codec that keeps them in its order. Prompts
    attend by the target's kernel where `choose_prompts` names it.

    A model in bfloat16 gets a residual stream in float32 (`LlamaConfig.wide_residual`): rounding the stream at every
    block is 40 % of what bfloat16 costs the logits, and a step moves a few more kilobytes for it (docs/runtime.md).

    Exact and reversible: a model prepared for REFERENCE is portable again, every bit as it was. Other
    activations, norms and the embedding keep their dtypes; kernels round to bfloat16 themselves, so that a model in
    float32 gets products of bfloat16's precision. What is prepared for a GPU runs there alone; no GPU is needed to
    prepare it.

    Args:
      model: portable or prepared for another target; its layers a tuple or stacked.
      target: where it shall run.

    Returns:
      The model; weights without a kernel are those of the one given.

    Example:
      >>> from jquant.models import random_model, tiny_config
      >>> model = random_model(tiny_config(), jax.random.key(0))
      >>> prepare(model, Target.H100) is model  # no weight of it has a kernel
      True
    """
    rewrite, pack = partial(_rewrite, target=target), partial(_pack, model=model, target=target)
    if isinstance(model.layers, Stacked):
        block = pack(_map_block(model.layers.block, partial(rewrite, stacked=True), target.layout))
        layers: tuple[Block, ...] | Stacked = dataclasses.replace(model.layers, block=block)
    elif isinstance(model.layers, Sharded):
        raise FormatError("the layers are spread over the devices of a mesh: prepare each device's own, in `shard`")
    else:
        layers = tuple(
            pack(_map_block(block, partial(rewrite, stacked=False), target.layout)) for block in model.layers
        )
    head = None if model.lm_head is None else rewrite(model.lm_head, stacked=False)
    changed = any(old is not new for old, new in zip(_changing(model.layers), _changing(layers), strict=True))
    changed = changed or head is not model.lm_head
    prompts = _choose_prompts(model, target)
    if not changed and prompts == model.config.prompt_attention:
        return model
    wide = target is not Target.REFERENCE and model.embed_tokens.dtype == jnp.bfloat16
    config = dataclasses.replace(model.config, wide_residual=wide, prompt_attention=prompts)
    return dataclasses.replace(model, layers=layers if changed else model.layers, lm_head=head, config=config)


def describe_products(model: Llama) -> str:
    """Returns what serves a model as it is, in words: how many linears are kernels', and who attends to prompts.

    >>> from jquant.models import abstract_llama, tiny_config
    >>> describe_products(abstract_llama(tiny_config()))
    'XLA'
    """
    layers = model.layers
    if isinstance(layers, Sharded):
        own = describe_products(dataclasses.replace(model, layers=layers.layers))
        extent = " x ".join(f"{axis} {count}" for axis, count in layers.mesh.shape.items())
        whole = f", whole on each: {'; '.join(layers.notes)}" if layers.notes else ""
        return f"{own}, on {extent} devices{whole}"
    depth = layers.depth if isinstance(layers, Stacked) else 1
    kernels = tuple(_kernels(layers))
    inner = [_innermost(kernel) for kernel in kernels]
    layouts = [kernel.layout for kernel in inner if isinstance(kernel, QuantizedTensor)]
    prepared = [layout for layout in layouts if layout is not Layout.PORTABLE]
    attention = model.config.prompt_attention
    prompts = f", prompts by {'XLA' if attention is None else _PROMPT_KERNELS[attention]}"
    if not prepared:
        return "XLA" if attention is None else f"XLA{prompts}"
    served = len(prepared) + sum(isinstance(kernel, JoinedPart) for kernel in kernels)
    count = len(BLOCK_LINEARS) * model.config.num_hidden_layers
    head = " and the head" if model.lm_head is not None and isinstance(model.lm_head.kernel, _PREPARED) else ""
    return f"{prepared[0].value} kernels, {depth * served} of {count} linears{head}{prompts}"


def _input_fault(layer: Linear, weight: Any, *, rotated: bool) -> str | None:
    """Returns why no kernel takes what a linear's input quantizer gives."""
    quantizer, inputs = layer.input_quantizer, weight.shape[0]
    if rotated:
        return "a rotated weight takes quantized inputs as numbers"
    if isinstance(quantizer, TokenQuantizer) and quantizer.method.group_size not in (None, inputs):
        return f"inputs in groups of {quantizer.method.group_size}, kernels take one scale for each token"
    if isinstance(quantizer, OutlierQuantizer):
        return (
            None if integer_kind(weight.format) == "w8a8" else "outliers beside 4-bit weights, the kernel takes 8 bits"
        )
    if not isinstance(quantizer, TokenQuantizer | TensorQuantizer):
        return f"no kernel for inputs of {type(quantizer).__name__}"
    return None


def _rotation_fault(layer: Linear) -> str | None:
    """Returns why no kernel rotates and quantizes a linear's input; None where one does."""
    quantizer, rotation = layer.input_quantizer, layer.input_rotation
    if not isinstance(quantizer, TokenQuantizer) or quantizer.method.symmetry not in SYMMETRIES:
        return "kernels of rotations have tokens' own grids, symmetric or asymmetric"
    rotation = rotation.rotation if isinstance(rotation, PreparedRotation) else rotation
    return "no rotation" if rotation is None else rotation_fault(rotation)


def _rewrite(layer: Linear, *, target: Target, stacked: bool) -> Linear:
    layout = target.layout
    kernel = layer.kernel
    inner = _innermost(kernel)
    product = choose_product(layer, target)
    rotation = layer.input_rotation
    if isinstance(rotation, PreparedRotation) and rotation.layout is not layout:
        rotation = rotation.rotation
    if isinstance(rotation, OnlineRotation) and product.kernel in _INTEGERS and _rotation_fault(layer) is None:
        rotation = prepare_online(rotation, layout)
    if isinstance(inner, _PREPARED) and inner.layout is not layout:
        inner = _restored(inner, stacked=stacked)
    if isinstance(inner, UniformTensor | BinaryTensor | SpqrTensor) and product.kernel is not None:
        slots = most_outliers(inner) if isinstance(inner, SpqrTensor) else 0
        inner = _prepared(inner, layout, product.kernel, slots, stacked=stacked)
    if inner is _innermost(kernel) and rotation is layer.input_rotation:
        return layer
    return dataclasses.replace(layer, kernel=_wrap(kernel, inner), input_rotation=rotation)


@partial(jax.jit, static_argnames=("layout", "kernel", "slots", "stacked"))
def _prepared(tensor: Any, layout: Layout, kernel: str, slots: int, *, stacked: bool) -> QuantizedTensor:
    function: Callable[..., Any] = _OF_NUMBERS.get(kernel, prepare_integer)
    if isinstance(tensor, SpqrTensor):
        function = partial(prepare_outliers, slots=slots)
    elif isinstance(tensor, BinaryTensor):
        function = prepare_signs
    once = partial(function, layout=layout)
    return jax.vmap(once)(tensor) if stacked else once(tensor)


@partial(jax.jit, static_argnames="stacked")
def _restored(tensor: Any, *, stacked: bool) -> QuantizedTensor:
    return jax.vmap(lambda one: one.restore())(tensor) if stacked else tensor.restore()


def _innermost(kernel: Any) -> Any:
    return _innermost(kernel.inner) if isinstance(kernel, _WRAPPERS) else kernel


def _wrap(kernel: Any, inner: Any) -> Any:
    if isinstance(kernel, _WRAPPERS):
        return dataclasses.replace(kernel, inner=_wrap(kernel.inner, inner))
    return inner


def _pack(block: Block, *, model: Llama, target: Target) -> Block:
    codec = block.self_attn.kv_codec
    kernel = choose_attention(model, codec, target).kernel is not None
    packed = pack_codec(codec, target.layout if kernel else Layout.PORTABLE)
    return block if packed is codec else put(block, "self_attn.kv_codec", packed)


def _choose_prompts(model: Llama, target: Target) -> PromptAttention | None:
    layers: Any = (model.layers.block,) if isinstance(model.layers, Stacked) else model.layers
    codecs = (block.self_attn.kv_codec for block in layers)
    return target.prompts if any(choose_prompts(model, codec, target).kernel for codec in codecs) else None


def _map_block(block: Block, function: Callable[[Linear], Linear], layout: Layout) -> Block:
    block = split_shared(block, layout)
    for name in BLOCK_LINEARS:
        block = put(block, name, function(get(block, name)))
    return join_shared(block)


def _changing(layers: tuple[Block, ...] | Stacked) -> Iterator[Any]:
    yield from _kernels(layers)
    for block in (layers.block,) if isinstance(layers, Stacked) else layers:
        yield block.self_attn.kv_codec


def _kernels(layers: tuple[Block, ...] | Stacked) -> Iterator[Any]:
    for block in (layers.block,) if isinstance(layers, Stacked) else layers:
        for name in BLOCK_LINEARS:
            yield get(block, name).kernel
