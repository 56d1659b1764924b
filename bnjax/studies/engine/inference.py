"""Trained networks at inference: with running statistics, and with those of the training examples beside them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax import training
from bnjax.analysis import losses
from bnjax.linen import BatchRenorm, GhostBatchNorm, MovingBatchNorm
from bnjax.studies.data import Split
from bnjax.studies.engine.plan import Variant, compiler_options

POPULATION = "population_"
"""The beginning of the names of what was measured with statistics of the training examples."""
# What makes plain batch norm of others, which else give the layers after them other inputs than inference does.
_AS_BATCH_NORM = {
    BatchRenorm: {"r_max": 1.0, "d_max": 0.0},
    GhostBatchNorm: {"ghost_size": 2**30},
    MovingBatchNorm: {"momentum": 0.0},
}
_MOST = 10_000  # training examples that are evaluated


def with_population_statistics(network: Variant, states: Any, x: Any, *, has_own: bool = False) -> Any:
    """Returns states, which have a leading axis, with the statistics of examples in place of running averages.

    Each batch norm gets mean and variance of what it is given when all examples are one batch, without dropout, so that
    these are what inference normalizes by at every depth (Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 12). A network
    without statistics stays as it is. With `has_own` each state has examples of its own.
    """
    if not jax.tree.leaves(states.batch_stats):
        return states
    model = network.model
    model = model.clone(norm=_as_batch_norm(model.norm))

    def of_state(pair: Any) -> Any:
        variables, x = pair
        return losses.linen_batch_stats(model, variables, network.prepared(x))

    variables, x = states.variables, jnp.asarray(x)
    if has_own:
        found = _compiled(lambda variables, x: jax.lax.map(of_state, (variables, x)))(variables, x)
    else:
        found = _compiled(lambda variables, x: jax.lax.map(lambda v: of_state((v, x)), variables))(variables, x)
    return states.replace(batch_stats=found)


def _as_batch_norm(norm: Any) -> Any:
    """Returns a normalizer that normalizes in training as inference by the batch's statistics would."""
    return functools.partial(norm, **_AS_BATCH_NORM.get(getattr(norm, "func", norm), {}))


def evaluations(network: Variant, states: Any, split: Split, *, has_own: bool = False) -> training.Metrics:
    """Returns the mean loss and accuracy of each of several states on some examples, each `[states]`."""
    x, y = jax.tree.map(jnp.asarray, tuple(split))

    def of_state(state: Any, x: Any, y: Any) -> training.Metrics:
        found = training.evaluate(state, network.prepared(x), y, objective=network.objective)
        return jax.tree.map(jnp.mean, found)

    if has_own:
        found = _compiled(lambda states, x, y: jax.lax.map(lambda of: of_state(*of), (states, x, y)))(states, x, y)
    else:
        found = _compiled(lambda s, x, y: jax.lax.map(lambda state: of_state(state, x, y), s))(states, x, y)
    return jax.tree.map(np.asarray, found)


def at_inference(
    network: Variant, states: Any, train: Split, test: Split, *, has_own: bool = False
) -> dict[str, np.ndarray]:
    """Measures each of several states at inference, with running statistics and with those of the training examples.

    Returns:
      'train_accuracy', 'train_loss', 'test_accuracy', 'test_loss' and 'loss_gap', the test loss minus the training
      loss, which is what overfitting means in all studies; the same from 'population_' on.
    """
    axis = 1 if has_own else 0
    few = jax.tree.map(lambda values: values[(slice(None),) * axis + (slice(_MOST),)], train)
    population = with_population_statistics(network, states, train.x, has_own=has_own)
    metrics: dict[str, Any] = {}
    for prefix, of in (("", states), (POPULATION, population)):
        on = {
            name: evaluations(network, of, split, has_own=has_own) for name, split in (("train", few), ("test", test))
        }
        metrics |= {f"{prefix}{split}_{name}": v for split, m in on.items() for name, v in m._asdict().items()}
        metrics[f"{prefix}loss_gap"] = metrics[f"{prefix}test_loss"] - metrics[f"{prefix}train_loss"]
    return metrics


def _compiled(function: Any) -> Any:
    return jax.jit(function, compiler_options=compiler_options())
