"""Distributions of activations by layer: percentiles, saturation and dead units."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class ActivationStatistics(NamedTuple):
    """Statistics of the inputs of a layer's nonlinearity over a batch; scan or vmap add leading axes, as of time.

    Attributes:
      percentiles: percentiles of each unit's inputs over the batch (and space), `[percentiles, units]`.
      mean: mean of each unit's inputs, `[units]`.
      deviation: standard deviation of each unit's inputs, `[units]`.
      saturated: fraction of all inputs at which the nonlinearity's slope is small.
      dead: fraction of units whose slope is small at every input of the batch.
    """

    percentiles: Array
    mean: Array
    deviation: Array
    saturated: Array
    dead: Array


def activation_statistics(
    preactivations: Mapping[str, Any],
    activation: Callable[[Array], Array],
    *,
    percentiles: Sequence[float] = (15, 50, 85),
    min_slope: float = 0.05,
) -> dict[str, ActivationStatistics]:
    """Computes percentiles of the inputs of each layer's nonlinearity, and how many inputs lie where it is flat.

    An input h is saturated where `|activation'(h)| < min_slope`; a unit is dead (for a batch) if all its inputs are.
    With the default a sigmoid is saturated below 0.053 and above 0.947, tanh beyond ±0.975, and a ReLU where it is off.

    Args:
      preactivations: inputs of the nonlinearity by layer, arrays `[batch, …, units]`. For a linen model
        `bnjax.analysis.losses.layer_outputs` gives them.
      activation: elementwise function, such as `jax.nn.sigmoid`.
      percentiles: levels of the percentiles in percent, 0 to 100.
      min_slope: the slope below which an input is saturated.

    Returns:
      `ActivationStatistics` by layer.

    Raises:
      TypeError, ValueError: for an array without a batch and units, or that is not floating-point.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 4.1 and Figure 1 (b, c), for the percentiles; Glorot & Bengio
      2010, section 3, for saturation.

    >>> from bnjax import analysis
    >>> h = jnp.array([[-1.0, -2.0], [3.0, -4.0]])
    >>> found = analysis.activation_statistics({'Dense_0': h}, jax.nn.relu)['Dense_0']
    >>> print(found.percentiles[1], found.saturated, found.dead)
    [ 1. -3.] 0.75 0.5
    """
    levels = jnp.asarray(percentiles, jnp.float32)

    def of_layer(name: str, h: Array) -> ActivationStatistics:
        h = jnp.asarray(h)
        if h.ndim < 2 or h.size == 0 or not jnp.issubdtype(h.dtype, jnp.floating):
            raise ValueError(
                f"preactivations must be non-empty floating-point arrays [batch, …, units], got {h.dtype}"
                f"{list(h.shape)} for {name}."
            )
        h = h.reshape((-1, h.shape[-1])).astype(jnp.promote_types(h.dtype, jnp.float32))
        slope = jax.jvp(activation, (h,), (jnp.ones_like(h),))[1]
        flat = jnp.abs(slope) < min_slope
        quantiles = jnp.percentile(h, levels.astype(h.dtype), axis=0)
        known = jnp.where(jnp.isnan(slope).any(), jnp.nan, 1)  # NaN makes the fractions unknown
        return ActivationStatistics(quantiles, h.mean(0), h.std(0), known * flat.mean(), known * flat.all(0).mean())

    return {name: of_layer(name, h) for name, h in preactivations.items()}
