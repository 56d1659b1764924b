"""The method of conjugate gradients, for inverses of positive definite operators."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis._iterate import Kept, Operator, iterate


class _State(NamedTuple):
    solution: Any
    residual: Any
    direction: Any
    square: Array  # of the residual's norm
    goal: Array  # at which it is small enough
    products: Array
    is_definite: Array


@dataclasses.dataclass(frozen=True)
class _ConjugateGradients:
    tolerance: float
    most: int

    def start(self, vector: Any) -> _State:
        square = _trees.dot(vector, vector)
        zeros, goal = jax.tree.map(jnp.zeros_like, vector), self.tolerance**2 * square
        return _State(zeros, vector, vector, square, goal, jnp.zeros((), jnp.int32), jnp.ones((), bool))

    def vector(self, state: _State) -> Any:
        return state.direction

    def absorb(self, state: _State, product: Any) -> _State:
        product = _trees.wide(product)
        curvature = _trees.dot(state.direction, product)
        is_definite = curvature > 0
        step = state.square / jnp.where(is_definite, curvature, 1)
        solution = _trees.moved(state.solution, step, state.direction)
        residual = _trees.moved(state.residual, -step, product)
        square = _trees.dot(residual, residual)
        direction = _trees.moved(residual, square / state.square, state.direction)
        return _State(solution, residual, direction, square, state.goal, state.products + 1, is_definite)

    def is_done(self, state: _State) -> Array:
        return (state.square <= state.goal) | ~state.is_definite | (state.products >= self.most)

    def is_full(self, state: _State) -> Array:
        return jnp.zeros((), bool)

    def restarted(self, state: _State) -> _State:
        return state


def solve(operator: Operator, vector: Any, tolerance: float, max_products: int, kept: Kept | None = None) -> Any:
    """Returns the solution x of `A x = v`, NaN where it is not found (see `SymmetricOperator.inverse`)."""
    method, unit = _ConjugateGradients(tolerance, max_products), _trees.unit_of(vector)
    state = iterate(operator, method, method.start(_trees.wide(_trees.in_units(vector, unit))), kept)
    is_found = state.is_definite & (state.square <= state.goal)
    return jax.tree.map(lambda x: jnp.where(is_found, x * unit.astype(x.dtype), jnp.nan), state.solution)
