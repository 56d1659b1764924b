"""S2's perceptron over learning rates, initial scales, batch sizes, regularization, places and normalizers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis, studies
from bnjax.studies import Study, data, engine, option, perceptrons
from bnjax.studies.engine import Report, Trained, Variant, compiler_options, seed_keys
from bnjax.studies.evidence import Results, plots, read_claims, seeds_in_words
from bnjax.studies.perceptrons import BATCH_SIZE, BATCH_SIZES, CASES, DEFAULTS, NETWORKS, SWEEPS, Case


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the perceptrons."""

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

SMALL_SET = 3000  # examples of the trainings that overfit
MEASURED = 6  # measurements in a training
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the networks at the default settings, by name."""
    optimizer = functools.partial(perceptrons.optimizer, options.steps)
    how = {"optimizer": optimizer, "input_shape": (images.train.x[0].size,), "batch_size": BATCH_SIZE}
    return options.selected({name: Variant(name, label, model, **how) for name, (label, model) in NETWORKS.items()})


def run(options: Options, report: Report):
    """Trains `CASES` and judges the claims on what a network depends on."""
    dataset = options.dataset
    images = data.images(dataset, options.data_dir, report.reading).map(data.pixels)
    variants, train_set, test = networks(options, images), images.train, images.test
    small_set = data.Split(train_set.x[:SMALL_SET], train_set.y[:SMALL_SET])
    settings = {"optimizer": "Adam", "dataset": dataset, "examples": BATCH_SIZE * options.steps}
    results = Results(STUDY.name, {**settings, "small_set": SMALL_SET, **DEFAULTS}, range(options.seeds))

    def work(case: Case, report: Report) -> tuple[Trained, dict[str, Any], np.ndarray]:
        examples, held_out = small_set if case.is_small else train_set, test
        if case.pixel_scale != 1:
            examples, held_out = (data.Split(x * np.float32(case.pixel_scale), y) for x, y in (examples, held_out))
        label = f"{NETWORKS[case.network][0]}{case.name.removeprefix(case.network)}"
        named = {"name": case.name, "label": label, "batch_size": case.batch_size}
        network = dataclasses.replace(variants[case.network], **named)
        return _train(case, network, examples, held_out, report, options)

    cases = [case for case in CASES if case.network in variants]
    for case, (trained, metrics, curve) in zip(cases, engine.in_threads(work, cases, report), strict=True):
        for number, (name, cell) in enumerate(case.settings.items()):
            rows = slice(number * options.seeds, (number + 1) * options.seeds)
            label, histograms = trained.plan.label + name.removeprefix(case.name), {} if number else trained.histograms
            plan = dataclasses.replace(trained.plan, name=name, label=label)
            shown = {"network": case.network, "batch_size": case.batch_size, **cell}
            of_cell = {metric: values[rows] for metric, values in metrics.items()}
            trained_so = dataclasses.replace(trained, plan=plan, histograms=histograms)
            results.add(trained_so, shown, of_cell, {"test_accuracy": curve[rows]})
    compared = [network for network in ("none", "bn") if network in results.variants]
    _compare(results, compared)
    results.judge(CLAIMS)
    return results, _figures(results, compared, f"{dataset}, {seeds_in_words(options.seeds)}")


def _train(case: Case, network: Variant, train_set, test, report: Report, options: Options) -> tuple:
    """Trains one case at all settings and seeds: the training, its metrics, and the test accuracy on the way."""
    steps = max(MEASURED, BATCH_SIZE * options.steps // case.batch_size // MEASURED * MEASURED)
    cells = case.settings.values()
    settings = {key: jnp.repeat(jnp.array([cell[key] for cell in cells]), options.seeds) for key in DEFAULTS}
    settings["key"] = jnp.tile(seed_keys(range(options.seeds)), len(cells))
    held_out, ends = jax.tree.map(jnp.asarray, test), ["Dense_0", f"Dense_{len(network.model.hidden)}"]
    network = dataclasses.replace(network, optimizer=functools.partial(perceptrons.optimizer, steps))

    def measure(state, x, y, key):
        loss = network.loss(state.batch_stats, rngs={"dropout": key})
        first, last = analysis.gradient_norms(loss, state.params, x, y, layers=ends).values()
        measured = {"first_to_last_gradient": first / last, "first_gradient": first}
        return {"test_accuracy": network.accuracy(state, *held_out), **measured}

    draw = (perceptrons.fixed_batch if case.is_fixed else engine.random_batch)(case.batch_size)
    how: dict[str, Any] = {"every": steps // MEASURED, "compiler_options": compiler_options(steps)}
    plan = network.plan(steps, draw=draw, measure=measure, **how)
    trained = engine.train(plan, settings, tuple(train_set), report=report, options=options)
    on_test, on_training = (
        np.asarray(network.accuracies(trained.state, split.x[:10_000], split.y[:10_000])) for split in (test, train_set)
    )
    metrics = {"test_accuracy": on_test, "train_accuracy": on_training, "generalization_gap": on_training - on_test}
    metrics |= {key: np.asarray(values)[:, 0] for key, values in trained.measurements.items() if "gradient" in key}
    return trained, metrics, np.concatenate([trained.measurements["test_accuracy"], on_test[:, None]], 1)


def _compare(results: Results, networks: Sequence[str]) -> None:
    """Adds the numbers that compare trainings of one network at the same seeds."""

    def accuracy(variant: str) -> np.ndarray:
        return results.metric(variant, "test_accuracy")

    for network in networks:
        for sweep in SWEEPS:
            accuracies = np.stack([accuracy(name) for name in Case(network, {sweep: SWEEPS[sweep]}).settings])
            results.set_metric(network, f"range_over_{sweep}", np.ptp(accuracies, 0))
        for lost, before, after in (
            ("lost_at_batch_2", "", ", batch 2"),
            ("lost_at_10_times", "", ", learning_rate 0.01"),
            ("lost_by_raw_pixels", "", ", pixels to 255"),
            ("lost_by_fast_decay", ", decay 1", ", decay 6"),
        ):
            results.set_metric(network, lost, accuracy(network + before) - accuracy(network + after))
        larger, default = (results.metric(f"{network}{name}", "first_gradient") for name in (", init_scale 10", ""))
        results.set_metric(network, "gradient_growth", larger / default)
        small = f"{network}, small set"
        better = np.maximum(*(accuracy(f"{small}, l2 {value:g}") for value in (1e-3, 1e-2)))
        results.set_metric(small, "gain_by_l2", better - accuracy(small))
        results.set_metric(small, "gain_by_shuffling", accuracy(small) - accuracy(f"{small}, fixed batches"))


def _figures(results: Results, networks: Sequence[str], title: str) -> dict[str, plots.Figure]:
    """Draws the test accuracy over each sweep."""
    if not networks:
        return {}
    figures = {}
    for sweep in ("learning_rate", "init_scale"):
        series = {}
        for network in networks:
            names = Case(network, {sweep: SWEEPS[sweep]}).settings
            by_value = {settings[sweep]: results.metric(name, "test_accuracy") for name, settings in names.items()}
            series[NETWORKS[network][0]] = [by_value[value] for value in SWEEPS[sweep]]
        figures[f"{sweep}.png"] = plots.sweep(SWEEPS[sweep], series, sweep.replace("_", " "), title)
    series = {
        NETWORKS[name][0]: [results.metric(Case(name, {}, size).name, "test_accuracy") for size in BATCH_SIZES]
        for name in ("none", "bn", "renorm", "layer")
        if name in results.variants
    }
    figures["batch_sizes.png"] = plots.sweep(BATCH_SIZES, series, "batch size", title, base=2)
    return figures
