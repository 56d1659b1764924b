"""Batch norm by the running statistics in training too."""

from typing import Unpack

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from bnjax._sync import select
from bnjax.norm import BatchStats, Call, Options, Params, Result, check_call


def moving_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    **options: Unpack[Options],
) -> tuple[Inexact[Array, "..."], BatchStats]:
    """Normalizes by the running statistics in training as well, after these have moved.

        running ← momentum · running + (1 − momentum) · batch
        y = scale · (x − running mean) / sqrt(running var + epsilon) + bias

    The derivative goes through the batch's share of the running statistics, a fraction 1 − momentum, and not through
    the past. Training then computes nearly what inference does; but as the gradient hardly knows of the normalization,
    steps against it can add up until training diverges. With a momentum of 0 this function is batch norm, but
    for a Bessel's correction, by which it normalizes too.

    Args:
      x: floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes.
      training: whether to move the running statistics before they are used; static.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. The cumulative average, a momentum of `1 − 1 / (t + 1)`, begins with the first batch's
        statistics, in place of the initial values.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 2, on what a gradient that ignores the normalization does;
      Ioffe 2017 (arXiv 1702.03275), which reports that it does not work; Yan et al. 2020 (arXiv 2001.06838).

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> x = jnp.array([[1.], [3.]])
    >>> y, batch_stats = moving_batch_norm(x, params, batch_stats, training=True, momentum=0.5)
    >>> print(y.ravel().round(3), batch_stats['mean'])
    [0. 2.] [1.]
    """
    return moving_batch_norm_of(check_call(x, params, batch_stats, training, **options))[:2]


def moving_batch_norm_of(call: Call) -> Result:
    """Computes `moving_batch_norm` of a checked call."""
    if not call.training:
        return call.inference()
    m = call.moments()
    batch_stats = call.moved(m)
    mean, var = (jnp.asarray(batch_stats[name]).astype(m.mean.dtype) for name in ("mean", "var"))
    if call.weights is not None:
        mean = select(~jnp.isnan(m.count), mean, m.mean)  # the statistics stay, but a NaN weight is loud
    return call.output(*call.of_each_member(mean, var)), batch_stats, m
