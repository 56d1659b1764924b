"""Split batch norm, with one scale and bias, and with statistics for each of several kinds of batches."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Inexact, Shaped

from bnjax import _checks
from bnjax._sync import Moments, placed, with_counts_of_features
from bnjax.norm import BatchStats, Options, Params, batch_norm_of, check_call, init_batch_norm


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
    """Normalizes with running statistics of one of several kinds of batches, such as clean and adversarial batches.

    This is `batch_norm` with `batch_stats` of the kind `split`; the statistics of other kinds stay. (For a scale and
    bias of each kind as well, as AdvProp has, choose among several `params` by the same index.)

    Args:
      x: floating-point array of any shape, empty included; all of it of one kind.
      params: 'scale' and 'bias' of the shape of the feature axes, common to all kinds; either may be absent.
      batch_stats: running 'mean' and 'var' with a leading axis of kinds before the feature axes.
      training: whether to use the batch's statistics and to move the running ones; static.
      split: index of the batch's kind, from 0; may be traced, and then is clipped to the range of kinds.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. The split has to be the same for all members of axis_name.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does; also for statistics without a leading axis,
        or a `split` that is no integer or out of range (where known).

    References:
      Xie et al. 2020 (arXiv 1911.09665), section 4.2 (auxiliary batch norm); Li et al. 2016 (arXiv 1603.04779) and
      Chang et al. 2019 (arXiv 1906.03950) for domains.

    >>> params, batch_stats = init_split_batch_norm(1, 2)
    >>> x = jnp.array([[1.], [3.]])
    >>> y, batch_stats = split_batch_norm(x, params, batch_stats, training=True, split=1, momentum=0.5)
    >>> print(batch_stats['mean'].ravel())
    [0. 1.]
    """
    split = checked_split(split, _num_splits(batch_stats))
    call = check_call(x, params, of_kind(batch_stats, split), training, **options)
    y, moved, _ = batch_norm_of(call)
    return y, put_kind(batch_stats, moved, split) if call.training else batch_stats


def of_kind(batch_stats: BatchStats, split: Any) -> dict[str, Array]:
    """Returns the running statistics of one kind."""
    return {name: jax.lax.dynamic_index_in_dim(value, split, keepdims=False) for name, value in batch_stats.items()}


def put_kind(batch_stats: BatchStats, own: BatchStats, split: Any) -> BatchStats:
    """Returns the running statistics of all kinds with those of one kind replaced."""
    new = {n: jax.lax.dynamic_update_index_in_dim(v, own[n], split, 0) for n, v in batch_stats.items()}
    return type(batch_stats)(new)  # pyright: ignore[reportCallIssue]


def moments_of_kinds(m: Moments, split: Any, num_splits: int) -> Moments:
    """Returns moments with a leading axis of kinds, those of one kind being `m` and the others' counts zero."""
    return placed(with_counts_of_features(m), jnp.asarray(split), num_splits)


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


def checked_split(split: Any, count: int) -> Array:
    """Returns the kind as an index in range; raises unless it is an integer scalar, in range where this is known."""
    array = isinstance(split, jax.Array | np.ndarray | np.generic)
    is_integer = (
        jnp.issubdtype(split.dtype, jnp.integer) if array else isinstance(split, int) and not isinstance(split, bool)
    )
    if not is_integer or np.shape(split):
        raise TypeError(
            f"split must be an integer scalar, which of {count} kinds of batches, got {split!r}. Pass 0, say."
        )
    if not isinstance(split, Tracer) and not 0 <= int(split) < count:
        raise ValueError(f"split must lie in [0, {count}), the kinds of batches of batch_stats, got {int(split)}.")
    return jnp.clip(jnp.asarray(split).astype(jnp.int32), 0, count - 1)
