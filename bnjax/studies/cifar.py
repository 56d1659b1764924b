"""S5: a ten-layer convolutional network on CIFAR, sigmoid and ReLU, with and without batch norm, on many devices."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis, studies, training
from bnjax.analysis import losses
from bnjax.linen import BatchNorm, BatchRenorm
from bnjax.models import CifarNetwork, of_example
from bnjax.studies import Study, data, option, vgg
from bnjax.studies.data import augmentation
from bnjax.studies.engine import Report, Trained, Variant, seed_keys, train
from bnjax.studies.evidence import Results, from_then_on, plots, read_claims, seeds_in_words


@dataclasses.dataclass(frozen=True)
class Options(studies.ParallelOptions, studies.ImageOptions):
    """The options of a run of the convolutional networks."""

    seeds: int = option(5, "number of seeds")
    epochs: int = option(
        20, "epochs of training", shown="20, of 400 steps with 16 filters on CPU, of 2000 with 60 on GPU and TPU"
    )
    dataset: str = option("cifar100", "image set", choices=("cifar100", "cifar10"))
    variants: tuple[str, ...] | None = option(None, "which networks to train", shown="all", metavar="A,B,…")
    batch_size: int = option(80, "examples in a step, over all devices")
    steps_per_epoch: int | None = option(None, "steps between two evaluations", shown="see above")
    width: int | None = option(None, "filters of the first convolution", shown="see above")


STUDY = Study(
    "cifar",
    "a ten-layer convolutional network on CIFAR-100 or CIFAR-10: sigmoid and ReLU, with and without batch norm; others",
    "S5, CIFAR-100 article (Keras)",
    Options,
    compiled="relu_bn",
    compiled_options={"width": 60},
    source_size="CIFAR-100, 20 epochs of 2000 steps, 60 filters",
    order=7,
)

FULL = {"steps_per_epoch": 2000, "filters": 60}
SHORT = {"steps_per_epoch": 400, "filters": 16}
CLASSES = 100  # classes of the article's data set
DEVIATION = 2.0  # deviation of the values that the article's formula is tried on
ACTIVATIONS = {"sigmoid": nn.sigmoid, "relu": nn.relu}
OTHERS = ("renorm", "layer", "group", "weight")  # normalizers of the ReLU network, trained for a quarter of the epochs
LABELS = {"none": "no batch norm", "bn": "batch norm"} | {name: vgg.NORMS[name][0] for name in OTHERS}
BATCHES = 20  # batches over which the variation of a layer's inputs is measured
GAUSSIAN = 2000  # images over which the distribution of a layer's outputs is looked at
SETTINGS = {"dropout": 0.15, "optimizer": "RMSprop", "learning_rate": 1e-3, "decay": 0.9, "epsilon": 1e-3}
SETTINGS |= {"augmentation": "shear 0.2, zoom 0.2, horizontal flip"}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the networks by name: `<activation>_<normalizer>`."""
    filters = options.width or _scale()["filters"]
    groups = training.index_groups(training.make_mesh(options.group_size)) if options.parallel == "pmap" else None
    sync = {"axis_name": training.SYNC_AXIS, "axis_index_groups": groups}
    norm = functools.partial(BatchNorm, epsilon=SETTINGS["epsilon"], **sync)
    how = {
        "optimizer": optax.rmsprop(SETTINGS["learning_rate"], decay=SETTINGS["decay"], eps=1e-7),
        "input_shape": images.train.x.shape[1:],
        "batch_size": options.batch_size,
        "preprocess": functools.partial(prepare, mean=float(images.train.x.mean())),
    }
    norms = {"none": None, "bn": norm, "renorm": functools.partial(BatchRenorm, epsilon=SETTINGS["epsilon"], **sync)}
    norms |= {"layer": of_example(nn.LayerNorm), "weight": None}
    group = functools.partial(nn.GroupNorm, num_groups=math.gcd(filters, _last_filters(filters), 32))
    norms["group"] = of_example(group)
    variants = {}
    for activation, of_places in (("sigmoid", ("none", "bn")), ("relu", ("none", "bn", *OTHERS))):
        for place in of_places:
            sizes = {"filters": filters, "last_filters": _last_filters(filters), "weight_norm": place == "weight"}
            model = CifarNetwork(images.num_classes, norms[place], ACTIVATIONS[activation], **sizes)
            name = f"{activation}_{place}"
            variants[name] = Variant(name, f"{activation}, {LABELS[place]}", model, **how)
    return options.selected(variants)


def run(options: Options, report: Report):
    """Trains the networks and judges the claims.

    By default 2000 steps an epoch and 60 filters where there is an accelerator, else 400 steps and 16 filters.
    """
    dataset, epochs, batch_size = options.dataset, options.epochs, options.batch_size
    steps, filters = options.steps_per_epoch or _scale()["steps_per_epoch"], options.width or _scale()["filters"]
    few = max(1, epochs // 4)
    mesh = training.make_mesh(options.group_size)
    how = {"parallel": options.parallel, "accumulate_steps": options.accumulate_steps}
    images = data.images(dataset, options.data_dir, report.reading)
    settings = {
        **SETTINGS,
        "dataset": dataset,
        "filters": [*[filters] * 4, _last_filters(filters)],
        "width": filters,
        "epochs": epochs,
        "epochs_of_others": few,
        "steps_per_epoch": steps,
        "batch_size": batch_size,
        "devices": mesh.size,
        "groups": training.num_groups(mesh),
        **how,
    }
    results = Results(STUDY.name, settings, range(options.seeds))
    results.examples = dict.fromkeys(("test_accuracy", "best_test_accuracy"), len(images.test.y))
    of_seeds = {"key": seed_keys(results.seeds), "seed": np.arange(options.seeds)}
    all_trained = {}
    trainings = networks(options, images)
    report.expect(len(trainings))
    for name, network in trainings.items():
        step = training.make_train_step(network.objective, mesh, preprocess=network.preprocess, **how)
        activation, _, place = name.partition("_")
        plan = network.parallel_epochs(few if place in OTHERS else epochs, steps, step)
        examples = (images.train, {"test": images.test})
        all_trained[name] = trained = train(plan, of_seeds, examples, mapped=mesh, report=report, options=options)
        metrics = _metrics(trained, few, images.num_classes) | article(options.seeds)
        if place not in OTHERS:
            alone = _alone(network)
            metrics |= _of_start(alone, images.train, results.seeds) | _of_end(alone, trained.states, images.train)
        results.add(trained, {"activation": activation, "normalizer": LABELS[place]}, metrics)
    _compare(results)
    results.judge(CLAIMS)
    title = f"{dataset}, batch {batch_size}, {steps} steps an epoch, {seeds_in_words(options.seeds)}"
    main = [trained for name, trained in all_trained.items() if name.rpartition("_")[2] not in OTHERS]
    others = [trained for name, trained in all_trained.items() if name.startswith("relu")]
    shown = {"learning_curves.png": main} | ({"normalizers.png": others} if len(others) > 2 else {})
    return results, {file: plots.learning_curves(of, plots.PANELS, title) for file, of in shown.items() if of}


def article(seeds: int) -> dict[str, np.ndarray]:
    """Returns what the article says of its classes and of its formula, by calculation, for each seed.

    The deviation is that of values of deviation 2 divided by their own plus ε, and by the word, by their variance.
    """
    values = np.random.default_rng(0).normal(0, DEVIATION, 100_000)
    centered, deviation, epsilon = values - values.mean(), values.std(), SETTINGS["epsilon"]
    found = {
        "chance_in_the_article": 1 / CLASSES,
        "deviation_by_formula": (centered / (deviation + epsilon)).std(),
        "deviation_by_variance": (centered / (deviation**2 + epsilon)).std(),
    }
    return {name: np.full(seeds, value) for name, value in found.items()}


def _metrics(trained: Trained, few: int, classes: int) -> dict[str, np.ndarray]:
    """Computes the numbers of learning curves, of which others than batch norm have a few epochs only."""
    accuracy, late = trained.curves["test_accuracy"], trained.plan.length // 4
    loss = _finite(trained.curves["test_loss"])
    metrics = {"early_test_loss": loss[:, few - 1], "early_test_accuracy": accuracy[:, few - 1]}
    if trained.plan.length == few:
        return metrics
    return metrics | {
        "test_accuracy": accuracy[:, -1],
        "test_loss": loss[:, -1],
        "best_test_accuracy": accuracy.max(1),
        "best_test_loss": loss.min(1),
        "train_accuracy_during_epoch": trained.final("train_accuracy"),
        "best_over_chance": accuracy.max(1) * classes,
        "late_gain": accuracy.max(1) - accuracy[:, :-late].max(1) if late else np.full(len(loss), np.nan),
        "accuracy_lost_since_best": accuracy.max(1) - accuracy[:, -1],
        "rises_of_loss": np.maximum(np.diff(loss, axis=1), 0).mean(1),
    }


def _compare(results: Results) -> None:
    """Adds when a network is as good as the plain one of its activation at its best, in epochs and in work."""
    for activation in ACTIVATIONS:
        curves = [f"{activation}_{place}/test_loss" for place in ("none", "bn")]
        if not set(curves) <= set(results.arrays):
            continue
        loss, best = (_finite(results.arrays[curve]) for curve in curves)
        reached = np.minimum.accumulate(best, 1) <= loss.min(1)[:, None]
        share = np.log10(from_then_on(reached) / (loss.argmin(1) + 1))
        name, of_plain = (f"{activation}_{place}" for place in ("bn", "none"))
        work = np.log10(results.metric(name, "step_operations") / results.metric(of_plain, "step_operations"))
        results.set_metric(name, "log10_share_of_epochs", share)
        results.set_metric(name, "log10_share_of_work", share + work)


def _finite(values: np.ndarray) -> np.ndarray:
    """Returns values with infinity in place of what is not finite, which is never the smallest."""
    return np.where(np.isfinite(values), values, np.inf)


def _scale() -> dict[str, int]:
    return SHORT if jax.default_backend() == "cpu" else FULL


def _alone(network: Variant) -> Variant:
    """Returns a network without an axis to synchronize its batch norms over."""
    norm = None if network.model.norm is None else functools.partial(BatchNorm, epsilon=SETTINGS["epsilon"])
    return dataclasses.replace(network, model=network.model.clone(norm=norm))


def _of_start(network: Variant, train: data.Split, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Measures a network at the start, for each seed.

    Returns:
      'log10_first_to_last_gradient': logarithm of the norm of the first kernel's gradient over the last's;
      'step_operations': operations of a training step, without dropout and augmentation, as XLA counts them before it
        optimizes the program (for TPU, whose convolutions are one operation each);
      'gaussian_distance': distance of Kolmogorov and Smirnov between a layer's outputs, standardized by feature, and
        the normal distribution, mean over features and layers; 'gaussian_distance_of_activations' the same of what
        the nonlinearity makes of them.
    """
    x, y = (jnp.asarray(part[: network.batch_size]) for part in train)
    images = jnp.asarray(train.x[:GAUSSIAN])

    @jax.jit
    def of_seed(key):
        state = network.create({"key": key})
        at = network.loss(state.batch_stats), state.params, x, y
        first, last = analysis.gradient_norms(*at, layers=["Conv_0", "Dense_0"]).values()
        outputs = losses.layer_outputs(network.model, state.variables, network.prepared(images))
        hidden = [h.reshape((-1, h.shape[-1])) for name, h in outputs.items() if name != "Dense_0"]
        rows = [h[jax.random.randint(jax.random.key(i), (GAUSSIAN,), 0, len(h))] for i, h in enumerate(hidden)]
        distances = [
            jnp.stack([_gaussian_distance(function(h)).mean() for h in rows]).mean()
            for function in (lambda h: h, network.model.activation)
        ]
        return jnp.log10(first / last), *distances

    found = np.array([of_seed(key) for key in seed_keys(seeds)]).T
    state = jax.eval_shape(network.create, {"key": jax.random.key(0)})
    lowered = jax.jit(network.step).trace(state, x, y, jax.random.key(0)).lower(lowering_platforms=("tpu",))
    cost: Any = lowered.cost_analysis() or {}
    names = ("log10_first_to_last_gradient", "gaussian_distance", "gaussian_distance_of_activations")
    work = {"step_operations": np.full(len(seeds), cost.get("flops", np.nan))}
    return dict(zip(names, found, strict=True)) | work


def _gaussian_distance(values: Any) -> Any:
    """Returns the largest distance of the distribution functions of standardized values `[N, features]` and normal."""
    z = jnp.sort((values - values.mean(0, keepdims=True)) / (values.std(0, keepdims=True) + 1e-12), 0)
    levels = (jnp.arange(len(z))[:, None] + 0.5) / len(z)
    return jnp.abs(jax.scipy.stats.norm.cdf(z) - levels).max(0)


def _of_end(network: Variant, states: Sequence[Any], train: data.Split) -> dict[str, np.ndarray]:
    """Measures how much the inputs of the layers vary from batch to batch in the trained networks, in training mode.

    'variation_between_batches' is the deviation, over batches, of the mean of a feature that a layer is given, relative
    to the deviation of the feature itself; the mean over features and layers.
    """
    count = min(BATCHES, len(train.x) // network.batch_size)
    x = jnp.asarray(train.x[: count * network.batch_size])
    batches = x.reshape((count, network.batch_size, *x.shape[1:]))

    @jax.jit
    def of_state(state):
        def of_batch(batch):
            outputs = losses.layer_outputs(network.model, state.variables, network.prepared(batch))
            inputs = [network.model.activation(h) for name, h in outputs.items() if name != "Dense_0"]
            return [(h.mean((0, 1, 2)), h.var((0, 1, 2))) for h in inputs]

        of_layers = jax.lax.map(of_batch, batches)
        relative = [mean.std(0) / jnp.sqrt(var.mean(0) + mean.var(0) + 1e-12) for mean, var in of_layers]
        return jnp.stack([layer.mean() for layer in relative]).mean()

    return {"variation_between_batches": np.array([float(of_state(state)) for state in states])}


def _last_filters(filters: int) -> int:
    return round(filters * 5 / 3)  # in the article's proportion: 100 to 60


def prepare(x, keys, *, mean: float):
    """Makes zero-centered float32 images, with the source's augmentation where there are keys.

    The source subtracts the test set's own mean from the test images; here the training set's serves for both.
    """
    x = x.astype(np.float32) - mean
    return x if keys is None else augmentation.random_affine_flip(x, keys, shear=0.2, zoom=0.2)
