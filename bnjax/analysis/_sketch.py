"""Products with random vectors, and what estimates make of them by leaving each of the vectors out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Kept, in_passes
from bnjax.analysis._lanczos import orthonormal
from bnjax.analysis.operators import SymmetricOperator


class Sketch(NamedTuple):
    """Products with k random vectors ω_i, and with an orthonormal basis Q of these, in units of `unit`.

    With Y = A Ω = Q R: `inner` is `Qᵀ A Q`, `vectors` is `Qᵀ Ω` and `products` is `(A Q)ᵀ Ω`, all `[k, k]`.
    """

    unit: Array
    basis: Any
    of_basis: Any
    triangle: Array
    inner: Array
    vectors: Array
    products: Array
    squares: Array  # ‖ω_i‖²


def sketch(operator: SymmetricOperator, vectors: Any, key: Array, kept: Kept | None) -> Sketch:
    """Returns the products with vectors that have a leading axis, and with the basis of these products."""
    products, (basis, triangle), of_basis = in_two_passes(operator, vectors, lambda y: basis_of(y, key), kept)
    unit = _trees.unit_of(products)
    of_basis = _trees.in_units(of_basis, unit)
    inner, along = _trees.inner(basis, of_basis), _trees.inner(basis, vectors)
    squares = _trees.row_products(vectors, vectors)
    return Sketch(unit, basis, of_basis, triangle, inner, along, _trees.inner(of_basis, vectors), squares)


def basis_of(products: Any, key: Array) -> tuple[Any, Array]:
    """Returns an orthonormal basis Q of products, and R of `Q R`, which are the products in units of their size."""
    return orthonormal(_trees.in_units(products, _trees.unit_of(products)), key)


def in_two_passes(
    operator: SymmetricOperator, vectors: Any, others: Callable[[Any], tuple[Any, Any]], kept: Kept | None
) -> tuple[Any, tuple[Any, Any], Any]:
    """Returns the products with some vectors, others made of these (with what else comes of it), and their products."""
    shapes = _trees.wide_shapes(jax.eval_shape(lambda v: (v, others(_trees.wide(v))[0]), vectors))
    zeros = tuple(_trees.zeros(of, operator.like) for of in shapes)
    made = []

    def second(state: Any) -> Any:
        made.append(others(state[0]))
        return state[0], products_of(operator, made[0][0])

    passes = (lambda state: (products_of(operator, vectors), state[1]), second)
    products, of_others = in_passes(passes, zeros, kept)
    return products, made[0] if made else others(products), of_others


def left_out(triangle: Array) -> Array:
    """Returns, as columns, the direction in the basis that is lost when each of the vectors is left out."""
    inverse = jax.scipy.linalg.solve_triangular(triangle, jnp.eye(len(triangle), dtype=triangle.dtype))
    return (inverse / jnp.linalg.norm(inverse, axis=1, keepdims=True)).T


def products_of(operator: SymmetricOperator, vectors: Any) -> Any:
    """Returns the products with several vectors, in float32 at least."""
    return _trees.wide(operator.of_several(vectors))


def others_than(i: Array, count: int) -> Array:
    """Returns the numbers below a count but one."""
    return jnp.arange(count - 1) + (jnp.arange(count - 1) >= i)


def mean_of(samples: Any) -> Any:
    """Returns the mean of trees over their first axis."""
    return jax.tree.map(lambda v: v.mean(0), samples)


def error_of_exchangeable(samples: Array, means_without: Array) -> Array:
    """Returns the standard error of the mean of samples that share what they are made of (see `trace`).

    Args:
      samples: the samples, `[n, …]`.
      means_without: means of the samples that are made without one of the n random vectors, `[n, …]`.
    """
    count = samples.shape[0]
    moved = means_without - means_without.mean(0, keepdims=True)
    of_leaving_out = jnp.sqrt((count - 1) / count * jnp.square(moved).sum(0))
    return jnp.sqrt(standard_error(samples)) * jnp.sqrt(of_leaving_out)


def matmul(a: Array, b: Array) -> Array:
    """Computes a product of small matrices in full precision."""
    return jnp.matmul(a, b, precision="highest")


def standard_error(samples: Array) -> Array:
    """Computes the standard error of the mean over the first axis."""
    return root_of_variance(jnp.square(samples - samples.mean(0, keepdims=True)).sum(0), samples.shape[0])


def root_of_variance(squares: Array, count: int) -> Array:
    """Computes the standard error of the mean of so many samples from their squared distances to it."""
    return jnp.sqrt(squares / (count * (count - 1))) if count > 1 else jnp.full_like(squares, jnp.nan)
