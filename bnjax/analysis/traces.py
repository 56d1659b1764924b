"""Estimates of a symmetric operator's trace from random vectors, with intervals."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _trees, selection
from bnjax.analysis._iterate import Checkpoints, Kept, in_passes, kept_in
from bnjax.analysis._lanczos import combined
from bnjax.analysis._sketch import (
    basis_of,
    error_of_exchangeable,
    in_two_passes,
    left_out,
    matmul,
    others_than,
    products_of,
    sketch,
    standard_error,
)
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.selection import Layer

_METHODS = {"hutchinson": 1, "hutch++": 6, "xtrace": 4}  # and their fewest products
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


def trace(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    method: str = "hutchinson",
    batch_size: int | None = None,
    checkpoints: Checkpoints | None = None,
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
      checkpoints: where the state of an operator on the host is kept after each pass over its data, as in `eigenpairs`.

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
    check_method(method, _METHODS, num_samples)
    kept = kept_in(checkpoints, operator, "trace", method, num_samples, batch_size, key)
    if method == "hutchinson":
        return estimate(over_signs(operator, _trees.dot, num_samples, key, batch_size, kept))
    check_size(operator, num_samples)
    draw_key, rest_key = jax.random.split(key)
    if method == "xtrace":
        return _xtrace(operator, num_samples // 2, draw_key, rest_key, kept)
    count = num_samples // 3
    signs = several_signs(operator, jax.random.split(rest_key, num_samples - 2 * count))

    def basis_and_rest(products: Any) -> tuple[Any, None]:
        basis, _ = basis_of(products, draw_key)
        rest = _trees.subtract(signs, combined(_trees.inner(basis, signs), basis))
        return jax.tree.map(lambda *v: jnp.concatenate(v), basis, rest), None

    vectors = several_signs(operator, jax.random.split(draw_key, count))
    _, (both, _), of_both = in_two_passes(operator, vectors, basis_and_rest, kept)
    along = _trees.row_products(both, of_both)
    return estimate(along[:count].sum() + along[count:])


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


def layer_traces(
    operator: SymmetricOperator,
    *,
    key: Key[Array, ""],
    num_samples: int,
    layers: Sequence[Layer] | None = None,
    batch_size: int | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, TraceEstimate]:
    """Estimates the traces of all layers' blocks of an operator from the same products, by Hutchinson's estimator.

    A layer's sample is `v_lᵀ (A v)_l`, whose mean is the trace of its block, since signs of different parameters are
    independent.

    Args:
      operator: A, of P parameters.
      key: random key.
      num_samples: number of products; static.
      layers: paths of the layers' parameters, or patterns; by default each child of the root is a layer.
      batch_size: number of vectors at once, as in `trace`. Static.
      checkpoints: where the state of an operator on the host is kept, as in `trace`.

    Returns:
      `TraceEstimate` by the layer's name; the estimates of all layers sum to Hutchinson's of the whole trace.

    Raises:
      ValueError: for no samples, or layers that are unknown or overlap.

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: {'a': 2 * v['a'], 'b': -v['b']}, {'a': jnp.zeros(3), 'b': 0.0})
    >>> found = analysis.layer_traces(a, key=jax.random.key(0), num_samples=2)
    >>> print({layer: trace.estimate.item() for layer, trace in found.items()})
    {'a': 6.0, 'b': -1.0}
    """
    check_count("num_samples", num_samples)
    groups = selection.layer_leaves(operator.like, layers)

    def of_layers(v: Any, product: Any) -> Array:
        parts = [[selection.of_leaves(tree, numbers) for tree in (v, product)] for numbers in groups.values()]
        return jnp.stack([_trees.dot(*part) for part in parts])

    kept = kept_in(checkpoints, operator, "traces of layers", list(groups), num_samples, batch_size, key)
    samples = over_signs(operator, of_layers, num_samples, key, batch_size, kept)
    return {name: estimate(samples[:, i]) for i, name in enumerate(groups)}


def _xtrace(operator: SymmetricOperator, count: int, draw_key: Array, key: Array, kept: Kept | None) -> TraceEstimate:
    like = _trees.wide_shapes(operator.like)
    vectors = jax.vmap(lambda key: _trees.random_like(key, like, jax.random.normal))(jax.random.split(draw_key, count))
    length = jnp.sqrt(operator.size / _trees.row_products(vectors, vectors))
    vectors = jax.tree.map(lambda v: v * _trees.leading(length, v.ndim).astype(v.dtype), vectors)
    found = sketch(operator, vectors, key, kept)

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


def over_signs(
    operator: SymmetricOperator,
    function: Callable[[Any, Any], Array],
    count: int,
    key: Array,
    batch_size: int | None = None,
    kept: Kept | None = None,
) -> Array:
    """Returns `function(v, A v)` of random signs v, stacked."""
    keys = jax.random.split(key, count)

    def sample(key: Array) -> Array:
        v = random_signs(key, operator.like)
        return function(_trees.wide(v), _trees.wide(operator.product(v)))

    if not operator.on_host:
        return lax.map(sample, keys, batch_size=batch_size)

    def several(first: int, keys: Array, found: Array) -> Array:
        vectors = several_signs(operator, keys)
        return found.at[first : first + len(keys)].set(jax.vmap(function)(vectors, products_of(operator, vectors)))

    like = _trees.wide_shapes(operator.like)
    of_one = jax.eval_shape(function, like, like)
    zeros = jnp.zeros((count, *of_one.shape), of_one.dtype)
    passes = [functools.partial(several, first, part) for first, part in parts_of(keys, batch_size)]
    return in_passes(passes, zeros, kept)


def parts_of(keys: Array, batch_size: int | None) -> list[tuple[int, Array]]:
    """Splits keys into parts of some size, by default one of all, each after the number of its first."""
    most = batch_size or len(keys)
    return [(i, keys[i : i + most]) for i in range(0, len(keys), most)]


def random_signs(key: Array, like: Any) -> Any:
    """Draws a random tree of +1 and −1."""
    return _trees.random_like(key, like, jax.random.rademacher)


def several_signs(operator: SymmetricOperator, keys: Array) -> Any:
    """Draws random signs for each key, in float32 at least."""
    return _trees.wide(jax.vmap(lambda key: random_signs(key, operator.like))(keys))


def estimate(samples: Array, error: Array | None = None) -> TraceEstimate:
    """Returns the mean of samples and its interval, by their own standard error unless another is given."""
    unit = _trees.unit_of(samples)  # since a sum of samples may overflow
    mean = (samples / unit).mean() * unit
    error = standard_error(samples / unit) * unit if error is None else error
    half = quantile(len(samples)) * error
    return TraceEstimate(mean, error, samples, mean - half, mean + half)


def quantile(count: int) -> float:
    """Returns Student's t for the 95 % interval of the mean of so many samples; NaN for one."""
    from scipy.special import stdtrit  # which an import of JAX leaves out

    return float(stdtrit(count - 1, 0.5 + _LEVEL / 2)) if count > 1 else math.nan


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` for a count below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_method(method: str, fewest: dict[str, int], count: int) -> None:
    """Raises `ValueError` for an unknown method, or fewer products than it needs."""
    if method not in fewest:
        raise ValueError(f"method must be one of {', '.join(fewest)}, got {method!r}.")
    if count < fewest[method]:
        raise ValueError(f"num_samples must be at least {fewest[method]} for method {method!r}, got {count}.")


def check_size(operator: SymmetricOperator, count: int) -> None:
    """Raises `ValueError` for so many products that their space would hold the whole matrix."""
    if count // 2 >= operator.size:
        raise ValueError(
            f"num_samples must be less than twice the number of parameters, {operator.size}, got {count}; products "
            "with the unit vectors give the whole matrix."
        )
