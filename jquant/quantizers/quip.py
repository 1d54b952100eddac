"""QuIP: rotate a weight until no entry stands out, round it with LDLQ, and store codes and the seed of the rotation.

Chee, Cai, Kuleshov, De Sa 2023, arXiv:2307.13304. With W [in, out], H [in, in] the mean of x x^T:

    1  rescale      s_i = (|W_i|^2 / H_ii)^(1/4),  W <- W / s,  H <- diag(s) H diag(s): both diagonals become equal
    2  rotate       W <- V W U^T,  H <- V H V^T, V and U random orthogonal (`numerics.random_rotation`)
    3  grid         one for the matrix: the 2^b levels of [-r, r], r = rho * root mean square of W; rho is 2.4 in the
                    paper, here that of least loss after LDLQ (`RHOS`)
    4  round        LDLQ, then greedy passes (`quantizers.ldlq`)

Steps 1 and 2 leave tr((W - Q)^T H (W - Q)) as it is. Without incoherence, one asymmetric grid for each output takes
their place. The paper's W is our W^T, its D our 1 / s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jquant.errors import FormatError
from jquant.formats import (
    QuantizedTensor,
    RotatedTensor,
    ScaleDtype,
    UniformFormat,
    draw_rotations,
    quantize_centered,
    quantize_uniform,
    rotated,
)
from jquant.numerics import Transform, as_stored, revive_dead, rotate
from jquant.quantizers.base import Diagnostics, WeightQuantizer, hessian_figures
from jquant.quantizers.ldlq import Factored, Fidelity, Order, Rounded, Rounding, factorize, round_factored
from jquant.quantizers.rtn import fit_groups, round_to_nearest
from jquant.quantizers.statistics import HESSIAN, SecondMoment
from jquant.types import DType, Key

# Half widths of the grid to choose from. Rotated weights are nearly Gaussian, for which 2.4 is about right, but not
# those of an input that is thousands of times larger than others, as down_proj's are where a model keeps its massive
# activations: its rescaled row outweighs the matrix, and stays a product of two Gaussians. Measured at 4 bits over all
# blocks of SmolLM2-135M (16 x 512 tokens): with 2.4 the loss of down_proj is 40 times GPTQ's, of all others half of it.
RHOS: Final = (1.6, 2.0, 2.4, 2.8, 3.4, 4.0, 5.6, 8.0, 12.0)
_PUBLISHED_RHO: Final = 2.4  # arXiv:2307.13304
_FLOOR = 1e-8  # least H_ii / max|H| and |W_i|^2 / max|W|^2 in the rescaling; reference code
_SMALLEST = 1e-16  # added to the range, so that a matrix of zeros has one; reference code
_PROJECTION_DAMPING = 0.01  # added by the reference code as it projects, beside the damping that was asked for


class Basis(NamedTuple):
    """A weight and a Hessian in the rescaled and rotated basis, and the scales s of the inputs, 0 for dead ones."""

    weight: Float[Array, "in out"]
    hessian: Float[Array, "in in"]
    scales: Float[Array, "in"]


@final
@dataclass(frozen=True)
class Quip(WeightQuantizer):
    """QuIP.

    Attributes:
      bits: bits of one code.
      rounding: "ldlq"; "stochastic", LDLQ that rounds without bias; "greedy", coordinate descent from the unrounded
        weight; "near".
      order: of the inputs: "natural" as in the paper, "reversed" as in its code, "activation" with the largest
        diagonal of the Hessian first. LDLQ in activation order with greedy passes is the paper's LDLQ-RG.
      greedy_passes: sweeps of coordinate descent after the first rounding.
      incoherence: the kind of rotation; "none" for one asymmetric grid for each output of the matrix as it is.
      rho: half the width of the grid, in root mean squares of the rotated weight, 2.4 in the paper; None takes the one
        of `RHOS` with which the first sweep ends at the least loss (2.4 under "reference", whose loss does not see the
        clip). Unused without incoherence.
      damping: share of the mean diagonal added to the Hessian; raised step by step, and reported, if it does not
        suffice.
      scale_dtype: how scales of inputs (or, without incoherence, of outputs) are stored.
      fidelity: "reference" repeats the published code: 0.01 more damping with incoherence; weights clipped to the grid
        beforehand, so that the error of the clip is lost to the feedback; a clip after each greedy pass that the next
        pass does not know of.

    Reference: arXiv:2307.13304.
    """

    statistic = HESSIAN
    separable = False  # one rotation of the outputs and one range for the whole matrix

    bits: int = 2
    rounding: Rounding = "ldlq"
    order: Order = "activation"
    greedy_passes: int = 10  # arXiv:2307.13304
    incoherence: Transform | Literal["none"] = "kronecker"
    rho: float | None = None
    damping: float = 0.01  # arXiv:2307.13304
    scale_dtype: ScaleDtype = "float16"
    fidelity: Fidelity = "paper"

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other or that no grid can have."""
        if not 1 <= self.bits <= 8:
            raise FormatError(f"bits={self.bits}: give 1 to 8")
        if self.greedy_passes < 0 or not (self.rho is None or self.rho > 0) or self.damping < 0:
            raise FormatError(
                f"greedy_passes={self.greedy_passes}, rho={self.rho}, damping={self.damping}: "
                "give passes and damping of 0 or more, and a rho above 0"
            )
        if self.rounding == "stochastic" and self.greedy_passes:
            raise FormatError(f"greedy_passes={self.greedy_passes} would undo stochastic rounding: give 0")
        if self.rounding == "greedy" and not self.greedy_passes:
            raise FormatError("greedy rounding without greedy_passes rounds nothing: give 1 or more")

    def check(self, shape: tuple[int, int]) -> None:
        """Accepts every shape."""

    def __call__(
        self, weight: Float[Array, "in out"], statistics: SecondMoment, key: Key
    ) -> tuple[QuantizedTensor, Diagnostics]:
        """Quantizes a matrix; inputs that were always zero get weight zero.

        Diagnostics: `proxy_loss` and `rtn_proxy_loss` of the undamped Hessian; `solve_loss`, that of the damped one in
        the basis where it was rounded, not finite if no damping made the Hessian positive definite; `damping` used.
        """
        hessian = statistics.mean()
        weight = weight.astype(hessian.dtype)
        per_output = UniformFormat(self.bits, None, "asymmetric", self.scale_dtype)
        if self.incoherence == "none":
            tensor, solve_loss, damping = self._solve(*revive_dead(hessian, weight)[::-1], per_output, key)
        else:
            tensor, solve_loss, damping = self._solve_rotated(weight, hessian, self.incoherence, key)
        nearest = round_to_nearest(weight, per_output, "none")
        return tensor, hessian_figures(weight, tensor, nearest, hessian) | {
            "solve_loss": solve_loss,
            "damping": damping,
        }

    def _solve(
        self, weight: jax.Array, hessian: jax.Array, format: UniformFormat, key: Key
    ) -> tuple[QuantizedTensor, jax.Array, jax.Array]:
        grid = fit_groups(weight, format, "none")
        factored = factorize(hessian, self.damping, self.order)
        rounded = self._round(weight / grid.scales + grid.zeros, factored, key, self.greedy_passes)
        tensor = quantize_uniform(rounded.codes.astype(jnp.uint8), grid.scales, grid.zeros, format)
        return tensor, rounded.loss * grid.scales[0] ** 2, rounded.damping

    def _solve_rotated(
        self, weight: jax.Array, hessian: jax.Array, transform: Transform, key: Key
    ) -> tuple[RotatedTensor, jax.Array, jax.Array]:
        seed = jax.random.bits(key, (), jnp.uint32)
        basis = incoherent_basis(weight, hessian, seed, transform, self.scale_dtype)
        extra = _PROJECTION_DAMPING * (1 + self.damping) if self.fidelity == "reference" else 0.0

        factored = factorize(basis.hessian, self.damping + extra, self.order)

        def round_on(rho: Any, greedy_passes: Any) -> tuple[Rounded, jax.Array]:
            target, step = centered_target(basis.weight, self.bits, rho)
            key_of_noise = jax.random.fold_in(key, 1)
            return self._round(target, factored, key_of_noise, greedy_passes), step

        if self.rho is None and self.fidelity == "paper":
            rounded, step = self._search(round_on, weight.dtype)
        else:
            rounded, step = round_on(_PUBLISHED_RHO if self.rho is None else self.rho, self.greedy_passes)
        inner = quantize_centered(rounded.codes.astype(jnp.uint8), step, self.bits)
        tensor = rotated(inner, basis.scales.astype(self.scale_dtype), seed, transform)
        return tensor, rounded.loss * step**2, rounded.damping

    def _search(self, round_on: Callable[[Any, Any], tuple[Rounded, jax.Array]], dtype: DType) -> Any:
        """Tries all of `RHOS` and solves with the best; one program, whose last turn adds the greedy passes."""
        candidates = jnp.asarray((*RHOS, _PUBLISHED_RHO), dtype)
        first_sweep = int(self.rounding == "greedy")

        def turn(number: jax.Array, state: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            least, best, _ = state
            last = number == len(RHOS)
            rho = jnp.where(last, best, candidates[number])
            rounded, step = round_on(rho, jnp.where(last, self.greedy_passes, first_sweep))
            loss = jnp.sum(rounded.loss) * step**2
            return jnp.minimum(loss, least), jnp.where(loss < least, rho, best), (rounded, step)

        shapes = jax.eval_shape(round_on, candidates[0], first_sweep)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = (jnp.asarray(jnp.inf, dtype), jnp.asarray(_PUBLISHED_RHO, dtype), empty)
        return jax.lax.fori_loop(0, len(RHOS) + 1, turn, start)[2]

    def _round(self, target: jax.Array, factored: Factored, key: Key, greedy_passes: int | jax.Array) -> Rounded:
        top = 2**self.bits - 1
        return round_factored(
            jnp.clip(target, 0, top) if self.fidelity == "reference" else target,
            factored,
            key,
            rounding=self.rounding,
            greedy_passes=greedy_passes,
            top=top,
            fidelity=self.fidelity,
        )


def incoherent_basis(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    seed: UInt32[Array, ""],
    transform: Transform,
    scale_dtype: ScaleDtype = "float32",
) -> Basis:
    """Rescales and rotates a weight and its Hessian, which leaves tr(W^T H W) as it is.

    Args:
      weight: W.
      hessian: H, symmetric and positive semidefinite.
      seed: what determines the rotations of inputs and outputs.
      transform: their kind.
      scale_dtype: what the scales are rounded to, so that the stored ones undo exactly what was done.

    Returns:
      diag(1/s) W rotated on both sides, diag(s) H diag(s) rotated on the inputs' side, and s.
    """
    scales = as_stored(balance(weight, hessian), scale_dtype)
    alive = (scales > 0)[:, None]
    weight = jnp.where(alive, weight, 0) / jnp.where(alive, scales[:, None], 1)
    hessian = scales[:, None] * hessian * scales[None, :]
    inputs, outputs = draw_rotations(seed, (weight.shape[0], weight.shape[1]), transform, weight.dtype)
    weight = rotate(inputs, rotate(outputs, weight).T).T
    hessian = rotate(inputs, rotate(inputs, hessian).T)
    return Basis(weight, (hessian + hessian.T) / 2, scales)


def balance(weight: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, "in"]:
    """Returns s_i = (|W_i|^2 / H_ii)^(1/4), the largest 1: W / s and diag(s) H diag(s) have proportional diagonals.

    Of all diagonal rescalings it has the least tr(H) |W|^2. Ratios below 1e-8 of the largest count as that; an input
    that was always zero gets 0.

    Reference: arXiv:2307.13304.
    """
    norms, diagonal = jnp.sum(weight**2, axis=1), jnp.diagonal(hessian)
    most = jnp.max(norms)
    norms = jnp.maximum(norms / jnp.where(most > 0, most, 1), _FLOOR)
    scales = jnp.sqrt(jnp.sqrt(norms / jnp.maximum(diagonal / jnp.max(jnp.abs(hessian)), _FLOOR)))
    scales = jnp.where(diagonal == 0, 0, scales)
    return scales / jnp.max(scales)


def centered_target(
    weight: Float[Array, "in out"], bits: int, rho: float | Float[Array, ""]
) -> tuple[Float[Array, "in out"], Float[Array, ""]]:
    """Returns a weight in steps of the grid whose 2^bits levels span rho root mean squares on both sides of zero.

    Returns:
      The weight as codes that are not yet rounded, W / step + (2^bits - 1) / 2, and the step, a float32 number.
    """
    top = 2**bits - 1
    step = (2 * (rho * jnp.sqrt(jnp.mean(weight**2)) + _SMALLEST) / top).astype(jnp.float32).astype(weight.dtype)
    return weight / step + top / 2, step
