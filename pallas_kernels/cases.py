"""Products to check and to time: random operands, the kernel, its meaning in float32 and what XLA makes of the same."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import reference
from pallas_kernels.configs import Config, Kind, choose
from pallas_kernels.matmul import integer_matmul, w4a16_matmul
from pallas_kernels.weights import FloatWeight, IntegerWeight, prepare_w4a8, prepare_w4a16, prepare_w8a8

type Product = Callable[..., Any]  # of arrays, to the product [tokens, out]

KINDS: Final[tuple[Kind, ...]] = ("w4a16", "w4a8", "w8a8")
FEW_TOKENS: Final = 64  # up to which XLA multiplies int4 groups apart; above it, dequantized weights


class Operands(NamedTuple):
    """One product's operands, before `prepare`.

    Attributes:
      x: bfloat16 activations, or int8 codes.
      steps: the step of each token's grid; ones for bfloat16.
      shift: the code that stands for 0, for each token; zeros for bfloat16.
      codes: int4 or int8.
      scales: the groups' steps.
      zeros: the codes that stand for 0; zeros where the case has none.
    """

    x: Float[Array, "tokens in"] | Int[Array, "tokens in"]
    steps: Float32[Array, "tokens"]
    shift: Float32[Array, "tokens"]
    codes: Int[Array, "out in"]
    scales: Float[Array, "groups out"]
    zeros: Float32[Array, "groups out"]


@dataclass(frozen=True)
class Case:
    """A product of random operands.

    Attributes:
      kind: the widths of weight and activations.
      tokens: rows of the activations.
      outputs: rows of the weight.
      inputs: columns of the weight.
      groups: rows of the scales.
      zeros: whether grids have zeros: the weight's of W4A16, the tokens' of integers.
    """

    kind: Kind
    tokens: int
    outputs: int
    inputs: int
    groups: int
    zeros: bool = False

    @property
    def bytes_of_codes(self) -> float:
        """Returns the bytes of the weight's codes."""
        return self.outputs * self.inputs * (1.0 if self.kind == "w8a8" else 0.5)

    @property
    def operations(self) -> int:
        """Returns how often the product multiplies and adds, counted as two."""
        return 2 * self.tokens * self.outputs * self.inputs

    def config(self) -> Config:
        """Returns what the table or the rule chooses."""
        return choose(self.kind, self.tokens, self.outputs, self.inputs, self.groups)

    def operands(self, seed: int | Int32[Array, ""]) -> Operands:
        """Returns random operands."""
        return _operands(self, jax.random.key(seed))

    def prepare(self, given: Operands) -> FloatWeight | IntegerWeight:
        """Returns the weight as the kernels read it."""
        return _prepare(self, given)

    def kernel(self, config: Config) -> Product:
        """Returns the kernel as a function of (x, steps, shift, prepared weight)."""
        return functools.partial(_kernel, self, config)

    def meaning(self, given: Operands) -> Float32[Array, "tokens out"]:
        """Returns the product in float32."""
        return _meaning(self, given)

    def xla(self) -> dict[str, tuple[Product, Callable[[Operands], tuple[Any, ...]]]]:
        """Returns XLA's formulations by name: a function, and its arguments from the operands. bfloat16 comes first."""
        found: dict[str, Any] = {"bfloat16": (_bf16, functools.partial(_dense_operands, self))}
        if self.kind != "w4a16":
            found["int8 with scales"] = (_int8, _int8_operands)
        elif self.tokens <= FEW_TOKENS and not self.zeros:
            found["int4 groups"] = (_grouped, lambda given: (given.x, given.codes, given.scales))
        if self.kind == "w4a16" and self.tokens >= FEW_TOKENS:
            found["dequantize, dot"] = (_dequantized, lambda given: (given.x, given.codes, given.scales, given.zeros))
        return found


def random_legal_cases(seed: int, count: int) -> Iterator[Case]:
    """Yields products of odd shapes that have a kernel."""
    rng = np.random.default_rng(seed)
    while count:
        kind = KINDS[rng.integers(len(KINDS))]
        outputs, inputs = 64 * int(rng.integers(1, 33)), 64 * int(rng.integers(1, 65))
        tokens = int(2 ** rng.uniform(0, 11))
        group = int(rng.choice([32, 64, 128, inputs])) if kind == "w4a16" else inputs
        if inputs % group == 0:
            count -= 1
            yield Case(kind, tokens, outputs, inputs, inputs // group, bool(rng.integers(2)))


def relative_error(found: Float[Array, "tokens out"], expected: Float[Array, "tokens out"]) -> float:
    """Returns the norm of the difference over the norm of what was expected."""
    return float(_relative(found, expected))


@jax.jit
def _relative(found: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


@functools.partial(jax.jit, static_argnums=0)
def _operands(case: Case, key: jax.Array) -> Operands:
    of_x, of_codes, of_scales, of_zeros, of_steps, of_shift = jax.random.split(key, 6)
    shape, grid = (case.outputs, case.inputs), (case.groups, case.outputs)
    whole = functools.partial(jax.random.randint, dtype=jnp.int8)
    scales = jax.random.uniform(of_scales, grid, jnp.float32, 0.5, 1.5) / math.sqrt(case.inputs)
    steps, shift = jnp.ones(case.tokens), jnp.zeros(case.tokens)
    if case.kind == "w4a16":
        x = jax.random.normal(of_x, (case.tokens, case.inputs), jnp.bfloat16)
        scales = scales.astype(jnp.float16)
    else:
        x = whole(of_x, (case.tokens, case.inputs), -127, 127)
        steps = jax.random.uniform(of_steps, (case.tokens,), jnp.float32, 0.005, 0.015)
        if case.zeros:
            shift = whole(of_shift, (case.tokens,), -100, 100).astype(jnp.float32)
    if case.kind == "w8a8":
        codes = whole(of_codes, shape, -127, 127)
    else:
        codes = whole(of_codes, shape, -8, 8).astype(jnp.int4)
    zeros = jnp.zeros(grid)
    if case.zeros and case.kind == "w4a16":
        zeros = whole(of_zeros, grid, -8, 8).astype(jnp.float32)
    return Operands(x, steps, shift, codes, scales, zeros)


@functools.partial(jax.jit, static_argnums=0)
def _prepare(case: Case, given: Operands) -> FloatWeight | IntegerWeight:
    if case.kind == "w4a16":
        return prepare_w4a16(given.codes, given.scales, given.zeros if case.zeros else None)
    return (prepare_w4a8 if case.kind == "w4a8" else prepare_w8a8)(given.codes, given.scales)


def _kernel(case: Case, config: Config, x: jax.Array, steps: jax.Array, shift: jax.Array, weight: Any) -> jax.Array:
    if case.kind == "w4a16":
        return w4a16_matmul(x, weight, config=config)
    return integer_matmul(x, steps, shift if case.zeros else None, weight, config=config)


@functools.partial(jax.jit, static_argnums=0)
def _meaning(case: Case, given: Operands) -> jax.Array:
    """In float32 throughout: XLA's own int8 product seems to be twice the right one on an H100, its autotuning off."""
    if case.kind == "w4a16":
        return reference.float_matmul(given.x, given.codes, given.scales, given.zeros)
    return reference.float_matmul(_dense_x(given), given.codes, given.scales)


def _dense_x(given: Operands) -> jax.Array:
    return (given.x.astype(jnp.float32) - given.shift[:, None]) * given.steps[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _dense_operands(case: Case, given: Operands) -> tuple[jax.Array, jax.Array]:
    x = given.x if case.kind == "w4a16" else _dense_x(given).astype(jnp.bfloat16)
    return x, reference.dense_weight(given.codes, given.scales, given.zeros).astype(jnp.bfloat16)


def _bf16(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight.T)


@jax.jit
def _int8_operands(given: Operands) -> tuple[jax.Array, ...]:
    return given.x, given.steps, given.codes.astype(jnp.int8), given.scales[0]


def _int8(x: jax.Array, steps: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    return reference.integer_matmul(x, steps, None, codes, scales).astype(jnp.bfloat16)


def _dequantized(x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    return jnp.dot(x, reference.dense_weight(codes, scales, zeros).astype(jnp.bfloat16).T)


def _grouped(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    (tokens, inputs), (outputs, _), groups = x.shape, codes.shape, scales.shape[0]
    apart = x.reshape(tokens, groups, inputs // groups)
    weight = codes.reshape(outputs, groups, inputs // groups).astype(jnp.bfloat16)
    sums = jnp.einsum("mgk,ngk->gmn", apart, weight, preferred_element_type=jnp.float32)
    return (sums * scales.astype(jnp.float32)[:, None, :]).sum(0).astype(jnp.bfloat16)
