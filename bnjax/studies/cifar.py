"""S5: a ten-layer convolutional network on CIFAR, sigmoid and ReLU, with and without batch norm, on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis, training
from bnjax.analysis import losses
from bnjax.linen import BatchNorm
from bnjax.models import CifarNetwork
from bnjax.studies import Options, data
from bnjax.studies.data import augmentation
from bnjax.studies.engine.experiment import Report, Variant
from bnjax.studies.engine.network import Data, make_mesh, train_network
from bnjax.studies.evidence import plots
from bnjax.studies.evidence.claims import Claim, Condition
from bnjax.studies.evidence.results import Results
from bnjax.studies.evidence.statistics import seeds_in_words

SOURCE = "CIFAR-100 article"
BATCH_SIZE = 80
EPOCHS = 20
FULL = {"steps_per_epoch": 2000, "filters": 60}
SHORT = {"steps_per_epoch": 80, "filters": 16}
CLASSES = 100  # of the article
DEVIATION = 2.0  # of the values that its formula is tried on
ACTIVATIONS = {"sigmoid": nn.sigmoid, "relu": nn.relu}
SETTINGS = {
    "dropout": 0.15,
    "optimizer": "RMSprop",
    "learning_rate": 1e-3,
    "decay": 0.9,
    "epsilon": 1e-3,
    "augmentation": "shear 0.2, zoom 0.2, horizontal flip",
}

_LONG = {"two_passes": True}  # over the training set, before what a network learns or not is said
CLAIMS = (
    Claim(
        "S5.0",
        SOURCE,
        "chance level on the article's 100 classes is 10 %",
        "10 %",
        "one divided by the number of classes lies in 9.5 to 10.5 %",
        (Condition("chance", "chance_in_the_article", "sigmoid_none", low=0.095, high=0.105, exact=True),),
        is_arithmetic=True,
    ),
    Claim(
        "S5.6",
        SOURCE,
        "dividing by the batch variance plus a small number gives inputs of unit variance",
        "unit variance",
        f"the deviation of values of deviation {DEVIATION:g} divided by their variance plus ε lies in 0.95 to 1.05",
        (Condition("deviation", "deviation_in_the_article", "sigmoid_none", low=0.95, high=1.05, exact=True),),
        is_arithmetic=True,
    ),
    Claim(
        "S5.1",
        SOURCE,
        "the sigmoid network without batch norm stays at chance",
        "chance",
        "its best test accuracy is at most 1.5 times that of chance",
        (Condition("times chance", "best_over_chance", "sigmoid_none", high=1.5, digits=2),),
        _LONG,
    ),
    Claim(
        "S5.2",
        SOURCE,
        "the sigmoid network with batch norm learns",
        "learns",
        "its best test accuracy is at least 3 times that of chance",
        (Condition("times chance", "best_over_chance", "sigmoid_bn", low=3, digits=2),),
        _LONG,
    ),
    Claim(
        "S5.3",
        SOURCE,
        "the ReLU network without batch norm makes some gains and stalls",
        "stalls",
        "its best test accuracy is above that of chance, and gains less than a point in the last quarter of the epochs",
        (
            Condition("times chance", "best_over_chance", "relu_none", low=1.5, digits=2),
            Condition("gain in the last quarter", "late_gain", "relu_none", high=0.01, is_difference=True),
        ),
        _LONG,
    ),
    Claim(
        "S5.4",
        SOURCE,
        "the ReLU network with batch norm is better",
        "better",
        "the paired difference in best test accuracy is positive",
        (Condition("with − without", "best_test_accuracy", "relu_bn", "relu_none", low=0),),
        _LONG,
    ),
    Claim(
        "S5.5",
        SOURCE,
        "gradients reach the first layer of the sigmoid network only with batch norm",
        "–",
        "the first layer's gradient over the last's, at the start, is above 0.1 with it and below 0.01 without",
        (
            Condition("with", "first_to_last_gradient", "sigmoid_bn", low=0.1),
            Condition("without", "first_to_last_gradient", "sigmoid_none", high=0.01, digits=None),
        ),
    ),
)


def run(options: Options, report: Report):
    """Trains the four networks and judges the claims.

    Args:
      options: seeds, epochs (20) of steps_per_epoch, width (filters of the first convolution), batch_size (80),
        dataset ('cifar100'), data_dir, variants, devices and checkpoints; by default 2000 steps and 60 filters where
        there is an accelerator, else 80 steps and 16 filters.
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name = options.dataset or "cifar100"
    scale = SHORT if jax.default_backend() == "cpu" else FULL
    epochs, steps = options.epochs or EPOCHS, options.steps_per_epoch or scale["steps_per_epoch"]
    filters = options.width or scale["filters"]
    batch_size = options.batch_size or BATCH_SIZE
    mesh = make_mesh(options)
    images = data.images(name, options.data_dir, report.reading)
    mean = float(images.train.x.mean())
    examples = Data(images.train, {"test": images.test}, functools.partial(prepare, mean=mean))
    chosen = variants(images.num_classes, epochs, batch_size, filters, options)
    if options.variants:
        unknown = sorted(set(options.variants) - set(chosen))
        if unknown:
            raise ValueError(f"--variants must be among {', '.join(chosen)}, got {', '.join(unknown)}.")
        chosen = {key: chosen[key] for key in options.variants}
    results = Results(
        "cifar",
        {
            **SETTINGS,
            "dataset": name,
            "filters": [*[filters] * 4, _last_filters(filters)],
            "epochs": epochs,
            "steps_per_epoch": steps,
            "two_passes": epochs * steps * batch_size >= 2 * len(images.train.y),
            "batch_size": batch_size,
            "parallel": options.parallel,
            "devices": mesh.size,
            "groups": training.num_groups(mesh),
            "accumulate_steps": options.accumulate_steps,
        },
        range(options.seeds),
    )
    all_trained = []
    for variant in chosen.values():
        trained = train_network(variant, examples, options, steps, report)
        all_trained.append(trained)
        metrics = {
            "test_accuracy": trained.final("test_accuracy"),
            "best_test_accuracy": trained.curves["test_accuracy"].max(1),
            "test_loss": trained.final("test_loss"),
            "train_accuracy_during_epoch": trained.final("train_accuracy"),
            "chance_in_the_article": np.full(options.seeds, 1 / CLASSES),
            "deviation_in_the_article": np.full(options.seeds, _normalized_in_the_article().std()),
            "best_over_chance": trained.curves["test_accuracy"].max(1) * images.num_classes,
            "late_gain": _late_gain(trained.curves["test_accuracy"]),
            "first_to_last_gradient": _gradient_ratios(variant, examples, options.seeds),
        }
        activation, _, place = variant.name.partition("_")
        results.add(trained, {"activation": activation, "batch_norm": place == "bn"}, metrics)
    results.judge(CLAIMS)
    title = f"{name}, batch {batch_size}, {steps} steps an epoch, {seeds_in_words(options.seeds)}"
    return results, {"learning_curves.png": plots.learning_curves(all_trained, plots.PANELS, title)}


def _normalized_in_the_article() -> np.ndarray:
    """Normal values of a known deviation, normalized as the article writes: by the variance, not by its root."""
    values = np.random.default_rng(0).normal(0, DEVIATION, 100_000)
    return (values - values.mean()) / (values.var() + SETTINGS["epsilon"])


def _late_gain(accuracy: np.ndarray) -> np.ndarray:
    """How much the best accuracy rises in the last quarter of the epochs; NaN for fewer than four."""
    count = accuracy.shape[1]
    if count < 4:
        return np.full(len(accuracy), np.nan)
    return accuracy.max(1) - accuracy[:, : count - count // 4].max(1)


def _gradient_ratios(variant: Variant, examples: Data, seeds: int) -> np.ndarray:
    """The norm of the first kernel's gradient over the last's, at the start, for each seed."""
    x, y = (jnp.asarray(part[: variant.batch_size]) for part in examples.train)
    x = examples.preprocess(x, None)
    norm = None if variant.model.norm is None else functools.partial(BatchNorm, epsilon=SETTINGS["epsilon"])
    model = variant.model.clone(norm=norm)  # on one device, without an axis to synchronize over

    @jax.jit
    def ratio(key):
        state = training.create_train_state(model, variant.optimizer, jax.random.fold_in(key, 0), x[:1])
        loss = losses.linen_loss(model, {"batch_stats": state.batch_stats}, training.cross_entropy)
        first, last = analysis.gradient_norms(loss, state.params, x, y, layers=["Conv_0", "Dense_0"]).values()
        return first / last

    return np.array([ratio(jax.random.key(seed)) for seed in range(seeds)])


def _last_filters(filters: int) -> int:
    """Of the last block, in the article's proportion: 100 to 60."""
    return round(filters * 5 / 3)


def variants(num_classes: int, epochs: int, batch_size: int, filters: int, options: Options) -> dict[str, Variant]:
    """The four networks by name: `<activation>_<bn|none>`."""
    groups = training.index_groups(make_mesh(options)) if options.parallel == "pmap" else None
    norm = functools.partial(
        BatchNorm, epsilon=SETTINGS["epsilon"], axis_name=training.SYNC_AXIS, axis_index_groups=groups
    )
    optimizer = optax.rmsprop(SETTINGS["learning_rate"], decay=SETTINGS["decay"], eps=1e-7)
    found = {}
    for activation, function in ACTIVATIONS.items():
        for place, label in (("none", "no batch norm"), ("bn", "batch norm")):
            chosen = norm if place == "bn" else None
            model = CifarNetwork(num_classes, chosen, function, filters, _last_filters(filters))
            variant = Variant(
                f"{activation}_{place}",
                f"{activation}, {label}",
                model,
                optimizer,
                training.cross_entropy,
                batch_size,
                epochs,
            )
            found[variant.name] = variant
    return found


def prepare(x, keys, *, mean: float):
    """Zero-centered float32 images, with the source's augmentation where there are keys.

    The source subtracts the test set's own mean from the test images; here the training set's serves for both.
    """
    x = x.astype(np.float32) - mean
    return x if keys is None else augmentation.random_affine_flip(x, keys, shear=0.2, zoom=0.2)
