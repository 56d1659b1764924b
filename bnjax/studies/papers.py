"""Statements of later papers: learning rates, depth, weight decay and ghost batches, measured on small networks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis, studies
from bnjax.linen import BatchNorm, GhostBatchNorm
from bnjax.models import VGG, Perceptron
from bnjax.studies import Study, data, option
from bnjax.studies.data import augmentation
from bnjax.studies.engine import (
    ONE_BY_ONE,
    POPULATION,
    Report,
    Trained,
    Variant,
    divisor_from,
    random_batch,
    seed_keys,
    train,
    with_population_statistics,
)
from bnjax.studies.evidence import Results, log10_largest_rate, plots, read_claims, seeds_in_words
from bnjax.studies.evidence.plots import drawing
from bnjax.studies.vgg import LEARNT


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of the later papers' statements."""

    seeds: int = option(5, "number of seeds")
    steps: int = option(1000, "steps of training, twice as many on the small set")
    dataset: str = option("cifar10", "image set", choices=("cifar10", "cifar100"))
    width: int = option(8, "filters of VGG's first stage")


STUDY = Study(
    "papers",
    "later papers' statements on a narrow VGG: learning rates, weight decay, ghost batches; and depth at the start",
    "Bjorck et al. 2018, Yang et al. 2019, van Laarhoven 2017, Zhang et al. 2019, Hoffer et al. 2017, and others",
    Options,
    compiled="bn_0.1",
    source_size="ResNets and VGGs of full width, whole trainings",
    order=11,
)

BATCH_SIZE, LARGE, GHOST = 128, 1024, 32
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
RATE = 0.1  # learning rate of all trainings but those over rates
SMALL_SET = 10_000  # images of the trainings that overfit
DECAY = 5e-3  # weight decay of the convolutions, λ of the gradient λ w
PARTS = 20
POPULATION_EXAMPLES = 5000  # over which population statistics are taken, in one batch
# Depth at the start: a perceptron of some width, and a batch of Gaussian inputs of the same size.
DEPTH, SIZE, SKIPPED = 50, 512, 10
DEEP = {  # name: (label, activation, norm, deviation of the kernels times √(width / 2))
    "deep_relu": ("ReLU, batch norm", nn.relu, BatchNorm, 1.0),
    "deep_relu_large": ("ReLU, batch norm, kernels times 4", nn.relu, BatchNorm, 4.0),
    "deep_tanh": ("tanh, batch norm", jnp.tanh, BatchNorm, 1.0),
    "deep_linear": ("linear, batch norm", lambda x: x, BatchNorm, 1.0),
    "deep_none": ("ReLU, no batch norm", nn.relu, None, 1.0),
}
CLAIMS = read_claims(__file__)


class Case(NamedTuple):
    """A training of VGG.

    Attributes:
      label: label for tables and figures.
      norm: its normalizer.
      learning_rate: that of gradient descent.
      is_small: whether it is trained on the small set, for twice as many steps of 128 or as many updates as `updates`.
      batch_size: examples in a step.
      decay: weight decay of the convolutions.
      updates: share of the steps that are taken.
    """

    label: str
    norm: Any = BatchNorm
    learning_rate: float = RATE
    is_small: bool = True
    batch_size: int = BATCH_SIZE
    decay: float = 0.0
    updates: float = 1.0


_GHOST = functools.partial(GhostBatchNorm, ghost_size=GHOST)
_LARGE: Mapping[str, Any] = {"batch_size": LARGE, "updates": BATCH_SIZE / LARGE}
CASES = {
    **{
        f"{name}_{rate:g}": Case(f"{label}, rate {rate:g}", norm, rate, is_small=False)
        for name, label, norm in (("none", "no batch norm", None), ("bn", "batch norm", BatchNorm))
        for rate in RATES
    },
    "small": Case("batch norm"),
    "small_ghost": Case(f"ghost batches of {GHOST}", _GHOST),
    "large": Case(f"batch norm, batch {LARGE}", **_LARGE),
    "large_ghost": Case(f"ghost batches of {GHOST}, batch {LARGE}", _GHOST, **_LARGE),
    "small_decay": Case("batch norm, weight decay", decay=DECAY),
}
MATCHED = "small_matched"  # without decay, at the norms that the network with decay has at each step


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns the VGGs by name."""
    prepare, shape = augmentation.centered(images.train.x), images.train.x.shape[1:]
    vgg = functools.partial(VGG, images.num_classes, depth=11, width=options.width)
    return {
        name: Variant(
            name,
            f"VGG, {case.label}",
            vgg(norm=case.norm),
            _optimizer(case),
            shape,
            case.batch_size,
            preprocess=prepare,
        )
        for name, case in CASES.items()
    }


def _optimizer(case: Case) -> optax.GradientTransformation:
    """Makes gradient descent, with weight decay of the kernels that a batch norm follows, whose scale it ignores."""
    decay = optax.add_decayed_weights(case.decay, mask=_of_kernels(lambda kernel: True, lambda other: False))
    return optax.chain(decay if case.decay else optax.identity(), optax.sgd(case.learning_rate))


def _of_kernels(kernel: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of parameter trees that maps kernels of convolutions by one function, the rest by another."""

    def is_kernel(path: Any) -> bool:
        return path[0].key.startswith("Conv") and path[-1].key == "kernel"

    return lambda *trees: jax.tree.map_with_path(lambda p, *v: (kernel if is_kernel(p) else other)(*v), *trees)


def run(options: Options, report: Report):
    """Trains the VGGs, looks at deep networks at the start, and judges the claims."""
    images, steps = data.images(options.dataset, options.data_dir, report.reading), options.steps
    settings = {"network": f"VGG-11 of width {options.width}", "optimizer": "SGD", "dataset": options.dataset}
    settings |= {"steps": steps, "width": options.width, "small_set": SMALL_SET, "ghost_size": GHOST, "decay": DECAY}
    settings |= {"rates": list(RATES), "depth": DEPTH, "deep_width": SIZE}
    results = Results(STUDY.name, settings, range(options.seeds))
    results.examples = dict.fromkeys(("test_accuracy", "population_test_accuracy"), len(images.test.y))
    keys, of_name = {"key": seed_keys(results.seeds)}, networks(options, images)
    small = data.Split(images.train.x[:SMALL_SET], images.train.y[:SMALL_SET])
    trained: dict[str, Trained] = {}
    report.expect(len(of_name) + 1)
    for name, network in (*of_name.items(), (MATCHED, of_name["small"])):
        case = CASES.get(name, CASES["small"])
        count = round((2 if case.is_small else 1) * steps * case.updates)
        every = divisor_from(count // PARTS, count)
        draw, step, given = random_batch(case.batch_size), network.step, dict(keys)
        if name == MATCHED:
            network = dataclasses.replace(network, name=MATCHED, label="VGG, batch norm, norms as with decay")
            given["norms"] = trained["small_decay"].measurements["norms"]
            draw, step = _with_norms(draw), _matched_step(network)
        how = {"measure": _measured, "every": 1} if name == "small_decay" else {}
        configuration = {"batch_size": case.batch_size, "decay": case.decay}
        plan = network.plan(count, draw=draw, step=step, part=every, configuration=configuration, **how)
        on = small if case.is_small else images.train
        trained[name] = of = train(plan, given, tuple(on), mapped=ONE_BY_ONE, report=report, options=options)
        results.add(of, case._replace(norm=None)._asdict(), _metrics(network, of, case, on, images.test))
    for name, metrics in at_the_start(results.seeds).items():
        results.variants[name] = (DEEP[name][0], {"depth": DEPTH, "width": SIZE}, metrics)
    _add_rates(results, float(np.log(images.num_classes)))
    results.judge(CLAIMS)
    title = f"{options.dataset}, width {options.width}, {seeds_in_words(options.seeds)}"
    return results, _figures(results, trained, title)


def _measured(state: Any, *inputs: Any) -> dict[str, Any]:
    """Returns the norm of each parameter."""
    return {"norms": jax.tree.map(jnp.linalg.norm, state.params)}


def _with_norms(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Adds to a step's inputs the norms that the parameters are to have before it."""

    def with_norms(examples, setting, number):
        return *draw(examples, setting, number), jax.tree.map(lambda of_steps: of_steps[number], setting["norms"])

    return with_norms


def _matched_step(network: Variant) -> Callable[..., Any]:
    """Makes a training step from kernels that are brought to given norms, which a batch norm after them ignores."""
    scaled = _of_kernels(lambda w, norm: w * (norm / jnp.linalg.norm(w)), lambda w, norm: w)
    return lambda state, x, y, key, norms: network.step(state.replace(params=scaled(state.params, norms)), x, y, key)


def _metrics(network: Variant, trained: Trained, case: Case, train_set: data.Split, test: data.Split) -> dict[str, Any]:
    """Computes what the networks are at inference, with running statistics and with those of training examples.

    Beside accuracies, losses and their gap it has the effective learning rate at the end.
    """
    few = data.Split(train_set.x[:SMALL_SET], train_set.y[:SMALL_SET])
    population = with_population_statistics(network, trained.state, few.x[:POPULATION_EXAMPLES])
    metrics: dict[str, Any] = {}
    loss = np.asarray(trained.metrics.loss)
    for prefix, of in (("", trained), (POPULATION, dataclasses.replace(trained, state=population))):
        on_test, on_train = ([jax.device_get(network.evaluate(s, *split)) for s in of.states] for split in (test, few))
        metrics[f"{prefix}test_accuracy"] = np.array([m.accuracy for m in on_test])
        metrics[f"{prefix}test_loss"] = np.array([m.loss for m in on_test])
        metrics[f"{prefix}loss_gap"] = np.array([m.loss - n.loss for m, n in zip(on_test, on_train, strict=True)])
    norms = _of_kernels(lambda w: np.square(np.asarray(w, np.float64)).reshape(len(w), -1).sum(1), lambda w: None)
    squares = np.stack(jax.tree.leaves(norms(trained.state.params)))
    final = np.where(np.isfinite(loss).all(1), loss[:, -max(1, loss.shape[1] // 20) :].mean(1), np.inf)
    return metrics | {"final_loss": final, "log10_effective_rate": np.log10(case.learning_rate / squares).mean(0)}


def _add_rates(results: Results, chance: float) -> None:
    """Adds the largest rate that trains, and what batch norm gains at the plain network's best rate and at its own.

    The best rates are those of the least training loss. A loss above ten times that of chance counts as that.
    """
    best, accuracy = {}, {}
    for name in ("none", "bn"):
        losses = np.stack([results.metric(f"{name}_{rate:g}", "final_loss") for rate in RATES], 1)
        losses = np.fmin(losses, 10 * chance)
        largest = log10_largest_rate(np.array(RATES), losses, LEARNT * chance)
        results.set_metric(f"{name}_{RATE:g}", "log10_largest_rate", largest)
        accuracy[name] = np.stack([results.metric(f"{name}_{rate:g}", "test_accuracy") for rate in RATES])
        best[name], seeds = losses.argmin(1), np.arange(len(losses))
    plain = accuracy["none"][best["none"], seeds]
    at_same, at_own = (accuracy["bn"][best[name], seeds] - plain for name in ("none", "bn"))
    named = {"gain_at_the_same_rate": at_same, "gain_at_its_own_rate": at_own, "gain_beyond_half": at_same - at_own / 2}
    for metric, values in named.items():
        results.set_metric(f"bn_{RATE:g}", metric, values)


def at_the_start(seeds: Any) -> dict[str, dict[str, np.ndarray]]:
    """Measures how gradients grow with depth in perceptrons of Gaussian kernels, for each seed.

    Returns:
      By name, 'gradient_growth', the factor by which the norm of a kernel's gradient grows from a layer to the one
      before it, as the mean over the layers but the first and last ones, where the network has not settled.
    """
    found = {}
    for name, (_, activation, norm, factor) in DEEP.items():
        init = nn.initializers.normal(factor * (2 / SIZE) ** 0.5)
        place, hidden = ("none" if norm is None else "before"), (SIZE,) * DEPTH
        model = Perceptron(hidden, SIZE, norm, place, activation, init, init, use_hidden_bias=False)
        layers = [f"Dense_{i}" for i in range(DEPTH)]

        @jax.jit
        def growth(key, model=model, layers=layers):
            of_init, of_x, of_y = jax.random.split(key, 3)
            x, direction = (jax.random.normal(k, (SIZE, SIZE)) for k in (of_x, of_y))
            variables = model.init(of_init, x, training=True)

            def loss(params: Any) -> Any:
                outputs = model.apply({**variables, "params": params}, x, training=True, mutable=["batch_stats"])[0]
                return jnp.mean(outputs * direction)

            norms = jnp.stack(list(analysis.gradient_norms(loss, variables["params"], layers=layers).values()))
            inner = jnp.log(norms[SKIPPED : DEPTH - SKIPPED])
            return jnp.exp((inner[0] - inner[-1]) / (len(inner) - 1))

        found[name] = {"gradient_growth": np.array([float(growth(key)) for key in seed_keys(seeds)])}
    return found


def _figures(results: Results, trained: Mapping[str, Trained], title: str) -> dict[str, plots.Figure]:
    labels = {"none": "no batch norm", "bn": "batch norm"}
    series = {
        label: [results.metric(f"{name}_{rate:g}", "test_accuracy") for rate in RATES] for name, label in labels.items()
    }
    small = {name: of for name, of in trained.items() if not name.startswith(("none", "bn"))}

    def losses(axis: Any, names: Any) -> None:
        labels = {name: small[name].plan.label for name in names}
        labels = {name: label.removeprefix("VGG, ").removesuffix(f", batch {LARGE}") for name, label in labels.items()}
        curves = {label: small[name].curves["train_loss"] for name, label in labels.items()}
        parts = next(iter(curves.values())).shape[1]
        share = (np.arange(parts) + 0.5) / parts  # each is the mean of a part
        drawing.curves(axis, curves, share, ylabel="training loss", xlabel="share of the training")

    panels = [
        (f"batch {BATCH_SIZE}", functools.partial(losses, names=("small", "small_ghost"))),
        (f"batch {LARGE}", functools.partial(losses, names=("large", "large_ghost"))),
        ("weight decay", functools.partial(losses, names=("small", "small_decay", MATCHED))),
    ]
    return {
        "learning_rates.png": plots.sweep(
            RATES, series, "learning rate", f"{title}, after {results.settings['steps']} steps"
        ),
        "small_set.png": drawing.panels(f"{SMALL_SET:,} images of {title}", panels, size=(4.4, 3.6), sharey=True),
    }
