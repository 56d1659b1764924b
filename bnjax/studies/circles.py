"""S1: two circles, one hidden layer of 50 units, with batch norm in six places or forms."""

import functools

import numpy as np
import optax
from flax import linen as nn

from bnjax import data, train
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.studies import Options, plots
from bnjax.studies.experiment import Job, Report, Variant, train_variants
from bnjax.studies.results import Claim, Results, interval, within

SOURCE = "circles case study"
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
}
SETTINGS = {"hidden": 50, "optimizer": "SGD", "learning_rate": 0.01, "momentum": 0.9, "batch_size": 32, "epsilon": 1e-3}


def run(options: Options, report: Report):
    """Trains all six variants and checks S1.1 to S1.5.

    Args:
      options: seeds and epochs (100).
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    circles, epochs = data.circles(), options.epochs or 100
    results = Results("circles", {**SETTINGS, "epochs": epochs}, range(options.seeds))
    jobs = []
    splits = {"fitted": circles.train, "test": circles.test}
    for name, (label, place, arguments) in VARIANTS.items():
        norm = None if place == "none" else functools.partial(BatchNorm, epsilon=SETTINGS["epsilon"], **arguments)
        model = Perceptron((50,), 1, norm, place, hidden_init=nn.initializers.he_uniform())
        optimizer = optax.sgd(SETTINGS["learning_rate"], SETTINGS["momentum"])
        variant = Variant(name, label, model, optimizer, train.binary_cross_entropy, SETTINGS["batch_size"], epochs)
        jobs.append(Job(variant, circles.train, splits))
    all_trained = train_variants(jobs, results.seeds, report, options.saving)
    for trained in all_trained:
        _, place, arguments = VARIANTS[trained.variant.name]
        results.add(
            trained,
            {"place": place, **arguments},
            {
                "train_accuracy": trained.final("fitted_accuracy"),
                "test_accuracy": trained.final("test_accuracy"),
                "train_accuracy_during_epoch": trained.final("train_accuracy", LAST),
                "epochs_to_80_percent": trained.epochs_to("test_accuracy", THRESHOLD),
            },
        )
    results.claims = claims(results)
    main = all_trained[:3]
    panels = {
        "train_accuracy": "training accuracy (during the epoch)",
        "test_accuracy": "test accuracy",
        "train_loss": "training loss (during the epoch)",
        "test_loss": "test loss",
    }
    marks = {"train_accuracy": THRESHOLD, "test_accuracy": THRESHOLD}
    title = f"Two circles, {options.seeds} seeds: mean and 95 % interval"
    figures = {
        "histograms.png": plots.histograms(main, "First seed: values over training, darker where there are more"),
        "learning_curves.png": plots.learning_curves(main, panels, title, marks),
        "extensions.png": plots.learning_curves(
            [all_trained[1], *all_trained[3:]],
            panels,
            f"Extensions, {options.seeds} seeds: mean and 95 % interval",
            marks,
        ),
        "decision_boundaries.png": plots.decision_boundaries(
            all_trained, circles.test, "Test examples and the decision boundary of the first seed"
        ),
    }
    return results, figures


def claims(results: Results) -> list[Claim]:
    """S1.1 to S1.5 with their verdicts."""
    test = {name: interval(results.metric(name, "test_accuracy")) for name in ("none", "after", "before")}
    during = interval(results.metric("before", "train_accuracy_during_epoch"))
    speed = {name: interval(results.metric(name, "epochs_to_80_percent")) for name in ("none", "after", "before")}
    same = results.difference("test_accuracy", "after", "none")
    better = results.difference("test_accuracy", "after", "before")
    pace = results.difference("epochs_to_80_percent", "before", "none")
    gaps = {
        name: interval(results.metric(name, "train_accuracy_during_epoch") - results.metric(name, "test_accuracy"))
        for name in ("after", "before")
    }
    return [
        Claim(
            "S1.1",
            SOURCE,
            "test accuracy ends near 84 % with batch norm after the activation, similar to none",
            "about 0.84",
            "the mean lies in 0.84 ± 0.02, and the paired difference to none in ± 0.02",
            f"{test['after'].text()}; difference {same.text()}",
            (within(test["after"], 0.82, 0.86), within(same, -0.02, 0.02)),
        ),
        Claim(
            "S1.2",
            SOURCE,
            "test accuracy passes 80 % within 20 epochs with batch norm after the activation, instead of 30 to 40",
            "≤ 20 against 30 to 40",
            "the mean epoch is at most 20 with it, and in 30 to 40 without",
            f"{speed['after'].text(1)} against {speed['none'].text(1)}",
            (within(speed["after"], 0, 20), within(speed["none"], 30, 40)),
        ),
        Claim(
            "S1.3",
            SOURCE,
            "with batch norm the training accuracy measured during the epoch ends below the test accuracy",
            "below",
            f"mean over the last {LAST} epochs minus final test accuracy is negative, after and before",
            f"after {gaps['after'].text()}, before {gaps['before'].text()}",
            (within(gaps["after"], -np.inf, 0), within(gaps["before"], -np.inf, 0)),
        ),
        Claim(
            "S1.4",
            SOURCE,
            "before the activation it learns about as fast as none, with training accuracy around 70 to 75 %",
            "0.70 to 0.75",
            f"mean training accuracy of the last {LAST} epochs in 0.70 to 0.75, and the paired difference in epochs "
            "to 80 % within ± 10",
            f"{during.text()}; {pace.text(1)} epochs later than none",
            (within(during, 0.70, 0.75), within(pace, -10, 10)),
        ),
        Claim(
            "S1.5",
            SOURCE,
            "batch norm after the activation ends better than before it",
            "better",
            "the paired difference in final test accuracy is positive",
            better.text(),
            (within(better, 0, np.inf),),
        ),
    ]
