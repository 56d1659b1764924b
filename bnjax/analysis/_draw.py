"""The common parts of figures: palette, checks of shapes, lines with bands, and scales."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax._extras import needs

with needs("plots"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogFormatter, MaxNLocator

# Okabe & Ito's palette, and a line style beside each color for print in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
COLOR_MAP = "viridis"
# What a label names has one color in every figure, and what it adds one dash: the first that it contains counts.
NAMED = {
    **dict.fromkeys(("no batch norm", "without batch norm", "plain"), "#000000"),
    **dict.fromkeys(("batch renorm", "l₁ norm", "l₂ norm", "l∞ norm"), "#009E73"),
    **{"noisy batch norm": "#CC79A7", "layer norm": "#E69F00", "group norm": "#D55E00", "weight norm": "#999999"},
    **dict.fromkeys(("ghost batch", "batch norm after", "after activation", "after, "), "#56B4E9"),
    **dict.fromkeys(("batch norm", "before activation", "on the input"), "#0072B2"),
}
DASHES = {
    "norms as": ":",  # though it says "with decay"
    **{"l₁ norm": "--", "l₂ norm": ":", "l∞ norm": "-.", "no scale": "--", "no momentum": ":", "running average": "-."},
    **{"on the input": "--", "5 times": "-.", "30 times": ":", "LRN": "--", "distorted": ":", "decay": "--"},
    **{"sigmoid, ": "--", "shared": "--", "each time step, ε": "-.", "ε = ": ":", "from 0": "-.", "a bias": ":"},
    "eleven, ": "--",
}

MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))

Lines = dict[str, Line2D]

# The quantities of results, each with the axis label and whether the axis is logarithmic by default.
PROBE = {
    "loss": ("loss L(W − a d)", False),
    "gradient_distance": ("gradient distance\n‖∇L(W − a d) − ∇L(W)‖₂", False),
    "gradient_cosine": ("cosine of ∇L(W − a d)\nand ∇L(W)", False),
    "smoothness": ("effective β-smoothness\nmax ‖Δ∇L‖₂ / ‖ΔW‖₂", True),
}
SANTURKAR = ("loss", "gradient_distance", "smoothness")  # the panels of their Figure 4
SHIFT = {"distance": ("shift ‖G − G′‖₂", True), "cosine": ("cosine of G and G′", False)}


def line_style(i: int, label: str = "") -> dict[str, Any]:
    """Returns color and line style: those that belong to what a label names, such as 'layer norm', whatever the figure.

    Other labels get those of the i-th of up to 64 distinct lines.
    """
    color = next((color for name, color in NAMED.items() if name in label), None)
    if color is None:
        return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[(i + i // len(COLORS)) % len(STYLES)]}
    return {"color": color, "linestyle": next((dash for name, dash in DASHES.items() if name in label), "-")}


def checked(name: str, value: Any, *shapes: str) -> np.ndarray:
    """Returns a value as float64, checked to be of one of the shapes, such as 'seeds, steps'."""
    array = np.asarray(value, float)
    if array.size == 0 or array.ndim not in {shape.count(",") + 1 for shape in shapes}:
        expected = " or ".join(f"[{shape}]" for shape in shapes)
        raise ValueError(
            f"{name} must be of shape {expected}, not empty, got {list(array.shape)}. Select or stack axes."
        )
    return array


def increasing(name: str, value: Any, count: int) -> np.ndarray:
    array = np.asarray(value, float)
    if array.shape != (count,) or not np.isfinite(array).all() or (np.diff(array) <= 0).any():
        raise ValueError(
            f"{name} must be {count} increasing numbers, as many as there are values, got {array}. "
            f"For measurements at every n-th step: n * np.arange({count})."
        )
    return array


def averaged(values: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # the mean of infinities of both signs is NaN
        return values.mean(axis)


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, smallest and largest `[n]` of values `[n]` or `[seeds, n]` over seeds."""
    values = values.reshape((-1, values.shape[-1]))
    return averaged(values, 0), values.min(0), values.max(0)


def label_and_scale(quantity: str, table: Mapping[str, tuple[str, bool]], log: bool | None) -> tuple[str, bool]:
    if quantity not in table:
        raise ValueError(f"quantity must be one of {', '.join(table)}, got {quantity!r}.")
    return table[quantity][0], table[quantity][1] if log is None else log


def draw_bands(
    ax: Axes,
    bands: Mapping[str, Any],
    x: Any,
    xlabel: str,
    ylabel: str,
    log: bool,
    ordered: bool = False,
) -> Lines:
    """Draws lines with bands, given as `(line, low, high)` by label."""
    lines = {}
    for i, (label, band) in enumerate(bands.items()):
        color = colormaps[COLOR_MAP](0.9 * i / max(1, len(bands) - 1)) if ordered else None
        lines[label] = draw_band(ax, i, label, increasing("steps", x, len(band[0])), *band, color=color)
    set_scale(ax, log, lines)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return lines


def draw_band(ax: Axes, i: int, label: str, x: Any, line: Any, low: Any, high: Any, color: Any = None) -> Line2D:
    """Draws the i-th line of an axes with its band, gaps where it is not finite, and crosses above the gaps."""
    style = (line_style(i) | {"color": color}) if color else line_style(i, label)
    finite = np.isfinite(line) & np.isfinite(low) & np.isfinite(high)
    line, low, high = (np.where(finite, v, np.nan) for v in (line, low, high))
    few = len(x) < 25 or not finite.all()  # markers show single points too
    (drawn,) = ax.plot(x, line, label=label, linewidth=1.5, marker="." if few else None, **style)
    if (low < high).any():
        ax.fill_between(x, low, high, alpha=0.22, **style)
    if not finite.all():
        y = np.full((~finite).sum(), 0.97 - 0.04 * (i % len(COLORS)))
        ax.plot(x[~finite], y, "x", color=style["color"], transform=ax.get_xaxis_transform())
    return drawn


def explain(ax: Axes, marks: Mapping[str, str]) -> None:
    """Adds marks to the legend, by what they mean; none where that is empty."""
    for mark, text in marks.items():
        if text:
            ax.plot([], [], mark, color="#666666", mfc="white", label=text)


def is_wide(line: np.ndarray) -> bool:
    """Returns whether a line is positive and spans four decades or more."""
    finite = line[np.isfinite(line)]
    return bool(len(finite)) and finite.min() > 0 and bool(finite.max() >= 1e4 * finite.min())


def set_scale(ax: Axes, log: bool, lines: Lines) -> None:
    """Makes the vertical axis logarithmic where it is wanted and some value is positive."""
    if log and any((np.asarray(line.get_ydata()) > 0).any() for line in lines.values()):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(PlainFormatter())
        ax.yaxis.set_minor_formatter(PlainFormatter())


class PlainFormatter(LogFormatter):
    """A formatter that writes 0.2 rather than 2 × 10⁻¹, and nothing where labels would be crowded."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def hatched(ax: Axes, values: np.ndarray, log: bool) -> np.ma.MaskedArray:
    """Masks what a map can't show, and hatches the axes behind."""
    bad = ~np.isfinite(values) | (log & (values <= 0))
    if bad.any():
        ax.patch.set(facecolor="0.9", edgecolor="0.6", hatch="///")
    return np.ma.array(values, mask=bad)


def shown_height(values: np.ndarray, log: bool) -> np.ndarray:
    finite = np.isfinite(values) & ((values > 0) | (not log))
    values = np.where(finite, values, np.nan)
    return np.log10(values) if log else values


def checked_grid(losses: Any, coordinates: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns both coordinates and the losses of a surface, checked."""
    z = checked("losses", losses, "K₁, K₂")
    if min(z.shape) < 2 or len(coordinates) != 2:
        raise ValueError(f"losses must be of 2 by 2 points at least, with 2 coordinates, got {list(z.shape)}.")
    a, b = (increasing(f"coordinates[{i}]", coordinates[i], z.shape[i]) for i in range(2))
    return a, b, z


def checked_plane(plane: Any) -> np.ndarray:
    """Returns the coordinates of a plane, checked to have two directions at least."""
    points = checked("plane.coordinates", plane.coordinates, "T, d")
    if points.shape[1] < 2:
        raise ValueError(f"plane must have at least 2 directions, got {points.shape[1]}. Use num_directions=2.")
    return points


def heights_at(heights: Any, points: np.ndarray) -> np.ndarray:
    """Returns heights of points, interpolated where they are given as a surface."""
    if heights is None:
        raise ValueError("heights must be given on axes of three dimensions. Pass (losses, coordinates) or the losses.")
    if isinstance(heights, tuple):
        from scipy.interpolate import RegularGridInterpolator

        a, b, z = checked_grid(*heights)
        return RegularGridInterpolator((a, b), z, bounds_error=False)(points[:, :2])
    values = checked("heights", heights, "T")
    if len(values) != len(points):
        raise ValueError(f"heights must be {len(points)}, as many as the points, got {len(values)}.")
    return values


def color_norm(values: np.ma.MaskedArray, levels: int | Sequence[float], log: bool) -> Any:
    """Spreads colors evenly over given levels, or about as many round ones; geometric only where the range is wide."""
    low, high = (values.min(), values.max()) if values.count() else (1.0, 1.0)
    if not isinstance(levels, int):
        bounds = np.asarray(levels, float)
    elif log and high >= 10 * low:
        every = np.ceil(np.log10(high / low) / levels)
        decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)), every)
        fine = [m for m in MANTISSAS if len(m) * np.log10(high / low) <= levels] or MANTISSAS[:1]
        bounds = np.append(np.outer(10.0**decades, fine[-1]), 10.0 ** (decades[-1] + every))
        bounds = bounds[np.searchsorted(bounds, low, "right") - 1 : np.searchsorted(bounds, high) + 1]
    else:
        low, high = (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        bounds = np.asarray(MaxNLocator(levels).tick_values(low, high))
        bounds = bounds[bounds > 0] if log else bounds
    extend: Any = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[low < bounds[0], high > bounds[-1]]
    return BoundaryNorm(bounds, 256, extend=extend)


def relief(ax: Any, a: np.ndarray, b: np.ndarray, z: np.ndarray, log: bool) -> ScalarMappable:
    """Draws a surface on axes of three dimensions."""
    ax.computed_zorder = False  # the relief would hide a trajectory otherwise
    ax.set_zlabel("log₁₀ loss" if log else "loss")
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.labelpad = 8
        axis.set_major_locator(MaxNLocator(5))
    ax.set_box_aspect(None, zoom=0.8)  # leaves room for the labels
    options = {"cmap": COLOR_MAP, "rcount": len(a), "ccount": len(b), "zorder": 1}
    return ax.plot_surface(*np.meshgrid(a, b, indexing="ij"), shown_height(z, log), **options)


def contours(ax: Axes, a: np.ndarray, b: np.ndarray, z: np.ndarray, levels: Any, log: bool) -> ScalarMappable:
    """Draws a surface by filled contours, every other one with a line and its value."""
    shown = hatched(ax, z.T, log)
    norm = color_norm(shown, levels, log)
    filled = ax.contourf(a, b, shown, levels=norm.boundaries, cmap=COLOR_MAP, norm=norm, extend=norm.extend)
    inside = [level for level in norm.boundaries[::2] if shown.count() and shown.min() < level < shown.max()]
    if inside:
        lines = ax.contour(a, b, shown, levels=inside, colors="black", linewidths=0.6)
        for text in ax.clabel(lines, fmt="%.4g", fontsize=8, zorder=6):
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    return filled


def path(ax: Axes, where: Sequence[np.ndarray], label: str) -> Line2D:
    """Draws a path of black points with a white edge, from a circle to a star."""
    style: dict[str, Any] = {
        "color": "black",
        "path_effects": [withStroke(linewidth=3, foreground="white")],
        "zorder": 5,
    }
    (line,) = ax.plot(*where, linewidth=1.2, marker=".", markersize=4, label=label, **style)
    for i, marker, size in ((0, "o", 7), (-1, "*", 12)):
        ax.plot(*(v[[i]] for v in where), linestyle="", marker=marker, markersize=size, mfc="white", **style)
    return line


def barrier(ax: Axes, t: np.ndarray, loss: np.ndarray, color: Any) -> None:
    """Draws a dotted line at the mean of a loss's ends, and an arrow from it to the largest loss."""
    top, mean = np.argmax(loss), (loss[0] + loss[-1]) / 2
    arrow = {"arrowstyle": "<->", "color": color, "shrinkA": 0, "shrinkB": 0}
    ax.plot(t[[0, -1]], [mean, mean], color=color, linewidth=0.8, linestyle=":")
    ax.annotate("", (t[top], loss[top]), (t[top], mean), arrowprops=arrow)


def grid(title: str, count: int, size: tuple[float, float], columns: int, **shared: Any) -> tuple[Figure, np.ndarray]:
    """Returns a figure with a title, and some axes of some size in inches, row by row."""
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    places = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for ax in places[count:]:
        ax.remove()
    return figure, places[:count]


def outcome(breaks: float) -> str:
    """Says from which learning rate on training fails: NaN from the first, infinity at none."""
    return f"breaks at {breaks:.3g}" if np.isfinite(breaks) else "never trains" if np.isnan(breaks) else "never breaks"
