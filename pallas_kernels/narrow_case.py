"""Products with narrow weights to check and to time: random operands, kernel, meaning, XLA's bfloat16 product."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels import reference
from pallas_kernels.binary import binary_decode
from pallas_kernels.configs import NarrowKind, choose_narrow, most_tokens
from pallas_kernels.decode_config import DecodeConfig
from pallas_kernels.narrow import BinaryWeight, SpqrWeight, TwoLevelGrids, prepare_binary, prepare_spqr
from pallas_kernels.spqr import GROUP, spqr_decode

KINDS: Final[tuple[NarrowKind, ...]] = ("binary4", "binary3", "binary2", "spqr3")
BITS: Final = {"binary4": 4, "binary3": 3, "binary2": 2, "spqr3": 3}
GROUP_OF_ALPHAS: Final = 128
OUTLIERS: Final = 0.01  # of SpQR's weights
BITS_OF_GRIDS: Final = 0.75  # of SpQR, for each weight: codes of scales and zeros, and the grids of these
BITS_OF_OUTLIER: Final = 32


class NarrowOperands(NamedTuple):
    """One product's operands, before `prepare`.

    Attributes:
      x: activations.
      steps: ones, which other products' tokens have as their grids' steps.
      shift: zeros, likewise.
      weight: the arguments of the format's `prepare`, codes first.
    """

    x: BFloat16[Array, "tokens in"]
    steps: Float32[Array, "tokens"]
    shift: Float32[Array, "tokens"]
    weight: tuple[Any, ...]


@dataclass(frozen=True)
class NarrowCase:
    """A product of random operands; the interface of `cases.Case`.

    Attributes:
      kind: the weight's format.
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the alphas, or of SpQR's scales.
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
        """Returns the bytes of codes, grids and outliers."""
        if self.kind == "spqr3":
            return self.outputs * self.inputs * (3 + BITS_OF_GRIDS + OUTLIERS * BITS_OF_OUTLIER) / 8
        return self.outputs * BITS[self.kind] * (self.inputs / 8 + 2 * self.groups)

    @property
    def operations(self) -> int:
        """Returns how often the product multiplies and adds, counted as two."""
        return 2 * self.tokens * self.outputs * self.inputs

    def config(self) -> DecodeConfig:
        """Returns what the table or the rule chooses."""
        return choose_narrow(self.kind, self.tokens, self.outputs, self.inputs, self.groups)

    def operands(self, seed: int | Int32[Array, ""]) -> NarrowOperands:
        """Returns random operands."""
        return _operands(self, jax.random.key(seed))

    def prepare(self, given: NarrowOperands) -> BinaryWeight | SpqrWeight:
        """Returns the weight as the kernel reads it."""
        return _prepare(self, given.weight)

    def kernel(self, config: DecodeConfig) -> Callable[..., Any]:
        """Returns the kernel as a function of (x, steps, shift, prepared weight)."""
        decode: Any = spqr_decode if self.kind == "spqr3" else binary_decode
        return lambda x, steps, shift, weight: decode(x, *weight, config=config)

    def meaning(self, given: NarrowOperands) -> Float[Array, "tokens out"]:
        """Returns the product in float32."""
        return _meaning(self, given)

    def xla(self) -> dict[str, tuple[Callable[..., Any], Callable[[NarrowOperands], tuple[Any, ...]]]]:
        """Returns XLA's formulation: a function, and its arguments from the operands."""
        return {"bfloat16": (_bf16, functools.partial(_dense, self))}


def narrow_cases(kinds: tuple[str, ...], sizes: list[tuple[int, ...]], tokens: list[int]) -> Iterator[NarrowCase]:
    """Yields the products of some kinds, sizes and numbers of tokens that have a kernel."""
    for kind in (kind for kind in KINDS if kind in kinds):
        group = GROUP if kind == "spqr3" else GROUP_OF_ALPHAS
        for outputs, inputs in sizes:
            yield from (
                NarrowCase(kind, count, outputs, inputs, inputs // group)
                for count in tokens
                if count <= most_tokens(kind)
            )


@functools.partial(jax.jit, static_argnums=0)
def _operands(case: NarrowCase, key: jax.Array) -> NarrowOperands:
    of_x, of_codes, *keys = jax.random.split(key, 7)
    bits, (outputs, inputs) = BITS[case.kind], (case.outputs, case.inputs)
    x = jax.random.normal(of_x, (case.tokens, inputs), jnp.bfloat16)
    codes = jax.random.randint(of_codes, (outputs, inputs), 0, 2**bits, jnp.int8)
    size = 1 / math.sqrt(inputs)
    if case.kind != "spqr3":
        alphas = size * jax.random.uniform(keys[0], (case.groups, bits, outputs), jnp.float32, 0.5, 1.5)
        return NarrowOperands(x, jnp.ones(case.tokens), jnp.zeros(case.tokens), (codes, alphas.astype(jnp.float16)))
    scale_codes, zero_codes = jax.random.randint(keys[0], (2, case.groups, outputs), 0, 8, jnp.int32)
    parts = jax.random.uniform(keys[2], (4, case.groups, outputs // 16), jnp.float32, 0.2, 0.5)
    grids = TwoLevelGrids(
        scale_codes, zero_codes, (parts * jnp.array([size, size, 1, 1])[:, None, None]).astype(jnp.float16)
    )
    slots = (outputs, max(1, round(OUTLIERS * inputs)))
    values = (4 * size * jax.random.normal(keys[3], slots)).astype(jnp.float16)
    rows = jax.random.randint(keys[4], slots, 0, inputs, jnp.int32)
    return NarrowOperands(x, jnp.ones(case.tokens), jnp.zeros(case.tokens), (codes, grids, values, rows))


@functools.partial(jax.jit, static_argnums=0)
def _prepare(case: NarrowCase, weight: tuple[Any, ...]) -> Any:
    return prepare_spqr(*weight) if case.kind == "spqr3" else prepare_binary(*weight)


def _weight(case: NarrowCase, weight: tuple[Any, ...]) -> jax.Array:
    if case.kind == "spqr3":
        codes, grids, *outliers = weight
        return reference.spqr_weight(codes, *grids, *outliers)
    return reference.binary_weight(*weight)


@functools.partial(jax.jit, static_argnums=0)
def _meaning(case: NarrowCase, given: NarrowOperands) -> jax.Array:
    weight = _weight(case, given.weight)
    return jnp.dot(given.x.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _dense(case: NarrowCase, given: NarrowOperands) -> tuple[jax.Array, jax.Array]:
    return given.x, _weight(case, given.weight).astype(jnp.bfloat16)


def _bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight.T)
