"""Estimates of the Hessian's spectrum from random vectors: trace, diagonal and density."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._lanczos import quadrature
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import product_with


class TraceEstimate(NamedTuple):
    """A trace estimated from random probes.

    Attributes:
      estimate: the mean over the probes.
      standard_error: standard error of the mean; NaN for one probe.
      samples: estimates of each probe, `[num_samples]`.
    """

    estimate: Array
    standard_error: Array
    samples: Array


class SpectralDensity(NamedTuple):
    """The density of a Hessian's eigenvalues.

    Attributes:
      grid: eigenvalues at which the density is given, `[num_points]`.
      density: mean over the probes; its integral is 1, `[num_points]`.
      standard_error: standard error of `density`, `[num_points]`; NaN for one probe. `density ± 2 standard_error` is a
        band.
      nodes: Ritz values of each probe, `[num_probes, num_steps]`.
      weights: weights of the nodes, which sum to 1 for each probe: `Σ weights · f(nodes)` estimates tr f(H) / P.
      bandwidth: deviation of the Gaussian that stands for each node.
    """

    grid: Array
    density: Array
    standard_error: Array
    nodes: Array
    weights: Array
    bandwidth: Array


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
    batch_size: int | None = None,
) -> TraceEstimate:
    """Estimates the trace of the loss's Hessian by Hutchinson's estimator: the mean of `vᵀ H v` over random signs v.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      key: random key.
      num_samples: number of probes, each one Hessian product; static.
      batch_size: number of probes computed at once by vmap; one after the other by default. Static.

    Raises:
      TypeError, ValueError: for bad parameters or a loss that is no real scalar (as `hessian_product`), or no samples.

    References:
      Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix".

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> print(analysis.hessian_trace(loss, jnp.ones(3), key=jax.random.key(0), num_samples=4).estimate)
    8.0
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    _check_count("num_samples", num_samples)
    product = product_with(loss_fn, free, args)

    def sample(key):
        v = _signs(key, free)
        return _trees.dot(v, product(v))

    samples = lax.map(sample, jax.random.split(key, num_samples), batch_size=batch_size)
    return TraceEstimate(samples.mean(), _standard_error(samples), samples)


def hessian_diagonal(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
) -> Any:
    """Estimates the diagonal of the loss's Hessian: the mean of `v ∘ H v` over random signs v, one after the other.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      key: random key.
      num_samples: number of probes, each one Hessian product; static.

    Returns:
      A pytree like `params`, exact where the Hessian is diagonal; zeros for leaves that are not floating-point.

    Raises:
      TypeError, ValueError: as `hessian_trace` does.

    References:
      Bekas, Kokiopoulou & Saad 2007, "An Estimator for the Diagonal of a Matrix".

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> print(analysis.hessian_diagonal(loss, jnp.ones(3), key=jax.random.key(0), num_samples=1))
    [1. 2. 5.]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    _check_count("num_samples", num_samples)
    product = product_with(loss_fn, free, args)

    def add(total, key):
        v = _signs(key, free)
        return jax.tree.map(lambda t, a, b: t + a * b.astype(t.dtype), total, v, product(v)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), free)
    total = lax.scan(add, zeros, jax.random.split(key, num_samples))[0]
    return _trees.filled(jax.tree.map(lambda t, p: (t / num_samples).astype(p.dtype), total, free), params)


def spectral_density(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_probes: int,
    num_steps: int,
    bandwidth: float | None = None,
    num_points: int = 1024,
) -> SpectralDensity:
    """Estimates the density of the eigenvalues of the loss's Hessian, by stochastic Lanczos quadrature.

    Each probe runs Lanczos's method from a random vector; its Ritz values θ_i and the squared first components w_i of
    their vectors give `Σ_i w_i N(t; θ_i, bandwidth²)`, whose mean over probes estimates the density at t.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays with P numbers; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      key: random key.
      num_probes: number of random vectors; static.
      num_steps: Hessian products for each probe, 1 to P; static. As many vectors of the parameters' size are kept.
      bandwidth: deviation of the Gaussian; by default 1 % of the range of the Ritz values.
      num_points: number of points of the grid, which reaches five deviations beyond the extreme Ritz values; static.

    Raises:
      TypeError, ValueError: for bad parameters or a loss that is no real scalar (as `hessian_product`), or counts out
        of range.

    References:
      Ghorbani, Krishnan & Xiao 2019 (arXiv 1901.10159), Algorithm 1; Golub & Meurant 2010.

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> found = analysis.spectral_density(loss, jnp.ones(3), key=jax.random.key(0), num_probes=2, num_steps=3)
    >>> print(found.nodes[0].round(3))
    [1. 2. 5.]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(free))
    for name, value in (("num_probes", num_probes), ("num_points", num_points)):
        _check_count(name, value)
    if not 1 <= num_steps <= size:
        raise ValueError(f"num_steps must be from 1 to the number of parameters, {size}, got {num_steps}.")
    product = product_with(loss_fn, free, args)
    keys = jax.random.split(key, num_probes)
    nodes, weights = lax.map(lambda key: quadrature(product, free, num_steps, key), keys)
    low, high = nodes.min(), nodes.max()
    # Where all Ritz values are equal, up to rounding, there is no range, and 1 % of their size is taken.
    size = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), jnp.finfo(nodes.dtype).tiny * 1e6)
    scale = jnp.where(high - low > 1000 * jnp.finfo(nodes.dtype).eps * size, high - low, size)
    sigma = jnp.asarray(0.01 * scale if bandwidth is None else bandwidth, nodes.dtype)
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_points)
    bumps = jnp.exp(-0.5 * jnp.square((grid[None, :, None] - nodes[:, None, :]) / sigma))
    densities = (weights[:, None, :] * bumps).sum(-1) / (sigma * jnp.sqrt(2 * jnp.pi))
    return SpectralDensity(grid, densities.mean(0), _standard_error(densities), nodes, weights, sigma)


def _signs(key: Array, like: Any) -> Any:
    """Draws a random tree of +1 and −1."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def _standard_error(samples: Array) -> Array:
    """Computes the standard error of the mean over the first axis."""
    count = samples.shape[0]
    if count == 1:
        return jnp.full(samples.shape[1:], jnp.nan, samples.dtype)
    return samples.std(0, ddof=1) / jnp.sqrt(count)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
