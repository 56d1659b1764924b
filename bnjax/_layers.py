"""The common part of the layers of `bnjax.linen` and `bnjax.nnx`: their functions and kinds of running statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax._fold import product_batch_norm_of
from bnjax._product import Product
from bnjax._sync import Moments, match_explicit_sharding, with_counts_of_features
from bnjax.norm import BatchStats, Result, batch_norm_of, check_call, update_batch_stats
from bnjax.variants.frozen import frozen_batch_norm_of
from bnjax.variants.ghost import ghost_batch_norm_of
from bnjax.variants.lp import lp_batch_norm_of
from bnjax.variants.moving import moving_batch_norm_of
from bnjax.variants.noisy import noisy_batch_norm_of
from bnjax.variants.renorm import batch_renorm_of
from bnjax.variants.split import split_batch_norm_of


class Statistics(NamedTuple):
    """The kind of running statistics that a layer has; training, losses, inference and description read it.

    Attributes:
      is_variance: whether 'var' is the variance of the layer's input, so that it can be measured from data.
      merges: whether the statistics of several parts of the data, merged as moments, are those of all of it. They are
        not where 'var' is something else (`LpBatchNorm`) or an average of parts (`GhostBatchNorm`).
      moves: whether training moves the statistics.
      kinds: number of sets of statistics along a leading axis, for as many kinds of batches; None for a single set.
      are_given: whether the layer, called on parts of a batch one after the other, gives the moments of each in place
        of moving its statistics. Flax's layers don't, and `NoisyBatchNorm` has one draw for a whole batch.
    """

    is_variance: bool = True
    merges: bool = True
    moves: bool = True
    kinds: int | None = None
    are_given: bool = True


FLAX = Statistics(are_given=False)
"""The running statistics of Flax's own batch norms."""


MOMENTS_OF_CALLS = "moments of calls"
"""The variable in which a layer with `keeps_moments` keeps them, by call, in place of moving its statistics."""


def kept_moments(layer: Any, m: Moments) -> dict[str, Any]:
    """Returns the moments of a call with what is needed to move the layer's running statistics towards them.

    All of it has the shape of the statistics, so that Flax's transforms stack it along the axis that these have.
    """
    m = with_counts_of_features(m)
    how = {"momentum": layer.momentum, "bessel_correction": layer.bessel_correction}

    def of_features(value: Any) -> jax.Array:
        return match_explicit_sharding(jnp.broadcast_to(jnp.asarray(value), m.var.shape), m.var)

    return {"moments": m, **jax.tree.map(of_features, how)}


class Declaration(NamedTuple):
    """The declaration of a layer: its function, the function's options, and its running statistics.

    Attributes:
      function: the function that the layer computes, of a checked call and of `options`.
      options: names of the layer's attributes that are options of the function.
      statistics: the kind of running statistics; the layer itself knows for how many kinds of batches it has them.
      or_complex: whether the layer takes complex inputs.
      needs_key: whether the function takes a random key, too.
      is_of_batch: whether training normalizes by the batch's statistics alone, without noise and without running ones.
    """

    function: Callable[..., Result]
    options: tuple[str, ...] = ()
    statistics: Statistics = Statistics()
    or_complex: bool = True
    needs_key: bool = False
    is_of_batch: bool = True


def limits_after_warmup(training: bool, steps: Any, warmup_steps: Any, r_max: Any, d_max: Any) -> dict[str, Any]:
    """Returns the limits of batch renorm after a number of steps: those of plain batch norm before the warm-up ends."""
    if not training:  # inference takes no limits, and should compute nothing of them
        return {"r_max": r_max, "d_max": d_max}
    is_warm = steps >= warmup_steps
    r_max, d_max = (jnp.asarray(limit, jnp.float32) for limit in (r_max, d_max))
    return {"r_max": jnp.where(is_warm, r_max, 1.0), "d_max": jnp.where(is_warm, d_max, 0.0)}


NOISE = ("unit_shift", "unit_scale", "sample_shift", "sample_scale")
BATCH_NORM = Declaration(batch_norm_of)
NOISY = Declaration(
    noisy_batch_norm_of, NOISE, Statistics(are_given=False), or_complex=False, needs_key=True, is_of_batch=False
)
LP = Declaration(lp_batch_norm_of, ("p",), Statistics(is_variance=False, merges=False), or_complex=False)
RENORM = Declaration(batch_renorm_of, ("r_max", "d_max"), or_complex=False, is_of_batch=False)
GHOST = Declaration(ghost_batch_norm_of, ("ghost_size",), Statistics(merges=False), or_complex=False)
MOVING = Declaration(moving_batch_norm_of, is_of_batch=False)
FROZEN = Declaration(frozen_batch_norm_of, statistics=Statistics(moves=False))
SPLIT = Declaration(split_batch_norm_of)  # also of the statistics of all kinds, which `call_layer` gives


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
      layer: layer of linen or nnx, with `declared`, `statistics`, `takes_batch_statistics`, and attributes that are
        named in its declaration; its `bessel_correction` counts where it has one.
      x: the input, or the product that it would be, for layers that compute `batch_norm`.
      params: 'scale' and 'bias'.
      batch_stats: running 'mean' and 'var', of all kinds.
      training: whether to use the batch's statistics.
      split: index of the batch's kind, or of each example's, where the layer has several.
      key: random key, for noise in training.
      **options: options of `bnjax.batch_norm`, and those of the layer's function that are not its attributes'.

    Returns:
      The output, the running statistics after the call, and the moments towards which they moved, None if they did not.
      Where there are several kinds the moments too have a leading axis, with a count of zero for the others. A layer
      whose `takes_batch_statistics` is set has the batch's statistics in place of running ones afterwards, and is
      normalized by them alone.
    """
    declared, kinds = layer.declared, layer.statistics.kinds
    own = {name: options.pop(name) for name in declared.options if name in options}
    if layer.takes_batch_statistics and not declared.is_of_batch:
        declared = BATCH_NORM
    call = check_call(
        x,
        params,
        batch_stats if kinds is None else {name: values[0] for name, values in batch_stats.items()},
        training,
        bessel_correction=getattr(layer, "bessel_correction", False),
        or_complex=declared.or_complex,
        **options,
    )
    named = {name: own[name] if name in own else getattr(layer, name) for name in declared.options}
    if declared.needs_key:
        named["key"] = key
    if kinds is not None:
        named |= {"batch_stats": batch_stats, "split": split}
    function = product_batch_norm_of if isinstance(x, Product) else declared.function
    y, moved, m = function(call, **named)
    if m is not None and layer.takes_batch_statistics:
        moved = update_batch_stats(batch_stats, m, momentum=0)  # biased, as inference by them would be training
    return y, moved, m
