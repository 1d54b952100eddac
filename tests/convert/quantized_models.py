"""Random quantized models for tests of exports: made in numpy, nothing is solved or compiled."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.packed import stream_along_inputs
from jquant.activations import ActivationMethod, StaticTensor, TensorQuantizer
from jquant.formats import PermutedTensor, UniformFormat, UniformTensor
from jquant.models import Family, Linear, Llama, LlamaConfig, build, map_linears, tiny_hf_config
from tests.convert.folders import random_tensors

type Choose = Callable[[str], UniformFormat | None]  # path -> format of its weight, None to leave it dense


def dense_model(family: Family = "llama2", dtype: Any = np.float32, **settings: Any) -> Llama:
    """Return a random model of one layer, with settings of its configuration."""
    config = LlamaConfig.from_hf(tiny_hf_config(family) | {"num_hidden_layers": 1} | settings)
    tensors = iter(random_tensors(config, dtype).values())  # in the order of `build`

    def make(path: str, shape: tuple[int, ...]) -> Any:
        array = next(tensors)
        return jnp.array(array.T if path.endswith("kernel") else array)

    return build(config, make)


def quantized_model(
    format: UniformFormat | Choose, activations: ActivationMethod | None = None, *, permuted: bool = False, **model: Any
) -> Llama:
    """Return a model whose linears have random codes, scales and zeros that keep activations near their size.

    Args:
      format: of all linears of all blocks, or what chooses it by path.
      activations: what quantizes their inputs; a static scale is 1 / 16.
      permuted: whether groups follow a random order of inputs.
      model: what `dense_model` takes.
    """
    choose = format if callable(format) else lambda path: format

    def quantize(path: str, linear: Linear) -> Linear:
        chosen = choose(path)
        if chosen is None:
            return linear
        kernel: Any = random_uniform(path, linear.kernel.shape, chosen)
        if permuted:
            order = np.random.default_rng(0).permutation(kernel.shape[0]).astype(np.int32)
            kernel = PermutedTensor(inner=kernel, order=jnp.array(order[:, None]), shape=kernel.shape)
        return dataclasses.replace(linear, kernel=kernel, input_quantizer=_quantizer(activations))

    return map_linears(dense_model(**model), quantize)


def random_uniform(path: str, shape: tuple[int, ...], format: UniformFormat) -> UniformTensor:
    """Return a random uniform tensor; no zero is 0 and no code is far from it."""
    inputs, outputs = shape
    random, groups = np.random.default_rng(zlib.crc32(path.encode())), format.groups(inputs)
    middle, largest = 2 ** (format.bits - 1), 2**format.bits - 1
    codes = random.integers(0, largest + 1, shape, dtype=np.uint8)
    zeros = np.clip(middle + random.integers(-1, 2, (groups, outputs)), 1, largest).astype(np.uint8)
    step = 3 / (largest * inputs**0.5)
    scales = random.uniform(step, 2 * step, (groups, outputs)).astype(jnp.dtype(format.scale_dtype))
    return UniformTensor(
        codes=jnp.array(stream_along_inputs(codes, format.bits)),
        scales=jnp.array(scales),
        zeros=jnp.array(stream_along_inputs(zeros, format.bits)) if format.symmetry == "asymmetric" else None,
        format=format,
        shape=(inputs, outputs),
    )


def _quantizer(method: ActivationMethod | None) -> Any:
    if isinstance(method, StaticTensor):
        return TensorQuantizer(jnp.float32(1 / 16), method)
    return None if method is None else method.fit(None)
