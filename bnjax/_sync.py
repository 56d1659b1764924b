"""Sums over a mapped axis or over groups of its indices, alike under vmap, pmap and shard_map."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax._compat import as_varying, varying_axes

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def is_mesh_axis(axis_name: AxisName) -> bool:
    """Whether devices (pmap, shard_map) stand behind the axis, or all of several, rather than vmap."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def group_size(axis_name: AxisName, groups: Groups | None) -> int:
    """How many members contribute to each sum."""
    return len(groups[0]) if groups else lax.axis_size(axis_name)


def psum(x: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Sums `x` over all members of the caller's group; `x` itself without an axis."""
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
    """Sums over groups of a vmapped axis, for which there are no collectives: gathers all, selects the own group."""
    group_of = np.argsort(np.concatenate(groups)) // len(groups[0])
    members = jnp.asarray(groups)[jnp.asarray(group_of)[lax.axis_index(axis_name)]]
    return jnp.take(lax.all_gather(x, axis_name), members, axis=0).sum(0)


def num_shards(x: jax.Array, axis: int) -> int:
    """Into how many parts partitioning may have split an axis of `x`: the devices along the mesh axes that it may use.

    One where `x` has no mesh, and where the axis does not divide.
    """
    mesh, spec = jax.typeof(x).sharding.mesh, _explicit_spec(x, axis)
    named = spec if isinstance(spec, tuple) else (spec,)  # by explicit sharding
    may_split = [n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto or n in named]
    parts = math.prod(mesh.shape[name] for name in may_split)
    return parts if x.shape[axis] and x.shape[axis] % parts == 0 else 1


def split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Splits an axis into equal parts, along a new axis before it."""
    return x.reshape((*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]))


def explicitly_sharded(x: jax.Array, axis: int) -> bool:
    """Whether an axis is split by explicit sharding."""
    return _explicit_spec(x, axis) is not None


def _explicit_spec(x: jax.Array, axis: int) -> Any:
    """The mesh axis or axes by which explicit sharding splits an axis; None for none."""
    spec = jax.typeof(x).sharding.spec
    return spec[axis] if axis < len(spec) else None


def _has_explicit_sharding(x: jax.Array) -> bool:
    return any(explicitly_sharded(x, axis) for axis in range(x.ndim))


def broadcast_explicitly(values: jax.Array, x: jax.Array) -> jax.Array:
    """`values` in the shape and the explicit sharding of `x`, if it has one; else as they are."""
    if not _has_explicit_sharding(x):
        return values
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(jnp.broadcast_to(values, x.shape), NamedSharding(sharding.mesh, sharding.spec))


def without_explicit_sharding(x: jax.Array) -> jax.Array:
    """`x` whole on all devices, if it was split by explicit sharding."""
    if not _has_explicit_sharding(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P()))


def shard_like(values: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Gives an axis of `values` the explicit sharding that it has in `x`, if any; XLA chooses any other by itself."""
    spec = _explicit_spec(x, axis)
    if spec in (None, _explicit_spec(values, axis)):
        return values
    return jax.sharding.reshard(values, NamedSharding(jax.typeof(x).sharding.mesh, P(*[None] * axis, spec)))


def vary_like(tree: Any, x: jax.Array, but: AxisName | None = None) -> Any:
    """Types the arrays of a tree as varying over the mesh axes over which `x` varies, but for some.

    For shard_map's replication checking: derivatives by such arrays are local ones.
    """
    kept = but if isinstance(but, tuple) else (but,)
    wanted = {axis for axis in varying_axes(x) if axis not in kept}

    def vary(leaf):
        axes = tuple(wanted - varying_axes(leaf))
        return as_varying(leaf, axes) if axes else leaf

    return jax.tree.map(vary, tree)
