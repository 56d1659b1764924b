"""Batch norm by the running statistics in training too."""

from typing import Any

from jaxtyping import Array, ArrayLike, DTypeLike, Inexact, Shaped

from bnjax._checks import Axes
from bnjax._sync import AxisName
from bnjax.norm import BatchStats, Params, batch_norm_and_moments


def moving_batch_norm(
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
    """Batch norm that normalizes by the running statistics in training as well, after these have moved.

        running ← momentum · running + (1 − momentum) · batch
        y = scale · (x − running mean) / sqrt(running var + epsilon) + bias

    The derivative goes through the batch's share of the running statistics, a fraction 1 − momentum, and not through
    the past. What training computes is then close to what inference does; but as the gradient hardly knows of the
    normalization, steps against it can add up until training diverges. With a momentum of 0 it is batch norm.

    Args:
      x: floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of that shape.
      training: whether to move the running statistics before they are used; static.
      axis: feature axis or axes, static; this and the following as in `batch_norm`.
      momentum: weight of the old running value; may be traced. The cumulative average `1 − 1 / (t + 1)` begins with
        the first batch's statistics, in place of the initial values.
      epsilon: number added to the variance.
      mask: boolean, or sample weights, of the statistics.
      axis_name: mapped axis over which the moments are merged.
      axis_index_groups: groups of indices of that axis that are normalized separately.
      dtype: dtype of `y`; that of `x` by default. Statistics are float32, or float64 for float64 input.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm`.

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
    return batch_norm_and_moments(
        x,
        params,
        batch_stats,
        training=training,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        bessel_correction=bessel_correction,
        is_moving=True,
    )[:2]
