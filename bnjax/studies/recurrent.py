"""A recurrent network that reads MNIST row by row: statistics for each time step, shared ones, and none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.models import RecurrentNetwork
from bnjax.studies import Options, data
from bnjax.studies.engine.experiment import Report, Variant, compiler_options, divisor_from, seed_keys
from bnjax.studies.engine.measured import Plan, random_batch, train_measured
from bnjax.studies.evidence.claims import AtLeast, Claim, Condition
from bnjax.studies.evidence.plots import Figure, drawing
from bnjax.studies.evidence.results import Results
from bnjax.studies.evidence.statistics import seeds_in_words
from bnjax.studies.perceptrons import pixels

BATCH_SIZE, HIDDEN, STEPS, MEASURED = 64, 64, 1000, 10
POPULATION_BATCH = 5000
LEARNING_RATE = 1e-3
EPSILON = 1e-3
VARIANTS = {
    "none": ("no batch norm", None, False),
    "per_step": ("batch norm, statistics for each time step", BatchNorm, False),
    "shared": ("batch norm, statistics shared over time", BatchNorm, True),
    "per_step_epsilon": (f"for each time step, ε = {EPSILON:g}", functools.partial(BatchNorm, epsilon=EPSILON), False),
    "shared_epsilon": (f"shared over time, ε = {EPSILON:g}", functools.partial(BatchNorm, epsilon=EPSILON), True),
}
_NEEDS = {"dataset": "mnist", "steps": AtLeast(STEPS)}
_ADDED = "added after running averages had been seen to fail; ε and the size of these batches were tried at three seeds"
CLAIMS = (
    Claim(
        "S1.9",
        "circles case study",
        "batch norm can be used with recurrent networks",
        "–",
        "with statistics for each time step the test accuracy is at most a point below the plain network's",
        (Condition("per step − none", "test_accuracy", "per_step", "none", low=-0.01),),
        _NEEDS,
    ),
    Claim(
        "S1.9 (population)",
        "circles case study",
        f"… with statistics computed from the training set after the training, and ε = {EPSILON:g}",
        "–",
        f"the same bound, with statistics of batches of {POPULATION_BATCH} examples instead of running averages",
        (Condition("per step − none", "population_accuracy", "per_step_epsilon", "none", low=-0.01),),
        _NEEDS,
        _ADDED,
    ),
    Claim(
        "R.2",
        "Cooijmans et al. 2016 (arXiv 1603.09025), section 3",
        "in a recurrent network statistics shared over time do worse than those for each time step",
        "–",
        "the paired difference in test accuracy is negative",
        (Condition("shared − per step", "test_accuracy", "shared", "per_step", high=0),),
        _NEEDS,
    ),
    Claim(
        "R.2 (population)",
        "Cooijmans et al. 2016 (arXiv 1603.09025), section 3",
        f"… with statistics computed from the training set after the training, and ε = {EPSILON:g}",
        "–",
        "the same, with the mean over time of the statistics of each step as what is shared",
        (Condition("shared − per step", "population_accuracy", "shared_epsilon", "per_step_epsilon", high=0),),
        _NEEDS,
        _ADDED,
    ),
)


def run(options: Options, report: Report):
    """Trains the networks and judges the claims.

    Args:
      options: seeds, steps (1000), dataset ('mnist') and data_dir.
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name, steps = options.dataset or "mnist", options.steps or STEPS
    every = divisor_from(steps // MEASURED, steps)
    images = data.images(name, options.data_dir, report.reading)
    train, test = (
        data.Split(pixels(split.x).reshape(split.x.shape[:3]), split.y) for split in (images.train, images.test)
    )
    held_out = jax.tree.map(jnp.asarray, test)
    settings = {"hidden": HIDDEN, "optimizer": "Adam", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
    results = Results("recurrent", {**settings, "dataset": name, "steps": steps}, range(options.seeds))
    keys = seed_keys(results.seeds)

    def step(state, x, y, key):
        return training.train_step(state, x, y, objective=training.cross_entropy)

    def measure(state, x, y, key):
        return jnp.mean(training.evaluate(state, *held_out, objective=training.cross_entropy).accuracy)

    accuracies = jax.jit(jax.vmap(lambda state: measure(state, None, None, None)))
    curves = {}
    for variant, (label, norm, is_shared) in VARIANTS.items():
        model = RecurrentNetwork(images.num_classes, HIDDEN, norm, is_shared)

        def create(setting, model=model):
            key = jax.random.fold_in(setting["key"], 0)
            return training.create_train_state(model, optax.adam(LEARNING_RATE), key, held_out.x[:1])

        described = Variant(variant, label, model, optax.adam(LEARNING_RATE), training.cross_entropy, BATCH_SIZE, steps)
        plan = Plan(
            create, random_batch(BATCH_SIZE), step, measure, steps, every, compiler_options=compiler_options(steps)
        )
        tell = report.task(described)
        further = {"progress": tell, "saving": options.saving, "histograms": options.histograms}
        seen = train_measured(plan, {"key": keys}, tuple(train), name=variant, **further)
        loss = np.asarray(seen.metrics.loss)
        found = {
            "test_accuracy": np.asarray(accuracies(seen.states)),
            "final_loss": loss[:, -max(1, steps // 20) :].mean(1),
        }
        estimate = functools.partial(with_population_statistics, model, jnp.asarray(train.x))
        states = jax.jit(functools.partial(jax.lax.map, estimate))(seen.states)
        found["population_accuracy"] = np.asarray(accuracies(states))
        curves[label] = np.concatenate([seen.measurements, found["test_accuracy"][:, None]], 1)
        trained = seen.trained(described, {"test_accuracy": curves[label], "train_loss": loss})
        results.add(trained, {"statistics": variant}, found)
    results.judge(CLAIMS)
    figure = Figure(figsize=(6, 4), layout="constrained")
    times = np.append(np.arange(0, steps, every), steps)
    drawing.curves(figure.subplots(), curves, times, ylabel="test accuracy")
    figure.suptitle(f"{name}, row by row, {seeds_in_words(options.seeds)}", fontsize=10)
    drawing.legend(figure)
    return results, {"test_accuracy.png": figure}


def with_population_statistics(
    model: RecurrentNetwork, x: jax.Array, state: training.TrainState
) -> training.TrainState:
    """A state with statistics of the training set in place of running averages.

    Args:
      model: the network.
      x: training examples, of which batches are made; what is left over is not used.
      state: after the training.

    Returns:
      The state with the means over the batches of their means and variances (and over time, where statistics are
      shared), the weights being the same for all.
    """
    if model.norm is None:
        return state
    size = min(POPULATION_BATCH, len(x))
    seeing = model.clone(norm=functools.partial(model.norm, momentum=0.0), is_shared=False)  # each batch's and step's

    def statistics(batch):
        variables = {**seeing.init(jax.random.key(0), batch, training=False), "params": state.params}
        _, updates = seeing.apply(variables, batch, training=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    seen = jax.lax.map(statistics, x[: len(x) // size * size].reshape(-1, size, *x.shape[1:]))
    axes = (0, 1) if model.is_shared else 0
    return state.replace(batch_stats=jax.tree.map(lambda values: values.mean(axes), seen))
