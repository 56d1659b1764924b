"""Figures of the studies, in colors that color-blind readers can tell apart, and made without a display."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bnjax._extras import needs
from bnjax.studies.data import Split
from bnjax.studies.engine.plan import Trained, compiler_options
from bnjax.studies.evidence.statistics import half_width, interval
from bnjax.training import TrainState

with needs("studies"):
    from matplotlib.ticker import MaxNLocator

    from bnjax.analysis import plots as drawing
    from bnjax.analysis.plots import Figure, line_style

PANELS = {
    "train_accuracy": "training accuracy (during the epoch)",
    "test_accuracy": "test accuracy",
    "train_loss": "training loss (during the epoch)",
    "test_loss": "test loss",
}
"""Curves and their labels, of studies with training and test examples."""


def curves(values: Mapping[str, Any], times: Any, label: str, title: str, **options: Any) -> Figure:
    """Draws curves over the steps of training, one for each label, as `bnjax.analysis.plots.curves` does."""
    return drawing.panels(title, [("", lambda axis: drawing.curves(axis, values, times, ylabel=label, **options))])


def learning_curves(
    trained: Sequence[Trained], panels: Mapping[str, str], title: str, marks: Mapping[str, float] | None = None
) -> Figure:
    """Draws mean curves over seeds with 95 % confidence bands, one panel for each curve.

    By the name of a curve, `panels` has the label of the axis, and `marks` a horizontal line, such as a threshold.
    """

    def draw(axis: Any, curve: str) -> None:
        possible = (0, 1) if "accuracy" in curve else (0, None)
        for i, variant in enumerate(trained):
            values, style = variant.curves[curve], line_style(i, variant.plan.label)
            mean, half = values.mean(0), half_width(values.std(0, ddof=1), len(values)) if len(values) > 1 else 0
            epochs = np.arange(1, len(mean) + 1)
            axis.plot(epochs, mean, label=variant.plan.label, linewidth=1.4, **style)
            band = np.clip([mean - half, mean + half], *possible)
            axis.fill_between(epochs, *band, color=style["color"], alpha=0.2, linewidth=0)
        if marks and curve in marks:
            axis.axhline(marks[curve], color="#666666", linewidth=0.8, label=f"{marks[curve]:g}")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set(xlabel="epoch", ylabel=panels[curve])
        axis.grid(alpha=0.25)

    return drawing.panels(title, [("", functools.partial(draw, curve=curve)) for curve in panels], size=(5.2, 3.8))


def decision_boundaries(trained: Sequence[Trained], data: Split) -> Figure:
    """Draws examples on the plane colored by the first seed's predicted probability, one panel for each variant."""
    low, high = data.x.min(0) - 0.3, data.x.max(0) + 0.3
    grid_x, grid_y = np.meshgrid(np.linspace(low[0], high[0], 101), np.linspace(low[1], high[1], 101))
    points = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.float32)
    images = []

    def draw(axis: Any, variant: Trained) -> None:
        logits = _outputs(jax.tree.map(lambda leaf: leaf[0], variant.state), points)
        probability = np.asarray(jax.nn.sigmoid(logits[:, 0])).reshape(grid_x.shape)
        levels = np.linspace(0, 1, 21)
        images.append(axis.contourf(grid_x, grid_y, probability, levels=levels, cmap="RdBu_r", alpha=0.75))
        axis.contour(grid_x, grid_y, probability, levels=[0.5], colors="black", linewidths=1.2)
        for label, marker, color in ((0, "o", "#08306b"), (1, "^", "#67000d")):
            x, y = data.x[data.y == label].T
            axis.scatter(x, y, s=9, marker=marker, color=color, linewidths=0, label=f"class {label}")
        axis.set_aspect("equal")

    title = "Test examples and the decision boundary of the first seed"
    parts = [(variant.plan.label, functools.partial(draw, variant=variant)) for variant in trained]
    figure = drawing.panels(title, parts, size=(3.5, 3.3), columns=3)
    text = "predicted probability of class 1"
    figure.colorbar(images[0], ax=figure.axes, label=text, shrink=0.7, ticks=[0, 0.25, 0.5, 0.75, 1])
    return figure


@functools.partial(jax.jit, compiler_options=compiler_options())
def _outputs(state: TrainState, x: jax.Array) -> jax.Array:
    return state.apply_fn(state.variables, x, training=False)


def histograms(trained: Sequence[Trained]) -> Figure:
    """Draws the first seed's kernels, and their gradients, over training: first and last layer of each variant's row.

    Each column of a panel is the histogram after one epoch: the darker, the more values lie there. `curves.npz` holds
    those of every parameter.
    """
    height = 2.2 * len(trained) + 0.8
    figure = Figure(figsize=(11, height))
    figure.suptitle("First seed: values over training, darker where there are more")
    # By hand, since finding a layout takes longer than all the drawing.
    figure.subplots_adjust(0.07, 0.5 / height, 0.98, 1 - 0.75 / height, wspace=0.3, hspace=0.3)
    grid = figure.subplots(len(trained), 4, squeeze=False, sharex=True)
    for variant, row in zip(trained, grid, strict=True):
        kernels = [path for path in variant.histograms if re.fullmatch("weight/.*kernel", path)]
        kernels.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path)])
        first, last = (path.removeprefix("weight/") for path in (kernels[0], kernels[-1]))
        shown = [(kind, name) for name in (first, last) for kind in ("weight", "gradient")]
        for axis, (kind, name) in zip(row, shown, strict=True):
            low, high, density = _common_bins(*variant.histograms[f"{kind}/{name}"])
            image = {"extent": (0.5, len(density) + 0.5, low, high), "origin": "lower", "interpolation": "nearest"}
            axis.imshow(np.sqrt(density.T), cmap="Blues", aspect="auto", **image)
            axis.set_title(f"{name.removesuffix('/kernel')}, {kind}s", fontsize=9)
        row[0].set_ylabel(variant.plan.label)
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    return figure


def _common_bins(counts: np.ndarray, ends: np.ndarray, bins: int = 61) -> tuple[float, float, np.ndarray]:
    """Puts histograms of different ranges on the central bins of one common range, each scaled to a maximum of one."""
    low, high = np.percentile(ends[:, 0], 2), np.percentile(ends[:, 1], 98)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    density = np.empty((len(counts), bins))
    for i, (count, (first, last)) in enumerate(zip(counts, ends, strict=True)):
        own = np.linspace(first, last, len(count) + 1)
        density[i] = np.diff(np.interp(edges, own, np.concatenate([[0], np.cumsum(count)])))
    return float(low), float(high), density / np.maximum(density.max(1, keepdims=True), 1e-12)


def sweep(
    values: Sequence[float],
    series: Mapping[str, Sequence[np.ndarray]],
    label: str,
    title: str,
    *,
    base: int = 10,
    published: Mapping[str, Mapping[Any, float]] | None = None,
) -> Figure:
    """Draws the final test accuracy against a setting, mean and 95 % interval, with the published numbers.

    `series` has, by label, the accuracies over seeds at each of the values, which lie on a logarithmic scale (of some
    base) called `label`; `published` has the source's numbers by label and value.
    """

    def draw(axis: Any) -> None:
        for i, (name, accuracies) in enumerate(series.items()):
            measured, style = [interval(v) for v in accuracies], line_style(i, name)
            means, halves = np.array([m.mean for m in measured]), np.nan_to_num([m.half for m in measured])
            possible = np.minimum(halves, np.stack([means, 1 - means]))  # an interval ends where accuracies do
            axis.errorbar(values, means, possible, label=name, marker="o", capsize=4, **style)
            of_source = {v: number for v, number in (published or {}).get(name, {}).items() if v in values}
            if of_source:
                mark = {"color": style["color"], "markersize": 8, "markeredgewidth": 2, "label": f"published, {name}"}
                axis.plot(list(of_source), list(of_source.values()), "x", **mark)
        axis.set_xscale("log", base=base)
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set(xlabel=label, ylabel="test accuracy")
        axis.grid(alpha=0.25)

    return drawing.panels(title, [("", draw)])
