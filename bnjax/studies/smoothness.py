"""S6: how smooth the landscape is: VGG on CIFAR-10 and a deep linear network, plain, normalized, and with noise."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from bnjax import analysis, studies
from bnjax.studies import Study, data, deep_linear, landscape, option, vgg
from bnjax.studies.engine import ONE_BY_ONE, Report, Trained, Variant, divisor_up_to, seed_keys, train
from bnjax.studies.evidence import Results, read_claims, seeds_in_words
from bnjax.studies.vgg import BATCH_SIZE, LEARNING_RATE, LEARNT, PROBED, RATES


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of VGG and of the deep linear network."""

    seeds: int = option(3, "number of seeds")
    steps: int | None = option(
        None, "steps of training", shown="500 of VGG at width 16 on CPU, 15,000 at width 64 on GPU and TPU"
    )
    dataset: str = option("cifar10", "image set", choices=("cifar10", "cifar100"))
    width: int | None = option(None, "filters of VGG's first stage", shown="see above")
    augment: bool = option(False, "mirror and move the training images at random")
    variants: tuple[str, ...] | None = option(None, "which networks to train", shown="all", metavar="A,B,…")


STUDY = Study(
    "smoothness",
    "VGG and a deep linear network, plain, normalized and noisy: smoothness, covariate shift, curvature",
    "S6, Santurkar et al. 2018",
    Options,
    compiled="bn",
    compiled_options={"width": 64},
    source_size="15,000 steps of VGG at width 64",
    order=9,
)

LABELS = {name: label for name, (label, _) in vgg.NORMS.items()}
PAIR = ("none", "bn")  # networks whose landscapes are drawn
FULL = {"steps": 15_000, "every": 100, "width": 64, "rate_steps": 1000, "linear_steps": 10_000}
SHORT = {"steps": 500, "every": 20, "width": 16, "rate_steps": 100, "linear_steps": 10_000}
LINEAR_EVERY = 200
SETTINGS = {"init": "Glorot uniform", "optimizer": "SGD", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
SETTINGS |= {"batch_norm_mode": "batch", "linear_learning_rate": deep_linear.LEARNING_RATE}
SETTINGS |= {"probed": (LEARNING_RATE * PROBED).tolist()}
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns VGG with each normalizer, by name."""
    return vgg.variants(images, options.width or _scale()["width"], options.selected(LABELS))


def run(options: Options, report: Report):
    """Trains both networks in all variants, measures them on the way and at the end, and judges S6.1 to S6.8.

    By default VGG has its full length and width on an accelerator, else 500 steps of a quarter of the width.
    """
    dataset, names, scale = options.dataset, options.selected(LABELS), _scale()
    steps, width = options.steps or scale["steps"], options.width or scale["width"]
    parts = [n for n in range(1, steps // 10 + 1) if steps % n == 0 and steps // n <= 200]
    if not parts:
        raise ValueError(
            f"--steps must be a multiple of a number from 10 to 200, got {steps}. Say {steps // 10 * 10 + 10}."
        )
    every = max((n for n in parts if n <= scale["every"]), default=parts[0])
    images = data.images(dataset, options.data_dir, report.reading)
    linear_steps = min(scale["linear_steps"], 20 * steps)
    linear_every = divisor_up_to(min(LINEAR_EVERY, linear_steps // 10), linear_steps)
    settings = {
        **SETTINGS,
        "dataset": dataset,
        "network": f"VGG-11 of width {width}",
        "augmented": options.augment,
        "steps": steps,
        "full_length": steps >= FULL["steps"] and width >= FULL["width"],
        "measured_every": every,
        "rate_steps": min(scale["rate_steps"], steps),
        "linear_steps": linear_steps,
        "linear_measured_every": linear_every,
    }
    results = Results(STUDY.name, settings, range(options.seeds))
    of_seeds, chance = {"key": seed_keys(results.seeds)}, float(np.log(images.num_classes))
    examples = tuple(images.train)
    linear, all_trained, ends = {}, {}, {}
    for name in (name for name in names if name in deep_linear.NORMALIZERS):
        plan = deep_linear.plan_of(name, f"deep linear, {LABELS[name]}", linear_steps, linear_every)
        linear[LABELS[name]] = trained = train(plan, of_seeds, report=report, options=options)
        _add(results, trained, {})
    variants = networks(options, images)
    report.expect(len(variants))
    for name, variant in variants.items():
        plan = vgg.plan_of(variant, steps, every, augmented=options.augment)
        trained = train(plan, of_seeds, examples, mapped=ONE_BY_ONE, report=report, options=options)
        progress = functools.partial(report.reading, f"{variant.label}, at the end")
        rates = None
        if name in PAIR:
            rates = variant.learning_rates(of_seeds, RATES, settings["rate_steps"], examples, target=LEARNT * chance)
        end = landscape.at_the_end(variant, trained, of_seeds["key"], images, rates, progress)
        all_trained[LABELS[name]], ends[LABELS[name]] = trained, end
        _add(results, trained, end.metrics)
    _add_comparisons(results, tuple(names), chance)
    results.judge(CLAIMS)
    title = f"{dataset}, {seeds_in_words(options.seeds)}"
    return results, landscape.figures(all_trained, linear, ends, LABELS, title)


def _scale() -> dict[str, int]:
    return SHORT if jax.default_backend() == "cpu" else FULL


def _add(results: Results, trained: Trained, at_the_end: Mapping[str, np.ndarray]) -> None:
    """Adds the numbers of one training: those measured on the way, and those at the end."""
    probe: analysis.GradientProbe = trained.measurements["probe"]
    shift, loss = trained.measurements["shift"], np.asarray(trained.metrics.loss)
    probed = ("loss_min", "loss_max", "distance_min", "distance_max", "cosine_min", "max_smoothness", "gradient_norm")
    curves = {"train_loss": loss, "train_accuracy": trained.metrics.accuracy}
    curves |= {name.removeprefix("max_"): getattr(probe, name) for name in probed}
    curves |= {"shift_distance": shift.distance, "shift_cosine": shift.cosine}
    curves |= {"layer_gradient_norm": shift.gradient_norm}
    relative = shift.distance / shift.gradient_norm
    metrics = {
        "final_loss": loss[:, -max(1, loss.shape[1] // 20) :].mean(1),
        "loss_range": np.mean(probe.loss_max - probe.loss_min, 1),
        "gradient_distance": np.mean(probe.distance_max, 1),
        "smoothness": np.mean(np.asarray(probe.max_smoothness), 1),
        "shift_cosine": _mean_of_finite(shift.cosine[:, :, 1:]),
        "shift_defined": np.mean(np.isfinite(shift.cosine[:, :, 1:]), (1, 2)),
        "relative_shift": _mean_of_finite(relative[:, :, 1:]),
        **at_the_end,
    }
    results.add(trained, {}, metrics, {key: np.asarray(values, np.float32) for key, values in curves.items()})
    results.arrays[f"{trained.plan.name}/measured_at"] = trained.measured_at


def _add_comparisons(results: Results, names: Sequence[str], chance: float) -> None:
    """Adds the numbers that compare a network with the plain one at the same seeds, from the loss of an even guess."""
    if "none" not in names:
        return
    for name in names:
        for net in ("vgg", "linear") if f"linear_{name}" in results.variants else ("vgg",):
            plain = _curves(results, f"{net}_none")
            for key, ours in _curves(results, f"{net}_{name}").items():
                theirs = plain[key]  # a number that is not finite is larger than any other
                is_smaller = np.isfinite(ours) & (~np.isfinite(theirs) | (ours < theirs))
                results.set_metric(f"{net}_{name}", f"share_with_smaller_{key}", is_smaller.mean(1))
        # A diverged plain network counts as one that has learnt nothing, the others as worse.
        ours, plain = (np.fmin(results.metric(f"vgg_{of}", "final_loss"), 10 * chance) for of in (name, "none"))
        results.set_metric(f"vgg_{name}", "gain", np.minimum(plain, chance) - ours)
    if "bn" in names:
        for name in names:
            missing = results.metric(f"vgg_{name}", "gain") - 0.8 * results.metric("vgg_bn", "gain")
            results.set_metric(f"vgg_{name}", "gain_beyond_80_percent", missing)
        ours, plain = (results.metric(f"vgg_{of}", "largest_rate") for of in ("bn", "none"))
        larger = (np.nan_to_num(ours) > plain).astype(float)
        # The rate that a network tolerates which trains at none is not known.
        results.set_metric("vgg_bn", "tolerates_larger_rates", np.where(np.isnan(plain), np.nan, larger))


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
