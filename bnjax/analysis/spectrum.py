"""Estimates of a symmetric operator's spectrum from random vectors: trace, diagonal and density."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Checkpoints, Several, iterate
from bnjax.analysis._lanczos import Lanczos
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator


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


def trace(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    batch_size: int | None = None,
) -> TraceEstimate:
    """Estimates the trace of an operator by Hutchinson's estimator: the mean of `vᵀ A v` over random signs v.

    Args:
      operator: A.
      key: random key.
      num_samples: number of probes, each one product; static.
      batch_size: number of probes that are held, and computed at once by vmap; one after the other by default. An
        operator on the host reads its data once for so many (all by default). Static.

    Raises:
      ValueError: for no samples.

    References:
      Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix".

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> print(analysis.trace(a, key=jax.random.key(0), num_samples=4).estimate)
    8.0
    """
    check_count("num_samples", num_samples)

    def sample(v: Any, product: Any) -> Array:
        return _trees.dot(v, product)

    samples = _of_probes(operator, sample, key, num_samples, batch_size)
    return TraceEstimate(samples.mean(), _standard_error(samples), samples)


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
    batch_size: int | None = None,
) -> TraceEstimate:
    """Estimates the trace of the Hessian of a batch's loss, as `trace` does.

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
    operator = hessian_operator(loss_fn, params, *args)
    return trace(operator, key=key, num_samples=num_samples, batch_size=batch_size)


def diagonal(operator: SymmetricOperator, *, key: Key[Array, ""], num_samples: int) -> Any:
    """Estimates the diagonal of an operator: the mean of `v ∘ A v` over random signs v, one after the other.

    Args:
      operator: A.
      key: random key.
      num_samples: number of probes, each one product; static.

    Returns:
      A pytree like the parameters, exact where A is diagonal.

    Raises:
      ValueError: for no samples.

    References:
      Bekas, Kokiopoulou & Saad 2007, "An Estimator for the Diagonal of a Matrix".

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> print(analysis.diagonal(a, key=jax.random.key(0), num_samples=1))
    [1. 2. 5.]
    """
    check_count("num_samples", num_samples)
    keys = jax.random.split(key, num_samples)
    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), _trees.wide_shapes(operator.like))

    def add(total: Any, key: Array) -> tuple[Any, None]:
        v = _signs(key, operator.like)
        products = _trees.wide(operator.product(v))
        return jax.tree.map(lambda t, a, b: t + a.astype(t.dtype) * b, total, v, products), None

    if not operator.on_host:
        total = lax.scan(add, zeros, keys)[0]
    else:
        total = zeros
        for one in keys:
            total = add(total, one)[0]
    return jax.tree.map(lambda t, like: (t / num_samples).astype(like.dtype), total, operator.like)


def hessian_diagonal(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
) -> Any:
    """Estimates the diagonal of the Hessian of a batch's loss, as `diagonal` does.

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
    operator = hessian_operator(loss_fn, params, *args)
    return _trees.filled(diagonal(operator, key=key, num_samples=num_samples), params)


def spectral_density(
    operator: SymmetricOperator | LossFn,
    *args: Any,
    key: Key[Array, ""],
    num_probes: int,
    num_steps: int,
    bandwidth: float | None = None,
    num_points: int = 1024,
    checkpoints: Checkpoints | None = None,
) -> SpectralDensity:
    """Estimates the density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    Each probe runs Lanczos's method from a random vector; its Ritz values θ_i and the squared first components w_i of
    their vectors give `Σ_i w_i N(t; θ_i, bandwidth²)`, whose mean over probes estimates the density at t.

    Args:
      operator: A, of P parameters; or a loss `loss_fn(params, *args)`, for its Hessian.
      *args: `params` and further arguments of the loss, in place of an operator.
      key: random key.
      num_probes: number of random vectors; static.
      num_steps: products for each probe, 1 to P; static. As many vectors of the parameters' size are kept (of all
        probes, where the operator reads data on the host, once for each step).
      bandwidth: deviation of the Gaussian; by default 1 % of the range of the Ritz values.
      num_points: number of points of the grid, which reaches five deviations beyond the extreme Ritz values; static.
      checkpoints: where the state of an operator on the host is kept, as in `eigenpairs`.

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
    if not isinstance(operator, SymmetricOperator):
        operator = hessian_operator(operator, *args, method="linearized")
    for name, value in (("num_probes", num_probes), ("num_points", num_points)):
        check_count(name, value)
    if not 1 <= num_steps <= operator.size:
        raise ValueError(f"num_steps must be from 1 to the number of parameters, {operator.size}, got {num_steps}.")
    nodes, weights = quadratures(operator, num_probes, num_steps, key, checkpoints)
    low, high = nodes.min(), nodes.max()
    # Where all Ritz values are equal, up to rounding, there is no range, and 1 % of their size is taken.
    size = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), jnp.finfo(nodes.dtype).tiny * 1e6)
    scale = jnp.where(high - low > 1000 * jnp.finfo(nodes.dtype).eps * size, high - low, size)
    sigma = jnp.asarray(0.01 * scale if bandwidth is None else bandwidth, nodes.dtype)
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_points)
    bumps = jnp.exp(-0.5 * jnp.square((grid[None, :, None] - nodes[:, None, :]) / sigma))
    densities = (weights[:, None, :] * bumps).sum(-1) / (sigma * jnp.sqrt(2 * jnp.pi))
    return SpectralDensity(grid, densities.mean(0), _standard_error(densities), nodes, weights, sigma)


def quadratures(
    operator: SymmetricOperator, num_probes: int, num_steps: int, key: Array, checkpoints: Checkpoints | None = None
) -> tuple[Array, Array]:
    """Returns Ritz values of random vectors, and the squares of their vectors' components along these, for each."""
    method, like = Lanczos(num_steps), _trees.wide_shapes(operator.like)

    def start(key: Array) -> Any:
        vector_key, key = jax.random.split(key)
        return method.start(_trees.random_like(vector_key, like, jax.random.normal), key)

    keys = jax.random.split(key, num_probes)
    if operator.on_host:
        several = SymmetricOperator(operator.of_several, like, True)
        states = iterate(several, Several(method), jax.vmap(start)(keys), checkpoints)
        return jax.vmap(method.quadrature)(states)
    return lax.map(lambda key: method.quadrature(iterate(operator, method, start(key), checkpoints)), keys)


def _of_probes(
    operator: SymmetricOperator, function: Callable[[Any, Any], Any], key: Array, count: int, batch_size: int | None
) -> Any:
    """Returns `function(v, A v)` of random signs v, stacked."""
    keys = jax.random.split(key, count)
    if not operator.on_host:

        def of(key: Array) -> Any:
            v = _signs(key, operator.like)
            return function(v, operator.product(v))

        return lax.map(of, keys, batch_size=batch_size)
    found, most = [], batch_size or count
    for i in range(0, count, most):
        vectors = jax.vmap(lambda key: _signs(key, operator.like))(keys[i : i + most])
        found.append(jax.vmap(function)(vectors, operator.of_several(vectors)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _signs(key: Array, like: Any) -> Any:
    """Draws a random tree of +1 and −1."""
    return _trees.random_like(key, like, jax.random.rademacher)


def _standard_error(samples: Array) -> Array:
    """Computes the standard error of the mean over the first axis."""
    count = samples.shape[0]
    if count == 1:
        return jnp.full(samples.shape[1:], jnp.nan, samples.dtype)
    return samples.std(0, ddof=1) / jnp.sqrt(count)


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` for a count below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
