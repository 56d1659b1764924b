"""Batch renormalization, whose outputs in training are close to those at inference."""

from typing import Any, Unpack

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from bnjax import _checks
from bnjax.norm import BatchStats, Call, Options, Params, Result, check_call


def batch_renorm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    r_max: Any = 3.0,
    d_max: Any = 5.0,
    **options: Unpack[Options],
) -> tuple[Float[Array, "..."], BatchStats]:
    """Normalizes by the batch's statistics, with outputs moved towards what the running statistics would give.

    With the batch's mean and var, the running mean' and var' before they move, and σ = sqrt(var + epsilon):

        r = clip(σ / σ', 1 / r_max, r_max)        d = clip((mean − mean') / σ', −d_max, d_max)
        y = scale · ((x − mean) / σ · r + d) + bias

    No derivative goes through r and d. Where neither is clipped, y is what inference gives; inference is that of
    `batch_norm`. (The paper keeps a running σ; here it is the running variance, as in all variants of batch norm.)

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes.
      training: whether to use the batch's statistics and to move the running ones; static.
      r_max: limit of r, at least 1; may be traced, for a schedule: the paper starts at 1, which with d_max = 0 is batch
        norm, and raises it to 3 when the running statistics have settled.
      d_max: limit of |d|, at least 0; may be traced: the paper raises it from 0 to 5.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does; also for an r_max below 1 or a d_max below
        0 (where known).

    References:
      Ioffe 2017 (arXiv 1702.03275), Algorithm 1; section 4 for the schedules.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> y, batch_stats = batch_renorm(jnp.array([[1.], [3.]]), params, batch_stats, training=True)
    >>> [f'{value:.3f}' for value in (*y[:, 0], *batch_stats['mean'])]  # mean 0 and variance 1 were the running ones
    ['1.000', '3.000', '0.020']
    """
    return batch_renorm_of(check_call(x, params, batch_stats, training, **options, or_complex=False), r_max, d_max)[:2]


def batch_renorm_of(call: Call, r_max: Any, d_max: Any) -> Result:
    """Computes `batch_renorm` of a checked call."""
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        _checks.check_in_range(name, value, least, float("inf"), f"Pass {least} for batch norm without correction.")
    if not call.training:
        return call.inference()
    m = call.moments()
    mean, var = call.batch_statistics(m)
    old_mean, old_var = (value.astype(mean.dtype) for value in call.running())
    deviation, old_deviation = (jnp.sqrt(v + jnp.asarray(call.epsilon, v.dtype)) for v in (var, old_var))
    largest, furthest = jnp.asarray(r_max, mean.dtype), jnp.asarray(d_max, mean.dtype)
    r = lax.stop_gradient(_clipped(deviation / old_deviation, 1 / largest, largest))
    d = lax.stop_gradient(_clipped((mean - old_mean) / old_deviation, -furthest, furthest))
    scale, bias = (jnp.asarray(call.params.get(name, v)).astype(r.dtype) for name, v in (("scale", 1), ("bias", 0)))
    corrected = {"scale": scale * r, "bias": bias + scale * d}
    return call.output(mean, var, corrected), call.moved(m), m


def _clipped(values: Array, low: Array, high: Array) -> Array:
    """Clips values (JAX's `jet` has no rule for `jnp.clip`, nor for limits of another shape)."""
    return jnp.minimum(jnp.maximum(values, jnp.full_like(values, low)), jnp.full_like(values, high))
