"""Draws the README's figures, digits, landscape and devices in docs/figures: `python tools/make_readme_figures.py`.

Digits: batches of 4096 normal numbers around a mean of 1 to 10⁶ standard deviations are normalized in float32. In
float64 the standard deviation of the result is 1; the figure shows how far it is from that, the largest of 8 batches.

Landscape: a sigmoid perceptron of two layers of 64 is trained for 200 steps on scikit-learn's 8 × 8 digits, with batch
norm and without, from 16 seeds. The figure shows the loss of a batch along the gradient's direction from there.

Devices: 1024 examples in equal parts on 1 to 64 devices, of which each device keeps a random share; the largest error
of the normalized values, against one device with all that was kept.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure

from bnjax import analysis, training
from bnjax.analysis import losses
from bnjax.analysis.plots import line_style
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
OURS, FLAX = "bnjax.linen.BatchNorm", "flax.linen.BatchNorm"
MEANS = np.logspace(0, 6, 25)
DEVICES = 2 ** np.arange(7)
SEEDS, STEPS, BATCH, RATE = 16, 200, 128, 0.5
MULTIPLES = np.logspace(-1, 1.5, 26)  # of the learning rate


def digits() -> Figure:
    """Draws the error of the normalized standard deviation over the batch's mean."""
    layers = {
        FLAX: nn.BatchNorm(use_running_average=False),
        "flax, use_fast_variance=False": nn.BatchNorm(use_running_average=False, use_fast_variance=False),
        OURS: BatchNorm(use_running_average=False),
    }
    numbers = np.random.default_rng(0).standard_normal((4096, 8))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for i, (label, layer) in enumerate(layers.items()):
        variables = layer.init(jax.random.key(0), numbers.astype(np.float32))
        apply = jax.jit(
            lambda x, layer=layer, variables=variables: layer.apply(variables, x, mutable=["batch_stats"])[0]
        )
        errors = []
        for mean in MEANS:
            x = (mean + numbers).astype(np.float32)
            exact = x.astype(np.float64).std(0)  # the deviation of the rounded numbers, which are normalized
            expected = exact / np.sqrt(exact**2 + 1e-5)
            errors.append(np.abs(np.asarray(apply(x), np.float64).std(0) / expected - 1).max())
        axis.loglog(MEANS, np.maximum(errors, 1e-8), label=label, **line_style(i))
    axis.set_xlabel("mean / standard deviation of the batch")
    axis.set_ylabel("relative error of the result's\nstandard deviation")
    return _finished(figure)


def landscape() -> Figure:
    """Draws the loss along the gradient of a network with batch norm and of one without."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)

    def along(model: nn.Module, key: jax.Array) -> jax.Array:
        variables = model.init(key, x[:1], training=False)
        loss = losses.linen_loss(model, variables, training.cross_entropy, mode="batch")
        optimizer = optax.sgd(RATE)

        def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            index = jax.random.choice(key, len(x), (BATCH,), replace=False)
            return x[index], y[index]

        def step(carry, key):
            params, state = carry
            update, state = optimizer.update(jax.grad(loss)(params, *batch(key)), state)
            return (optax.apply_updates(params, update), state), None

        start = variables["params"], optimizer.init(variables["params"])
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(key, STEPS))
        at = batch(jax.random.fold_in(key, STEPS))
        probe = analysis.gradient_probe(loss, params, RATE * jnp.asarray(MULTIPLES), *at)
        return probe.loss / probe.base_loss

    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    of_label = {"no batch norm": (None, "none"), "batch norm": (BatchNorm, "before")}
    for i, (label, norm_and_place) in enumerate(of_label.items()):
        model = Perceptron((64, 64), 10, *norm_and_place, nn.sigmoid)
        found = np.asarray(
            jax.jit(jax.vmap(functools.partial(along, model)))(jax.random.split(jax.random.key(0), SEEDS))
        )
        style = line_style(i)
        axis.loglog(MULTIPLES, np.median(found, 0), label=f"{label}, median and range of {SEEDS} seeds", **style)
        axis.fill_between(MULTIPLES, found.min(0), found.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axis.set_xlabel("step along the gradient, in learning rates")
    axis.set_ylabel("loss of the batch after the step\n/ loss before it")
    return _finished(figure)


def devices() -> Figure:
    """Draws the error of what a batch norm puts out when its batch lies on several devices, unequally masked."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((1024, 8)).astype(np.float32)
    layers = {
        "each device's own statistics": BatchNorm(use_running_average=False),
        f"{FLAX}(axis_name=…)": nn.BatchNorm(use_running_average=False, axis_name="devices"),
        f"{OURS}(axis_name=…)": BatchNorm(use_running_average=False, axis_name="devices"),
    }
    errors: dict[str, list[float]] = {label: [] for label in layers}
    variables = layers["each device's own statistics"].init(jax.random.key(0), x)
    for count in DEVICES:
        shares = draw.uniform(0.1, 1, count)
        mask = np.concatenate([draw.random(1024 // count) < share for share in shares])
        mask[:: 1024 // count] = True  # no device is empty
        kept = x[mask].astype(np.float64)
        exact = (x - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
        for label, layer in layers.items():

            def of_part(x, mask, layer=layer):
                return layer.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[0]

            apply = jax.jit(jax.vmap(of_part, axis_name="devices"))
            y = np.asarray(apply(x.reshape(count, -1, 8), mask.reshape(count, -1))).reshape(-1, 8)
            errors[label].append(float(np.abs(y - exact)[mask].max()))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for i, (label, values) in enumerate(errors.items()):
        axis.loglog(DEVICES, np.maximum(values, 1e-8), marker="o", label=label, **line_style(i))
    axis.set_xticks(DEVICES, [str(count) for count in DEVICES])
    axis.set_xlabel("devices that share 1024 examples")
    axis.set_ylabel("largest error of a\nnormalized value")
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    axis = figure.axes[0]
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def main() -> None:
    """Draws the figures."""
    mpl.rcParams["svg.hashsalt"] = "bnjax"  # the same numbers give the same file
    for draw in (digits, landscape, devices):
        draw().savefig(FIGURES / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
