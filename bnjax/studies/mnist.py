"""S2: a perceptron 784 → 64 → 64 → 10 on MNIST with and without batch norm, over batch sizes."""

import numpy as np
import optax

from bnjax import data, train
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.studies import Options, plots
from bnjax.studies.experiment import Job, Report, Variant, train_variants
from bnjax.studies.results import Claim, Results, interval, prediction_interval, within

SOURCE = "MNIST assignment"
PLACES = {"none": "no batch norm", "before": "batch norm"}
BATCH_SIZES = (16, 32, 64, 128, 256)
PUBLISHED_WITHOUT = {16: 0.9745, 32: 0.9718, 64: 0.9709, 128: 0.9720}
PUBLISHED = {"none": 0.9706, "before": 0.9723}
THRESHOLD = 0.97
SETTINGS = {
    "hidden": [64, 64],
    "optimizer": "Adam",
    "learning_rate": 1e-3,
    "validation": "last fifth of training",
    "epsilon": 1e-3,
}


def run(options: Options, report: Report):
    """Trains with and without batch norm at each batch size and checks S2.1 to S2.4 (on MNIST, at 10 epochs).

    Args:
      options: seeds, epochs (10), dataset ('mnist'), data_dir and batch sizes (16 to 256).
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name, epochs = options.dataset or "mnist", options.epochs or 10
    batch_sizes = options.batch_sizes or BATCH_SIZES
    images = data.images(name, options.data_dir, report.reading)
    x, y = _pixels(images.train.x), images.train.y
    kept = len(x) - len(x) // 5
    training, validation = data.Split(x[:kept], y[:kept]), data.Split(x[kept:], y[kept:])
    test = data.Split(_pixels(images.test.x), images.test.y)
    too_large = [size for size in batch_sizes if size > kept]
    if too_large:
        raise ValueError(f"--batch-sizes must not exceed the {kept} training examples, got {too_large[0]}.")
    results = Results(
        "mnist", {**SETTINGS, "dataset": name, "epochs": epochs, "batch_sizes": list(batch_sizes)}, range(options.seeds)
    )
    jobs = []
    for size in batch_sizes:
        for place, label in PLACES.items():
            model = Perceptron((64, 64), images.num_classes, None if place == "none" else _norm, place)
            optimizer = optax.adam(SETTINGS["learning_rate"], eps=1e-7)
            label = f"{label}, batch {size}"
            variant = Variant(f"{place}_{size}", label, model, optimizer, train.cross_entropy, size, epochs)
            jobs.append(Job(variant, training, {"validation": validation, "test": test}))
    all_trained = {
        trained.variant.name: trained for trained in train_variants(jobs, results.seeds, report, options.saving)
    }
    for trained in all_trained.values():
        metrics = {
            "test_accuracy": trained.final("test_accuracy"),
            "validation_accuracy": trained.final("validation_accuracy"),
            "train_accuracy_during_epoch": trained.final("train_accuracy"),
            "validation_loss": trained.final("validation_loss"),
            "epochs_to_97_percent": trained.epochs_to("validation_accuracy", THRESHOLD),
        }
        place, size = trained.variant.name.split("_")
        results.add(trained, {"place": place, "batch_size": int(size)}, metrics)
    if name == "mnist" and epochs == 10:
        results.claims = claims(results, batch_sizes)
    shown = 32 if 32 in batch_sizes else batch_sizes[0]
    pair = [all_trained[f"{place}_{shown}"] for place in ("none", "before")]
    panels = {
        "train_accuracy": "training accuracy (during the epoch)",
        "validation_accuracy": "validation accuracy",
        "train_loss": "training loss (during the epoch)",
        "validation_loss": "validation loss",
    }
    series = {
        label: [results.metric(f"{place}_{size}", "test_accuracy") for size in batch_sizes]
        for place, label in (("none", "without batch norm"), ("before", "with batch norm"))
    }
    published = PUBLISHED_WITHOUT if name == "mnist" else {}
    figures = {
        "histograms.png": plots.histograms(pair, "First seed: values over training, darker where there are more"),
        "learning_curves.png": plots.learning_curves(
            pair, panels, f"{name}, batch {shown}, {options.seeds} seeds: mean and 95 % interval"
        ),
        "batch_sizes.png": plots.batch_size_sweep(
            batch_sizes, series, published, f"{name}, {epochs} epochs, {options.seeds} seeds"
        ),
    }
    return results, figures


def _norm(*, use_running_average: bool) -> BatchNorm:
    return BatchNorm(use_running_average=use_running_average, epsilon=SETTINGS["epsilon"])


def _pixels(images: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], one float32 vector for each image."""
    return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)


def claims(results: Results, batch_sizes: tuple[int, ...]) -> list[Claim]:
    """S2.1 to S2.4 with their verdicts, as far as their batch sizes were run."""
    rule = "the published number lies in the 95 % prediction interval of one run"

    def one_run(claim: str, variant: str, statement: str, published: float) -> Claim:
        expected = prediction_interval(results.metric(variant, "test_accuracy"))
        measured = f"{expected.mean:.4f} [{expected.low:.4f}, {expected.high:.4f}]"
        hit = bool(expected.low <= published <= expected.high) if expected.n > 1 else None
        return Claim(claim, SOURCE, statement, f"{published:.4f} (one run)", rule, measured, (hit,))

    found = []
    if 32 in batch_sizes:
        found += [
            one_run("S2.1", "none_32", "test accuracy without batch norm, batch 32", PUBLISHED["none"]),
            one_run("S2.2", "before_32", "test accuracy with batch norm, batch 32", PUBLISHED["before"]),
        ]
    for size, published in PUBLISHED_WITHOUT.items():
        if size in batch_sizes:
            found.append(one_run("S2.3", f"none_{size}", f"test accuracy without batch norm, batch {size}", published))
    if 32 in batch_sizes:
        speed = {place: interval(results.metric(f"{place}_32", "epochs_to_97_percent")) for place in PUBLISHED}
        fewer = results.difference("epochs_to_97_percent", "before_32", "none_32")
        found.append(
            Claim(
                "S2.4",
                SOURCE,
                "with batch norm training converges in fewer epochs",
                "fewer",
                "first epoch of 97 % validation accuracy, batch 32: the paired difference is negative",
                f"{speed['before'].text(1)} with, {speed['none'].text(1)} without; difference {fewer.text(1)}",
                (within(fewer, -np.inf, 0),),
            )
        )
    return found
