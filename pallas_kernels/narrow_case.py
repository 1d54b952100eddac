"""Products with narrow weights to check and to time: random operands, kernel, meaning, XLA's bfloat16 product."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float16, Float32, Int8

from pallas_kernels import reference
from pallas_kernels.binary import binary_decode
from pallas_kernels.configs import NarrowKind, choose_narrow
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.narrow import BinaryWeight, prepare_binary

KINDS: Final[tuple[NarrowKind, ...]] = ("binary4", "binary3", "binary2")
BITS: Final = {"binary4": 4, "binary3": 3, "binary2": 2}


class NarrowOperands(NamedTuple):
    """One product's operands, before `prepare`.

    Attributes:
      x: activations.
      steps: ones, which other products' tokens have as their grids' steps.
      shift: zeros, likewise.
      codes: the signs of each weight.
      alphas: what they are multiplied by.
    """

    x: BFloat16[Array, "tokens in"]
    steps: Float32[Array, "tokens"]
    shift: Float32[Array, "tokens"]
    codes: Int8[Array, "out in"]
    alphas: Float16[Array, "groups bits out"]


@dataclass(frozen=True)
class NarrowCase:
    """A product of random operands; the interface of `cases.Case`.

    Attributes:
      kind: the weight's format.
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the alphas.
      zeros: never.
    """

    kind: NarrowKind
    tokens: int
    outputs: int
    inputs: int
    groups: int
    zeros: bool = False

    @property
    def bytes_of_codes(self) -> float:
        """Returns the bytes of signs and alphas."""
        return self.outputs * BITS[self.kind] * (self.inputs / 8 + 2 * self.groups)

    @property
    def operations(self) -> int:
        """Returns how often the product multiplies and adds, counted as two."""
        return 2 * self.tokens * self.outputs * self.inputs

    def config(self) -> DecodeConfig:
        """Returns what the table or the rule chooses."""
        return choose_narrow(self.kind, self.tokens, self.outputs, self.inputs, self.groups)

    def operands(self, seed: int) -> NarrowOperands:
        """Returns random operands."""
        return _operands(self, jax.random.key(seed))

    def prepare(self, given: NarrowOperands) -> BinaryWeight:
        """Returns the weight as the kernel reads it."""
        return _prepare(given.codes, given.alphas)

    def kernel(self, config: DecodeConfig) -> Callable[..., Any]:
        """Returns the kernel as a function of (x, steps, shift, prepared weight)."""
        return lambda x, steps, shift, weight: binary_decode(x, *weight, config=config)

    def meaning(self, given: NarrowOperands) -> Float[Array, "tokens out"]:
        """Returns the product in float32."""
        return _meaning(given)

    def xla(self) -> dict[str, tuple[Callable[..., Any], Callable[[NarrowOperands], tuple[Any, ...]]]]:
        """Returns XLA's formulation: a function, and its arguments from the operands."""
        return {"bfloat16": (_bf16, _dense)}


def narrow_cases(kinds: tuple[str, ...], sizes: list[tuple[int, ...]], tokens: list[int], group: int) -> Iterator[Any]:
    """Yields the products of some kinds, sizes and numbers of tokens that have a kernel."""
    for kind in (kind for kind in KINDS if kind in kinds):
        for outputs, inputs in sizes:
            yield from (NarrowCase(kind, count, outputs, inputs, inputs // group) for count in tokens if count <= 8)


@functools.partial(jax.jit, static_argnums=0)
def _operands(case: NarrowCase, key: jax.Array) -> NarrowOperands:
    of_x, of_codes, of_alphas = jax.random.split(key, 3)
    bits = BITS[case.kind]
    x = jax.random.normal(of_x, (case.tokens, case.inputs), jnp.bfloat16)
    codes = jax.random.randint(of_codes, (case.outputs, case.inputs), 0, 2**bits, jnp.int8)
    alphas = jax.random.uniform(of_alphas, (case.groups, bits, case.outputs), jnp.float32, 0.5, 1.5)
    alphas = (alphas / math.sqrt(case.inputs)).astype(jnp.float16)
    return NarrowOperands(x, jnp.ones(case.tokens), jnp.zeros(case.tokens), codes, alphas)


@jax.jit
def _prepare(codes: jax.Array, alphas: jax.Array) -> BinaryWeight:
    return prepare_binary(codes, alphas)


@jax.jit
def _meaning(given: NarrowOperands) -> jax.Array:
    weight = reference.binary_weight(given.codes, given.alphas)
    return jnp.dot(given.x.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _dense(given: NarrowOperands) -> tuple[jax.Array, jax.Array]:
    return given.x, reference.binary_weight(given.codes, given.alphas).astype(jnp.bfloat16)


def _bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight.T)
