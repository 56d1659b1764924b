"""Measurements of the loss along a direction: variation, gradient predictiveness, and effective smoothness."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis._trees import LossFn

Values = Array | np.ndarray


class GradientProbe(NamedTuple):
    """The results of `gradient_probe` at K points; the summaries keep further leading axes, as from vmap or scan.

    Attributes:
      loss: L(W − a d), `[K]`.
      gradient_distance: ‖∇L(W − a d) − ∇L(W)‖₂, `[K]`: gradient predictiveness, the smaller the better.
      gradient_cosine: cosine of the angle between the two gradients, `[K]`; our addition. NaN where one is zero.
      smoothness: gradient_distance / distance_moved, `[K]`; its maximum is the effective β. NaN where nothing moved.
      base_loss: L(W).
      gradient_norm: ‖∇L(W)‖₂.
      step_sizes: a, `[K]`.
      direction_norm: ‖d‖₂.
      distance_moved: ‖(W − a d) − W‖₂ of the rounded parameters, `[K]`: |a| ‖d‖₂ up to their precision.
    """

    loss: Values
    gradient_distance: Values
    gradient_cosine: Values
    smoothness: Values
    base_loss: Values
    gradient_norm: Values
    step_sizes: Values
    direction_norm: Values
    distance_moved: Values

    @property
    def loss_min(self) -> Values:
        """The smallest loss over the grid; with `loss_max` the loss variation of Fig. 4 (a)."""
        return self.loss.min(-1)

    @property
    def loss_max(self) -> Values:
        """The largest loss over the grid."""
        return self.loss.max(-1)

    @property
    def distance_min(self) -> Values:
        """The smallest gradient distance over the grid; with `distance_max` the band of Fig. 4 (b)."""
        return self.gradient_distance.min(-1)

    @property
    def distance_max(self) -> Values:
        """The largest gradient distance over the grid."""
        return self.gradient_distance.max(-1)

    @property
    def cosine_min(self) -> Values:
        """The smallest cosine over the grid."""
        return self.gradient_cosine.min(-1)

    @property
    def cosine_max(self) -> Values:
        """The largest cosine over the grid."""
        return self.gradient_cosine.max(-1)

    @property
    def max_smoothness(self) -> Values:
        """The effective β of Fig. 4 (c): the largest `smoothness` of the points that moved; NaN where none did."""
        moved = self.distance_moved != 0
        largest = jnp.where(moved, self.smoothness, -jnp.inf).max(-1)
        return jnp.where(moved.any(-1), largest, jnp.nan)


def gradient_probe(
    loss_fn: LossFn,
    params: Any,
    step_sizes: Any,
    *args: Any,
    direction: Any = None,
    batch_size: int | None = None,
) -> GradientProbe:
    """Computes loss and gradient at points along the gradient, or another direction, on the same batch.

    With W the parameters, g = ∇L(W) and the direction d (g by default), for each step size a:

        loss = L(W − a d)        distance = ‖∇L(W − a d) − g‖        smoothness = distance / ‖(W − a d) − W‖

    The range of the loss is the loss variation, the range of the distance the gradient predictiveness, and the largest
    smoothness the effective β-smoothness of Santurkar et al. ("maximum difference in gradient over distance moved").
    The cosine, other directions than the gradient, and the summaries' names are ours. K points cost K + 1 gradients.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`; its maker, such as `bnjax.analysis.losses`, chooses the batch-norm
        mode.
      params: pytree of arrays, W; leaves that are not floating-point are constants.
      step_sizes: a, `[K]`, K ≥ 1 (a number counts as one); may be traced.
      *args: further arguments of `loss_fn`, such as a batch.
      direction: d, a pytree like `params` (its leaves that are not floating-point are ignored), such as
        `random_direction` makes; the gradient by default.
      batch_size: number of points computed at once by vmap: more take more memory, and less time where the network is
        small; one after the other by default. Static.

    Returns:
      A `GradientProbe` of float32 (float64 for such parameters). Where nothing moves, since the direction is zero or
      the steps are below half the spacing of the parameters (2⁻²⁵ |W| in float32, 2⁻⁹ |W| in bfloat16), distances are
      zero and smoothness NaN. A loss that is NaN somewhere makes the numbers NaN there.

    Raises:
      TypeError, ValueError: for parameters without floating-point arrays, a loss that is no real scalar, no step sizes,
        or a direction that is not like the parameters.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), section 3.1 and Figure 4.

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 3.0]) * w ** 2).sum()
    >>> probe = analysis.gradient_probe(loss, jnp.array([1.0, 1.0]), jnp.array([0.1, 0.2]))
    >>> print([f'{value:.2f}' for value in probe.loss])
    ['1.14', '0.56']
    >>> print(f'{probe.max_smoothness:.3f}')                        # ‖A g‖ / ‖g‖ for every step of a quadratic
    2.864
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    steps = jnp.atleast_1d(jnp.asarray(step_sizes))
    if steps.ndim != 1 or steps.size == 0 or not jnp.issubdtype(steps.dtype, jnp.number):
        raise ValueError(
            f"step_sizes must be a vector of at least one number, got {steps.dtype}{list(steps.shape)}. "
            "Use jnp.linspace(0.05, 0.4, 8)."
        )
    check_batch_size(batch_size)
    base_loss, gradient = jax.value_and_grad(loss_fn)(free, *args)
    # Where a loss is NaN, its formal derivative may still be a number.
    gradient = jax.tree.map(lambda g: jnp.where(jnp.isnan(base_loss), jnp.nan, g), gradient)
    direction = gradient if direction is None else _trees.free_part("direction", direction, free)
    gradient_norm, direction_norm = _trees.norm(gradient), _trees.norm(direction)
    steps = steps.astype(direction_norm.dtype)

    def at(step: Array) -> tuple[Array, Array, Array, Array]:
        place = _trees.moved(free, -step, direction)
        loss, there = jax.value_and_grad(loss_fn)(place, *args)
        measured = _trees.distance(there, gradient), _trees.cosine(there, gradient)
        distance, cosine = (jnp.where(jnp.isnan(loss), jnp.nan, v) for v in measured)
        return loss, distance, cosine, _trees.distance(place, free)

    loss, distance, cosine, moved = lax.map(at, steps, batch_size=batch_size)
    smoothness = jnp.where(moved == 0, jnp.nan, distance / jnp.where(moved == 0, 1, moved))
    return GradientProbe(loss, distance, cosine, smoothness, base_loss, gradient_norm, steps, direction_norm, moved)


def check_batch_size(batch_size: int | None) -> None:
    """Raises `ValueError` for a number of points at once that is not positive."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}. Leave it out for one after the other.")
