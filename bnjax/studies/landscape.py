"""What is measured of landscapes along the gradient and once training is over, with the figures of it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis
from bnjax.studies.data import Dataset
from bnjax.studies.engine import Trained, Variant, compiler_options
from bnjax.studies.evidence import Results
from bnjax.studies.evidence.plots import Figure, drawing

EIGENPAIRS, TRACE_SAMPLES, PROBES, LANCZOS_STEPS = 5, 10, 2, 40
RADIUS = 0.05  # radius of SAM's ball
EXAMPLES = 256  # size of the batch on which all is measured
PARTS = 16  # parts of a batch, whose gradients are compared
GRID = np.linspace(-1, 1, 13)  # coordinates of the surface along filter-normalized directions
PATH_POINTS = 13
QUANTITIES = ("loss", "gradient_distance", "smoothness", "gradient_cosine")
SHOWN = {  # end of a figure's name: what its networks are, and their names; they share figures with batch norm
    "": ("plain and batch norm", ("none", "bn")),
    "_interventions": ("noise and l_p norms", ("bn", "noisy", "l1", "l2", "linf")),
    "_normalizers": ("other normalizers", ("bn", "renorm", "layer", "group", "weight")),
}
# Compiling these programs, which run once or for a few seeds, takes longer than running them.
_jit_once = functools.partial(jax.jit, compiler_options=compiler_options())


class Ends(NamedTuple):
    """A variant's networks after training; the landscape of the first seed's is None where it is not measured.

    Attributes:
      metrics: numbers of each seed, by name.
      path: path from the first seed's network to the second's; None with one seed.
      rates: learning rates and whether they train, `[seeds, …]`; None where that was not tried.
      density: density of the Hessian's eigenvalues.
      plane: plane of the trajectory.
      surfaces: loss `[13, 13]` and coordinates along two filter-normalized random directions, and in the plane.
    """

    metrics: dict[str, np.ndarray]
    path: analysis.LinearPath | None
    rates: Any = None  # `bnjax.analysis.LearningRateRange`
    density: Any = None  # `bnjax.analysis.SpectralDensity`
    plane: Any = None  # `bnjax.analysis.TrajectoryPlane`
    surfaces: Any = None


def at_the_end(
    network: Variant, trained: Trained, keys: Any, images: Dataset, rates: Any, progress: Callable[[float], Any]
) -> Ends:
    """Measures curvature, noise and sharpness of each seed's network, a path between two, the landscape around one.

    All is measured on one batch of the training set, in the mode that training descends, with one draw of the noise.

    Args:
      network: the variant.
      trained: its training.
      keys: keys of the seeds.
      images: the data set.
      rates: learning rates, as in `Ends`; None for a network whose landscape is not measured either.
      progress: is told the fraction done.
    """
    progress(0.0)
    batch, noise = tuple(jnp.asarray(v[:EXAMPLES]) for v in images.train), {"noise": jax.random.key(0)}
    kernels = [f"{layer[0]}/kernel" for layer in network.layers if layer[0].startswith("Conv")]

    def of_state(measure: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles what is measured of a loss function, parameters and arrays, as a function of a state and arrays."""
        return _jit_once(
            lambda state, *arrays: measure(network.loss(state.batch_stats, rngs=noise), state.params, *arrays)
        )

    @of_state
    def measured(loss: Any, params: Any, key: Any, x: Any, y: Any) -> dict[str, Any]:
        at, (eigen, trace) = (loss, params), jax.random.split(key)
        return {
            "top_eigenvalue": analysis.hessian_eigenpairs(*at, EIGENPAIRS, x, y, key=eigen, num_steps=25).values[0],
            "hessian_trace": analysis.hessian_trace(*at, x, y, key=trace, num_samples=TRACE_SAMPLES).estimate,
            "noise_scale": analysis.gradient_noise_scale(*at, x, y, num_batches=PARTS).scale,
            "confusion_cosine": analysis.gradient_confusion(*at, x, y, num_batches=PARTS).min_cosine,
            "sam_sharpness": analysis.sam_sharpness(*at, x, y, radius=RADIUS),
            "scale_cosine": analysis.scale_invariance(*at, x, y, layers=kernels).cosine.max(),
        }

    @_jit_once
    def path_to(state: Any, other: Any, x: Any, y: Any) -> analysis.LinearPath:
        loss = network.loss(state.batch_stats, rngs=noise, mode="reestimated", at=network.prepared(x))
        return analysis.linear_path(loss, state.params, other, x, y, coordinates=jnp.linspace(0, 1, PATH_POINTS))

    states = trained.states
    of_seeds = [measured(state, key, *batch) for state, key in zip(states, keys, strict=True)]
    progress(0.4)
    metrics = {name: np.array([float(of_seed[name]) for of_seed in of_seeds]) for name in of_seeds[0]}
    metrics["test_accuracy"] = np.array([network.evaluate(state, *images.test).accuracy for state in states])
    progress(0.5)
    path = jax.device_get(path_to(states[0], states[1].params, *batch)) if len(states) > 1 else None
    progress(0.6)
    if rates is None:
        progress(1.0)
        return Ends(metrics, path)
    metrics["largest_rate"] = np.asarray(rates.largest)
    state, key = states[0], jax.random.key(1)
    density_of = of_state(
        functools.partial(analysis.spectral_density, key=key, num_probes=PROBES, num_steps=LANCZOS_STEPS)
    )
    surface_of = of_state(analysis.loss_surface)
    random = tuple(analysis.random_direction(k, state.params) for k in jax.random.split(key))
    plane = _jit_once(analysis.trajectory_plane)(jax.tree.map(lambda v: jnp.asarray(v[0]), trained.looked))
    ends = np.asarray(plane.coordinates)
    margin = 0.2 * (np.ptp(ends, axis=0) + 1e-6)
    ranges = zip(ends.min(0) - margin, ends.max(0) + margin, strict=True)
    surfaces = []
    for origin, directions, grid in (
        (state.params, random, (GRID, GRID)),
        (plane.origin, plane.directions, tuple(np.linspace(low, high, len(GRID)) for low, high in ranges)),
    ):
        coordinates = tuple(jnp.asarray(g, jnp.float32) for g in grid)
        surfaces.append((surface_of(state.replace(params=origin), directions, coordinates, *batch), grid))
    density, plane, surfaces = jax.device_get((density_of(state, *batch), plane, surfaces))
    progress(1.0)
    return Ends(metrics, path, rates, density, plane, surfaces)


def add(results: Results, trained: Trained, at_the_end: Mapping[str, np.ndarray], last: slice) -> None:
    """Adds the numbers of one training: those measured on the way, those at the end, and its loss over the last steps.

    Args:
      results: the study's.
      trained: a training measured by a gradient probe and the covariate shift.
      at_the_end: metrics of each seed's network after training.
      last: the steps over which the final loss is the mean.
    """
    probe: analysis.GradientProbe = trained.measurements["probe"]
    shift, loss = trained.measurements["shift"], np.asarray(trained.metrics.loss)
    probed = ("loss_min", "loss_max", "distance_min", "distance_max", "cosine_min", "max_smoothness", "gradient_norm")
    curves = {"train_loss": loss, "train_accuracy": trained.metrics.accuracy}
    curves |= {name.removeprefix("max_"): getattr(probe, name) for name in probed}
    curves |= {"shift_distance": shift.distance, "shift_cosine": shift.cosine}
    curves |= {"layer_gradient_norm": shift.gradient_norm}
    known = np.isfinite(shift.cosine[:, :, 1:]) & (shift.distance[:, :, 1:] > 0)  # neither gradient is zero
    ratio = np.divide(shift.distance[:, :, 1:], shift.gradient_norm[:, :, 1:], where=known, out=np.ones(known.shape))
    metrics = {
        "final_loss": loss[:, last].mean(1),
        "loss_range": np.mean(probe.loss_max - probe.loss_min, 1),
        "gradient_distance": np.mean(probe.distance_max, 1),
        "smoothness": np.mean(np.asarray(probe.max_smoothness), 1),
        "shift_cosine": _mean_of_finite(shift.cosine[:, :, 1:]),
        "shift_defined": np.mean(np.isfinite(shift.cosine[:, :, 1:]), (1, 2)),
        "log10_relative_shift": _mean_of_finite(np.where(known, np.log10(ratio), np.nan)),
        **at_the_end,
    }
    results.add(trained, {}, metrics, {key: np.asarray(values, np.float32) for key, values in curves.items()})
    results.arrays[f"{trained.plan.name}/measured_at"] = trained.measured_at


def add_shares(results: Results, network: str, plain: str) -> None:
    """Adds the shares of the measured steps at which a network is smoother than the plain one at the same seed.

    The smaller is the smoother, and what is not finite is larger than all else. Networks that were measured at
    different steps are compared at those that both have.
    """
    at, at_plain = (results.arrays[f"{name}/measured_at"] for name in (network, plain))
    ours, theirs = (_curves(results, name) for name in (network, plain))
    _, mine, others = np.intersect1d(at, at_plain, return_indices=True)
    for key, values in ours.items():
        of_network, of_plain = values[:, mine], theirs[key][:, others]
        is_smaller = np.isfinite(of_network) & (~np.isfinite(of_plain) | (of_network < of_plain))
        results.set_metric(network, f"share_with_smaller_{key}", is_smaller.mean(1))


def _curves(results: Results, variant: str) -> dict[str, np.ndarray]:
    """Returns a variant's curves along the gradient of which the smaller are the smoother."""
    keys = ("loss_min", "loss_max", "distance_max", "smoothness")
    low, high, distance, beta = (results.arrays[f"{variant}/{key}"] for key in keys)
    return {"loss_range": high - low, "gradient_change": distance, "beta": beta}


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Returns for each seed the mean of the numbers; NaN where there is none."""
    count = np.isfinite(values).sum((1, 2))
    total = np.where(np.isfinite(values), values, 0).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def figures_on_the_way(
    all_trained: Mapping[str, Trained], labels: Mapping[str, str], text: str, title: str, *, log: bool = False
) -> dict[str, Figure]:
    """Draws loss, covariate shift and landscapes along the gradient of trainings by label, by file name.

    `labels` are those of the names in `SHOWN`, `text` says which network it is, and `title` ends that of each figure.
    Networks in one panel are shown for as long as all of them were trained.
    """
    groups = {}
    for suffix, (what, names) in SHOWN.items():
        of = {labels[name]: all_trained[labels[name]] for name in names if labels.get(name) in all_trained}
        if len(of) > 1:
            groups[suffix] = what, of
    shown = list(groups.values())
    drawn = {
        "training.png": _training(shown, f"{text}: loss of each step's batch ({title})", log),
        "shift.png": _shift(shown, f"{text}: internal covariate shift ({title})"),
    }
    for suffix, (_, of) in groups.items():
        probes, times = _measured(of, "probe")
        style = {"quantities": QUANTITIES, "title": f"{text}, along the gradient ({title})"}
        drawn[f"landscape{suffix}.png"] = drawing.probe_figure(probes, times, **style)
    return drawn


def _measured(all_trained: Mapping[str, Trained], name: str) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what was measured of each network, at the steps at which all were, which are those of the shortest."""
    count = min(len(trained.measured_at) for trained in all_trained.values())
    cut = {
        label: jax.tree.map(lambda v: v[:, :count] if np.ndim(v) > 1 else v, trained.measurements[name])
        for label, trained in all_trained.items()
    }
    return cut, next(iter(all_trained.values())).measured_at[:count]


def figures_at_the_end(ends: dict[str, Ends], title: str) -> dict[str, Figure]:
    """Draws what was measured of networks by label after training, by file name."""
    paths = {label: end.path for label, end in ends.items() if end.path is not None}
    around = {label: end for label, end in ends.items() if end.rates is not None}
    densities = {label: end.density for label, end in around.items()}
    spectra = ("Hessian's eigenvalues, the first seed", lambda axis: drawing.spectral_density(axis, densities))
    between = ("Between two seeds' networks, statistics re-estimated", lambda axis: drawing.linear_path(axis, paths))
    curvature = [part for part, of in ((spectra, densities), (between, paths)) if of]
    drawn = {"curvature.png": drawing.panels(f"VGG after training ({title})", curvature, size=(5.5, 4.4))}
    if around:
        text = f"Loss around the trained VGG, filter-normalized random directions, the first seed ({title})"
        drawn["surfaces.png"] = _reliefs(around, 0, text)
        text = f"The path of training in its principal plane, from circle to star, the first seed ({title})"
        drawn["trajectories.png"] = _reliefs(around, 1, text)
        rates = {label: end.rates for label, end in around.items()}
        text = f"VGG after a short training ({title})"
        drawn["learning_rates.png"] = drawing.panels(
            text, [("", lambda axis: drawing.learning_rate_range(axis, rates))]
        )
    return drawn


Groups = Sequence[tuple[str, Mapping[str, Trained]]]
"""What the networks of each group are, and their trainings by label."""


def _training(groups: Groups, title: str, log: bool) -> Figure:
    """Draws losses over training, as means over a hundred equal parts of it, a panel for each group on one scale."""

    def draw(axis: Any, of: Mapping[str, Trained]) -> None:
        steps = min(trained.plan.steps for trained in of.values())
        size = max(1, steps // 100)
        values = {}
        for label, trained in of.items():
            loss = np.asarray(trained.metrics.loss, float)[:, : steps // size * size]
            values[label] = loss.reshape((len(loss), -1, size)).mean(2)
        drawing.curves(axis, values, size * np.arange(steps // size), ylabel="loss", log=log)

    panels = [(what, functools.partial(draw, of=of)) for what, of in groups]
    return drawing.panels(title, panels, size=(4.2, 3.6), columns=len(groups), sharey=True)


def _shift(groups: Groups, title: str) -> Figure:
    """Draws the covariate shift of a middle layer and of the last, a column for each group, a scale for each row."""
    panels = []
    for quantity in ("distance", "cosine"):
        for which in (lambda count: count // 2, lambda count: count - 1):
            for what, of in groups:
                shifts, times = _measured(of, "shift")
                count = len(next(iter(shifts.values())).layers)
                how = {"shifts": shifts, "steps": times, "layer": which(count), "quantity": quantity}
                text = f"layer {which(count) + 1} of {count}: {what}"
                panels.append((text, functools.partial(drawing.covariate_shift, **how)))
    return drawing.panels(title, panels, size=(3.6, 2.5), columns=len(groups), sharex="col", sharey="row")


def _reliefs(ends: Mapping[str, Ends], which: int, title: str) -> Figure:
    """Draws contours above and reliefs below of one of the surfaces, beside each other by label; paths in the plane.

    All have the same levels, colors and heights, which grow geometrically.
    """
    figure = Figure(figsize=(max(7.5, 4.8 * len(ends)), 8.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    values = np.concatenate([np.ravel(end.surfaces[which][0]) for end in ends.values()])
    finite = values[np.isfinite(values) & (values > 0)]
    levels = np.geomspace(finite.min() * 0.999, finite.max() * 1.001, 15) if len(finite) else np.geomspace(0.1, 10, 15)
    flat: list[Any] = []
    for i, (label, end) in enumerate(ends.items()):
        surface = end.surfaces[which]
        flat.append(figure.add_subplot(2, len(ends), i + 1))
        contours = drawing.loss_surface(flat[-1], *surface, levels=levels.tolist(), log=True)
        relief: Any = figure.add_subplot(2, len(ends), len(ends) + i + 1, projection="3d")
        drawing.loss_surface(relief, *surface, log=True).set_clim(*np.log10(levels[[0, -1]]))
        relief.set_zlim(*np.log10(levels[[0, -1]]))
        flat[-1].set_title(label)
        if which == 1:
            drawing.trajectory(flat[-1], end.plane)
            drawing.trajectory(relief, end.plane, heights=surface, log=True)
    figure.colorbar(contours, ax=flat, label="loss", format="%.2g", shrink=0.8)
    return figure
