"""Two more of the changes that batch norm is said to allow: no local response normalization, and fewer distortions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.models import VGG
from bnjax.studies import Options, data
from bnjax.studies.engine.experiment import Report, Variant, divisor_from, seed_keys
from bnjax.studies.engine.measured import Plan, random_batch, train_measured
from bnjax.studies.evidence.claims import AtLeast, Claim, Condition
from bnjax.studies.evidence.plots import Figure, drawing
from bnjax.studies.evidence.results import Results
from bnjax.studies.evidence.statistics import seeds_in_words

SOURCE = "original paper notes, 'Accelerating BN networks'"
BATCH_SIZE, LEARNING_RATE, STEPS, WIDTH, PARTS = 128, 0.1, 500, 8, 10
STRENGTH = 0.5  # of the photometric distortions
# name: (label, norm, local response normalization, distorted)
VARIANTS = {
    "none": ("no batch norm", None, False, False),
    "none_lrn": ("no batch norm, LRN", None, True, False),
    "bn": ("batch norm", BatchNorm, False, False),
    "bn_lrn": ("batch norm, LRN", BatchNorm, True, False),
    "none_distorted": ("no batch norm, distorted", None, False, True),
    "bn_distorted": ("batch norm, distorted", BatchNorm, False, True),
}
_NEEDS = {"dataset": "cifar10", "steps": AtLeast(STEPS), "width": AtLeast(WIDTH)}
CLAIMS = (
    Claim(
        "A.5",
        SOURCE,
        "with batch norm local response normalization can be removed",
        "–",
        "without it the test accuracy is at most half a point lower",
        (Condition("without − with LRN", "test_accuracy", "bn", "bn_lrn", low=-0.005),),
        _NEEDS,
    ),
    Claim(
        "A.7",
        SOURCE,
        "a batch-normalized network, which trains faster, profits from fewer photometric distortions",
        "–",
        "images as they are give a higher test accuracy than images of random brightness and contrast",
        (Condition("plain − distorted", "test_accuracy", "bn", "bn_distorted", low=0),),
        _NEEDS,
    ),
)


def run(options: Options, report: Report):
    """Trains six narrow VGGs and judges A.5 and A.7.

    Args:
      options: seeds, steps (500), width (8), dataset ('cifar10') and data_dir.
      report: is told the progress.

    Returns:
      The results, and the figures by file name.
    """
    name, steps, width = options.dataset or "cifar10", options.steps or STEPS, options.width or WIDTH
    every = divisor_from(steps // PARTS, steps)
    images = data.images(name, options.data_dir, report.reading)
    mean, deviation = (float(f(images.train.x)) for f in (np.mean, np.std))
    settings = {"network": f"VGG-11 of width {width}", "optimizer": "SGD", "learning_rate": LEARNING_RATE}
    settings |= {"batch_size": BATCH_SIZE, "distortions": STRENGTH, "dataset": name, "steps": steps, "width": width}
    results = Results("accelerating", settings, range(options.seeds))
    keys = seed_keys(results.seeds)
    example = jnp.zeros((1, *images.train.x.shape[1:]))

    def prepare(x, keys=None):
        return (x.astype(jnp.float32) - mean) / deviation

    curves = {}
    for variant, (label, norm, has_lrn, is_distorted) in VARIANTS.items():
        model = VGG(images.num_classes, norm, 11, width, local_response_norm=has_lrn)
        optimizer = optax.sgd(LEARNING_RATE)

        def create(setting, model=model, optimizer=optimizer):
            return training.create_train_state(model, optimizer, jax.random.fold_in(setting["key"], 0), example)

        def step(state, x, y, key, is_distorted=is_distorted):
            x = _distorted(prepare(x), key) if is_distorted else prepare(x)
            return training.train_step(state, x, y, objective=training.cross_entropy)

        described = Variant(variant, label, model, optimizer, training.cross_entropy, BATCH_SIZE, steps)
        draw = random_batch(BATCH_SIZE)
        plan = Plan(create, draw, step, lambda state, x, y, key: jnp.zeros(()), steps, every, together=False)
        tell = report.task(described)
        further = {"progress": tell, "saving": options.saving, "histograms": options.histograms}
        seen = train_measured(plan, {"key": keys}, tuple(images.train), name=variant, **further)
        evaluate = functools.partial(
            training.evaluate_in_batches, objective=training.cross_entropy, batch_size=1000, preprocess=prepare
        )
        states = [jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), seen.states) for i in range(options.seeds)]
        accuracy = np.array([np.asarray(evaluate(state, *images.test).accuracy) for state in states])
        loss = np.asarray(seen.metrics.loss)
        parts = loss.reshape((len(loss), -1, every)).mean(2)
        curves[label] = parts
        found = {"test_accuracy": accuracy, "final_loss": parts[:, -1]}
        results.add(seen.trained(described, {"train_loss": loss}), {"variant": variant}, found)
    results.judge(CLAIMS)
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    drawing.curves(figure.subplots(), curves, every * np.arange(steps // every), ylabel="training loss")
    figure.suptitle(f"{name}, {seeds_in_words(options.seeds)}", fontsize=10)
    drawing.legend(figure)
    return results, {"training.png": figure}


def _distorted(x: jax.Array, key: jax.Array) -> jax.Array:
    """Each image with a random contrast and brightness."""
    scale, shift = jax.random.uniform(key, (2, x.shape[0], 1, 1, 1), minval=-STRENGTH, maxval=STRENGTH)
    return x * (1 + scale) + shift
