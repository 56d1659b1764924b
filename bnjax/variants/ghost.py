"""Ghost batch norm: the statistics of parts of a batch, as if each part were on a device of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Shaped

from bnjax import _checks
from bnjax._checks import Axes
from bnjax._moments import Moments
from bnjax._sync import AxisName, psum, split_axis
from bnjax.norm import BatchStats, Params, batch_norm, batch_norm_and_moments, unbiased_var, update_batch_stats


def ghost_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    ghost_size: int,
    axis: Axes = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: object = None,
    dtype: DTypeLike | None = None,
    bessel_correction: bool = False,
) -> tuple[Float[Array, "..."], BatchStats]:
    """Batch norm of each `ghost_size` consecutive examples by themselves.

    In training the first axis that is no feature axis is cut into ghost batches (the last may be smaller), each of
    which is normalized by its own mean_g and var_g. With n_g elements (by weight) in ghost batch g, the running
    statistics move towards the means over ghost batches:

        mean = Σ n_g mean_g / Σ n_g        var = Σ n_g var_g / Σ n_g

    That is what devices give that hold a ghost batch each, normalize it without synchronization, and average their
    running statistics by their weights. (The paper moves them once for each ghost batch, one after the other; with a
    momentum ρ for all of G that is nearly ρ^(1/G) for each.) Inference is that of `batch_norm`.

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of that shape.
      training: whether to use the ghost batches' statistics and to move the running ones; static.
      ghost_size: examples in a ghost batch, at least 1; static.
      axis: feature axis or axes, static; this and the following as in `batch_norm`.
      momentum: weight of the old running value.
      epsilon: number added to the variance.
      mask: boolean, or sample weights, of the statistics. A ghost batch without any is normalized by the running ones.
      axis_name: mapped axis over which the running statistics are averaged too; a ghost batch stays on its device.
      axis_index_groups: groups of indices of that axis that average separately.
      dtype: dtype of `y`; that of `x` by default. Statistics are float32, or float64 for float64 input.
      bessel_correction: whether the running variance takes each ghost batch's times n_g / (n_g − 1).

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm`; also for a ghost size that is no positive int,
        or an input without other axes than the features'.

    References:
      Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741), Algorithm 1.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> x = jnp.array([[1.], [3.], [10.], [30.]])
    >>> y, batch_stats = ghost_batch_norm(x, params, batch_stats, training=True, ghost_size=2, momentum=0.)
    >>> print(y.ravel().round(3), batch_stats['mean'], batch_stats['var'])
    [-1.  1. -1.  1.] [11.] [50.5]
    """
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int | np.integer) or ghost_size < 1:
        raise ValueError(
            f"ghost_size must be a positive int, the number of examples in a ghost batch, got {ghost_size!r}. "
            "Pass 32, say."
        )
    options: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "dtype": dtype}
    x = _checks.check_input(x)
    axes = _checks.feature_axes(axis, x.ndim)
    _checks.check_training(training)
    if not training:
        return batch_norm(x, params, batch_stats, training=False, mask=mask, momentum=momentum, **options)
    if len(axes) == x.ndim:
        raise ValueError(
            f"x must have an axis of examples beside its feature axes {axes}, got shape {x.shape}. Add one: x[None]."
        )
    _checks.check_batch_stats(batch_stats, tuple(x.shape[a] for a in axes), axes)
    groups = _checks.check_axis_name(axis_name, axis_index_groups)
    weights = _checks.sample_weights(mask, x.shape, axes)
    batch = next(a for a in range(x.ndim) if a not in axes)
    whole = x.shape[batch] // ghost_size * ghost_size
    weights_axis = None if weights is None or weights.shape[batch] == 1 else batch

    def of_ghost(x: Array, weights: Array | None) -> tuple[Array, Moments]:
        unsynchronized = {"axis_name": None, "axis_index_groups": None, "bessel_correction": False}
        y, _, m = batch_norm_and_moments(
            x, params, batch_stats, training=True, momentum=momentum, mask=weights, **options, **unsynchronized
        )
        assert m is not None
        return y, m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))

    outputs, parts = [], []
    if whole:

        def split(values: Array) -> Array:
            return split_axis(_cut(values, batch, 0, whole), batch, whole // ghost_size)

        ghost_weights = weights if weights_axis is None or weights is None else split(weights)
        y, m = jax.vmap(of_ghost, (batch, weights_axis), (batch, 0))(split(x), ghost_weights)
        outputs.append(y.reshape((*x.shape[:batch], whole, *x.shape[batch + 1 :])))
        parts.append(m)
    if whole < x.shape[batch] or not whole:
        rest = weights if weights_axis is None else _cut(weights, batch, whole, x.shape[batch])
        y, m = of_ghost(_cut(x, batch, whole, x.shape[batch]), rest)
        outputs.append(y)
        parts.append(jax.tree.map(lambda v: v[None], m))
    m = _mean_over(jax.tree.map(lambda *v: jnp.concatenate(v), *parts), bessel_correction, axis_name, groups)
    y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, batch)
    return y, update_batch_stats(batch_stats, m, momentum=momentum)


def _cut(values: Any, axis: int, start: int, end: int) -> Array:
    return jax.lax.slice_in_dim(values, start, end, axis=axis)


def _mean_over(m: Moments, bessel_correction: bool, axis_name: Any, groups: Any) -> Moments:
    """Moments `[ghost batches, *features]` averaged by their counts."""
    var = unbiased_var(m) if bessel_correction else m.var
    sums = jnp.stack([m.count * m.mean, m.count * var, m.count]).sum(1)
    mean, var, count = psum(sums, axis_name, groups)
    some = jnp.where(count > 0, count, 1)
    return Moments(mean / some, var / some, count)
