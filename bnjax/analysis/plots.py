"""Figures of the measurements, for color-blind readers and print in gray; imported explicitly, made without pyplot.

Every function draws on `ax`, matplotlib axes that the caller makes and composes. Results are given by label, as jax or
numpy arrays; where these have a leading axis of seeds, lines are the mean over seeds and bands go from the smallest to
the largest. `log` makes an axis, or colors, logarithmic: zeros then lie below the lower edge. Infinite values and NaN
leave a gap and a cross at the upper edge, or in maps a hatched area. Lines are returned by label, and a label that
names a normalizer, such as 'layer norm', has its color and dash in every figure. Call `legend` last, once for the whole
figure. All raise ValueError for arrays of undocumented shapes and coordinates that do not increase.

>>> from matplotlib.figure import Figure
>>> from bnjax.analysis import plots
>>> figure = Figure(figsize=(5, 3), layout="constrained")
>>> drawn = plots.curves(figure.subplots(), {"two seeds": np.ones((2, 5))}, np.arange(5), ylabel="loss")
>>> print(plots.legend(figure).get_texts()[0].get_text(), drawn["two seeds"].get_ydata())
two seeds [1. 1. 1. 1. 1.]
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bnjax._extras import needs
from bnjax.analysis import (
    CovariateShift,
    GradientProbe,
    LearningRateRange,
    LinearPath,
    TrajectoryPlane,
    _draw,
)
from bnjax.analysis._draw import COLOR_MAP, COLORS, STYLES, Lines, line_style  # noqa: F401
from bnjax.analysis.curvature_plots import explore, layer_traces, layer_weights, spectral_density  # noqa: F401

with needs("plots"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from mpl_toolkits.mplot3d import Axes3D


def legend(figure: Figure) -> Legend | None:
    """Draws one legend below all axes of a figure with `layout="constrained"`; none where nothing has a label."""
    if not isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        raise ValueError('figure must have a constrained layout. Make it with Figure(layout="constrained").')
    handles = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if not handles:
        return None
    columns = int((72 * figure.get_figwidth() + 20) / (58 + 6 * max(map(len, handles), default=1)))  # in points
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": max(1, min(columns, len(handles)))}
    return figure.legend(list(handles.values()), list(handles), frameon=False, handlelength=3, **place)


def panels(
    title: str,
    draw: Sequence[tuple[str, Callable[[Axes], Any]]],
    *,
    size: tuple[float, float] = (6, 4),
    columns: int = 2,
    with_legend: bool = True,
    **shared: Any,
) -> Figure:
    """Makes a figure of panels, row by row, with one title and one legend.

    Args:
      title: title of the figure; empty for none.
      draw: for each panel its title and a function that draws it on its axes, such as one of this module.
      size: width and height of a panel in inches.
      columns: most panels in a row.
      with_legend: whether to draw the legend.
      **shared: axes in common, as `sharex=True`.
    """
    figure, places = _draw.grid(title, len(draw), size, columns, **shared)
    for ax, (text, function) in zip(places, draw, strict=True):
        function(ax)
        ax.set_title(text, fontsize=9)
    if with_legend:
        legend(figure)
    return figure


def curves(
    ax: Axes,
    values: Mapping[str, Any],
    x: Any,
    *,
    xlabel: str = "training step",
    ylabel: str,
    log: bool = False,
    ordered: bool = False,
) -> Lines:
    """Draws any quantity over training, such as each layer's saturated fraction, or the loss along lines.

    Args:
      values: values by label, `[steps]` or `[seeds, steps]`.
      x: training steps, or coordinates, `[steps]`, increasing.
      xlabel: label of the horizontal axis.
      ylabel: label of the vertical axis.
      log: whether the vertical axis is logarithmic.
      ordered: whether the labels are in order, such as layers; the colors then go from dark to bright.
    """
    named = {k: _draw.checked(f"values[{k!r}]", v, "steps", "seeds, steps") for k, v in values.items()}
    return _draw.draw_bands(ax, {k: _draw.over_seeds(v) for k, v in named.items()}, x, xlabel, ylabel, log, ordered)


def layer_map(ax: Axes, values: Mapping[str, Any], steps: Any, *, log: bool = False) -> ScalarMappable:
    """Draws any quantity of each layer over training as a heat map, the first layer lowest.

    Args:
      values: values by layer, `[steps]` or `[seeds, steps]`.
      steps: training steps `[steps]`, increasing.
      log: whether the colors are logarithmic; values that are not positive are then hatched too.

    Returns:
      The map, for `figure.colorbar(map, ax=ax, label=…, format="%.4g")`.
    """
    arrays = [_draw.checked(f"values[{k!r}]", v, "steps", "seeds, steps") for k, v in values.items()]
    rows = _draw.hatched(ax, np.stack([_draw.over_seeds(array)[0] for array in arrays]), log)
    x = _draw.increasing("steps", steps, rows.shape[1])
    gaps = np.diff(x) / 2 if len(x) > 1 else np.full(1, 0.5)
    edges = np.append(x - np.append(gaps[:1], gaps)[: len(x)], x[-1] + gaps[-1])
    ax.set_yticks(range(len(rows)), list(values))
    ax.set_xlabel("training step")
    options: dict[str, Any] = {"cmap": COLOR_MAP, "norm": _draw.color_norm(rows, 14, log), "rasterized": True}
    return ax.pcolormesh(edges, np.arange(len(rows) + 1) - 0.5, rows, **options)


def gradient_probe(
    ax: Axes,
    probes: Mapping[str, GradientProbe],
    steps: Any,
    *,
    quantity: str = "loss",
    log: bool | None = None,
) -> Lines:
    """Draws a quantity of the gradient probe over training.

    The bands of loss, gradient distance and cosine go from the smallest to the largest over the step sizes (with seeds,
    the mean over seeds of each), and the line is the mean over both. Of the smoothness, the maximum over the step sizes
    is drawn, which is the effective β.

    Args:
      probes: probes by label, with arrays `[steps, K]` or `[seeds, steps, K]`.
      steps: training steps of the probes, `[steps]`, increasing.
      quantity: 'loss', 'gradient_distance', 'gradient_cosine' or 'smoothness'.
      log: whether the vertical axis is logarithmic; by default it is for the smoothness, and for others where a line
        spans four decades or more.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Figure 4 (a to c): the bands are theirs, lines and cosine are ours.
    """
    ylabel, is_log = _draw.label_and_scale(quantity, _draw.PROBE, log)
    bands = {}
    for label, probe in probes.items():
        array = _draw.checked(f"probes[{label!r}].{quantity}", getattr(probe, quantity), "steps, K", "seeds, steps, K")
        bands[label] = [_draw.over_seeds(part)[0] for part in (_draw.averaged(array), array.min(-1), array.max(-1))]
        if quantity == "smoothness":
            bands[label] = _draw.over_seeds(np.asarray(probe.max_smoothness, float))
    is_log |= log is None and any(_draw.is_wide(line) for line, _, _ in bands.values())
    return _draw.draw_bands(ax, bands, steps, "training step", ylabel, is_log)


def probe_figure(probes: Any, steps: Any, *, quantities: Sequence[str] = _draw.SANTURKAR, title: str = "") -> Figure:
    """Draws the gradient probe's loss variation, predictiveness and effective β beside each other, with a legend.

    Args:
      probes: probes by label, as in `gradient_probe`, which draws each axes.
      steps: training steps, as in `gradient_probe`.
      quantities: quantities, one for each axes.
      title: title of the figure.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Figure 4.
    """

    def draw(ax: Axes, quantity: str) -> None:
        gradient_probe(ax, probes, steps, quantity=quantity)
        ax.tick_params(labelsize=8)

    parts = [("", functools.partial(draw, quantity=quantity)) for quantity in quantities]
    return panels(title, parts, size=(2.5, 2.9), columns=len(quantities))


def covariate_shift(
    ax: Axes,
    shifts: Mapping[str, CovariateShift],
    steps: Any,
    *,
    layer: int = -1,
    quantity: str = "distance",
    log: bool | None = None,
) -> Lines:
    """Draws the internal covariate shift of a layer over training.

    Args:
      shifts: shifts by label, with arrays `[steps, k]` or `[seeds, steps, k]`.
      steps: training steps of the shifts, `[steps]`, increasing.
      layer: number of the layer among the k; the last by default.
      quantity: 'distance' or 'cosine'.
      log: whether the vertical axis is logarithmic; by default it is for the distance.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Definition 2.1 and Figure 2.
    """
    ylabel, log = _draw.label_and_scale(quantity, _draw.SHIFT, log)
    values = {}
    for label, shift in shifts.items():
        array = _draw.checked(f"shifts[{label!r}].{quantity}", getattr(shift, quantity), "steps, k", "seeds, steps, k")
        if not -array.shape[-1] <= layer < array.shape[-1]:
            raise ValueError(f"layer must be a number among the {array.shape[-1]} of {label!r}, got {layer}.")
        values[label] = array[..., layer]
    return curves(ax, values, steps, ylabel=ylabel, log=log)


def activation_percentiles(
    ax: Axes, percentiles: Mapping[str, Any], steps: Any, *, levels: Sequence[float] = (15, 50, 85)
) -> Lines:
    """Draws percentiles of a nonlinearity's inputs over training: a line at the middle one, a band to the others.

    Args:
      percentiles: arrays `[steps, 3]` by label, such as `percentiles[:, :, unit]` of `ActivationStatistics`.
      steps: training steps of the percentiles, `[steps]`, increasing.
      levels: levels of the percentiles, increasing, for the axis label.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Figure 1 (b, c).
    """
    bands = {}
    for label, value in percentiles.items():
        array = _draw.checked(f"percentiles[{label!r}]", value, "steps, 3")
        if array.shape[1] != 3 or len(levels) != 3:
            raise ValueError(f"percentiles must be 3 with their levels, got {array.shape[1]} and {levels}. Choose 3.")
        bands[label] = array[:, 1], array[:, 0], array[:, 2]
    ylabel = "input, percentiles {:g}, {:g}, {:g}".format(*levels)
    return _draw.draw_bands(ax, bands, steps, "training step", ylabel, False)


def gradient_norms(
    ax: Axes, norms: Mapping[str, Mapping[str, Any]], *, ylabel: str = "gradient norm ‖∂L/∂W‖₂", log: bool = True
) -> Lines:
    """Draws gradient norms by depth, or other numbers of layers, such as the cosines of `ScaleInvariance`.

    Args:
      norms: norms by label and layer, from the input to the output, scalars or `[seeds]`.
      ylabel: label of the vertical axis.
      log: whether the vertical axis is logarithmic.
    """
    names, bands = list(next(iter(norms.values()))), {}
    for label, of_layers in norms.items():
        if list(of_layers) != names:
            raise ValueError(f"norms[{label!r}] must be of the layers {names}, got {list(of_layers)}. Choose the same.")
        rows = [_draw.checked(f"norms[{label!r}][{k!r}]", np.atleast_1d(v), "seeds") for k, v in of_layers.items()]
        bands[label] = _draw.over_seeds(np.stack(rows, -1))
    lines = _draw.draw_bands(ax, bands, np.arange(len(names)), "layer, from input to output", ylabel, log)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    return lines


def learning_rate_range(ax: Axes, ranges: Mapping[str, LearningRateRange]) -> Lines:
    """Draws the loss after training (its mean over the last tenth of the steps) against the learning rate.

    A vertical line and the legend show the rate from which on some seed does not train. Open circles did not train;
    crosses at the upper edge are losses that are not finite or above ten times the first.

    Args:
      ranges: ranges by label, with losses `[R, T]` or `[seeds, R, T]`.

    References:
      Bjorck et al. 2018 (arXiv 1806.02375), section 3.
    """
    lines, has_failed = {}, False
    for i, (label, result) in enumerate(ranges.items()):
        loss = _draw.checked(f"ranges[{label!r}].loss", result.loss, "R, T", "seeds, R, T")
        rates = np.asarray(result.learning_rates, float).reshape((-1, loss.shape[-2]))[0]
        last = _draw.averaged(loss[..., -max(1, loss.shape[-1] // 10) :])
        band = _draw.over_seeds(np.where(last <= 10 * loss[..., 0].max(), last, np.nan))
        breaks = float(np.min(np.asarray(result.breaks_at, float)))
        line = lines[label] = _draw.draw_band(ax, i, f"{label} ({_draw.outcome(breaks)})", rates, *band)
        failed = ~np.asarray(result.trains).reshape((-1, len(rates))).all(0)
        ax.plot(rates[failed], band[0][failed], "o", mfc="white", color=line.get_color())
        has_failed |= bool(failed.any())
        if np.isfinite(breaks):
            ax.axvline(breaks, color=line.get_color(), linestyle=line.get_linestyle(), linewidth=0.8)
    lost = any(not np.isfinite(np.asarray(line.get_ydata(), float)).all() for line in lines.values())
    _draw.explain(ax, {"o": "did not train" * has_failed, "x": "not finite, or above ten times the first" * lost})
    _draw.set_scale(ax, True, lines)
    ax.set(xlabel="learning rate", ylabel="loss after training", xscale="log")
    return lines


def linear_path(ax: Axes, paths: Mapping[str, LinearPath], *, log: bool = False) -> Lines:
    """Draws the loss between two solutions, a dotted line at the mean of its ends, and an arrow up to the barrier.

    The legend shows the barrier, with seeds the mean of theirs, while the arrow is that of the mean loss.

    Args:
      paths: paths by label, with losses `[K]` or `[seeds, K]`.
      log: whether the vertical axis is logarithmic.

    References:
      Frankle et al. 2020 (arXiv 1912.05671), section 2 and Figure 2.
    """
    lines = {}
    for i, (label, path) in enumerate(paths.items()):
        loss = _draw.checked(f"paths[{label!r}].loss", path.loss, "K", "seeds, K")
        t = np.asarray(path.coordinates, float).reshape((-1, loss.shape[-1]))[0]
        mean, low, high = _draw.over_seeds(loss)
        text = f"{label} (barrier {np.mean(np.asarray(path.barrier, float)):.3g})"
        line = lines[label] = _draw.draw_band(ax, i, text, t, mean, low, high)
        if np.isfinite(mean).all():
            _draw.barrier(ax, t, mean, line.get_color())
    _draw.set_scale(ax, log, lines)
    ax.set(xlabel="position t between the solutions A (0) and B (1)", ylabel="loss L((1 − t) A + t B)")
    return lines


def loss_surface(
    ax: Axes, losses: Any, coordinates: Sequence[Any], *, levels: int | Sequence[float] = 14, log: bool = False
) -> ScalarMappable:
    """Draws the loss over a plane, `L(W + a d₁ + b d₂)`, as filled and labeled contours, or a relief on 3-D axes.

    Args:
      ax: axes to draw on; made with `projection="3d"` for a relief.
      losses: losses `[K₁, K₂]`, both at least 2, as `bnjax.analysis.loss_surface` returns them.
      coordinates: a and b, `[K₁]` and `[K₂]`, increasing.
      levels: about how many contours to draw, or their levels, increasing.
      log: whether the levels grow geometrically, and the relief's height is log₁₀ of the loss.

    Returns:
      The filled contours, for `figure.colorbar(contours, ax=ax, label="loss", format="%.4g")`, or the relief.

    References:
      Li et al. 2018 (arXiv 1712.09913), Figures 1, 5 and 9.
    """
    a, b, z = _draw.checked_grid(losses, coordinates)
    ax.set(xlabel="coordinate a along d₁", ylabel="coordinate b along d₂")
    if isinstance(ax, Axes3D):
        return _draw.relief(ax, a, b, z, log)
    return _draw.contours(ax, a, b, z, levels, log)


def trajectory(
    ax: Axes, plane: TrajectoryPlane, *, label: str = "training", heights: Any = None, log: bool = False
) -> Line2D:
    """Draws a training trajectory in its plane, from a circle to a star, with each direction's part of the variance.

    Args:
      ax: axes to draw on, after `loss_surface`.
      plane: plane with coordinates `[T, d]`, d ≥ 2, of which the first two are drawn.
      label: label of the trajectory in the legend.
      heights: on axes of three dimensions, the loss at each point, `[T]`; or `(losses, coordinates)` as those of
        `loss_surface`, from which it is interpolated, with gaps outside the grid.
      log: whether heights are logarithmic, as in `loss_surface`.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 7 and Figure 9.
    """
    points = _draw.checked_plane(plane)
    where = [points[:, 0], points[:, 1]]
    if isinstance(ax, Axes3D):
        where.append(_draw.shown_height(_draw.heights_at(heights, points), log))
    line = _draw.path(ax, where, label)
    form = "direction {} ({:.1f} %)" if isinstance(ax, Axes3D) else "principal direction {} ({:.1f} % of variance)"
    parts = 100 * np.asarray(plane.explained_variance, float)
    ax.set(xlabel=form.format(1, parts[0]), ylabel=form.format(2, parts[1]))
    return line
