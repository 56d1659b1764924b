"""S4: two blobs. (a) a shallow network, (b) eleven hidden layers with and without batch norm, (c) inside the layer.

The source draws its blobs once, from an unknown seed: here each seed has blobs of its own. Its part (a) starts running
mean and variance both at 0, with a layer of its own, and so does 'shallow_zero' here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import studies, training
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.studies import Study, data, option
from bnjax.studies.engine import Examples, Job, Report, Trained, Variant, at_inference, seed_keys, train_all
from bnjax.studies.evidence import Results, plots, read_claims


@dataclasses.dataclass(frozen=True)
class Options(studies.Options):
    """The options of a run of the blobs."""

    seeds: int = option(32, "number of seeds")
    epochs: int | None = option(None, "epochs of training", shown="50 shallow, 100 deep, 10 inside")


STUDY = Study(
    "blobs",
    "two blobs: a shallow and an eleven-layer network, and a look inside the layer",
    "S4, training and inference slides (Keras)",
    Options,
    compiled="deep_before",
    fast={"seeds": 4},
    order=2,
)

SETTINGS = {"width": 128, "optimizer": "Adam", "learning_rate": 0.01, "batch_size": 300}
SETTINGS |= {"momentum": 0.99, "epsilon": 1e-3}
_NORM = functools.partial(BatchNorm, momentum=SETTINGS["momentum"], epsilon=SETTINGS["epsilon"])  # of part (c)

# name: (label, hidden layers, place, epochs, epsilon of the source's part)
VARIANTS = {
    "shallow_zero": ("(a) one, batch norm from 0", 1, "before", 50, 1e-5),
    "shallow_before": ("(a) one, batch norm from 1", 1, "before", 50, 1e-5),
    "shallow_bias": ("(a) one, batch norm and a bias", 1, "before", 50, 1e-5),
    "deep_none": ("(b) eleven, no batch norm", 11, "none", 100, 1e-3),
    "deep_before": ("(b) eleven, batch norm", 11, "before", 100, 1e-3),
}
# What the source prints of part (c), whose training it does not seed, to three decimals.
PRINTED = {
    "h": ((2.231, 0.996, 0.742, 1.156), (0.094, -3.605, -2.613, 2.943), (1.894, -1.353, -1.513, 3.84)),
    "r": ((2.326, 0.897, 0.655, 0.723), (0.302, -2.276, -2.051, 1.946), (2.007, -0.723, -1.164, 2.56)),
    "gamma": (1.049, 1.074, 0.923, 0.938),
    "beta": (0.053, 0.063, -0.063, -0.06),
    "mean": (-0.169, -0.214, -0.148, 0.012),
    "var": (1.225, 2.426, 1.309, 1.878),
}
CLAIMS = read_claims(__file__)


def networks(options: Options) -> dict[str, Variant]:
    """Returns the networks of parts (a) and (b) by name."""
    variants = {}
    for name, (label, layers, place, _, epsilon) in VARIANTS.items():
        norm = None if place == "none" else functools.partial(BatchNorm, epsilon=epsilon)
        model = Perceptron((SETTINGS["width"],) * layers, 1, norm, place, use_hidden_bias=name == "shallow_bias")
        optimizer = optax.adam(SETTINGS["learning_rate"], eps=1e-7)
        objective = training.binary_cross_entropy
        variants[name] = Variant(name, label, model, optimizer, (2,), SETTINGS["batch_size"], objective)
    return variants


def run(options: Options, report: Report):
    """Trains parts (a), (b) and (c), each seed on blobs of its own, and judges the claims."""
    seeds = range(options.seeds)
    sets = [data.blobs(seed) for seed in seeds]
    own = [(of.train, of.test) for of in sets]
    train, test = jax.tree.map(lambda *parts: np.stack(parts), *own)  # with a leading axis of seeds
    epochs = {name: options.epochs or epochs for name, (_, _, _, epochs, _) in VARIANTS.items()}
    lengths = {"deep_epochs": epochs["deep_before"], "shallow_epochs": epochs["shallow_before"]}
    results, count = Results(STUDY.name, SETTINGS | lengths, seeds), train.y.shape[1]
    settings = {"key": seed_keys(seeds), "examples": Examples.of(train, {"fitted": train, "test": test}, axis=1)}
    results.examples = dict.fromkeys(("test_accuracy", "population_test_accuracy"), test.y.shape[1])
    of_name = networks(options)
    plans = {name: network.epochs(epochs[name], count) for name, network in of_name.items()}
    plans["shallow_zero"] = dataclasses.replace(plans["shallow_zero"], create=_from_zero(of_name["shallow_zero"]))
    all_trained = train_all([Job(plan, settings) for plan in plans.values()], report, options)
    for trained in all_trained:
        network, (_, layers, place, _, epsilon) = of_name[trained.plan.name], VARIANTS[trained.plan.name]
        metrics = at_inference(network, trained.state, train, test, has_own=True)
        metrics["train_loss_during_epoch"] = trained.final("train_loss")
        metrics["gain_by_population"] = metrics["population_test_accuracy"] - metrics["test_accuracy"]
        shown = {"layers": layers, "place": place, "epochs": trained.plan.steps, "epsilon": epsilon}
        results.add(trained, shown, metrics)
    results.notes["inside"] = inside(options, report)
    results.texts = inside_texts(results)
    inner = results.notes["inside"].values()
    error = max(part["difference"] for part in inner) / max(part["largest"] for part in inner)
    of_source = printed_difference()
    exact = {"relative_error": error, "of_printed_numbers": of_source[0], "by_their_rounding": of_source[1]}
    exact["beyond_their_rounding"] = of_source[0] - of_source[1]
    of_seeds = {name: np.full(options.seeds, value) for name, value in exact.items()}
    results.variants["inside"] = ("(c) inside", {}, of_seeds)
    results.judge(CLAIMS)
    shown = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    panels = {curve: plots.PANELS[curve].replace("test", "validation") for curve in shown}
    title = f"Two blobs, {count} training points, {options.seeds} seeds: mean and 95 % interval"
    return results, {
        "histograms.png": plots.histograms(all_trained),
        "learning_curves.png": plots.learning_curves(all_trained, panels, title),
        "decision_boundaries.png": plots.decision_boundaries(all_trained, sets[0].test),
    }


def _from_zero(network: Variant):
    """Makes a network's state at step 0, with running variances of 0 in place of 1."""

    def create(setting):
        state = network.create(setting)
        return state.replace(batch_stats=jax.tree.map(jnp.zeros_like, state.batch_stats))

    return create


def printed_difference() -> tuple[float, float]:
    """Compares the outputs that the source prints of part (c) with its formula from its other printed numbers.

    Returns the largest difference, and the largest that the rounding of all these to three decimals can cause, to first
    order.
    """
    h, r, gamma, beta, mean, var = (np.array(values) for values in PRINTED.values())
    deviation, half = np.sqrt(var + SETTINGS["epsilon"]), 0.0005
    normalized = (h - mean) / deviation
    slopes = np.abs(normalized) * (1 + np.abs(gamma) / (2 * deviation**2)) + 2 * np.abs(gamma) / deviation + 2
    return float(np.abs(gamma * normalized + beta - r).max()), float(half * slopes.max())


def inside(options: Options, report: Report) -> dict[str, dict]:
    """Trains 2 or 3 features → 4 units, part (c), and compares inference with a calculation from the stored numbers.

    Returns, for each number of features, 'h' and 'r' of the first seed's first three examples, 'gamma', 'beta', 'mean'
    and 'var' as stored, the 'manual' `gamma (h − mean) / sqrt(var + epsilon) + beta` in NumPy, and the largest absolute
    'difference' between layer and calculation over all examples and seeds.
    """
    seeds, jobs = range(options.seeds), []
    for features in (2, 3):
        rngs = [np.random.default_rng([seed, features]) for seed in seeds]
        x = np.stack([rng.normal(size=(100, features)) for rng in rngs]).astype(np.float32)
        y = np.stack([rng.integers(0, 2, 100) for rng in rngs]).astype(np.int32)
        model = Perceptron((4,), 1, _NORM, "before", use_hidden_bias=False)
        name, label, optimizer = f"{features} features", f"(c) inside, {features} features", optax.adam(1e-3, eps=1e-7)
        variant = Variant(name, label, model, optimizer, (features,), 10, training.squared_error)
        settings = {"key": seed_keys(seeds), "examples": Examples.of(data.Split(x, y), {})}
        jobs.append(Job(variant.epochs(10, 100), settings))
    all_trained = train_all(jobs, report, options)
    return {t.plan.name: _compare(t, j.settings["examples"].train.x) for j, t in zip(jobs, all_trained, strict=True)}


def _compare(trained: Trained, x: np.ndarray) -> dict:
    params, stats = trained.state.params, trained.state.batch_stats["BatchNorm_0"]
    layer = _NORM(use_running_average=True)
    h = np.einsum("sni,sij->snj", x, params["Dense_0"]["kernel"])
    r = jax.vmap(lambda p, s, h: layer.apply({"params": p, "batch_stats": s}, h))(params["BatchNorm_0"], stats, h)
    gamma, beta = params["BatchNorm_0"]["scale"], params["BatchNorm_0"]["bias"]
    stored = {"gamma": gamma, "beta": beta, "mean": stats["mean"], "var": stats["var"]}
    g, b, mean, var = (np.asarray(value, np.float64)[:, None] for value in stored.values())
    manual = g * (h - mean) / np.sqrt(var + SETTINGS["epsilon"]) + b
    shown = {"h": h[0, :3], "r": np.asarray(r)[0, :3], **{k: v[0] for k, v in stored.items()}, "manual": manual[0, :3]}
    return {key: np.round(value, 6).tolist() for key, value in shown.items()} | {
        "difference": float(np.abs(r - manual).max()),
        "largest": float(np.abs(manual).max()),
    }


def inside_texts(results: Results) -> list[tuple[str, str]]:
    """Returns the texts of part (c): the stored numbers of the first seed beside the manual calculation."""
    texts = []
    for title, part in results.notes["inside"].items():
        rows = {k: np.array(part[k]).round(3) for k in ("h", "gamma", "beta", "mean", "var", "r", "manual")}
        lines = [f"{k} = {np.array2string(v, prefix=k + ' = ')}" for k, v in rows.items()]
        lines.append(f"largest difference {part['difference']:.1e}")
        texts.append((f"(c) inside batch norm, {title}, first seed", "\n".join(lines)))
    return texts
