"""Iterations that ask for one product after the other, compiled or on the host, where they can be resumed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax import lax
from jaxtyping import Array


@runtime_checkable
class Operator(Protocol):
    """What gives products, such as a `SymmetricOperator`."""

    @property
    def product(self) -> Any:
        """The product `v → A v`."""
        ...

    @property
    def on_host(self) -> bool:
        """Whether it cannot be traced."""
        ...


@runtime_checkable
class Checkpoints(Protocol):
    """Where a state is kept, such as `bnjax.training.checkpoint.Checkpoints`."""

    def save(self, step: int, tree: Any, *, force: bool = False) -> Any:
        """Saves the state after a number of products, where it is due or forced."""
        ...

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns the newest number of products and state, of the structure of `like`."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """What an iteration does between its products; hashable, so that its functions are compiled once."""

    def vector(self, state: Any) -> Any:
        """Returns the vector whose product is needed next."""
        ...

    def absorb(self, state: Any, product: Any) -> Any:
        """Returns the state after that product; `state.products` counts them."""
        ...

    def is_done(self, state: Any) -> Array:
        """Returns whether no product is needed any more."""
        ...

    def is_full(self, state: Any) -> Array:
        """Returns whether the state must be restarted before it can absorb a product."""
        ...

    def restarted(self, state: Any) -> Any:
        """Returns a full state with room for products again."""
        ...


@dataclasses.dataclass(frozen=True)
class Several:
    """An algorithm from several starts at once, in step, for an operator of several vectors."""

    one: Algorithm

    def vector(self, state: Any) -> Any:
        return jax.vmap(self.one.vector)(state)

    def absorb(self, state: Any, product: Any) -> Any:
        return jax.vmap(self.one.absorb)(state, product)

    def is_done(self, state: Any) -> Array:
        return jax.vmap(self.one.is_done)(state).all()

    def is_full(self, state: Any) -> Array:
        return jax.vmap(self.one.is_full)(state).any()

    def restarted(self, state: Any) -> Any:
        return jax.vmap(self.one.restarted)(state)


def iterate(operator: Operator, algorithm: Algorithm, state: Any, checkpoints: Checkpoints | None = None) -> Any:
    """Returns the state when the algorithm is done: compiled, or step by step where the operator is on the host.

    Args:
      operator: what gives the products.
      algorithm: what to do.
      state: where to begin, unless there is a checkpoint.
      checkpoints: where the state is kept, for an operator on the host.
    """
    check_checkpoints(operator, checkpoints)
    if operator.on_host:
        return _on_host(operator, algorithm, state, checkpoints)

    def step(state: Any) -> Any:
        return algorithm.absorb(state, operator.product(algorithm.vector(state)))

    def cycle(state: Any) -> Any:
        state = lax.cond(algorithm.is_full(state), algorithm.restarted, lambda state: state, state)
        return lax.while_loop(lambda s: ~algorithm.is_done(s) & ~algorithm.is_full(s), step, state)

    # The restarts stand in a loop of their own, since a condition copies what passes through it.
    return lax.while_loop(lambda state: ~algorithm.is_done(state), cycle, state)


def in_passes(passes: Sequence[Callable[[Any], Any]], state: Any, checkpoints: Checkpoints | None = None) -> Any:
    """Returns the state after some passes, functions of it, from that on which a checkpoint has.

    Args:
      passes: what to do, one after the other.
      state: where to begin, of the structure, shapes and dtypes that each pass returns.
      checkpoints: where the state is kept.
    """
    found = None if checkpoints is None else checkpoints.restore(state)
    done, state = (0, state) if found is None else found
    for number, one in enumerate(passes[done:], done + 1):
        state = one(state)
        if checkpoints is not None:
            checkpoints.save(number, state, force=number == len(passes))
    return state


def check_checkpoints(operator: Operator, checkpoints: Checkpoints | None) -> None:
    """Raises `ValueError` for checkpoints of what is compiled as a whole."""
    if checkpoints is not None and not operator.on_host:
        raise ValueError("checkpoints are for operators that read batches on the host, got one that is compiled.")


def _on_host(operator: Operator, algorithm: Algorithm, state: Any, checkpoints: Checkpoints | None) -> Any:
    found = None if checkpoints is None else checkpoints.restore(state)
    state = state if found is None else found[1]
    while not _is_done(algorithm, state):
        state, vector = _asked(algorithm, state)
        state = _absorb(algorithm, state, operator.product(vector))
        if checkpoints is not None:
            checkpoints.save(_products(state), state)
    if checkpoints is not None:
        checkpoints.save(_products(state), state, force=True)
    return state


def _products(state: Any) -> int:
    return int(state.products.max())


@functools.partial(jax.jit, static_argnums=0)
def _asked(algorithm: Algorithm, state: Any) -> tuple[Any, Any]:
    state = lax.cond(algorithm.is_full(state), algorithm.restarted, lambda state: state, state)
    return state, algorithm.vector(state)


@functools.partial(jax.jit, static_argnums=0)
def _absorb(algorithm: Algorithm, state: Any, product: Any) -> Any:
    return algorithm.absorb(state, product)


@functools.partial(jax.jit, static_argnums=0)
def _is_done(algorithm: Algorithm, state: Any) -> Array:
    return algorithm.is_done(state)
