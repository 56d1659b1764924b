"""Means over the batches of a data set, which the host reads anew for each product, or the device scans."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis.operators import SymmetricOperator

Batches = Iterable[Any] | tuple[Any, ...]
"""A data set: an iterable of batches that can be read again and again, or a tuple of arrays `[batches, batch, …]`."""
Weights = Callable[..., Any]
"""A function `weights(*batch)` that gives the weights of a batch's examples."""


def are_on_host(batches: Any) -> bool:
    """Returns whether batches are read by the host, and not arrays on the device."""
    return not (isinstance(batches, tuple) and all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(batches)))


def weights_of(weights: Weights, batch: tuple[Any, ...]) -> Array:
    """Returns the weights of a batch's examples, in float32 at least."""
    return _trees.wide(jnp.asarray(weights(*batch)))


def _weight_of(weights: Weights | None, batch: tuple[Any, ...]) -> Array:
    """Returns the weight of a batch: the sum of its examples', or their number, the first array's length."""
    if weights is not None:
        return weights_of(weights, batch).sum()
    first = next((leaf for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)), None)
    if first is None:
        raise ValueError(
            "a batch must begin with an array of examples, by whose number it is weighed; or give weights=."
        )
    return jnp.asarray(jnp.shape(first)[0], jnp.zeros(()).dtype)


class Mean:
    """The mean of a function over the batches of a data set, weighed by their examples.

    Args:
      function: `function(variables, argument, index, *batch) -> tree`, the batch's own mean; `index` is its number.
      variables: pytree of arrays that every call is given, such as the parameters.
      batches: the data set.
      weights: weights of examples; all 1 by default.
      progress: function that is called with a text on each batch that the host has read.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        variables: Any,
        batches: Batches,
        weights: Weights | None,
        progress: Callable[[str], Any] | None = None,
    ):
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches must be readable again and again, such as a list or a data loader, got an iterator. Pass what "
                "iter() makes it of."
            )
        self.on_host = are_on_host(batches)
        self._function, self._variables, self._batches, self._weights = function, variables, batches, weights
        self._progress, self._passes, self._length = progress, 0, None

    def __call__(self, argument: Any) -> Any:
        """Computes the mean of `function(variables, argument, …)`."""
        return self._of_host(argument) if self.on_host else self._of_device(argument)

    def _of_host(self, argument: Any) -> Any:
        self._passes, total, count, index = self._passes + 1, None, jnp.zeros(()), -1
        for index, batch in enumerate(self._batches):
            batch = batch if isinstance(batch, tuple) else tuple(batch) if isinstance(batch, list) else (batch,)
            total, count = self._step(self._variables, total, count, argument, jnp.asarray(index), batch)
            if self._progress is not None:
                of = "" if self._length is None else f" of {self._length}"
                self._progress(f"pass {self._passes} over the data: batch {index + 1}{of}")
        if total is None:
            raise ValueError("batches must hold at least one batch, got none.")
        self._length = index + 1
        return total

    def _of_device(self, argument: Any) -> Any:
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(self._batches)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(f"batches must be arrays with the same number of batches first, got {sorted(lengths)}.")
        (length,) = lengths

        def mean_of(index: Any, batch: Any) -> Any:
            return self._function(self._variables, argument, index, *batch)

        first = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), self._batches)
        shapes = jax.eval_shape(mean_of, jax.ShapeDtypeStruct((), jnp.int32), first)
        zeros = jax.tree.map(jnp.zeros_like, _trees.wide_shapes(shapes))

        def step(carry: tuple[Any, Array], inputs: tuple[Array, Any]) -> tuple[tuple[Any, Array], None]:
            index, batch = inputs
            return self._added(*carry, mean_of(index, batch), batch), None

        return lax.scan(step, (zeros, jnp.zeros(())), (jnp.arange(length), self._batches))[0][0]

    @functools.cached_property
    def _step(self) -> Callable[..., Any]:
        @jax.jit
        def step(variables: Any, total: Any, count: Any, argument: Any, index: Any, batch: Any) -> Any:
            mean = self._function(variables, argument, index, *batch)
            if total is None:
                total = jax.tree.map(jnp.zeros_like, _trees.wide_shapes(mean))
            return self._added(total, count, mean, batch)

        return step

    def _added(self, total: Any, count: Array, mean: Any, batch: Any) -> tuple[Any, Array]:
        weight = _weight_of(self._weights, batch)
        count = count + weight
        share = weight / jnp.where(count > 0, count, 1)
        # A batch without weight may hold anything, NaN included.
        return jax.tree.map(
            lambda t, m: jnp.where(weight > 0, t + share.astype(t.dtype) * (m.astype(t.dtype) - t), t), total, mean
        ), count


def operator(
    product: Callable[..., Any],
    free: Any,
    args: tuple[Any, ...],
    batches: Batches | None,
    weights: Weights | None,
    progress: Callable[[str], Any] | None,
    prepare: Callable[[Any], Any] = lambda vector: vector,
) -> SymmetricOperator:
    """Returns the operator of `product(free, prepare(vector), index, *batch)`, the mean over the batches of a data set.

    Products are in float32 at least, of vectors that are rounded to the precision of the parameters.
    """

    def of(free: Any, vector: Any, index: Any, *batch: Any) -> Any:
        vector = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), vector, free)
        return _trees.wide(product(free, prepare(vector), index, *batch))

    if batches is None:
        return SymmetricOperator(lambda vector: of(free, vector, 0, *args), free)
    if args:
        raise TypeError("give the arguments of one batch, or batches= of a data set, not both.")
    one = Mean(of, free, batches, weights, progress)

    def of_several(free: Any, vectors: Any, index: Any, *batch: Any) -> Any:
        return lax.map(lambda vector: of(free, vector, index, *batch), vectors)

    return SymmetricOperator(one, free, one.on_host, Mean(of_several, free, batches, weights, progress))
