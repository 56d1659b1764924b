"""Plans of trainings: a network and how it learns, which the engine carries out for many seeds or on a mesh."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import analysis, training
from bnjax._compat import without_fusion_emitters
from bnjax.analysis import losses
from bnjax.studies.data import Split
from bnjax.studies.engine.histograms import Histograms
from bnjax.studies.evidence.statistics import from_then_on

_CALLS = 20  # compiled calls that a training is divided into, between which progress is shown
_LONG = 5000  # steps of a training that better kernels repay
_EVALUATED = 1000  # examples at a time

Setting = Mapping[str, Any]
"""The differences between trainings of one plan: 'key', the random key of its seed, 'examples' of its own, numbers."""


def compiler_options(steps: int = 0) -> dict[str, Any]:
    """Returns options of XLA for a training of some steps: compiling takes most of a short one, so less effort pays.

    Options that the environment variable XLA_FLAGS names are left to it.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
    if steps < _LONG:
        options |= without_fusion_emitters()
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A training of a network and its measurements, by functions that are traced (but not on a mesh).

    The same plan carried out again, for as many settings, compiles nothing.

    Attributes:
      name: key in results.
      label: label for tables and figures.
      create: makes the state at step 0, a pytree, from a setting.
      draw: `(examples, setting, number) -> inputs`, those of a step besides the state, such as `random_batch(128)`.
      step: one training step `(state, *inputs) -> (state, Metrics)`.
      steps: number of steps.
      measure: `(state, *inputs) -> pytree`, before a step, with its inputs; None to measure nothing.
      every: steps between two measurements, which divides them; the first is before the first step.
      part: steps of a part of the training, which `every` divides; by default there are some twenty parts.
      look: `(state, examples) -> dict`, after each part: parts of the state to keep, or `Metrics` of other examples.
      watch: `(state, *inputs) -> (weights, gradients)`, after each part, two trees of dicts for histograms; by default
        the parameters, and the gradient of the step.
      unit: steps that count as one in reports, such as those of an epoch.
      compiler_options: options of XLA, such as `compiler_options()` for networks that compile longer than they train.
      configuration: all else that decides its numbers, which a checkpoint has to agree with.
    """

    name: str
    label: str
    create: Callable[[Setting], Any]
    draw: Callable[[Any, Any, Any], tuple]
    step: Callable[..., tuple[Any, training.Metrics]]
    steps: int
    measure: Callable[..., Any] | None = None
    every: int = 1
    part: int = 0
    look: Callable[[Any, Any], dict[str, Any]] = lambda state, examples: {}
    watch: Callable[..., tuple[Any, Any]] | None = None
    unit: int = 1
    compiler_options: dict[str, Any] | None = None
    configuration: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.every < 1 or self.steps % self.every:
            raise ValueError(
                f"the steps must be a multiple of those between measurements, {self.every}, got {self.steps}."
            )
        if not self.part:
            measured = self.steps // self.every
            object.__setattr__(self, "part", self.every * divisor_up_to(measured // _CALLS, measured))

    @property
    def parts(self) -> int:
        """The number of parts of the training."""
        return self.steps // self.part

    @property
    def length(self) -> int:
        """The number that reports count to: steps, or epochs."""
        return self.steps // self.unit

    @property
    def call(self) -> int:
        """The steps of one compiled call."""
        return self.part * divisor_up_to(self.parts // _CALLS, self.parts)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The outcome of a plan's training, for each of S settings.

    Attributes:
      plan: the plan that was carried out.
      metrics: `Metrics` of each step's batch, before the step, `[S, steps]`.
      measurements: pytree of arrays `[S, measurements, …]`.
      looked: results of `Plan.look` after each part, `[S, parts, …]`.
      state: final states, with a leading axis of S; None where they are not kept.
      parameters: collection ('params', 'batch_stats') to path to shape.
      histograms: those of the first setting, where they were asked for.
    """

    plan: Plan
    metrics: training.Metrics
    measurements: Any
    looked: dict[str, Any]
    state: Any
    parameters: Mapping[str, Mapping[str, Sequence[int]]] = dataclasses.field(default_factory=dict)
    histograms: Histograms = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def curves(self) -> dict[str, np.ndarray]:
        """The curves '<split>_loss' and '<split>_accuracy', each `[S, parts]`.

        The split 'train' is the mean over the part's batches, in training mode; the others were looked at after it.
        """
        during = jax.tree.map(lambda v: v.reshape((len(v), self.plan.parts, -1)).mean(2), self.metrics)
        splits = {"train": during, **{k: v for k, v in self.looked.items() if isinstance(v, training.Metrics)}}
        return {f"{split}_{name}": v for split, of in splits.items() for name, v in of._asdict().items()}

    @property
    def states(self) -> list[Any]:
        """The final state of each setting."""
        count = len(jax.tree.leaves(self.state)[0])
        return [jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), self.state) for i in range(count)]

    @property
    def measured_at(self) -> np.ndarray:
        """The steps before which measurements were taken."""
        return np.arange(0, self.plan.steps, self.plan.every)

    def final(self, curve: str, parts: int = 1) -> np.ndarray:
        """Returns the mean of a curve over the last parts, for each setting."""
        return self.curves[curve][:, -parts:].mean(1)

    def epochs_to(self, curve: str, threshold: float) -> np.ndarray:
        """Returns each seed's first epoch (from 1) from which on a curve stays at a threshold or above, to the end.

        It is one more than there are epochs where the last one lies below.
        """
        return from_then_on(np.greater_equal(self.curves[curve], threshold))

    def unsteadiness(self, curve: str) -> np.ndarray:
        """Returns the standard deviation of a curve's change from one epoch to the next, for each setting.

        It is 0 for a curve that rises or falls evenly. Of what is not finite it is not defined, and infinite here.
        """
        change = np.diff(np.asarray(self.curves[curve], np.float64), axis=1)
        change[~np.isfinite(change)] = np.inf
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(change).any(1), np.inf, change.std(1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples to train on, and further splits to evaluate after each epoch.

    These are held out all as one, so that one evaluation serves (None where there are none); `splits` has the name and
    the first and last index of each.
    """

    train: Any
    held_out: Any
    splits: tuple[tuple[str, int, int], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, train: Split, evaluation: Mapping[str, Split], axis: int = 0) -> "Examples":
        """Joins some splits, whose axis of examples is the first, or the second where each seed has its own."""
        ends = np.cumsum([0, *(split.y.shape[-1] for split in evaluation.values())]).tolist()
        held_out: list[Any] = [jnp.concatenate(parts, axis) for parts in zip(*evaluation.values(), strict=True)]
        splits = tuple(zip(evaluation, ends[:-1], ends[1:], strict=True))
        return cls(train, Split(*held_out) if held_out else None, splits)


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One network and how it is trained.

    Attributes:
      name: key in results.
      label: label for tables and figures.
      model: linen module.
      optimizer: optax gradient transformation, or a function that makes one of a setting.
      input_shape: shape of one input of the model.
      batch_size: examples in a step.
      objective: loss and correctness of each example.
      preprocess: maps bytes and a random key for each example (None in evaluation) to inputs of the model, on the
        device; None where the examples are inputs of the model.
      input_dtype: dtype of the inputs of the model.
    """

    name: str
    label: str
    model: Any
    optimizer: Any
    input_shape: tuple[int, ...]
    batch_size: int
    objective: training.Objective = training.cross_entropy
    preprocess: training.Preprocess | None = None
    input_dtype: Any = jnp.float32

    def create(self, setting: Setting) -> training.TrainState:
        """Makes the state at step 0, of a setting's key, with kernels scaled by its 'init_scale' where it has one."""
        key, example = jax.random.fold_in(setting["key"], 0), jnp.zeros((1, *self.input_shape), self.input_dtype)
        optimizer: Any = self.optimizer(setting) if callable(self.optimizer) else self.optimizer
        state, scale = training.create_train_state(self.model, optimizer, key, example), setting.get("init_scale")
        if scale is None:
            return state
        scaled = jax.tree.map_with_path(lambda path, p: p * scale if path[-1].key == "kernel" else p, state.params)
        return state.replace(params=scaled)

    def prepared(self, x) -> Any:
        """Makes inputs of the model of examples, as for evaluation."""
        return x if self.preprocess is None else self.preprocess(x, None)

    def step(self, state, x, y, key) -> tuple[training.TrainState, training.Metrics]:
        """Takes one training step, whose key is that of dropout and of noise."""
        rngs = {"dropout": key, "noise": key}
        return training.train_step(state, self.prepared(x), y, objective=self.objective, rngs=rngs)

    def accuracy(self, state, x: Any, y: Any) -> Any:
        """Returns the accuracy on some inputs of the model, with running statistics."""
        return jnp.mean(training.evaluate(state, x, y, objective=self.objective).accuracy)

    @functools.cached_property
    def layers(self) -> list[tuple[str, ...]]:
        """The layers of the model in the order of their calls (`bnjax.analysis.losses.layers_in_order`)."""
        example = jnp.zeros((1, *self.input_shape), self.input_dtype)
        state = jax.eval_shape(self.create, {"key": jax.random.key(0)})
        return losses.layers_in_order(self.model, state.variables, example)

    def loss(self, batch_stats: Any, **options: Any) -> Callable[..., Any]:
        """Makes `loss_fn(params, x, y)` of examples, with options of `bnjax.analysis.losses.linen_loss`."""
        loss = losses.linen_loss(self.model, {"batch_stats": batch_stats}, self.objective, **options)
        return lambda params, x, y: loss(params, self.prepared(x), y)

    def learning_rates(
        self, settings: Setting, rates: Any, steps: int, examples: Any, **options: Any
    ) -> analysis.LearningRateRange:
        """Finds which rates of plain gradient descent train within some steps, for each of several settings.

        Batches are drawn at random, and the noise is the same throughout; options are those of
        `bnjax.analysis.learning_rate_range`.
        """
        rates, data = jnp.asarray(rates), jax.tree.map(jnp.asarray, tuple(examples))

        @jax.jit
        def of_setting(setting, x, y):
            state, key = self.create(setting), setting["key"]
            loss = self.loss(state.batch_stats, rngs={"noise": key})
            index = jax.random.randint(jax.random.fold_in(key, 3), (steps, self.batch_size), 0, y.shape[0])
            at = (lambda params, i: loss(params, x[i], y[i])), state.params, rates, (index,)
            return analysis.learning_rate_range(*at, **options)

        each = (jax.tree.map(lambda v, i=i: v[i], settings) for i in range(len(settings["key"])))
        return jax.tree.map(lambda *v: np.stack(v), *(of_setting(setting, *data) for setting in each))

    @functools.cached_property
    def accuracies(self) -> Callable[[Any, Any, Any], jax.Array]:
        """The `accuracy` of each of several states, which have a leading axis, as a compiled function."""
        return jax.jit(jax.vmap(self.accuracy, (0, None, None)), compiler_options=compiler_options())

    def evaluate(self, state, x: Any, y: Any) -> training.Metrics:
        """Returns means over some examples, in batches, with running statistics."""
        how: Any = {"objective": self.objective, "batch_size": _EVALUATED, "preprocess": self.preprocess}
        return training.evaluate_in_batches(state, x, y, **how)

    def plan(self, steps: int, **options: Any) -> Plan:
        """Plans steps of batches drawn at random; options are other attributes of `Plan`."""
        given: dict[str, Any] = {"create": self.create, "draw": random_batch(self.batch_size), "step": self.step}
        given["configuration"] = {"batch_size": self.batch_size}
        return Plan(self.name, self.label, steps=steps, **(given | options))

    def epochs(self, epochs: int, count: int) -> Plan:
        """Plans passes over all examples, in an order drawn anew for each, with evaluation of `Examples` after each.

        A step of the plan is an epoch. Histograms are of the gradient of the first batch of the examples, in training
        mode.
        """

        def draw(examples: Examples, setting, epoch):
            return *examples.train, jax.random.fold_in(jax.random.fold_in(setting["key"], 1), epoch)

        def step(state, x, y, key):
            return training.train_epoch(state, key, x, y, batch_size=self.batch_size, objective=self.objective)

        def look(state, examples: Examples):
            if examples.held_out is None:
                return {}
            of_each = training.evaluate(state, *examples.held_out, objective=self.objective)
            return {
                name: jax.tree.map(lambda v, start=start, end=end: v[start:end].mean(), of_each)
                for name, start, end in examples.splits
            }

        def watch(state, x, y, key):
            x, y = x[: self.batch_size], y[: self.batch_size]
            return state.params, training.gradients(state, x, y, objective=self.objective)

        options = compiler_options(epochs * (count // self.batch_size))
        return self.plan(epochs, draw=draw, step=step, part=1, look=look, watch=watch, compiler_options=options)

    def parallel_epochs(self, epochs: int, steps_per_epoch: int, step: training.ParallelStep) -> Plan:
        """Plans epochs of some steps on a mesh, the splits of `(train, evaluation)` evaluated after each.

        Batches are taken from a new permutation of the examples for each pass over them, without regard to its end.
        """

        def draw(examples, setting, number):
            return _of_permutation(examples[0], self.batch_size, number, int(setting["seed"]))

        def look(state, examples):
            return {name: self.evaluate(state, split.x, split.y) for name, split in examples[1].items()}

        how = {"part": steps_per_epoch, "unit": steps_per_epoch, "look": look}
        return self.plan(epochs * steps_per_epoch, draw=draw, step=step, **how)


def random_batch(batch_size: int) -> Callable[[Any, Any, Any], tuple]:
    """Makes a function that draws examples `(x, y)` at random, with replacement, and the step's key."""

    def draw(examples, setting, number):
        x, y = examples
        of_batch, of_step = step_keys(setting, number)
        index = jax.random.randint(of_batch, (batch_size,), 0, y.shape[0])
        return x[index], y[index], of_step

    return draw


def step_keys(setting: Setting, number: Any) -> tuple[Any, Any]:
    """Returns the random keys of a step's batch, and of all else in it."""
    of_step = jax.random.fold_in(setting["key"], number + 1)
    return jax.random.fold_in(of_step, 0), jax.random.fold_in(of_step, 1)


def seed_keys(seeds: Sequence[int]) -> jax.Array:
    """Makes the random key of each seed."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def divisor_from(least: int, number: int) -> int:
    """Returns the smallest divisor of a number from some least one."""
    return next(n for n in range(max(1, least), number + 1) if number % n == 0)


def divisor_up_to(most: int, number: int) -> int:
    """Returns the largest divisor of a number up to some greatest one (or 1)."""
    return next(n for n in range(max(1, most), 0, -1) if number % n == 0)


def _of_permutation(train: Split, batch_size: int, step: int, seed: int) -> Split:
    """Returns the examples of a step: those at its place in one permutation of all after the other."""
    which, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(train.y))
    index = np.concatenate([_permutation(len(train.y), seed, int(n))[place[which == n]] for n in np.unique(which)])
    return Split(train.x[index], train.y[index])


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(count)
