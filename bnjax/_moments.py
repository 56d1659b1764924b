"""Mean and variance of a batch, plain, masked or weighted, by sums that one read can take; `_sync` merges its parts'.

From the outside in:

    moments                checks the arguments
    checked_moments        takes both parts of a complex input as features, and merges the members of a vmapped axis
    _real_moments          carries the rule of derivatives, and merges the devices of a mesh axis
    _moments_of_shards     takes the shards of an automatically partitioned array apart, and merges them
    _moments_of_columns    does so with the parts of the last axis, where these are no whole tiles
    _local_moments         chooses a provisional mean, and whether to take another
    _moments_about         sums
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Shaped

from bnjax import _checks, _dtypes
from bnjax._checks import Axes, Shape
from bnjax._compat import is_in_jet
from bnjax._remat import keeping_arguments
from bnjax._sync import (
    AxisName,
    Groups,
    Moments,
    by_local_sums,
    explicitly_sharded,
    group_size,
    is_mesh_axis,
    is_split_by_xla,
    match_explicit_sharding,
    merge_over_mesh_axis,
    merge_over_shards,
    merge_over_vmapped_axis,
    nonzero,
    psum,
    shard_like,
    shards_of,
    split_axis,
    vary_like,
)

_SAMPLES = 256  # elements per feature whose mean is the provisional mean of the one-pass variance
_FEWEST_SAMPLES = 16  # those of a shard
_FEWEST_OF_COLUMN = 4  # those of an index of an axis
_ROWS_OF_TILE = 8  # rows of an array that TPU keeps together
_SMALL_SPREAD = 1e-10  # below it squares are small enough, and dividing them by the count could make them vanish
_POOR_SHIFT = 64  # under a mask, moments are taken again where (mean − s)² is larger than so many variances


def moments(
    x: Shaped[ArrayLike, "..."],
    *,
    axis: Axes = -1,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: object = None,
) -> Moments:
    """Computes the mean and the biased variance of each feature over all other axes.

    With weights w (all 1 without a mask) and sums over the reduced axes and, with `axis_name`, over its members:

        n = Σ w        mean = Σ w x / n        var = Σ w |x − mean|² / n

    The variance is computed about a provisional mean s, that of some 256 evenly spaced elements, by sums that do not
    wait for each other, so that one read of `x` can take both (XLA's CPU backend reads once for each):
    `var = Σ w (x − s)² / n − (mean − s)²`, which loses only what `(s − mean)² / var` costs. A second read follows where
    a mask leaves too few of those elements, and under any mask where XLA may have split a larger `x` over devices.
    All this holds for float32 input of deviations from 10⁻¹⁶ (10⁻¹³ where the sampled elements are all the same) to
    1.8 · 10¹⁹, the root of float32's largest number.

    Args:
      x: floating-point array of any shape, empty included; real or complex.
      axis: feature axis or axes, static; the others are reduced.
      mask: boolean, or non-negative sample weights, of as many dimensions as `x` or of its first ones without the
        feature axes, as in `batch_norm`. The values of `x` where the mask is zero have no influence, even NaN. Weights
        may be differentiated, and have any size at which their sum is a normal number.
      axis_name: mapped axis (or axes) over which to merge the moments by their counts. Under vmap a member's part is
        known by its moments alone, so that derivatives by the weights of one without any weight are not the whole's.
      axis_index_groups: groups of indices of that axis that merge separately, all of one size.

    Returns:
      `Moments` in float32, or in float64 for float64 input (the mean of complex input is complex); all zero for an
      empty batch.

    Raises:
      TypeError, ValueError: for a non-floating `x`, an invalid `axis`, a mask that does not broadcast, invalid groups.
      NameError: if `axis_name` is not bound.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1; Chan, Golub & LeVeque 1983, "Algorithms for computing the
      sample variance".

    >>> m = moments(jnp.array([[1., 10.], [3., 30.]]))
    >>> print(m.mean, m.var, m.count)
    [ 2. 20.] [  1. 100.] 2.0
    """
    x = _checks.check_input(x, or_complex=True)
    axes = _checks.feature_axes(axis, x.ndim)
    weights = _checks.sample_weights(mask, x.shape, axes)
    groups = _checks.check_axis_name(axis_name, axis_index_groups)
    m = checked_moments(x, weights, axes, axis_name, groups)
    count, remainder = _exact_count(m.count, weights, x.shape, axes, axis_name, groups)
    return m._replace(count=count, remainder=vary_like(remainder, count))  # of the type that a loop of merges keeps


def _exact_count(
    count: Array,
    weights: Array | None,
    shape: Shape,
    axes: tuple[int, ...],
    axis_name: AxisName | None,
    groups: Groups | None,
) -> tuple[Array, Array]:
    """Returns a count and what it lacks by its rounding, where elements are counted that float32 could not count."""
    size = _reduced_size(shape, axes) * (1 if axis_name is None else group_size(axis_name, groups))
    is_float = weights is not None and weights.dtype != bool  # whose sum is as exact as any
    if is_float or count.dtype != jnp.float32 or not isinstance(size, int) or not 2**24 < size < 2**31 - 2**8:
        return count, jnp.zeros_like(count)
    if weights is None:
        exact = jnp.asarray(size, jnp.int32)
    else:
        exact = psum(_count(weights.astype(jnp.int32), shape, axes), axis_name, groups)
    exact = vary_like(exact, count)
    rounded = exact.astype(count.dtype)
    return rounded, (exact - rounded.astype(jnp.int32)).astype(count.dtype)


def expand(features: jax.Array, ndim: int, axes: tuple[int, ...]) -> jax.Array:
    """Puts back the reduced axes, with size one, so that per-feature values broadcast against the input."""
    return features if features.ndim == 0 else jnp.expand_dims(features, tuple(a for a in range(ndim) if a not in axes))


def checked_moments(
    x: Array, weights: Array | None, axes: tuple[int, ...], axis_name: AxisName | None, groups: Groups | None
) -> Moments:
    """Computes `moments` of arguments that have been checked."""
    if jnp.iscomplexobj(x):  # |x − mean|² is the sum of the squares of both parts, which are treated as two features
        parts, weights = jnp.stack([x.real, x.imag], -1), None if weights is None else weights[..., None]
        m = checked_moments(parts, weights, (*axes, x.ndim), axis_name, groups)
        count = m.count if m.count.ndim == 0 else m.count[..., 0]
        return Moments(lax.complex(m.mean[..., 0], m.mean[..., 1]), m.var.sum(-1), count)
    real_moments = _moments_without_rule if is_in_jet(x) else _real_moments
    if axis_name is None or is_mesh_axis(axis_name):
        return real_moments(x, weights, axes, axis_name, groups)
    local = real_moments(x, weights, axes, None, None)
    return merge_over_vmapped_axis(local, axis_name, groups, counts_differ=weights is not None)


def _moments_without_rule(
    x: Array, weights: Array | None, axes: tuple[int, ...], axis_name: AxisName | None, groups: Groups | None
) -> Moments:
    """Computes moments of real `x`, over all members of a mesh axis or local."""
    local = _moments_of_shards(x, weights, axes)
    if axis_name is None:
        return local
    return merge_over_mesh_axis(local, axis_name, groups, counts_differ=weights is not None)


_real_moments = jax.custom_jvp(_moments_without_rule, nondiff_argnums=(2, 3, 4))


@functools.partial(_real_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(axes, axis_name, groups, primals, tangents):
    """Computes the derivatives of the moments by a hand-made rule, in which mean and var are the merged ones.

    JAX's own rule would keep x − mean for the backward pass. The merging over a vmapped axis stays outside of this one,
    and JAX differentiates it (see `_sync`).

    ∂mean = (Σ w ∂x + Σ ∂w (x − mean)) / n        ∂var = (2 Σ w (x − mean) ∂x + Σ ∂w ((x − mean)² − var)) / n

    (∂mean has no part in ∂var, since Σ w (x − mean) = 0.)
    """
    (x, weights), (dx, dweights) = primals, tangents
    m = _real_moments(x, weights, axes, axis_name, groups)

    # The checkpoint makes x itself, not x − mean, the residual that is kept for the backward pass.
    @keeping_arguments
    def by_x(x, weights, mean, count, dx):
        n = expand(nonzero(count), x.ndim, axes)
        shares = None if weights is None else weights.astype(mean.dtype) / n
        weighted = dx.astype(mean.dtype) / n if shares is None else _weigh(dx.astype(mean.dtype), shares)
        centered = x.astype(mean.dtype) - expand(mean, x.ndim, axes)
        if weights is not None:
            centered = jnp.where(has_weight(weights), centered, 0)  # NaN times a zero cotangent would be NaN
        return _sum(weighted, axes), 2 * _sum(centered * weighted, axes)

    @keeping_arguments
    def by_weights(x, weights, mean, var, count, dweights):
        # A weight of zero has a derivative too, which depends on what x holds there.
        centered = without_masked_extremes(x.astype(mean.dtype), weights) - expand(mean, x.ndim, axes)
        dweights = dweights.astype(mean.dtype)
        square = jnp.square(centered) - expand(var, x.ndim, axes)
        n = nonzero(count)
        return _sum(dweights * centered, axes) / n, _sum(dweights * square, axes) / n, _count(dweights, x.shape, axes)

    sums = [jnp.zeros_like(m.mean), jnp.zeros_like(m.var), jnp.zeros_like(m.count)]
    if not isinstance(dx, SymbolicZero):
        sums[:2] = by_x(x, weights, m.mean, m.count, dx)
    if weights is not None and not isinstance(dweights, SymbolicZero):
        of_weights = by_weights(x, weights, *m[:3], dweights)
        sums = [a + b for a, b in zip(sums, of_weights, strict=True)]
        sums[2] = psum(sums[2], axis_name, groups)
    both = psum(jnp.stack(sums[:2]), axis_name, groups)
    return m, Moments(both[0], both[1], sums[2], jnp.zeros_like(m.remainder))


def _moments_of_shards(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes moments of an array that partitioning by XLA may have split over devices.

    The moments of each shard are taken about a provisional mean of its own, so that only their merging communicates.
    An axis that could have been split is taken to be. Where it is not, the result is the same.
    """
    reduced = [a for a in range(x.ndim) if a not in axes]
    parts = shards_of(x, reduced)
    if not parts:
        return _local_moments(x, weights, axes)
    counts_differ = weights is not None and any(weights.shape[axis] != 1 for axis in parts)
    samples = max(_FEWEST_SAMPLES, _SAMPLES // math.prod(list(parts.values())[1:]))
    last = reduced[-1]
    columns = last if last in parts and len(reduced) > 1 and x.shape[last] // parts[last] % _ROWS_OF_TILE else None
    of_axes = Moments(0, 0, 0 if counts_differ else None, None)  # pyright: ignore[reportArgumentType]

    def of_parts(x: Array, weights: Array | None, axes_to_split: tuple[int, ...]) -> Moments:
        if not axes_to_split:
            return _local_moments(x, weights, axes, samples)
        axis, *others = axes_to_split
        if axis == columns:
            return _moments_of_columns(x, weights, axes, axis, parts[axis], samples, of_axes)
        x, weights_axis = split_axis(x, axis, parts[axis]), None
        if weights is not None and weights.shape[axis] != 1:
            weights, weights_axis = split_axis(shard_like(weights, x, axis), axis, parts[axis]), axis
        return jax.vmap(lambda x, w: of_parts(x, w, tuple(others)), (axis, weights_axis), of_axes)(x, weights)

    return merge_over_shards(of_parts(x, weights, tuple(parts)), len(parts), counts_differ=counts_differ)


def _moments_of_columns(
    x: Array, weights: Array | None, axes: tuple[int, ...], axis: int, parts: int, samples: int, of_axes: Moments
) -> Moments:
    """Computes the moments of equal parts of an axis by merging those of its single indices.

    The result is that of splitting the axis, for which TPU's compiler would copy `x` where a part is no whole tile.
    """
    columns = tuple(sorted((*axes, axis)))
    m = _local_moments(x, weights, columns, max(_FEWEST_OF_COLUMN, samples * parts // x.shape[axis]))
    split = [split_axis(jnp.moveaxis(v, columns.index(axis), 0), 0, parts) if v.ndim else v for v in m[:3]]
    counts_differ = weights is not None and weights.shape[axis] != 1
    if weights is None or not counts_differ:
        split[2] = split[2][0, 0] if split[2].ndim else split[2]
    elif all(weights.shape[a] == 1 for a in axes):  # one count for all features
        split[2] = split[2].reshape((*split[2].shape[:2], -1))[..., 0]
    in_axes = 0, 0, 0 if counts_differ else None
    return jax.vmap(lambda *m: by_local_sums(Moments(*m), m[2], counts_differ), in_axes, of_axes)(*split)


def _local_moments(x: Array, weights: Array | None, axes: tuple[int, ...], samples: int = _SAMPLES) -> Moments:
    """Computes moments of the local batch in one read of `x` about a provisional mean, that of sampled elements."""
    dtype = _dtypes.wide(x.dtype)
    steps = _sampling(x, axes, samples)
    sampled = _thin(x, steps).astype(dtype)
    if weights is None:
        n = _reduced_size(x.shape, axes)
        shift = _sum(sampled, axes) / nonzero(jnp.asarray(_reduced_size(sampled.shape, axes), dtype))
        return _moments_about(shift, _spread(sampled, None, shift, axes), x, None, axes, jnp.asarray(n, dtype))[0]
    weights, unit = _of_size_one(weights, dtype, x.shape, axes)
    sampled_weights = _thin(weights, steps)
    sampled_count = nonzero(_count(sampled_weights.astype(dtype), sampled.shape, axes))
    shift = _sum(_weigh(sampled, sampled_weights), axes) / sampled_count
    relative_count = _count(weights.astype(dtype), x.shape, axes)
    spread = _spread(sampled, has_weight(sampled_weights), shift, axes)
    m, offset = _moments_about(shift, spread, x, weights, axes, relative_count)
    count = relative_count if unit is None else relative_count * unit
    if all(step == slice(None) for step in steps):
        return m._replace(count=count)

    # The weights may have hidden most or all of the sample; then the moments are taken again, about the first mean.
    # Where XLA splits x, this is no condition: its branch would hold XLA's sums over devices, and devices of another,
    # manual axis may decide differently, so that some would wait for the others forever.
    def again(m: Moments) -> Moments:
        return _moments_about(m.mean, jnp.sqrt(m.var), x, weights, axes, relative_count)[0]

    is_poor = ~jnp.all(jnp.square(offset) <= _POOR_SHIFT * m.var)  # also where the squares overflow
    m = again(m) if is_split_by_xla(x) else lax.cond(is_poor, again, lambda m: m, m)
    return m._replace(count=count)


def _moments_about(
    shift: Array, spread: Array, x: Array, weights: Array | None, axes: tuple[int, ...], count: Array
) -> tuple[Moments, Array]:
    """Computes moments from two sums about a shift, which XLA takes in one read, and the mean's offset from it.

    A sum of squares overflows where the variance is representable still. What is squared is therefore made smaller by
    the root of the count, rounded to a power of two; but not where the spread says that its square would vanish.
    """
    unit = lax.reduce_precision(lax.rsqrt(nonzero(count)), jnp.finfo(count.dtype).nexp, 0)
    is_small = ((spread > 0) & (spread < _SMALL_SPREAD)).astype(unit.dtype)
    unit = is_small + (1 - is_small) * unit  # jax 0.11's vmap of a `where` loses the mesh of explicit sharding
    shift_of_mean = expand(shift, x.ndim, axes)
    # XLA does not see that this is the same shift, since 0 · s may be NaN. Its CPU backend would else write out the
    # difference, which is as large as x, for both sums. (JAX's `jet` has no rule for `lax.optimization_barrier`.)
    shift_of_square = shift_of_mean + 0 * shift_of_mean
    offset = _sum(_weigh(x.astype(shift.dtype) - shift_of_mean, weights), axes) / nonzero(count)
    scaled = (x.astype(shift.dtype) - shift_of_square) * expand(unit, x.ndim, axes)
    square = _sum(_weigh(jnp.square(scaled), weights), axes) / (nonzero(count) * unit * unit)
    return Moments(shift + offset, jnp.maximum(square - jnp.square(offset), 0), count), offset


def _spread(sampled: Array, is_seen: Array | None, shift: Array, axes: tuple[int, ...]) -> Array:
    """Returns the largest distance of each feature's sampled elements from the shift, of those that a mask leaves."""
    distances = _weigh(jnp.abs(sampled - expand(shift, sampled.ndim, axes)), is_seen)
    return distances.max([a for a in range(sampled.ndim) if a not in axes], initial=0)


def _sampling(x: Array, axes: tuple[int, ...], samples: int) -> list[slice]:
    """Returns slices that leave about so many elements per feature, thinning trailing axes first.

    Axes that explicit sharding splits are not thinned, since a slice with steps would move data between devices; nor is
    anything where the size is a symbol of `jax.export`, of which it is not known how many elements are enough.
    """
    shape = x.shape
    if not all(isinstance(size, int) for size in shape):
        return [slice(None)] * len(shape)
    reduced = [a for a in range(len(shape)) if a not in axes and not explicitly_sharded(x, a)]
    excess = _reduced_size(shape, axes) // samples
    steps = [slice(None)] * len(shape)
    for a in reversed(reduced):
        if excess > 1 and shape[a] > 1:
            stride = min(excess, shape[a])
            steps[a] = slice((shape[a] - 1) % stride // 2, None, stride)
            excess //= stride
    return steps


def _thin(values: Array, steps: list[slice]) -> Array:
    return values[tuple(slice(None) if size == 1 else step for size, step in zip(values.shape, steps, strict=True))]


def _sum(values: Array, axes: tuple[int, ...]) -> Array:
    """Sums over all but the feature axes."""
    return values.sum(tuple(a for a in range(values.ndim) if a not in axes))


def _reduced_size(shape: Shape, axes: tuple[int, ...]) -> Any:
    return math.prod(size for a, size in enumerate(shape) if a not in axes)


def _weigh(values: Array, weights: Array | None) -> Array:
    """Returns `weights · values`, and zero where the weight is zero, whatever the value is there."""
    if weights is None:
        return values
    weights = match_explicit_sharding(weights, values)
    kept = jnp.where(has_weight(weights), values, 0)
    return kept if weights.dtype == bool else kept * weights.astype(values.dtype)


def _of_size_one(weights: Array, dtype: Any, shape: Shape, axes: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Returns weights of at most three and the power of two by which they are less: no product over- or underflows."""
    if weights.dtype == bool:
        return weights, None
    reduced = tuple(a for a in range(weights.ndim) if a not in axes)
    largest = weights.astype(dtype).max(reduced, keepdims=True, initial=0)
    bits = jnp.finfo(dtype)
    unit = lax.reduce_precision(jnp.maximum(largest / 2, bits.tiny), bits.nexp, 0)
    return weights.astype(dtype) / unit, _of_features(unit.squeeze(reduced), shape, axes)


def _count(weights: Array, shape: Shape, axes: tuple[int, ...]) -> Array:
    """Computes the total weight of each feature, as a scalar where the weights are common to all features."""
    repeats = math.prod(
        s for a, (s, w) in enumerate(zip(shape, weights.shape, strict=True)) if a not in axes and w == 1
    )
    total = _sum(weights, axes) * jnp.asarray(repeats, weights.dtype)
    return _of_features(total, shape, axes)


def _of_features(values: Array, shape: Shape, axes: tuple[int, ...]) -> Array:
    """Returns values of the features, as a scalar where they are common to all."""
    is_common = all(size == 1 for size in values.shape)
    return values.reshape(()) if is_common else jnp.broadcast_to(values, tuple(shape[a] for a in axes))


def has_weight(weights: Array) -> Array:
    """Returns where the weights are positive."""
    return weights if weights.dtype == bool else weights > 0


def without_masked_extremes(x: Array, weights: Array) -> Array:
    """Returns `x` with zero where the weight is zero and `x` is NaN, or so large that its square overflows.

    Such values would turn zero cotangents into NaN; other masked values are normalized like the rest, as in Flax.
    """
    weights = match_explicit_sharding(weights, x)
    return jnp.where(has_weight(weights) | (jnp.abs(x) < math.sqrt(jnp.finfo(x.dtype).max)), x, 0)
