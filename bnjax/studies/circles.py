"""S1: two circles, one hidden layer of 50 units, with batch norm in six places or forms, and other normalizers."""

import dataclasses
import functools
from typing import Any

import optax
from flax import linen as nn

from bnjax import studies, training
from bnjax.linen import BatchNorm, BatchRenorm
from bnjax.models import Perceptron, of_example
from bnjax.studies import Study, data, option
from bnjax.studies.engine.plan import Examples, Variant, seed_keys
from bnjax.studies.engine.training import Job, Report, train_all
from bnjax.studies.evidence import plots
from bnjax.studies.evidence.claims import read_claims
from bnjax.studies.evidence.results import Results


@dataclasses.dataclass(frozen=True)
class Options(studies.Options):
    """What a run of the circles may choose."""

    seeds: int = option(32, "number of seeds")
    epochs: int = option(100, "epochs of training")


STUDY = Study(
    "circles",
    "two circles, one hidden layer: batch norm after, before the activation, on the input; other normalizers",
    "S1, circles case study (Keras)",
    Options,
    compiled="after",
    fast={"seeds": 16},
    order=1,
)

THRESHOLD = 0.8
LAST = 10  # epochs over which accuracies that fluctuate are averaged

# name: (label, place, arguments of the batch norm)
VARIANTS = {
    "none": ("no batch norm", "none", {}),
    "after": ("after activation", "after", {}),
    "before": ("before activation", "before", {}),
    "no_scale_bias": ("after, no scale/bias", "after", {"use_scale": False, "use_bias": False}),
    "no_momentum": ("after, no momentum", "after", {"momentum": 0.0}),
    "input": ("on the input", "input", {}),
    "renorm": ("batch renorm", "after", {"norm": "batch renorm"}),
    "layer": ("layer norm", "after", {"norm": "layer norm"}),
    "group": ("group norm", "after", {"norm": "group norm"}),
    "weight": ("weight norm", "none", {"norm": "weight norm"}),
}
NORMS = {
    "batch norm": BatchNorm,
    "batch renorm": BatchRenorm,
    "layer norm": of_example(nn.LayerNorm),
    "group norm": of_example(functools.partial(nn.GroupNorm, num_groups=10)),
}
SETTINGS = {"hidden": 50, "optimizer": "SGD", "learning_rate": 0.01, "momentum": 0.9, "batch_size": 32, "epsilon": 1e-3}

CLAIMS = read_claims(__file__)


def networks(options: Options) -> dict[str, Variant]:
    """The ten networks by name."""
    variants = {}
    for name, (label, place, arguments) in VARIANTS.items():
        given: dict[str, Any] = {"epsilon": SETTINGS["epsilon"], **arguments}
        kind = given.pop("norm", "batch norm")
        norm = None if place == "none" else functools.partial(NORMS[kind], **given)
        init = nn.initializers.he_uniform()
        model = Perceptron((50,), 1, norm, place, hidden_init=init, weight_norm=kind == "weight norm")
        optimizer = optax.sgd(SETTINGS["learning_rate"], SETTINGS["momentum"])
        objective = training.binary_cross_entropy
        variants[name] = Variant(name, label, model, optimizer, (2,), SETTINGS["batch_size"], objective)
    return variants


def run(options: Options, report: Report):
    """Trains all variants and judges the claims."""
    circles, epochs = data.circles(), options.epochs
    results = Results(STUDY.name, {**SETTINGS, "epochs": epochs}, range(options.seeds))
    examples = Examples.of(circles.train, {"fitted": circles.train, "test": circles.test})
    keys, count = {"key": seed_keys(results.seeds)}, len(circles.train.y)
    jobs = [Job(network.epochs(epochs, count), keys, examples) for network in networks(options).values()]
    all_trained = train_all(jobs, report, options)
    for trained in all_trained:
        _, place, arguments = VARIANTS[trained.plan.name]
        results.add(
            trained,
            {"place": place, **arguments},
            {
                "train_accuracy": trained.final("fitted_accuracy"),
                "test_accuracy": trained.final("test_accuracy"),
                "train_accuracy_during_epoch": trained.final("train_accuracy", LAST),
                "epochs_to_80_percent": trained.epochs_to("test_accuracy", THRESHOLD),
                "during_epoch_minus_test": trained.final("train_accuracy", LAST) - trained.final("test_accuracy"),
            },
        )
    half = results.metric("none", "epochs_to_80_percent") / 2
    results.set_metric("after", "epochs_beyond_half", results.metric("after", "epochs_to_80_percent") - half)
    results.judge(CLAIMS)
    main = all_trained[:3]
    marks = {"train_accuracy": THRESHOLD, "test_accuracy": THRESHOLD}
    ending = f", {options.seeds} seeds: mean and 95 % interval"
    figures = {
        "histograms.png": plots.histograms(main),
        "learning_curves.png": plots.learning_curves(main, plots.PANELS, "Two circles" + ending, marks),
        "extensions.png": plots.learning_curves(
            [all_trained[1], *all_trained[3:6]], plots.PANELS, "Extensions" + ending, marks
        ),
        "normalizers.png": plots.learning_curves(
            [all_trained[1], *all_trained[6:]], plots.PANELS, "Normalizers" + ending, marks
        ),
        "decision_boundaries.png": plots.decision_boundaries(all_trained[:6], circles.test),
    }
    return results, figures
