"""Trains networks that are measured on the way, all settings of one variant in one vmapped and scanned program."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import analysis
from bnjax.studies.engine.experiment import (
    Histograms,
    Trained,
    Variant,
    count_values,
    divisor_up_to,
    empty_histograms,
    parameter_shapes,
    recording,
)
from bnjax.studies.engine.saving import Saving
from bnjax.training import Metrics

_CALLS = 20  # compiled calls that a training is divided into at least, where it is measured as often

Setting = Mapping[str, Any]
"""What distinguishes one training from another of its variant: 'key', the random key of its seed, and any numbers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a network is trained and measured; every function is traced.

    Attributes:
      create: the state at step 0, a pytree, from a setting.
      draw: `(examples, key) -> batch`, the tuple of arrays that a step takes, such as `random_batch(128)`.
      step: one training step `(state, *batch, key) -> (state, Metrics)`.
      measure: `(state, *batch, key) -> pytree`, with the batch and the key of the step that follows.
      steps: number of steps.
      every: steps between two measurements, which divides them; the first is before the first step.
      together: whether all settings are trained at once by vmap, rather than one after the other.
      keep: what of the state is kept, some twenty times, such as the parameters for a trajectory.
      parameters: `(state, *batch, key) -> (weights, gradients)`, two trees of dicts, for histograms; None for those of
        a `TrainState`.
      compiler_options: of XLA, such as `compiler_options()` for networks that take longer to compile than to train.
    """

    create: Callable[[Setting], Any]
    draw: Callable[[Any, Any], tuple]
    step: Callable[..., tuple[Any, Metrics]]
    measure: Callable[..., Any]
    steps: int
    every: int
    together: bool = True
    keep: Callable[[Any], Any] = lambda state: ()
    parameters: Callable[..., tuple[Any, Any]] | None = None
    compiler_options: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was seen of a training, for each of S settings.

    Attributes:
      metrics: `Metrics` of each step's batch, before the step, `[S, steps]`.
      measurements: pytree of arrays `[S, measurements, …]`.
      measured_at: the steps before which these were taken.
      states: final states, with a leading axis of S.
      kept: what `keep` took from the states after equal parts of the training, `[S, parts, …]`.
      histograms: of the first setting's weights and gradients; empty where these were not asked for.
    """

    metrics: Metrics
    measurements: Any
    measured_at: np.ndarray
    states: Any
    kept: Any
    histograms: Histograms = dataclasses.field(default_factory=dict)

    def trained(self, variant: Variant, curves: dict[str, np.ndarray]) -> Trained:
        """As what a study's results take, with some curves."""
        return Trained(variant, curves, None, self.histograms, parameter_shapes(self.states))


def train_measured(
    plan: Plan,
    settings: Setting,
    examples: Any,
    *,
    name: str = "",
    progress: Callable[[int, dict[str, float]], Any] = lambda steps, means: None,
    saving: Saving | None = None,
    histograms: bool = False,
) -> Measured:
    """Trains from each setting and measures on the way.

    A setting's key decides its initial parameters, batches and all else that is random, whatever the other settings.

    Args:
      plan: how to train and measure.
      settings: pytree of arrays with a leading axis of S settings, 'key' among them.
      examples: pytree of arrays from which `plan.draw` takes batches; the same for all settings.
      name: of the training, for its checkpoints.
      progress: is told the number of steps done (as a mean over settings) and the latest mean accuracy and loss.
      saving: where checkpoints are, if anywhere, from which to continue.
      histograms: whether to count weights and gradients some twenty times.

    Raises:
      ValueError: if the measurements do not divide the steps.
    """
    if plan.every < 1 or plan.steps % plan.every:
        raise ValueError(f"the steps must be a multiple of those between measurements, {plan.every}, got {plan.steps}.")
    examples = jax.tree.map(jnp.asarray, examples)
    blocks = plan.steps // plan.every
    size = plan.every * divisor_up_to(blocks // _CALLS, blocks)
    count = len(jax.tree.leaves(settings)[0])
    groups = [settings] if plan.together else [jax.tree.map(lambda v, i=i: v[i], settings) for i in range(count)]

    def run_one(state, setting, examples, first):
        state, *found = run_steps(plan, state, setting["key"], examples, first + jnp.arange(size))
        return state, *found, jax.tree.map(lambda v: v[None], plan.keep(state))

    over = jax.vmap if plan.together else lambda function, *_: function

    @jax.jit
    def leaves_of_first(state, setting, examples, number):
        state, setting = jax.tree.map(lambda v: v[0], (state, setting)) if plan.together else (state, setting)
        inputs = _inputs(plan, setting["key"], examples, number)
        if plan.parameters is not None:
            return dict(zip(("weight", "gradient"), plan.parameters(state, *inputs), strict=True))
        recorded, _ = plan.step(recording(state), *inputs)
        return {"weight": state.params, "gradient": recorded.opt_state}

    options: Any = {"compiler_options": plan.compiler_options}
    create = jax.jit(over(plan.create), **options)
    run = jax.jit(over(run_one, (0, 0, None, None)), donate_argnums=0, **options)
    shapes = jax.eval_shape(run, jax.eval_shape(create, groups[0]), groups[0], examples, 0)[1:]
    axis = int(plan.together)
    digest = _digest(settings)
    found, counted = [], {}
    for number, setting in enumerate(groups):
        state, done = create(setting), 0
        is_counted = histograms and number == 0
        if is_counted:
            leaves = jax.eval_shape(leaves_of_first, state, setting, examples, 0)
            counted = empty_histograms(leaves["weight"], plan.steps // size)
        # Metrics and measurements of all calls: their axis of steps comes after that of settings.
        parts = jax.tree.map(lambda v: _empty(v, plan.steps // size, axis), shapes)
        configuration = {"group": number, "settings": digest, "steps": plan.steps, "every": plan.every}
        saved = saving and saving.of(f"{name}-{number}", configuration)
        if saved and (restored := saved.restore((state, parts))):
            done, (state, parts) = restored
        for first in range(done, plan.steps, size):
            state, *new = run(state, setting, examples, first)
            _put(parts, tuple(jax.device_get(new)), first // size, axis)
            if is_counted:
                leaves = jax.device_get(leaves_of_first(state, setting, examples, first + size))
                count_values(counted, first // size, leaves)
            means = {f"train_{metric}": float(jnp.mean(values)) for metric, values in new[0]._asdict().items()}
            progress((number * plan.steps + first + size) // len(groups), means)
            if saved:
                saved.save(first + size, (state, parts))
        if saved:
            saved.close()
        found.append((jax.device_get(state), *parts))
    state, metrics, measurements, kept = found[0] if plan.together else jax.tree.map(lambda *v: np.stack(v), *found)
    return Measured(metrics, measurements, np.arange(0, plan.steps, plan.every), state, kept, counted)


def run_steps(plan: Plan, state: Any, key: Any, examples: Any, steps: Any, *, measured: bool = True):
    """Some steps of one training, traced: `(state, metrics, measurements)`, with measurements or without."""

    def step(state, number):
        return plan.step(state, *_inputs(plan, key, examples, number))

    def measure(state, number):
        return plan.measure(state, *_inputs(plan, key, examples, number))

    if not measured:
        return (*lax.scan(step, state, steps), None)
    return analysis.measured_scan(step, state, steps, measure=measure, every=plan.every)


def _inputs(plan: Plan, key: Any, examples: Any, step: Any) -> tuple:
    """A step's batch, and its key."""
    of_step = jax.random.fold_in(key, step + 1)
    return *plan.draw(examples, jax.random.fold_in(of_step, 0)), jax.random.fold_in(of_step, 1)


def random_batch(batch_size: int) -> Callable[[Any, Any], tuple]:
    """Draws as many examples `(x, y)` at random, with replacement."""

    def draw(examples, key):
        x, y = examples
        index = jax.random.randint(key, (batch_size,), 0, y.shape[0])
        return x[index], y[index]

    return draw


def overhead(plan: Plan, setting: Setting, examples: Any, *, repeats: int = 3) -> tuple[float, float]:
    """Seconds a step, with measurements and without: medians over alternating runs of `every` steps, compiled before.

    Args:
      plan: how to train and measure.
      setting: of one training.
      examples: as those of `train_measured`.
      repeats: runs of each.
    """
    examples = jax.tree.map(jnp.asarray, examples)
    state = jax.jit(plan.create)(setting)
    key, steps = setting["key"], jnp.arange(plan.every)
    run = jax.jit(
        lambda state, examples, measured: run_steps(plan, state, key, examples, steps, measured=measured)[1:],
        static_argnums=2,
    )
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for measured, seconds in times.items():
            clock = time.perf_counter()
            jax.block_until_ready(run(state, examples, measured))
            if repeat:
                seconds.append((time.perf_counter() - clock) / plan.every)
    return float(np.median(times[True])), float(np.median(times[False]))


def _digest(settings: Setting) -> str:
    """A text that changes with any number of the settings."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(settings):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return digest.hexdigest()


def _empty(like: Any, calls: int, axis: int) -> np.ndarray:
    shape = list(like.shape)
    shape[axis] *= calls
    return np.zeros(shape, like.dtype)


def _put(buffers: Any, values: Any, call: int, axis: int) -> None:
    """Copies what a call gave to its place in the arrays of all calls."""

    def put(buffer, value):
        length = value.shape[axis]
        place = (slice(None),) * axis + (slice(call * length, (call + 1) * length),)
        buffer[place] = value

    jax.tree.map(put, buffers, values)
