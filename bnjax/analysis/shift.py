"""Internal covariate shift: the change of a layer's gradient by the update of the layers before it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees, selection
from bnjax.analysis._trees import LossFn
from bnjax.analysis.selection import Layer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["distance", "cosine", "gradient_norm"],
    meta_fields=["layers"],
)
@dataclasses.dataclass(frozen=True)
class CovariateShift:
    """The internal covariate shift of each of k layers, in the network's order.

    Attributes:
      layers: names of the layers.
      distance: ‖G_i − G'_i‖₂, `[k]`.
      cosine: cosine of the angle between G_i and G'_i, `[k]`; NaN where one of them is zero.
      gradient_norm: ‖G_i‖₂, `[k]`.
    """

    layers: tuple[str, ...]
    distance: Any  # arrays, or any other leaf of a tree
    cosine: Any
    gradient_norm: Any


def covariate_shift(
    loss_fn: LossFn, params: Any, next_params: Any, *args: Any, layers: Sequence[Layer] | None = None
) -> CovariateShift:
    """Computes the internal covariate shift of every layer between a step and the next, on the same batch.

    With the layers' parameters W_1 … W_k at step t and at step t + 1:

        G_i  = ∂L/∂W_i at (W_1ᵗ … W_kᵗ)        G'_i = ∂L/∂W_i at (W_1ᵗ⁺¹ … W_{i−1}ᵗ⁺¹, W_iᵗ … W_kᵗ)

    The first layer's shift is zero by definition. k layers cost k gradients, one after the other.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays at step t.
      next_params: the same pytree at step t + 1.
      *args: further arguments of `loss_fn`, such as the batch of step t.
      layers: paths of the layers' parameters in the order in which the network applies them; a sequence of paths where
        several subtrees form a layer, such as a convolution and its batch norm. By default the items of a list, or the
        children of a dict whose names count ('Dense_0', 'Dense_1', …); `layers_in_order` of
        `bnjax.analysis.losses` finds the layers of a model of Flax. Parameters in no layer stay at step t.

    Raises:
      TypeError, ValueError: for parameters without floating-point arrays, `next_params` unlike `params`, or layers that
        are unknown, overlap or whose order is not known.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Definition 2.1 and Figure 2.

    >>> from bnjax import analysis
    >>> loss = lambda w, x: jnp.sum((w[1] * w[0] * x) ** 2)
    >>> shift = analysis.covariate_shift(loss, [jnp.array(1.0), jnp.array(2.0)], [jnp.array(0.5), jnp.array(1.5)], 1.0)
    >>> print(shift.layers, shift.distance, shift.cosine)
    ('0', '1') [0. 3.] [1. 1.]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    following = _trees.free_part("next_params", next_params, free)
    leaves = selection.ordered_layer_leaves(free, layers)
    number = {leaf: i for i, numbers in enumerate(leaves.values()) for leaf in numbers}
    tree = jax.tree.structure(free, is_leaf=lambda leaf: leaf is None)
    # The tree holds the layer's number of each leaf; leaves of no layer come after all.
    layer_of = jax.tree.unflatten(tree, [number.get(i, len(leaves)) for i in range(tree.num_leaves)])

    def gradient_after(first: Array) -> Any:
        """Computes the gradient where the layers before `first` are a step ahead."""
        ahead = jax.tree.map(
            lambda old, new, i: None if old is None else jnp.where(i < first, new, old),
            free,
            following,
            layer_of,
            is_leaf=lambda leaf: leaf is None,
        )
        return jax.grad(loss_fn)(ahead, *args)

    gradient = jax.grad(loss_fn)(free, *args)
    groups = list(leaves.values())

    def of_layer(i: Array) -> tuple[Array, Array]:
        there = gradient_after(i)
        pairs = [(selection.of_leaves(there, numbers), selection.of_leaves(gradient, numbers)) for numbers in groups]
        distances = jnp.stack([_trees.norm(_trees.subtract(a, b)) for a, b in pairs])
        cosines = jnp.stack([_trees.cosine(a, b) for a, b in pairs])
        return distances[i], cosines[i]

    norms = jnp.stack([_trees.norm(selection.of_leaves(gradient, numbers)) for numbers in groups])
    zero = jnp.zeros((1,), norms.dtype)
    distance, cosine = zero, jnp.where(norms[:1] > 0, 1, jnp.nan).astype(norms.dtype)
    if len(groups) > 1:
        others = lax.map(of_layer, jnp.asarray(np.arange(1, len(groups))))
        distance, cosine = jnp.concatenate([distance, others[0]]), jnp.concatenate([cosine, others[1]])
    return CovariateShift(tuple(leaves), distance, cosine, norms)
