"""The density of a symmetric operator's eigenvalues, and what follows from it: log-determinant and norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Checkpoints, Kept, Several, iterate, kept_in
from bnjax.analysis._lanczos import Lanczos
from bnjax.analysis._sketch import standard_error
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.traces import TraceEstimate, check_count, estimate, over_signs, quantile

_AROUND = 33  # points of the grid within eight deviations of each node, where the density is as good as zero


class SpectralDensity(NamedTuple):
    """The density of a Hessian's eigenvalues.

    Attributes:
      grid: eigenvalues at which the density is given, in increasing order: evenly spaced ones, and some about each
        node, as close as the bandwidth asks, `[points]`.
      density: mean over the probes, `[points]`; its integral by the trapezoid rule is 1 within 0.01.
      standard_error: standard error of `density`, `[points]`; NaN for one probe.
      nodes: Ritz values of each probe, `[num_probes, num_steps]`.
      weights: weights of the nodes, which sum to 1 for each probe: `Σ weights · f(nodes)` estimates tr f(H) / P.
      bandwidth: deviation of the Gaussian that stands for each node.
      low: lower end of the 95 % interval at each point, by Student's t over the probes, `[points]`; at least 0.
      high: upper end.
    """

    grid: Array
    density: Array
    standard_error: Array
    nodes: Array
    weights: Array
    bandwidth: Array
    low: Array
    high: Array


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
      num_points: number of evenly spaced points of the grid, which reaches five deviations beyond the extreme Ritz
        values; static.
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
    _check_counts(operator, num_probes, num_steps)
    check_count("num_points", num_points)
    if isinstance(bandwidth, int | float) and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
    kept = kept_in(checkpoints, operator, "quadrature", num_probes, num_steps, key)
    nodes, weights = quadratures(operator, num_probes, num_steps, key, kept)
    low, high = nodes.min(), nodes.max()
    # Where all Ritz values are equal, up to rounding, there is no range, and 1 % of their size is taken.
    size = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), jnp.finfo(nodes.dtype).tiny * 1e6)
    scale = jnp.where(high - low > 1000 * jnp.finfo(nodes.dtype).eps * size, high - low, size)
    sigma = jnp.asarray(0.01 * scale if bandwidth is None else bandwidth, nodes.dtype)
    even = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_points)
    around = nodes[..., None] + sigma * jnp.linspace(-8, 8, _AROUND, dtype=nodes.dtype)[None, None]
    grid = jnp.sort(jnp.concatenate([even, around.ravel()]))

    def of_probe(nodes: Array, weights: Array) -> Array:
        bumps = jnp.exp(-0.5 * jnp.square((grid[:, None] - nodes[None]) / sigma))
        return (weights[None] * bumps).sum(-1) / (sigma * jnp.sqrt(2 * jnp.pi))

    densities = lax.map(lambda probe: of_probe(*probe), (nodes, weights))
    mean, error = densities.mean(0), standard_error(densities)
    half = quantile(num_probes) * error
    return SpectralDensity(grid, mean, error, nodes, weights, sigma, jnp.maximum(mean - half, 0), mean + half)


def log_determinant(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_probes: int,
    num_steps: int,
    damping: float = 0.0,
    checkpoints: Checkpoints | None = None,
) -> TraceEstimate:
    """Estimates `log det(A + damping I) = tr log(A + damping I)`, by stochastic Lanczos quadrature.

    Args:
      operator: A, of P parameters; with the damping it must be positive definite.
      key: random key.
      num_probes: number of random vectors; static.
      num_steps: products for each probe, 1 to P, as in `spectral_density`; static.
      damping: number that is added to all eigenvalues.
      checkpoints: where the state of an operator on the host is kept, as in `eigenpairs`.

    Returns:
      `TraceEstimate`, whose interval is about the probes, not about what too few steps leave; NaN where a Ritz value
      shows that the matrix is not positive definite.

    Raises:
      ValueError: for counts out of range.

    References:
      Ubaru, Chen & Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature".

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: 2 * v, jnp.zeros(4))
    >>> print(analysis.log_determinant(a, key=jax.random.key(0), num_probes=2, num_steps=1).estimate.round(4))
    2.7726
    """
    _check_counts(operator, num_probes, num_steps)
    kept = kept_in(checkpoints, operator, "quadrature", num_probes, num_steps, key)
    nodes, weights = quadratures(operator, num_probes, num_steps, key, kept)
    logarithms = jnp.log(jnp.where(nodes + damping > 0, nodes + damping, jnp.nan))
    return estimate(operator.size * (weights * logarithms).sum(1))


def frobenius_norm(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    batch_size: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> TraceEstimate:
    """Estimates `‖A‖_F`, the root of the sum of the squared eigenvalues, by the mean of `‖A v‖²` over random signs v.

    (The spectral norm is the eigenvalue of `eigenpairs(…, which='magnitude')`.)

    Args:
      operator: A.
      key: random key.
      num_samples: number of products; static.
      batch_size: number of vectors at once, as in `trace`. Static.
      checkpoints: where the state of an operator on the host is kept, as in `trace`.

    Returns:
      `TraceEstimate` of the norm: its samples are `‖A v‖`, and its interval is the root of that of the mean square.

    Raises:
      ValueError: for no samples.

    References:
      Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix", of A².

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([3.0, 4.0]) * v, jnp.zeros(2))
    >>> print(analysis.frobenius_norm(a, key=jax.random.key(0), num_samples=3).estimate)
    5.0
    """
    check_count("num_samples", num_samples)
    kept = kept_in(checkpoints, operator, "norm", num_samples, batch_size, key)
    norms = over_signs(operator, lambda v, product: _trees.norm(product), num_samples, key, batch_size, kept)
    unit = _trees.unit_of(norms)
    squares = estimate(jnp.square(norms / unit))
    root = jnp.sqrt(squares.estimate)
    ends = (jnp.sqrt(jnp.maximum(end, 0)) * unit for end in (squares.low, squares.high))
    return TraceEstimate(root * unit, squares.standard_error / (2 * root) * unit, norms, *ends)


def _check_counts(operator: SymmetricOperator, num_probes: int, num_steps: int) -> None:
    check_count("num_probes", num_probes)
    if not 1 <= num_steps <= operator.size:
        raise ValueError(f"num_steps must be from 1 to the number of parameters, {operator.size}, got {num_steps}.")


def quadratures(
    operator: SymmetricOperator, num_probes: int, num_steps: int, key: Array, kept: Kept | None = None
) -> tuple[Array, Array]:
    """Returns Ritz values of random vectors, and the squares of their vectors' components along these, for each."""
    method, like = Lanczos(num_steps), _trees.wide_shapes(operator.like)

    def start(key: Array) -> Any:
        vector_key, key = jax.random.split(key)
        return method.start(_trees.random_like(vector_key, like, jax.random.normal), key)

    keys = jax.random.split(key, num_probes)
    if operator.on_host:
        several = SymmetricOperator(operator.of_several, like, True)
        states = iterate(several, Several(method), jax.vmap(start)(keys), kept)
        return jax.vmap(method.quadrature)(states)
    return lax.map(lambda key: method.quadrature(iterate(operator, method, start(key))), keys)
