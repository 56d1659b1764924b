"""Flax's train state with running statistics: one set, or one for each of several groups of devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from flax.training import train_state
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from bnjax import _calls
from bnjax._functional import functional, name_of, taking_products
from bnjax._objective import inputs_of, phase
from bnjax._sync import Moments, merge_moments
from bnjax.training import mesh as devices
from bnjax.training.mesh import SYNC_AXIS

_OF_WARMUP = ("steps", "r_max", "d_max")  # what a batch renorm with `warmup_steps` keeps, the same in all groups


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the running statistics of the model's batch norms.

    Attributes:
      batch_stats: the 'batch_stats' collection; empty for a model without batch norm.
      examples_seen: None for one set of running statistics. Where groups of devices keep their own, `batch_stats` has a
        leading axis of groups, and this says from how many examples (by weight) each group's come.
      others: other collections of the model, by name. Training takes along what it changes in them, but not the random
        states of an nnx model, whose keys are given by `rngs`.
      argument: name of the option of `apply_fn` that says whether the model trains ('training', 'train', …) or the
        contrary ('use_running_average', 'deterministic', …); None for a model without; static.
      examples_remainder: what `examples_seen` lacks by rounding, as the `remainder` of `bnjax.Moments`.
    """

    step: Any
    params: Any  # any container will do, although Flax's annotation says FrozenDict
    batch_stats: Any
    examples_seen: Any = None  # float array [groups]
    examples_remainder: Any = None  # likewise
    others: Any = None
    argument: str | None = struct.field(pytree_node=False, default="training")

    @property
    def variables(self) -> dict[str, Any]:
        """The collections of the model, as `apply_fn` takes them."""
        return {**(self.others or {}), "params": self.params, "batch_stats": self.batch_stats}

    @property
    def stats_groups(self) -> int | None:
        """The number of sets of running statistics that are kept apart; None where one set serves all."""
        return None if self.examples_seen is None else self.examples_seen.shape[0]


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    key: Array | None = None,
    x: Any = None,
    *,
    variables: Any = None,
    argument: str | None = "training",
) -> TrainState:
    """Creates the state at step 0 of a Flax model.

    Args:
      model: linen module, which is initialized for inputs like `x`; or nnx module, whose variables are taken (and are
        put back by `bnjax.nnx.update(model, state.variables)`).
      optimizer: optax gradient transformation.
      key: random key of a linen module's initial parameters.
      x: a batch of a linen module's inputs, of which only shape and dtype matter; a tuple for a model of several.
      variables: variables of a linen module that are there already, trained or converted, in place of `key` and `x`.
        They are copied, since steps donate the state.
      argument: name of the option of the model's call that says whether it trains ('training', 'train', …) or the
        contrary ('use_running_average', 'deterministic', …); None for a model without. An nnx module's `train()` and
        `eval()` say so as well.

    Raises:
      TypeError: for a linen module with neither `key` and `x` nor `variables`, or with all; an nnx module with any.

    >>> from bnjax.nnx import BatchNorm
    >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> sorted(create_train_state(model, optax.sgd(0.1)).variables)
    ['batch_stats', 'others', 'params', 'random']
    """
    if isinstance(model, nnx.Module):
        if any(given is not None for given in (key, x, variables)):
            raise TypeError("an nnx model has its parameters already: pass create_train_state(model, optimizer).")
        apply_fn, variables = functional(model, argument=argument)
        argument = apply_fn.argument
        variables = jax.tree.map(jnp.copy, variables)  # steps donate their arrays, and the model keeps its own
    elif variables is not None:
        if key is not None or x is not None:
            raise TypeError("variables take the place of key and x: pass create_train_state(…, variables=variables).")
        apply_fn, variables = model.apply, jax.tree.map(jnp.copy, variables)
    else:
        if key is None or x is None:
            raise TypeError(
                "a linen model is initialized: pass create_train_state(model, optimizer, key, x), or its variables= "
                "where there are some."
            )
        apply_fn, variables = model.apply, model.init(key, *inputs_of(x), **phase(argument, False, model.apply))
    others = {name: values for name, values in variables.items() if name not in ("params", "batch_stats")}
    state = TrainState.create(
        apply_fn=apply_fn,
        params=variables["params"],
        tx=optimizer,
        batch_stats=variables.get("batch_stats", {}),
        others=others,
        argument=argument,
    )
    return state.replace(step=jnp.zeros((), jnp.int32))  # with Flax's Python 0 a step would compile a second time


def split_batch_stats(state: TrainState, groups: int) -> TrainState:
    """Gives each of several groups of devices its own copy of the running statistics.

    Args:
      state: state with one set of running statistics.
      groups: number of sets to make.

    Returns:
      The state with a leading axis of groups in `batch_stats`, and of no examples.

    Raises:
      ValueError: if the statistics are kept apart already.
    """
    check_groups(state, None, "split_batch_stats")
    stats = jax.tree.map(lambda v: jnp.broadcast_to(v, (groups, *jnp.shape(v))), state.batch_stats)
    return state.replace(batch_stats=stats, examples_seen=jnp.zeros(groups), examples_remainder=jnp.zeros(groups))


def merge_batch_stats(state: TrainState) -> TrainState:
    """Merges running statistics that groups of devices kept apart, by the examples that each has seen.

    With n_g the examples of group g and n = Σ n_g:

        mean = Σ n_g mean_g / n        var = Σ n_g (var_g + (mean_g − mean)²) / n

    Args:
      state: state with statistics kept apart (a state with one set is returned as it is).

    Returns:
      The state with one set of statistics, to evaluate and to save before the next step, which donates the arrays that
      both states share.

    Raises:
      ValueError: if there are other statistics than means and variances.
    """
    if state.examples_seen is None:
        return state
    merged = _merged(state.batch_stats, state.examples_seen)
    return state.replace(batch_stats=merged, examples_seen=None, examples_remainder=None)


@jax.jit  # one program, as many small ones with sums over the devices wait for each other where cores are few
def _merged(batch_stats: Any, examples_seen: Array) -> Any:
    counts = jnp.where(examples_seen.sum() > 0, examples_seen, 1)  # before the first step all are the same

    def merge(stats):
        if not isinstance(stats, Mapping):
            raise ValueError("batch_stats must hold means and variances only to be merged; there is another statistic.")
        if not set(stats) >= {"mean", "var"}:
            return {name: merge(v) for name, v in stats.items()}
        if others := set(stats) - {"mean", "var"} - set(_OF_WARMUP):
            raise ValueError(f"batch_stats must hold means and variances only to be merged; there is {min(others)!r}.")
        m = Moments(stats["mean"][0], stats["var"][0], counts[0])
        for g in range(1, counts.shape[0]):
            m = merge_moments(m, Moments(stats["mean"][g], stats["var"][g], counts[g]))
        moved = {"mean": m.mean.astype(stats["mean"].dtype), "var": m.var.astype(stats["var"].dtype)}
        return moved | {name: stats[name][0] for name in _OF_WARMUP if name in stats}

    return merge(batch_stats)


def check_groups(state: TrainState, groups: int | None, caller: str) -> None:
    """Raises unless the state keeps as many sets of running statistics as expected (None for one set for all)."""
    if state.stats_groups == groups:
        return
    if groups is None:
        raise ValueError(
            f"{caller} needs a state with one set of running statistics, this one holds those of "
            f"{state.stats_groups} groups of devices. Merge them with bnjax.training.merge_batch_stats(state)."
        )
    held = "one set" if state.stats_groups is None else f"those of {state.stats_groups} groups"
    raise ValueError(
        f"{caller} keeps the running statistics of {groups} groups of devices apart, this state holds {held}. "
        f"Pass bnjax.training.split_batch_stats(bnjax.training.merge_batch_stats(state), {groups})."
    )


def check_statistics(batch_stats: Any, checked: set[tuple[Any, ...]]) -> None:
    """Raises for statistics of layers other than batch norms, of which pmap would silently keep one device's."""
    others = sorted(name_of(path) for path in flatten_dict(batch_stats) if path[:-1] not in checked)
    if others:
        raise ValueError(
            f"the statistics {', '.join(others)} belong to no batch norm layer, and under pmap may differ from device "
            "to device. Use parallel='shard_map', which checks that they do not."
        )


def check_sync(mesh: Mesh, way: str, checked: set[tuple[Any, ...]]):
    """Returns a context in which batch norms raise that synchronize otherwise than the mesh's groups ask.

    Args:
      mesh: mesh of the devices.
      way: how the step is mapped.
      checked: set to which the paths of the batch norms that were called are added.
    """
    size, groups = mesh.shape[SYNC_AXIS], devices.index_groups(mesh)

    @taking_products
    def check(module, call, x, options):
        statistics = _calls.statistics_of(module)
        assert statistics is not None
        checked.add(module.path)
        if groups is not None and not statistics.merges:
            raise ValueError(
                f"the running statistics of {name_of(module.path)} ({type(module).__name__}) in several groups of "
                "devices can't be merged as moments can. Make the mesh without group_size."
            )
        if mesh.size > 1 and statistics.moves and not _calls.is_running(module, options):
            names = module.axis_name if isinstance(module.axis_name, tuple) else (module.axis_name,)
            expected = groups if way == "pmap" else None
            module_groups = module.axis_index_groups and tuple(map(tuple, module.axis_index_groups))
            not_needed = module.axis_name is None and (way == "jit" or size == 1)
            if not not_needed and (SYNC_AXIS not in names or module_groups != expected):
                wanted = f"axis_name={SYNC_AXIS!r}, axis_index_groups={expected}"
                raise ValueError(
                    f"the batch norm {name_of(module.path)} must be made with {wanted} to synchronize over {size} of "
                    f"{mesh.size} devices under {way}, got axis_name={module.axis_name!r}, "
                    f"axis_index_groups={module.axis_index_groups}. For statistics of each device make the mesh with "
                    "group_size=1."
                )
        return call(x, **options)

    return _calls.intercept(_calls.is_norm, check)


def place_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Places a state on a mesh: whole on every device, except that statistics kept apart go each to its group.

    Args:
      state: state, which must be the same in every process.
      mesh: mesh from `bnjax.training.make_mesh`.

    Raises:
      ValueError: if the state does not keep as many sets of statistics as the mesh has groups.
    """
    groups = devices.num_groups(mesh)
    check_groups(state, None if groups == 1 else groups, "this mesh")
    if groups == 1:
        return devices.replicate(state, mesh)
    sharding = devices.stats_sharding(mesh)
    stats = jax.tree.map(
        lambda v: jax.make_array_from_callback(v.shape, sharding, jax.device_get(v).__getitem__), state.batch_stats
    )
    return devices.replicate(state.replace(batch_stats=None), mesh).replace(batch_stats=stats)
