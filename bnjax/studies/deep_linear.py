"""S6's deep linear network: 25 square matrices fitted to one, measured along the gradient while they train."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

import bnjax
from bnjax import analysis, studies, training, variants
from bnjax.studies import Study, landscape, option, vgg
from bnjax.studies.engine import Plan, Report, divisor_up_to, seed_keys, step_keys, train
from bnjax.studies.evidence import Results, read_claims, seeds_in_words


@dataclasses.dataclass(frozen=True)
class Options(studies.Options):
    """The options of a run of the deep linear network."""

    seeds: int = option(10, "number of seeds")
    steps: int = option(10_000, "steps of training")


STUDY = Study(
    "deep_linear",
    "25 square matrices fitted to one, plain, normalized and noisy: smoothness and covariate shift",
    "S6, Santurkar et al. 2018, appendix",
    Options,
    order=10,
)

MEASURED = 50  # measurements in a training
LABELS = {name: vgg.NORMS[name][0] for name in ("none", "bn", "noisy", "l1", "l2", "linf")}
CLAIMS = read_claims(__file__)

DEPTH, SIZE, EXAMPLES = 25, 10, 1000
LEARNING_RATE = 1e-6
PROBED = np.geomspace(0.01, 30, 8)  # step sizes of the probe, in learning rates
NORMALIZERS: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "bn": bnjax.batch_norm,
    "noisy": variants.noisy_batch_norm,
    "l1": functools.partial(variants.lp_batch_norm, p=1),
    "l2": functools.partial(variants.lp_batch_norm, p=2),
    "linf": functools.partial(variants.lp_batch_norm, p=math.inf),
}


SETTINGS = {"init": "Glorot normal", "optimizer": "gradient descent", "learning_rate": LEARNING_RATE}
SETTINGS |= {"examples": EXAMPLES, "network": f"{DEPTH} matrices of {SIZE} × {SIZE}"}


def run(options: Options, report: Report):
    """Trains the network in all variants, measures them on the way, and judges the claims."""
    steps = options.steps
    every = divisor_up_to(max(1, steps // MEASURED), steps)
    settings = {**SETTINGS, "steps": steps, "measured_every": every, "probed": (LEARNING_RATE * PROBED).tolist()}
    results = Results(STUDY.name, settings, range(options.seeds))
    of_seeds, all_trained = {"key": seed_keys(results.seeds)}, {}
    report.expect(len(LABELS))
    for name, label in LABELS.items():
        plan = plan_of(name, f"deep linear, {label}", steps, every)
        all_trained[label] = trained = train(plan, of_seeds, report=report, options=options)
        landscape.add(results, trained, {}, slice(steps - max(1, steps // 20), steps))
    for name in LABELS:
        landscape.add_shares(results, f"linear_{name}", "linear_none")
    results.judge(CLAIMS)
    title = seeds_in_words(options.seeds)
    return results, landscape.figures_on_the_way(all_trained, LABELS, "Deep linear network", title, log=True)


def plan_of(name: str, label: str, steps: int, every: int) -> Plan:
    """Plans the training of the network, from every seed at once, by gradient descent on all examples.

    `‖x W₁ … W₂₅ − x A‖²`, summed over 1000 examples x: with the sum the source's learning rate of 1e-6 is just below
    where the plain network diverges, with the mean it would hardly move. The normalizer follows every matrix but the
    last.

    Args:
      name: name in `NORMALIZERS`.
      label: label for tables and figures.
      steps: number of steps.
      every: steps between measurements: a gradient probe, and the internal covariate shift of the 25 layers.
    """
    normalize, fresh = NORMALIZERS[name], bnjax.init_batch_norm(SIZE)

    def create(setting):
        of_data, of_weights = jax.random.split(jax.random.fold_in(setting["key"], 0))
        of_target, of_x = jax.random.split(of_data)
        target, x = jax.random.normal(of_target, (SIZE, SIZE)), jax.random.normal(of_x, (EXAMPLES, SIZE))
        init = nn.initializers.glorot_normal()
        layers: list[Any] = [{"kernel": init(key, (SIZE, SIZE))} for key in jax.random.split(of_weights, DEPTH)]
        if normalize is not None:
            layers[:-1] = [{**layer, "norm": fresh[0]} for layer in layers[:-1]]
        return layers, (x, x @ target)

    def loss_fn(layers, x, target, key):
        def apply(x, layer_and_number):
            layer, number = layer_and_number
            x = x @ layer["kernel"]
            if normalize is not None:
                noise = {"key": jax.random.fold_in(key, number)} if name == "noisy" else {}
                x = normalize(x, layer["norm"], fresh[1], training=True, **noise)[0]
            return x, None

        stacked = jax.tree.map(lambda *values: jnp.stack(values), *layers[:-1])
        x = lax.scan(apply, x, (stacked, jnp.arange(DEPTH - 1)))[0]
        return jnp.square(x @ layers[-1]["kernel"] - target).sum()

    def descended(layers, data, key):
        loss, gradient = jax.value_and_grad(loss_fn)(layers, *data, key)
        return loss, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, layers, gradient)

    def step(state, key):
        layers, data = state
        loss, layers = descended(layers, data, key)
        return (layers, data), training.Metrics(loss, jnp.full((), jnp.nan))

    def measure(state, key):
        layers, data = state
        _, following = descended(layers, data, key)
        return {
            "probe": analysis.gradient_probe(loss_fn, layers, LEARNING_RATE * PROBED, *data, key),
            "shift": analysis.covariate_shift(loss_fn, layers, following, *data, key),
        }

    def watch(state, key):
        layers, data = state
        both = layers, jax.grad(loss_fn)(layers, *data, key)
        kernels = [{f"Dense_{i}": {"kernel": layer["kernel"]} for i, layer in enumerate(of)} for of in both]
        return kernels[0], kernels[1]

    def draw(examples, setting, number):
        return step_keys(setting, number)[1:]

    return Plan(f"linear_{name}", label, create, draw, step, steps, measure=measure, every=every, watch=watch)
