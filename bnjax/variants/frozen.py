"""Frozen batch norm: a fixed affine map."""

import dataclasses
from typing import Unpack

import jax
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from bnjax.norm import BatchStats, Call, Options, Params, Result, check_call


def frozen_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    **options: Unpack[Options],
) -> tuple[Inexact[Array, "..."], BatchStats]:
    """Normalizes by the running statistics, in training too, with neither these nor the parameters moving.

        y = scale · (x − mean) / sqrt(var + epsilon) + bias

    It serves fine-tuning with batches too small for statistics of their own. No derivative goes to `params` and
    `batch_stats`; mind that weight decay needs none to move a scale.

    Args:
      x: floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes.
      training: accepted without effect; static.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. All but axis, epsilon and dtype are without effect: the statistics don't move, and there is
        nothing to merge. Where a mask is zero, NaN and extremes count as zero, so that they make no gradient NaN.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and the statistics as they were given.

    Raises:
      TypeError, ValueError: at trace time, as `batch_norm` does.

    References:
      He et al. 2016 (arXiv 1512.03385), appendix A, which fixes batch norms in detection networks; Wu & Johnson
      2021 (arXiv 2105.07576).

    >>> params, batch_stats = {'scale': jnp.array([2.])}, {'mean': jnp.array([1.]), 'var': jnp.array([4.])}
    >>> y, _ = frozen_batch_norm(jnp.array([[1.], [3.]]), params, batch_stats, training=True, epsilon=0.)
    >>> print(y.ravel())
    [0. 2.]
    """
    return frozen_batch_norm_of(check_call(x, params, batch_stats, training, **options))[:2]


def frozen_batch_norm_of(call: Call) -> Result:
    """Computes `frozen_batch_norm` of a checked call."""
    params, batch_stats = jax.lax.stop_gradient((dict(call.params), dict(call.batch_stats)))
    fixed = dataclasses.replace(call, params=params, batch_stats=batch_stats, training=False)
    return fixed.output(*fixed.running()), call.batch_stats, None
