"""S2's perceptron over learning rates, initial scales, batch sizes, regularization, places and normalizers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis, studies
from bnjax.analysis import losses
from bnjax.studies import Study, data, engine, option, perceptrons
from bnjax.studies.engine import Report, Trained, Variant, compiler_options, seed_keys
from bnjax.studies.evidence import Results, plots, read_claims, seeds_in_words
from bnjax.studies.perceptrons import BATCH_SIZE, BATCH_SIZES, CASES, DEFAULTS, NETWORKS, SWEEPS, Case


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the perceptrons."""

    seeds: int = option(8, "number of seeds")
    steps: int = option(
        15_000, "steps of training", shown="15,000 of 32 examples, as many examples at other batch sizes"
    )
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
NOISE_BATCHES = 50  # batches over which the noise of a layer's statistics is measured
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
    results.examples = dict.fromkeys(("test_accuracy", "population_test_accuracy"), len(test.y))

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
    title = f"{dataset}, trained on {BATCH_SIZE * options.steps:,} examples, {seeds_in_words(options.seeds)}"
    return results, _figures(results, compared, title)


def _train(case: Case, network: Variant, train_set, test, report: Report, options: Options) -> tuple:
    """Trains one case at all settings and seeds: the training, its metrics, and the test accuracy on the way."""
    examples = (case.batch_size if case.has_all_steps else BATCH_SIZE) * options.steps
    steps = max(MEASURED, examples // case.batch_size // MEASURED * MEASURED)
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
    metrics = engine.at_inference(network, trained.state, train_set, test)
    metrics["gain_by_population"] = metrics["population_test_accuracy"] - metrics["test_accuracy"]
    metrics["early_test_accuracy"] = trained.measurements["test_accuracy"][:, 1]  # the first is before any step
    metrics |= {key: np.asarray(values)[:, 0] for key, values in trained.measurements.items() if "gradient" in key}
    metrics["log10_first_to_last_gradient"] = np.log10(metrics.pop("first_to_last_gradient"))
    if case.is_small and case.network.startswith("bn"):
        metrics |= _of_dropout(network, trained, train_set)
    return (
        trained,
        metrics,
        np.concatenate([trained.measurements["test_accuracy"], metrics["test_accuracy"][:, None]], 1),
    )


def _of_dropout(network: Variant, trained: Trained, train_set: data.Split) -> dict[str, np.ndarray]:
    """Measures the variance that the last batch norm is given in training and at inference, and its noise by dropout.

    'log_variance_shift' is the mean over features of the logarithm of the variance of the training examples without
    dropout over the running variance, which training with dropout left. 'noise_by_dropout' is the standard deviation of
    the batch's variance over batches, relative to its mean (both mean over features), minus that of the same network
    and batches without dropout.
    """
    last = f"BatchNorm_{len(network.model.hidden) - 1}"
    with_population = engine.with_population_statistics(network, trained.state, train_set.x)
    inference, running = (np.asarray(of.batch_stats[last]["var"]) for of in (with_population, trained.state))
    keys, x = jax.random.split(jax.random.key(0), NOISE_BATCHES), jnp.asarray(train_set.x)

    @jax.jit
    def noise(state: Any) -> Any:
        def of_batch(key: Any, rate: float) -> Any:
            of_examples, of_dropout = jax.random.split(key)
            batch = x[jax.random.randint(of_examples, (network.batch_size,), 0, len(x))]
            model = network.model.clone(dropout_rate=rate)
            found = losses.linen_batch_stats(model, state.variables, batch, rngs={"dropout": of_dropout})
            return found[last]["var"]

        rates = (network.model.dropout_rate, 0.0)
        variances = (jax.vmap(functools.partial(of_batch, rate=rate))(keys) for rate in rates)
        with_, without = (of.std(0).mean() / of.mean() for of in variances)
        return with_ - without

    of_seeds = [noise(state) for state in trained.states]
    shift = np.log(np.maximum(inference, 1e-12) / np.maximum(running, 1e-12)).mean(1)
    return {"log_variance_shift": shift, "noise_by_dropout": np.asarray(of_seeds)}


def _compare(results: Results, networks: Sequence[str]) -> None:
    """Adds the numbers that compare trainings of one network at the same seeds."""

    def accuracy(variant: str) -> np.ndarray:
        return results.metric(variant, "test_accuracy")

    for network in networks:
        for sweep in SWEEPS:
            accuracies = np.stack([accuracy(name) for name in Case(network, {sweep: SWEEPS[sweep]}).settings])
            results.set_metric(network, f"range_over_{sweep}", np.ptp(accuracies, 0))
        larger, default = (results.metric(f"{network}{name}", "first_gradient") for name in (", init_scale 10", ""))
        results.set_metric(network, "log10_gradient_growth", np.log10(larger / default))
    free, dropped = (f"{name}, small set" for name in ("bn", "bn_dropout_0.5"))
    if {free, dropped} <= set(results.variants):
        gaps = [results.metric(name, "loss_gap") for name in (free, dropped)]
        with np.errstate(invalid="ignore", divide="ignore"):
            results.set_metric(free, "log10_gap_over_dropout", np.log10(gaps[0] / gaps[1]))


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
        for name in perceptrons.SMALLER_NORMS
        if name in results.variants
    }
    figures["batch_sizes.png"] = plots.sweep(BATCH_SIZES, series, "batch size", title, base=2)
    return figures
