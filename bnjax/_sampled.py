"""Moments in one read, about a provisional mean: that of some elements, evenly spaced or at even shares of the weight.

Evenly spaced elements are slices, which sharding leaves where they are. Under a mask the elements are those at which
the weights, added up, reach even shares of their sum. So none is without weight, however many are.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from bnjax import _dtypes
from bnjax._checks import Shape
from bnjax._compat import is_in_jet
from bnjax._counts import nonzero, product_of
from bnjax._sums import count_of, expand, has_weight, of_size_one, reduced_axes, reduced_size, sum_of, weigh
from bnjax._sync import Moments, explicitly_sharded

SAMPLES = 256  # elements per feature
_GOLDEN = (math.sqrt(5) - 1) / 2  # the steps of which leave no large gap, wherever they end
_SMALL_SPREAD = 1e-10  # below it squares are small enough, and dividing them by the count could make them vanish


def sampled_moments(x: Array, weights: Array | None, axes: tuple[int, ...], samples: int | None = SAMPLES) -> Moments:
    """Computes the moments of the local batch from two sums about the mean of a sample, or of all with `samples=None`.

    A sum of squares overflows where the variance is representable still. What is squared is therefore made smaller by
    the root of the count, rounded to a power of two; but not where the spread says that its square would vanish.
    """
    dtype = _dtypes.wide(x.dtype)
    weights, count, unit_of_weights = of_size_one(weights, dtype, x.shape, axes)
    shift, spread = provisional_mean(x, weights, axes, samples)
    unit = lax.reduce_precision(lax.rsqrt(nonzero(count)), jnp.finfo(dtype).nexp, 0)
    is_small = ((spread > 0) & (spread < _SMALL_SPREAD)).astype(unit.dtype)
    unit = is_small + (1 - is_small) * unit  # jax 0.11's vmap of a `where` loses the mesh of explicit sharding
    shift_of_mean = expand(shift, x.ndim, axes)
    # XLA does not see that this is the same shift, since 0 · s may be NaN. Its CPU backend would else write out the
    # difference, which is as large as x, for both sums. (JAX's `jet` has no rule for `lax.optimization_barrier`.)
    shift_of_square = shift_of_mean + 0 * shift_of_mean
    offset = sum_of(weigh(x.astype(dtype) - shift_of_mean, weights), axes) / nonzero(count)
    scaled = (x.astype(dtype) - shift_of_square) * expand(unit, x.ndim, axes)
    square = sum_of(weigh(jnp.square(scaled), weights), axes) / (nonzero(count) * unit * unit)
    count = count if unit_of_weights is None else count * unit_of_weights
    return Moments(shift + offset, jnp.maximum(square - product_of(offset, offset), 0), count)


def provisional_mean(
    x: Array, weights: Array | None, axes: tuple[int, ...], samples: int | None = SAMPLES
) -> tuple[Array, Array]:
    """Returns the mean of a sample of each feature, and the largest distance of a sampled element from it.

    The weights are those that `of_size_one` returns. Taken once more by it they would be 0 / 0 where all are zero, as
    XLA makes one division of two.
    """
    sampled, weights, axes = _sample(x, weights, axes, samples)
    sampled = sampled.astype(_dtypes.wide(x.dtype))
    if weights is None:
        is_seen, count = None, jnp.asarray(reduced_size(sampled.shape, axes), sampled.dtype)
    else:
        is_seen, count = has_weight(weights), count_of(weights.astype(sampled.dtype), sampled.shape, axes)
    shift = sum_of(weigh(sampled, weights), axes) / nonzero(count)
    distances = weigh(jnp.abs(sampled - expand(shift, sampled.ndim, axes)), is_seen)
    return shift, distances.max(reduced_axes(sampled, axes), initial=0)


def _sample(
    x: Array, weights: Array | None, axes: tuple[int, ...], samples: int | None
) -> tuple[Array, Array | None, tuple[int, ...]]:
    """Returns about so many elements of each feature, their weights, and the feature axes of both.

    All elements are returned where their number is a symbol of `jax.export`, so that it is not known how many are
    enough; where the weights differ between features; and to JAX's `jet`, which has no rules for what picks some.
    """
    if samples is None or not all(isinstance(size, int) for size in x.shape) or reduced_size(x.shape, axes) <= samples:
        return x, weights, axes
    if weights is None:
        return x[_steps(x, axes, samples)], None, axes
    is_common = all(weights.shape[a] == 1 for a in axes)
    return _picked(x, weights, axes, samples) if is_common and not is_in_jet(x) else (x, weights, axes)


def _steps(x: Array, axes: tuple[int, ...], samples: int) -> tuple[slice, ...]:
    """Returns slices that leave about so many elements per feature, thinning trailing axes first.

    Axes that explicit sharding splits are not thinned, since a slice with steps would move data between devices.
    """
    shape = x.shape
    steps = [slice(None)] * len(shape)
    reduced = [a for a in range(len(shape)) if a not in axes and not explicitly_sharded(x, a)]
    excess = reduced_size(shape, axes) // samples
    for a in reversed(reduced):
        if excess > 1 and shape[a] > 1:
            stride = min(excess, shape[a])
            steps[a] = slice((shape[a] - 1) % stride // 2, None, stride)
            excess //= stride
    return tuple(steps)


def _picked(x: Array, weights: Array, axes: tuple[int, ...], samples: int) -> tuple[Array, Array, tuple[int, ...]]:
    """Returns elements at even shares of the weight, along a new first axis."""
    reduced = reduced_axes(x, axes)
    weighted = [a for a in reduced if weights.shape[a] > 1]
    others = [a for a in reduced if weights.shape[a] == 1]  # along which all elements weigh the same
    places = _places(weights.reshape(-1), samples)
    spread = np.arange(1, samples + 1) * _GOLDEN % 1 * math.prod(x.shape[a] for a in others)
    indices = _indices(places, x.shape, weighted) | _indices(jnp.asarray(spread, jnp.int32), x.shape, others)
    picked = x[tuple(indices.get(a, slice(None)) for a in range(x.ndim))]
    is_together = reduced[-1] - reduced[0] == len(reduced) - 1  # then their place is that of the first
    picked = jnp.moveaxis(picked, reduced[0] if is_together else 0, 0)
    of_picked = has_weight(weights.reshape(-1)[places])
    return picked, of_picked.reshape((-1,) + (1,) * len(axes)), tuple(range(1, picked.ndim))


def _indices(places: Array, shape: Shape, axes: list[int]) -> dict[int, Array]:
    """Returns the indices along some axes, given those of an array that has these axes alone, flattened."""
    indices = {}
    for axis in reversed(axes):
        places, indices[axis] = jnp.divmod(places, shape[axis])
    return indices


def _places(weights: Array, samples: int) -> Array:
    """Returns where the sum of the first weights reaches the middles of even shares of the sum of all."""
    sums = jnp.cumsum(weights, dtype=jnp.int32 if weights.dtype == bool else None)
    shares = (jnp.arange(samples, dtype=jnp.float32) + 0.5)[:, None] / samples * sums[None, -1:]
    # Each share is looked up among the last sums of rows, then in its row: few comparisons, and no search step by step.
    width = math.isqrt(weights.size - 1) + 1
    rows = jnp.pad(sums, (0, -weights.size % width), mode="edge").reshape(-1, width)
    row = (rows[None, :-1, -1] < shares).sum(1)
    return row * width + (rows[row, :-1] < shares).sum(1)
