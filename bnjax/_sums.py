"""Sums over all but the feature axes of an array, plain and weighted, and the counts that belong to them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax._checks import Shape
from bnjax._sync import match_explicit_sharding


def expand(features: jax.Array, ndim: int, axes: tuple[int, ...]) -> jax.Array:
    """Puts back the reduced axes, with size one, so that per-feature values broadcast against the input."""
    return features if features.ndim == 0 else jnp.expand_dims(features, tuple(a for a in range(ndim) if a not in axes))


def reduced_axes(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns all but the feature axes."""
    return tuple(a for a in range(x.ndim) if a not in axes)


def sum_of(values: Array, axes: tuple[int, ...]) -> Array:
    """Sums over all but the feature axes."""
    return values.sum(reduced_axes(values, axes))


def reduced_size(shape: Shape, axes: tuple[int, ...]) -> Any:
    """Returns the number of elements of each feature."""
    return math.prod(size for a, size in enumerate(shape) if a not in axes)


def has_weight(weights: Array) -> Array:
    """Returns where the weights are positive."""
    return weights if weights.dtype == bool else weights > 0


def without_masked_extremes(x: Array, weights: Array) -> Array:
    """Returns `x` with zero where the weight is zero and `x` is NaN, or so large that its square overflows.

    Such values would turn zero cotangents into NaN; other masked values are normalized like the rest, as in Flax.
    """
    weights = match_explicit_sharding(weights, x)
    return jnp.where(has_weight(weights) | (jnp.abs(x) < math.sqrt(jnp.finfo(x.dtype).max)), x, 0)


def weigh(values: Array, weights: Array | None) -> Array:
    """Returns `weights · values`, and zero where the weight is zero, whatever the value is there."""
    if weights is None:
        return values
    weights = match_explicit_sharding(weights, values)
    kept = jnp.where(has_weight(weights), values, 0)
    return kept if weights.dtype == bool else kept * weights.astype(values.dtype)


def of_size_one(
    weights: Array | None, dtype: Any, shape: Shape, axes: tuple[int, ...]
) -> tuple[Array | None, Array, Array | None]:
    """Returns weights of at most three, so that no product over- or underflows, their sum, and the power of two left.

    The sum is that of each feature, as a scalar where the weights are common to all. Without weights each is one.
    """
    if weights is None:
        return None, jnp.asarray(reduced_size(shape, axes), dtype), None
    unit = None
    if weights.dtype != bool:
        reduced = reduced_axes(weights, axes)
        largest = weights.astype(dtype).max(reduced, keepdims=True, initial=0)
        bits = jnp.finfo(dtype)
        of_all = lax.reduce_precision(jnp.maximum(largest / 2, bits.tiny), bits.nexp, 0)
        weights, unit = weights.astype(dtype) / of_all, of_features(of_all.squeeze(reduced), shape, axes)
    return weights, count_of(weights.astype(dtype), shape, axes), unit


def count_of(weights: Array, shape: Shape, axes: tuple[int, ...]) -> Array:
    """Computes the total weight of each feature, as a scalar where the weights are common to all features."""
    total = sum_of(weights, axes) * jnp.asarray(repeats(weights.shape, shape, axes), weights.dtype)
    return of_features(total, shape, axes)


def repeats(of_weights: Shape, shape: Shape, axes: tuple[int, ...]) -> Any:
    """Returns for how many elements of a feature each weight stands, whose array broadcasts to `shape`."""
    return math.prod(s for a, (s, w) in enumerate(zip(shape, of_weights, strict=True)) if a not in axes and w == 1)


def of_features(values: Array, shape: Shape, axes: tuple[int, ...]) -> Array:
    """Returns values of the features, as a scalar where they are common to all."""
    is_common = all(size == 1 for size in values.shape)
    return values.reshape(()) if is_common else jnp.broadcast_to(values, tuple(shape[a] for a in axes))
