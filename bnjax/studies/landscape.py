"""What the smoothness study measures once training is over, and its figures."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis
from bnjax.studies.engine.plan import Trained, compiler_options
from bnjax.studies.evidence import plots
from bnjax.studies.evidence.plots import Figure, drawing

EIGENPAIRS, TRACE_SAMPLES, PROBES, LANCZOS_STEPS = 5, 10, 2, 40
RADIUS = 0.05  # of SAM's ball
EXAMPLES = 256  # of the batch on which all is measured
PARTS = 16  # of a batch, whose gradients are compared
GRID = np.linspace(-1, 1, 13)  # of the surface along filter-normalized directions
PATH_POINTS = 13
SHOWN = {  # networks whose landscapes along the gradient are drawn beside each other
    "interventions": ("bn", "noisy", "l1", "l2", "linf"),
    "normalizers": ("bn", "renorm", "layer", "group", "weight"),
}
# Compiling these programs, which run once or for a few seeds, takes longer than running them.
_jit_once = functools.partial(jax.jit, compiler_options=compiler_options())


@dataclasses.dataclass(frozen=True)
class Around:
    """The landscape around a network after training, that of the first seed.

    Attributes:
      density: of the Hessian's eigenvalues.
      surface: loss `[13, 13]` along two filter-normalized random directions.
      plane: of the trajectory.
      plane_grid: coordinates in that plane.
      plane_loss: loss on them.
    """

    density: analysis.SpectralDensity
    surface: np.ndarray
    plane: analysis.TrajectoryPlane
    plane_grid: tuple[np.ndarray, np.ndarray]
    plane_loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ends:
    """A variant's networks after training.

    Attributes:
      metrics: numbers of each seed, by name.
      rates: which learning rates train, `[seeds, …]`; None where that was not tried.
      path: from the first seed's network to the second's; None with one seed.
      around: the landscape; None where it is not drawn.
    """

    metrics: dict[str, np.ndarray]
    rates: analysis.LearningRateRange | None
    path: analysis.LinearPath | None
    around: Around | None


def at_the_end(
    network: Any,
    seen: Trained,
    keys: Any,
    examples: Any,
    rates: Any,
    progress: Callable[[float], Any],
    with_landscape: bool,
) -> Ends:
    """Curvature, noise and sharpness of each seed's network, the path between two, and the landscape around the first.

    All on one batch of the training set, in the mode that training descends, with one draw of the noise.

    Args:
      network: a `bnjax.studies.vgg.Network`.
      seen: its training.
      keys: of the seeds.
      examples: images and labels of the training set.
      rates: as that of `Ends`.
      progress: is told the fraction done.
      with_landscape: whether the landscape is measured too.
    """
    progress(0.0)
    batch = tuple(jnp.asarray(v[:EXAMPLES]) for v in examples)
    noise = jax.random.key(0)
    states = seen.state

    kernels = [f"{layer[0]}/kernel" for layer in network.layers if layer[0].startswith("Conv")]

    def of_seed(i: int) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(v[i]), states)

    @_jit_once
    def measured(state: Any, key: Any, x: Any, y: Any) -> dict[str, Any]:
        loss = network.loss(state.batch_stats, noise)
        eigen, trace = jax.random.split(key)
        pairs = analysis.hessian_eigenpairs(loss, state.params, EIGENPAIRS, x, y, key=eigen, num_steps=25)
        return {
            "top_eigenvalue": pairs.values[0],
            "hessian_trace": analysis.hessian_trace(
                loss, state.params, x, y, key=trace, num_samples=TRACE_SAMPLES
            ).estimate,
            "noise_scale": analysis.gradient_noise_scale(loss, state.params, x, y, num_batches=PARTS).scale,
            "confusion_cosine": analysis.gradient_confusion(loss, state.params, x, y, num_batches=PARTS).min_cosine,
            "sam_sharpness": analysis.sam_sharpness(loss, state.params, RADIUS, x, y),
            "scale_cosine": analysis.scale_invariance(loss, state.params, x, y, layers=kernels).cosine.max(),
        }

    found = [measured(of_seed(i), key, *batch) for i, key in enumerate(keys)]
    progress(0.4)
    metrics = {name: np.array([float(one[name]) for one in found]) for name in found[0]}
    metrics["test_accuracy"] = np.array(
        [network.variant.evaluate(of_seed(i), *network.test).accuracy for i in range(len(keys))]
    )
    if rates is not None:
        metrics["largest_rate"] = np.asarray(rates.largest)
    progress(0.5)
    path = None
    if len(keys) > 1:
        path = jax.device_get(_path(network, of_seed(0), of_seed(1).params, noise, batch))
    progress(0.6)
    around = _landscape(network, seen, of_seed(0), noise, batch) if with_landscape else None
    progress(1.0)
    return Ends(metrics, rates, path, around)


def _landscape(network: Any, seen: Trained, state: Any, noise: Any, batch: Any) -> Around:
    key = jax.random.key(1)
    kept = jax.tree.map(lambda v: jnp.asarray(v[0]), seen.looked)
    plane = _jit_once(analysis.trajectory_plane)(kept)
    ends = np.asarray(plane.coordinates)
    margin = 0.2 * (np.ptp(ends, axis=0) + 1e-6)
    grid = tuple(
        np.linspace(low, high, len(GRID)) for low, high in zip(ends.min(0) - margin, ends.max(0) + margin, strict=True)
    )

    @_jit_once
    def density_of(state: Any, x: Any, y: Any):
        loss = network.loss(state.batch_stats, noise)
        return analysis.spectral_density(loss, state.params, x, y, key=key, num_probes=PROBES, num_steps=LANCZOS_STEPS)

    @_jit_once
    def surface_of(state: Any, directions: Any, coordinates: Any, x: Any, y: Any):
        return analysis.loss_surface(
            network.loss(state.batch_stats, noise), state.params, directions, coordinates, x, y
        )

    random = tuple(analysis.random_direction(k, state.params) for k in jax.random.split(key))
    grids = tuple(jnp.asarray(g, jnp.float32) for g in grid)
    surface = surface_of(state, random, (jnp.asarray(GRID, jnp.float32),) * 2, *batch)
    around = surface_of(state.replace(params=plane.origin), plane.directions, grids, *batch)
    density = density_of(state, *batch)
    density, surface, plane = jax.device_get((density, surface, plane))
    return Around(density, surface, plane, grid, np.asarray(around))


def _path(network: Any, state: Any, other: Any, noise: Any, batch: Any) -> analysis.LinearPath:
    """The loss from one network to another, with statistics re-estimated on the path."""

    @_jit_once
    def path(state: Any, other: Any, x: Any, y: Any):
        at = network.variant.prepared(x)
        loss = network.loss(state.batch_stats, noise, mode="reestimated", at=at)
        return analysis.linear_path(loss, state.params, other, x, y, coordinates=jnp.linspace(0, 1, PATH_POINTS))

    return path(state, other, *batch)


def figures(
    vgg: Mapping[str, Trained],
    linear: Mapping[str, Trained],
    ends: Mapping[str, Ends],
    labels: Mapping[str, str],
    title: str,
) -> dict[str, Figure]:
    """All figures by file name."""
    found = {
        "vgg_training.png": _training(vgg, labels, f"VGG: loss of each step's batch ({title})"),
        "vgg_shift.png": _shift(vgg, labels, f"VGG: internal covariate shift ({title})"),
        "curvature.png": _curvature(ends, labels, title),
    }
    if linear:
        found["linear_training.png"] = _training(linear, labels, "Deep linear network: loss", log=True)
        found["linear_shift.png"] = _shift(linear, labels, "Deep linear network: internal covariate shift")
    for net, seen in (("vgg", vgg), ("linear", linear)):
        compared = [name for name in seen if name in ("none", "bn")]
        for suffix, names in (
            ("", compared),
            *((f"_{key}", [n for n in of if n in seen]) for key, of in SHOWN.items()),
        ):
            probes = {labels[n]: seen[n].measurements["probe"] for n in names}
            if len(probes) > 1:
                times = seen[names[0]].measured_at
                quantities = ("loss", "gradient_distance", "smoothness", "gradient_cosine")
                first = list(seen).index(names[0])
                figure = drawing.probe_figure(probes, times, quantities=quantities, first_style=first)
                what = {
                    "vgg": f"VGG, along the gradient ({title})",
                    "linear": "Deep linear network, along the gradient",
                }
                figure.suptitle(what[net], fontsize=10)
                found[f"{net}_landscape{suffix}.png"] = figure
    shown = {labels[name]: end.around for name, end in ends.items() if end.around is not None}
    if shown:
        found["surfaces.png"] = _surfaces(shown, title)
        found["trajectories.png"] = _trajectories(shown, title)
    rates = {labels[name]: end.rates for name, end in ends.items() if end.rates is not None}
    if rates:
        text = f"VGG after a short training ({title})"
        found["learning_rates.png"] = plots.panel(text, lambda axis: drawing.learning_rate_range(axis, rates))
    return found


def _training(seen: Mapping[str, Trained], labels: Mapping[str, str], title: str, *, log: bool = False) -> Figure:
    """Losses over training, as means over a hundred equal parts of it."""
    values, steps = {}, np.zeros(0)
    for name, one in seen.items():
        loss = np.asarray(one.metrics.loss, float)
        size = max(1, loss.shape[1] // 100)
        loss = loss[:, : loss.shape[1] // size * size].reshape((len(loss), -1, size)).mean(2)
        values[labels[name]], steps = loss, size * np.arange(loss.shape[1])
    return plots.curves(values, steps, "loss", title, log=log)


def _shift(seen: Mapping[str, Trained], labels: Mapping[str, str], title: str) -> Figure:
    """Covariate shift of a middle layer and of the last."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    shifts = {labels[name]: one.measurements["shift"] for name, one in seen.items()}
    times = next(iter(seen.values())).measured_at
    names = next(iter(shifts.values())).layers
    grid = figure.subplots(2, 2, sharex=True)
    for row, quantity in zip(grid, ("distance", "cosine"), strict=True):
        for ax, layer in zip(row, (len(names) // 2, len(names) - 1), strict=True):
            drawing.covariate_shift(ax, shifts, times, layer=layer, quantity=quantity)
            ax.set_title(f"layer {layer + 1} of {len(names)}", fontsize=9)
    drawing.legend(figure)
    return figure


def _curvature(ends: Mapping[str, Ends], labels: Mapping[str, str], title: str) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"VGG after training ({title})", fontsize=10)
    first, second = figure.subplots(1, 2)
    densities = {labels[name]: end.around.density for name, end in ends.items() if end.around is not None}
    if densities:
        drawing.spectral_density(first, densities)
        first.set_title("Hessian's eigenvalues, the first seed", fontsize=9)
    else:
        first.remove()
    paths = {labels[n]: end.path for n, end in ends.items() if end.path is not None}
    if paths:
        drawing.linear_path(second, paths)
        second.set_title("Between two seeds' networks, statistics re-estimated", fontsize=9)
    else:
        second.remove()
    drawing.legend(figure)
    return figure


def _surfaces(shown: Mapping[str, Around], title: str) -> Figure:
    """Contours and relief along filter-normalized random directions."""
    title = f"Loss around the trained VGG, filter-normalized random directions ({title})"
    return _reliefs({label: (around.surface, (GRID, GRID)) for label, around in shown.items()}, title)


def _trajectories(shown: Mapping[str, Around], title: str) -> Figure:
    """The path of training in the plane of its principal components, as contours and as a relief."""
    title = f"The path of training in its principal plane, from circle to star ({title})"
    planes = {label: (around.plane_loss, around.plane_grid) for label, around in shown.items()}
    return _reliefs(planes, title, {label: around.plane for label, around in shown.items()})


def _reliefs(surfaces: Mapping[str, tuple[Any, Any]], title: str, paths: Mapping[str, Any] | None = None) -> Figure:
    """Contours above and reliefs below of losses on grids, beside each other by label, with the paths on them."""
    figure = Figure(figsize=(max(7.5, 4.8 * len(surfaces)), 8.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for i, (label, surface) in enumerate(surfaces.items()):
        ax = figure.add_subplot(2, len(surfaces), i + 1)
        figure.colorbar(drawing.loss_surface(ax, *surface), ax=ax, label="loss", shrink=0.8)
        relief: Any = figure.add_subplot(2, len(surfaces), len(surfaces) + i + 1, projection="3d")
        drawing.loss_surface(relief, *surface)
        ax.set_title(label)
        if paths:
            drawing.trajectory(ax, paths[label])
            drawing.trajectory(relief, paths[label], heights=surface)
    return figure
