"""S6's VGG with each normalizer: how it is trained, and what is measured on the way."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from bnjax import analysis
from bnjax.linen import BatchNorm, BatchRenorm, LpBatchNorm, NoisyBatchNorm
from bnjax.models import VGG, of_example
from bnjax.studies import data
from bnjax.studies.data import augmentation
from bnjax.studies.engine import Plan, Variant, random_batch, step_keys

NORMS: Mapping[str, tuple[str, Any]] = {  # name: (label, norm)
    "none": ("plain", None),
    "bn": ("batch norm", BatchNorm),
    "noisy": ("noisy batch norm", NoisyBatchNorm),
    "l1": ("l₁ norm", functools.partial(LpBatchNorm, p=1)),
    "l2": ("l₂ norm", functools.partial(LpBatchNorm, p=2)),
    "linf": ("l∞ norm", functools.partial(LpBatchNorm, p=math.inf)),
    "renorm": ("batch renorm", BatchRenorm),
    "layer": ("layer norm", of_example(nn.LayerNorm)),
    "group": ("group norm", nn.GroupNorm),  # with groups that fit the network's width
    "weight": ("weight norm", None),  # it normalizes the kernels
}
BATCH_SIZE = 128
LEARNING_RATE = 0.1
PROBED = np.linspace(0.5, 4, 8)  # step sizes of the probe, in learning rates
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
LEARNT = 0.9  # fraction of the loss of an even guess


def variants(images: data.Dataset, width: int, labels: Mapping[str, str]) -> dict[str, Variant]:
    """Returns VGG of some width with each normalizer, by name."""
    prepare, shape = augmentation.centered(images.train.x), images.train.x.shape[1:]
    group = of_example(functools.partial(nn.GroupNorm, num_groups=math.gcd(32, max(1, width // 2))))
    norms = {name: group if name == "group" else NORMS[name][1] for name in labels}
    vgg = functools.partial(VGG, images.num_classes, depth=11, width=width)
    how = {"optimizer": optax.sgd(LEARNING_RATE), "input_shape": shape, "batch_size": BATCH_SIZE, "preprocess": prepare}
    return {
        name: Variant(f"vgg_{name}", f"VGG, {label}", vgg(norm=norms[name], weight_norm=name == "weight"), **how)
        for name, label in labels.items()
    }


def plan_of(variant: Variant, steps: int, every: int, *, augmented: bool = False, keeps_path: bool = True) -> Plan:
    """Plans a training, measured by K + 1 gradients for the probe, one for the next step, one for each layer.

    The images are mirrored and moved at random where they are to be augmented; the parameters on the way are kept for
    the path of training.
    """

    def measure(state, x, y, key):
        loss = variant.loss(state.batch_stats, rngs={"noise": key})
        following, _ = variant.step(state, x, y, key)
        return {
            "probe": analysis.gradient_probe(loss, state.params, LEARNING_RATE * PROBED, x, y),
            "shift": analysis.covariate_shift(loss, state.params, following.params, x, y, layers=variant.layers),
        }

    how = {"draw": _augmented_batch if augmented else random_batch(BATCH_SIZE), "measure": measure, "every": every}
    configuration = {"model": str(variant.model), "augmented": augmented}
    return variant.plan(
        steps, look=lambda state, examples: state.params if keeps_path else {}, configuration=configuration, **how
    )


def _augmented_batch(examples, setting, number):
    """Draws a random batch, mirrored and moved."""
    x, y, key = random_batch(BATCH_SIZE)(examples, setting, number)
    of_batch, _ = step_keys(setting, number)
    return augmentation.random_crop_flip(x, jax.random.split(jax.random.fold_in(of_batch, 1), BATCH_SIZE)), y, key
