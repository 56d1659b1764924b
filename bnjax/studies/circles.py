"""S1: two circles, one hidden layer of 50 units, with batch norm in six places or forms, and other normalizers."""

import dataclasses
import functools

import optax
from flax import linen as nn

from bnjax import studies, training
from bnjax.linen import BatchNorm, BatchRenorm, MovingBatchNorm
from bnjax.models import Perceptron, of_example
from bnjax.studies import Study, data, option
from bnjax.studies.engine import Examples, Job, Report, Variant, at_inference, evaluations, seed_keys, train_all
from bnjax.studies.evidence import Results, plots, read_claims


@dataclasses.dataclass(frozen=True)
class Options(studies.Options):
    """The options of a run of the circles."""

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
FRESH = 10_000  # further points, from another draw, on which the trained networks are tested

# name: (label, place, arguments of the batch norm)
VARIANTS = {
    "none": ("no batch norm", "none", {}),
    "after": ("after activation", "after", {}),
    "before": ("before activation", "before", {}),
    "no_scale_bias": ("after, no scale/bias", "after", {"use_scale": False, "use_bias": False}),
    "no_momentum": ("after, no momentum", "after", {"momentum": 0.0}),
    "input": ("on the input", "input", {}),
    "moving": ("after, running average in training", "after", {"norm": "moving batch norm"}),
    "renorm": ("batch renorm", "after", {"norm": "batch renorm"}),
    "layer": ("layer norm", "after", {"norm": "layer norm"}),
    "group": ("group norm", "after", {"norm": "group norm"}),
    "weight": ("weight norm", "none", {"norm": "weight norm"}),
}
NORMS = {
    "batch norm": BatchNorm,
    "batch renorm": BatchRenorm,
    "moving batch norm": MovingBatchNorm,
    "layer norm": of_example(nn.LayerNorm),
    "group norm": of_example(functools.partial(nn.GroupNorm, num_groups=10)),
}
SETTINGS = {"hidden": 50, "optimizer": "SGD", "learning_rate": 0.01, "momentum": 0.9, "batch_size": 32, "epsilon": 1e-3}
CLAIMS = read_claims(__file__)


def networks(options: Options) -> dict[str, Variant]:
    """Returns the networks by name."""
    optimizer = optax.sgd(SETTINGS["learning_rate"], SETTINGS["momentum"])
    how = {"optimizer": optimizer, "input_shape": (2,), "batch_size": SETTINGS["batch_size"]}
    variants = {}
    for name, (label, place, arguments) in VARIANTS.items():
        kind, given = arguments.get("norm", "batch norm"), {k: v for k, v in arguments.items() if k != "norm"}
        norm = None if place == "none" else functools.partial(NORMS[kind], **{"epsilon": SETTINGS["epsilon"], **given})
        init, is_weight_norm = nn.initializers.he_uniform(), kind == "weight norm"
        model = Perceptron((50,), 1, norm, place, hidden_init=init, weight_norm=is_weight_norm)
        variants[name] = Variant(name, label, model, objective=training.binary_cross_entropy, **how)
    return variants


def run(options: Options, report: Report):
    """Trains all variants and judges the claims."""
    circles, fresh, epochs = data.circles(), data.circles(2 * FRESH, seed=2).test, options.epochs
    results = Results(STUDY.name, {**SETTINGS, "epochs": epochs}, range(options.seeds))
    results.examples = dict.fromkeys(("test_accuracy", "population_test_accuracy"), len(circles.test.y))
    results.examples |= {"train_accuracy": len(circles.train.y), "fresh_accuracy": FRESH}
    examples = Examples.of(circles.train, {"fitted": circles.train, "test": circles.test})
    keys, count = {"key": seed_keys(results.seeds)}, len(circles.train.y)
    of_name = networks(options)
    jobs = [Job(network.epochs(epochs, count), keys, examples) for network in of_name.values()]
    all_trained = train_all(jobs, report, options)
    for trained in all_trained:
        network, (_, place, arguments) = of_name[trained.plan.name], VARIANTS[trained.plan.name]
        during = trained.final("train_accuracy", LAST)
        metrics = {
            **at_inference(network, trained.state, circles.train, circles.test),
            "fresh_accuracy": evaluations(network, trained.state, fresh).accuracy,
            "train_accuracy_during_epoch": during,
            "epochs_to_80_percent": trained.epochs_to("test_accuracy", THRESHOLD),
            "during_epoch_minus_test": during - trained.final("test_accuracy"),
            "unsteadiness_of_loss": trained.unsteadiness("train_loss"),
        }
        results.add(trained, {"place": place, **arguments}, metrics)
    half = results.metric("none", "epochs_to_80_percent") / 2
    results.set_metric("after", "epochs_beyond_half", results.metric("after", "epochs_to_80_percent") - half)
    results.judge(CLAIMS)
    main, after = all_trained[:3], all_trained[1]
    marks = {"train_accuracy": THRESHOLD, "test_accuracy": THRESHOLD}
    parts = {
        "learning_curves": ("Two circles", main),
        "extensions": ("Extensions", [after, *all_trained[3:7]]),
        "normalizers": ("Normalizers", [after, *all_trained[7:]]),
    }
    ending = f", 500 training points, {options.seeds} seeds: mean and 95 % interval"
    figures = {"histograms.png": plots.histograms(main)} | {
        f"{name}.png": plots.learning_curves(shown, plots.PANELS, title + ending, marks)
        for name, (title, shown) in parts.items()
    }
    return results, {**figures, "decision_boundaries.png": plots.decision_boundaries(all_trained[:6], circles.test)}
