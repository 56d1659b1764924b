"""Batch norm written from its definition, for any axes, with weights: what the tests compare with, in float64."""

import jax.numpy as jnp
import numpy as np


def moments(x, axes, weights=None):
    """Mean, variance (feature axes only, ascending) and count; `weights` has as many dimensions as x."""
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    w = jnp.ones(x.shape, x.dtype) if weights is None else jnp.broadcast_to(weights.astype(x.dtype), x.shape)
    x = jnp.where(w > 0, x, 0)
    n = w.sum(reduced, keepdims=True)
    mean = (w * x).sum(reduced, keepdims=True) / n
    var = (w * (x - mean) ** 2).sum(reduced, keepdims=True) / n
    return mean, var, n


def batch_norm(x, params, axes, epsilon=1e-5, weights=None, statistics=None):
    """Output, mean and variance."""
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    mean, var, _ = moments(x, axes, weights) if statistics is None else (*statistics, None)
    y = (x - mean) / jnp.sqrt(var + epsilon)
    if "scale" in params:
        y = y * jnp.expand_dims(params["scale"], reduced)
    if "bias" in params:
        y = y + jnp.expand_dims(params["bias"], reduced)
    return y, mean.squeeze(reduced), var.squeeze(reduced)


def exact_moments(x, axis=0):
    """Mean and variance of float values in extended precision."""
    x = np.asarray(x, np.longdouble)
    mean = x.mean(axis, keepdims=True)
    return np.squeeze(mean, axis), np.mean((x - mean) ** 2, axis=axis)
