"""Batch norm and its variants as Flax nnx layers: drop-in replacements for `flax.nnx.BatchNorm`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import rnglib
from jaxtyping import ArrayLike

from bnjax import _checks, _compat, _layers
from bnjax._functional import functional, update
from bnjax._layers import MOMENTS_OF_CALLS, Statistics, kept_moments
from bnjax._nnx_pairs import ConvBatchNorm, DenseBatchNorm
from bnjax._product import Product
from bnjax.variants import init_split_batch_norm

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "ConvBatchNorm",
    "DenseBatchNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "LpBatchNorm",
    "MovingBatchNorm",
    "NoisyBatchNorm",
    "SplitBatchNorm",
    "functional",
    "update",
]


def statistics_of(module: Any) -> Statistics | None:
    """Returns the kind of running statistics of a batch norm of `bnjax.nnx` or of Flax; None for other modules."""
    if isinstance(module, _Normalizer):
        return module.statistics
    return _layers.FLAX if isinstance(module, nnx.BatchNorm) else None


class _Normalizer(nnx.BatchNorm):
    """The base of all layers, with their arguments, variables and call; each layer declares its function."""

    declared = _layers.BATCH_NORM
    takes_batch_statistics = keeps_moments = False

    @property
    def statistics(self) -> Statistics:
        """The kind of running statistics that the layer has."""
        return self.declared.statistics

    def __init__(self, num_features: int, **kwargs: Any):
        super().__init__(num_features, **kwargs)

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalizes `x`, and moves the running statistics where the batch's are used.

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; takes precedence over the constructor's.
          mask: boolean, 0/1 or sample weights, as in `bnjax.batch_norm`.

        Returns:
          An array of the shape of `x`.
        """
        return self._call(x, use_running_average, mask)

    def _call(self, x, use_running_average, mask, **call_options):
        """Calls the layer's function, with `call_options` besides the attributes."""
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg=f"use_running_average must be given to {type(self).__name__}'s constructor, to its call, or by "
            "the model's train() or eval().",
        )
        x = x if isinstance(x, Product) else jnp.asarray(x)
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        values = (x, self.mean[...], self.var[...], scale, bias)
        promote = _compat.promotion_of_ones_own(self)
        if promote is not None:
            promoted = promote(values, dtype=self.dtype)
            dtype = promoted[0].dtype
            values = (promoted[0], *values[1:3], *promoted[3:])  # the running statistics move unrounded, as in Flax
        else:
            dtype = _compat.result_dtype(self, jnp.zeros((), x.dtype), *values[1:])
            if not isinstance(x, Product) and not jnp.issubdtype(x.dtype, jnp.inexact):
                values = (x.astype(dtype), *values[1:])
        x, mean, var, scale, bias = values
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
            mean = mean.astype(jnp.promote_types(mean.dtype, x.dtype))
            _compat.set_value(self.mean, mean)
        y, batch_stats, m = _layers.call_layer(
            self,
            x,
            {k: v for k, v in (("scale", scale), ("bias", bias)) if v is not None},
            {"mean": mean, "var": var},
            training=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=_checks.flax_mask(mask, x.shape, self.axis),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=dtype,
            key=None if use_running_average or self.takes_batch_statistics else self._key(),
            **self._own_options(not use_running_average),
            **call_options,
        )
        if m is not None and self.keeps_moments:
            kept = getattr(self, MOMENTS_OF_CALLS, None)
            calls = () if kept is None else _compat.get_value(kept)
            setattr(self, MOMENTS_OF_CALLS, nnx.BatchStat((*calls, kept_moments(self, m))))
        elif m is not None:
            if not self.takes_batch_statistics:  # as in Flax since 0.12, no derivative goes through variables
                batch_stats = jax.lax.stop_gradient(batch_stats)
            for name in ("mean", "var"):
                _compat.set_value(getattr(self, name), batch_stats[name])
            self._count_step()
        return y

    def _own_options(self, training: bool) -> dict[str, Any]:
        """Returns options of the layer's function that are not its attributes as they are."""
        return {}

    def _count_step(self) -> None:
        """Counts a call that has moved the running statistics, in layers that do."""

    def _key(self) -> Any:
        """Returns the random key of the call's noise, or None for layers without noise."""
        return None


class BatchNorm(_Normalizer):
    """`flax.nnx.BatchNorm` computed by `bnjax.batch_norm`, with the same constructor, variables and names.

    Differences: the variance is numerically robust whether `use_fast_variance` is set or not (the argument is accepted
    and changes nothing), masks may be real sample weights and have the first dimensions of the input where they have
    fewer (`[batch]`), devices' moments are merged by their counts, a fully masked batch leaves the running statistics
    alone, and inputs are not rounded to `dtype` before use (a user's own
    `promote_dtype` is applied to input, scale and bias as in Flax). For complex inputs the mean becomes complex.

    Args:
      num_features: size of the feature axis.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1), as PyTorch's does.
      **kwargs: every other argument of `flax.nnx.BatchNorm`.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm
    >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    def __init__(self, num_features: int, *, bessel_correction: bool = False, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.bessel_correction = bessel_correction


class NoisyBatchNorm(BatchNorm):
    """`bnjax.variants.noisy_batch_norm` as a layer: `BatchNorm`, then noise where the batch's statistics are used.

    Each call draws a new key from the stream 'noise' of the constructor's `rngs` (or 'default'), as `nnx.Dropout` does
    from 'dropout'.

    Args:
      num_features: size of the feature axis.
      unit_shift: half-width of the uniform distribution about 0 of each unit's mean shift.
      unit_scale: upper end of the uniform distribution from 1 of each unit's mean scale.
      sample_shift: half-width of the uniform distribution of a sample's shift about its unit's.
      sample_scale: standard deviation of the normal distribution of a sample's scale about its unit's.
      rngs: random streams.
      **kwargs: every other argument of `BatchNorm`.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Algorithm 1.

    >>> from flax import nnx
    >>> from bnjax.nnx import NoisyBatchNorm
    >>> layer = NoisyBatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.NOISY
    rng_collection = "noise"

    def __init__(
        self,
        num_features: int,
        *,
        unit_shift: Any = 0.5,
        unit_scale: Any = 1.25,
        sample_shift: Any = 0.1,
        sample_scale: Any = 0.1,
        rngs: rnglib.Rngs,
        **kwargs: Any,
    ):
        super().__init__(num_features, rngs=rngs, **kwargs)
        self.unit_shift, self.unit_scale = unit_shift, unit_scale
        self.sample_shift, self.sample_scale = sample_shift, sample_scale
        self.rngs = rngs["noise"].fork()

    def _key(self) -> Any:
        return self.rngs()


class LpBatchNorm(_Normalizer):
    """`bnjax.variants.lp_batch_norm` as a layer: `BatchNorm` with an l_p norm in place of the standard deviation.

    Args:
      num_features: size of the feature axis.
      p: 1, 2 or `math.inf`.
      **kwargs: every other argument of `flax.nnx.BatchNorm`.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), section 3.3.

    >>> from flax import nnx
    >>> from bnjax.nnx import LpBatchNorm
    >>> layer = LpBatchNorm(3, p=1, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.LP

    def __init__(self, num_features: int, *, p: float, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.p = p


class BatchRenorm(BatchNorm):
    """`bnjax.variants.batch_renorm` as a layer: `BatchNorm`, in training moved towards what inference gives.

    Args:
      num_features: size of the feature axis.
      r_max: limit of the correction of the deviation, at least 1.
      d_max: limit of the correction of the mean, in running deviations. Set both before a step for a schedule.
      warmup_steps: number of training calls, counted in the variable `steps`, before the limits count: before that the
        layer is plain batch norm. The limits are variables as well then. None without a counter.
      **kwargs: every other argument of `BatchNorm`.

    References:
      Ioffe 2017 (arXiv 1702.03275), Algorithm 1; section 4 for the schedules.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchRenorm
    >>> layer = BatchRenorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.RENORM

    def __init__(
        self, num_features: int, *, r_max: Any = 3.0, d_max: Any = 5.0, warmup_steps: Any = None, **kwargs: Any
    ):
        super().__init__(num_features, **kwargs)
        self.warmup_steps = warmup_steps
        if warmup_steps is None:
            self.r_max, self.d_max = r_max, d_max
        else:
            self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
            self.r_max, self.d_max = (nnx.BatchStat(jnp.asarray(limit, jnp.float32)) for limit in (r_max, d_max))

    def _own_options(self, training):
        if self.warmup_steps is None:
            return {}
        limits = {"r_max": self.r_max[...], "d_max": self.d_max[...]}
        return _layers.limits_after_warmup(training, self.steps[...], self.warmup_steps, **limits)

    def _count_step(self):
        if self.warmup_steps is not None:
            self.steps[...] += 1


class GhostBatchNorm(BatchNorm):
    """`bnjax.variants.ghost_batch_norm` as a layer: `BatchNorm` of each `ghost_size` examples by themselves.

    Args:
      num_features: size of the feature axis.
      ghost_size: examples in a ghost batch.
      **kwargs: every other argument of `BatchNorm`; `axis_name` averages running statistics only.

    References:
      Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741), Algorithm 1.

    >>> from flax import nnx
    >>> from bnjax.nnx import GhostBatchNorm
    >>> layer = GhostBatchNorm(3, ghost_size=2, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.GHOST

    def __init__(self, num_features: int, *, ghost_size: int, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.ghost_size = ghost_size


class MovingBatchNorm(BatchNorm):
    """`bnjax.variants.moving_batch_norm` as a layer: `BatchNorm` by the running statistics in training too.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 2, on what a gradient that ignores the normalization does;
      Ioffe 2017 (arXiv 1702.03275), which reports that it does not work; Yan et al. 2020 (arXiv 2001.06838).

    >>> from flax import nnx
    >>> from bnjax.nnx import MovingBatchNorm
    >>> layer = MovingBatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.MOVING


class FrozenBatchNorm(_Normalizer):
    """`bnjax.variants.frozen_batch_norm` as a layer: `BatchNorm` by running statistics that never move.

    References:
      He et al. 2016 (arXiv 1512.03385), appendix A, which fixes batch norms in detection networks; Wu & Johnson
      2021 (arXiv 2105.07576).

    >>> from flax import nnx
    >>> from bnjax.nnx import FrozenBatchNorm
    >>> layer = FrozenBatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    declared = _layers.FROZEN


class SplitBatchNorm(BatchNorm):
    """`bnjax.variants.split_batch_norm` as a layer: `BatchNorm` with statistics for each of several kinds of batches.

    Args:
      num_features: size of the feature axis.
      num_splits: number of kinds of batches; `mean` and `var` have a leading axis of kinds.
      **kwargs: every other argument of `BatchNorm`.

    References:
      Xie et al. 2020 (arXiv 1911.09665), section 4.2 (auxiliary batch norm); Li et al. 2016 (arXiv 1603.04779) and
      Chang et al. 2019 (arXiv 1906.03950) for domains.

    >>> from flax import nnx
    >>> from bnjax.nnx import SplitBatchNorm
    >>> layer = SplitBatchNorm(3, num_splits=2, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)), split=1)
    >>> layer.mean[...].shape
    (2, 3)
    """

    declared = _layers.SPLIT

    def __init__(self, num_features: int, *, num_splits: int, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        _, batch_stats = init_split_batch_norm(num_features, num_splits)
        self.num_splits = num_splits
        self.mean, self.var = nnx.BatchStat(batch_stats["mean"]), nnx.BatchStat(batch_stats["var"])

    @property
    def statistics(self) -> Statistics:
        """The kind of running statistics that the layer has."""
        return self.declared.statistics._replace(kinds=self.num_splits)

    def __call__(self, x, use_running_average: bool | None = None, *, split: Any, mask: ArrayLike | None = None):
        """Normalizes `x`, and moves the running statistics of its kinds where the batch's are used.

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; takes precedence over the constructor's.
          split: index of the batch's kind, from 0, or indices `[batch]` of the examples' kinds; may be traced.
          mask: boolean, 0/1 or sample weights, as in `bnjax.batch_norm`.

        Returns:
          An array of the shape of `x`.
        """
        return self._call(x, use_running_average, mask, split=split)
