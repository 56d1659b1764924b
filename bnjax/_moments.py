"""Mean and variance of a batch, plain, masked or weighted, by sums that one read can take; `_sync` merges its parts'.

From the outside in:

    moments                checks the arguments
    checked_moments        takes both parts of a complex input as features, and merges the members of a vmapped axis
    _real_moments          carries the rule of derivatives, and merges the devices of a mesh axis
    _moments_of_shards     takes the shards of an automatically partitioned array apart, and merges them
    _moments_of_columns    does so with the parts of the last axis, where these are no whole tiles
    by_parts               splits and merges them
    sampled_moments        sums about the mean of a sample (`_sampled`)
    exact_moments          sums without a provisional mean, on TPU (`_exact`)
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Shaped

from bnjax import _checks, _exact
from bnjax._checks import Axes, Shape
from bnjax._compat import is_in_jet
from bnjax._counts import nonzero
from bnjax._remat import keeping_arguments
from bnjax._sampled import SAMPLES, sampled_moments
from bnjax._sums import count_of, expand, has_weight, reduced_axes, reduced_size, sum_of, weigh, without_masked_extremes
from bnjax._sync import (
    AxisName,
    Groups,
    Moments,
    by_local_sums,
    group_size,
    has_explicit_sharding,
    is_mesh_axis,
    merge_over_mesh_axis,
    merge_over_shards,
    merge_over_vmapped_axis,
    psum,
    shard_like,
    shards_of,
    split_axis,
    vary_like,
)

EXACT_ON = ("tpu",)  # platforms on which numbers of bfloat16 are summed exactly: elsewhere it costs more than it saves
_FEWEST_SAMPLES = 16  # those of a shard
_FEWEST_OF_COLUMN = 4  # those of an index of an axis
_ROWS_OF_TILE = 8  # rows of an array that TPU keeps together


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

    The variance is computed about a provisional mean s, that of some 256 elements, by sums that do not wait for each
    other, so that one read of `x` can take both (XLA's CPU backend reads once for each):
    `var = Σ w (x − s)² / n − (mean − s)²`, which loses only what `(s − mean)² / var` costs. The elements are evenly
    spaced, and with a mask at even shares of its sum; s is the mean itself, which takes a second read, where the mask
    differs between features or explicit sharding splits `x`. All this holds for float32 input of deviations from 10⁻¹⁶
    (10⁻¹³ where the sampled elements are all the same) to 1.8 · 10¹⁹, the root of float32's largest number.

    On TPU bfloat16 needs no provisional mean, as float32 adds its numbers and their squares exactly. The variance is
    right to 10⁻⁶ where the elements lie in one binade, as those of a large mean do, and else to 2⁻²¹ (1 + mean² / var);
    for numbers from 10⁻¹⁴ to 1.8 · 10¹⁹.

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
    size = reduced_size(shape, axes) * (1 if axis_name is None else group_size(axis_name, groups))
    is_float = weights is not None and weights.dtype != bool  # whose sum is as exact as any
    if is_float or count.dtype != jnp.float32 or not isinstance(size, int) or not 2**24 < size < 2**31 - 2**8:
        return count, jnp.zeros_like(count)
    if weights is None:
        exact = jnp.asarray(size, jnp.int32)
    else:
        exact = psum(count_of(weights.astype(jnp.int32), shape, axes), axis_name, groups)
    exact = vary_like(exact, count)
    rounded = exact.astype(count.dtype)
    return rounded, (exact - rounded.astype(jnp.int32)).astype(count.dtype)


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
        return real_moments(x, weights, axes, axis_name, groups, _moments_of_shards)
    local = real_moments(x, weights, axes, None, None, _moments_of_shards)
    return merge_over_vmapped_axis(local, axis_name, groups, counts_differ=weights is not None)


def moments_of_part(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes moments of a real array that nothing splits, as of one part of a batch within `by_parts`."""
    return _real_moments(x, weights, axes, None, None, _local_moments)


def _moments_without_rule(
    x: Array,
    weights: Array | None,
    axes: tuple[int, ...],
    axis_name: AxisName | None,
    groups: Groups | None,
    local_moments: Callable[..., Moments],
) -> Moments:
    """Computes moments of real `x`, over all members of a mesh axis or local, given what computes the local ones."""
    # Within `jet` there are no programs, since what it has no rules for could not be told there.
    local = (local_moments if is_in_jet(x) else _shared_program(local_moments, EXACT_ON))(x, weights, axes)
    if axis_name is None:
        return local
    return merge_over_mesh_axis(local, axis_name, groups, counts_differ=weights is not None)


@functools.cache
def _shared_program(local_moments: Callable[..., Moments], exact_on: tuple[str, ...]) -> Callable[..., Moments]:
    """Returns a program of local moments, traced once for its derivatives and for all layers of one shape."""
    return jax.jit(lambda x, weights, axes: local_moments(x, weights, axes), static_argnums=2)


_real_moments = jax.custom_jvp(_moments_without_rule, nondiff_argnums=(2, 3, 4, 5))


@functools.partial(_real_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(axes, axis_name, groups, local_moments, primals, tangents):
    """Computes the derivatives of the moments by a hand-made rule, in which mean and var are the merged ones.

    JAX's own rule would keep x − mean for the backward pass. The merging over a vmapped axis stays outside of this one,
    and JAX differentiates it (see `_sync`).

    ∂mean = (Σ w ∂x + Σ ∂w (x − mean)) / n        ∂var = (2 Σ w (x − mean) ∂x + Σ ∂w ((x − mean)² − var)) / n

    (∂mean has no part in ∂var, since Σ w (x − mean) = 0.)
    """
    (x, weights), (dx, dweights) = primals, tangents
    m = _real_moments(x, weights, axes, axis_name, groups, local_moments)

    # The checkpoint makes x itself, not x − mean, the residual that is kept for the backward pass.
    @keeping_arguments
    def by_x(x, weights, mean, count, dx):
        n = expand(nonzero(count), x.ndim, axes)
        shares = None if weights is None else weights.astype(mean.dtype) / n
        weighted = dx.astype(mean.dtype) / n if shares is None else weigh(dx.astype(mean.dtype), shares)
        centered = x.astype(mean.dtype) - expand(mean, x.ndim, axes)
        if weights is not None:
            centered = jnp.where(has_weight(weights), centered, 0)  # NaN times a zero cotangent would be NaN
        return sum_of(weighted, axes), 2 * sum_of(centered * weighted, axes)

    @keeping_arguments
    def by_weights(x, weights, mean, var, count, dweights):
        # A weight of zero has a derivative too, which depends on what x holds there.
        centered = without_masked_extremes(x.astype(mean.dtype), weights) - expand(mean, x.ndim, axes)
        dweights = dweights.astype(mean.dtype)
        square = jnp.square(centered) - expand(var, x.ndim, axes)
        n = nonzero(count)
        return (
            sum_of(dweights * centered, axes) / n,
            sum_of(dweights * square, axes) / n,
            count_of(dweights, x.shape, axes),
        )

    sums = [jnp.zeros_like(m.mean), jnp.zeros_like(m.var), jnp.zeros_like(m.count)]
    if not isinstance(dx, SymbolicZero):
        sums[:2] = by_x(x, weights, m.mean, m.count, dx)
    if weights is not None and not isinstance(dweights, SymbolicZero):
        of_weights = by_weights(x, weights, *m[:3], dweights)
        sums = [a + b for a, b in zip(sums, of_weights, strict=True)]
        sums[2] = psum(sums[2], axis_name, groups)
    both = psum(jnp.stack(sums[:2]), axis_name, groups)
    return m, Moments(both[0], both[1], sums[2], jnp.zeros_like(m.remainder))


def _local_moments(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes moments of one part."""
    about_a_sample = functools.partial(sampled_moments, axes=axes)
    return _exactly_or(about_a_sample, functools.partial(_exact.exact_moments, axes=axes), x, weights, axes)


def _moments_of_shards(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes moments of an array that partitioning by XLA may have split over devices.

    The moments of each shard are taken by themselves, so that only their merging communicates. An axis that could have
    been split is taken to be. Where it is not, the result is the same.

    Exact sums need no provisional mean of each shard. So only the first axis is taken apart for them: they are sums
    over the others, however XLA splits these, and of few numbers for each block. Where it does, they are a second
    collective.
    """

    def exactly(x: Array, weights: Array | None) -> Moments:
        parts = shards_of(x, reduced_axes(x, axes)[:1])
        return by_parts(x, weights, parts, lambda x, weights, _: _exact.exact_moments(x, weights, axes))

    return _exactly_or(functools.partial(_sampled_moments_of_shards, axes=axes), exactly, x, weights, axes)


def _exactly_or(
    about_samples: Callable[..., Moments],
    exactly: Callable[..., Moments],
    x: Array,
    weights: Array | None,
    axes: tuple[int, ...],
) -> Moments:
    """Computes moments exactly where the dtype and the platform have such sums, and elsewhere about samples' means."""
    if not _exact.can_sum(x, weights, axes):
        return about_samples(x, weights)
    return lax.platform_dependent(x, weights, default=about_samples, **dict.fromkeys(EXACT_ON, exactly))


def _sampled_moments_of_shards(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes moments of an array that XLA may have split, those of each part about a provisional mean of its own."""
    reduced = reduced_axes(x, axes)
    parts = shards_of(x, reduced)
    samples = max(_FEWEST_SAMPLES, SAMPLES // math.prod(list(parts.values())[1:]))
    if weights is not None and (has_explicit_sharding(x) or has_explicit_sharding(weights)):
        samples = None  # JAX does not know how what picks elements is to be sharded
    last = reduced[-1] if reduced else None
    if last in parts and len(reduced) > 1 and x.shape[last] // parts[last] % _ROWS_OF_TILE:
        of_columns = functools.partial(_moments_of_columns, axes=axes, axis=last, parts=parts[last], samples=samples)
        return by_parts(x, weights, parts, of_columns, unsplit=last)
    return by_parts(x, weights, parts, lambda x, weights, _: sampled_moments(x, weights, axes, samples))


def by_parts(
    x: Array, weights: Array | None, parts: dict[int, int], of_part: Callable[..., Moments], unsplit: int | None = None
) -> Moments:
    """Splits axes of `x` into parts, and merges the moments of all of them.

    Args:
      x: array.
      weights: its mask.
      parts: into how many parts which axes are divided.
      of_part: computes the moments of a part of `x` and of `weights`, and the axes along which a vmap lays them.
      unsplit: the last axis where it is left to `of_part`, whose moments then have a first axis of its parts.
    """
    counts_differ = weights is not None and any(weights.shape[axis] != 1 for axis in parts)
    of_axes = Moments(0, 0, 0 if counts_differ else None, None)  # pyright: ignore[reportArgumentType]

    def split(x: Array, weights: Array | None, axes_to_split: list[int]) -> Moments:
        if not axes_to_split:
            return of_part(x, weights, of_axes)
        axis, *others = axes_to_split
        x, weights_axis = split_axis(x, axis, parts[axis]), None
        if weights is not None and weights.shape[axis] != 1:
            weights, weights_axis = split_axis(shard_like(weights, x, axis), axis, parts[axis]), axis
        return jax.vmap(lambda x, w: split(x, w, others), (axis, weights_axis), of_axes)(x, weights)

    m = split(x, weights, [axis for axis in parts if axis != unsplit])
    return merge_over_shards(m, len(parts), counts_differ=counts_differ)


def _moments_of_columns(
    x: Array, weights: Array | None, of_axes: Moments, axes: tuple[int, ...], axis: int, parts: int, samples: int | None
) -> Moments:
    """Computes the moments of equal parts of an axis by merging those of its single indices.

    The result is that of splitting the axis, for which TPU's compiler would copy `x` where a part is no whole tile.
    """
    columns = tuple(sorted((*axes, axis)))
    of_column = None if samples is None else max(_FEWEST_OF_COLUMN, samples * parts // x.shape[axis])
    m = sampled_moments(x, weights, columns, of_column)
    split = [split_axis(jnp.moveaxis(v, columns.index(axis), 0), 0, parts) if v.ndim else v for v in m[:3]]
    counts_differ = weights is not None and weights.shape[axis] != 1
    if weights is None or not counts_differ:
        split[2] = split[2][0, 0] if split[2].ndim else split[2]
    elif all(weights.shape[a] == 1 for a in axes):  # one count for all features
        split[2] = split[2].reshape((*split[2].shape[:2], -1))[..., 0]
    in_axes = 0, 0, 0 if counts_differ else None
    return jax.vmap(lambda *m: by_local_sums(Moments(*m), m[2], counts_differ), in_axes, of_axes)(*split)
