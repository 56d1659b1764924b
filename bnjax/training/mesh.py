"""Many devices: starting several processes, meshes with groups of devices, and arrays over all of them."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.training._roll_call import roll_call

SYNC_AXIS = "batch"
"""The mesh axis over which batch norms synchronize, which a model's batch norms take as `axis_name`."""
GROUP_AXIS = "group"
"""The mesh axis over groups of devices with statistics of their own."""
WAIT_SECONDS = 300
"""The time for which the processes of a run wait for each other at its start."""
HEARTBEAT_SECONDS = 30
"""The time without a sign of life of one process after which the others end with an error."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    wait_seconds: float = WAIT_SECONDS,
    report: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Starts JAX's distributed runtime; every process must call it before anything else uses a device.

    Without arguments JAX reads the environment: on TPU pods, under Slurm and under Open MPI. On CPU the collectives
    between processes are Gloo's. With arguments there is a roll call first, so that a process that is missing, started
    twice or told of another number is an error in the others; JAX's runtime would end them without a word of which.

    Args:
      coordinator: 'host:port' of process 0, the same for all.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      heartbeat_seconds: how long a process may give no sign of life before JAX aborts the others.
      wait_seconds: how long to wait for the other processes.
      report: is told what is waited for; by default it prints to stderr.

    Raises:
      ValueError: if only some of the first three arguments are given, or one is out of range.
      RuntimeError: if the runtime can't be started, the processes are not all there, or the environment names no
        cluster.
    """
    arguments = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in arguments.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"coordinator, num_processes and process_id go together; {' and '.join(missing)} missing. "
            "Leave all three out where JAX finds them in the environment (TPU pods, Slurm, Open MPI)."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be 'host:port', got {coordinator!r}. Say 127.0.0.1:9876 on one machine.")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must be from 0 to {num_processes - 1}, got {process_id}.")
    if coordinator is not None and num_processes is not None and process_id is not None:
        roll_call(coordinator, num_processes, process_id, seconds=wait_seconds, report=report)
    with contextlib.suppress(AttributeError):  # a later version may lack this option
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        raise RuntimeError(
            f"JAX finds no cluster in the environment ({error}). Give coordinator, num_processes and process_id."
        ) from error


def make_mesh(group_size: int | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh to split batches over: of axis 'batch', or of 'group' and 'batch' with `group_size` devices a group.

    Batch norms with `axis_name='batch'` synchronize over the devices of a group: over all without groups, not at all
    with groups of one. A group's devices belong to one process, or are all the devices of several processes.

    Args:
      group_size: devices in a group; None for a single group of all.
      devices: devices to use; all by default.

    Raises:
      ValueError: if the groups don't divide the devices, or one would hold parts of several processes' devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'batch': 1}
    """
    count = len(jax.devices() if devices is None else devices)
    if group_size is None or group_size == count:
        if devices is None:
            return jax.make_mesh((jax.device_count(),), (SYNC_AXIS,), axis_types=(AxisType.Auto,))
        return Mesh(np.asarray(devices), (SYNC_AXIS,))
    ordered = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if not 0 < group_size <= len(ordered) or len(ordered) % group_size:
        raise ValueError(f"group_size must divide the {len(ordered)} devices, got {group_size}.")
    grid = np.asarray(ordered).reshape((-1, group_size))
    owners = [{device.process_index for device in group} for group in grid]
    if any(len(owner) > 1 for owner in owners) and any(a & b for a, b in itertools.pairwise(owners)):
        per_process = {sum(d.process_index == p for d in ordered) for p in set.union(*owners)}
        raise ValueError(
            f"group_size must divide the devices of a process, or be a multiple of them, so that no process is part of "
            f"several groups; got {group_size} for {sorted(per_process)} devices a process."
        )
    return Mesh(grid, (GROUP_AXIS, SYNC_AXIS))


def num_groups(mesh: Mesh) -> int:
    """Returns how many groups of devices have statistics of their own; raises ValueError for a mesh of other axes."""
    if mesh.axis_names not in ((SYNC_AXIS,), (GROUP_AXIS, SYNC_AXIS)) or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh must have the axis {SYNC_AXIS!r}, or {GROUP_AXIS!r} and {SYNC_AXIS!r}, of type Auto, got "
            f"{tuple(mesh.axis_names)} of {tuple(str(t) for t in mesh.axis_types)}. Use bnjax.training.make_mesh."
        )
    return mesh.size // mesh.shape[SYNC_AXIS]


def index_groups(mesh: Mesh) -> tuple[tuple[int, ...], ...] | None:
    """Returns the mesh's groups as `axis_index_groups` for a model's batch norms under pmap; None for a single group.

    >>> index_groups(make_mesh(devices=jax.devices()[:1]))
    """
    groups = num_groups(mesh)
    if groups == 1:
        return None
    size = mesh.size // groups
    return tuple(tuple(range(start, start + size)) for start in range(0, mesh.size, size))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose leading axis holds the examples of a batch: split over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def stats_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of running statistics: each group's with its group, or one set whole on every device."""
    return NamedSharding(mesh, P(GROUP_AXIS)) if num_groups(mesh) > 1 else replicated(mesh)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, split over all devices, from the examples that each process has.

    Args:
      batch: pytree of arrays whose first axis holds the examples of this process; every process has equally many, a
        multiple of its devices.
      mesh: mesh over all processes' devices.

    Raises:
      ValueError: if the examples don't divide among the devices.
    """
    local = len(mesh.local_devices)
    for leaf in jax.tree.leaves(batch):
        if np.shape(leaf)[0] % local:
            raise ValueError(
                f"batch must split evenly over this process's {local} devices, got {np.shape(leaf)[0]} examples. "
                "Pad it with examples of weight zero (bnjax.training.pad_batch)."
            )
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def local_part(values: Any) -> Any:
    """Returns this process's equal share of the examples of a batch that every process has whole."""
    share = len(values) // jax.process_count()
    return values[share * jax.process_index() : share * (jax.process_index() + 1)]


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a tree whole on every device; it must be the same in each process."""
    sharding = replicated(mesh)

    def place(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Gathers global arrays as NumPy arrays, whole in every process.

    Args:
      tree: pytree of arrays over all processes' devices; every process must call this.
    """
    from jax.experimental import multihost_utils

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)
