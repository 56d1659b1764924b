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

from bnjax import training
from bnjax._compat import without_fusion_emitters
from bnjax.studies.data import Split
from bnjax.studies.engine.saving import Saving

_CALLS = 20  # compiled calls that a training is divided into, between which progress is shown
_BINS = 40
_LONG = 5000  # steps of a training that better kernels repay


def compiler_options(steps: int = 0) -> dict[str, Any]:
    """XLA's, for a training of so many steps: compiling takes most of a short one, so that less effort there pays.

    What the environment variable XLA_FLAGS says wins.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
    if steps < _LONG:
        options |= without_fusion_emitters()
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@runtime_checkable
class Report(Protocol):
    """What a study tells of its progress."""

    def task(self, variant: "Variant") -> Callable[[float, dict[str, float]], Any]:
        """Begins a variant; the returned function is told the epochs done and the latest means over seeds."""
        ...

    def reading(self, text: str, fraction: float) -> Any:
        """Data is being read."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One network and how it is trained. The same variant trained again, with as many seeds, compiles nothing.

    Attributes:
      name: key in results.
      label: for tables and figures.
      model: linen module.
      optimizer: optax gradient transformation; None where the study makes its own.
      objective: loss and correctness of each example.
      batch_size: examples in a step.
      epochs: passes over the training examples.
    """

    name: str
    label: str
    model: Any
    optimizer: Any
    objective: training.Objective
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
      parameters: collection ('params', 'batch_stats') to path to shape.
      histograms: for the first seed, '<weight|gradient>/<layer>/<parameter>' to `(counts [epochs, bins], range
        [epochs, 2])`; gradients are those of the first `batch_size` training examples in training mode.
    """

    variant: Variant
    curves: dict[str, np.ndarray]
    state: Any
    histograms: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, Sequence[int]]] = dataclasses.field(default_factory=dict)

    def final(self, curve: str, epochs: int = 1) -> np.ndarray:
        """Mean of a curve over the last epochs, for each seed."""
        return self.curves[curve][:, -epochs:].mean(1)

    def epochs_to(self, curve: str, threshold: float) -> np.ndarray:
        """For each seed the first epoch (from 1) at which a curve reaches `threshold`, the last plus 1 if none does."""
        reached = self.curves[curve] >= threshold
        return np.where(reached.any(1), reached.argmax(1) + 1.0, reached.shape[1] + 1.0)


class Job(NamedTuple):
    """A variant and the data to train and evaluate it on; the arguments of `train_variant`."""

    variant: Variant
    train: Split
    evaluation: Mapping[str, Split]
    per_seed_data: bool = False


def train_variants(
    jobs: Sequence[Job], seeds: Sequence[int], report: Report, saving: Saving | None = None
) -> list[Trained]:
    """Trains several variants, as many at a time as there are processor cores.

    Args:
      jobs: what to train, on what.
      seeds: non-negative ints.
      report: is told the progress of each.
      saving: where checkpoints are, if anywhere.

    Returns:
      The trainings in the order of the jobs, the same as one after the other.
    """

    def work(job: Job, watched: Callable[[Progress], Progress]) -> Trained:
        progress = watched(report.task(job.variant))
        options: dict[str, Any] = {"per_seed_data": job.per_seed_data, "progress": progress, "saving": saving}
        return train_variant(*job[:3], seeds, **options)

    return in_threads(work, jobs)


Progress = Callable[[Any, dict[str, float]], Any]
"""Is told the epochs or steps done, and the latest means over seeds."""


def in_threads(work: Callable[[Any, Callable[[Progress], Progress]], Any], jobs: Sequence[Any]) -> list[Any]:
    """Does several jobs, as many at a time as there are processor cores.

    Compilation, most of the time for small networks, and execution run outside Python's lock, so threads suffice.

    Args:
      work: `(job, watched) → result`; what it tells of its progress goes through `watched(progress)`, which stops it
        once another job has failed or was interrupted.
      jobs: what to do.

    Returns:
      The results in the order of the jobs.
    """
    stopped = threading.Event()

    def watched(tell: Progress) -> Progress:
        def progress(done: Any, means: dict[str, float]) -> None:
            if stopped.is_set():
                raise RuntimeError("stopped, since another training failed or was interrupted")
            tell(done, means)

        return progress

    with ThreadPoolExecutor(min(len(jobs), _cores())) as pool:
        try:
            return list(pool.map(lambda job: work(job, watched), jobs))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_variant(
    variant: Variant,
    train: Split,
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
      train: training examples; with `per_seed_data` each array has a leading axis of seeds.
      evaluation: further splits to evaluate after each epoch, alike.
      seeds: non-negative ints.
      per_seed_data: whether every seed has its own data.
      progress: is told the number of epochs done and the latest means over seeds, some twenty times.
      saving: where checkpoints are, if anywhere, from which to continue.
    """
    keys = seed_keys(seeds)
    x, y = jax.tree.map(jnp.asarray, tuple(train))
    ends = np.cumsum([0] + [split.y.shape[-1] for split in evaluation.values()])
    held_out = [  # all further splits as one, so that one evaluation serves
        jnp.concatenate([jnp.asarray(part) for part in parts], axis=int(per_seed_data))
        for parts in zip(*evaluation.values(), strict=True)
    ]
    example = x[0, :1] if per_seed_data else x[:1]
    splits = tuple(zip(evaluation, ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    steps = variant.epochs * (y.shape[-1] // variant.batch_size)
    initialize, run = _programs(variant, steps, splits, per_seed_data)
    states = initialize(keys, example)
    shape = (len(seeds), variant.epochs)
    curves = {
        f"{split}_{metric}": np.full(shape, np.nan, np.float32)
        for split in ("train", *evaluation)
        for metric in training.Metrics._fields
    }
    histograms = empty_histograms(states.params, variant.epochs)
    saved = saving and saving.of(
        variant.name, {"seeds": list(seeds), "batch_size": variant.batch_size, "epochs": variant.epochs}
    )
    start = 0
    if saved and (restored := saved.restore((states, curves, histograms))):
        start, (states, curves, histograms) = restored
    count = divisor_up_to(variant.epochs // _CALLS, variant.epochs)
    for epoch in range(start, variant.epochs, count):
        states, (metrics, leaves) = run(states, keys, ((x, y), held_out), epoch, count)
        done = slice(epoch, epoch + count)
        for name, split in jax.device_get(metrics).items():
            for metric, values in split._asdict().items():
                curves[f"{name}_{metric}"][:, done] = values.T
        leaves = jax.device_get(leaves)
        for i in range(count):
            count_values(histograms, epoch + i, jax.tree.map(lambda v, i=i: v[i], leaves))
        progress(epoch + count, {name: float(curve[:, epoch + count - 1].mean()) for name, curve in curves.items()})
        if saved:
            saved.save(epoch + count, (states, curves, histograms))
    if saved:
        saved.close()
    return Trained(variant, curves, jax.device_get(states), histograms, parameter_shapes(states))


@functools.lru_cache(maxsize=32)
def _programs(
    variant: Variant, steps: int, splits: tuple[tuple[str, int, int], ...], per_seed_data: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled parts of a variant's training, kept for its next: initial states of seeds, and some epochs.

    Args:
      variant: what is trained.
      steps: how many a training has.
      splits: names, first and last index of the splits in the examples that are evaluated together.
      per_seed_data: whether every seed has its own data.
    """
    objective, data_axis = variant.objective, 0 if per_seed_data else None
    options = compiler_options(steps)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def initialize(keys, example):
        def create(key):
            return training.create_train_state(variant.model, variant.optimizer, jax.random.fold_in(key, 0), example)

        return jax.vmap(create)(keys)

    def epoch_of_seed(state, key, epoch, data):
        (x, y), held_out = data
        order_key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
        state, metrics = training.train_epoch(
            state, order_key, x, y, batch_size=variant.batch_size, objective=objective
        )
        measured = {"train": metrics}
        if held_out:
            examples = training.evaluate(state, *held_out, objective=objective)
            for name, start, end in splits:
                measured[name] = jax.tree.map(lambda v, start=start, end=end: v[start:end].mean(), examples)
        return state, measured

    def gradients_of_first_seed(states, data):
        (x, y), _ = jax.tree.map(lambda v: v[0], data) if per_seed_data else data
        state = jax.tree.map(lambda v: v[0], states)
        size = variant.batch_size
        grads = training.gradients(state, x[:size], y[:size], objective=objective)
        return {"weight": state.params, "gradient": grads}

    @functools.partial(jax.jit, static_argnames="count", donate_argnames="states", compiler_options=options)
    def run(states, keys, data, epoch, count):
        def body(states, epoch):
            vmapped = jax.vmap(epoch_of_seed, in_axes=(0, 0, None, data_axis))
            states, metrics = vmapped(states, keys, epoch, data)
            return states, (metrics, gradients_of_first_seed(states, data))

        return lax.scan(body, states, epoch + jnp.arange(count))

    return initialize, run


def seed_keys(seeds: Sequence[int]) -> jax.Array:
    """The random key of each seed."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def divisor_from(least: int, number: int) -> int:
    """The smallest divisor of a number that is at least so large."""
    return next(n for n in range(max(1, least), number + 1) if number % n == 0)


def divisor_up_to(most: int, number: int) -> int:
    """The largest divisor of a number that is at most so large (or 1)."""
    return next(n for n in range(max(1, most), 0, -1) if number % n == 0)


def _cores() -> int:
    """Processor cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Histograms = dict[str, tuple[np.ndarray, np.ndarray]]
"""'<weight|gradient>/<layer>/<parameter>' to counts `[times, bins]` and the range of the bins `[times, 2]`."""


def empty_histograms(params: Any, times: int) -> Histograms:
    """Those of as many times in a training, to be counted."""
    return {
        f"{kind}/{path}": (np.zeros((times, _BINS), np.int32), np.zeros((times, 2), np.float32))
        for kind in ("weight", "gradient")
        for path in sorted(_by_path(params))
    }


def count_values(histograms: Histograms, time: int, leaves: Mapping[str, Any]) -> None:
    """Counts 'weight' and 'gradient' of the parameters at one time, in equal bins between the finite extremes."""
    for path, values in _by_path(leaves).items():
        finite = values[np.isfinite(values)]
        counts, edges = np.histogram(finite, bins=_BINS)
        histograms[path][0][time] = counts
        histograms[path][1][time] = edges[[0, -1]]


def parameter_shapes(states: Any, leading: int = 1) -> dict[str, dict[str, list[int]]]:
    """Collection ('params', 'batch_stats') to path to shape, without the leading axes (of seeds)."""
    return {
        name: {path: list(leaf.shape[leading:]) for path, leaf in _by_path(tree).items()}
        for name in ("params", "batch_stats")
        if (tree := getattr(states, name, None))
    }


def _by_path(tree: Any) -> dict[str, Any]:
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


_RECORDER = optax.GradientTransformation(_zeros, lambda updates, state, params=None: (_zeros(updates), updates))


def recording(state: training.TrainState) -> training.TrainState:
    """A state whose next training step changes no parameter and leaves the gradient as `opt_state`."""
    return state.replace(tx=_RECORDER, opt_state=_RECORDER.init(state.params))
