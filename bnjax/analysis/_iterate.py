"""Iterations that ask for one product after the other, compiled or on the host, where they can be resumed."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
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


class Kept:
    """The states of one measurement in checkpoints, which are refused to any other.

    Args:
      checkpoints: where they are kept.
      identity: what the measurement is: its name, options and key, which the state depends on.
    """

    def __init__(self, checkpoints: Checkpoints, identity: Sequence[Any]):
        parts = [np.asarray(jax.random.key_data(p)).tolist() if isinstance(p, jax.Array) else p for p in identity]
        self._checkpoints, self._identity = checkpoints, np.asarray(zlib.crc32(repr(parts).encode()), np.uint32)

    def restore(self, state: Any) -> tuple[int, Any] | None:
        """Returns the newest number and state; raises `ValueError` for that of another measurement."""
        found = self._checkpoints.restore((self._identity, state))
        if found is None:
            return None
        step, (identity, state) = found
        if int(identity) != int(self._identity):
            raise ValueError(
                "checkpoints must be of the same measurement, with the same options and key, got those of another one. "
                "Give each measurement its own directory."
            )
        return step, state

    def save(self, step: int, state: Any, *, force: bool = False) -> None:
        """Saves a state, where that is due or forced."""
        self._checkpoints.save(step, (self._identity, state), force=force)


def kept_in(checkpoints: Checkpoints | None, operator: Operator, *identity: Any) -> Kept | None:
    """Returns where a measurement's states are kept; raises `ValueError` for one that is compiled as a whole."""
    if checkpoints is None:
        return None
    if not operator.on_host:
        raise ValueError("checkpoints are for operators that read batches on the host, got one that is compiled.")
    return Kept(checkpoints, identity)


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


def iterate(operator: Operator, algorithm: Algorithm, state: Any, kept: Kept | None = None) -> Any:
    """Returns the state when the algorithm is done: compiled, or step by step where the operator is on the host.

    Args:
      operator: what gives the products.
      algorithm: what to do.
      state: where to begin, unless there is a checkpoint.
      kept: where the state is kept, for an operator on the host.
    """
    if operator.on_host:
        return _on_host(operator, algorithm, state, kept)

    def step(state: Any) -> Any:
        return algorithm.absorb(state, operator.product(algorithm.vector(state)))

    def cycle(state: Any) -> Any:
        state = lax.cond(algorithm.is_full(state), algorithm.restarted, lambda state: state, state)
        return lax.while_loop(lambda s: ~algorithm.is_done(s) & ~algorithm.is_full(s), step, state)

    # The restarts stand in a loop of their own, since a condition copies what passes through it.
    return lax.while_loop(lambda state: ~algorithm.is_done(state), cycle, state)


def in_passes(passes: Sequence[Callable[[Any], Any]], state: Any, kept: Kept | None = None) -> Any:
    """Returns the state after some passes, functions of it, from that on which a checkpoint has.

    Args:
      passes: what to do, one after the other.
      state: where to begin, of the structure, shapes and dtypes that each pass returns.
      kept: where the state is kept.
    """
    found = None if kept is None else kept.restore(state)
    done, state = (0, state) if found is None else found
    for number, one in enumerate(passes[done:], done + 1):
        state = one(state)
        if kept is not None:
            kept.save(number, state, force=number == len(passes))
    return state


def _on_host(operator: Operator, algorithm: Algorithm, state: Any, kept: Kept | None) -> Any:
    found = None if kept is None else kept.restore(state)
    if found is not None:
        judged = getattr(algorithm, "judged", lambda state: state)  # by a tolerance that may be another one
        state = judged(found[1])
    while not _is_done(algorithm, state):
        state, vector = _asked(algorithm, state)
        state = _absorb(algorithm, state, operator.product(vector))
        if kept is not None:
            kept.save(_products(state), state)
    if kept is not None:
        kept.save(_products(state), state, force=True)
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
