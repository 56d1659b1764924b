"""Figures of the studies, in colors that color-blind readers can tell apart, and made without a display."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bnjax._extras import needs
from bnjax.studies.data import Split
from bnjax.studies.engine.plan import Trained, compiler_options
from bnjax.studies.evidence.statistics import half_width, interval
from bnjax.training import TrainState

with needs("studies"):
    from bnjax.analysis import plots as drawing
    from bnjax.analysis.plots import Figure, line_style

PANELS = {
    "train_accuracy": "training accuracy (during the epoch)",
    "test_accuracy": "test accuracy",
    "train_loss": "training loss (during the epoch)",
    "test_loss": "test loss",
}
"""Curves and their labels, of studies with training and test examples."""


def learning_curves(
    trained: Sequence[Trained], panels: Mapping[str, str], title: str, marks: Mapping[str, float] | None = None
) -> Figure:
    """Mean curves over seeds with 95 % confidence bands, one panel for each curve.

    Args:
      trained: variants to draw.
      panels: curve name to axis label.
      title: of the figure.
      marks: curve name to a horizontal line, such as a threshold.
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows + 0.9), layout="constrained")
    figure.suptitle(title)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, (curve, label) in zip(axes, panels.items(), strict=False):
        for i, one in enumerate(trained):
            values = one.curves[curve]
            mean, half = values.mean(0), half_width(values.std(0, ddof=1), len(values)) if len(values) > 1 else 0
            epochs = np.arange(1, len(mean) + 1)
            chosen = line_style(i)
            axis.plot(epochs, mean, label=one.plan.label, linewidth=1.4, **chosen)
            axis.fill_between(epochs, mean - half, mean + half, color=chosen["color"], alpha=0.2, linewidth=0)
        if marks and curve in marks:
            axis.axhline(marks[curve], color="#666666", linewidth=0.8)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return figure


def curves(values: Mapping[str, Any], times: Any, label: str, title: str, **options: Any) -> Figure:
    """Curves over the steps of training, one for each label, as `bnjax.analysis.plots.curves` draws them."""
    return panel(title, lambda axis: drawing.curves(axis, values, times, ylabel=label, **options))


def panel(title: str, draw: Callable[[Any], Any], size: tuple[float, float] = (6, 4)) -> Figure:
    """A figure of one panel, which a function draws, and its legend."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    figure.suptitle(title, fontsize=10)
    drawing.legend(figure)
    return figure


def decision_boundaries(trained: Sequence[Trained], data: Split) -> Figure:
    """The plane colored by the first seed's predicted probability, and the examples, one panel for each variant."""
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.8, 3.2 * rows + 0.4), layout="constrained")
    figure.suptitle("Test examples and the decision boundary of the first seed")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    low, high = data.x.min(0) - 0.3, data.x.max(0) + 0.3
    grid_x, grid_y = np.meshgrid(np.linspace(low[0], high[0], 101), np.linspace(low[1], high[1], 101))
    points = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1).astype(np.float32)
    image = None
    for axis, one in zip(axes, trained, strict=False):
        state = jax.tree.map(lambda leaf: leaf[0], one.state)
        logits = _outputs(state, points)
        probability = np.asarray(jax.nn.sigmoid(logits[:, 0])).reshape(grid_x.shape)
        image = axis.contourf(grid_x, grid_y, probability, levels=np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.75)
        axis.contour(grid_x, grid_y, probability, levels=[0.5], colors="black", linewidths=1.2)
        for label, marker, color in ((0, "o", "#08306b"), (1, "^", "#67000d")):
            chosen = data.x[data.y == label]
            axis.scatter(
                chosen[:, 0], chosen[:, 1], s=9, marker=marker, color=color, linewidths=0, label=f"class {label}"
            )
        axis.set_title(one.plan.label, fontsize=10)
        axis.set_aspect("equal")
    for axis in axes[len(trained) :]:
        axis.remove()
    if image is not None:
        figure.colorbar(
            image,
            ax=list(axes[: len(trained)]),
            label="predicted probability of class 1",
            shrink=0.7,
            ticks=[0, 0.25, 0.5, 0.75, 1],
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


@functools.partial(jax.jit, compiler_options=compiler_options())
def _outputs(state: TrainState, x: jax.Array) -> jax.Array:
    return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, training=False)


def histograms(trained: Sequence[Trained]) -> Figure:
    """The first seed's kernels, and the gradients of these, over training: first and last layer of each variant.

    Each column of a panel is the histogram after one epoch: the darker, the more values lie there. `curves.npz` holds
    those of every parameter.

    Args:
      trained: variants, one row each.
    """
    height = 2.2 * len(trained) + 0.8
    figure = Figure(figsize=(11, height))
    figure.suptitle("First seed: values over training, darker where there are more")
    # By hand, since finding a layout takes longer than all the drawing.
    figure.subplots_adjust(0.07, 0.5 / height, 0.98, 1 - 0.75 / height, wspace=0.3, hspace=0.3)
    grid = figure.subplots(len(trained), 4, squeeze=False, sharex=True)
    for one, row in zip(trained, grid, strict=True):
        kernels = [
            path.split("/", 1)[1] for path in one.histograms if path.startswith("weight") and path.endswith("kernel")
        ]
        kernels.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path)])
        chosen = [(kind, name) for name in (kernels[0], kernels[-1]) for kind in ("weight", "gradient")]
        for axis, (kind, name) in zip(row, chosen, strict=True):
            counts, ends = one.histograms[f"{kind}/{name}"]
            low, high, density = _common_bins(counts, ends)
            extent = (0.5, len(counts) + 0.5, low, high)
            axis.imshow(
                np.sqrt(density.T), cmap="Blues", aspect="auto", origin="lower", extent=extent, interpolation="nearest"
            )
            axis.set_title(f"{name.removesuffix('/kernel')}, {kind}s", fontsize=9)
        row[0].set_ylabel(one.plan.label)
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    return figure


def _common_bins(counts: np.ndarray, ends: np.ndarray, bins: int = 61) -> tuple[float, float, np.ndarray]:
    """Histograms of different ranges on the central bins of one common range, each scaled to a maximum of one."""
    low, high = np.percentile(ends[:, 0], 2), np.percentile(ends[:, 1], 98)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    density = np.empty((len(counts), bins))
    for i, (count, (first, last)) in enumerate(zip(counts, ends, strict=True)):
        own = np.linspace(first, last, len(count) + 1)
        cumulative = np.concatenate([[0], np.cumsum(count)])
        density[i] = np.diff(np.interp(edges, own, cumulative))
    density /= np.maximum(density.max(1, keepdims=True), 1e-12)
    return float(low), float(high), density


def sweep(
    values: Sequence[float],
    series: Mapping[str, Sequence[np.ndarray]],
    label: str,
    title: str,
    *,
    base: int = 10,
    published: Mapping[Any, float] | None = None,
) -> Figure:
    """Final test accuracy against a setting, mean and 95 % interval, with the published numbers.

    Args:
      values: the abscissa, on a logarithmic scale.
      series: label to the accuracies over seeds at each value.
      label: of the abscissa.
      title: of the figure.
      base: of the logarithm.
      published: value to the source's number.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for i, (name, found) in enumerate(series.items()):
        measured = [interval(v) for v in found]
        means, halves = [m.mean for m in measured], np.nan_to_num([m.half for m in measured])
        axis.errorbar(values, means, halves, label=name, marker="o", capsize=4, **line_style(i))
    shown = {value: number for value, number in (published or {}).items() if value in values}
    if shown:
        axis.plot(list(shown), list(shown.values()), "kx", label="published (without, one run)")
    axis.set_xscale("log", base=base)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.set(xlabel=label, ylabel="test accuracy", title=title)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure
