"""S5: a ten-layer convolutional network on CIFAR, sigmoid and ReLU, with and without batch norm, on many devices."""

import functools

import numpy as np
import optax
from flax import linen as nn

from bnjax import augment, data, parallel, train
from bnjax.linen import BatchNorm
from bnjax.models import CifarNetwork
from bnjax.studies import Options, plots
from bnjax.studies.experiment import Report, Variant
from bnjax.studies.network import Data, make_mesh, train_network
from bnjax.studies.results import Results

BATCH_SIZE = 80
STEPS_PER_EPOCH = 2000
EPOCHS = 20
ACTIVATIONS = {"sigmoid": nn.sigmoid, "relu": nn.relu}
SETTINGS = {
    "filters": [60, 60, 60, 60, 100],
    "dropout": 0.15,
    "optimizer": "RMSprop",
    "learning_rate": 1e-3,
    "decay": 0.9,
    "epsilon": 1e-3,
    "augmentation": "shear 0.2, zoom 0.2, horizontal flip",
}


def run(options: Options, report: Report):
    """Trains the four networks.

    Args:
      options: seeds, epochs (20) of steps_per_epoch (2000), batch_size (80), dataset ('cifar100'), data_dir, variants,
        devices and checkpoints.
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name = options.dataset or "cifar100"
    epochs, steps = options.epochs or EPOCHS, options.steps_per_epoch or STEPS_PER_EPOCH
    batch_size = options.batch_size or BATCH_SIZE
    mesh = make_mesh(options)
    images = data.images(name, options.data_dir, report.reading)
    mean = float(images.train.x.mean())
    examples = Data(images.train, {"test": images.test}, functools.partial(prepare, mean=mean))
    chosen = variants(images.num_classes, epochs, batch_size, options)
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
            "epochs": epochs,
            "steps_per_epoch": steps,
            "batch_size": batch_size,
            "parallel": options.parallel,
            "devices": mesh.size,
            "groups": parallel.num_groups(mesh),
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
        }
        activation, _, place = variant.name.partition("_")
        results.add(trained, {"activation": activation, "batch_norm": place == "bn"}, metrics)
    panels = {
        "train_accuracy": "training accuracy (during the epoch)",
        "test_accuracy": "test accuracy",
        "train_loss": "training loss (during the epoch)",
        "test_loss": "test loss",
    }
    title = f"{name}, batch {batch_size}, {steps} steps an epoch, {options.seeds} seed{'s' * (options.seeds > 1)}"
    return results, {"learning_curves.png": plots.learning_curves(all_trained, panels, title)}


def variants(num_classes: int, epochs: int, batch_size: int, options: Options) -> dict[str, Variant]:
    """The four networks by name: `<activation>_<bn|none>`."""
    groups = parallel.index_groups(make_mesh(options)) if options.parallel == "pmap" else None
    norm = functools.partial(
        BatchNorm, epsilon=SETTINGS["epsilon"], axis_name=parallel.SYNC_AXIS, axis_index_groups=groups
    )
    optimizer = optax.rmsprop(SETTINGS["learning_rate"], decay=SETTINGS["decay"], eps=1e-7)
    found = {}
    for activation, function in ACTIVATIONS.items():
        for place, label in (("none", "no batch norm"), ("bn", "batch norm")):
            model = CifarNetwork(num_classes, norm if place == "bn" else None, function)
            variant = Variant(
                f"{activation}_{place}",
                f"{activation}, {label}",
                model,
                optimizer,
                train.cross_entropy,
                batch_size,
                epochs,
            )
            found[variant.name] = variant
    return found


def prepare(x, keys, *, mean: float):
    """Zero-centred float32 images, with the source's augmentation where there are keys.

    The source subtracts the test set's own mean from the test images; here the training set's serves for both.
    """
    x = x.astype(np.float32) - mean
    return x if keys is None else augment.random_affine_flip(x, keys, shear=0.2, zoom=0.2)
