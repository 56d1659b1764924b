"""Estimates of a symmetric operator's trace and diagonal from random vectors, with intervals."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._lanczos import combined, orthonormal
from bnjax.analysis._sketch import (
    error_of_exchangeable,
    left_out,
    matmul,
    mean_of,
    others_than,
    products_of,
    root_of_variance,
    sketch,
    standard_error,
)
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator

_METHODS = {"hutchinson": 1, "hutch++": 6, "xtrace": 4}  # and their fewest products
_OF_DIAGONAL = {"hutchinson": 1, "xdiag": 4}
_LEVEL = 0.95


class TraceEstimate(NamedTuple):
    """A trace estimated from random vectors.

    Attributes:
      estimate: the mean of the samples.
      standard_error: standard error of the estimate; NaN for one sample.
      samples: estimates of each random vector, `[n]`, where only Hutchinson's are independent of each other.
      low: lower end of the 95 % interval by Student's t with n − 1 degrees of freedom.
      high: upper end.
    """

    estimate: Array
    standard_error: Array
    samples: Array
    low: Array
    high: Array


class DiagonalEstimate(NamedTuple):
    """A diagonal estimated from random vectors; each a pytree like the parameters.

    Attributes:
      estimate: the mean of the samples, in the precision of the parameters.
      standard_error: standard error of the estimate, in float32 at least; NaN for one sample.
      low: lower end of the 95 % interval of each element by Student's t.
      high: upper end.
    """

    estimate: Any
    standard_error: Any
    low: Any
    high: Any


def trace(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    method: str = "hutchinson",
    batch_size: int | None = None,
) -> TraceEstimate:
    """Estimates the trace of an operator from products with random vectors, without bias.

    Args:
      operator: A, of P parameters.
      key: random key.
      num_samples: number of products; static.
      method: 'hutchinson', the mean of `vᵀ A v` over random signs v, which needs no memory; 'hutch++', which takes the
        trace in the space Q of a third of the products exactly, and estimates that of `(I − QQᵀ) A (I − QQᵀ)` from
        another third; 'xtrace', which does so with the space of half of the products but one, and the vector left out
        as the sample, and averages over all. Where A has some eigenvalues much larger than the rest the latter need far
        fewer products for the same error, where it has none somewhat more. They keep `num_samples` vectors; static.
      batch_size: number of Hutchinson's vectors that are held, and whose products are computed at once by vmap; one
        after the other by default. An operator on the host reads its data once for so many (all by default). Static.

    Returns:
      `TraceEstimate`. The samples of XTrace share their spaces, by which their own spread is too small, and what
      leaving one out changes is too large an error. By the Cauchy–Schwarz inequality the geometric mean of the two
      standard errors is none too small; it is the one given.

    Raises:
      ValueError: for an unknown method, too few products for it, or more than the parameters allow.

    References:
      Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix"; Meyer, Musco, Musco & Woodruff
      2021 (arXiv 2010.09649), Algorithm 1; Epperly, Tropp & Webber 2024 (arXiv 2301.07825); Efron & Stein 1981, "The
      Jackknife Estimate of Variance".

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> print(analysis.trace(a, key=jax.random.key(0), num_samples=4).estimate)
    8.0
    """
    check_count("num_samples", num_samples)
    _check_method(method, _METHODS, num_samples)
    if method == "hutchinson":
        return estimate(of_signs(operator, _trees.dot, num_samples, key, batch_size))
    _check_size(operator, num_samples)
    draw_key, rest_key = jax.random.split(key)
    if method == "xtrace":
        return _xtrace(operator, num_samples // 2, draw_key, rest_key)
    count = num_samples // 3
    products = products_of(operator, _signs_of(operator, jax.random.split(draw_key, count)))
    basis, _ = orthonormal(_trees.in_units(products, _trees.unit_of(products)), draw_key)
    signs = _signs_of(operator, jax.random.split(rest_key, num_samples - 2 * count))
    rest = jax.tree.map(jnp.subtract, signs, combined(_trees.inner(basis, signs), basis))
    in_space = _trees.row_products(basis, products_of(operator, basis)).sum()
    samples = in_space + _trees.row_products(rest, products_of(operator, rest))
    return estimate(samples)


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
    method: str = "hutchinson",
    batch_size: int | None = None,
) -> TraceEstimate:
    """Estimates the trace of the Hessian of a batch's loss, as `trace` does.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      key: random key.
      num_samples: number of Hessian products; static.
      method: estimator, as in `trace`; static.
      batch_size: number of probes computed at once, as in `trace`. Static.

    Raises:
      TypeError, ValueError: for bad parameters or a loss that is no real scalar (as `hessian_product`), and as `trace`
        does.

    References:
      Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix".

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> print(analysis.hessian_trace(loss, jnp.ones(3), key=jax.random.key(0), num_samples=4).estimate)
    8.0
    """
    operator = hessian_operator(loss_fn, params, *args)
    return trace(operator, key=key, num_samples=num_samples, method=method, batch_size=batch_size)


def diagonal(
    operator: SymmetricOperator, *, key: Key[Array, ""], num_samples: int, method: str = "hutchinson"
) -> DiagonalEstimate:
    """Estimates the diagonal of an operator from products with random signs, without bias.

    Args:
      operator: A, of P parameters.
      key: random key.
      num_samples: number of products; static.
      method: 'hutchinson', the mean of `v ∘ A v`, one after the other; or 'xdiag', which takes the diagonal of `QQᵀ A`
        exactly, Q being the space of half of the products but one, that of the rest with the vector left out, and
        averages over all. It needs fewer products where A has some eigenvalues much larger than the rest, and keeps
        `num_samples` vectors; static.

    Returns:
      `DiagonalEstimate`, exact where A is diagonal; XDiag's standard error is as XTrace's, see `trace`.

    Raises:
      ValueError: for an unknown method, too few products for it, or more than the parameters allow.

    References:
      Bekas, Kokiopoulou & Saad 2007, "An Estimator for the Diagonal of a Matrix"; Epperly, Tropp & Webber 2024 (arXiv
      2301.07825).

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> print(analysis.diagonal(a, key=jax.random.key(0), num_samples=1).estimate)
    [1. 2. 5.]
    """
    check_count("num_samples", num_samples)
    _check_method(method, _OF_DIAGONAL, num_samples)
    if method == "xdiag":
        _check_size(operator, num_samples)
        return _xdiag(operator, num_samples // 2, key)
    keys = jax.random.split(key, num_samples)
    zeros = jax.tree.map(jnp.zeros_like, _trees.wide_shapes(operator.like))

    def add(carry: tuple[Any, Any, Array], key: Array) -> tuple[tuple[Any, Any, Array], None]:
        mean, square, count = carry
        v = _signs(key, operator.like)
        sample = jax.tree.map(lambda v, p: v.astype(p.dtype) * p, v, _trees.wide(operator.product(v)))
        count = count + 1
        moved = jax.tree.map(lambda m, x: m + (x - m) / count.astype(m.dtype), mean, sample)
        square = jax.tree.map(lambda s, x, old, new: s + (x - old) * (x - new), square, sample, mean, moved)
        return (moved, square, count), None

    carry = zeros, zeros, jnp.zeros((), jnp.int32)
    if operator.on_host:
        for one in keys:
            carry = add(carry, one)[0]
    else:
        carry = lax.scan(add, carry, keys)[0]
    mean, square, _ = carry
    error = jax.tree.map(lambda s: root_of_variance(s, num_samples), square)
    return _of_diagonal(mean, error, num_samples, operator.like)


def hessian_diagonal(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    key: Key[Array, ""],
    num_samples: int,
) -> Any:
    """Estimates the diagonal of the Hessian of a batch's loss by Hutchinson's estimator, as `diagonal` does.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      key: random key.
      num_samples: number of probes, each one Hessian product; static.

    Returns:
      The estimate alone, a pytree like `params`, exact where the Hessian is diagonal; zeros for leaves that are not
      floating-point.

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
    return _trees.filled(diagonal(operator, key=key, num_samples=num_samples).estimate, params)


def _xtrace(operator: SymmetricOperator, count: int, draw_key: Array, key: Array) -> TraceEstimate:
    like = _trees.wide_shapes(operator.like)
    vectors = jax.vmap(lambda key: _trees.random_like(key, like, jax.random.normal))(jax.random.split(draw_key, count))
    length = jnp.sqrt(operator.size / _trees.row_products(vectors, vectors))
    vectors = jax.tree.map(lambda v: v * _trees.leading(length, v.ndim).astype(v.dtype), vectors)
    found = sketch(operator, vectors, key)

    def samples_of(triangle: Array, inner: Array, along: Array, products: Array, squares: Array) -> Array:
        lost = left_out(triangle)
        kept = along - lost * (lost * along).sum(0, keepdims=True)
        rest = (along * triangle).sum(0) - 2 * (products * kept).sum(0) + (kept * matmul(inner, kept)).sum(0)
        scale = (operator.size - len(triangle) + 1) / (squares - jnp.square(kept).sum(0))
        return jnp.trace(inner) - (lost * matmul(inner, lost)).sum(0) + scale * rest

    def mean_without(i: Array) -> Array:
        others = others_than(i, count)
        rotation, triangle = jnp.linalg.qr(found.triangle[:, others])
        inner = matmul(rotation.T, matmul(found.inner, rotation))
        along, products = (matmul(rotation.T, v[:, others]) for v in (found.vectors, found.products))
        return samples_of(triangle, inner, along, products, found.squares[others]).mean()

    samples = samples_of(found.triangle, found.inner, found.vectors, found.products, found.squares)
    error = error_of_exchangeable(samples, lax.map(mean_without, jnp.arange(count)))
    return estimate(samples * found.unit, error * found.unit)


def _xdiag(operator: SymmetricOperator, count: int, key: Array) -> DiagonalEstimate:
    vectors = _signs_of(operator, jax.random.split(key, count))
    found = sketch(operator, vectors, key)

    def samples_of(triangle: Array, basis: Any, of_basis: Any, vectors: Any) -> Any:
        lost = left_out(triangle)
        factors = (lost * triangle).sum(0)

        def of_leaf(q: Array, z: Array, lost: Array, of_lost: Array, v: Array) -> Array:
            factor = _trees.leading(factors, v.ndim).astype(v.dtype)
            return (q * z).sum(0, keepdims=True) + lost * (factor * v - of_lost)

        return jax.tree.map(of_leaf, basis, of_basis, combined(lost, basis), combined(lost, of_basis), vectors)

    def mean_without(i: Array) -> Any:
        others = others_than(i, count)
        rotation, triangle = jnp.linalg.qr(found.triangle[:, others])
        rotated = combined(rotation, found.basis), combined(rotation, found.of_basis)
        return mean_of(samples_of(triangle, *rotated, jax.tree.map(lambda v: v[others], vectors)))

    samples = samples_of(found.triangle, found.basis, found.of_basis, vectors)
    error = jax.tree.map(error_of_exchangeable, samples, lax.map(mean_without, jnp.arange(count)))
    mean, error = (jax.tree.map(lambda v: v * found.unit.astype(v.dtype), tree) for tree in (mean_of(samples), error))
    return _of_diagonal(mean, error, count, operator.like)


def of_signs(
    operator: SymmetricOperator,
    function: Callable[[Any, Any], Array],
    count: int,
    key: Array,
    batch_size: int | None = None,
) -> Array:
    """Returns `function(v, A v)` of random signs v, stacked."""
    keys = jax.random.split(key, count)
    if not operator.on_host:

        def sample(key: Array) -> Array:
            v = _signs(key, operator.like)
            return function(_trees.wide(v), _trees.wide(operator.product(v)))

        return lax.map(sample, keys, batch_size=batch_size)
    found, most = [], batch_size or count
    for i in range(0, count, most):
        vectors = _signs_of(operator, keys[i : i + most])
        found.append(jax.vmap(function)(vectors, products_of(operator, vectors)))
    return jnp.concatenate(found)


def _signs(key: Array, like: Any) -> Any:
    """Draws a random tree of +1 and −1."""
    return _trees.random_like(key, like, jax.random.rademacher)


def _signs_of(operator: SymmetricOperator, keys: Array) -> Any:
    return _trees.wide(jax.vmap(lambda key: _signs(key, operator.like))(keys))


def estimate(samples: Array, error: Array | None = None) -> TraceEstimate:
    """Returns the mean of samples and its interval, by their own standard error unless another is given."""
    unit = _trees.unit_of(samples)  # since a sum of samples may overflow
    mean = (samples / unit).mean() * unit
    error = standard_error(samples / unit) * unit if error is None else error
    half = quantile(len(samples)) * error
    return TraceEstimate(mean, error, samples, mean - half, mean + half)


def _of_diagonal(mean: Any, error: Any, count: int, like: Any) -> DiagonalEstimate:
    low, high = (jax.tree.map(lambda m, e, sign=sign: m + sign * quantile(count) * e, mean, error) for sign in (-1, 1))
    return DiagonalEstimate(jax.tree.map(lambda m, v: m.astype(v.dtype), mean, like), error, low, high)


def quantile(count: int) -> float:
    """Returns Student's t for the 95 % interval of the mean of so many samples; NaN for one."""
    from scipy.special import stdtrit  # which an import of JAX leaves out

    return float(stdtrit(count - 1, 0.5 + _LEVEL / 2)) if count > 1 else math.nan


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` for a count below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_method(method: str, fewest: dict[str, int], count: int) -> None:
    if method not in fewest:
        raise ValueError(f"method must be one of {', '.join(fewest)}, got {method!r}.")
    if count < fewest[method]:
        raise ValueError(f"num_samples must be at least {fewest[method]} for method {method!r}, got {count}.")


def _check_size(operator: SymmetricOperator, count: int) -> None:
    if count // 2 >= operator.size:
        raise ValueError(
            f"num_samples must be less than twice the number of parameters, {operator.size}, got {count}; products "
            "with the unit vectors give the whole matrix."
        )
