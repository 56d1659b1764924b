"""Figures of curvature, and a page with a loss surface that turns; all are functions of `bnjax.analysis.plots` too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax._extras import needs
from bnjax.analysis import Eigenpairs, SpectralDensity, TraceEstimate, TrajectoryPlane, _draw
from bnjax.analysis._draw import Lines

with needs("plots"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.container import BarContainer


def spectral_density(
    ax: Axes,
    densities: Mapping[str, SpectralDensity],
    *,
    pairs: Mapping[str, Eigenpairs] | None = None,
    floor: float | None = None,
) -> Lines:
    """Draws the density of a Hessian's eigenvalues, the band of its intervals, and marks at single eigenvalues.

    Args:
      densities: densities by label, `[points]`, without further axes.
      pairs: eigenpairs by the same labels, such as the largest; each eigenvalue is a stem with its residual as width.
        Without them the marks are at the extreme Ritz values, below the density.
      floor: the lowest density shown; by default a millionth of the highest.

    References:
      Ghorbani, Krishnan & Xiao 2019 (arXiv 1901.10159), Figures 1 to 3.
    """
    named = {k: _draw.checked(f"densities[{k!r}].density", d.density, "points") for k, d in densities.items()}
    if unknown := sorted(set(pairs or {}) - set(named)):
        raise ValueError(f"pairs must have labels of densities, {list(named)}, got {unknown}.")
    peak = max(density.max(initial=0, where=np.isfinite(density)) for density in named.values())
    lowest, lines = float(floor or 1e-6 * peak or 1e-6), {}
    for i, (label, density) in enumerate(named.items()):
        grid, low, high, nodes = (
            np.asarray(getattr(densities[label], k), float) for k in ("grid", "low", "high", "nodes")
        )
        ends = np.array([nodes.min(), nodes.max()])
        shown = [np.maximum(np.where(np.isfinite(v), v, density), lowest) for v in (density, low, high)]
        found = (pairs or {}).get(label)
        if found is None:
            values, what = ends, f"Ritz values {ends[0]:.3g} to {ends[1]:.3g}"
        else:
            values = _draw.checked(f"pairs[{label!r}].values", found.values, "k")
            what = f"{len(values)} eigenvalues, {values.min():.3g} to {values.max():.3g}"
        lines[label] = _draw.draw_band(ax, i, f"{label} ({what})", grid, *shown)
        color, place, height = lines[label].get_color(), ax.get_xaxis_transform(), 0.03 + 0.05 * i
        ax.plot(values, np.full(len(values), height), "v^Ds"[i % 4], color=color, transform=place)
        if found is not None:
            ax.vlines(values, 0, height, color=color, linewidth=0.8, transform=place)
            widths = np.asarray(found.residuals, float)
            ax.hlines(np.full(len(values), height), values - widths, values + widths, color=color, transform=place)
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log", ylim=(lowest, None))
    return lines


def layer_weights(ax: Axes, weights: Mapping[str, Any]) -> ScalarMappable:
    """Draws how much of each eigenvector lies in each layer as a map, the first layer lowest.

    Args:
      weights: parts of the squared norm by layer, `[k]`, as `bnjax.analysis.layer_weights` gives them.

    Returns:
      The map, for `figure.colorbar(map, ax=ax, label="part of the squared norm")`.
    """
    rows = [_draw.checked(f"weights[{k!r}]", v, "k") for k, v in weights.items()]
    image = ax.pcolormesh(np.stack(rows), vmin=0, cmap=_draw.COLOR_MAP)
    count = len(rows[0])
    ax.set_yticks(np.arange(len(rows)) + 0.5, list(weights), fontsize=8)
    ax.set_xticks(np.arange(count) + 0.5, [str(i + 1) for i in range(count)])
    ax.set(xlabel="eigenvector")
    return image


def layer_traces(ax: Axes, traces: Mapping[str, TraceEstimate], *, log: bool = False) -> BarContainer:
    """Draws the trace of each layer's block as a bar with its 95 % interval, the first layer highest.

    Args:
      traces: estimates by layer, as `bnjax.analysis.layer_traces` gives them.
      log: whether the axis of traces is logarithmic, of traces that are positive.
    """
    named = {
        k: [_draw.checked(f"traces[{name!r}].{k}", np.ravel(getattr(t, k)), "1") for name, t in traces.items()]
        for k in ("estimate", "low", "high")
    }
    if any(len(value) > 1 for values in named.values() for value in values):
        raise ValueError("traces must be single estimates, without further axes. Select one.")
    means, low, high = (np.concatenate(values) for values in named.values())
    errors = np.where(np.isfinite([low, high]), np.abs(np.stack([means - low, high - means])), 0)
    bars = ax.barh(np.arange(len(means)), means, xerr=errors, color=_draw.COLORS[0], capsize=3, height=0.7)
    ax.set_yticks(np.arange(len(means)), list(traces), fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set(xlabel="trace of the layer's block (95 % interval)")
    if log:
        ax.set_xscale("log")
    return bars


def explore(
    losses: Any,
    coordinates: Sequence[Any],
    path: str | Path | None = None,
    *,
    plane: TrajectoryPlane | None = None,
    title: str = "",
    log: bool = False,
) -> Any:
    """Makes a page with a loss surface that can be turned, magnified and read, in one file that needs no network.

    Args:
      losses: losses over a plane, `[K₁, K₂]`, as of `bnjax.analysis.loss_surface`; what is not finite is a hole.
      coordinates: the coordinates along both directions, `([K₁], [K₂])`, increasing.
      path: where to write the page; nowhere by default.
      plane: a training's trajectory in the plane, drawn at the surface's height.
      title: title of the page.
      log: whether heights and colors are logarithms of the losses; those that are not positive are holes.

    Returns:
      The `plotly.graph_objects.Figure`, which notebooks show.

    Raises:
      MissingExtraError: without Plotly, which the extra 'explore' installs.
    """
    with needs("explore"):
        import plotly.graph_objects as go
    a, b, z = _draw.checked_grid(losses, coordinates)
    z = np.where(np.isfinite(z) & ((z > 0) | (not log)), z, np.nan)
    heights = np.log10(z) if log else z
    name = "log₁₀ loss" if log else "loss"
    text = f"a %{{x:.4g}}<br>b %{{y:.4g}}<br>{name} %{{z:.4g}}<extra></extra>"
    surface = go.Surface(x=a, y=b, z=heights.T, colorscale="Viridis", colorbar={"title": name}, hovertemplate=text)
    drawn: list[Any] = [surface]
    if plane is not None:
        points = _draw.checked_plane(plane)
        above = _draw.heights_at((heights, (a, b)), points)
        steps = np.arange(len(points))
        drawn.append(
            go.Scatter3d(
                x=points[:, 0],
                y=points[:, 1],
                z=above,
                mode="lines+markers",
                line={"color": "black", "width": 5},
                marker={"size": 3, "color": "black"},
                name="training",
                customdata=steps,
                hovertemplate="point %{customdata} of the training<extra></extra>",
            )
        )
    axes = {"xaxis_title": "a along d₁", "yaxis_title": "b along d₂", "zaxis_title": name, "aspectmode": "cube"}
    figure = go.Figure(drawn, {"title": {"text": title}, "scene": axes, "margin": {"l": 0, "r": 0, "b": 0}})
    if path is not None:
        figure.write_html(path, include_plotlyjs=True, full_html=True)
    return figure
