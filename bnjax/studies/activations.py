"""S3: three hidden layers of 100 sigmoid units on binary MNIST, with and without batch norm, watched in training."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
from bnjax.studies.evidence import Results, from_then_on, interval, read_claims, seeds_in_words
from bnjax.studies.evidence.plots import Figure, drawing


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the sigmoid networks."""

    seeds: int = option(5, "number of seeds")
    steps: int = option(50_000, "steps of training")


STUDY = Study(
    "activations",
    "a sigmoid network on binary MNIST, its activations and gradients watched with and without batch norm",
    "S3, original paper notes; Ioffe & Szegedy 2015, section 4.1",
    Options,
    compiled="bn",
    fast={"seeds": 2, "steps": 2000},
    order=8,
)

HIDDEN = (100, 100, 100)
BATCH_SIZE = 60
LEARNING_RATE, DEVIATION = 0.1, 0.1
GRID = {"learning_rate": (0.03, 0.1, 0.3, 1.0), "deviation": (0.01, 0.1, 0.3, 1.0)}
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
RATE_STEPS = 500
TIMES = (5, 30)  # multiples of the learning rate that are tried
LEARNT = 0.5 * float(np.log(10))  # a loss that is half of that of chance
DIVERGED = 10 * float(np.log(10))  # the loss that counts for any that is larger or not finite
LOOKED_AT = 1000  # test images whose activations are looked at
LAST_HIDDEN = f"Dense_{len(HIDDEN) - 1}"
UNIT = 0
LINEAR = 1.1  # the logistic function is within a tenth of its tangent's rise for inputs up to here
# name: (label, place of the batch norm, its arguments, times the learning rate)
NETWORKS = {
    "none": ("no batch norm", "none", {}, 1),
    "bn": ("batch norm", "before", {}, 1),
    "bn_after": ("batch norm after the sigmoid", "after", {}, 1),
    "bn_unscaled": ("batch norm, no scale/bias", "before", {"use_scale": False, "use_bias": False}, 1),
    **{f"none_x{times}": (f"no batch norm, {times} times the rate", "none", {}, times) for times in TIMES},
    **{f"bn_x{times}": (f"batch norm, {times} times the rate", "before", {}, times) for times in TIMES},
}
MAIN = ("none", "bn")
TENTHS = 10  # parts of the training in which the gain is asked for
LAST = 5  # measurements whose mean is the plain network's accuracy at the end
SETTINGS = {"hidden": list(HIDDEN), "optimizer": "SGD", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
SETTINGS |= {"init": f"normal of deviation {DEVIATION}", "learning_rate_steps": RATE_STEPS}
SETTINGS |= {"grid": {key: list(values) for key, values in GRID.items()}}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the networks by name."""
    init, shape = nn.initializers.normal(1.0), (images.train.x[0].size,)  # scaled by the setting's 'init_scale'

    def optimizer(setting):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=setting.get("learning_rate", LEARNING_RATE))

    variants = {}
    for name, (label, place, arguments, _) in NETWORKS.items():
        norm = None if place == "none" else functools.partial(BatchNorm, **arguments)
        model = Perceptron(HIDDEN, 10, norm, place, nn.sigmoid, init, init)
        variants[name] = Variant(name, label, model, optimizer, shape, BATCH_SIZE)
    return variants


def run(options: Options, report: Report):
    """Trains the networks, measures activations and gradients on the way, and judges the claims."""
    dataset, steps = options.dataset, options.steps
    images = data.images(dataset, options.data_dir, report.reading)
    images = images.map(lambda x: (x.reshape(len(x), -1) > 127).astype(np.float32))  # pixels 0 or 1 in one vector
    train_set, test = images.train, jax.tree.map(jnp.asarray, images.test)
    every = divisor_from(steps // 100, steps)
    settings = {**SETTINGS, "dataset": f"{dataset}, pixels above 127"}
    settings |= {"steps": steps, "measured_every": every, "grid_steps": max(1, steps // 10)}
    results, full = Results(STUDY.name, settings, range(options.seeds)), jnp.ones(options.seeds)
    results.examples = dict.fromkeys(("test_accuracy", "mean_test_accuracy"), len(images.test.y))
    all_trained, ranges = {}, {}
    variants = networks(options, images)
    report.expect(len(variants) + len(MAIN))
    for name, variant in variants.items():
        of_seeds = {"key": seed_keys(results.seeds), "init_scale": DEVIATION * full}
        of_seeds["learning_rate"] = LEARNING_RATE * NETWORKS[name][3] * full
        plan = variant.plan(steps, measure=functools.partial(_measure, variant, test), every=every)
        all_trained[name] = train(plan, of_seeds, train_set, report=report, options=options)
        _add(results, all_trained[name], np.asarray(variant.accuracies(all_trained[name].state, *test)))
        if name not in MAIN:
            continue
        _add_grid(results, variant, train_set, test, of_seeds["key"], settings["grid_steps"], report)
        rates = RATES if name == "none" else _multiples(ranges["none"])
        how = {"target": LEARNT, "batch_size": len(rates)}
        ranges[name] = variant.learning_rates(of_seeds, rates, RATE_STEPS, train_set, **how)
    for name in MAIN:
        for metric, values in identities(variants[name], all_trained[name].states, train_set).items():
            results.set_metric(name, metric, values)
    results.notes["learning_rates"] = {
        name: {"rates": np.asarray(of.learning_rates[0]).tolist(), "trains": np.asarray(of.trains).tolist()}
        for name, of in ranges.items()
    }
    _add_pairs(results, ranges)
    results.judge(CLAIMS)
    main = {name: all_trained[name] for name in MAIN}
    return results, _figures(main, all_trained, ranges, f"{dataset}, {seeds_in_words(options.seeds)}")


def _accuracy(variant: Variant, test: data.Split, state, *inputs) -> dict[str, Any]:
    return {"accuracy": variant.accuracy(state, *test)}


def _measure(variant: Variant, test: data.Split, state, x, y, key) -> dict[str, Any]:
    """Measures activations by layer, and the norms and scale invariance of gradients, in training mode."""
    layers = [layer[0] for layer in variant.layers]
    inputs = losses.layer_outputs(variant.model, state.variables, test.x[:LOOKED_AT])
    hidden, at = {name: inputs[name] for name in layers[:-1]}, (variant.loss(state.batch_stats), state.params, x, y)
    kernels, rate = [f"{name}/kernel" for name in hidden], state.opt_state.hyperparams["learning_rate"]
    return {
        **_accuracy(variant, test, state),
        "activations": analysis.activation_statistics(hidden, jax.nn.sigmoid),
        "linear": jnp.mean(jnp.stack([(jnp.abs(h) <= LINEAR).mean() for h in hidden.values()])),
        "gradient_norms": analysis.gradient_norms(*at, layers=layers),
        "invariance": analysis.scale_invariance(*at, layers=kernels, learning_rate=rate),
    }


def _add(results: Results, trained: Trained, at_end: np.ndarray) -> None:
    """Adds the numbers of the main training, and its test accuracy at the end."""
    measured = trained.measurements
    norms, accuracy = measured["gradient_norms"], np.concatenate([measured["accuracy"], at_end[:, None]], 1)
    last = measured["activations"][LAST_HIDDEN]  # percentiles [seeds, times, 3, units]
    low, median, high = np.moveaxis(last.percentiles, 2, 0)
    movement, width = median.std(1), (high - low).mean(1)
    shape = (last.percentiles - last.mean[:, :, None]) / np.maximum(last.deviation[:, :, None], 1e-12)
    curves = {"test_accuracy": accuracy, "batch_loss": np.asarray(trained.metrics.loss)}
    for layer, statistics in measured["activations"].items():
        curves |= {f"saturated_{layer}": statistics.saturated, f"dead_{layer}": statistics.dead}
    curves |= {f"gradient_norm_{layer}": of_layer for layer, of_layer in norms.items()}
    loss = curves["batch_loss"]
    metrics = {
        "test_accuracy": accuracy[:, -1],
        "mean_test_accuracy": accuracy[:, 1:].mean(1),
        "final_loss": _final(loss),
        "movement_of_percentiles": last.percentiles.std(1).mean((1, 2)),
        "movement_of_medians": movement.mean(1),
        "relative_movement": np.median(movement / np.maximum(width, 1e-12), 1),
        "movement_of_shape": shape.std(1).mean((1, 2)),
        "largest_scale_cosine": measured["invariance"].cosine.max((1, 2)),
        "saturated_at_end": last.saturated[:, -1],
        "linear_inputs": measured["linear"].mean(1),
        "first_to_last_gradient": np.median(norms["Dense_0"] / norms[f"Dense_{len(HIDDEN)}"], 1),
        "parameters_of_norm": np.full(len(accuracy), _parameters_of_norm(trained)),
    }
    rate, place = NETWORKS[trained.plan.name][3] * LEARNING_RATE, NETWORKS[trained.plan.name][1]
    results.add(trained, {"learning_rate": rate, "deviation": DEVIATION, "place": place}, metrics, curves)


def _final(losses_of_steps: np.ndarray) -> np.ndarray:
    """Returns the mean loss of the last tenth of the steps, the last axis; ten times that of chance if it diverged."""
    last = losses_of_steps[..., -max(1, losses_of_steps.shape[-1] // 10) :].mean(-1)
    return np.where(np.isfinite(losses_of_steps).all(-1), np.fmin(last, DIVERGED), DIVERGED)


def _parameters_of_norm(trained: Trained) -> float:
    """Returns the number of a network's normalization parameters for each activation of its hidden layers."""
    sizes = {path: math.prod(shape) for path, shape in trained.parameters["params"].items()}
    return sum(size for path, size in sizes.items() if path.startswith("BatchNorm")) / sum(HIDDEN)


def identities(variant: Variant, states: Sequence[Any], train_set: data.Split) -> dict[str, np.ndarray]:
    """Measures what should hold of each trained network whatever its numbers, relative to the largest that is compared.

    Returns, for each seed:
      'output_noise': mean deviation of an example's logits over batches that it is in, in training;
      'output_noise_at_inference': the same at inference;
      'changed_by_scale': how much hidden kernels twice as large change the logits in training;
      'nonlinearity_at_inference': how far the last hidden normalization, at inference, is from an affine function;
      'rank_of_batch': rank of the covariance of the last hidden layer over one batch;
      'identity_error': how far the first normalization is from the identity with scale √(var + ε) and bias mean.
    """
    count = min(50, (len(train_set.x) - 1) // (BATCH_SIZE - 1))
    first, others = (jnp.asarray(train_set.x[part]) for part in (slice(1), slice(1, 1 + count * (BATCH_SIZE - 1))))
    others = others.reshape((count, BATCH_SIZE - 1, -1))
    batches = jnp.concatenate([jnp.broadcast_to(first, (count, 1, first.shape[1])), others], 1)
    norm, has_norm = BatchNorm(use_running_average=True), variant.model.norm is not None

    def logits(params: Any, state: Any, x: Any, training: bool) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        return variant.model.apply(variables, x, training=training, mutable=["batch_stats"])[0]

    @jax.jit
    def of_state(state: Any) -> dict[str, Any]:
        def noise(training: bool) -> Any:
            of_first = jax.vmap(lambda batch: logits(state.params, state, batch, training)[0])(batches)
            return of_first.std(0).mean() / jnp.abs(of_first).max()

        hidden = [f"Dense_{i}" for i in range(len(HIDDEN))]
        twice = {**state.params, **{h: {**state.params[h], "kernel": 2 * state.params[h]["kernel"]} for h in hidden}}
        plain, scaled = (logits(params, state, batches[0], True) for params in (state.params, twice))
        h = losses.layer_outputs(variant.model, state.variables, batches[0])[LAST_HIDDEN]
        found = {"output_noise": noise(True), "output_noise_at_inference": noise(False)}
        found["changed_by_scale"] = jnp.abs(scaled - plain).max() / jnp.abs(plain).max()
        found["rank_of_batch"] = jnp.linalg.matrix_rank(h - h.mean(0, keepdims=True)).astype(float)
        if has_norm:
            last = f"BatchNorm_{len(HIDDEN) - 1}"
            of = {"params": state.params[last], "batch_stats": state.batch_stats[last]}
            f: Any = functools.partial(norm.apply, of)
            bent = f(h[:30]) + f(h[30:]) - f(h[:30] + h[30:]) - f(jnp.zeros_like(h[:30]))
            found["nonlinearity_at_inference"] = jnp.abs(bent).max() / jnp.abs(f(h)).max()
            first = losses.linen_batch_stats(variant.model, state.variables, batches[0])["BatchNorm_0"]
            inverse = {"scale": jnp.sqrt(first["var"] + norm.epsilon), "bias": first["mean"]}
            u = batches[0] @ state.params["Dense_0"]["kernel"] + state.params["Dense_0"]["bias"][None]
            in_training = BatchNorm(use_running_average=False)
            of = {"params": inverse, "batch_stats": first}
            same = in_training.apply(of, u, mutable=["batch_stats"])[0]
            found["identity_error"] = jnp.abs(same - u).max() / jnp.abs(u).max()
        return found

    of_seeds = [of_state(state) for state in states]
    return {name: np.array([float(of[name]) for of in of_seeds]) for name in of_seeds[0]}


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
    start = jax.jit(jax.vmap(variant.create))({"key": keys, "init_scale": jnp.full(count, deviations[-1])})
    of_start = functools.partial(_saturated, variant, jnp.asarray(examples.x[:LOOKED_AT]))
    results.set_metric(name, "saturated_at_large_start", np.asarray(jax.jit(jax.vmap(of_start))(start)))
    for size, deviation in (("small", deviations[0]), ("large", deviations[-1])):
        results.set_metric(name, f"accuracy_from_{size}_kernels", accuracy[cells.index((deviation, LEARNING_RATE))])
    results.set_metric(name, "least_accuracy_in_grid", accuracy.min(0))
    results.set_metric(name, "largest_accuracy_in_grid", accuracy.max(0))
    lines = ["deviation   " + "".join(f"rate {rate:<12g}" for rate in rates)]
    for deviation, row in zip(deviations, accuracy.reshape((len(deviations), len(rates), count)), strict=True):
        lines.append(f"{deviation:<12g}" + "".join(f"{interval(values).text(3):<17}" for values in row))
    results.texts.append((f"{label}: test accuracy after {steps} steps", "\n".join(lines)))


def _saturated(variant: Variant, x: Any, state: Any) -> Any:
    """Returns the fraction of the inputs of all hidden sigmoids that are saturated."""
    outputs = losses.layer_outputs(variant.model, state.variables, x)
    hidden = {name: outputs[name] for name in list(outputs)[:-1]}
    of_layers = analysis.activation_statistics(hidden, jax.nn.sigmoid).values()
    return jnp.mean(jnp.stack([of.saturated for of in of_layers]))


def _add_pairs(results: Results, ranges: dict[str, analysis.LearningRateRange]) -> None:
    """Adds the numbers that compare the two networks at the same seeds."""
    with_, without = (results.arrays[f"{name}/test_accuracy"][:, 1:] for name in MAIN[::-1])
    for i, part in enumerate(np.array_split(with_ - without, TENTHS, 1)):
        results.set_metric("bn", f"gain_in_tenth_{i + 1}", part.mean(1))
    of_plain = without[:, -LAST:].mean(1, keepdims=True)
    for name in ("bn", *(f"bn_x{times}" for times in TIMES)):
        reached = results.arrays[f"{name}/test_accuracy"][:, 1:] >= of_plain
        fewer = reached.shape[1] / from_then_on(reached)  # of the measurements
        results.set_metric(name, "log10_times_fewer_steps", np.log10(fewer))
    grids = (results.notes["grid"][name] for name in MAIN[::-1])
    for i, cells in enumerate(zip(*grids, strict=True)):
        gain = np.subtract(*(cell["test_accuracy"] for cell in cells))
        results.set_metric("bn", f"gain_in_cell_{i + 1}", gain)
    # Where the plain network trains at the largest rate of all, the rate that it tolerates is not known.
    largest, final = np.asarray(ranges["none"].largest), _final(np.asarray(ranges["bn"].loss))
    known, tried = np.isfinite(ranges["none"].breaks_at), _multiples(ranges["none"])
    for times in TIMES:
        own = [tried.index(times * float(rate)) if known[seed] else 0 for seed, rate in enumerate(largest)]
        of_seeds = np.where(known, final[np.arange(len(own)), own], np.nan)
        results.set_metric("bn", f"loss_at_{times}_times", of_seeds)
    results.set_metric("none", "largest_rate", largest)


def _figures(
    main: dict[str, Trained], all_trained: dict[str, Trained], ranges: dict[str, Any], title: str
) -> dict[str, Figure]:
    plan = next(iter(main.values())).plan
    times = np.arange(0, plan.steps, plan.every)
    measured = {trained.plan.label: trained.measurements for trained in main.values()}
    errors = {name: 1 - trained.measurements["accuracy"] for name, trained in all_trained.items()}
    of_label = {NETWORKS[name][0]: of for name, of in ranges.items()}

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
        "test_error.png": draw_errors(errors, times, title),
        "percentiles.png": pair(text, percentiles, with_legend=False),
        "saturation.png": pair(f"Inputs at which the sigmoid is flat ({title})", saturation),
        "gradient_norms.png": pair(f"Gradient norms by layer ({title})", norms),
        "learning_rates.png": drawing.panels(
            f"After {RATE_STEPS} steps ({title})", [("", lambda axis: drawing.learning_rate_range(axis, of_label))]
        ),
    }


def draw_errors(errors: Mapping[str, np.ndarray], times: np.ndarray, title: str) -> Figure:
    """Draws the test errors, by network, `[seeds, times]`: those at the base rate, and those at its multiples."""

    def draw(axis: Any, names: Sequence[str]) -> None:
        of_label = {NETWORKS[name][0]: errors[name] for name in names}
        drawing.curves(axis, of_label, times, ylabel="test error, 1 − accuracy", log=True)

    base = [name for name in NETWORKS if NETWORKS[name][-1] == 1]
    both = [(base, "at the base rate"), ([*MAIN, *(name for name in NETWORKS if name not in base)], "at its multiples")]
    parts = [(text, functools.partial(draw, names=names)) for names, text in both]
    return drawing.panels(title, parts, size=(4.5, 3.8), sharey=True)


def _multiples(without: analysis.LearningRateRange) -> tuple[float, ...]:
    """Returns 1, 5 and 30 times each seed's largest rate that trains without batch norm (else the least tried)."""
    largest = {float(rate) for rate in np.asarray(without.largest) if np.isfinite(rate)} or {RATES[0]}
    return tuple(sorted({times * rate for rate in largest for times in (1, *TIMES)}))
