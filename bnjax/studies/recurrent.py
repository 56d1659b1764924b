"""A recurrent network that reads MNIST row by row: statistics for each time step, shared ones, and none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import studies, training
from bnjax.linen import BatchNorm
from bnjax.models import RecurrentNetwork
from bnjax.studies import Study, data, option
from bnjax.studies.engine import Report, Variant, compiler_options, divisor_from, seed_keys, train
from bnjax.studies.evidence import Results, plots, read_claims, seeds_in_words


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the recurrent networks."""

    seeds: int = option(16, "number of seeds")
    steps: int = option(1000, "steps of training")


STUDY = Study(
    "recurrent",
    "a recurrent network that reads MNIST row by row: statistics for each time step, shared, and none",
    "S1, circles case study; Cooijmans et al. 2016",
    Options,
    compiled="per_step_epsilon",
    fast={"seeds": 3},
    source_size="statements only",
    order=6,
)

BATCH_SIZE, HIDDEN, MEASURED = 64, 64, 10
POPULATION_BATCH = 5000
LEARNING_RATE = 1e-3
EPSILON = 1e-3
_WITH_EPSILON = functools.partial(BatchNorm, epsilon=EPSILON)
VARIANTS = {
    "none": ("no batch norm", None, False),
    "per_step": ("batch norm, statistics for each time step", BatchNorm, False),
    "shared": ("batch norm, statistics shared over time", BatchNorm, True),
    "per_step_epsilon": (f"batch norm, for each time step, ε = {EPSILON:g}", _WITH_EPSILON, False),
    "shared_epsilon": (f"batch norm, one for all time steps, ε = {EPSILON:g}", _WITH_EPSILON, True),
}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the five networks by name."""
    how = {"optimizer": optax.adam(LEARNING_RATE), "input_shape": images.train.x.shape[1:3], "batch_size": BATCH_SIZE}
    return {
        name: Variant(name, label, RecurrentNetwork(images.num_classes, HIDDEN, norm, is_shared), **how)
        for name, (label, norm, is_shared) in VARIANTS.items()
    }


def run(options: Options, report: Report):
    """Trains the networks and judges the claims."""
    dataset, steps = options.dataset, options.steps
    every = divisor_from(steps // MEASURED, steps)
    images = data.images(dataset, options.data_dir, report.reading)
    images = images.map(lambda x: data.pixels(x).reshape(x.shape[:3]))
    train_set, held_out = images.train, jax.tree.map(jnp.asarray, images.test)
    settings = {"hidden": HIDDEN, "optimizer": "Adam", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
    results = Results(STUDY.name, {**settings, "dataset": dataset, "steps": steps}, range(options.seeds))
    results.examples = dict.fromkeys(("test_accuracy", "population_accuracy"), len(images.test.y))
    keys, curves = {"key": seed_keys(results.seeds)}, {}
    trainings = networks(options, images)
    report.expect(len(trainings))
    for name, network in trainings.items():
        how = {"measure": lambda state, *_, network=network: network.accuracy(state, *held_out), "every": every}
        plan = network.plan(steps, compiler_options=compiler_options(steps), **how)
        trained = train(plan, keys, tuple(train_set), report=report, options=options)
        loss = np.asarray(trained.metrics.loss)
        estimate = functools.partial(with_population_statistics, network.model, jnp.asarray(train_set.x))
        states = jax.jit(functools.partial(jax.lax.map, estimate))(trained.state)
        at_end, with_population = (np.asarray(network.accuracies(of, *held_out)) for of in (trained.state, states))
        final_loss = loss[:, -max(1, steps // 20) :].mean(1)
        metrics = {"test_accuracy": at_end, "final_loss": final_loss, "population_accuracy": with_population}
        curves[network.label] = np.concatenate([trained.measurements, at_end[:, None]], 1)
        shown = {"test_accuracy": curves[network.label], "train_loss": loss}
        results.add(trained, {"statistics": name}, metrics, shown)
    results.judge(CLAIMS)
    times = np.append(np.arange(0, steps, every), steps)
    title = f"{dataset}, row by row, running averages, {seeds_in_words(options.seeds)}"
    return results, {"test_accuracy.png": plots.curves(curves, times, "test accuracy", title)}


def with_population_statistics(model: RecurrentNetwork, x: jax.Array, state: training.TrainState):
    """Returns a state with statistics of training examples `x` in the place of running averages.

    They are the means over the batches that `x` makes (without those left over) of their means and variances, and over
    time, where statistics are shared, the weights being the same for all.
    """
    if model.norm is None:
        return state
    size = min(POPULATION_BATCH, len(x))
    observer = model.clone(norm=functools.partial(model.norm, momentum=0.0), is_shared=False)  # each batch's and step's

    def statistics(batch):
        variables = {**observer.init(jax.random.key(0), batch, training=False), "params": state.params}
        _, updates = observer.apply(variables, batch, training=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    of_batches = jax.lax.map(statistics, x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]))
    axes = (0, 1) if model.is_shared else 0
    return state.replace(batch_stats=jax.tree.map(lambda values: values.mean(axes), of_batches))
