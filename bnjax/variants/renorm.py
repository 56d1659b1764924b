"""Batch renormalization: in training too, close to what inference does."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Shaped

from bnjax import _checks
from bnjax._checks import Axes
from bnjax._sync import AxisName
from bnjax.norm import BatchStats, Params, batch_norm_and_moments


def batch_renorm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    r_max: Any = 3.0,
    d_max: Any = 5.0,
    axis: Axes = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: object = None,
    dtype: DTypeLike | None = None,
    bessel_correction: bool = False,
) -> tuple[Float[Array, "..."], BatchStats]:
    """Batch norm whose output in training is moved towards what the running statistics would give.

    With the batch's mean and var, the running ones before they move, mean' and var', and σ = sqrt(var + epsilon):

        r = clip(σ / σ', 1 / r_max, r_max)        d = clip((mean − mean') / σ', −d_max, d_max)
        y = scale · ((x − mean) / σ · r + d) + bias

    No derivative goes through r and d. Where neither is clipped, y is what inference gives; inference is that of
    `batch_norm`. (The paper keeps a running σ; here it is the running variance, as in all of batch norm's relatives.)

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of that shape.
      training: whether to use the batch's statistics and to move the running ones; static.
      r_max: at least 1; may be traced, as a schedule is: the paper starts at 1, which with d_max = 0 is batch norm, and
        raises it to 3 when the running statistics have settled.
      d_max: at least 0; may be traced: the paper raises it from 0 to 5.
      axis: feature axis or axes, static; this and the following as in `batch_norm`.
      momentum: weight of the old running value.
      epsilon: number added to the variance.
      mask: boolean, or sample weights, of the statistics.
      axis_name: mapped axis over which the moments are merged.
      axis_index_groups: groups of indices of that axis that are normalized separately.
      dtype: dtype of `y`; that of `x` by default. Statistics are float32, or float64 for float64 input.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm`; also for an r_max below 1 or a d_max below 0
        (where known).

    References:
      Ioffe 2017 (arXiv 1702.03275), Algorithm 1; section 4 for the schedules.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> y, batch_stats = batch_renorm(jnp.array([[1.], [3.]]), params, batch_stats, training=True)
    >>> [f'{value:.3f}' for value in (*y[:, 0], *batch_stats['mean'])]  # mean 0 and variance 1 were the running ones
    ['1.000', '3.000', '0.020']
    """
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        _checks.check_in_range(name, value, least, float("inf"), f"Pass {least} for batch norm without correction.")

    def corrected(params: Params, mean: Array, var: Array) -> Params:
        old_mean, old_var = (jnp.asarray(batch_stats[name]).astype(mean.dtype) for name in ("mean", "var"))
        deviation, old = (jnp.sqrt(v + jnp.asarray(epsilon, v.dtype)) for v in (var, old_var))
        largest, furthest = jnp.asarray(r_max, mean.dtype), jnp.asarray(d_max, mean.dtype)
        r = lax.stop_gradient(jnp.clip(deviation / old, 1 / largest, largest))
        d = lax.stop_gradient(jnp.clip((mean - old_mean) / old, -furthest, furthest))
        scale, bias = (jnp.asarray(params.get(name, v)).astype(r.dtype) for name, v in (("scale", 1), ("bias", 0)))
        return {"scale": scale * r, "bias": bias + scale * d}

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
        params_of=corrected,
    )[:2]
