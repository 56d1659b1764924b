"""Carries out plans: one loop for all trainings, over seeds at once by vmap, one by one, or on a mesh of devices."""

import functools
import hashlib
import os
import threading
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bnjax import training
from bnjax.studies import Options
from bnjax.studies.engine.histograms import count_values
from bnjax.studies.engine.mappings import Compiled, OnMesh
from bnjax.studies.engine.memory import settings_at_once
from bnjax.studies.engine.plan import Plan, Setting, Trained
from bnjax.studies.engine.saving import Saved

TOGETHER, ONE_BY_ONE = "together", "one by one"

Update = Callable[[float, dict[str, float]], Any]
"""A function that is told the steps or epochs done, and the latest means over seeds."""


@runtime_checkable
class Report(Protocol):
    """A listener that a study tells its progress."""

    def expect(self, count: int) -> Any:
        """Hears of so many trainings to come."""
        ...

    def task(self, plan: Plan) -> Update:
        """Begins a training; the returned function is told what is done, up to the plan's length."""
        ...

    def reading(self, text: str, fraction: float) -> Any:
        """Hears that data is being read."""
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
      mapped: 'together' for all settings at once by vmap, or for as many as `bnjax.studies.engine.memory` allows;
        'one by one'; or the mesh over whose devices the plan's step, a `bnjax.training.ParallelStep`, splits each
        batch, one setting after the other.
      report: is told the progress.
      options: options of the study: where checkpoints are, and whether to count weights and gradients of the first
        setting after each part, beside the training, whose numbers that leaves as they are.
      histograms: whether to count them in any case, within the compiled program.
    """
    update = report.task(plan) if report else lambda done, means: None
    is_split = mapped != TOGETHER
    is_beside = not histograms and bool(options and options.histograms)
    if isinstance(mapped, Mesh):
        way = OnMesh(plan, examples, histograms or is_beside)
    else:
        way = Compiled(plan, examples, is_split, histograms, is_beside)
    count = len(settings["key"])
    size = 1 if is_split else settings_at_once(plan, settings, examples, getattr(report, "expected", 1))
    parts = range(count) if is_split else [slice(first, first + size) for first in range(0, count, size)]
    groups = [jax.tree.map(lambda v, part=part: v[part], settings) for part in parts]
    configuration = {"settings": _digest(settings), "steps": plan.steps, "every": plan.every, "part": plan.part}
    configuration |= {**plan.configuration, **way.configuration}

    def of_group(number: int, setting: Setting) -> tuple[Any, Any, Any]:
        state, done = way.create(setting), 0
        series, counted = way.empty(state, setting)
        saved = Saved(options and options.saving, f"{plan.name}-{number}", configuration)
        with saved:
            if restored := saved.restore(lambda: (way.whole(state), series, counted), plan.steps):
                done, (state, series, counted) = restored
                state = way.placed(state)
            for first, end in way.calls:
                if first < done:
                    continue
                state, values, leaves = way.run(state, setting, first, end, number == 0)
                values = jax.device_get(values)
                jax.tree.map(functools.partial(_put, first / plan.steps), series, values)
                if number == 0 and leaves:
                    leaves = jax.device_get(leaves)
                    for i in range(len(jax.tree.leaves(leaves)[0])):
                        count_values(counted, first // plan.part + i, jax.tree.map(lambda v, i=i: v[i], leaves))
                saved.save(end, lambda state=state: (way.whole(state), series, counted), end == plan.steps)
                so_far = (number * plan.steps + end) / (plan.unit * len(groups))
                update(int(so_far) if plan.unit == 1 else so_far, _means(plan, series[0], end, values[2]))
        return series, way.kept(state), counted

    results = [of_group(number, setting) for number, setting in enumerate(groups)]
    if not is_split:
        by_setting = [jax.tree.map(lambda v: v.swapaxes(0, 1), series) for series, _, _ in results]
        results = [(series, *of[1:]) for series, of in zip(by_setting, results, strict=True)]
    join = np.stack if is_split else np.concatenate
    series, states = jax.tree.map(lambda *v: np.ascontiguousarray(join(v)), *(of[:2] for of in results))
    counted = results[0][2]
    metrics, measurements, looked = series
    return Trained(plan, metrics, measurements, looked, states, way.parameters, counted)


def _put(where: float, buffer: np.ndarray, values: np.ndarray) -> None:
    """Copies what a call gave to its place in the arrays of the whole training, whose first axis is time."""
    first = round(where * len(buffer)) if len(values) else 0
    buffer[first : first + len(values)] = values


def _means(plan: Plan, metrics: training.Metrics, end: int, looked: dict[str, Any]) -> dict[str, float]:
    """Returns means over settings of the metrics of the last part so far, and of the splits evaluated after it."""
    part = slice((end - 1) // plan.part * plan.part, end)
    splits = {"train": jax.tree.map(lambda v: v[part], metrics)}
    splits |= {k: jax.tree.map(lambda v: v[-1:], v) for k, v in looked.items() if isinstance(v, training.Metrics)}
    named = {f"{split}_{name}": v for split, of in splits.items() for name, v in of._asdict().items()}
    return {name: float(np.mean(v)) for name, v in named.items() if len(v)}


class Job(NamedTuple):
    """The arguments of `train` for one of several trainings."""

    plan: Plan
    settings: Setting
    examples: Any = ()


def train_all(jobs: Sequence[Job], report: Report, options: Options) -> list[Trained]:
    """Trains several plans with histograms, as many at a time as there are processor cores; returns them in order."""
    return in_threads(lambda job, report: train(*job, report=report, options=options, histograms=True), jobs, report)


def in_threads(work: Callable[[Any, Report], Any], jobs: Sequence[Any], report: Report) -> list[Any]:
    """Does several jobs, as many at a time as there are processor cores.

    Compilation, most of the time for small networks, and execution run outside Python's lock, so threads suffice.

    `work` is `(job, report) → result`; telling its progress to the report stops it once another job has failed or was
    interrupted. The results are in the order of the jobs.
    """
    stopped = threading.Event()

    def task(plan: Plan) -> Update:
        update = report.task(plan)

        def stoppable(done: float, means: dict[str, float]) -> None:
            if stopped.is_set():
                raise RuntimeError("stopped, since another training failed or was interrupted")
            update(done, means)

        return stoppable

    report.expect(len(jobs))
    expected = getattr(report, "expected", len(jobs))
    watched: Any = types.SimpleNamespace(expect=report.expect, task=task, reading=report.reading, expected=expected)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(len(jobs), cores)) as pool:
        try:
            return list(pool.map(lambda job: work(job, watched), jobs))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _digest(settings: Setting) -> str:
    """Returns a text that changes with any number of the settings."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(settings):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()
