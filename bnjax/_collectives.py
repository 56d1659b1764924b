"""Gathers and sums over a mapped axis or over groups of its indices, alike under vmap, pmap and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def _is_mesh_axis(axis_name: AxisName) -> bool:
    """Whether devices (pmap, shard_map) stand behind the axis, or all of several, rather than vmap."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def group_size(axis_name: AxisName, groups: Groups | None) -> int:
    """How many members contribute to each gather or sum."""
    return len(groups[0]) if groups else lax.axis_size(axis_name)


def all_gather(x: jax.Array, axis_name: AxisName, groups: Groups | None) -> jax.Array:
    """Stacks `x` of all members of the caller's group along a new leading axis.

    `vmap` has no collectives over groups: there everything is gathered and the caller's group selected. Nor can it
    gather over several axes at once.
    """
    if _is_mesh_axis(axis_name):
        if groups is None:  # the same on all devices, which shard_map's replication checking wants to know
            return lax.all_gather(x, axis_name, to="invarying")
        return lax.all_gather(x, axis_name, axis_index_groups=groups)
    if groups is None:
        if isinstance(axis_name, tuple):
            for name in reversed(axis_name):
                x = lax.all_gather(x, name)
            return x.reshape((-1, *x.shape[len(axis_name) :]))
        return lax.all_gather(x, axis_name)
    group_of = np.argsort(np.concatenate(groups)) // len(groups[0])
    members = jnp.asarray(groups)[jnp.asarray(group_of)[lax.axis_index(axis_name)]]
    return jnp.take(lax.all_gather(x, axis_name), members, axis=0)


def psum(x: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Sums `x` over all members of the caller's group; `x` itself without an axis."""
    if axis_name is None:
        return x
    if groups is None:
        return lax.psum(x, axis_name)
    if not _is_mesh_axis(axis_name):
        return all_gather(x, axis_name, groups).sum(0)
    try:
        return lax.psum(x, axis_name, axis_index_groups=groups)
    except NotImplementedError as error:
        raise NotImplementedError(
            "axis_index_groups does not work under shard_map with check_vma=True. Split the axis into a mesh of two "
            "axes and pass the inner one as axis_name instead."
        ) from error
