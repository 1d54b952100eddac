"""What lies between the two products of a block's MLP: silu(gate) * up, by one kernel where kernels multiply."""

import math
from functools import partial

import jax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from jquant.formats import Layout, unproven
from jquant.models.layers import are_joined, joined_product, linears
from jquant.models.stream import codes_ahead
from jquant.models.tree import Mlp


def gated(
    mlp: Mlp, x: Float[Array, "batch tokens hidden"], valid: Bool[Array, "batch tokens"] | None, layout: Layout
) -> tuple[Float[Array, "batch tokens inner"], Float[Array, "batch tokens hidden"]]:
    """Returns silu(gate) * up and the tap of their input, as `linears`.

    Args:
      mlp: of the block.
      x: its input.
      valid: which tokens are real; None if all are.
      layout: of the block: see `layout_of_norms`.
    """
    layers = mlp.gate_proj, mlp.up_proj
    if layout is Layout.PORTABLE or unproven(layout) or not _has_kernel(mlp, x):
        (gate, up), tap = linears(layers, x, valid)
        return jax.nn.silu(gate) * up, tap
    following = codes_ahead(mlp.down_proj, layout)
    joined, tap = joined_product(layers, x, valid, following)
    rows = joined.reshape(math.prod(joined.shape[:-1]), joined.shape[-1])
    hidden = _apply_gate(rows, following, layout=layout)
    return hidden.reshape(*joined.shape[:-1], -1), tap


def _has_kernel(mlp: Mlp, x: jax.Array) -> bool:
    from pallas_kernels.gate import gate_fault

    gate, up = mlp.gate_proj, mlp.up_proj
    if not x.size or not are_joined((gate, up)) or gate.bias is not None or up.bias is not None:
        return False
    return gate_fault(up.kernel.shape[1], x.dtype) is None


@partial(jax.jit, static_argnames="layout")  # so that all layers share one kernel, traced and lowered once
def _apply_gate(
    rows: BFloat16[Array, "rows both"], codes: Int[Array, "out in"] | None, *, layout: Layout
) -> BFloat16[Array, "rows inner"]:
    from pallas_kernels.compat import Simulation
    from pallas_kernels.gate import apply_gate

    return apply_gate(rows, ahead=codes, simulate=Simulation() if layout is Layout.SIMULATED else None)
