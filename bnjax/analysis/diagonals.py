"""Estimates of a symmetric operator's diagonal from random vectors, with intervals."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Checkpoints, Kept, in_passes, kept_in
from bnjax.analysis._lanczos import combined
from bnjax.analysis._sketch import (
    error_of_exchangeable,
    left_out,
    mean_of,
    others_than,
    products_of,
    root_of_variance,
    sketch,
)
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.traces import check_count, check_method, check_size, parts_of, quantile, random_signs, several_signs

_METHODS = {"hutchinson": 1, "xdiag": 4}  # and their fewest products


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


def diagonal(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    method: str = "hutchinson",
    batch_size: int | None = None,
    checkpoints: Checkpoints | None = None,
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
      batch_size: number of Hutchinson's vectors for which an operator on the host reads its data once, as in `trace`.
      checkpoints: where the state of an operator on the host is kept after each pass over its data, as in `eigenpairs`.

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
    check_method(method, _METHODS, num_samples)
    kept = kept_in(checkpoints, operator, "diagonal", method, num_samples, batch_size, key)
    if method == "xdiag":
        check_size(operator, num_samples)
        return _xdiag(operator, num_samples // 2, key, kept)
    keys = jax.random.split(key, num_samples)
    zeros = jax.tree.map(jnp.zeros_like, _trees.wide_shapes(operator.like))

    def add(carry: tuple[Any, Any, Array], pair: tuple[Any, Any]) -> tuple[tuple[Any, Any, Array], None]:
        mean, square, count = carry
        sample = jax.tree.map(lambda v, p: v.astype(p.dtype) * p, *pair)
        count = count + 1
        moved = jax.tree.map(lambda m, x: m + (x - m) / count.astype(m.dtype), mean, sample)
        square = jax.tree.map(lambda s, x, old, new: s + (x - old) * (x - new), square, sample, mean, moved)
        return (moved, square, count), None

    def one(carry: Any, key: Array) -> tuple[Any, None]:
        v = random_signs(key, operator.like)
        return add(carry, (v, _trees.wide(operator.product(v))))

    def several(keys: Array, carry: Any) -> Any:
        vectors = several_signs(operator, keys)
        return lax.scan(add, carry, (vectors, products_of(operator, vectors)))[0]

    carry = zeros, zeros, jnp.zeros((), jnp.int32)
    if operator.on_host:
        passes = [functools.partial(several, part) for _, part in parts_of(keys, batch_size)]
        carry = in_passes(passes, carry, kept)
    else:
        carry = lax.scan(one, carry, keys)[0]
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


def _xdiag(operator: SymmetricOperator, count: int, key: Array, kept: Kept | None) -> DiagonalEstimate:
    vectors = several_signs(operator, jax.random.split(key, count))
    found = sketch(operator, vectors, key, kept)

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


def _of_diagonal(mean: Any, error: Any, count: int, like: Any) -> DiagonalEstimate:
    low, high = (jax.tree.map(lambda m, e, sign=sign: m + sign * quantile(count) * e, mean, error) for sign in (-1, 1))
    return DiagonalEstimate(jax.tree.map(lambda m, v: m.astype(v.dtype), mean, like), error, low, high)
