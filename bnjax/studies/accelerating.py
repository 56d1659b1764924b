"""Two more of the changes that batch norm is said to allow: no local response normalization, and fewer distortions."""

import dataclasses
import functools

import numpy as np
import optax

from bnjax import studies
from bnjax.linen import BatchNorm
from bnjax.models import VGG
from bnjax.studies import Study, data, option
from bnjax.studies.data import augmentation
from bnjax.studies.engine import ONE_BY_ONE, Report, Variant, divisor_from, seed_keys, train
from bnjax.studies.evidence import Results, plots, read_claims, seeds_in_words


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the narrow VGGs."""

    seeds: int = option(5, "number of seeds")
    steps: int = option(1000, "steps of training")
    dataset: str = option("cifar10", "image set", choices=("cifar10", "cifar100"))
    width: int = option(8, "filters of VGG's first stage")


STUDY = Study(
    "accelerating",
    "a narrow VGG on CIFAR-10 with and without local response normalization and photometric distortions",
    "original paper notes, 'Accelerating BN networks'",
    Options,
    compiled="bn_lrn",
    source_size="a variant of Inception on ImageNet",
    order=5,
)

BATCH_SIZE, LEARNING_RATE, PARTS = 128, 0.1, 10
STRENGTH = 0.5  # strength of the photometric distortions
# name: (label, norm, local response normalization, distorted)
VARIANTS = {
    "none": ("no batch norm", None, False, False),
    "none_lrn": ("no batch norm, LRN", None, True, False),
    "bn": ("batch norm", BatchNorm, False, False),
    "bn_lrn": ("batch norm, LRN", BatchNorm, True, False),
    "none_distorted": ("no batch norm, distorted", None, False, True),
    "bn_distorted": ("batch norm, distorted", BatchNorm, False, True),
}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the six networks by name."""
    prepare, shape = augmentation.centered(images.train.x), images.train.x.shape[1:]
    how = {"optimizer": optax.sgd(LEARNING_RATE), "input_shape": shape, "batch_size": BATCH_SIZE, "preprocess": prepare}
    vgg = functools.partial(VGG, images.num_classes, depth=11, width=options.width)
    return {
        name: Variant(name, label, vgg(norm=norm, local_response_norm=has_lrn), **how)
        for name, (label, norm, has_lrn, _) in VARIANTS.items()
    }


def run(options: Options, report: Report):
    """Trains six narrow VGGs and judges A.5 and A.7."""
    dataset, steps, width = options.dataset, options.steps, options.width
    every = divisor_from(steps // PARTS, steps)
    images = data.images(dataset, options.data_dir, report.reading)
    settings = {"network": f"VGG-11 of width {width}", "optimizer": "SGD", "learning_rate": LEARNING_RATE}
    settings |= {"batch_size": BATCH_SIZE, "distortions": STRENGTH, "dataset": dataset, "steps": steps, "width": width}
    results = Results(STUDY.name, settings, range(options.seeds))
    results.examples = {"test_accuracy": len(images.test.y)}
    keys, curves = {"key": seed_keys(results.seeds)}, {}
    trainings = networks(options, images)
    report.expect(len(trainings))
    for name, network in trainings.items():
        step = _distorted_step(network) if VARIANTS[name][3] else network.step
        plan = network.plan(steps, step=step, part=every)
        trained = train(plan, keys, tuple(images.train), mapped=ONE_BY_ONE, report=report, options=options)
        accuracy = np.array([np.asarray(network.evaluate(s, *images.test).accuracy) for s in trained.states])
        curves[network.label] = parts = trained.curves["train_loss"]
        metrics = {"test_accuracy": accuracy, "final_loss": parts[:, -1]}
        results.add(trained, {"variant": name}, metrics, {"train_loss": np.asarray(trained.metrics.loss)})
    results.judge(CLAIMS)
    title = f"{dataset}, width {width}, {seeds_in_words(options.seeds)}"
    return results, {"training.png": plots.curves(curves, every * np.arange(steps // every), "training loss", title)}


def _distorted_step(network: Variant):
    """Makes a training step on distorted images."""
    plain = dataclasses.replace(network, preprocess=None)
    return lambda state, x, y, key: plain.step(
        state, augmentation.distorted(network.prepared(x), key, STRENGTH), y, key
    )
