"""Mappings of a plan: compiled for all settings at once or for one, or by a step over the devices of a mesh."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import analysis, training
from bnjax.studies.engine.histograms import empty_histograms, parameter_shapes, watched
from bnjax.studies.engine.plan import Plan, Setting, compiler_options

_SHOWN = 20  # steps on a mesh between two signs of progress; the host runs ahead of the devices by no more


class Compiled:
    """The compiled programs of a plan, for all settings at once or for one at a time."""

    configuration: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, plan: Plan, examples: Any, is_split: bool, is_within: bool, is_beside: bool):
        self._examples = jax.tree.map(jnp.asarray, examples)
        self._create, self._run, self._watch = _programs(plan, not is_split, is_within)
        self._plan, self._leading, self._is_beside, self.parameters = plan, int(not is_split), is_beside, {}
        self.calls = [(first, first + plan.call) for first in range(0, plan.steps, plan.call)]

    def create(self, setting: Setting) -> Any:
        """Makes the state at step 0."""
        state = self._create(setting)
        self.parameters = parameter_shapes(state, self._leading)
        return state

    def empty(self, state: Any, setting: Setting) -> tuple[Any, Any]:
        """Makes arrays for the metrics, the measurements and the looks of the whole training, and its histograms."""
        inputs = (state, setting, self._examples, 0)
        _, values, leaves = jax.eval_shape(self._run, *inputs)
        series = jax.tree.map(lambda v: np.zeros((len(self.calls) * v.shape[0], *v.shape[1:]), v.dtype), values)
        leaves = jax.eval_shape(self._watch, *inputs) if self._is_beside else leaves
        return series, empty_histograms(leaves["weight"], self._plan.parts) if leaves else {}

    def run(self, state: Any, setting: Setting, first: int, end: int, is_first: bool) -> tuple[Any, Any, Any]:
        """Takes some steps; returns the next state, `(metrics, measurements, looks)` over time, and watched leaves."""
        state, values, leaves = self._run(state, setting, self._examples, first)
        if self._is_beside and is_first:
            leaves = self._watch(state, setting, self._examples, end)
        return state, values, leaves

    kept = staticmethod(jax.device_get)  # what remains of the final state
    whole = placed = staticmethod(lambda state: state)  # saved, and continued, as it is


@functools.lru_cache(maxsize=32)
def _programs(plan: Plan, is_vmapped: bool, is_watched: bool) -> tuple[Any, Any, Any]:
    """Compiles a plan, kept for its next training: initial states, steps, and watched leaves."""
    over = jax.vmap if is_vmapped else lambda function, *_: function

    def leaves_of_first(state, setting, examples, number):
        if is_vmapped:
            state, setting = jax.tree.map(lambda v: v[0], (state, setting))
        watch = plan.watch or functools.partial(watched, plan.step)
        weight, gradient = watch(state, *_inputs(plan, setting, examples, number))
        return jax.tree.map(lambda v: v[None], {"weight": weight, "gradient": gradient})

    look = over(lambda state, setting, examples: plan.look(state, setting.get("examples", examples)), (0, 0, None))

    def run(state, setting, examples, first):
        def of(function):
            of_each = over(lambda s, own, e, i: function(s, *_inputs(plan, own, e, i)), (0, 0, None, None))
            return lambda state, number: of_each(state, setting, examples, number)

        def part(state, first):
            numbers, measurements = first + jnp.arange(plan.part), ()
            if plan.measure is None:
                state, metrics = lax.scan(of(plan.step), state, numbers)
            else:
                how = {"measure": of(plan.measure), "every": plan.every}
                state, metrics, measurements = analysis.measured_scan(of(plan.step), state, numbers, **how)
            leaves = leaves_of_first(state, setting, examples, first + plan.part) if is_watched else {}
            return state, ((metrics, measurements), look(state, setting, examples), leaves)

        parts = plan.call // plan.part
        state, (measured, looked, leaves) = lax.scan(part, state, first + plan.part * jnp.arange(parts))
        (metrics, measurements), leaves = jax.tree.map(lambda v: v.reshape((-1, *v.shape[2:])), (measured, leaves))
        return state, (metrics, measurements, looked), leaves

    of_creation = plan.compiler_options and compiler_options()
    create = jax.jit(over(plan.create), compiler_options=of_creation)
    run = jax.jit(run, donate_argnums=0, compiler_options=plan.compiler_options)
    return create, run, jax.jit(leaves_of_first)


def _inputs(plan: Plan, setting: Setting, examples: Any, number: Any) -> tuple:
    return plan.draw(setting.get("examples", examples), setting, number)


def _empty_metrics(times: int) -> training.Metrics:
    return training.Metrics(*(np.zeros(times, np.float32) for _ in training.Metrics._fields))


class OnMesh:
    """A plan whose step splits each batch over the devices of all processes."""

    def __init__(self, plan: Plan, examples: Any, is_counted: bool):
        self._plan, self._examples, self._is_counted = plan, examples, is_counted
        self._step: Any = plan.step
        mesh = self._step.mesh
        self._groups, self.parameters = training.num_groups(mesh), {}
        self.configuration = {"groups": self._groups, "accumulate_steps": self._step.multiple // mesh.size}
        if self._groups > 1:  # else the number of devices changes nothing but rounding
            self.configuration["devices"] = mesh.size
        parts = range(0, plan.steps, plan.part)
        starts = [first for part in parts for first in range(part, part + plan.part, _SHOWN)]
        self.calls = list(itertools.pairwise([*starts, plan.steps]))

    def create(self, setting: Setting) -> Any:
        """Makes the state at step 0, on the mesh."""
        state = self._plan.create(setting)
        self.parameters = parameter_shapes(state, 0)
        return self.placed(training.split_batch_stats(state, self._groups) if self._groups > 1 else state)

    def empty(self, state: Any, setting: Setting) -> tuple[Any, Any]:
        """Makes arrays for the metrics and the looks of the whole training, and its histograms."""
        looked = {name: _empty_metrics(self._plan.parts) for name in self._examples[1]}
        counted = empty_histograms(state.params, self._plan.parts) if self._is_counted else {}
        return (_empty_metrics(self._plan.steps), (), looked), counted

    def run(self, state: Any, setting: Setting, first: int, end: int, is_first: bool) -> tuple[Any, Any, Any]:
        """Takes some steps; returns the next state, `(metrics, measurements, looks)` over time, and watched leaves."""
        pending = []
        for number in range(first, end):
            state, metrics = self._step(state, *self._inputs(setting, number))
            pending.append(metrics)
        metrics = jax.tree.map(lambda *v: np.stack(v), *jax.device_get(pending))
        if end % self._plan.part:
            return state, (metrics, (), {name: _empty_metrics(0) for name in self._examples[1]}), {}
        looked, leaves = self._plan.look(training.merge_batch_stats(state), self._examples), {}
        if self._is_counted and is_first:
            weight, gradient = watched(self._step, state, *self._inputs(setting, end - 1))
            leaves = jax.tree.map(lambda v: v[None], {"weight": weight, "gradient": gradient})
        return state, (metrics, (), jax.tree.map(np.atleast_1d, looked)), leaves

    def _inputs(self, setting: Setting, number: int) -> tuple:
        x, y = self._plan.draw(self._examples, setting, number)
        batch = training.pad_batch(training.Batch(x, y), self._step.multiple)
        batch = jax.tree.map(training.local_part, batch)
        return batch.x, batch.y, batch.weights, jax.random.fold_in(setting["key"], number + 1)

    def whole(self, state: Any) -> Any:
        """Returns the state as it is saved: statistics of the groups of all processes together."""
        is_apart = self._groups > 1 and jax.process_count() > 1
        return state.replace(batch_stats=training.to_host(state.batch_stats)) if is_apart else state

    def placed(self, state: Any) -> Any:
        """Places the state on the mesh."""
        return training.place_state(state, self._step.mesh)

    def kept(self, state: Any) -> Any:
        """Returns what remains of the final state on the host: all but the optimizer's memory."""
        return training.to_host(training.merge_batch_stats(state).replace(opt_state=()))
