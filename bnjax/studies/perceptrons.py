"""The perceptrons of the sensitivity study, and the settings at which each is trained."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax.linen import BatchNorm, BatchRenorm
from bnjax.models import Perceptron, of_example
from bnjax.studies.engine import step_keys

HIDDEN, DEEP = (64, 64), (64,) * 8
BATCH_SIZE = 32
DEFAULTS = {"learning_rate": 1e-3, "init_scale": 1.0, "l2": 0.0, "decay": 0.0}
SWEEPS = {
    "learning_rate": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "init_scale": (0.01, 0.1, 1.0, 10.0, 100.0),
    "decay": (0.0, 1.0, 6.0),  # the learning rate ends at exp(−decay) of what it began with
}
OVERFITTING = {"l2": (0.0, 1e-4, 1e-3, 1e-2)}
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 256)
EPSILON = 1e-3
SMALLER_NORMS = ("none", "bn", "renorm", "layer", "group", "weight")  # networks that are trained at all batch sizes
LARGEST = max(BATCH_SIZES)
# Beside Glorot's uniform kernels, the default: He's, and careless ones, of deviation 1 whatever the layer's size.
SCHEMES = {
    "he": ("He's kernels", nn.initializers.he_normal()),
    "normal": ("normal kernels of deviation 1", nn.initializers.normal(1.0)),
}


def _perceptron(norm: Any = None, place: str = "before", hidden: Sequence[int] = HIDDEN, **options: Any) -> Perceptron:
    """Makes a perceptron with a normalizer of ε = 0.001 in some place."""
    norm = functools.partial(norm, epsilon=EPSILON) if norm else None
    return Perceptron(hidden, 10, norm, place if norm else "none", **options)


NETWORKS: Mapping[str, tuple[str, Perceptron]] = {
    "none": ("no batch norm", _perceptron()),
    "bn": ("batch norm", _perceptron(BatchNorm)),
    "renorm": ("batch renorm", _perceptron(BatchRenorm)),
    "layer": ("layer norm", _perceptron(of_example(nn.LayerNorm))),
    "group": ("group norm", _perceptron(of_example(functools.partial(nn.GroupNorm, num_groups=8)))),
    "weight": ("weight norm", _perceptron(weight_norm=True)),
    "relu_after": ("batch norm after ReLU", _perceptron(BatchNorm, "after")),
    **{
        f"{name}_{place}": (f"{name}, batch norm {place}", _perceptron(BatchNorm, place, activation=function))
        for name, function in (("sigmoid", nn.sigmoid), ("tanh", nn.tanh))
        for place in ("before", "after")
    },
    **{
        f"{name}_dropout_{rate}": (f"{label}, dropout {rate}", _perceptron(norm, dropout_rate=rate))
        for name, label, norm in (("none", "no batch norm", None), ("bn", "batch norm", BatchNorm))
        for rate in (0.2, 0.5)
    },
    **{
        f"{name}_{scheme}": (f"{label}, {text}", _perceptron(norm, hidden_init=init, output_init=init))
        for name, label, norm in (("none", "no batch norm", None), ("bn", "batch norm", BatchNorm))
        for scheme, (text, init) in SCHEMES.items()
    },
    "deep_none": ("eight sigmoid layers", _perceptron(hidden=DEEP, activation=nn.sigmoid)),
    "deep_bn": ("eight sigmoid layers, batch norm", _perceptron(BatchNorm, hidden=DEEP, activation=nn.sigmoid)),
}


class Case(NamedTuple):
    """A network trained at several settings at once.

    Attributes:
      network: its name in `NETWORKS`.
      sweeps: values of the settings that are varied, one at a time, from `DEFAULTS`.
      batch_size: examples in a step.
      is_small: whether the training set is small enough to overfit.
      is_fixed: whether the same examples form a batch throughout.
      pixel_scale: the largest pixel.
      has_all_steps: whether it is trained for as many steps as at the default batch size, not for as many examples.
    """

    network: str
    sweeps: Mapping[str, Sequence[float]] = {}
    batch_size: int = BATCH_SIZE
    is_small: bool = False
    is_fixed: bool = False
    pixel_scale: float = 1.0
    has_all_steps: bool = False

    @property
    def name(self) -> str:
        """The name of the training at the default settings."""
        batch = "" if self.batch_size == BATCH_SIZE else f", batch {self.batch_size}"
        scale = "" if self.pixel_scale == 1 else f", pixels to {self.pixel_scale:g}"
        kinds = ", small set" * self.is_small + ", fixed batches" * self.is_fixed + ", all steps" * self.has_all_steps
        return self.network + batch + kinds + scale

    @property
    def settings(self) -> dict[str, dict[str, float]]:
        """Name to settings of each training, the default first."""
        return {self.name: dict(DEFAULTS)} | {
            f"{self.name}, {key} {value:g}": {**DEFAULTS, key: value}
            for key, values in self.sweeps.items()
            for value in values
            if value != DEFAULTS[key]
        }


CASES = (
    Case("none", SWEEPS),
    Case("bn", SWEEPS),
    *(Case(name) for name in NETWORKS if name not in ("none", "bn") and "dropout" not in name),
    *(Case(name, {}, size) for name in SMALLER_NORMS for size in BATCH_SIZES if size != BATCH_SIZE),
    *(Case(name, {}, LARGEST, has_all_steps=True) for name in ("none", "bn")),
    Case("none", OVERFITTING, is_small=True),
    Case("bn", OVERFITTING, is_small=True),
    *(Case(name, {}, is_small=True, is_fixed=True) for name in ("none", "bn")),
    *(Case(name, {}, pixel_scale=255) for name in ("none", "bn")),
    *(Case(name, {}, is_small=True) for name in NETWORKS if "dropout" in name),
)


def optimizer(steps: int, setting: Mapping[str, Any]) -> optax.GradientTransformation:
    """Makes Adam, with the gradient of `l2 / 2 · ‖W‖²`, and a learning rate that falls exponentially by exp(−decay)."""
    setting = {**DEFAULTS, **setting}

    def make(learning_rate, l2, decay):
        schedule = optax.scale_by_schedule(lambda step: jnp.exp(-decay * step / steps))
        return optax.chain(optax.add_decayed_weights(l2), optax.adam(learning_rate, eps=1e-7), schedule)

    return optax.inject_hyperparams(make)(**{name: setting[name] for name in ("learning_rate", "l2", "decay")})


def fixed_batch(batch_size: int) -> Callable[[Any, Any, Any], tuple]:
    """Draws one of the batches into which the examples are divided once and for all, and the step's key."""

    def draw(examples, setting, number):
        x, y = examples
        of_batch, of_step = step_keys(setting, number)
        index = jax.random.randint(of_batch, (), 0, y.shape[0] // batch_size) * batch_size + jnp.arange(batch_size)
        return x[index], y[index], of_step

    return draw
