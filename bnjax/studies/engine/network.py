"""Trains one large network at a time, its batches split over all devices of all processes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bnjax import training
from bnjax.studies import Options
from bnjax.studies.data import Split
from bnjax.studies.engine.experiment import (
    Histograms,
    Report,
    Trained,
    Variant,
    count_values,
    empty_histograms,
    parameter_shapes,
    recording,
)
from bnjax.studies.engine.saving import Saved

_SHOWN = 20  # steps between two signs of progress; the host runs ahead of the devices by no more
_EVALUATED = 1000  # examples at a time


class Data(NamedTuple):
    """What a network is trained and evaluated on.

    Attributes:
      train: examples on the host.
      evaluation: further splits, evaluated after each epoch.
      preprocess: maps inputs and a random key for each (None in evaluation) to inputs of the model, on the device.
    """

    train: Split
    evaluation: Mapping[str, Split]
    preprocess: training.Preprocess


def make_mesh(options: Options) -> Mesh:
    """The mesh of all devices in the groups that the options ask for."""
    return training.make_mesh(options.group_size)


def train_network(variant: Variant, data: Data, options: Options, steps_per_epoch: int, report: Report) -> Trained:
    """Trains a variant from each seed, one after the other, and continues where a checkpoint left off.

    A seed decides the initial parameters, the order of the examples (a new permutation for each pass over them, from
    which batches are taken without regard to its end) and all that is random in a step.

    Args:
      variant: what to train; its epochs are of `steps_per_epoch` steps.
      data: examples, the same in every process.
      options: seeds, devices and checkpoints.
      steps_per_epoch: steps after which the network is evaluated.
      report: is told the progress.

    Returns:
      Curves over epochs of each seed; 'train' is what training saw during the epoch, in training mode.
    """
    tell = report.task(variant)
    mesh = make_mesh(options)
    step = training.make_train_step(
        variant.objective,
        mesh,
        parallel=options.parallel,
        accumulate_steps=options.accumulate_steps,
        preprocess=data.preprocess,
    )
    curves, seen = [], _Seen(variant.epochs, options.histograms)
    for seed in range(options.seeds):
        saved = options.saving and options.saving.of(
            f"{variant.name}-{seed}", _configuration(variant, options, steps_per_epoch, mesh)
        )

        def progress(epochs: float, means: dict[str, float], seed=seed) -> None:
            tell((seed * variant.epochs + epochs) / options.seeds, means)

        try:
            curves.append(_train_seed(variant, data, step, seed, steps_per_epoch, saved, progress, seen))
        finally:
            if saved:
                saved.close()
    stacked = {name: np.stack([c[name] for c in curves]) for name in curves[0]}
    return Trained(variant, stacked, None, seen.histograms, seen.parameters)


@dataclasses.dataclass
class _Seen:
    """Shapes of the parameters, and histograms of the first seed's, counted after each epoch where asked for."""

    epochs: int
    is_counting: bool
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    histograms: Histograms = dataclasses.field(default_factory=dict)

    def begin(self, state: training.TrainState) -> None:
        if not self.parameters:
            self.parameters = parameter_shapes(state, 0)
            self.histograms = empty_histograms(state.params, self.epochs) if self.is_counting else {}

    def count(self, epoch: int, step: training.ParallelStep, state: training.TrainState, *inputs: Any) -> None:
        """Counts the weights, and the gradient of a step that is not taken."""
        recorded, _ = step(recording(jax.tree.map(jnp.copy, state)), *inputs)
        leaves = {"weight": state.params, "gradient": recorded.opt_state}
        count_values(self.histograms, epoch, jax.tree.map(np.asarray, leaves))


def _configuration(variant: Variant, options: Options, steps_per_epoch: int, mesh: Mesh) -> dict[str, Any]:
    """What decides the numbers of a training; the number of devices does not but for rounding, except with groups."""
    groups = training.num_groups(mesh)
    return {
        "epochs": variant.epochs,
        "steps_per_epoch": steps_per_epoch,
        "batch_size": variant.batch_size,
        "accumulate_steps": options.accumulate_steps,
        "groups": groups,
        **({"devices": mesh.size} if groups > 1 else {}),
    }


def _train_seed(
    variant: Variant,
    data: Data,
    step: training.ParallelStep,
    seed: int,
    steps_per_epoch: int,
    saved: Saved | None,
    progress: Callable[[float, dict[str, float]], Any],
    seen: _Seen,
) -> dict[str, np.ndarray]:
    key = jax.random.key(seed)
    example = data.preprocess(jnp.asarray(data.train.x[:1]), None)
    state = training.create_train_state(variant.model, variant.optimizer, jax.random.fold_in(key, 0), example)
    seen.begin(state)
    if (groups := training.num_groups(step.mesh)) > 1:
        state = training.split_batch_stats(state, groups)
    state = training.place_state(state, step.mesh)
    steps = variant.epochs * steps_per_epoch
    history = {"train": np.full((steps, 2), np.nan, np.float32)}
    history |= {name: np.full((variant.epochs, 2), np.nan, np.float32) for name in data.evaluation}

    def everything() -> dict[str, Any]:
        whole = groups > 1 and jax.process_count() > 1
        stats = training.to_host(state.batch_stats) if whole else state.batch_stats
        return {"state": state.replace(batch_stats=stats), "history": history}

    first = 0
    if saved and (restored := saved.restore(everything())):
        first, tree = restored
        state, history = training.place_state(tree["state"], step.mesh), tree["history"]

    pending = []
    for i in range(first, steps):
        x, y = _batch(data.train, variant.batch_size, i, seed)
        batch = training.pad_batch(training.Batch(x, y), step.multiple)
        batch = jax.tree.map(training.local_part, batch)
        inputs = (batch.x, batch.y, batch.weights, jax.random.fold_in(key, i + 1))
        state, metrics = step(state, *inputs)
        pending.append(metrics)
        epoch, done = divmod(i + 1, steps_per_epoch)
        if seen.histograms and seed == 0 and not done:
            seen.count(epoch - 1, step, state, *inputs)
        if done and len(pending) < _SHOWN:
            continue
        history["train"][i + 1 - len(pending) : i + 1] = np.asarray(jax.device_get(pending))
        pending = []
        means = {}
        if not done:
            merged = training.merge_batch_stats(state)
            for name, split in data.evaluation.items():
                measured = training.evaluate_in_batches(
                    merged,
                    *split,
                    objective=variant.objective,
                    batch_size=_EVALUATED,
                    mesh=step.mesh,
                    preprocess=data.preprocess,
                )
                history[name][epoch - 1] = np.asarray(measured)
                means[f"{name}_accuracy"] = float(history[name][epoch - 1, 1])
        else:
            means["train_accuracy"] = float(np.nanmean(history["train"][i + 1 - done : i + 1, 1]))
        progress((i + 1) / steps_per_epoch, means)
        if saved:
            saved.save(i + 1, everything())
    history["train"] = history["train"].reshape((variant.epochs, steps_per_epoch, 2)).mean(1)
    return {f"{name}_{metric}": v[:, j] for name, v in history.items() for j, metric in enumerate(("loss", "accuracy"))}


def _batch(train: Split, batch_size: int, step: int, seed: int) -> Split:
    """The examples of a step: those at its place in one permutation of all after the other."""
    count = len(train.y)
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    index = np.empty(batch_size, np.int64)
    for number in np.unique(place // count):
        inside = place // count == number
        index[inside] = _permutation(count, seed, int(number))[place[inside] % count]
    return Split(train.x[index], train.y[index])


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(count)
