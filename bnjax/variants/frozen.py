"""Frozen batch norm: a fixed affine map."""

from typing import Any

import jax
from jaxtyping import Array, ArrayLike, DTypeLike, Inexact, Shaped

from bnjax import _checks
from bnjax._checks import Axes
from bnjax._sync import AxisName
from bnjax.norm import BatchStats, Params, batch_norm


def frozen_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    axis: Axes = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: object = None,
    dtype: DTypeLike | None = None,
    bessel_correction: bool = False,
) -> tuple[Inexact[Array, "..."], BatchStats]:
    """Batch norm by the running statistics, in training too, with neither these nor the parameters moving.

        y = scale · (x − mean) / sqrt(var + epsilon) + bias

    For fine-tuning with batches too small for statistics of their own. No derivative goes to `params` and
    `batch_stats`; mind that weight decay needs none to move a scale.

    Args:
      x: floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of that shape.
      training: accepted, without effect; static.
      axis: feature axis or axes, static; this, epsilon and dtype as in `batch_norm`.
      momentum: accepted, without effect, as are all of the following but `dtype`.
      epsilon: number added to the variance.
      mask: of no statistics here; what `x` holds where it is zero makes no gradient NaN.
      axis_name: there is nothing to merge.
      axis_index_groups: alike.
      dtype: dtype of `y`; that of `x` by default.
      bessel_correction: the running variance does not move.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and the statistics as they were given.

    Raises:
      TypeError, ValueError: at trace time, as `batch_norm`.

    References:
      He et al. 2016 (arXiv 1512.03385), appendix A, which fixes batch norms in detection networks; Wu & Johnson
      2021 (arXiv 2105.07576).

    >>> params, batch_stats = {'scale': jnp.array([2.])}, {'mean': jnp.array([1.]), 'var': jnp.array([4.])}
    >>> y, _ = frozen_batch_norm(jnp.array([[1.], [3.]]), params, batch_stats, training=True, epsilon=0.)
    >>> print(y.ravel())
    [0. 2.]
    """
    _checks.check_training(training)
    fixed = jax.lax.stop_gradient((dict(params), dict(batch_stats)))
    y, _ = batch_norm(x, *fixed, training=False, axis=axis, momentum=momentum, epsilon=epsilon, mask=mask, dtype=dtype)
    return y, batch_stats
