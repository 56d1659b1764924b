"""Krylov spaces of symmetric operators on pytrees, with bases, Ritz values and Ritz vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from bnjax.analysis._trees import unit_of

_LARGEST_BLOCK = 8
_LEAST_DEGREE = 20  # blocks trade polynomial degree for fewer passes over the basis; below this accuracy suffers


def block_lanczos(
    product: Callable[[Any], Any], like: Any, num_steps: int, key: Array, width: int | None = None
) -> tuple[Array, Array, Array, Array]:
    """Computes an orthonormal basis `[num_steps, P]`, Ritz values and vectors in it, and the vectors' residual norms.

    Full reorthogonalization reads the whole basis for each new vector, which takes longer than most Hessian products.
    Blocks of b vectors read it once for b products, by block Gram–Schmidt. The projected matrix is made of all its
    coefficients, so that the values are Ritz values of the basis as it is. Without a `width` the blocks are as wide as
    leaves enough of them. The products are taken in units of the first ones' size, by which squares stay in range.
    """
    flat_product, start = _flat(product, like, key)
    block_key, noise_key = jax.random.split(jax.random.fold_in(key, 1))
    size, dtype = start.shape[0], start.dtype
    if width is None:
        largest = min(_LARGEST_BLOCK, max(1, num_steps // _LEAST_DEGREE))
        width = next(b for b in range(largest, 0, -1) if num_steps % b == 0)
    identity = jnp.eye(width, dtype=dtype)
    direction = jax.random.uniform(noise_key, start.shape, dtype, -1, 1)

    def matmul(a, b):
        return jnp.matmul(a, b, precision="highest")

    def without(basis, rows, blocks):
        """Returns the rows' coefficients in the first blocks of the basis, and the rows without these components."""

        def project(i, carry):
            rows, coefficients = carry
            block = lax.dynamic_slice(basis, (i * width, 0), (width, size))
            along = matmul(block, rows.T)
            return rows - matmul(along.T, block), lax.dynamic_update_slice(coefficients, along, (i * width, 0))

        rows, coefficients = lax.fori_loop(0, blocks, project, (rows, jnp.zeros((num_steps, width), dtype)))
        return coefficients, rows

    def orthonormal(basis, rows, kept, blocks):
        """Returns rows q without components in the basis, and the factor r of `rows = r q` up to these components.

        Cholesky's factor of the rows' products makes the rows orthonormal if neither it nor the projection before,
        which left the share `kept` of each row, canceled much. Otherwise both are repeated, as when a Krylov space
        closes.
        """

        def orthonormalize(carry):
            rows, factor, kept, turns, _ = carry
            norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows / norms
            products = matmul(rows, rows.T)
            lower = jnp.linalg.cholesky(products)
            is_pure = (kept.min() > 0.5) & (jnp.diag(lower).min() > 0.5)  # false for NaN
            safe = jnp.linalg.cholesky(products + 100 * width * jnp.finfo(dtype).eps * identity)
            lower = jnp.where(is_pure, lower, safe)
            inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
            rows = matmul(inverse, rows)
            rows = lax.cond(is_pure, lambda r: r, lambda r: without(basis, r, blocks)[1], rows)
            return rows, matmul(factor, norms * lower), jnp.linalg.norm(rows, axis=1), turns + 1, is_pure

        state = rows, identity, kept, 0, False
        return lax.while_loop(lambda carry: ~carry[4] & (carry[3] < 10), orthonormalize, state)[:2]

    def step(j, carry):
        basis, projected, block, _, unit = carry
        basis = lax.dynamic_update_slice(basis, block, (j * width, 0))
        products = lax.map(flat_product, block)
        unit = jnp.where(j == 0, unit_of(products), unit)
        products = products / unit
        shifts = j * width + jnp.arange(width)
        products = jax.vmap(lambda w, shift: _disturbed(w, jnp.roll(direction, shift)))(products, shifts)
        along, rows = without(basis, products, j + 1)
        kept = jnp.linalg.norm(rows, axis=1) / jnp.linalg.norm(products, axis=1)
        projected = lax.dynamic_update_slice(projected, along, (0, j * width))
        return basis, projected, *orthonormal(basis, rows, kept, j + 1), unit

    basis = jnp.zeros((num_steps, size), dtype)
    first = jnp.concatenate([start[None], jax.random.normal(block_key, (width - 1, size), dtype)])
    carry = basis, jnp.zeros((num_steps, num_steps), dtype), *orthonormal(basis, first, jnp.ones(width, dtype), 0)
    carry = *carry, jnp.ones((), dtype)
    basis, projected, _, remainder, unit = lax.fori_loop(0, num_steps // width, step, carry)
    values, vectors = jnp.linalg.eigh(jnp.triu(projected) + jnp.triu(projected, 1).T)
    return basis, values * unit, vectors, jnp.linalg.norm(matmul(remainder.T, vectors[-width:]), axis=0) * unit


def quadrature(product: Callable[[Any], Any], like: Any, num_steps: int, key: Array) -> tuple[Array, Array]:
    """Returns Ritz values of one random vector, and the squares of their vectors' components along it."""
    _, values, vectors, _ = block_lanczos(product, like, num_steps, key, width=1)
    return values, jnp.square(vectors[0])


def _flat(product: Callable[[Any], Any], like: Any, key: Array) -> tuple[Callable[[Array], Array], Array]:
    """Returns a product of flat vectors of float32 or wider in place of pytrees, and a random vector."""
    flat, unravel = ravel_pytree(like)
    dtype = jnp.promote_types(flat.dtype, jnp.float32)
    return lambda v: ravel_pytree(product(unravel(v)))[0].astype(dtype), jax.random.normal(key, flat.shape, dtype)


def _disturbed(w: Array, direction: Array) -> Array:
    """Adds to a product a random vector of the size of its rounding errors.

    A Krylov space that closes early would leave nothing but rounding errors to continue with, which lie in that space
    and make false eigenvalues. The random vector leads out of it.
    """
    floor = float(jnp.finfo(w.dtype).tiny) ** 0.45  # the floor's square does not underflow
    return w + direction * (8 * jnp.finfo(w.dtype).eps * jnp.sqrt(jnp.mean(jnp.square(w))) + floor)
