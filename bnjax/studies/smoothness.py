"""S6: how smooth the landscape is: VGG on CIFAR-10 and a deep linear network, plain, normalised, and with noise."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import analysis, data, losses, train
from bnjax.linen import BatchNorm, LpBatchNorm, NoisyBatchNorm
from bnjax.models import VGG
from bnjax.studies import Options, deep_linear, landscape
from bnjax.studies.experiment import Report, Trained, Variant
from bnjax.studies.measured import Measured, Plan, overhead, random_batch, train_measured
from bnjax.studies.results import Claim, Results, interval, within

SOURCE = "Santurkar et al. 2018"
LABELS = {
    "none": "plain",
    "bn": "batch norm",
    "noisy": "noisy batch norm",
    "l1": "l₁ norm",
    "l2": "l₂ norm",
    "linf": "l∞ norm",
}
NORMS: Mapping[str, Any] = {
    "none": None,
    "bn": BatchNorm,
    "noisy": NoisyBatchNorm,
    "l1": functools.partial(LpBatchNorm, p=1),
    "l2": functools.partial(LpBatchNorm, p=2),
    "linf": functools.partial(LpBatchNorm, p=math.inf),
}
BATCH_SIZE = 128
LEARNING_RATE = 0.1
PROBED = np.linspace(0.5, 4, 8)  # step sizes of the probe, in learning rates
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LEARNT = 0.9 * float(np.log(10))  # a loss: a tenth below that of chance
FULL = {"steps": 15_000, "every": 100, "width": 64, "rate_steps": 1000, "linear_steps": 10_000}
SHORT = {"steps": 500, "every": 20, "width": 16, "rate_steps": 100, "linear_steps": 10_000}
LINEAR_EVERY = 200


def run(options: Options, report: Report):
    """Trains both networks in all variants, measures them on the way and at the end, and checks S6.1 to S6.8.

    Args:
      options: seeds, steps and width of VGG, variants, dataset ('cifar10') and data_dir; by default full length and
        width where there is an accelerator, else 500 steps of a quarter of the width.
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name = options.dataset or "cifar10"
    scale = SHORT if jax.default_backend() == "cpu" else FULL
    steps, width = options.steps or scale["steps"], options.width or scale["width"]
    parts = [n for n in range(1, steps // 10 + 1) if steps % n == 0 and steps // n <= 200]
    if not parts:
        raise ValueError(
            f"--steps must be a multiple of a number from 10 to 200, got {steps}. Say {steps // 10 * 10 + 10}."
        )
    every = max((n for n in parts if n <= scale["every"]), default=parts[0])
    chosen = _chosen(options.variants)
    images = data.images(name, options.data_dir, report.reading)
    linear_steps = min(scale["linear_steps"], 20 * steps)
    linear_every = next(n for n in range(min(LINEAR_EVERY, linear_steps // 10), 0, -1) if linear_steps % n == 0)
    settings = {
        "dataset": name,
        "network": f"VGG-11 of width {width}",
        "init": "Glorot uniform",
        "optimizer": "SGD",
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "full_length": steps >= FULL["steps"] and width >= FULL["width"],
        "measured_every": every,
        "probed": (LEARNING_RATE * PROBED).tolist(),
        "batch_norm_mode": "batch",
        "rate_steps": min(scale["rate_steps"], steps),
        "linear_steps": linear_steps,
        "linear_measured_every": linear_every,
        "linear_learning_rate": deep_linear.LEARNING_RATE,
    }
    results = Results("smoothness", settings, range(options.seeds))
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds, dtype=jnp.uint32))
    linear, vgg, ends = {}, {}, {}
    for variant in chosen:
        tell = report.task(_variant(f"linear_{variant}", f"deep linear, {LABELS[variant]}", linear_steps))
        options_of = {"progress": tell, "saving": options.saving}
        linear[variant] = deep_linear.train_network(variant, keys, linear_steps, linear_every, **options_of)
        _add(results, f"linear_{variant}", f"deep linear, {LABELS[variant]}", linear[variant], {})
    for variant in chosen:
        network = Network(NORMS[variant], images, width)
        plan = network.plan(steps, every)
        tell = report.task(_variant(f"vgg_{variant}", f"VGG, {LABELS[variant]}", steps))
        examples = tuple(images.train)
        vgg[variant] = train_measured(
            plan, {"key": keys}, examples, name=f"vgg_{variant}_{width}", progress=tell, saving=options.saving
        )
        rates = None
        if variant in ("none", "bn"):
            rates = network.learning_rates(keys, settings["rate_steps"], examples)
        told = functools.partial(report.reading, f"VGG, {LABELS[variant]}, at the end")
        ends[variant] = landscape.at_the_end(network, vgg[variant], keys, examples, rates, told)
        _add(results, f"vgg_{variant}", f"VGG, {LABELS[variant]}", vgg[variant], ends[variant].metrics)
        if variant == "bn":
            _note_overhead(results, plan, network, keys, examples)
    results.claims = claims(results, chosen, settings["full_length"])
    title = f"{name}, {options.seeds} seed{'s' * (options.seeds > 1)}"
    return results, landscape.figures(vgg, linear, ends, LABELS, title)


class Network:
    """VGG with one normaliser: how it is trained, and the losses that are measured."""

    def __init__(self, norm: Any, images: data.Dataset, width: int):
        self.model = VGG(images.num_classes, norm, 11, width)
        self.mean, self.deviation = (float(f(images.train.x)) for f in (np.mean, np.std))
        self.test = images.test
        self.example = jnp.zeros((1, *images.train.x.shape[1:]))
        variables = self.model.init(jax.random.key(0), self.example, training=False)
        self.layers = losses.layers_in_order(self.model, variables, self.example)

    def prepare(self, x):
        """Pixels of mean 0 and deviation 1 over the training set."""
        return (x.astype(jnp.float32) - self.mean) / self.deviation

    def create(self, setting):
        """The state at step 0 of a seed."""
        key = jax.random.fold_in(setting["key"], 0)
        return train.create_train_state(self.model, optax.sgd(LEARNING_RATE), key, self.example)

    def loss(self, batch_stats: Any, key: Any, **options: Any):
        """`loss_fn(params, x, y)` of raw images, with the noise of a key, in the mode that training descends."""
        variables = {"batch_stats": batch_stats}
        loss = losses.linen_loss(self.model, variables, train.cross_entropy, rngs={"noise": key}, **options)
        return lambda params, x, y: loss(params, self.prepare(x), y)

    def plan(self, steps: int, every: int) -> Plan:
        """How to train and measure it: K + 1 gradients for the probe, one for the next step, one for each layer."""

        def step(state, x, y, key):
            options = {"objective": train.cross_entropy, "rngs": {"noise": key}}
            return train.train_step(state, self.prepare(x), y, **options)

        def measure(state, x, y, key):
            loss = self.loss(state.batch_stats, key)
            following, _ = step(state, x, y, key)
            return {
                "probe": analysis.gradient_probe(loss, state.params, LEARNING_RATE * PROBED, x, y),
                "shift": analysis.covariate_shift(loss, state.params, following.params, x, y, layers=self.layers),
            }

        return Plan(
            self.create, random_batch(BATCH_SIZE), step, measure, steps, every, False, lambda state: state.params
        )

    @property
    def extra_gradients(self) -> int:
        """What one measurement costs."""
        return len(PROBED) + 1 + 1 + len(self.layers)

    def test_accuracy(self, state) -> float:
        """Over the whole test set, with running statistics."""
        options: Any = {"objective": train.cross_entropy, "batch_size": 1000, "preprocess": self._preprocess}
        return train.evaluate_in_batches(state, *self.test, **options)[1]  # pyright: ignore[reportReturnType]

    @functools.cached_property
    def _preprocess(self):
        return lambda x, keys: self.prepare(x)

    def learning_rates(self, keys, steps: int, examples) -> analysis.LearningRateRange:
        """Which of `RATES` train within some steps, for each seed."""
        x, y = jax.tree.map(jnp.asarray, examples)

        def of_seed(key, x, y):
            state = self.create({"key": key})
            loss = self.loss(state.batch_stats, key)
            index = jax.random.randint(jax.random.fold_in(key, 3), (steps, BATCH_SIZE), 0, y.shape[0])
            return analysis.learning_rate_range(
                lambda params, i: loss(params, x[i], y[i]), state.params, jnp.array(RATES), (index,), target=LEARNT
            )

        run_seed = jax.jit(of_seed)
        return jax.tree.map(lambda *v: np.stack(v), *(run_seed(key, x, y) for key in keys))


def _add(results: Results, name: str, label: str, seen: Measured, further: Mapping[str, np.ndarray]) -> None:
    """The numbers of one training: what was measured on the way, and what at the end."""
    probe: analysis.GradientProbe = seen.measurements["probe"]
    shift = seen.measurements["shift"]
    loss = np.asarray(seen.metrics.loss)
    tail = max(1, loss.shape[1] // 20)
    curves = {
        "train_loss": loss,
        "train_accuracy": np.asarray(seen.metrics.accuracy),
        "loss_min": probe.loss_min,
        "loss_max": probe.loss_max,
        "distance_min": probe.distance_min,
        "distance_max": probe.distance_max,
        "cosine_min": probe.cosine_min,
        "smoothness": np.asarray(probe.max_smoothness),
        "gradient_norm": probe.gradient_norm,
        "shift_distance": shift.distance,
        "shift_cosine": shift.cosine,
        "layer_gradient_norm": shift.gradient_norm,
    }
    relative = shift.distance / shift.gradient_norm
    metrics = {
        "final_loss": loss[:, -tail:].mean(1),
        "loss_range": np.mean(probe.loss_max - probe.loss_min, 1),
        "gradient_distance": np.mean(probe.distance_max, 1),
        "smoothness": np.mean(np.asarray(probe.max_smoothness), 1),
        "shift_cosine": _mean_of_finite(shift.cosine[:, :, 1:]),
        "shift_defined": np.mean(np.isfinite(shift.cosine[:, :, 1:]), (1, 2)),
        "relative_shift": _mean_of_finite(relative[:, :, 1:]),
        **further,
    }
    curves = {key: np.asarray(values, np.float32) for key, values in curves.items()}
    results.add(Trained(_variant(name, label, 0), curves, None, {}), {}, metrics)
    results.arrays[f"{name}/measured_at"] = seen.measured_at


def _note_overhead(results: Results, plan: Plan, network: Network, keys, examples) -> None:
    """What measuring costs, beside what its gradients should."""
    with_, without = overhead(plan, {"key": keys[0]}, examples, repeats=3)
    predicted = 1 + network.extra_gradients / plan.every
    results.notes["overhead"] = {
        "seconds_a_step": without,
        "seconds_a_measured_step": with_,
        "ratio": with_ / without,
        "gradients_ratio": predicted,
    }
    results.texts.append(
        (
            "cost of measuring (VGG, batch norm)",
            f"{network.extra_gradients} gradients every {plan.every} steps: {predicted:.2f} times the gradients of "
            f"plain training, {with_ / without:.2f} times its time ({without * 1e3:.0f} ms a step without)",
        )
    )


def claims(results: Results, chosen: Sequence[str], full_length: bool) -> list[Claim]:
    """S6.1 to S6.8 with their verdicts, as far as their variants were run."""
    found: list[Claim] = []
    if not {"none", "bn"} <= set(chosen):
        return found
    seeds = len(results.seeds)
    nets = ("vgg", "linear")
    if full_length:
        accuracy = {v: interval(results.metric(f"vgg_{v}", "test_accuracy")) for v in ("none", "bn")}
        found.append(
            Claim(
                "S6.1",
                SOURCE,
                "VGG without augmentation: 83 % with batch norm, 80 % without",
                "0.83 / 0.80",
                "mean test accuracy within 0.02 of each",
                f"{accuracy['bn'].text()} with, {accuracy['none'].text()} without",
                (within(accuracy["bn"], 0.81, 0.85), within(accuracy["none"], 0.78, 0.82)),
            )
        )
    quantities = (
        ("S6.2", "loss variation along the gradient", "loss_max", "loss_min"),
        ("S6.3", "change of the gradient along it", "distance_max", None),
        ("S6.4", "effective β-smoothness", "smoothness", None),
    )
    for claim, what, high, low in quantities:
        fractions = {}
        for net in nets:
            values = [_range(results, f"{net}_{v}", high, low) for v in ("none", "bn")]
            fractions[net] = interval(_is_smaller(values[1], values[0]).mean(1))
        found.append(
            Claim(
                claim,
                SOURCE,
                f"{what} is smaller with batch norm at nearly all steps",
                "smaller",
                "at 90 % of the measured steps and more, in both networks (what is not finite is larger than all else)",
                "; ".join(f"{net}: at {100 * f.mean:.0f} ± {100 * f.half:.0f} %" for net, f in fractions.items()),
                tuple(within(f, 0.9, 1) for f in fractions.values()),
            )
        )
    cosine = {n: results.difference("shift_cosine", f"{n}_bn", f"{n}_none") for n in nets}
    found.append(
        Claim(
            "S6.5",
            SOURCE,
            "internal covariate shift is not smaller with batch norm",
            "not smaller",
            "the cosine of a layer's gradients before and after the others' update (mean over the layers and steps "
            "where both are finite and not zero) is not larger with it: the paired difference is at most 0, in both "
            "networks",
            "; ".join(f"{net}: difference {c.text(3)}" for net, c in cosine.items()),
            tuple(within(c, -np.inf, 0) if c.n == seeds else None for c in cosine.values()),
        )
    )
    final = {v: interval(results.metric(f"vgg_{v}", "final_loss")) for v in chosen}
    chance = float(np.log(10))  # a diverged plain network counts as one that has learnt nothing, others as worse
    reached = {v: np.fmin(results.metric(f"vgg_{v}", "final_loss"), 10 * chance) for v in chosen}
    gain = {v: np.minimum(reached["none"], chance) - reached[v] for v in chosen}
    helps = within(interval(gain["bn"]), 0, np.inf)
    for claim, group, statement in (
        ("S6.6", ("noisy",), "noisy batch norm trains about as fast as batch norm"),
        ("S6.7", ("l1", "l2", "linf"), "l₁, l₂ and l∞ normalisation help as much as batch norm"),
    ):
        if not set(group) <= set(chosen):
            continue
        missing = {v: interval(gain[v] - 0.8 * gain["bn"]) for v in group}
        shares = {v: interval(gain[v]).mean / interval(gain["bn"]).mean for v in group}
        found.append(
            Claim(
                claim,
                SOURCE,
                statement,
                "as fast" if claim == "S6.6" else "as much",
                "VGG's training loss over the last 20th of the steps is below the plain network's (or chance's) by at "
                "least 80 % of what batch norm brings, and that is positive",
                "; ".join(f"{LABELS[v]} {final[v].text(3)}, {100 * s:.0f} %" for v, s in shares.items())
                + f" (batch norm {final['bn'].text(3)}, plain {final['none'].text(3)})",
                (helps, *(within(m, 0, np.inf) for m in missing.values())),
            )
        )
    largest = {v: results.metric(f"vgg_{v}", "largest_rate") for v in ("none", "bn")}
    found.append(
        Claim(
            "S6.8",
            SOURCE,
            "the plain network fails at learning rates at which the normalised one trains",
            "fails",
            f"of the rates {', '.join(f'{rate:g}' for rate in RATES)}, the largest at which the loss falls a tenth "
            f"below chance's within {results.settings['rate_steps']} steps is larger with it at every seed",
            f"{_values(largest['bn'])} with, {_values(largest['none'])} without",
            (None if seeds < 2 else bool((np.nan_to_num(largest["bn"]) > np.nan_to_num(largest["none"])).all()),),
        )
    )
    return found


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """For each seed the mean of the numbers; NaN where there is none."""
    count = np.isfinite(values).sum((1, 2))
    total = np.where(np.isfinite(values), values, 0).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _is_smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where a < b, what is not finite being larger than any number."""
    return np.isfinite(a) & (~np.isfinite(b) | (a < b))


def _range(results: Results, variant: str, high: str, low: str | None) -> np.ndarray:
    values = results.arrays[f"{variant}/{high}"]
    return values if low is None else values - results.arrays[f"{variant}/{low}"]


def _chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    unknown = sorted(set(names or ()) - set(LABELS))
    if unknown:
        raise ValueError(f"--variants must be among {', '.join(LABELS)}, got {', '.join(unknown)}.")
    return tuple(names or LABELS)


def _variant(name: str, label: str, steps: int) -> Variant:
    return Variant(name, label, None, optax.sgd(LEARNING_RATE), train.cross_entropy, BATCH_SIZE, steps)


def _values(values: np.ndarray) -> str:
    return ", ".join("none" if np.isnan(value) else f"{value:g}" for value in np.unique(values))
