"""Gathers and sums over a mapped axis or over groups of its indices, alike under vmap, pmap and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def _is_mesh_axis(axis_name: AxisName) -> bool:
    """Whether devices (pmap, shard_map) stand behind the axis, rather than vmap."""
    return axis_name in jax.sharding.get_abstract_mesh().axis_names


def group_size(axis_name: AxisName, groups: Groups | None) -> int:
    """How many members contribute to each gather or sum."""
    return len(groups[0]) if groups else lax.axis_size(axis_name)


def all_gather(x: jax.Array, axis_name: AxisName, groups: Groups | None) -> jax.Array:
    """Stacks `x` of all members of the caller's group along a new leading axis.

    `vmap` has no collectives over groups: there everything is gathered and the caller's group selected.
    """
    if groups is None or _is_mesh_axis(axis_name):
        return lax.all_gather(x, axis_name, axis_index_groups=groups)
    group_of = np.argsort(np.concatenate(groups)) // len(groups[0])
    members = jnp.asarray(groups)[jnp.asarray(group_of)[lax.axis_index(axis_name)]]
    return jnp.take(lax.all_gather(x, axis_name), members, axis=0)


def psum(x: jax.Array, axis_name: AxisName | None, groups: Groups | None) -> jax.Array:
    """Sums `x` over all members of the caller's group; `x` itself without an axis."""
    if axis_name is None:
        return x
    if groups is None or _is_mesh_axis(axis_name):
        return lax.psum(x, axis_name, axis_index_groups=groups)
    return all_gather(x, axis_name, groups).sum(0)
