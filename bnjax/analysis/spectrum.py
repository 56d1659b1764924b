"""The density of a symmetric operator's eigenvalues, from random vectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Checkpoints, Several, iterate
from bnjax.analysis._lanczos import Lanczos
from bnjax.analysis._sketch import standard_error
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.traces import check_count


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
    if isinstance(bandwidth, int | float) and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
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
    return SpectralDensity(grid, densities.mean(0), standard_error(densities), nodes, weights, sigma)


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
