"""What S2's perceptron depends on: learning rate, initial scale, batch size, regularization, place and normalizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis, studies, training
from bnjax.analysis import losses
from bnjax.studies import Study, data, option
from bnjax.studies.engine.plan import Variant, compiler_options, random_batch, seed_keys
from bnjax.studies.engine.training import Report, in_threads, train
from bnjax.studies.evidence import plots
from bnjax.studies.evidence.claims import AtLeast, Claim, Condition, Source
from bnjax.studies.evidence.plots import Figure
from bnjax.studies.evidence.results import Results
from bnjax.studies.evidence.statistics import seeds_in_words
from bnjax.studies.perceptrons import (
    BATCH_SIZE,
    BATCH_SIZES,
    CASES,
    DEFAULTS,
    NETWORKS,
    SWEEPS,
    Case,
    fixed_batch,
    optimizer,
)


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """What a run of the perceptrons may choose."""

    seeds: int = option(8, "number of seeds")
    steps: int = option(750, "steps of training", shown="750 of 32 examples, as many examples at other batch sizes")
    variants: tuple[str, ...] | None = option(None, "which networks to train", shown="all", metavar="A,B,…")


STUDY = Study(
    "sensitivity",
    "a perceptron on MNIST over learning rates, initial scales, batch sizes, regularizers and normalizers",
    "S1 to S3, statements without numbers",
    Options,
    compiled="deep_bn",
    fast={"seeds": 6, "steps": 90, "variants": ("deep_none", "deep_bn")},
    source_size="statements only",
    order=4,
)

EXAMPLES = 24_000  # that a training sees
SMALL_SET = 3000  # examples of the trainings that overfit
MEASURED = 6  # times in a training

_NEEDS = {"dataset": "mnist", "examples": AtLeast(EXAMPLES)}
_NOTES, _CIRCLES, _MNIST, _IOFFE = (
    Source(name, _NEEDS)
    for name in ("original paper notes", "circles case study", "MNIST assignment", "Ioffe 2017 (arXiv 1702.03275)")
)


def _spread(claim: str, what: str, sweep: str) -> Claim:
    values = ", ".join(f"{value:g}" for value in SWEEPS[sweep])
    return _MNIST.claim(
        claim,
        f"with batch norm training is less sensitive to the {what}",
        f"largest minus smallest test accuracy over {values}: the paired difference is negative",
        Condition("with − without", f"range_over_{sweep}", "bn", "none", high=0),
    )


CLAIMS = (
    _spread("S2.5", "initialization", "init_scale"),
    _spread("S2.6", "learning rate", "learning_rate"),
    _MNIST.claim(
        "S2.7",
        "very small batches hurt batch norm",
        "test accuracy at batch 2 is below that at batch 32, and by more than without batch norm",
        Condition("batch 2 − 32", "test_accuracy", "bn, batch 2", "bn", high=0),
        Condition("lost with − without", "lost_at_batch_2", "bn", "none", low=0),
    ),
    _MNIST.claim(
        "S2.9",
        "batch norm keeps gradients from exploding",
        "kernels ten times as large multiply the first layer's gradient, at the start, by more than 10 without batch "
        "norm, and by at most 2 with it",
        Condition("without", "gradient_growth", "none", low=10, digits=1),
        Condition("with", "gradient_growth", "bn", high=2, digits=2),
        needs={"dataset": "mnist"},
    ),
    _MNIST.claim(
        "S2.10",
        "extremely large batches may degrade the generalization of batch norm",
        f"as many examples in batches of {BATCH_SIZES[-1]} give a lower test accuracy than in batches of {BATCH_SIZE}",
        Condition("largest − default", "test_accuracy", f"bn, batch {BATCH_SIZES[-1]}", "bn", high=0),
    ),
    _MNIST.claim(
        "S2.11",
        "batch norm may not bring much on small data sets",
        f"trained on {SMALL_SET} images, it raises the test accuracy by at most a point",
        Condition("with − without", "test_accuracy", "bn, small set", "none, small set", high=0.01),
    ),
    _MNIST.claim(
        "S2.12",
        "batch norm makes the network robust to the scale of the input, with less need for preprocessing",
        "pixels up to 255 instead of 1 cost less test accuracy with it",
        Condition("lost with − without", "lost_by_raw_pixels", "bn", "none", high=0),
    ),
    _MNIST.claim(
        "S2.8",
        "batch norm keeps gradients from vanishing",
        "eight sigmoid layers: the first layer's gradient over the last's, at the start, is above 0.1 with it and "
        "below 0.01 without",
        Condition("with", "first_to_last_gradient", "deep_bn", low=0.1),
        Condition("without", "first_to_last_gradient", "deep_none", high=0.01, digits=None),
        needs={"dataset": "mnist"},
    ),
    _CIRCLES.claim(
        "S1.6",
        "batch norm regularizes: it reduces generalization error",
        f"trained on {SMALL_SET} images, the test accuracy is higher and the gap to the training accuracy smaller",
        Condition("test accuracy with − without", "test_accuracy", "bn, small set", "none, small set", low=0),
        Condition("gap with − without", "generalization_gap", "bn, small set", "none, small set", high=0),
    ),
    _CIRCLES.claim(
        "S1.7",
        "batch norm should not be used together with dropout",
        f"trained on {SMALL_SET} images, dropout lowers the test accuracy with batch norm, at either rate",
        *(
            Condition(
                f"with dropout {rate} − 0", "test_accuracy", f"bn_dropout_{rate}, small set", "bn, small set", high=0
            )
            for rate in (0.2, 0.5)
        ),
    ),
    _CIRCLES.claim(
        "S1.8",
        "after s-shaped activations batch norm is more appropriate, before them for rectified linear ones",
        "test accuracy is higher after than before for sigmoid and tanh, and before than after for ReLU",
        Condition("sigmoid after − before", "test_accuracy", "sigmoid_after", "sigmoid_before", low=0),
        Condition("tanh after − before", "test_accuracy", "tanh_after", "tanh_before", low=0),
        Condition("ReLU before − after", "test_accuracy", "bn", "relu_after", low=0),
    ),
    _NOTES.claim(
        "S3.6",
        "with batch norm dropout can be reduced or removed",
        f"trained on {SMALL_SET} images, batch norm without dropout does not lose to the plain network with it, at "
        "either rate, by more than 0.5 points of test accuracy",
        *(
            Condition(
                f"batch norm − dropout {rate}",
                "test_accuracy",
                "bn, small set",
                f"none_dropout_{rate}, small set",
                low=-0.005,
            )
            for rate in (0.2, 0.5)
        ),
    ),
    _NOTES.claim(
        "A.1",
        "with batch norm the learning rate can be raised with no ill effect",
        "ten times the rate costs at most half a point of test accuracy with it, and less than without",
        Condition("lost", "lost_at_10_times", "bn", high=0.005, is_difference=True),
        Condition("lost with − without", "lost_at_10_times", "bn", "none", high=0),
        published="5 and 30 times (ImageNet)",
    ),
    _NOTES.claim(
        "A.2",
        "removing dropout from a batch-normalized network speeds training up without more overfitting",
        f"trained on {SMALL_SET} images, without dropout of 0.5 the training accuracy is higher, and the test accuracy "
        "at most half a point lower",
        Condition("training accuracy", "train_accuracy", "bn, small set", "bn_dropout_0.5, small set", low=0),
        Condition("test accuracy", "test_accuracy", "bn, small set", "bn_dropout_0.5, small set", low=-0.005),
    ),
    _NOTES.claim(
        "A.3",
        "with batch norm the weight regularization can be reduced",
        f"trained on {SMALL_SET} images, what the better of 1e-3 and 1e-2 gains over no regularization is smaller "
        "with it",
        Condition("gain with − without", "gain_by_l2", "bn, small set", "none, small set", high=0),
        published="a fifth of it",
    ),
    _NOTES.claim(
        "A.4",
        "with batch norm the learning rate can decay faster",
        "decaying to exp(−6) in place of exp(−1) loses less test accuracy with it than without",
        Condition("lost with − without", "lost_by_fast_decay", "bn", "none", high=0),
        published="6 times faster",
    ),
    _NOTES.claim(
        "A.6",
        "batch norm profits from shuffling more thoroughly",
        f"trained on {SMALL_SET} images, batches drawn anew give a higher test accuracy than batches that stay the "
        "same, and gain more with it than without",
        Condition("gain", "gain_by_shuffling", "bn, small set", low=0, is_difference=True),
        Condition("gain with − without", "gain_by_shuffling", "bn, small set", "none, small set", low=0),
        published="1 % of validation accuracy (ImageNet)",
    ),
    _IOFFE.claim(
        "R.1",
        "batch renormalization helps where batches are small",
        "test accuracy at batch 4 is above that of batch norm",
        Condition("renorm − batch norm, batch 4", "test_accuracy", "renorm, batch 4", "bn, batch 4", low=0),
    ),
)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """The networks at the default settings, by name."""
    at_default = optimizer(options.steps, *(DEFAULTS[key] for key in ("learning_rate", "l2", "decay")))
    shape = (images.train.x[0].size,)
    return options.selected(
        {
            name: Variant(name, label, build(), at_default, shape, BATCH_SIZE)
            for name, (label, build) in NETWORKS.items()
        }
    )


def run(options: Options, report: Report):
    """Trains `CASES` and judges the claims on what a network depends on."""
    dataset, examples = options.dataset, BATCH_SIZE * options.steps
    images = data.images(dataset, options.data_dir, report.reading)
    variants = networks(options, images)
    train_set, test = (data.Split(data.pixels(split.x), split.y) for split in (images.train, images.test))
    sets = {False: train_set, True: data.Split(train_set.x[:SMALL_SET], train_set.y[:SMALL_SET])}
    settings = {"optimizer": "Adam", "dataset": dataset, "examples": examples, "small_set": SMALL_SET, **DEFAULTS}
    results = Results(STUDY.name, settings, range(options.seeds))

    def work(case: Case, report: Report) -> Results:
        part = Results(STUDY.name, settings, range(options.seeds))
        label = f"{NETWORKS[case.network][0]}{case.name.removeprefix(case.network)}"
        named = {"name": case.name, "label": label, "batch_size": case.batch_size}
        steps = max(MEASURED, examples // case.batch_size // MEASURED * MEASURED)
        train_part, test_part = sets[case.is_small], test
        if case.pixel_scale != 1:
            train_part, test_part = (
                data.Split(x * np.float32(case.pixel_scale), y) for x, y in (train_part, test_part)
            )
        network = dataclasses.replace(variants[case.network], **named)
        _train(part, case, network, train_part, test_part, steps, report, options)
        return part

    for part in in_threads(work, [case for case in CASES if case.network in variants], report):
        results.variants |= part.variants
        results.arrays |= part.arrays
        results.parameters |= part.parameters
    compared = [network for network in ("none", "bn") if network in results.variants]
    _compare(results, compared)
    results.judge(CLAIMS)
    return results, _figures(results, compared, f"{dataset}, {seeds_in_words(options.seeds)}")


def _train(
    results, case: Case, network: Variant, train_set, test, steps: int, report: Report, options: Options
) -> None:
    """Trains one case at all settings and seeds, and adds its variants to the results."""
    cells, seeds, model = case.settings, options.seeds, network.model
    settings = {key: jnp.repeat(jnp.array([c[key] for c in cells.values()]), seeds) for key in DEFAULTS}
    settings["key"] = jnp.tile(seed_keys(results.seeds), len(cells))
    held_out = jax.tree.map(jnp.asarray, test)

    def create(setting):
        changing = optimizer(steps, setting["learning_rate"], setting["l2"], setting["decay"])
        state = dataclasses.replace(network, optimizer=changing).create(setting)

        def scaled(path, p):
            return p * setting["init_scale"] if path[-1].key == "kernel" else p

        return state.replace(params=jax.tree.map_with_path(scaled, state.params))

    def measure(state, x, y, key):
        variables = {"batch_stats": state.batch_stats}
        loss = losses.linen_loss(model, variables, training.cross_entropy, rngs={"dropout": key})
        ends = ["Dense_0", f"Dense_{len(model.hidden)}"]
        first, last = analysis.gradient_norms(loss, state.params, x, y, layers=ends).values()
        accuracy = jnp.mean(training.evaluate(state, *held_out, objective=training.cross_entropy).accuracy)
        return {"test_accuracy": accuracy, "first_to_last_gradient": first / last, "first_gradient": first}

    draw = (fixed_batch if case.is_fixed else random_batch)(case.batch_size)
    how: dict[str, Any] = {"every": steps // MEASURED, "compiler_options": compiler_options(steps)}
    plan = network.plan(steps, create=create, draw=draw, measure=measure, **how)
    trained = train(plan, settings, tuple(train_set), report=report, options=options)
    evaluate = jax.jit(
        jax.vmap(lambda s, x, y: training.evaluate(s, x, y, objective=training.cross_entropy), (0, None, None)),
        compiler_options=compiler_options(),
    )
    on_test, on_training = (
        jax.tree.map(lambda v: np.asarray(v.mean(1)), evaluate(trained.state, split.x[:10_000], split.y[:10_000]))
        for split in (test, train_set)
    )
    at_start = {key: np.asarray(values)[:, 0] for key, values in trained.measurements.items() if "gradient" in key}
    metrics = {
        "test_accuracy": on_test.accuracy,
        "train_accuracy": on_training.accuracy,
        "generalization_gap": on_training.accuracy - on_test.accuracy,
        **at_start,
    }
    curve = np.concatenate([trained.measurements["test_accuracy"], on_test.accuracy[:, None]], 1)
    for number, (name, cell) in enumerate(cells.items()):
        rows = slice(number * seeds, (number + 1) * seeds)
        results.variants[name] = (
            network.label + name.removeprefix(case.name),
            {"network": case.network, "batch_size": case.batch_size, **cell},
            {metric: values[rows] for metric, values in metrics.items()},
        )
        results.arrays[f"{name}/test_accuracy"] = curve[rows]
        results.add_parameters(name, trained.parameters, trained.histograms if number == 0 else {})


def _compare(results: Results, networks: Sequence[str]) -> None:
    """Adds the numbers that compare trainings of one network at the same seeds."""

    def accuracy(variant: str) -> np.ndarray:
        return results.metric(variant, "test_accuracy")

    for network in networks:
        for sweep in SWEEPS:
            found = np.stack([accuracy(name) for name in Case(network, {sweep: SWEEPS[sweep]}).settings])
            results.set_metric(network, f"range_over_{sweep}", found.max(0) - found.min(0))
        for lost, other in (
            ("lost_at_batch_2", "batch 2"),
            ("lost_at_10_times", "learning_rate 0.01"),
            ("lost_by_raw_pixels", "pixels to 255"),
        ):
            results.set_metric(network, lost, accuracy(network) - accuracy(f"{network}, {other}"))
        fast, slow = (accuracy(f"{network}, decay {value:g}") for value in (6, 1))
        results.set_metric(network, "lost_by_fast_decay", slow - fast)
        larger, default = (results.metric(f"{network}{name}", "first_gradient") for name in (", init_scale 10", ""))
        results.set_metric(network, "gradient_growth", larger / default)
        small = f"{network}, small set"
        better = np.maximum(*(accuracy(f"{small}, l2 {value:g}") for value in (1e-3, 1e-2)))
        results.set_metric(small, "gain_by_l2", better - accuracy(small))
        results.set_metric(small, "gain_by_shuffling", accuracy(small) - accuracy(f"{small}, fixed batches"))


def _figures(results: Results, networks: Sequence[str], title: str) -> dict[str, Figure]:
    """Test accuracy over each sweep."""
    figures = {}
    if not networks:
        return figures
    for sweep, values in SWEEPS.items():
        if sweep == "decay":
            continue
        series = {}
        for network in networks:
            names = Case(network, {sweep: values}).settings
            by_value = {settings[sweep]: results.metric(name, "test_accuracy") for name, settings in names.items()}
            series[NETWORKS[network][0]] = [by_value[value] for value in values]
        text = sweep.replace("_", " ")
        figures[f"{sweep}.png"] = plots.sweep(values, series, text, title)
    series = {
        NETWORKS[name][0]: [results.metric(Case(name, {}, size).name, "test_accuracy") for size in BATCH_SIZES]
        for name in ("none", "bn", "renorm", "layer")
        if name in results.variants
    }
    figures["batch_sizes.png"] = plots.sweep(BATCH_SIZES, series, "batch size", title, base=2)
    return figures
