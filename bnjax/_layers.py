"""The common part of the layers of `bnjax.linen` and `bnjax.nnx`: their functions and kinds of running statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax._sync import Moments
from bnjax.norm import BatchStats, Normalized, check_call, normalized_by_batch, update_batch_stats
from bnjax.variants.frozen import frozen
from bnjax.variants.ghost import normalized_by_ghosts
from bnjax.variants.lp import normalized_by_norm
from bnjax.variants.moving import moving
from bnjax.variants.noisy import with_noise
from bnjax.variants.renorm import renormalized
from bnjax.variants.split import checked_split, of_kind, put_kind


class Statistics(NamedTuple):
    """The kind of running statistics that a layer has; training, losses, inference and description read it.

    Attributes:
      is_variance: whether 'var' is the variance of the layer's input, so that it can be measured from data.
      merges: whether the statistics of several parts of the data, merged as moments, are those of all of it.
      moves: whether training moves the statistics.
      kinds: number of sets of statistics along a leading axis, for as many kinds of batches; None for a single set.
      are_given: whether the layer, called on parts of a batch, gives the moments of each in place of moving its
        statistics, as Flax's layers can't.
    """

    is_variance: bool = True
    merges: bool = True
    moves: bool = True
    kinds: int | None = None
    are_given: bool = True


FLAX = Statistics(are_given=False)
"""The running statistics of Flax's own batch norms."""


class Declaration(NamedTuple):
    """The declaration of a layer: its function, the function's options, and its running statistics.

    Attributes:
      normalized: the function that the layer computes, of a checked call and of `options`.
      options: names of the layer's attributes that are options of the function.
      statistics: the kind of running statistics; the layer itself knows for how many kinds of batches it has them.
      or_complex: whether the layer takes complex inputs.
    """

    normalized: Callable[..., Normalized]
    options: tuple[str, ...] = ()
    statistics: Statistics = Statistics()
    or_complex: bool = True


NOISE = ("unit_shift", "unit_scale", "sample_shift", "sample_scale")
BATCH_NORM = Declaration(normalized_by_batch)
# The noise is drawn for a batch as a whole, so that its parts can't be normalized one after the other.
NOISY = Declaration(with_noise, NOISE, Statistics(are_given=False), or_complex=False)
LP = Declaration(normalized_by_norm, ("p",), Statistics(is_variance=False, merges=False), or_complex=False)
RENORM = Declaration(renormalized, ("r_max", "d_max"), or_complex=False)
GHOST = Declaration(normalized_by_ghosts, ("ghost_size",), Statistics(merges=False), or_complex=False)
MOVING = Declaration(moving)
FROZEN = Declaration(frozen, statistics=Statistics(moves=False))
SPLIT = Declaration(normalized_by_batch)


def call_layer(
    layer: Any,
    x: Any,
    params: Any,
    batch_stats: Any,
    *,
    training: bool,
    split: Any = None,
    key: Any = None,
    **options: Any,
) -> tuple[jax.Array, BatchStats, Moments | None]:
    """Calls the function of a layer.

    Args:
      layer: layer of linen or nnx, with `declared`, `statistics`, and attributes that are named in its declaration.
      x: the input.
      params: 'scale' and 'bias'.
      batch_stats: running 'mean' and 'var', of all kinds.
      training: whether to use the batch's statistics.
      split: index of the batch's kind, where the layer has several.
      key: random key, for noise in training.
      **options: options of `bnjax.batch_norm`.

    Returns:
      The output, the running statistics after the call, and the moments towards which they moved, None if they did not.
      Where there are several kinds the moments too have a leading axis, with a count of zero for the others. A layer
      whose `takes_batch_statistics` is set has the batch's statistics in place of running ones afterwards.
    """
    declared, kinds = layer.declared, layer.statistics.kinds
    own = batch_stats
    if kinds is not None:
        split = checked_split(split, kinds)
        own = of_kind(batch_stats, split)
    call = check_call(
        x,
        params,
        own,
        training,
        bessel_correction=getattr(layer, "bessel_correction", False),
        or_complex=declared.or_complex,
        **options,
    )
    named = {name: getattr(layer, name) for name in declared.options}
    if declared is NOISY:
        named["key"] = key
    y, moved, m = declared.normalized(call, **named)
    if m is None:
        return y, batch_stats, None
    if kinds is not None:
        moved = put_kind(batch_stats, moved, split)
        counted = m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))
        m = jax.tree.map(lambda v: jnp.zeros((kinds, *v.shape), v.dtype).at[split].set(v), counted)
    if layer.takes_batch_statistics:
        moved = update_batch_stats(batch_stats, m, momentum=0)
    return y, moved, m
