"""Measurements during training in one compiled scan, and the range of learning rates at which training works."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis._trees import LossFn
from bnjax.analysis.probe import check_batch_size


class LearningRateRange(NamedTuple):
    """The results of training at R learning rates.

    Attributes:
      learning_rates: the learning rates, `[R]`.
      loss: loss before each of T steps, `[R, T]`.
      trains: whether the loss stays finite and its mean over the last tenth of the steps is below `target`, `[R]`.
      largest: the largest learning rate that trains; NaN where none does.
      breaks_at: the smallest learning rate above `largest`; infinite where the largest of all trains, NaN where none
        does.
    """

    learning_rates: Array
    loss: Array
    trains: Array
    largest: Array
    breaks_at: Array


def measured_scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    inputs: Any,
    *,
    measure: Callable[[Any, Any], Any],
    every: int,
) -> tuple[Any, Any, Any]:
    """Scans training steps and measures before every n-th of them: at steps 0, n, 2n, ….

    The scan is nested, n steps inside, so nothing is computed at the steps between measurements, also under vmap, where
    a conditional would be computed at every step. Vmap it over seeds and learning rates.

    Args:
      step: function `step(state, input) -> (state, output)`, as for `jax.lax.scan`.
      state: pytree that is trained.
      inputs: pytree of arrays with a leading axis of T steps, such as batches or their numbers.
      measure: function `measure(state, input) -> measurement`, a pytree of arrays, of the state before a step and the
        step's input.
      every: n ≥ 1, which divides T; static.

    Returns:
      `(state, outputs [T, …], measurements [T / n, …])`.

    Raises:
      ValueError: if `every` is not positive or does not divide the steps.

    >>> from bnjax import analysis
    >>> step = lambda w, x: (w - 0.5 * (w - x), w)
    >>> square = lambda w, x: w ** 2
    >>> w, before, measured = analysis.measured_scan(step, 8.0, jnp.zeros(4), measure=square, every=2)
    >>> print(w, before, measured)
    0.5 [8. 4. 2. 1.] [64.  4.]
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError(f"inputs must be arrays with the same number of steps first, got {lengths or 'none'}.")
    (length,) = lengths
    if every < 1 or length % every:
        raise ValueError(f"every must be at least 1 and divide the {length} steps, got {every}.")
    blocks = jax.tree.map(lambda v: v.reshape((length // every, every, *v.shape[1:])), inputs)

    def block(state, inputs):
        measured = measure(state, jax.tree.map(lambda v: v[0], inputs))
        state, outputs = lax.scan(step, state, inputs)
        return state, (outputs, measured)

    state, (outputs, measurements) = lax.scan(block, state, blocks)
    return state, jax.tree.map(lambda v: v.reshape((length, *v.shape[2:])), outputs), measurements


def learning_rate_range(
    loss_fn: LossFn,
    params: Any,
    learning_rates: Any,
    batches: Any,
    *,
    target: Any = None,
    optimizer: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
) -> LearningRateRange:
    """Trains at each of several learning rates from the same start, to find at which rates training works or breaks.

    Args:
      loss_fn: `loss_fn(params, *batch) -> scalar`.
      params: pytree of arrays to begin with; leaves that are not floating-point are constants.
      learning_rates: learning rates `[R]`, increasing; may be traced.
      batches: tuple of arrays (or pytrees of them) with a leading axis of T steps: further arguments of `loss_fn`.
      target: loss below which training has worked; the loss before the first step by default.
      optimizer: makes an optax gradient transformation from a learning rate, such as `optax.adam`; plain gradient
        descent by default.
      batch_size: number of learning rates trained at once by vmap; one after the other by default. Static.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or no learning rates.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.3; Bjorck et al. 2018 (arXiv 1806.02375), section 3.

    >>> from bnjax import analysis
    >>> rates, batches = jnp.array([0.1, 0.5, 1.5]), (jnp.zeros(20),)
    >>> found = analysis.learning_rate_range(lambda w, x: (w - x) ** 2, 1.0, rates, batches)
    >>> print(found.trains, found.largest, found.breaks_at)
    [ True  True False] 0.5 1.5
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    rates = jnp.atleast_1d(jnp.asarray(learning_rates))
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"learning_rates must be a vector of at least one number, got shape {rates.shape}.")
    check_batch_size(batch_size)
    rates = rates.astype(_trees.norm(free).dtype)

    def train(rate: Array) -> Array:
        transform = None if optimizer is None else optimizer(rate)

        def step(carry, batch):
            free, memory = carry
            loss, gradient = jax.value_and_grad(loss_fn)(free, *batch)
            if transform is None:
                return (_trees.moved(free, -rate, gradient), memory), loss
            updates, memory = transform.update(gradient, memory, free)
            return (_trees.moved(free, jnp.ones((), rates.dtype), updates), memory), loss

        return lax.scan(step, (free, None if transform is None else transform.init(free)), batches)[1]

    losses = lax.map(train, rates, batch_size=batch_size)
    last = losses[:, -max(1, losses.shape[1] // 10) :].mean(1)
    trains = jnp.isfinite(losses).all(1) & (last < (losses[:, 0] if target is None else target))
    largest = jnp.where(trains, rates, -jnp.inf).max()
    breaks_at = jnp.where(~trains & (rates > largest), rates, jnp.inf).min()
    any_trains = trains.any()
    return LearningRateRange(
        rates, losses, trains, jnp.where(any_trains, largest, jnp.nan), jnp.where(any_trains, breaks_at, jnp.nan)
    )
