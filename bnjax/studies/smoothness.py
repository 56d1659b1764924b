"""S6: how smooth the landscape of a VGG on CIFAR-10 is: plain, normalized, and with noise."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from bnjax import studies
from bnjax.studies import Study, data, landscape, option, vgg
from bnjax.studies.engine import ONE_BY_ONE, Report, Variant, divisor_from, seed_keys, train
from bnjax.studies.evidence import Results, log10_largest_rate, read_claims, seeds_in_words
from bnjax.studies.vgg import BATCH_SIZE, LEARNING_RATE, LEARNT, PROBED, RATES


@dataclasses.dataclass(frozen=True)
class Options(studies.ImageOptions):
    """The options of a run of VGG."""

    seeds: int = option(5, "number of seeds")
    steps: int | None = option(
        None, "steps of training", shown="3,000 at width 16 on CPU, 15,000 at width 64 on GPU and TPU"
    )
    other_steps: int | None = option(
        None, "steps of the normalizers other than batch norm", shown="500 on CPU, all on GPU and TPU"
    )
    dataset: str = option("cifar10", "image set", choices=("cifar10", "cifar100"))
    width: int | None = option(None, "filters of VGG's first stage", shown="see above")
    augment: bool = option(False, "mirror and move the training images at random")
    variants: tuple[str, ...] | None = option(None, "which networks to train", shown="all", metavar="A,B,…")


STUDY = Study(
    "smoothness",
    "VGG on CIFAR-10, plain, normalized and noisy: smoothness, covariate shift, curvature",
    "S6, Santurkar et al. 2018",
    Options,
    compiled="bn",
    compiled_options={"width": 64},
    source_size="15,000 steps of VGG at width 64",
    order=9,
)

LABELS = {name: label for name, (label, _) in vgg.NORMS.items()}
PAIR = ("none", "bn")  # networks that are trained to the end, and whose landscapes are drawn
FULL = {"steps": 15_000, "other_steps": 15_000, "measurements": 150, "width": 64, "rate_steps": 1000}
SHORT = {"steps": 3000, "other_steps": 500, "measurements": 60, "width": 16, "rate_steps": 500}
SETTINGS = {"init": "Glorot uniform", "optimizer": "SGD", "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE}
SETTINGS |= {"batch_norm_mode": "batch", "probed": (LEARNING_RATE * PROBED).tolist()}
MOST_MEASUREMENTS = 200
CLAIMS = read_claims(__file__)


def networks(options: Options, images: data.Dataset) -> dict[str, Variant]:
    """Returns VGG with each normalizer, by name."""
    return vgg.variants(images, options.width or _scale()["width"], options.selected(LABELS))


def run(options: Options, report: Report):
    """Trains VGG in all variants, measures them on the way and at the end, and judges the claims.

    By default VGG has its full length and width on an accelerator, else 3000 steps of a quarter of the width, and 500
    of the normalizers other than batch norm.
    """
    dataset, names, scale = options.dataset, options.selected(LABELS), _scale()
    steps, width = options.steps or scale["steps"], options.width or scale["width"]
    few = min(steps, options.other_steps or scale["other_steps"])
    common, least = math.gcd(steps, few), math.ceil(steps / scale["measurements"])
    every = divisor_from(min(least, common), common)
    if steps // every > MOST_MEASUREMENTS:
        raise ValueError(
            f"--steps and --other-steps must have a common divisor of at least {-(-steps // MOST_MEASUREMENTS)}, since "
            f"they are measured at the same steps, got {steps} and {few}."
        )
    images = data.images(dataset, options.data_dir, report.reading)
    settings = {
        **SETTINGS,
        "dataset": dataset,
        "network": f"VGG-11 of width {width}",
        "width": width,
        "augmented": options.augment,
        "steps": steps,
        "other_steps": few,
        "full_length": steps >= FULL["steps"] and width >= FULL["width"],
        "measured_every": every,
        "rate_steps": min(scale["rate_steps"], steps),
    }
    results = Results(STUDY.name, settings, range(options.seeds))
    results.examples = {"test_accuracy": len(images.test.y)}
    of_seeds, chance = {"key": seed_keys(results.seeds)}, float(np.log(images.num_classes))
    examples = tuple(images.train)
    all_trained, ends = {}, {}
    variants = networks(options, images)
    report.expect(len(variants))
    early = slice(few - max(1, few // 20), few)
    for name, variant in variants.items():
        how = {"augmented": options.augment, "keeps_path": name in PAIR}
        plan = vgg.plan_of(variant, steps if name in PAIR else few, every, **how)
        trained = train(plan, of_seeds, examples, mapped=ONE_BY_ONE, report=report, options=options)
        progress = functools.partial(report.reading, f"{variant.label}, at the end")
        rates = None
        if name in PAIR:
            rates = variant.learning_rates(of_seeds, RATES, settings["rate_steps"], examples, target=LEARNT * chance)
        end = landscape.at_the_end(variant, trained, of_seeds["key"], images, rates, progress)
        all_trained[LABELS[name]], ends[LABELS[name]] = trained, end
        landscape.add(results, trained, end.metrics, early)
        if rates is not None:
            last = np.asarray(rates.loss)[:, :, -max(1, rates.loss.shape[2] // 10) :].mean(2)
            losses = np.where(np.isfinite(last), np.fmin(last, 10 * chance), 10 * chance)
            largest = log10_largest_rate(np.array(RATES), losses, LEARNT * chance)
            results.set_metric(plan.name, "log10_largest_rate", largest)
    _add_comparisons(results, tuple(names), chance)
    results.judge(CLAIMS)
    title = f"{dataset}, width {width}, {seeds_in_words(options.seeds)}"
    on_the_way = landscape.figures_on_the_way(all_trained, LABELS, "VGG", title)
    return results, on_the_way | landscape.figures_at_the_end(ends, title)


def _scale() -> dict[str, int]:
    return SHORT if jax.default_backend() == "cpu" else FULL


def _add_comparisons(results: Results, names: Sequence[str], chance: float) -> None:
    """Adds the numbers that compare a network with the plain one at the same seeds, from the loss of an even guess."""
    if "none" not in names:
        return
    for name in names:
        landscape.add_shares(results, f"vgg_{name}", "vgg_none")
        # A diverged plain network counts as one that has learnt nothing, the others as worse.
        ours, plain = (np.fmin(results.metric(f"vgg_{of}", "final_loss"), 10 * chance) for of in (name, "none"))
        results.set_metric(f"vgg_{name}", "gain", np.minimum(plain, chance) - ours)
    if "bn" in names:
        for name in names:
            missing = results.metric(f"vgg_{name}", "gain") - 0.8 * results.metric("vgg_bn", "gain")
            results.set_metric(f"vgg_{name}", "gain_beyond_80_percent", missing)
