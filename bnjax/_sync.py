"""Merging of the moments of parts of a batch into moments of the whole.

A batch may lie in parts in these ways:

| the parts are                     | merged by                 | formula                             | collectives |
|-----------------------------------|---------------------------|-------------------------------------|-------------|
| two batches, anywhere             | `merge_moments`           | Chan et al.'s for a pair            | none        |
| devices along a mapped mesh axis  | `merge_over_mesh_axis`    | mean, then mean squares about it    | one sum*    |
| members of a vmapped axis         | `merge_over_vmapped_axis` | mean, then mean squares about it    | none        |
| shards of an array that XLA split | `merge_over_shards`       | mean, then mean squares about it    | XLA's sum*  |
| ghost batches                     | `average_moments`         | averages, not merged                | one sum**   |

(*) Among more than 256 parts, and over mesh axes that are given beside a vmapped one, mean and variance are summed one
after the other, and before them the counts where these may differ.
(**) Another for the variance with Bessel's correction.

The variance needs the joint mean, so that its formula takes two sums, one after the other. Across devices a sum costs
more than arithmetic. Each device therefore puts its moments into a place of its own in one array, the sum of those
arrays over the devices is a list of all moments, and each device merges the list by itself. The list is longer than the
moments, which among many devices costs more than a second sum. (A single sum of mean and mean square would lose what
mean² / var costs, and a second one in that case alone would be a collective under a condition, for which devices that
decide differently wait forever.)

Under vmap, where JAX may trace a derivative rule when the axis is no longer bound, a second sum costs nothing. Shards
that XLA makes are no mapped axis: they are split off by a reshape, and the sum over the new axis becomes XLA's
collective where it is split. Ghost batches don't become one: their statistics are averaged, without what their means
differ by. (Groups of devices with statistics of their own are merged by `bnjax.training.merge_batch_stats`.)

Reference: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Inexact

from bnjax._compat import as_varying, varying_axes
from bnjax._counts import add_counts, nonzero, product_of

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

_MOST_EXCHANGED = 256  # parts whose moments are exchanged whole; of more, a second sum costs less than their volume
_MOST_PARTS = 64  # parts beyond which an array is not divided along its axes after the first one


class Moments(NamedTuple):
    """The mean and biased variance of each feature, and the count (total weight) over which they were taken.

    Attributes:
      mean: `Σ w x / n`, of the shape of the feature axes; float32, or float64 for float64 input; complex for complex
        input. Zero where n = 0.
      var: `Σ w |x − mean|² / n`, of the shape and precision of `mean`, and real; zero where n = 0.
      count: `n = Σ w`, a scalar, or an array of the features' shape where the mask differs between features.
      remainder: what `count` lacks of n by its rounding, in which `merge_moments` keeps small counts that are added to
        a large one; of the shape of `count`.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Float[Array, "..."]
    remainder: Float[ArrayLike, "..."] = 0.0


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two batches into those of both together.

        n = n_a + n_b        δ = mean_b − mean_a        t = n_b / n
        mean = mean_a + δ t        var = (1 − t) var_a + t var_b + t (1 − t) |δ|²

    Args:
      a: moments over n_a elements; an empty batch (count zero) leaves the other unchanged, and derivatives by its
        weights are those at its mean of zero.
      b: moments over n_b elements, with means of the same shape.

    Returns:
      Moments over `n_a + n_b` elements, exact up to rounding, whatever the counts and however many merges.

    Raises:
      ValueError: if the shapes of the means differ.

    References:
      Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. (2.1).

    >>> import bnjax
    >>> whole = bnjax.moments(jnp.arange(10.)[:, None])
    >>> first, second = bnjax.moments(jnp.arange(3.)[:, None]), bnjax.moments(jnp.arange(3., 10.)[:, None])
    >>> parts = merge_moments(first, second)
    >>> print(whole.var, parts.var, parts.count)
    [8.25] [8.25] 10.0
    """
    if jnp.shape(a.mean) != jnp.shape(b.mean):
        raise ValueError(
            f"b must hold moments of the same features as a, with means of shape {jnp.shape(a.mean)}, "
            f"got {jnp.shape(b.mean)}. Take both with the same axis."
        )
    count, remainder = add_counts(a.count, a.remainder, b.count, b.remainder)
    t = b.count / nonzero(count)
    delta = b.mean - a.mean
    mean = a.mean + delta * t
    parts = (delta.real, delta.imag) if jnp.iscomplexobj(delta) else (delta,)
    between = sum(product_of(part * t, part * (1 - t)) for part in parts)  # a square alone could overflow
    var = a.var * (1 - t) + b.var * t + between
    return Moments(mean, var, count, remainder)


def merge_over_mesh_axis(local: Moments, axis_name: AxisName, groups: Groups | None, *, counts_differ: bool) -> Moments:
    """Merges the moments of all devices along a mapped axis, or of a group of them.

    Args:
      local: moments of this device's part.
      axis_name: axes that are mapped by pmap or shard_map.
      groups: groups of indices of that axis, each of which merges by itself.
      counts_differ: whether the parts may hold different counts, as under a mask.
    """
    size = group_size(axis_name, groups)
    if size > _MOST_EXCHANGED:
        return _by_two_sums(local, _sum_over(axis_name, groups), size, counts_differ)
    index = index_in_group(axis_name, groups)
    exchanged = placed(_of_parts(local, counts_differ), index, size)
    return by_local_sums(_sum_over(axis_name, groups)(exchanged), local.count, counts_differ)


def merge_over_shards(local: Moments, leading: int, *, counts_differ: bool) -> Moments:
    """Merges the moments of the shards of an array that is partitioned automatically.

    One axis after the other, the last one first: where partitioning left an axis whole, this communicates nothing.

    Args:
      local: moments with leading axes of shards, which partitioning may have split; the count has no such axes where it
        is the same for all shards.
      leading: number of these axes.
      counts_differ: whether the shards may hold different counts, as under a mask.
    """
    for axis in reversed(range(leading)):
        size = local.mean.shape[axis]
        to_front = functools.partial(jnp.moveaxis, source=axis, destination=0)
        parts = jax.tree.map(to_front, _of_parts(local, counts_differ))
        if size <= _MOST_EXCHANGED:
            parts = jax.tree.map(lambda values: values.sum(0), placed(parts, jnp.arange(size), size))
        local = by_local_sums(parts, local.count, counts_differ)
    return local


def _of_parts(local: Moments, counts_differ: bool) -> Moments:
    """Returns what has to be exchanged of the moments of parts: not the count, where it is the same for all."""
    return Moments(local.mean, local.var, local.count if counts_differ else (), ())  # pyright: ignore[reportArgumentType]


def merge_over_vmapped_axis(
    local: Moments, axis_name: AxisName, groups: Groups | None, *, counts_differ: bool
) -> Moments:
    """Merges the moments of all members of a vmapped axis, or of a group of them, where sums cost no communication."""
    return _by_two_sums(local, _sum_over(axis_name, groups), group_size(axis_name, groups), counts_differ)


def _by_two_sums(local: Moments, total: Callable[[Array], Array], size: int, counts_differ: bool) -> Moments:
    """Merges the moments of several parts, given what sums over the parts, of which there are `size`.

    n = Σ n_i        mean = Σ n_i mean_i / n        var = Σ n_i (var_i + (mean_i − mean)²) / n
    """
    count = total(local.count) if counts_differ else local.count * size
    share = local.count / nonzero(count)
    mean = total(share * local.mean)
    offset = jnp.where(local.count > 0, local.mean - mean, 0)  # the square of an empty part's may be infinite
    return Moments(mean, total(share * local.var + product_of(share * offset, offset)), count)


def by_local_sums(parts: Moments, count: Array, counts_differ: bool) -> Moments:
    """Merges the moments of parts along their first axis; `count` is that of each, where it is one for all."""
    shape, ndim = parts.count.shape[1:] if counts_differ else count.shape, parts.mean.ndim
    counts = parts.count if counts_differ else jnp.expand_dims(count, range(ndim - count.ndim))
    counts = counts.reshape(counts.shape + (1,) * (ndim - counts.ndim))
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    m = _by_two_sums(parts._replace(count=counts), total, parts.mean.shape[0], counts_differ)
    return Moments(m.mean.squeeze(0), m.var.squeeze(0), m.count.reshape(shape))


def placed(tree: Any, index: Array, size: int) -> Any:
    """Puts arrays at an index of a new axis of some size, with zeros elsewhere, so that their sum holds them all.

    Args:
      tree: arrays that begin with the axes of `index`.
      index: where each of them goes, along the new axis that follows those of `index`.
      size: size of that axis.
    """

    def place(values: Array) -> Array:
        values = jnp.repeat(jnp.expand_dims(values, index.ndim), size, index.ndim)
        own = jnp.expand_dims(index, -1) == jnp.arange(size).reshape((1,) * index.ndim + (size,))
        return select(own.reshape(own.shape + (1,) * (values.ndim - own.ndim)), values, jnp.zeros_like(values))

    return jax.tree.map(place, tree)


def average_moments(parts: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Averages the moments of parts that stay batches of their own, by their counts.

        n = Σ n_i        mean = Σ n_i mean_i / n        var = Σ n_i var_i / n

    Args:
      parts: moments with a leading axis of parts; the count too has the shape `[parts, *features]`.
      axis_name: mapped axis over whose members the averages are taken too.
      groups: groups of indices of that axis, each of which averages by itself.
    """
    local = _average(parts)
    if axis_name is None:
        return local
    size = group_size(axis_name, groups)
    if is_mesh_axis(axis_name) and size <= _MOST_EXCHANGED:
        exchanged = placed(local._replace(remainder=()), index_in_group(axis_name, groups), size)
        return _average(psum(exchanged, axis_name, groups))
    count = psum(local.count, axis_name, groups)
    share = local.count / nonzero(count)
    mean, var = psum((share * local.mean, share * local.var), axis_name, groups)
    return Moments(mean, var, count)


def _average(parts: Moments) -> Moments:
    """Averages moments along their first axis, by shares, as products with huge counts could overflow."""
    count = parts.count.sum(0, keepdims=True)
    share = parts.count / nonzero(count)
    return Moments((share * parts.mean).sum(0), (share * parts.var).sum(0), count.squeeze(0))


def with_counts_of_features(m: Moments) -> Moments:
    """Gives moments a count for each feature, where there is one for all."""
    count, remainder = (
        match_explicit_sharding(jnp.broadcast_to(v, m.mean.shape), m.mean) for v in (m.count, jnp.asarray(m.remainder))
    )
    return m._replace(count=count, remainder=vary_like(remainder.astype(count.dtype), count))


# --- sums over mapped axes, the same under vmap, pmap and shard_map ---------------------------------------------------


def is_mesh_axis(axis_name: AxisName) -> bool:
    """Returns whether an axis, or each of several, is mapped over devices (pmap, shard_map) rather than by vmap.

    Several of which some are vmapped count as vmapped.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def group_size(axis_name: AxisName, groups: Groups | None) -> int:
    """Returns the number of members that contribute to each sum."""
    return len(groups[0]) if groups else lax.axis_size(axis_name)


def index_in_group(axis_name: AxisName, groups: Groups | None) -> Array:
    """Returns the caller's place among the members that contribute to each sum."""
    index = lax.axis_index(axis_name)
    return index if groups is None else jnp.asarray(np.argsort(np.concatenate(groups)) % len(groups[0]))[index]


def psum(x: Any, axis_name: AxisName | None, groups: Groups | None) -> Any:
    """Sums an array, or the arrays of a tree, over all members of the caller's group; returns them without an axis."""
    if axis_name is None:
        return x
    if groups is None:
        return lax.psum(x, axis_name)
    if not is_mesh_axis(axis_name):
        return _vmapped_group_sum(x, axis_name, groups)
    try:
        return lax.psum(x, axis_name, axis_index_groups=groups)
    except NotImplementedError as error:
        raise NotImplementedError(
            "axis_index_groups does not work under shard_map with check_vma=True. Split the axis into a mesh of two "
            "axes and pass the inner one as axis_name instead."
        ) from error


def _sum_over(axis_name: AxisName, groups: Groups | None) -> Callable[[Any], Any]:
    return functools.partial(psum, axis_name=axis_name, groups=groups)


def _vmapped_group_sum(x: Any, axis_name: AxisName, groups: Groups) -> Any:
    """Sums over groups of a vmapped axis, which has no collectives for groups: gathers all, selects the own group."""
    group_of = np.argsort(np.concatenate(groups)) // len(groups[0])
    members = jnp.asarray(groups)[jnp.asarray(group_of)[lax.axis_index(axis_name)]]
    return jax.tree.map(lambda v: jnp.take(lax.all_gather(v, axis_name), members, axis=0).sum(0), x)


# --- how arrays are split over devices --------------------------------------------------------------------------------


def shards_of(x: jax.Array, axes: Sequence[int]) -> dict[int, int]:
    """Returns the parts into which partitioning may have split some axes of `x`, without those that are whole.

    Explicit sharding says how an axis is split. The mesh axes of type Auto may split any axis; the last of `axes` are
    taken to be split less, or whole, where there would be too many parts, each with moments of its own.
    """
    mesh, parts, room = jax.typeof(x).sharding.mesh, {}, math.inf
    auto = math.prod(mesh.shape[n] for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto)
    for axis in axes:
        spec = _explicit_spec(x, axis)
        explicit = math.prod(mesh.shape[name] for name in (spec if isinstance(spec, tuple) else (spec,)) if name)
        size = x.shape[axis]
        if not isinstance(size, int) or not size:
            continue
        possible = math.gcd(size // explicit, auto)
        if room < possible:
            possible = math.gcd(possible, max(1, int(room)))
        if explicit * possible > 1:
            parts[axis] = explicit * possible
        room = _MOST_PARTS // math.prod(list(parts.values())[1:]) if parts else math.inf
    return parts


def split_axis(x: jax.Array, axis: int, parts: Any, size: int = -1) -> jax.Array:
    """Splits an axis into equal parts along a new axis before it; a symbolic number needs the size of a part."""
    return x.reshape((*x.shape[:axis], parts, size, *x.shape[axis + 1 :]))


def explicitly_sharded(x: jax.Array, axis: int) -> bool:
    """Returns whether an axis is split by explicit sharding."""
    return _explicit_spec(x, axis) is not None


def _explicit_spec(x: jax.Array, axis: int) -> Any:
    """Returns the mesh axis or axes by which explicit sharding splits an axis; None for none."""
    spec = jax.typeof(x).sharding.spec
    return spec[axis] if axis < len(spec) else None


def has_explicit_sharding(x: jax.Array) -> bool:
    """Returns whether any axis is split by explicit sharding."""
    return any(explicitly_sharded(x, axis) for axis in range(x.ndim))


def match_explicit_sharding(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `values` in the shape and the explicit sharding of `x`, or as they are where neither has any."""
    if not (has_explicit_sharding(x) or has_explicit_sharding(values)):
        return values
    sharding = jax.typeof(x).sharding
    mesh = jax.typeof(values).sharding.mesh if sharding.mesh.empty else sharding.mesh
    return jax.sharding.reshard(jnp.broadcast_to(values, x.shape), NamedSharding(mesh, sharding.spec))


def select(condition: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns `jnp.where(condition, x, other)` in the explicit sharding of `x`, if any."""
    return jnp.where(match_explicit_sharding(condition, x), x, match_explicit_sharding(other, x))


def shard_like(values: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Gives an axis of `values` the explicit sharding that it has in `x`, if any; XLA chooses all others itself."""
    spec = _explicit_spec(x, axis)
    if spec in (None, _explicit_spec(values, axis)):
        return values
    return jax.sharding.reshard(values, NamedSharding(jax.typeof(x).sharding.mesh, P(*[None] * axis, spec)))


def vary_like(tree: Any, x: jax.Array) -> Any:
    """Types the arrays of a tree as varying over the mesh axes over which `x` varies.

    shard_map's replication checking needs these types: derivatives by such arrays are local.
    """
    wanted = varying_axes(x)

    def vary(leaf):
        axes = tuple(wanted - varying_axes(leaf))
        return as_varying(leaf, axes) if axes else leaf

    return jax.tree.map(vary, tree)
