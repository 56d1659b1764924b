"""Training: the step in three ways to map it over devices, whole epochs as one compiled scan, and evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bnjax._compat import check_pmap, enable_x64
from bnjax._counts import add_counts
from bnjax._functional import NOISE
from bnjax._objective import Objective, inputs_of, losses_and_correctness, num_examples, phase, weights_of_losses
from bnjax.training import mesh as devices
from bnjax.training.mesh import GROUP_AXIS, SYNC_AXIS
from bnjax.training.state import TrainState, check_groups, check_statistics, check_sync, place_state
from bnjax.training.step import Batch, Metrics, check_accumulate_steps, pad_batch, train_step

PARALLEL = ("jit", "shard_map", "pmap")
Preprocess = Callable[[jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParallelStep:
    """A compiled training step over a mesh: `state, metrics = step(state, x, y, weights, key, rngs)`.

    Host arrays are the examples of this process, and are spread over its devices; a state that is not on the mesh yet
    is placed there. The state's buffers are donated. On several CPU devices a step is waited for: with many under way,
    XLA's sums over them were seen to stand still.

    Attributes:
      mesh: mesh of the devices.
      multiple: number of which a batch's examples must be a multiple: devices times micro-batches.
      compiled: a jitted function `(state, Batch, key, rngs) → (state, metrics)` of global arrays, for looking at its
        program.
    """

    mesh: Mesh
    multiple: int
    compiled: Any

    def __call__(self, state: TrainState, x, y, weights=None, key=None, rngs=None) -> tuple[TrainState, Metrics]:
        """Takes one training step.

        Args:
          state: parameters, running statistics and optimizer state.
          x: inputs of the batch: a global array, or a host array of this process's examples; a tuple for a model of
            several inputs.
          y: labels of the batch, global or of this process's examples, as `x` is.
          weights: weights of the examples, global or of this process's, as `x` is; zero for padding.
          key: random key of the step, the same in every process, from which each example gets its own (`keys`).
          rngs: random keys of the step by name, the same in every process, for what the model draws: 'dropout', say.
            Each device draws for itself, but for the 'noise' of `NoisyBatchNorm`, which is common to all.

        Returns:
          The next state, and the means over the whole batch of the metrics before the update.

        Raises:
          TypeError: within a transformation of JAX, such as jit or scan.
        """
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, x, y, weights, key, rngs))):
            raise TypeError(
                "the step of make_train_step is compiled, and places arrays on its mesh: call it as it is, not within "
                "jax.jit, scan or vmap. bnjax.training.train_step is the step for these."
            )
        if not (self._is_placed(state.step) and self._has_its_statistics(state)):
            state = place_state(state, self.mesh)
        batch = Batch(x, y, weights)
        if not all(self._is_placed(leaf) for leaf in jax.tree.leaves(batch)):
            batch = devices.shard_batch(batch, self.mesh)
        key, rngs = jax.tree.map(lambda k: k if self._is_placed(k) else devices.replicate(k, self.mesh), (key, rngs))
        done = self.compiled(state, batch, key, rngs)
        return jax.block_until_ready(done) if self._is_simulated else done

    @property
    def _is_simulated(self) -> bool:
        return self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"

    def _has_its_statistics(self, state: TrainState) -> bool:
        spec = devices.stats_sharding(self.mesh).spec
        return all(self._is_placed(leaf) and leaf.sharding.spec == spec for leaf in jax.tree.leaves(state.batch_stats))

    def _is_placed(self, leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == self.mesh


def make_train_step(
    objective: Objective,
    mesh: Mesh | None = None,
    *,
    parallel: str = "jit",
    accumulate_steps: int = 1,
    preprocess: Preprocess | None = None,
) -> ParallelStep:
    """Makes the training step over a mesh of devices, mapped by one of JAX's three means; the results are the same.

    Each device trains on its part of the batch. A model's batch norms synchronize over the devices of a group when made
    with `axis_name='batch'`: over all, where the mesh has no groups. Where it has, the groups' running statistics are
    kept apart in the state (`split_batch_stats`, `merge_batch_stats`); with groups of one device nothing is
    synchronized. Forward and backward, a synchronized batch norm costs one sum over devices each.

    Args:
      objective: loss and correctness of each example.
      mesh: mesh from `bnjax.training.make_mesh`; over all devices by default.
      parallel: 'jit' (partitioned automatically; batch norms need no `axis_name`), 'shard_map' (with replication
        checking) or 'pmap' (where groups are given to the batch norms as
        `axis_index_groups=bnjax.training.index_groups(mesh)`).
      accumulate_steps: number of micro-batches whose gradients are accumulated before the update.
      preprocess: maps inputs of examples and a random key for each (None without a key) to inputs of the model, on the
        device, such as an augmentation. Where there is a key, the model's call is given `keys` too.

    Returns:
      A `ParallelStep`, called as `step(state, x, y, weights=None, key=None, rngs=None)`.

    Raises:
      NotImplementedError, ValueError: for pmap with jax 0.7 or over several processes; an unknown `parallel`; when
        called, a batch that does not divide, or statistics or batch norms that don't fit the mesh's groups.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}.")
    mesh = devices.make_mesh() if mesh is None else mesh
    if parallel == "pmap" and mesh.is_multi_process:
        raise ValueError(
            "parallel='pmap' maps over the devices of one process, and this mesh has those of several. "
            "Use 'shard_map' or 'jit'."
        )
    check_accumulate_steps(accumulate_steps)
    groups, multiple = devices.num_groups(mesh), mesh.size * accumulate_steps
    if groups == 1 and len(mesh.axis_names) > 1:
        mesh = devices.make_mesh(devices=list(mesh.devices.flat))
    axis_names = (SYNC_AXIS,) if parallel == "pmap" else mesh.axis_names

    def body(state: TrainState, batch_stats: Any, rngs: Any, batch: Batch):
        """Takes the step of one device, or of one group of devices under jit."""
        x, keys = batch.x, batch.keys
        if preprocess is not None:
            x = preprocess(x, None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        checked: set[tuple[Any, ...]] = set()
        if groups > 1 and rngs is not None:
            index = (
                lax.axis_index(SYNC_AXIS) // (mesh.size // groups) if parallel == "pmap" else lax.axis_index(GROUP_AXIS)
            )
            rngs = {name: jax.random.fold_in(key, index) if name == NOISE else key for name, key in rngs.items()}
        with check_sync(mesh, parallel, checked):
            state, metrics = train_step(
                state.replace(batch_stats=batch_stats),
                x,
                batch.y,
                batch.weights,
                keys,
                objective=objective,
                axis_name=axis_names,
                accumulate_steps=accumulate_steps,
                rngs=rngs,
            )
        if parallel == "pmap" and groups < mesh.size:
            check_statistics(state.batch_stats, checked)
        return state.replace(batch_stats=None), state.batch_stats, metrics

    mapped = {"jit": _by_jit, "shard_map": _by_shard_map, "pmap": _by_pmap}[parallel](body, mesh, groups)

    def step(state: TrainState, batch: Batch, key: jax.Array | None = None, rngs: Any = None):
        check_groups(state, None if groups == 1 else groups, "a step over this mesh")
        size = num_examples(batch.x)
        if size % multiple:
            raise ValueError(
                f"the batch must be a multiple of {mesh.size} devices times {accumulate_steps} micro-batches, got "
                f"{size} examples. Pad it with examples of weight zero (bnjax.training.pad_batch)."
            )
        if key is not None:
            batch = batch._replace(keys=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size)))
        batch = _constrain(batch, devices.batch_sharding(mesh))
        seen = state.examples_seen, state.examples_remainder
        rest = state.replace(batch_stats=None, examples_seen=None, examples_remainder=None)
        rest, batch_stats, metrics = mapped(rest, state.batch_stats, rngs, batch)
        if state.stats_groups is not None:
            weights = jnp.ones(size) if batch.weights is None else batch.weights
            seen = add_counts(*seen, weights.reshape((groups, -1)).sum(1).astype(seen[0].dtype))
        rest, seen, metrics = _constrain((rest, seen, metrics), devices.replicated(mesh))
        batch_stats = _constrain(batch_stats, devices.stats_sharding(mesh))
        return rest.replace(batch_stats=batch_stats, examples_seen=seen[0], examples_remainder=seen[1]), metrics

    return ParallelStep(mesh, multiple, jax.jit(step, donate_argnums=0))


def _constrain(tree: Any, sharding: NamedSharding) -> Any:
    """Constrains XLA to place the arrays of a tree by a sharding."""
    return jax.tree.map(lambda v: lax.with_sharding_constraint(v, sharding), tree)


def _by_jit(body, mesh: Mesh, groups: int):
    """Maps over groups by vmap; within a group the batch is one array, which XLA partitions."""
    body = jax.vmap(body, in_axes=None, out_axes=None, axis_size=1, axis_name=SYNC_AXIS)
    if groups == 1:
        return jax.vmap(body, in_axes=None, out_axes=None, axis_size=1, axis_name=GROUP_AXIS)

    def mapped(state, batch_stats, rngs, batch):
        parts = jax.tree.map(lambda v: v.reshape((groups, -1, *v.shape[1:])), batch)
        parts = _constrain(parts, NamedSharding(mesh, P(GROUP_AXIS, SYNC_AXIS)))
        grouped = jax.vmap(body, (None, 0, None, 0), (None, 0, None), axis_name=GROUP_AXIS)
        return grouped(state, batch_stats, rngs, parts)

    return mapped


def _by_shard_map(body, mesh: Mesh, groups: int):
    """Maps over all axes of the mesh, with replication checking."""
    of_group = devices.stats_sharding(mesh).spec

    def local(state, batch_stats, rngs, batch):
        if groups > 1:
            batch_stats = jax.tree.map(lambda v: v[0], batch_stats)
        state, batch_stats, metrics = body(state, batch_stats, rngs, batch)
        if mesh.shape[SYNC_AXIS] == 1:  # this sum does nothing but type the statistics as shared by the group
            batch_stats = lax.psum(batch_stats, SYNC_AXIS)
        if groups > 1:
            batch_stats = jax.tree.map(lambda v: v[None], batch_stats)
        return state, batch_stats, metrics

    in_specs, out_specs = (P(), of_group, P(), P(mesh.axis_names)), (P(), of_group, P())
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _by_pmap(body, mesh: Mesh, groups: int):
    """Maps over the devices in the order of the mesh."""
    check_pmap()
    stats_axis = None if groups == 1 else 0
    axes = {"in_axes": (None, stats_axis, None, 0), "out_axes": (None, stats_axis, None)}
    pmapped = jax.pmap(body, axis_name=SYNC_AXIS, devices=list(mesh.devices.flat), **axes)
    by_group, by_device = P(GROUP_AXIS), P(mesh.axis_names)
    # Each device holds its group's statistics, so that these maps change nothing but the labels.
    for_devices, for_groups = (
        jax.shard_map(lambda tree: tree, mesh=mesh, in_specs=a, out_specs=b, check_vma=False)
        for a, b in ((by_group, by_device), (by_device, by_group))
    )

    def mapped(state, batch_stats, rngs, batch):
        parts = jax.tree.map(lambda v: v.reshape((mesh.size, -1, *v.shape[1:])), batch)
        if groups == 1:
            return pmapped(state, batch_stats, rngs, parts)
        state, batch_stats, metrics = pmapped(state, for_devices(batch_stats), rngs, parts)
        return state, for_groups(batch_stats), metrics

    return mapped


def train_epoch(
    state: TrainState,
    key: Array,
    x: Any,
    y: Any,
    *,
    batch_size: int,
    objective: Objective,
    rngs: Mapping[str, Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """Trains for one pass over the examples in random order: a scan of `train_step`.

    The examples that remain after the last full batch form a smaller batch.

    Args:
      state: parameters, running statistics and optimizer state to begin with.
      key: random key of the order.
      x: inputs of all examples, of JAX or NumPy; a tuple for a model of several.
      y: labels of all examples.
      batch_size: examples in a step; static.
      objective: loss and correctness of each example; static.
      rngs: random keys of the epoch by name, for what the model draws ('dropout', 'noise'), anew in each step.

    Returns:
      The state after the epoch, and the means over its examples of each batch's metrics, as Keras reports them.
    """
    x, y = jax.tree.map(jnp.asarray, (x, y))
    count = num_examples(x)
    full = count - count % batch_size
    order = _order(jax.random.bits(key, (count,)))

    def step(state, numbered):
        index, number = numbered
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)
        return train_step(state, *jax.tree.map(lambda v: v[index], (x, y)), objective=objective, rngs=keys)

    steps = full // batch_size
    state, metrics = lax.scan(step, state, (order[:full].reshape((-1, batch_size)), jnp.arange(steps)))
    sums = jax.tree.map(lambda m: m.sum() * batch_size, metrics)
    if full < count:
        state, metrics = step(state, (order[full:], steps))
        sums = jax.tree.map(lambda s, m: s + m * (count - full), sums, metrics)
    return state, jax.tree.map(lambda s: s / count, sums)


def _order(bits: Array) -> Array:
    """Computes `argsort(bits)` of 32-bit numbers by one sort of 64-bit numbers that end in the index.

    XLA's CPU backend sorts a single array several times faster than one whose order another array follows.
    """
    with enable_x64():
        index = lax.broadcasted_iota(jnp.uint64, bits.shape, 0)
        numbers = lax.sort(lax.convert_element_type(bits, jnp.uint64) << np.uint64(32) | index, is_stable=False)
        return lax.convert_element_type(numbers & np.uint64(2**32 - 1), jnp.int32)


def evaluate(state: TrainState, x: Any, y: Any, *, objective: Objective) -> Metrics:
    """Computes loss and correctness of each example, normalized by the running statistics.

    Args:
      state: parameters and running statistics.
      x: inputs of all examples, a tuple for a model of several.
      y: labels of all examples.
      objective: loss and correctness of each example; static.

    Returns:
      `Metrics` of one value for each example: take the mean over the examples of a data set.

    Raises:
      ValueError: for a state whose groups of devices keep their statistics apart.
    """
    check_groups(state, None, "evaluate")
    x, y = jax.tree.map(jnp.asarray, (x, y))
    outputs = state.apply_fn(state.variables, *inputs_of(x), **phase(state.argument, False, state.apply_fn))
    losses, correct = losses_and_correctness(objective, outputs, y)
    return Metrics(losses, correct.astype(losses.dtype))


def evaluate_in_batches(
    state: TrainState,
    x: Any,
    y: Any,
    *,
    objective: Objective,
    batch_size: int,
    mesh: Mesh | None = None,
    preprocess: Preprocess | None = None,
) -> Metrics:
    """Computes the means of the metrics over a data set, with the running statistics, each example counted once.

    The last batch is padded to the common size with examples of weight zero.

    Args:
      state: parameters and running statistics, on the mesh.
      x: inputs of all examples, on the host, the same in every process; a tuple for a model of several inputs.
      y: labels of all examples.
      objective: loss and correctness of each example.
      batch_size: examples at a time; rounded up to a multiple of the devices.
      mesh: mesh to split each batch over; by default the mesh on which the state is, or one device.
      preprocess: function as in `make_train_step`, called without keys.

    Returns:
      `Metrics` of floats.

    Raises:
      ValueError: for a state whose groups of devices keep their statistics apart, or no examples.
    """
    count = num_examples(x)
    if count == 0:
        raise ValueError("x must hold at least one example to evaluate, got none.")
    if mesh is None:
        mesh = getattr(getattr(state.step, "sharding", None), "mesh", None)
        mesh = mesh or devices.make_mesh(devices=jax.devices()[:1])
    batch_size += -batch_size % mesh.size
    sums = np.zeros(2)
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        batch = pad_batch(Batch(*jax.tree.map(lambda values, part=part: values[part], (x, y))), batch_size)
        batch = devices.shard_batch(jax.tree.map(devices.local_part, batch), mesh)
        sums += np.asarray(_weighted_sums(state, batch, objective, preprocess))
    return Metrics(*(float(value) for value in sums / count))


@functools.partial(jax.jit, static_argnames=("objective", "preprocess"))
def _weighted_sums(state: TrainState, batch: Batch, objective: Objective, preprocess: Preprocess | None) -> Array:
    x = batch.x if preprocess is None else preprocess(batch.x, None)
    losses, correct = (jnp.asarray(values) for values in evaluate(state, x, batch.y, objective=objective))
    weights = weights_of_losses(objective, losses, batch.weights)
    of_example = max(1, losses[0].size)  # losses, of which the mean counts
    return jnp.stack([(weights * values).sum() / of_example for values in (losses, correct)])
