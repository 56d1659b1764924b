"""Histograms of weights and gradients over a training, and the recorded gradient of a step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnjax import training

_BINS = 40

Histograms = dict[str, tuple[np.ndarray, np.ndarray]]
"""'<weight|gradient>/<layer>/<parameter>' to counts `[times, bins]` and the range of the bins `[times, 2]`."""


def empty_histograms(params: Any, times: int) -> Histograms:
    """Makes empty histograms of some times in a training."""
    return {
        f"{kind}/{path}": (np.zeros((times, _BINS), np.int32), np.zeros((times, 2), np.float32))
        for kind in ("weight", "gradient")
        for path in sorted(by_path(params))
    }


def count_values(histograms: Histograms, time: int, leaves: Mapping[str, Any]) -> None:
    """Counts 'weight' and 'gradient' of the parameters at one time, in equal bins between the finite extremes."""
    for path, values in by_path(leaves).items():
        counts, edges = np.histogram(values[np.isfinite(values)], bins=_BINS)
        histograms[path][0][time], histograms[path][1][time] = counts, edges[[0, -1]]


def parameter_shapes(states: Any, leading: int) -> dict[str, dict[str, list[int]]]:
    """Returns collection ('params', 'batch_stats') to path to shape, without the leading axes (of seeds)."""
    return {
        name: {path: list(leaf.shape[leading:]) for path, leaf in by_path(tree).items()}
        for name in ("params", "batch_stats")
        if (tree := getattr(states, name, None))
    }


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts, by their path."""
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


_zeros: Any = functools.partial(jax.tree.map, jnp.zeros_like)
_RECORDER = optax.GradientTransformation(_zeros, lambda updates, state, params=None: (_zeros(updates), updates))


def watched(step: Callable[..., Any], state: training.TrainState, *inputs: Any) -> tuple[Any, Any]:
    """Returns the parameters, and the gradient of a step that is not taken: its optimizer only keeps it."""
    recorder = jax.tree.map(jnp.copy, state).replace(tx=_RECORDER, opt_state=_RECORDER.init(state.params))
    return state.params, step(recorder, *inputs)[0].opt_state
