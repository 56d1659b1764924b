"""Split batch norm, with one scale and bias, and with statistics for each of several kinds of batches or examples."""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from bnjax import _checks
from bnjax._checks import Shape
from bnjax._sync import Moments, placed, with_counts_of_features
from bnjax.norm import BatchStats, Call, Options, Params, Result, batch_norm_of, check_call, init_batch_norm


def init_split_batch_norm(
    num_features: int | tuple[int, ...], num_splits: int, **options: Any
) -> tuple[dict[str, Inexact[Array, "*features"]], dict[str, Inexact[Array, "..."]]]:
    """Returns initial parameters and `num_splits` sets of running statistics, along a leading axis.

    Args:
      num_features: size of the feature axis, or axes.
      num_splits: number of kinds of batches, at least 1.
      **options: options of `bnjax.init_batch_norm`.

    Raises:
      TypeError, ValueError: as `bnjax.init_batch_norm` does, and for a `num_splits` that is no positive int.

    >>> params, batch_stats = init_split_batch_norm(3, 2)
    >>> print(params['scale'].shape, batch_stats['mean'].shape)
    (3,) (2, 3)
    """
    if isinstance(num_splits, bool) or not isinstance(num_splits, int | np.integer) or num_splits < 1:
        raise ValueError(f"num_splits must be a positive int, got {num_splits!r}. Pass 2, for two kinds of batches.")
    params, batch_stats = init_batch_norm(num_features, **options)
    return params, jax.tree.map(lambda v: jnp.broadcast_to(v, (num_splits, *v.shape)), batch_stats)


def split_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    split: Any,
    **options: Unpack[Options],
) -> tuple[Inexact[Array, "..."], BatchStats]:
    """Normalizes with statistics of one of several kinds of batches, such as clean and adversarial ones.

    This is `batch_norm` with `batch_stats` of the kind `split`; the statistics of other kinds stay. Where the batch is
    a mixture, `split` says the kind of each example, and the examples of each kind are a batch by themselves. (For a
    scale and bias of each kind as well, as AdvProp has, choose among several `params` by the same index.)

    Args:
      x: floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes, common to all kinds; either may be absent.
      batch_stats: running 'mean' and 'var' with a leading axis of kinds before the feature axes.
      training: whether to use the batch's statistics and to move the running ones; static.
      split: index of the batch's kind, from 0, or indices `[batch]` of the kinds of the examples, which lie along the
        first axis; may be traced, and then is clipped to the range of kinds.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. A scalar split has to be the same for all members of axis_name.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does; also for statistics without a leading axis,
        or a `split` of another shape, that is no integer, or out of range (where known).

    References:
      Xie et al. 2020 (arXiv 1911.09665), section 4.2 (auxiliary batch norm); Li et al. 2016 (arXiv 1603.04779) and
      Chang et al. 2019 (arXiv 1906.03950) for domains.

    >>> params, batch_stats = init_split_batch_norm(1, 2)
    >>> x = jnp.array([[1.], [3.]])
    >>> y, batch_stats = split_batch_norm(x, params, batch_stats, training=True, split=1, momentum=0.5)
    >>> print(batch_stats['mean'].ravel())
    [0. 1.]
    """
    split = _checked_split(split, _num_splits(batch_stats), jnp.shape(x))
    return split_batch_norm_of(
        check_call(x, params, _of_kind(batch_stats, 0), training, **options), batch_stats, split
    )[:2]


def split_batch_norm_of(call: Call, batch_stats: BatchStats, split: Any) -> Result:
    """Computes `split_batch_norm` of a call, checked with one kind's statistics, and of the statistics of all kinds.

    The moments that it returns have a leading axis of kinds, those without examples a count of zero.
    """
    split = _checked_split(split, _num_splits(batch_stats), call.x.shape)
    if split.ndim == 0:
        y, moved, m = batch_norm_of(dataclasses.replace(call, batch_stats=_of_kind(batch_stats, split)))
        if m is None:
            return y, batch_stats, None
        return y, _put_kind(batch_stats, moved, split), _placed(m, split, _num_splits(batch_stats))
    if 0 in call.axes:
        raise ValueError(f"split may say the kind of each example where axis 0 is the examples', got axis {call.axes}.")
    call, m = dataclasses.replace(call, batch_stats=batch_stats), None
    mean, var = call.running()
    if call.training:
        m = moments_of_kinds(
            lambda weights: dataclasses.replace(call, weights=weights).moments(),
            call.weights, split, _num_splits(batch_stats), call.x.shape,
        )  # fmt: skip
        mean, var = call.batch_statistics(m)
    weights = call.weights
    weights_axis = None if weights is None else 0
    if weights is not None and weights.shape[0] == 1:
        weights, weights_axis = weights[0], None

    def of_example(x: Array, weights: Array | None, mean: Array, var: Array) -> Array:
        of_one = dataclasses.replace(call, x=x, weights=weights, axes=tuple(axis - 1 for axis in call.axes))
        return of_one.output(mean, var)

    mean, var = (_of_examples(values, split) for values in (mean, var))
    y = jax.vmap(of_example, (0, weights_axis, 0, 0))(call.x, weights, mean, var)
    return y, batch_stats if m is None else call.moved(m), m


def _of_examples(values: Array, split: Array) -> Array:
    """Returns the values of each example's kind, by a sum, of which XLA and explicit meshes know how it is split."""
    own = split[:, None] == jnp.arange(values.shape[0])[None]
    own = own.reshape(*own.shape, *(1 for _ in values.shape[1:]))
    return jnp.where(own, values[None], jnp.zeros_like(values)[None]).sum(1)


def moments_of_kinds(
    moments_of: Callable[[Array | None], Moments], weights: Array | None, split: Any, num_splits: int, shape: Shape
) -> Moments:
    """Returns moments with a leading axis of kinds, of which those without examples have a count of zero.

    Args:
      moments_of: computes moments by weights.
      weights: the mask, with as many dimensions as the input; None for none.
      split: the kind of the batch, or of each example.
      num_splits: number of kinds.
      shape: shape of the input.
    """
    split = _checked_split(split, num_splits, shape)
    if split.ndim == 0:
        return _placed(moments_of(weights), split, num_splits)
    is_of_kind = jnp.arange(num_splits)[:, None] == split[None]
    is_of_kind = is_of_kind.reshape((*is_of_kind.shape, *(1 for _ in shape[1:])))
    if weights is None:
        of_kinds = is_of_kind
    elif weights.dtype == bool:
        of_kinds = is_of_kind & weights[None]
    else:
        of_kinds = jnp.where(is_of_kind, weights[None], 0)
    return jax.vmap(lambda weights: with_counts_of_features(moments_of(weights)))(of_kinds)


def _of_kind(batch_stats: BatchStats, split: Any) -> dict[str, Array]:
    """Returns the running statistics of one kind."""
    return {name: jax.lax.dynamic_index_in_dim(value, split, keepdims=False) for name, value in batch_stats.items()}


def _put_kind(batch_stats: BatchStats, own: BatchStats, split: Any) -> BatchStats:
    """Returns the running statistics of all kinds with those of one kind replaced."""
    new = {n: jax.lax.dynamic_update_index_in_dim(v, own[n], split, 0) for n, v in batch_stats.items()}
    return type(batch_stats)(new)  # pyright: ignore[reportCallIssue]


def _placed(m: Moments, split: Array, num_splits: int) -> Moments:
    """Returns moments of all kinds: those of one kind are `m`, and the others' counts are zero."""
    return placed(with_counts_of_features(m), split, num_splits)


def _num_splits(batch_stats: Any) -> int:
    _checks.check_batch_stats(batch_stats)
    shapes = {name: jnp.shape(value) for name, value in batch_stats.items()}
    kinds = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(kinds) > 1 or not min(kinds):
        raise ValueError(
            f"batch_stats must have a leading axis of kinds of batches, got shapes {shapes}. "
            "Make them with bnjax.variants.init_split_batch_norm."
        )
    return kinds.pop()


def _checked_split(split: Any, count: int, shape: Shape) -> Array:
    """Returns the kind, or the kind of each example, as indices in range; raises for other values (where known)."""
    array = isinstance(split, jax.Array | np.ndarray | np.generic)
    is_integer = (
        jnp.issubdtype(split.dtype, jnp.integer) if array else isinstance(split, int) and not isinstance(split, bool)
    )
    if not is_integer or np.shape(split) not in ((), shape[:1]):
        got = f"{split.dtype}{list(split.shape)}" if array else repr(split)
        raise TypeError(
            f"split must be an integer scalar, which of {count} kinds of batches, or an integer array of shape "
            f"{shape[:1]}, the kind of each example, got {got}. Pass 0, say."
        )
    if not isinstance(split, Tracer):
        wrong = [int(kind) for kind in np.unique(np.asarray(split)) if not 0 <= kind < count]
        if wrong:
            raise ValueError(f"split must lie in [0, {count}), the kinds of batches of batch_stats, got {wrong[0]}.")
    return jnp.clip(jnp.asarray(split).astype(jnp.int32), 0, count - 1)
