"""Trains variants of a network over many seeds at once, each call a compiled scan over epochs."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bnjax import train
from bnjax.data import Split
from bnjax.studies.saving import Saving

_CALLS = 20  # compiled calls that a training is divided into, between which progress is shown
_BINS = 40
# The studies' networks are so small that compiling them takes most of the time: less effort there pays.
COMPILER_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 1}
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False  # an option that later versions lack


@runtime_checkable
class Report(Protocol):
    """What a study tells of its progress."""

    def task(self, variant: "Variant") -> Callable[[float, dict[str, float]], Any]:
        """Begins a variant; the returned function is told the epochs done and the latest means over seeds."""
        ...

    def reading(self, text: str, fraction: float) -> Any:
        """Data is being read."""
        ...


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network and how it is trained.

    Attributes:
      name: key in results.
      label: for tables and figures.
      model: linen module.
      optimizer: optax gradient transformation.
      objective: loss and correctness of each example.
      batch_size: examples in a step.
      epochs: passes over the training examples.
    """

    name: str
    label: str
    model: Any
    optimizer: optax.GradientTransformation
    objective: train.Objective
    batch_size: int
    epochs: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """A variant's training over all seeds.

    Attributes:
      variant: what was trained.
      curves: '<split>_loss' and '<split>_accuracy', each `[seeds, epochs]`. The split 'train' is what training saw
        during the epoch, in training mode; the others are evaluated after it with running statistics.
      state: final states, each leaf with a leading axis of seeds; None where they are not kept.
      histograms: for the first seed, '<weight|gradient>/<layer>/<parameter>' to `(counts [epochs, bins], range
        [epochs, 2])`; gradients are those of the first `batch_size` training examples in training mode.
    """

    variant: Variant
    curves: dict[str, np.ndarray]
    state: Any
    histograms: dict[str, tuple[np.ndarray, np.ndarray]]

    def final(self, curve: str, epochs: int = 1) -> np.ndarray:
        """Mean of a curve over the last epochs, for each seed."""
        return self.curves[curve][:, -epochs:].mean(1)

    def epochs_to(self, curve: str, threshold: float) -> np.ndarray:
        """For each seed the first epoch (from 1) at which a curve is at least `threshold`; NaN where it never is."""
        reached = self.curves[curve] >= threshold
        return np.where(reached.any(1), reached.argmax(1) + 1.0, np.nan)


class Job(NamedTuple):
    """A variant and the data to train and evaluate it on; the arguments of `train_variant`."""

    variant: Variant
    training: Split
    evaluation: Mapping[str, Split]
    per_seed_data: bool = False


def train_variants(
    jobs: Sequence[Job], seeds: Sequence[int], report: Report, saving: Saving | None = None
) -> list[Trained]:
    """Trains several variants, as many at a time as there are processor cores.

    Compilation, most of the time for small networks, and execution run outside Python's lock, so threads suffice.

    Args:
      jobs: what to train, on what.
      seeds: non-negative ints.
      report: is told the progress of each.
      saving: where checkpoints are, if anywhere.

    Returns:
      The trainings in the order of the jobs, the same as one after the other.
    """
    stopped = threading.Event()

    def work(job: Job) -> Trained:
        tell = report.task(job.variant)

        def progress(epoch: int, means: dict[str, float]) -> None:
            if stopped.is_set():
                raise RuntimeError("stopped, since another training failed or was interrupted")
            tell(epoch, means)

        options: dict[str, Any] = {"per_seed_data": job.per_seed_data, "progress": progress, "saving": saving}
        return train_variant(*job[:3], seeds, **options)

    with ThreadPoolExecutor(min(len(jobs), _cores())) as pool:
        try:
            return list(pool.map(work, jobs))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_variant(
    variant: Variant,
    training: Split,
    evaluation: Mapping[str, Split],
    seeds: Sequence[int],
    *,
    per_seed_data: bool = False,
    progress: Callable[[int, dict[str, float]], Any] = lambda epoch, means: None,
    saving: Saving | None = None,
) -> Trained:
    """Trains a variant from each seed, all seeds in one vmapped program.

    A seed decides the initial parameters and the order of the examples; what it gives does not depend on the others.

    Args:
      variant: what to train.
      training: training examples; with `per_seed_data` each array has a leading axis of seeds.
      evaluation: further splits to evaluate after each epoch, alike.
      seeds: non-negative ints.
      per_seed_data: whether every seed has its own data.
      progress: is told the number of epochs done and the latest means over seeds, some twenty times.
      saving: where checkpoints are, if anywhere, from which to continue.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    data_axis = 0 if per_seed_data else None
    x, y = jax.tree.map(jnp.asarray, tuple(training))
    ends = np.cumsum([0] + [split.y.shape[-1] for split in evaluation.values()])
    held_out = [  # all further splits as one, so that one evaluation serves
        jnp.concatenate([jnp.asarray(part) for part in parts], axis=int(per_seed_data))
        for parts in zip(*evaluation.values(), strict=True)
    ]
    example = x[0, :1] if per_seed_data else x[:1]
    objective = variant.objective

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def initialise(keys):
        def create(key):
            return train.create_train_state(variant.model, variant.optimizer, jax.random.fold_in(key, 0), example)

        return jax.vmap(create)(keys)

    def epoch_of_seed(state, key, epoch, data):
        (x, y), held_out = data
        order_key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
        state, metrics = train.train_epoch(state, order_key, x, y, batch_size=variant.batch_size, objective=objective)
        measured = {"train": metrics}
        if held_out:
            examples = train.evaluate(state, *held_out, objective=objective)
            for name, start, end in zip(evaluation, ends[:-1], ends[1:], strict=True):
                measured[name] = jax.tree.map(lambda v, start=start, end=end: v[start:end].mean(), examples)
        return state, measured

    def gradients_of_first_seed(states, data):
        (x, y), _ = jax.tree.map(lambda v: v[0], data) if per_seed_data else data
        state = jax.tree.map(lambda v: v[0], states)
        size = variant.batch_size
        grads = train.gradients(state, x[:size], y[:size], objective=objective)
        return {"weight": state.params, "gradient": grads}

    @functools.partial(jax.jit, static_argnames="count", donate_argnames="states", compiler_options=COMPILER_OPTIONS)
    def run(states, keys, data, epoch, count):
        def body(states, epoch):
            vmapped = jax.vmap(epoch_of_seed, in_axes=(0, 0, None, data_axis))
            states, metrics = vmapped(states, keys, epoch, data)
            return states, (metrics, gradients_of_first_seed(states, data))

        return lax.scan(body, states, epoch + jnp.arange(count))

    states = initialise(keys)
    shape = (len(seeds), variant.epochs)
    curves = {
        f"{split}_{metric}": np.full(shape, np.nan, np.float32)
        for split in ("train", *evaluation)
        for metric in train.Metrics._fields
    }
    parameters = {"/".join(str(key.key) for key in path) for path, _ in jax.tree.leaves_with_path(states.params)}
    histograms = {
        f"{kind}/{parameter}": (np.zeros((variant.epochs, _BINS), np.int32), np.zeros((variant.epochs, 2), np.float32))
        for kind in ("weight", "gradient")
        for parameter in sorted(parameters)
    }
    saved = saving and saving.of(
        variant.name, {"seeds": list(seeds), "batch_size": variant.batch_size, "epochs": variant.epochs}
    )
    start = 0
    if saved and (restored := saved.restore((states, curves, histograms))):
        start, (states, curves, histograms) = restored
    count = next(n for n in range(max(1, variant.epochs // _CALLS), 0, -1) if variant.epochs % n == 0)
    for epoch in range(start, variant.epochs, count):
        states, (metrics, leaves) = run(states, keys, ((x, y), held_out), epoch, count)
        done = slice(epoch, epoch + count)
        for name, split in jax.device_get(metrics).items():
            for metric, values in split._asdict().items():
                curves[f"{name}_{metric}"][:, done] = values.T
        for path, values in jax.tree.leaves_with_path(jax.device_get(leaves)):
            counts, ends = histograms["/".join(str(key.key) for key in path)]
            for i, value in enumerate(values, epoch):
                counts[i], ends[i] = _histogram(value)
        progress(epoch + count, {name: float(curve[:, epoch + count - 1].mean()) for name, curve in curves.items()})
        if saved:
            saved.save(epoch + count, (states, curves, histograms))
    if saved:
        saved.close()
    return Trained(variant, curves, jax.device_get(states), histograms)


def _cores() -> int:
    """Processor cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts in equal bins between the extremes, and these; non-finite values are left out."""
    finite = values[np.isfinite(values)]
    counts, edges = np.histogram(finite, bins=_BINS)
    return counts.astype(np.int32), edges[[0, -1]].astype(np.float32)
