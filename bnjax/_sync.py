"""Merging of the moments of parts of a batch into moments of the whole.

A batch may lie in parts in these ways:

| the parts are                     | merged by                 | formula                             | collectives |
|-----------------------------------|---------------------------|-------------------------------------|-------------|
| two batches, anywhere             | `merge_moments`           | Chan et al.'s for a pair            | none        |
| devices along a mapped mesh axis  | `merge_over_mesh_axis`    | sums about a common shift           | one sum*    |
| members of a vmapped axis         | `merge_over_vmapped_axis` | means, then mean squares about them | none        |
| shards of an array that XLA split | `merge_over_shards`       | sums about a common shift           | XLA's sum*  |
| ghost batches                     | `average_moments`         | averages, not merged                | one sum     |

(*) It is taken a second time, about the joint mean, in the rare case that the first was too imprecise.

The formulas differ for these reasons. Across devices a sum costs more than arithmetic, so that all that is needed goes
into one sum, of mean and mean square about a shift that all devices know. That sum is of no use under vmap, where JAX
may trace a derivative rule when the axis is no longer bound, and where a second sum costs nothing. The shards of an
array that XLA partitions are no mapped axis at all: they are split off by a reshape, and the sum over that axis becomes
XLA's collective. Ghost batches don't become one batch: their statistics are averaged, without what their means differ
by. (Groups of devices that train with statistics of their own are merged pair by pair, by
`bnjax.training.merge_batch_stats`.)

Reference: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Inexact

from bnjax._compat import as_varying, varying_axes

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

_POOR_COMMON_SHIFT = (
    256  # how many variances the squared joint mean may be before the sums are taken again, about that mean
)


class Moments(NamedTuple):
    """The mean and biased variance of each feature, and the count (total weight) over which they were taken.

    Attributes:
      mean: `Σ w x / n`, of the shape of the feature axes; float32, or float64 for float64 input; complex for complex
        input. Zero where n = 0.
      var: `Σ w |x − mean|² / n`, of the shape and precision of `mean`, and real; zero where n = 0.
      count: `n = Σ w`, a scalar, or an array of the features' shape where the mask differs between features.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    count: Float[Array, "..."]


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two batches into those of both together.

        n = n_a + n_b        δ = mean_b − mean_a        t = n_b / n
        mean = mean_a + δ t        var = (1 − t) var_a + t var_b + t (1 − t) |δ|²

    Args:
      a: moments over n_a elements; an empty batch (count zero) leaves the other unchanged.
      b: moments over n_b elements, with means of the same shape.

    Returns:
      Moments over `n_a + n_b` elements, exact up to rounding, whatever the counts.

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
    count = a.count + b.count
    t = b.count / nonzero(count)
    delta = b.mean - a.mean
    mean = a.mean + delta * t
    square = jnp.square(delta.real) + jnp.square(delta.imag) if jnp.iscomplexobj(delta) else jnp.square(delta)
    var = a.var * (1 - t) + b.var * t + square * (t * (1 - t))
    return Moments(mean, var, count)


def merge_over_mesh_axis(local: Moments, axis_name: AxisName, groups: Groups | None, *, counts_differ: bool) -> Moments:
    """Merges the moments of all devices along a mapped axis, or of a group of them, by one sum.

    Args:
      local: moments of this device's part.
      axis_name: axes that are mapped by pmap or shard_map.
      groups: groups of indices of that axis, each of which merges by itself.
      counts_differ: whether the parts may hold different counts, as under a mask.
    """
    size = group_size(axis_name, groups)
    if size == 1:  # there is nothing to merge, but the sum types the moments as shared by all
        count = psum(local.count, axis_name, groups) if counts_differ else local.count
        return Moments(psum(local.mean, axis_name, groups), psum(local.var, axis_name, groups), count)
    zeros = Moments(*(jnp.zeros(v.shape, v.dtype) for v in local))

    def total(shift: Array) -> Array:
        return psum(shifted_sums(shift, local, counts_differ), axis_name, groups)

    zeros = vary_like(zeros, local.mean, but=axis_name)  # a loop's carry has the type of its result
    return merge_by_one_sum(total, zeros, size, None if counts_differ else local.count)


def merge_over_vmapped_axis(
    local: Moments, axis_name: AxisName, groups: Groups | None, *, counts_differ: bool
) -> Moments:
    """Merges the moments of all members of a vmapped axis, or of a group of them, where sums cost no communication.

    n = Σ n_i        mean = Σ n_i mean_i / n        var = Σ n_i (var_i + (mean_i − mean)²) / n
    """
    count = psum(local.count, axis_name, groups) if counts_differ else local.count * group_size(axis_name, groups)
    share = local.count / nonzero(count)
    mean = psum(share * local.mean, axis_name, groups)
    var = psum(share * (local.var + jnp.square(local.mean - mean)), axis_name, groups)
    return Moments(mean, var, count)


def merge_over_shards(local: Moments, shards: int, x: Array, *, counts_differ: bool) -> Moments:
    """Merges the moments of the shards of an array that is partitioned automatically.

    Args:
      local: moments with a leading axis of shards, which partitioning splits; the count has no such axis where it is
        the same for all shards.
      shards: number of shards.
      x: the array.
      counts_differ: whether the shards may hold different counts, as under a mask.
    """
    axes = Moments(0, 0, 0 if counts_differ else None)  # pyright: ignore[reportArgumentType]

    def total(shift: Array) -> Array:
        return jax.vmap(lambda part: shifted_sums(shift, part, counts_differ), (axes,))(local).sum(0)

    zeros = Moments(*(jnp.zeros(v.shape[axis is not None :], v.dtype) for v, axis in zip(local, axes, strict=True)))
    return merge_by_one_sum(total, vary_like(zeros, x), shards, None if counts_differ else local.count)


def merge_by_one_sum(total: Callable[[Array], Array], zeros: Moments, size: int, count: Array | None) -> Moments:
    """Merges the moments of several parts by one sum over the parts of 2 numbers for each feature (and the count).

    With each part's mean and variance about a shift s that all know, o_i = mean_i − s and q_i = var_i + o_i²:

        n = Σ n_i        mean = s + Σ n_i o_i / n        var = Σ n_i q_i / n − (Σ n_i o_i / n)²

    The first turn takes s = 0, which loses what mean² / var costs. Where that is much, a second turn takes s = mean.
    All parts take the same decision on a second turn, as the sums of the first turn are common to all. It is a loop
    rather than a condition, so that the compiled program holds the sum once.

    Args:
      total: maps a shift to the sum of `shifted_sums` about it over the parts.
      zeros: zeros of the shapes of the moments.
      size: number of parts.
      count: count of each part; None where the counts differ.
    """
    ends = np.cumsum([v.size for v in zeros])[: 2 if count is None else 1]
    if count is not None:
        zeros = zeros._replace(count=jnp.zeros_like(count))

    def is_another_turn_due(carry):
        turn, is_poor, _ = carry
        return (turn == 0) | ((turn == 1) & is_poor)

    def take_turn(carry):
        turn, _, previous = carry
        sums = [v.reshape(z.shape) for v, z in zip(jnp.split(total(previous.mean), ends), zeros, strict=False)]
        offset, square = (v / (size if count is not None else nonzero(sums[2])) for v in sums[:2])
        n = sums[2] if count is None else size * count
        m = Moments(previous.mean + offset, jnp.maximum(square - jnp.square(offset), 0), n)
        is_poor = ~jnp.all(jnp.square(offset) <= _POOR_COMMON_SHIFT * m.var)  # also where the squares overflow
        return turn + 1, is_poor, m

    is_poor = vary_like(jnp.array(True), zeros.mean)
    return lax.while_loop(is_another_turn_due, take_turn, (0, is_poor, zeros))[2]


def shifted_sums(shift: Array, part: Moments, counts_differ: bool) -> Array:
    """Returns the vector that a part puts into the sum: its mean and mean square about a shift.

    Where counts differ, mean and mean square are multiplied by the part's count, which follows them.
    """
    offset = part.mean - shift
    if counts_differ:
        offset *= (part.count > 0).astype(offset.dtype)  # the square of an empty part's offset may be infinite
    values = [offset, part.var + jnp.square(offset)]
    if counts_differ:
        values = [*(part.count * value for value in values), part.count]
    return jnp.concatenate([without_explicit_sharding(value).ravel() for value in values])


def average_moments(parts: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Averages the moments of parts that stay batches of their own, by their counts.

        n = Σ n_i        mean = Σ n_i mean_i / n        var = Σ n_i var_i / n

    Args:
      parts: moments with a leading axis of parts; the count too has the shape `[parts, *features]`.
      axis_name: mapped axis over whose members the averages are taken too.
      groups: groups of indices of that axis, each of which averages by itself.
    """
    sums = jnp.stack([parts.count * parts.mean, parts.count * parts.var, parts.count]).sum(1)
    mean, var, count = psum(sums, axis_name, groups)
    return Moments(mean / nonzero(count), var / nonzero(count), count)


def with_counts_of_features(m: Moments) -> Moments:
    """Gives moments a count for each feature, where there is one for all."""
    return m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))


def nonzero(count: Array) -> Array:
    """Returns the count, with one in place of zero, to divide by."""
    return jnp.where(count > 0, count, 1)


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


def psum(x: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Sums `x` over all members of the caller's group; returns `x` itself without an axis."""
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


def _vmapped_group_sum(x: jax.Array, axis_name: AxisName, groups: Groups) -> jax.Array:
    """Sums over groups of a vmapped axis, which has no collectives for groups: gathers all, selects the own group."""
    group_of = np.argsort(np.concatenate(groups)) // len(groups[0])
    members = jnp.asarray(groups)[jnp.asarray(group_of)[lax.axis_index(axis_name)]]
    return jnp.take(lax.all_gather(x, axis_name), members, axis=0).sum(0)


# --- how arrays are split over devices --------------------------------------------------------------------------------


def num_shards(x: jax.Array, axis: int) -> int:
    """Returns into how many parts partitioning may have split an axis of `x`, by the devices along possible mesh axes.

    There is one part where `x` has no mesh, and where the axis does not divide evenly.
    """
    mesh, spec = jax.typeof(x).sharding.mesh, _explicit_spec(x, axis)
    named = spec if isinstance(spec, tuple) else (spec,)  # the mesh axes that explicit sharding names
    may_split = [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto or n in named]
    parts = math.prod(mesh.shape[name] for name in may_split)
    return parts if x.shape[axis] and x.shape[axis] % parts == 0 else 1


def split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Splits an axis into equal parts, along a new axis before it."""
    return x.reshape((*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]))


def explicitly_sharded(x: jax.Array, axis: int) -> bool:
    """Returns whether an axis is split by explicit sharding."""
    return _explicit_spec(x, axis) is not None


def _explicit_spec(x: jax.Array, axis: int) -> Any:
    """Returns the mesh axis or axes by which explicit sharding splits an axis; None for none."""
    spec = jax.typeof(x).sharding.spec
    return spec[axis] if axis < len(spec) else None


def _has_explicit_sharding(x: jax.Array) -> bool:
    return any(explicitly_sharded(x, axis) for axis in range(x.ndim))


def match_explicit_sharding(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `values` in the shape and the explicit sharding of `x`, or as they are where `x` has none."""
    if not _has_explicit_sharding(x):
        return values
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(jnp.broadcast_to(values, x.shape), NamedSharding(sharding.mesh, sharding.spec))


def without_explicit_sharding(x: jax.Array) -> jax.Array:
    """Returns `x` whole on all devices, even if explicit sharding had split it."""
    if not _has_explicit_sharding(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P()))


def shard_like(values: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Gives an axis of `values` the explicit sharding that it has in `x`, if any; XLA chooses all others itself."""
    spec = _explicit_spec(x, axis)
    if spec in (None, _explicit_spec(values, axis)):
        return values
    return jax.sharding.reshard(values, NamedSharding(jax.typeof(x).sharding.mesh, P(*[None] * axis, spec)))


def vary_like(tree: Any, x: jax.Array, but: AxisName | None = None) -> Any:
    """Types the arrays of a tree as varying over the mesh axes over which `x` varies, except those named by `but`.

    shard_map's replication checking needs these types: derivatives by such arrays are local.
    """
    excluded = but if isinstance(but, tuple) else (but,)
    wanted = {axis for axis in varying_axes(x) if axis not in excluded}

    def vary(leaf):
        axes = tuple(wanted - varying_axes(leaf))
        return as_varying(leaf, axes) if axes else leaf

    return jax.tree.map(vary, tree)
