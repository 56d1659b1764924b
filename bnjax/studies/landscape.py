"""The measurements of the smoothness study once training is over, and its figures."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis
from bnjax.studies.engine import Trained, compiler_options
from bnjax.studies.evidence import plots
from bnjax.studies.evidence.plots import Figure, drawing

EIGENPAIRS, TRACE_SAMPLES, PROBES, LANCZOS_STEPS = 5, 10, 2, 40
RADIUS = 0.05  # radius of SAM's ball
EXAMPLES = 256  # size of the batch on which all is measured
PARTS = 16  # parts of a batch, whose gradients are compared
GRID = np.linspace(-1, 1, 13)  # coordinates of the surface along filter-normalized directions
PATH_POINTS = 13
QUANTITIES = ("loss", "gradient_distance", "smoothness", "gradient_cosine")
SHOWN = {  # end of a figure's name: networks whose landscapes along the gradient it shows
    "": ("none", "bn"),
    "_interventions": ("bn", "noisy", "l1", "l2", "linf"),
    "_normalizers": ("bn", "renorm", "layer", "group", "weight"),
}
# Compiling these programs, which run once or for a few seeds, takes longer than running them.
_jit_once = functools.partial(jax.jit, compiler_options=compiler_options())


class Around(NamedTuple):
    """The landscape around a network after training, that of the first seed.

    Attributes:
      density: density of the Hessian's eigenvalues.
      surface: loss `[13, 13]` along two filter-normalized random directions.
      plane: plane of the trajectory.
      plane_grid: coordinates in that plane.
      plane_loss: loss on them.
    """

    density: analysis.SpectralDensity
    surface: np.ndarray
    plane: analysis.TrajectoryPlane
    plane_grid: tuple[np.ndarray, np.ndarray]
    plane_loss: np.ndarray


class Ends(NamedTuple):
    """A variant's networks after training.

    Attributes:
      metrics: numbers of each seed, by name.
      rates: learning rates and whether they train, `[seeds, …]`; None where that was not tried.
      path: path from the first seed's network to the second's; None with one seed.
      around: the landscape; None where it is not drawn.
    """

    metrics: dict[str, np.ndarray]
    rates: analysis.LearningRateRange | None
    path: analysis.LinearPath | None
    around: Around | None


def at_the_end(
    network: Any,
    trained: Trained,
    keys: Any,
    examples: Any,
    rates: Any,
    progress: Callable[[float], Any],
    with_landscape: bool,
) -> Ends:
    """Measures curvature, noise and sharpness of each seed's network, a path between two, the landscape around one.

    All is measured on one batch of the training set, in the mode that training descends, with one draw of the noise.

    Args:
      network: a `bnjax.studies.vgg.Network`.
      trained: its training.
      keys: keys of the seeds.
      examples: images and labels of the training set.
      rates: learning rates, as in `Ends`.
      progress: is told the fraction done.
      with_landscape: whether the landscape is measured too.
    """
    progress(0.0)
    batch = tuple(jnp.asarray(v[:EXAMPLES]) for v in examples)
    noise = jax.random.key(0)
    kernels = [f"{layer[0]}/kernel" for layer in network.layers if layer[0].startswith("Conv")]
    states = [jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), trained.state) for i in range(len(keys))]

    @_jit_once
    def measured(state: Any, key: Any, x: Any, y: Any) -> dict[str, Any]:
        loss = network.loss(state.batch_stats, noise)
        at, (eigen, trace) = (loss, state.params), jax.random.split(key)
        return {
            "top_eigenvalue": analysis.hessian_eigenpairs(*at, EIGENPAIRS, x, y, key=eigen, num_steps=25).values[0],
            "hessian_trace": analysis.hessian_trace(*at, x, y, key=trace, num_samples=TRACE_SAMPLES).estimate,
            "noise_scale": analysis.gradient_noise_scale(*at, x, y, num_batches=PARTS).scale,
            "confusion_cosine": analysis.gradient_confusion(*at, x, y, num_batches=PARTS).min_cosine,
            "sam_sharpness": analysis.sam_sharpness(*at, RADIUS, x, y),
            "scale_cosine": analysis.scale_invariance(*at, x, y, layers=kernels).cosine.max(),
        }

    of_seeds = [measured(state, key, *batch) for state, key in zip(states, keys, strict=True)]
    progress(0.4)
    metrics = {name: np.array([float(of_seed[name]) for of_seed in of_seeds]) for name in of_seeds[0]}
    metrics["test_accuracy"] = np.array([network.variant.evaluate(state, *network.test).accuracy for state in states])
    if rates is not None:
        metrics["largest_rate"] = np.asarray(rates.largest)
    progress(0.5)
    path = jax.device_get(_path(network, states[0], states[1], noise, batch)) if len(states) > 1 else None
    progress(0.6)
    around = _landscape(network, trained, states[0], noise, batch) if with_landscape else None
    progress(1.0)
    return Ends(metrics, rates, path, around)


def _landscape(network: Any, trained: Trained, state: Any, noise: Any, batch: Any) -> Around:
    """Measures the landscape around a network, in random directions and in the plane of its training."""
    key = jax.random.key(1)
    plane = _jit_once(analysis.trajectory_plane)(jax.tree.map(lambda v: jnp.asarray(v[0]), trained.looked))
    ends = np.asarray(plane.coordinates)
    margin = 0.2 * (np.ptp(ends, axis=0) + 1e-6)
    ranges = zip(ends.min(0) - margin, ends.max(0) + margin, strict=True)
    grid = tuple(np.linspace(low, high, len(GRID)) for low, high in ranges)

    @_jit_once
    def density_of(state: Any, x: Any, y: Any):
        loss = network.loss(state.batch_stats, noise)
        return analysis.spectral_density(loss, state.params, x, y, key=key, num_probes=PROBES, num_steps=LANCZOS_STEPS)

    @_jit_once
    def surface_of(state: Any, directions: Any, coordinates: Any, x: Any, y: Any):
        loss = network.loss(state.batch_stats, noise)
        return analysis.loss_surface(loss, state.params, directions, coordinates, x, y)

    random = tuple(analysis.random_direction(k, state.params) for k in jax.random.split(key))
    grids = tuple(jnp.asarray(g, jnp.float32) for g in grid)
    surface = surface_of(state, random, (jnp.asarray(GRID, jnp.float32),) * 2, *batch)
    around = surface_of(state.replace(params=plane.origin), plane.directions, grids, *batch)
    density, surface, plane = jax.device_get((density_of(state, *batch), surface, plane))
    return Around(density, surface, plane, grid, np.asarray(around))


def _path(network: Any, state: Any, other: Any, noise: Any, batch: Any) -> analysis.LinearPath:
    """Measures the loss from one network to another, with statistics re-estimated on the path."""

    @_jit_once
    def path(state: Any, other: Any, x: Any, y: Any):
        at = network.variant.prepared(x)
        loss = network.loss(state.batch_stats, noise, mode="reestimated", at=at)
        return analysis.linear_path(loss, state.params, other, x, y, coordinates=jnp.linspace(0, 1, PATH_POINTS))

    return path(state, other.params, *batch)


def figures(
    vgg: Mapping[str, Trained],
    linear: Mapping[str, Trained],
    ends: Mapping[str, Ends],
    labels: Mapping[str, str],
    title: str,
) -> dict[str, Figure]:
    """Draws all figures, by file name."""
    drawn = {
        "vgg_training.png": _training(vgg, labels, f"VGG: loss of each step's batch ({title})"),
        "vgg_shift.png": _shift(vgg, labels, f"VGG: internal covariate shift ({title})"),
        "curvature.png": _curvature(ends, labels, title),
    }
    if linear:
        drawn["linear_training.png"] = _training(linear, labels, "Deep linear network: loss", log=True)
        drawn["linear_shift.png"] = _shift(linear, labels, "Deep linear network: internal covariate shift")
    texts = {"vgg": f"VGG, along the gradient ({title})", "linear": "Deep linear network, along the gradient"}
    for net, trained in (("vgg", vgg), ("linear", linear)):
        for suffix, shown in SHOWN.items():
            names = [name for name in shown if name in trained]
            if len(names) > 1:
                probes = {labels[name]: trained[name].measurements["probe"] for name in names}
                style = {"quantities": QUANTITIES, "first_style": list(trained).index(names[0])}
                figure = drawing.probe_figure(probes, trained[names[0]].measured_at, **style)
                figure.suptitle(texts[net], fontsize=10)
                drawn[f"{net}_landscape{suffix}.png"] = figure
    around = {labels[name]: end.around for name, end in ends.items() if end.around is not None}
    if around:
        text = f"Loss around the trained VGG, filter-normalized random directions ({title})"
        drawn["surfaces.png"] = _reliefs({label: (of.surface, (GRID, GRID)) for label, of in around.items()}, text)
        text = f"The path of training in its principal plane, from circle to star ({title})"
        planes = {label: (of.plane_loss, of.plane_grid) for label, of in around.items()}
        drawn["trajectories.png"] = _reliefs(planes, text, {label: of.plane for label, of in around.items()})
    rates = {labels[name]: end.rates for name, end in ends.items() if end.rates is not None}
    if rates:
        text = f"VGG after a short training ({title})"
        drawn["learning_rates.png"] = plots.panel(text, lambda axis: drawing.learning_rate_range(axis, rates))
    return drawn


def _training(all_trained: Mapping[str, Trained], labels: Mapping[str, str], title: str, **options: Any) -> Figure:
    """Draws losses over training, as means over a hundred equal parts of it."""
    values, steps = {}, np.zeros(0)
    for name, trained in all_trained.items():
        loss = np.asarray(trained.metrics.loss, float)
        size = max(1, loss.shape[1] // 100)
        loss = loss[:, : loss.shape[1] // size * size].reshape((len(loss), -1, size)).mean(2)
        values[labels[name]], steps = loss, size * np.arange(loss.shape[1])
    return plots.curves(values, steps, "loss", title, **options)


def _shift(all_trained: Mapping[str, Trained], labels: Mapping[str, str], title: str) -> Figure:
    """Draws the covariate shift of a middle layer and of the last."""
    shifts = {labels[name]: trained.measurements["shift"] for name, trained in all_trained.items()}
    times = next(iter(all_trained.values())).measured_at
    count = len(next(iter(shifts.values())).layers)
    draw_shift = functools.partial(drawing.covariate_shift, shifts=shifts, steps=times)
    draw = [
        (f"layer {layer + 1} of {count}", functools.partial(draw_shift, layer=layer, quantity=quantity))
        for quantity in ("distance", "cosine")
        for layer in (count // 2, count - 1)
    ]
    return plots.panels(title, draw, size=(8, 6), sharex=True)


def _curvature(ends: Mapping[str, Ends], labels: Mapping[str, str], title: str) -> Figure:
    """Draws the spectra of the first seed's networks and the paths between two seeds'."""
    densities = {labels[name]: end.around.density for name, end in ends.items() if end.around is not None}
    paths = {labels[name]: end.path for name, end in ends.items() if end.path is not None}
    spectra = ("Hessian's eigenvalues, the first seed", lambda axis: drawing.spectral_density(axis, densities))
    between = ("Between two seeds' networks, statistics re-estimated", lambda axis: drawing.linear_path(axis, paths))
    draw = [part if of else ("", None) for part, of in ((spectra, densities), (between, paths))]
    return plots.panels(f"VGG after training ({title})", draw, size=(11, 4.4))


def _reliefs(surfaces: Mapping[str, tuple[Any, Any]], title: str, paths: Mapping[str, Any] | None = None) -> Figure:
    """Draws contours above and reliefs below of losses on grids, beside each other by label, with the paths on them."""
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
