"""Krylov spaces of symmetric operators on pytrees: thick-restarted Lanczos for eigenpairs, Gauss's rule for densities.

The vectors of a basis keep the structure and the sharding of the parameters, with a leading axis of their number.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees

_AT_ONCE = 8  # vectors of a basis that are projected out at once
_ROUNDING = 8  # residuals of so many ε of the largest eigenvalue are rounding errors of the products
_FEWEST = 20  # products before which it is not asked whether they are enough, since close eigenvalues come late


class LanczosState(NamedTuple):
    """What is known of a Krylov space, from which `bnjax.analysis.eigenpairs` can go on.

    Attributes:
      basis: orthonormal vectors, a pytree like the parameters with a leading axis; zero after `filled`.
      projected: the operator's matrix in the basis, in units of `unit`, `[m, m]`.
      remainder: coefficients of what the last products added to the space, in the same units, `[block, block]`.
      unit: power of two of the size of the first product.
      filled: number of basis vectors whose product is known; those of the next ones are needed.
      products: number of products so far.
      is_done: whether the tolerance is reached, or the most products.
      key: random key of what leads out of a closed space.
    """

    basis: Any
    projected: Array
    remainder: Array
    unit: Array
    filled: Array
    products: Array
    is_done: Array
    key: Array


class Ritz(NamedTuple):
    """Ritz values in the order asked for, their vectors in the basis, and their residuals, in the state's units."""

    values: Array
    vectors: Array
    residuals: Array
    bound: Array  # of all of them, by size


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """Lanczos's method with full reorthogonalization, for a number of products; an `_iterate.Algorithm`.

    The projected matrix is made of all coefficients, so that its eigenvalues are Ritz values of the basis as it is.

    Attributes:
      size: number of vectors m.
      block: number of vectors whose products are asked for at once, with a leading axis if there are several.
    """

    size: int
    block: int = dataclasses.field(default=1, kw_only=True)

    @property
    def room(self) -> int:
        """The number of vectors that there is room for, a multiple of those that are projected out at once."""
        return -(-(self.size + self.block) // _AT_ONCE) * _AT_ONCE

    def start(self, vector: Any, key: Array) -> LanczosState:
        """Returns the state that begins with a vector, and random ones beside it."""
        vector = _trees.wide(vector)
        first = _trees.in_units(vector, _trees.unit_of(vector))
        zero, none = jnp.zeros((), _trees.dot(first, first).dtype), jnp.zeros((), jnp.int32)
        rows = jax.tree.map(lambda v: jax.ShapeDtypeStruct((self.room, *v.shape), v.dtype), first)
        keys = jax.random.split(key, self.block)

        def add(i: Array, basis: Any) -> Any:
            row = first
            if self.block > 1:
                random = _trees.random_like(keys[i], first, jax.random.normal)
                row = jax.tree.map(lambda v, r: jnp.where(i == 0, v, r), first, random)
            return _with_row(basis, i, *_orthogonal(basis, row, i, keys[i])[1:])

        basis = lax.fori_loop(0, self.block, add, _trees.zeros(rows, first))
        remainder, projected = (
            jnp.zeros((self.block, self.block), zero.dtype),
            jnp.zeros((self.size, self.size), zero.dtype),
        )
        return LanczosState(basis, projected, remainder, zero + 1, none, none, jnp.zeros((), bool), key)

    def vector(self, state: LanczosState) -> Any:
        """Returns the newest vectors of the basis, which stay the newest when the space is restarted."""
        newest = jax.tree.map(lambda rows: lax.dynamic_slice_in_dim(rows, state.filled, self.block), state.basis)
        return jax.tree.map(lambda rows: rows[0], newest) if self.block == 1 else newest

    def absorb(self, state: LanczosState, product: Any) -> LanczosState:
        """Projects the products on the basis, and makes what is left of them the next vectors."""
        products = jax.tree.map(lambda p, rows: p.astype(rows.dtype), product, state.basis)
        if self.block == 1:
            products = jax.tree.map(lambda v: v[None], products)
        unit = jnp.where(state.products == 0, _trees.unit_of(products), state.unit).astype(state.unit.dtype)
        products, basis, projected = _trees.in_units(products, unit), state.basis, state.projected
        remainder, next_ = jnp.zeros_like(state.remainder), state.filled + self.block

        def add(i: Array, so_far: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            basis, projected, remainder = so_far
            column, key = state.filled + i, jax.random.fold_in(state.key, state.products + i)
            row = jax.tree.map(lambda v: v[i], products)
            along, rest, size = _orthogonal(basis, row, next_ + i, key, column)
            basis = _with_row(basis, next_ + i, rest, size)
            of_next = lax.dynamic_slice_in_dim(along, next_, self.block).at[i].set(jnp.where(size > 0, size, 0))
            remainder = remainder.at[:, i].set(of_next.astype(remainder.dtype))
            along = jnp.where(jnp.arange(self.room) < next_, along, 0)[: self.size].astype(projected.dtype)
            return basis, projected.at[:, column].set(along).at[column].set(along), remainder

        basis, projected, remainder = lax.fori_loop(0, self.block, add, (basis, projected, remainder))
        return state._replace(
            basis=basis,
            projected=projected,
            remainder=remainder,
            unit=unit,
            filled=next_,
            products=state.products + self.block,
            is_done=next_ >= self.size,
        )

    def is_done(self, state: LanczosState) -> Array:
        """Returns whether no product is needed any more."""
        return state.is_done

    def is_full(self, state: LanczosState) -> Array:
        """Returns whether there is no room for products."""
        return state.filled + self.block > self.size

    def restarted(self, state: LanczosState) -> LanczosState:
        """Returns a full state, as it is then done."""
        return state

    def quadrature(self, state: LanczosState) -> tuple[Array, Array]:
        """Returns the nodes and weights of Gauss's rule for the first vector: Ritz values, and their shares of it."""
        values, vectors = jnp.linalg.eigh(state.projected)
        return values * state.unit, jnp.square(vectors[0])


@dataclasses.dataclass(frozen=True)
class ThickRestart(Lanczos):
    """Lanczos's method, restarted from Ritz vectors until some of them are good enough.

    Attributes:
      size: number of vectors m at which it restarts.
      k: number of eigenpairs.
      which: which of them.
      tolerance: relative residual at which it stops.
      most: number of products after which it stops in any case.
      block: number of vectors whose products are asked for at once.
    """

    k: int
    which: str
    tolerance: float
    most: int

    def absorb(self, state: LanczosState, product: Any) -> LanczosState:
        """Projects the product on the basis, and looks whether that is enough."""
        return self.judged(super().absorb(state, product))

    def judged(self, state: LanczosState) -> LanczosState:
        """Returns a state that knows whether it is done."""
        ritz = self.ritz(state)
        rounding = _ROUNDING * jnp.finfo(ritz.values.dtype).eps * ritz.bound
        enough = jnp.maximum(self.tolerance * jnp.abs(ritz.values), rounding)
        is_close = (ritz.residuals <= enough)[: self.k].all() & (state.filled >= min(self.size, _FEWEST))
        is_whole = state.filled >= sum(rows.size for rows in jax.tree.leaves(state.basis)) // self.room
        return state._replace(is_done=is_close | is_whole | (state.products >= self.most))

    def ritz(self, state: LanczosState) -> Ritz:
        """Returns the Ritz pairs of the space; what is not filled has infinite residuals and comes last."""
        rank, eye = jnp.arange(self.size), jnp.eye(self.size, dtype=state.projected.dtype)
        is_filled, bound = rank < state.filled, jnp.abs(state.projected).sum(1).max()
        beyond = jnp.where(is_filled, 0, 2 * bound + 1)  # beyond all eigenvalues, which are at most as large as bound
        values, vectors = jnp.linalg.eigh(state.projected + beyond[:, None] * eye)  # in ascending order
        last = lax.dynamic_slice_in_dim(vectors, jnp.maximum(state.filled - self.block, 0), self.block)
        left = jnp.linalg.norm(jnp.matmul(state.remainder, last, precision="highest"), axis=0)
        residuals = jnp.where(is_filled & (state.products > 0), left, jnp.inf)
        from_top = state.filled - 1 - rank
        order = {
            "largest": from_top,
            "smallest": rank,
            "magnitude": -jnp.abs(values),
            "both": jnp.minimum(2 * from_top, 2 * rank + 1),
        }[self.which]
        order = jnp.argsort(jnp.where(is_filled, order.astype(values.dtype), jnp.inf))
        return Ritz(values[order], vectors[:, order], residuals[order], bound)

    def vectors(self, state: LanczosState, coefficients: Array) -> Any:
        """Returns combinations of the basis, whose coefficients are columns."""
        return combined(coefficients, jax.tree.map(lambda rows: rows[: self.size], state.basis))

    def restarted(self, state: LanczosState) -> LanczosState:
        """Returns the space of the best Ritz vectors and the newest vectors, with half of the room free again."""
        kept, ritz = self.k + (self.size - self.k) // 2, self.ritz(state)
        kept = min(kept, self.size - self.block)
        best = self.vectors(state, ritz.vectors[:, :kept])

        def shortened(rows: Array, best: Array) -> Array:
            newest = lax.dynamic_slice_in_dim(rows, state.filled, self.block)
            return jnp.zeros_like(rows).at[:kept].set(best).at[kept : kept + self.block].set(newest)

        projected = jnp.where(jnp.arange(self.size) < kept, ritz.values, 0)[:, None] * jnp.eye(self.size)
        return state._replace(
            basis=jax.tree.map(shortened, state.basis, best),
            projected=projected.astype(state.projected.dtype),
            filled=jnp.full_like(state.filled, kept),
        )


def orthonormal(vectors: Any, key: Array) -> tuple[Any, Array]:
    """Returns an orthonormal basis q of k vectors, with a leading axis, and r `[k, k]` with `vectors_i = Σ_j q_j r_ji`.

    Where a vector lies in the space of those before, up to rounding, a random one is in its place, and r's diagonal is
    a rounding error.
    """
    count = jax.tree.leaves(vectors)[0].shape[0]
    room = -(-count // _AT_ONCE) * _AT_ONCE
    basis = jax.tree.map(lambda v: jnp.zeros((room, *v.shape[1:]), v.dtype), vectors)

    def add(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        basis, triangle = carry
        vector = jax.tree.map(lambda v: v[i], vectors)
        along, rest, size = _orthogonal(basis, vector, i, jax.random.fold_in(key, i))
        diagonal = jnp.maximum(size, jnp.finfo(size.dtype).eps * _norm(vector))
        column = jnp.where(jnp.arange(room) < i, along, 0).at[i].set(diagonal)
        return _with_row(basis, i, rest, size), triangle.at[:, i].set(column)

    dtype = _norm(jax.tree.map(lambda v: v[0], vectors)).dtype
    basis, triangle = lax.fori_loop(0, count, add, (basis, jnp.zeros((room, count), dtype)))
    return jax.tree.map(lambda rows: rows[:count], basis), triangle[:count]


def _orthogonal(basis: Any, vector: Any, count: Any, key: Array, near: Array | None = None) -> tuple[Array, Any, Array]:
    """Returns a vector's coefficients in a basis, what is left of it, and the norm of that, negative if it is random.

    Where the basis holds all of the vector but rounding errors, as when a space is closed under the operator, what is
    left is of no use: it lies in that space, and would make false eigenvalues. A random vector takes its place.

    Args:
      basis: orthonormal vectors.
      vector: a vector whose square is in range.
      count: number of vectors of the basis.
      key: random key.
      near: number of the vector which this one is a product of; most of it lies along that one and the one before.
    """
    whole = _norm(vector)
    along = jnp.zeros(jax.tree.leaves(basis)[0].shape[0], whole.dtype)
    for i in () if near is None else (near, jnp.maximum(near - 1, 0)):
        row = jax.tree.map(lambda rows, i=i: rows[i], basis)
        part = _trees.dot(row, vector)
        along, vector = along.at[i].add(part), _trees.moved(vector, -part, row)

    def project(tries: _Tries) -> _Tries:
        more, rest = _without(basis, tries.vector, count)
        size, is_first, is_second = _norm(rest), tries.number == 0, tries.number == 1
        # What a projection leaves has rounding errors of what it was given in the basis.
        is_enough = is_first & (size > 0.7 * tries.size)
        is_of_use = size > _ROUNDING * jnp.finfo(size.dtype).eps * whole
        rest = lax.cond(is_second & ~is_of_use, outside, lambda vector: vector, rest)
        along = tries.along + jnp.where(tries.number < 2, more, 0)
        is_done = is_enough | (is_second & is_of_use) | (tries.number == 3)
        return _Tries(tries.number + 1, along, rest, size, is_done)

    def outside(like: Any) -> Any:
        return _trees.random_like(key, like, jax.random.normal)

    start = _Tries(jnp.zeros((), jnp.int32), along, vector, _norm(vector), jnp.zeros((), bool))
    tries = lax.while_loop(lambda tries: ~tries.is_done, project, start)
    return tries.along, tries.vector, jnp.where(tries.number > 2, -tries.size, tries.size)


class _Tries(NamedTuple):
    """What is left of a vector after so many projections, of which the third and fourth are of a random one."""

    number: Array
    along: Array
    vector: Any
    size: Array
    is_done: Array


def _with_row(basis: Any, index: Any, vector: Any, size: Array) -> Any:
    """Returns the basis with a vector in one of its rows, divided by its norm."""
    norm = jnp.abs(size)
    return jax.tree.map(
        lambda rows, v: rows.at[index].set(v / jnp.where(norm > 0, norm, 1).astype(v.dtype)), basis, vector
    )


def _without(basis: Any, vector: Any, count: Any) -> tuple[Array, Any]:
    """Returns a vector's coefficients in the first vectors of a basis, and the vector without these components.

    Blocks of the basis are projected out one after the other, each while it is in the cache, and no more than needed.
    """
    length = jax.tree.leaves(basis)[0].shape[0]

    def project(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        along, vector = carry
        block = jax.tree.map(lambda rows: lax.dynamic_slice_in_dim(rows, i * _AT_ONCE, _AT_ONCE), basis)
        part = _trees.products(block, vector).astype(along.dtype)
        rest = jax.tree.map(lambda v, p: v - p[0], vector, combined(part[:, None], block))
        return lax.dynamic_update_slice_in_dim(along, part, i * _AT_ONCE, 0), rest

    dtype = _trees.dot(vector, vector).dtype
    return lax.fori_loop(0, (count + _AT_ONCE - 1) // _AT_ONCE, project, (jnp.zeros(length, dtype), vector))


def combined(coefficients: Array, basis: Any) -> Any:
    """Returns combinations `[l, …]` of the vectors of a basis, whose coefficients `[m, l]` are columns."""
    return jax.tree.map(
        lambda rows: jnp.tensordot(coefficients.T.astype(rows.dtype), rows, 1, precision="highest"), basis
    )


def _norm(tree: Any) -> Array:
    """Computes the norm of a tree whose squares are in range."""
    return jnp.sqrt(_trees.dot(tree, tree))
