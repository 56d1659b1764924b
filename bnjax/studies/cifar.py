"""S5: a ten-layer convolutional network on CIFAR, sigmoid and ReLU, with and without batch norm, on many devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis, studies, training
from bnjax.linen import BatchNorm
from bnjax.models import CifarNetwork
from bnjax.studies import Study, data, option
from bnjax.studies.data import augmentation
from bnjax.studies.engine import Report, Variant, seed_keys, train
from bnjax.studies.evidence import Results, plots, read_claims, seeds_in_words


@dataclasses.dataclass(frozen=True)
class Options(studies.ParallelOptions, studies.ImageOptions):
    """The options of a run of the convolutional networks."""

    seeds: int = option(3, "number of seeds")
    epochs: int = option(
        20, "epochs of training", shown="20, of 80 steps with 16 filters on CPU, of 2000 with 60 on GPU and TPU"
    )
    dataset: str = option("cifar100", "image set", choices=("cifar100", "cifar10"))
    variants: tuple[str, ...] | None = option(None, "which networks to train", shown="all", metavar="A,B,…")
    batch_size: int = option(80, "examples in a step, over all devices")
    steps_per_epoch: int | None = option(None, "steps between two evaluations", shown="see above")
    width: int | None = option(None, "filters of the first convolution", shown="see above")


STUDY = Study(
    "cifar",
    "a ten-layer convolutional network on CIFAR-100 or CIFAR-10: sigmoid and ReLU, with and without batch norm",
    "S5, CIFAR-100 article (Keras)",
    Options,
    compiled="relu_bn",
    compiled_options={"width": 60},
    source_size="CIFAR-100, 20 epochs of 2000 steps, 60 filters",
    order=7,
)

FULL = {"steps_per_epoch": 2000, "filters": 60}
SHORT = {"steps_per_epoch": 80, "filters": 16}
CLASSES = 100  # classes of the article's data set
DEVIATION = 2.0  # deviation of the values that the article's formula is tried on
ACTIVATIONS = {"sigmoid": nn.sigmoid, "relu": nn.relu}
SETTINGS = {"dropout": 0.15, "optimizer": "RMSprop", "learning_rate": 1e-3, "decay": 0.9, "epsilon": 1e-3}
SETTINGS |= {"augmentation": "shear 0.2, zoom 0.2, horizontal flip"}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the four networks by name: `<activation>_<bn|none>`."""
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
    variants = {}
    for activation, function in ACTIVATIONS.items():
        for place, label, of_place in (("none", "no batch norm", None), ("bn", "batch norm", norm)):
            model = CifarNetwork(images.num_classes, of_place, function, filters, _last_filters(filters))
            name = f"{activation}_{place}"
            variants[name] = Variant(name, f"{activation}, {label}", model, **how)
    return options.selected(variants)


def run(options: Options, report: Report):
    """Trains the four networks and judges the claims.

    By default 2000 steps an epoch and 60 filters where there is an accelerator, else 80 steps and 16 filters.
    """
    dataset, epochs, batch_size = options.dataset, options.epochs, options.batch_size
    steps, filters = options.steps_per_epoch or _scale()["steps_per_epoch"], options.width or _scale()["filters"]
    mesh = training.make_mesh(options.group_size)
    how = {"parallel": options.parallel, "accumulate_steps": options.accumulate_steps}
    images = data.images(dataset, options.data_dir, report.reading)
    settings = {
        **SETTINGS,
        "dataset": dataset,
        "filters": [*[filters] * 4, _last_filters(filters)],
        "epochs": epochs,
        "steps_per_epoch": steps,
        "two_passes": epochs * steps * batch_size >= 2 * len(images.train.y),
        "batch_size": batch_size,
        "devices": mesh.size,
        "groups": training.num_groups(mesh),
        **how,
    }
    results = Results(STUDY.name, settings, range(options.seeds))
    of_seeds = {"key": seed_keys(results.seeds), "seed": np.arange(options.seeds)}
    values, late = np.random.default_rng(0).normal(0, DEVIATION, 100_000), epochs // 4
    in_the_article = (values - values.mean()) / (values.var() + SETTINGS["epsilon"])  # by the variance, not its root
    all_trained = []
    trainings = networks(options, images)
    report.expect(len(trainings))
    for name, network in trainings.items():
        step = training.make_train_step(network.objective, mesh, preprocess=network.preprocess, **how)
        plan, examples = network.parallel_epochs(epochs, steps, step), (images.train, {"test": images.test})
        trained = train(plan, of_seeds, examples, mapped=mesh, report=report, options=options)
        all_trained.append(trained)
        accuracy = trained.curves["test_accuracy"]
        metrics = {
            "test_accuracy": trained.final("test_accuracy"),
            "best_test_accuracy": accuracy.max(1),
            "test_loss": trained.final("test_loss"),
            "train_accuracy_during_epoch": trained.final("train_accuracy"),
            "chance_in_the_article": np.full(options.seeds, 1 / CLASSES),
            "deviation_in_the_article": np.full(options.seeds, in_the_article.std()),
            "best_over_chance": accuracy.max(1) * images.num_classes,
            "late_gain": accuracy.max(1) - accuracy[:, :-late].max(1) if late else np.full(options.seeds, np.nan),
            "first_to_last_gradient": _gradient_ratios(network, images.train, results.seeds),
        }
        activation, _, place = name.partition("_")
        results.add(trained, {"activation": activation, "batch_norm": place == "bn"}, metrics)
    results.judge(CLAIMS)
    title = f"{dataset}, batch {batch_size}, {steps} steps an epoch, {seeds_in_words(options.seeds)}"
    return results, {"learning_curves.png": plots.learning_curves(all_trained, plots.PANELS, title)}


def _scale() -> dict[str, int]:
    return SHORT if jax.default_backend() == "cpu" else FULL


def _gradient_ratios(network: Variant, train: data.Split, seeds: Sequence[int]) -> np.ndarray:
    """Returns the norm of the first kernel's gradient over the last's, at the start, for each seed."""
    x, y = (jnp.asarray(part[: network.batch_size]) for part in train)
    norm = None if network.model.norm is None else functools.partial(BatchNorm, epsilon=SETTINGS["epsilon"])
    alone = dataclasses.replace(network, model=network.model.clone(norm=norm))  # without an axis to synchronize over

    @jax.jit
    def ratio(key):
        state = alone.create({"key": key})
        at = alone.loss(state.batch_stats), state.params, x, y
        first, last = analysis.gradient_norms(*at, layers=["Conv_0", "Dense_0"]).values()
        return first / last

    return np.array([ratio(key) for key in seed_keys(seeds)])


def _last_filters(filters: int) -> int:
    return round(filters * 5 / 3)  # in the article's proportion: 100 to 60


def prepare(x, keys, *, mean: float):
    """Makes zero-centered float32 images, with the source's augmentation where there are keys.

    The source subtracts the test set's own mean from the test images; here the training set's serves for both.
    """
    x = x.astype(np.float32) - mean
    return x if keys is None else augmentation.random_affine_flip(x, keys, shear=0.2, zoom=0.2)
