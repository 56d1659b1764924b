"""Ghost batch norm: normalization by the statistics of parts of a batch, as if each part had a device of its own."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from bnjax._sync import Moments, average_moments, split_axis, with_counts_of_features
from bnjax.norm import BatchStats, Call, Options, Params, Result, check_call, unbiased_var, update_batch_stats


def ghost_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    ghost_size: int,
    **options: Unpack[Options],
) -> tuple[Float[Array, "..."], BatchStats]:
    """Normalizes each `ghost_size` consecutive examples by themselves.

    In training the first axis that is no feature axis is cut into ghost batches (the last may be smaller), each of
    which is normalized by its own mean_g and var_g. With n_g elements (by weight) in ghost batch g, the running
    statistics move towards the means over ghost batches:

        mean = Σ n_g mean_g / Σ n_g        var = Σ n_g var_g / Σ n_g

    Devices give the same result if each holds a ghost batch and normalizes it without synchronization, and if they
    average their running statistics by their weights. (The paper moves these once for each ghost batch, one after the
    other; a momentum ρ for all G of them is nearly ρ^(1/G) for each.) Inference is that of `batch_norm`.

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes.
      training: whether to use the ghost batches' statistics and to move the running ones; static.
      ghost_size: examples in a ghost batch, at least 1; static.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. A ghost batch on which the mask has no weight is normalized by the running statistics; over
        axis_name the running statistics are averaged too, while a ghost batch stays on its device; with
        bessel_correction the running variance takes each ghost batch's times n_g / (n_g − 1).

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does; also for a ghost size that is no positive
        int, or an input without other axes than the features'.

    References:
      Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741), Algorithm 1.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> x = jnp.array([[1.], [3.], [10.], [30.]])
    >>> y, batch_stats = ghost_batch_norm(x, params, batch_stats, training=True, ghost_size=2, momentum=0.)
    >>> print(y.ravel().round(3), batch_stats['mean'], batch_stats['var'])
    [-1.  1. -1.  1.] [11.] [50.5]
    """
    call = check_call(x, params, batch_stats, training, **options, or_complex=False)
    return ghost_batch_norm_of(call, ghost_size)[:2]


def ghost_batch_norm_of(call: Call, ghost_size: Any) -> Result:
    """Computes `ghost_batch_norm` of a checked call."""
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int | np.integer) or ghost_size < 1:
        raise ValueError(
            f"ghost_size must be a positive int, the number of examples in a ghost batch, got {ghost_size!r}. "
            "Pass 32, say."
        )
    if not call.training:
        return call.inference()
    x, weights, axes, ghost_size = call.x, call.weights, call.axes, int(ghost_size)
    if len(axes) == x.ndim:
        raise ValueError(
            f"x must have an axis of examples beside its feature axes {axes}, got shape {x.shape}. Add one: x[None]."
        )
    batch = next(a for a in range(x.ndim) if a not in axes)
    whole = x.shape[batch] // ghost_size * ghost_size
    weights_axis = None if weights is None or weights.shape[batch] == 1 else batch

    def of_ghost(x: Array, weights: Array | None) -> tuple[Array, Moments]:
        ghost = dataclasses.replace(call, x=x, weights=weights, axis_name=None, groups=None)
        m = ghost.moments()
        return ghost.output(*ghost.batch_statistics(m)), with_counts_of_features(m)

    outputs, parts = [], []
    if whole:

        def split(values: Array) -> Array:
            return split_axis(_cut(values, batch, 0, whole), batch, whole // ghost_size, ghost_size)

        ghost_weights = weights if weights_axis is None or weights is None else split(weights)
        y, m = jax.vmap(of_ghost, (batch, weights_axis), (batch, 0))(split(x), ghost_weights)
        outputs.append(y.reshape((*x.shape[:batch], whole, *x.shape[batch + 1 :])))
        parts.append(m)
    if whole < x.shape[batch] or not whole:
        rest = weights if weights_axis is None else _cut(weights, batch, whole, x.shape[batch])
        y, m = of_ghost(_cut(x, batch, whole, x.shape[batch]), rest)
        outputs.append(y)
        parts.append(jax.tree.map(lambda v: v[None], m))
    y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, batch)
    ghosts = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
    m = average_moments(ghosts, call.axis_name, call.groups)
    corrected = m
    if call.bessel_correction:
        corrected = average_moments(ghosts._replace(var=unbiased_var(ghosts)), call.axis_name, call.groups)
    return y, update_batch_stats(call.batch_stats, corrected, momentum=call.momentum), m


def _cut(values: Any, axis: int, start: Any, end: Any) -> Array:
    return jax.lax.slice_in_dim(values, start, end, axis=axis)
