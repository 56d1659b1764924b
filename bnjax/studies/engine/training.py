"""Carries out plans: one loop for all trainings, over seeds at once by vmap, one by one, or on a mesh of devices."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from bnjax import analysis, training
from bnjax.studies import Options
from bnjax.studies.engine.histograms import count_values, empty_histograms, parameter_shapes, watched
from bnjax.studies.engine.plan import Plan, Setting, Trained, compiler_options
from bnjax.studies.engine.saving import Saved

TOGETHER, ONE_BY_ONE = "together", "one by one"
_SHOWN = 20  # steps on a mesh between two signs of progress; the host runs ahead of the devices by no more

Update = Callable[[float, dict[str, float]], Any]
"""Is told the steps or epochs done, and the latest means over seeds."""


@runtime_checkable
class Report(Protocol):
    """What a study tells of its progress."""

    def task(self, plan: Plan) -> Update:
        """Begins a training; the returned function is told what is done, up to the plan's length."""
        ...

    def reading(self, text: str, fraction: float) -> Any:
        """Data is being read."""
        ...


def train(
    plan: Plan,
    settings: Setting,
    examples: Any = (),
    *,
    mapped: str | Mesh = TOGETHER,
    report: Report | None = None,
    options: Options | None = None,
    histograms: bool = False,
) -> Trained:
    """Carries out a plan for each of S settings, and continues where a checkpoint left off.

    A setting's key decides its initial parameters, batches and all else that is random, whatever the other settings.

    Args:
      plan: how to train and measure.
      settings: dict of pytrees of arrays with a leading axis of S settings: 'key' (those of seeds, from `seed_keys`),
        numbers, and 'examples' where each has its own.
      examples: what the plan's functions take their batches from, the same for all settings.
      mapped: 'together' for all settings at once by vmap; 'one by one'; or the mesh over whose devices the plan's step,
        a `bnjax.training.ParallelStep`, splits each batch, one setting after the other.
      report: is told the progress.
      options: of the study: where checkpoints are, and whether to count histograms.
      histograms: whether to count weights and gradients of the first setting after each part, whatever the options say.
    """
    update = report.task(plan) if report else lambda done, means: None
    is_counted = histograms or bool(options and options.histograms)
    is_split = mapped != TOGETHER
    way = (_OnMesh if isinstance(mapped, Mesh) else _Compiled)(plan, examples, is_counted, is_split)
    count = len(settings["key"])
    groups = [jax.tree.map(lambda v, i=i: v[i], settings) for i in range(count)] if is_split else [settings]
    configuration = {"settings": _digest(settings), "steps": plan.steps, "every": plan.every, "part": plan.part}
    configuration |= {**plan.configuration, **way.configuration}

    def of_group(number: int, setting: Setting) -> tuple[Any, Any, Any]:
        state, done = way.create(setting), 0
        series, counted = way.empty(state, setting)
        saved = Saved(options and options.saving, f"{plan.name}-{number}", configuration)
        with contextlib.closing(saved):
            if restored := saved.restore(lambda: (way.whole(state), series, counted)):
                done, (state, series, counted) = restored
                state = way.placed(state)
            for first, end in way.calls:
                if first < done:
                    continue
                state, values, leaves = way.run(state, setting, first, end)
                values = jax.device_get(values)
                jax.tree.map(functools.partial(_put, first / plan.steps), series, values)
                if number == 0:
                    _count(counted, first // plan.part, jax.device_get(leaves))
                so_far = (number * plan.steps + end) / (plan.unit * len(groups))
                update(int(so_far) if plan.unit == 1 else so_far, _means(plan, series[0], end, values[2]))
                saved.save(end, lambda state=state: (way.whole(state), series, counted))
        return series, way.kept(state), counted

    results = [of_group(number, setting) for number, setting in enumerate(groups)]
    series, states, counted = results[0]
    if is_split:
        series, states = jax.tree.map(lambda *v: np.stack(v), *(of[:2] for of in results))
    else:
        series = jax.tree.map(lambda v: np.ascontiguousarray(v.swapaxes(0, 1)), series)
    metrics, measurements, looked = series
    return Trained(plan, metrics, measurements, looked, states, way.parameters, counted)


class _Compiled:
    """The compiled programs of a plan, for all settings at once or for one at a time."""

    configuration: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, plan: Plan, examples: Any, is_counted: bool, is_split: bool):
        self._examples = jax.tree.map(jnp.asarray, examples)
        self._create, self._run = _programs(plan, not is_split, is_counted)
        self._plan, self._leading = plan, int(not is_split)
        self.parameters = {}
        self.calls = [(first, first + plan.call) for first in range(0, plan.steps, plan.call)]

    def create(self, setting: Setting) -> Any:
        """The state at step 0."""
        state = self._create(setting)
        self.parameters = parameter_shapes(state, self._leading)
        return state

    def empty(self, state: Any, setting: Setting) -> tuple[Any, Any]:
        """Arrays for the metrics, the measurements and the looks of the whole training, and its histograms."""
        calls = len(self.calls)
        _, values, leaves = jax.eval_shape(self._run, state, setting, self._examples, 0)
        series = jax.tree.map(lambda v: np.zeros((calls * v.shape[0], *v.shape[1:]), v.dtype), values)
        return series, empty_histograms(leaves["weight"], self._plan.parts) if leaves else {}

    def run(self, state: Any, setting: Setting, first: Any, end: int) -> tuple[Any, Any, Any]:
        """Some steps: the next state, `(metrics, measurements, looks)` in the order of time, and watched leaves."""
        return self._run(state, setting, self._examples, first)

    def kept(self, state: Any) -> Any:
        """The final state, on the host."""
        return jax.device_get(state)

    whole = placed = staticmethod(lambda state: state)  # as it is saved, and as it goes on


@functools.lru_cache(maxsize=32)
def _programs(plan: Plan, is_vmapped: bool, is_counted: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled parts of a plan, kept for its next training: initial states, and some parts of the training."""
    over = jax.vmap if is_vmapped else lambda function, *_: function

    def leaves_of_first(state, setting, examples, number):
        if is_vmapped:
            state, setting = jax.tree.map(lambda v: v[0], (state, setting))
        inputs = _inputs(plan, setting, examples, number)
        watch = plan.watch or functools.partial(watched, plan.step)
        return dict(zip(("weight", "gradient"), watch(state, *inputs), strict=True))

    look = over(lambda state, setting, examples: plan.look(state, setting.get("examples", examples)), (0, 0, None))

    def run(state, setting, examples, first):
        def part(state, first):
            numbers = first + jnp.arange(plan.part)
            state, *measured = _steps(plan, state, setting, examples, numbers, over=over)
            leaves = leaves_of_first(state, setting, examples, first + plan.part) if is_counted else {}
            return state, (measured, look(state, setting, examples), leaves)

        parts = plan.call // plan.part
        state, (measured, looked, leaves) = lax.scan(part, state, first + plan.part * jnp.arange(parts))
        metrics, measurements = jax.tree.map(lambda v: v.reshape((-1, *v.shape[2:])), measured)
        return state, (metrics, measurements, looked), leaves

    of_creation = plan.compiler_options and compiler_options()
    create = jax.jit(over(plan.create), compiler_options=of_creation)
    return create, jax.jit(run, donate_argnums=0, compiler_options=plan.compiler_options)


def _inputs(plan: Plan, setting: Setting, examples: Any, number: Any) -> tuple:
    """What a step takes besides the state."""
    return plan.draw(setting.get("examples", examples), setting, number)


def _steps(plan: Plan, state, setting: Setting, examples, numbers, *, over=lambda function, *_: function) -> tuple:
    """Some steps, traced: `(state, metrics, measurements)`, where `over` maps a function over settings."""

    def of(function):
        mapped = over(lambda s, setting, e, number: function(s, *_inputs(plan, setting, e, number)), (0, 0, None, None))
        return lambda state, number: mapped(state, setting, examples, number)

    if plan.measure is not None:
        return analysis.measured_scan(of(plan.step), state, numbers, measure=of(plan.measure), every=plan.every)
    return (*lax.scan(of(plan.step), state, numbers), ())


class _OnMesh:
    """A plan whose step splits each batch over the devices of all processes."""

    def __init__(self, plan: Plan, examples: Any, is_counted: bool, is_split: bool):
        self._plan, self._examples, self._is_counted = plan, examples, is_counted
        self._step: Any = plan.step
        mesh = self._step.mesh
        self._groups, self.parameters = training.num_groups(mesh), {}
        self.configuration = {"groups": self._groups, "accumulate_steps": self._step.multiple // mesh.size}
        if self._groups > 1:  # else the number of devices changes nothing but rounding
            self.configuration["devices"] = mesh.size
        ends = [
            min(first + _SHOWN, part + plan.part)
            for part in range(0, plan.steps, plan.part)
            for first in range(part, part + plan.part, _SHOWN)
        ]
        self.calls = list(zip([0, *ends], ends, strict=False))

    def create(self, setting: Setting) -> Any:
        """The state at step 0, on the mesh."""
        state = self._plan.create(setting)
        self.parameters = parameter_shapes(state, 0)
        return self.placed(training.split_batch_stats(state, self._groups) if self._groups > 1 else state)

    def empty(self, state: Any, setting: Setting) -> tuple[Any, Any]:
        """Arrays for the metrics and the looks of the whole training, and its histograms."""

        def metrics(times):
            return training.Metrics(*(np.zeros(times, np.float32) for _ in training.Metrics._fields))

        looked = {name: metrics(self._plan.parts) for name in self._examples[1]}
        counted = empty_histograms(state.params, self._plan.parts) if self._is_counted else {}
        return (metrics(self._plan.steps), (), looked), counted

    def run(self, state: Any, setting: Setting, first: int, end: int) -> tuple[Any, Any, Any]:
        """Some steps: the next state, `(metrics, measurements, looks)` in the order of time, and watched leaves."""
        pending, inputs = [], ()
        for number in range(first, end):
            batch = training.pad_batch(
                training.Batch(*self._plan.draw(self._examples, setting, number)), self._step.multiple
            )
            batch = jax.tree.map(training.local_part, batch)
            inputs = (batch.x, batch.y, batch.weights, jax.random.fold_in(setting["key"], number + 1))
            state, metrics = self._step(state, *inputs)
            pending.append(metrics)
        leaves, looked = {}, {name: training.Metrics(np.zeros(0), np.zeros(0)) for name in self._examples[1]}
        if end % self._plan.part == 0:
            if self._is_counted:
                pair = watched(self._step, state, *inputs)
                leaves = jax.tree.map(
                    lambda v: np.asarray(v)[None], dict(zip(("weight", "gradient"), pair, strict=True))
                )
            looked = self._plan.look(training.merge_batch_stats(state), self._examples)
            looked = jax.tree.map(np.atleast_1d, looked)
        return state, (jax.tree.map(lambda *v: np.stack(v), *jax.device_get(pending)), (), looked), leaves

    def whole(self, state: Any) -> Any:
        """The state as it is saved: statistics of the groups of all processes together."""
        is_apart = self._groups > 1 and jax.process_count() > 1
        return state.replace(batch_stats=training.to_host(state.batch_stats)) if is_apart else state

    def placed(self, state: Any) -> Any:
        """The state on the mesh."""
        return training.place_state(state, self._step.mesh)

    def kept(self, state: Any) -> None:
        """Nothing: it may be large."""


def _put(where: float, buffer: np.ndarray, values: np.ndarray) -> None:
    """Copies what a call gave to its place in the arrays of the whole training, whose first axis is time."""
    first = round(where * len(buffer)) if len(values) else 0
    buffer[first : first + len(values)] = values


def _count(histograms: Any, first: int, leaves: Any) -> None:
    """Counts the watched leaves of some parts of the training."""
    if leaves:
        for i in range(len(jax.tree.leaves(leaves)[0])):
            count_values(histograms, first + i, jax.tree.map(lambda v, i=i: v[i], leaves))


def _means(plan: Plan, metrics: training.Metrics, end: int, looked: dict[str, Any]) -> dict[str, float]:
    """Means over settings of the training metrics of the last part so far, and of what was looked at after it."""
    part = slice((end - 1) // plan.part * plan.part, end)
    splits = {"train": jax.tree.map(lambda v: v[part], metrics)}
    splits |= {k: jax.tree.map(lambda v: v[-1:], v) for k, v in looked.items() if isinstance(v, training.Metrics)}
    return {
        f"{split}_{name}": float(np.mean(v))
        for split, of in splits.items()
        for name, v in of._asdict().items()
        if len(v)
    }


class Job(NamedTuple):
    """The arguments of `train` for one of several trainings."""

    plan: Plan
    settings: Setting
    examples: Any = ()


def train_all(jobs: Sequence[Job], report: Report, options: Options) -> list[Trained]:
    """Trains several plans with histograms, as many at a time as there are processor cores.

    Args:
      jobs: what to train, on what.
      report: is told the progress of each.
      options: of the study.

    Returns:
      The trainings in the order of the jobs, the same as one after the other.
    """

    def work(job: Job, watched: Report) -> Trained:
        return train(*job, report=watched, options=options, histograms=True)

    return in_threads(work, jobs, report)


def in_threads(work: Callable[[Any, Report], Any], jobs: Sequence[Any], report: Report) -> list[Any]:
    """Does several jobs, as many at a time as there are processor cores.

    Compilation, most of the time for small networks, and execution run outside Python's lock, so threads suffice.

    Args:
      work: `(job, report) → result`; telling its progress to the report stops it once another job has failed or was
        interrupted.
      jobs: what to do.
      report: is told the progress of all.

    Returns:
      The results in the order of the jobs.
    """
    stoppable = _Stoppable(report)
    with ThreadPoolExecutor(min(len(jobs), _cores())) as pool:
        try:
            return list(pool.map(lambda job: work(job, stoppable), jobs))
        except BaseException:
            stoppable.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Stoppable:
    """A report that ends every training that tells it of its progress once it is stopped."""

    def __init__(self, report: Report):
        self._report, self.stopped = report, threading.Event()
        self.reading = report.reading

    def task(self, plan: Plan) -> Update:
        """Begins a training."""
        update = self._report.task(plan)

        def stoppable(done: float, means: dict[str, float]) -> None:
            if self.stopped.is_set():
                raise RuntimeError("stopped, since another training failed or was interrupted")
            update(done, means)

        return stoppable


def _cores() -> int:
    """Processor cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def overhead(plan: Plan, setting: Setting, examples: Any, *, repeats: int = 3) -> tuple[float, float]:
    """Seconds a step, with measurements and without: medians over alternating runs of `every` steps, compiled before.

    Args:
      plan: how to train and measure.
      setting: of one training.
      examples: as those of `train`.
      repeats: runs of each.
    """
    examples = jax.tree.map(jnp.asarray, examples)
    state = jax.jit(plan.create)(setting)
    plans = {True: plan, False: dataclasses.replace(plan, measure=None)}
    run = jax.jit(
        lambda state, examples, measured: _steps(plans[measured], state, setting, examples, jnp.arange(plan.every))[1:],
        static_argnums=2,
    )
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for measured, seconds in times.items():
            clock = time.perf_counter()
            jax.block_until_ready(run(state, examples, measured))
            if repeat:
                seconds.append((time.perf_counter() - clock) / plan.every)
    return float(np.median(times[True])), float(np.median(times[False]))


def _digest(settings: Setting) -> str:
    """A text that changes with any number of the settings."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(settings):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()
