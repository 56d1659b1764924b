"""Batch norm with an l_p norm in place of the standard deviation."""

import functools
import math
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from bnjax import _dtypes
from bnjax._counts import nonzero, product_of
from bnjax._moments import checked_moments
from bnjax._remat import keeping_arguments
from bnjax._sums import expand, has_weight, without_masked_extremes
from bnjax._sync import (
    AxisName,
    Groups,
    Moments,
    group_size,
    index_in_group,
    match_explicit_sharding,
    placed,
    psum,
)
from bnjax.norm import BatchStats, Call, Options, Params, Result, check_call


def lp_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    p: float,
    training: bool,
    **options: Unpack[Options],
) -> tuple[Float[Array, "..."], BatchStats]:
    """Normalizes by the mean and the average l_p norm of each feature, taken before the mean is subtracted.

    With weights w (all 1 without a mask) of total n over the reduced axes and, with `axis_name`, over its members:

        norm = (Σ w |x|^p / n)^(1/p), or for p = ∞ the largest |x| where w > 0
        y = scale · (x − mean) / sqrt(norm² + epsilon) + bias

    The running 'var' is the running average of norm², so that inference is `batch_norm`'s own. (With p = 2, norm² =
    var + mean².) The epsilon is ours, and so is the reading of "the average of their l_p norm" as the power mean above.
    Every order and mode of derivative is supported; the derivative of |x| at 0 is taken as 0, and where several
    elements are the largest, the derivative for p = ∞ is the mean of theirs.

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes, 'var' being that of the squared norm;
        start with the statistics of `init_batch_norm`.
      p: 1, 2 or infinity (`math.inf`); static.
      training: whether to use the batch's statistics and to move the running ones; static.
      **options: `Options` of `batch_norm` but for bessel_correction: axis, momentum, epsilon, mask, axis_name,
        axis_index_groups and dtype. With p = ∞ it only matters which weights of the mask are positive.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does, and for another `p`.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), section 3.3.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> y, batch_stats = lp_batch_norm(jnp.array([[1.], [3.]]), params, batch_stats, p=1, training=True, momentum=0.5)
    >>> print(y.ravel().round(3), batch_stats['mean'], batch_stats['var'])
    [-0.5  0.5] [1.] [2.5]
    """
    if "bessel_correction" in options:
        raise TypeError("lp_batch_norm takes no bessel_correction: an l_p norm has none. Leave it out.")
    return lp_batch_norm_of(check_call(x, params, batch_stats, training, **options, or_complex=False), p)[:2]


def lp_batch_norm_of(call: Call, p: Any) -> Result:
    """Computes `lp_batch_norm` of a checked call; the moments it returns have the squared norm as `var`."""
    if not isinstance(p, int | float | np.number) or p not in (1, 2, math.inf):
        raise ValueError(
            f"p must be 1, 2 or infinity, a static number, got {p!r}. Pass 1 (mean magnitude), 2 (root mean square) or "
            "math.inf (largest magnitude)."
        )
    if not call.training:
        return call.inference()
    m = call.moments()
    if p == 2:
        m = m._replace(var=m.var + jnp.square(m.mean))
    elif p == 1:
        local = _moments_of_magnitude(call.x, call.weights, call.axes)
        share = local.count / nonzero(m.count)
        magnitude = psum(share * local.mean, call.axis_name, call.groups)
        m = m._replace(var=product_of(magnitude, magnitude))
    else:
        norm = _largest_magnitude(call.x, call.weights, call.axes, call.axis_name, call.groups)
        m = m._replace(var=jnp.square(norm))
    return call.output(*call.batch_statistics(m)), call.moved(m), m


@functools.partial(keeping_arguments, static_argnums=2)
def _moments_of_magnitude(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes local moments of |x|, keeping only x for the backward pass."""
    x = x.astype(_dtypes.wide(x.dtype))
    if weights is not None:
        x = without_masked_extremes(x, weights)  # NaN's sign is NaN, even times a derivative of zero
    return checked_moments(x * jnp.sign(x), weights, axes, None, None)  # jnp.abs has the derivative 1 at 0


def _largest_magnitude(
    x: Array, weights: Array | None, axes: tuple[int, ...], axis_name: AxisName | None, groups: Groups | None
) -> Array:
    """Returns the largest |x| of each feature where the weight is positive, over all members; zero where there is none.

    Its derivative is that of the mean magnitude of all members' largest elements: the mean of `sign(x) ∂x` over these.
    """
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    largest = jnp.abs(lax.stop_gradient(_without_masked(x, weights))).max(reduced, initial=0)
    if axis_name is not None:
        largest = _largest_of_members(largest, axis_name, groups)

    @keeping_arguments
    def magnitudes(x, weights, largest):
        x = _without_masked(x, weights)
        is_largest = (jnp.abs(x) == expand(largest, x.ndim, axes)) & (x != 0)
        x = jnp.where(is_largest, x, 0)
        return (lax.stop_gradient(jnp.sign(x)) * x).sum(reduced), is_largest.sum(reduced, dtype=x.dtype)

    total, count = (psum(v, axis_name, groups) for v in magnitudes(x, weights, largest))
    mean = total / jnp.where(count > 0, count, 1)
    return largest + jnp.where(jnp.isfinite(mean), mean - lax.stop_gradient(mean), 0)


def _largest_of_members(largest: Array, axis_name: AxisName, groups: Groups | None) -> Array:
    if groups is None:
        return lax.pmax(largest, axis_name)
    all_of_them = placed(largest, index_in_group(axis_name, groups), group_size(axis_name, groups))
    return psum(all_of_them, axis_name, groups).max(0)


def _without_masked(x: Array, weights: Array | None) -> Array:
    """Returns `x` in float32 at least, with zero where the weight is zero."""
    x = x.astype(_dtypes.wide(x.dtype))
    return x if weights is None else jnp.where(has_weight(match_explicit_sharding(weights, x)), x, 0)
