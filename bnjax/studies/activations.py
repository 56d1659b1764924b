"""S3: three hidden layers of 100 sigmoid units on binary MNIST, with and without batch norm, watched in training."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis, studies
from bnjax.analysis import losses
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.studies import Study, data, option
from bnjax.studies.engine import Report, Trained, Variant, divisor_from, seed_keys, train
from bnjax.studies.evidence import Results, interval, plots, read_claims, seeds_in_words
from bnjax.studies.evidence.plots import Figure, drawing


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the sigmoid networks."""

    seeds: int = option(4, "number of seeds")
    steps: int | None = option(None, "steps of training", shown="10,000 on CPU, 50,000 on GPU and TPU")


STUDY = Study(
    "activations",
    "a sigmoid network on binary MNIST, its activations and gradients watched with and without batch norm",
    "S3, original paper notes; Ioffe & Szegedy 2015, section 4.1",
    Options,
    compiled="bn",
    fast={"seeds": 2, "steps": 2000},
    source_size="50,000 steps",
    order=8,
)

HIDDEN = (100, 100, 100)
BATCH_SIZE = 60
STEPS = {"cpu": 10_000, "gpu": 50_000, "tpu": 50_000}
LEARNING_RATE, DEVIATION = 0.1, 0.1
GRID = {"learning_rate": (0.03, 0.1, 0.3, 1.0), "deviation": (0.01, 0.1, 0.3, 1.0)}
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
RATE_STEPS = 500
TIMES = (5, 30)  # multiples of the learning rate that are tried
LEARNT = 0.5 * float(np.log(10))  # a loss that is half of that of chance
LOOKED_AT = 1000  # test images whose activations are looked at
LAST_HIDDEN = f"Dense_{len(HIDDEN) - 1}"
UNIT = 0
LABELS = {"none": "no batch norm", "bn": "batch norm"}
SETTINGS = {"hidden": list(HIDDEN), "optimizer": "SGD", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
SETTINGS |= {"init": f"normal of deviation {DEVIATION}", "learning_rate_steps": RATE_STEPS}
SETTINGS |= {"grid": {key: list(values) for key, values in GRID.items()}}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the networks without and with batch norm, by name."""
    init, shape = nn.initializers.normal(1.0), (images.train.x[0].size,)  # scaled by the setting's 'init_scale'
    model = Perceptron(HIDDEN, 10, None, "none", nn.sigmoid, init, init)
    models = {"none": model, "bn": model.clone(norm=BatchNorm, place="before")}

    def optimizer(setting):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=setting.get("learning_rate", LEARNING_RATE))

    return {name: Variant(name, LABELS[name], model, optimizer, shape, BATCH_SIZE) for name, model in models.items()}


def run(options: Options, report: Report):
    """Trains with and without batch norm, measures activations and gradients on the way, and judges S3.1 to S3.5."""
    dataset, steps = options.dataset, options.steps or STEPS[jax.default_backend()]
    images = data.images(dataset, options.data_dir, report.reading)
    images = images.map(lambda x: (x.reshape(len(x), -1) > 127).astype(np.float32))  # pixels 0 or 1 in one vector
    train_set, test = images.train, jax.tree.map(jnp.asarray, images.test)
    every = divisor_from(steps // 100, steps)
    settings = {**SETTINGS, "dataset": f"{dataset}, pixels above 127"}
    settings |= {"steps": steps, "measured_every": every, "grid_steps": max(1, steps // 10)}
    results, full = Results(STUDY.name, settings, range(options.seeds)), jnp.ones(options.seeds)
    of_seeds = {"key": seed_keys(results.seeds), "learning_rate": LEARNING_RATE * full, "init_scale": DEVIATION * full}
    all_trained, ranges = {}, {}
    variants = networks(options, images)
    report.expect(len(variants) + 1)
    for name, variant in variants.items():
        plan = variant.plan(steps, measure=functools.partial(_measure, variant, test), every=every)
        all_trained[name] = train(plan, of_seeds, train_set, report=report, options=options)
        _add(results, all_trained[name])
        _add_grid(results, variant, train_set, test, of_seeds["key"], settings["grid_steps"], report)
        rates = RATES if name == "none" else _multiples(ranges["none"])
        how = {"target": LEARNT, "batch_size": len(rates)}
        ranges[name] = variant.learning_rates(of_seeds, rates, RATE_STEPS, train_set, **how)
    results.notes["learning_rates"] = {
        name: {"rates": np.asarray(of.learning_rates[0]).tolist(), "trains": np.asarray(of.trains).tolist()}
        for name, of in ranges.items()
    }
    _add_pairs(results, ranges)
    results.judge(CLAIMS)
    return results, _figures(all_trained, ranges, f"{dataset}, {seeds_in_words(options.seeds)}")


def _accuracy(variant: Variant, test: data.Split, state, *inputs) -> dict[str, Any]:
    return {"accuracy": variant.accuracy(state, *test)}


def _measure(variant: Variant, test: data.Split, state, x, y, key) -> dict[str, Any]:
    """Measures activations by layer, and the norms and scale invariance of gradients, in training mode."""
    layers = [layer[0] for layer in variant.layers]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inputs = losses.layer_outputs(variant.model, variables, test.x[:LOOKED_AT])
    hidden, at = {name: inputs[name] for name in layers[:-1]}, (variant.loss(state.batch_stats), state.params, x, y)
    kernels, rate = [f"{name}/kernel" for name in hidden], state.opt_state.hyperparams["learning_rate"]
    return {
        **_accuracy(variant, test, state),
        "activations": analysis.activation_statistics(hidden, jax.nn.sigmoid),
        "gradient_norms": analysis.gradient_norms(*at, layers=layers),
        "invariance": analysis.scale_invariance(*at, layers=kernels, learning_rate=rate),
    }


def _add(results: Results, trained: Trained) -> None:
    """Adds the numbers of the main training."""
    measured = trained.measurements
    norms, accuracy = measured["gradient_norms"], measured["accuracy"]
    last = measured["activations"][LAST_HIDDEN]  # percentiles [seeds, times, 3, units]
    low, median, high = np.moveaxis(last.percentiles, 2, 0)
    movement, width = median.std(1), (high - low).mean(1)
    curves = {"test_accuracy": accuracy, "batch_loss": np.asarray(trained.metrics.loss)}
    for layer, statistics in measured["activations"].items():
        curves |= {f"saturated_{layer}": statistics.saturated, f"dead_{layer}": statistics.dead}
    curves |= {f"gradient_norm_{layer}": of_layer for layer, of_layer in norms.items()}
    metrics = {
        "test_accuracy": accuracy[:, -1],
        "mean_test_accuracy": accuracy[:, 1:].mean(1),
        "movement_of_medians": movement.mean(1),
        "relative_movement": np.median(movement / np.maximum(width, 1e-12), 1),
        "largest_scale_cosine": measured["invariance"].cosine.max((1, 2)),
        "saturated_at_end": last.saturated[:, -1],
        "first_to_last_gradient": np.median(norms["Dense_0"] / norms[f"Dense_{len(HIDDEN)}"], 1),
    }
    results.add(trained, {"learning_rate": LEARNING_RATE, "deviation": DEVIATION}, metrics, curves)


def _add_grid(
    results: Results, variant: Variant, examples: data.Split, test: data.Split, keys, steps: int, report: Report
) -> None:
    """Adds shorter trainings over initial deviations and learning rates, all at once."""
    name, label, rates, deviations = variant.name, variant.label, *GRID.values()
    cells, count = list(itertools.product(deviations, rates)), len(keys)
    deviation, rate = (jnp.repeat(jnp.array(values), count) for values in zip(*cells, strict=True))
    settings = {"key": jnp.tile(keys, len(cells)), "learning_rate": rate, "init_scale": deviation}
    how = {"measure": functools.partial(_accuracy, variant, test), "every": divisor_from(steps // 2, steps)}
    plan = dataclasses.replace(variant, label=f"{label}, grid").plan(steps, **how)
    trained = train(plan, settings, examples, report=report)
    accuracy = np.asarray(variant.accuracies(trained.state, *test)).reshape((len(cells), count))
    results.notes.setdefault("grid", {})[name] = [
        {"learning_rate": rate, "deviation": deviation, "test_accuracy": values.tolist()}
        for (deviation, rate), values in zip(cells, accuracy, strict=True)
    ]
    for size, deviation in (("small", deviations[0]), ("large", deviations[-1])):
        results.set_metric(name, f"accuracy_from_{size}_kernels", accuracy[cells.index((deviation, LEARNING_RATE))])
    results.set_metric(name, "least_accuracy_in_grid", accuracy.min(0))
    results.set_metric(name, "largest_accuracy_in_grid", accuracy.max(0))
    lines = ["deviation   " + "".join(f"rate {rate:<12g}" for rate in rates)]
    for deviation, row in zip(deviations, accuracy.reshape((len(deviations), len(rates), count)), strict=True):
        lines.append(f"{deviation:<12g}" + "".join(f"{interval(values).text(3):<17}" for values in row))
    results.texts.append((f"{label}: test accuracy after {steps} steps", "\n".join(lines)))


def _add_pairs(results: Results, ranges: dict[str, analysis.LearningRateRange]) -> None:
    """Adds the numbers that compare the two networks at the same seeds."""
    with_, without = (results.arrays[f"{name}/test_accuracy"][:, 1:] for name in ("bn", "none"))
    gain = with_ - without
    results.set_metric("bn", "least_gain", gain[:, gain.mean(0).argmin()])
    reached = with_ >= without[:, -1:]
    first = np.where(reached.any(1), reached.argmax(1) + 1, np.nan)  # measurements; the first was before any step
    results.set_metric("bn", "times_fewer_steps", with_.shape[1] / first)
    # Where the plain network trains at the largest rate of all, the rate that it tolerates is not known.
    largest, trains = np.asarray(ranges["none"].largest), np.asarray(ranges["bn"].trains)
    known, tried = np.isfinite(ranges["none"].breaks_at), _multiples(ranges["none"])
    for times in TIMES:
        own = [tried.index(times * float(rate)) if known[seed] else 0 for seed, rate in enumerate(largest)]
        is_trained = np.where(known, trains[np.arange(len(own)), own], np.nan)
        results.set_metric("bn", f"trains_at_{times}_times", is_trained)
    results.set_metric("none", "largest_rate", largest)


def _figures(all_trained: dict[str, Trained], ranges: dict[str, Any], title: str) -> dict[str, Figure]:
    times = next(iter(all_trained.values())).measured_at
    measured = {trained.plan.label: trained.measurements for trained in all_trained.values()}
    accuracies = {label: m["accuracy"] for label, m in measured.items()}
    of_label = {LABELS[name]: of for name, of in ranges.items()}

    def percentiles(axis, label):
        one_unit = measured[label]["activations"][LAST_HIDDEN].percentiles[0, :, :, UNIT]
        drawing.activation_percentiles(axis, {label: one_unit}, times)

    def saturation(axis, label):
        saturated = {layer: of.saturated for layer, of in measured[label]["activations"].items()}
        drawing.curves(axis, saturated, times, ylabel="fraction saturated", ordered=True)

    def norms(axis, label):
        of_layers = measured[label]["gradient_norms"]
        drawing.curves(axis, of_layers, times, ylabel="‖∂L/∂W‖₂", log=True, ordered=True)

    def pair(text: str, draw: Callable[..., Any], **options: Any) -> Figure:  # beside each other, on one scale
        panels = [(label, functools.partial(draw, label=label)) for label in measured]
        return drawing.panels(text, panels, size=(4.5, 3.8), sharey=True, **options)

    text = "Inputs to one sigmoid of the last hidden layer, the first seed"
    return {
        "test_accuracy.png": plots.curves(accuracies, times, "test accuracy", title),
        "percentiles.png": pair(text, percentiles, with_legend=False),
        "saturation.png": pair(f"Inputs at which the sigmoid is flat ({title})", saturation),
        "gradient_norms.png": pair(f"Gradient norms by layer ({title})", norms),
        "learning_rates.png": drawing.panels(
            f"After {RATE_STEPS} steps ({title})", [("", lambda axis: drawing.learning_rate_range(axis, of_label))]
        ),
    }


def _multiples(without: analysis.LearningRateRange) -> tuple[float, ...]:
    """Returns 1, 5 and 30 times each seed's largest rate that trains without batch norm (else the least tried)."""
    largest = {float(rate) for rate in np.asarray(without.largest) if np.isfinite(rate)} or {RATES[0]}
    return tuple(sorted({times * rate for rate in largest for times in (1, *TIMES)}))
