"""Batch norm and its variants as Flax linen layers: drop-in replacements for `flax.linen.BatchNorm`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError
from flax.linen import dtypes
from jaxtyping import ArrayLike

from bnjax import _checks, _layers
from bnjax._layers import MOMENTS_OF_CALLS, Statistics, kept_moments
from bnjax._linen_pairs import ConvBatchNorm as ConvBatchNorm
from bnjax._linen_pairs import DenseBatchNorm as DenseBatchNorm
from bnjax._product import Product


def statistics_of(module: nn.Module) -> Statistics | None:
    """Returns the kind of running statistics of a batch norm of `bnjax.linen` or of Flax; None for other modules."""
    if isinstance(module, _Normalizer):
        return module.statistics
    return _layers.FLAX if isinstance(module, nn.BatchNorm) else None


class _Normalizer(nn.BatchNorm):
    """The base of all layers, with their arguments, variables and call; each layer declares its function."""

    declared = _layers.BATCH_NORM
    takes_batch_statistics = keeps_moments = False

    axis: int | Sequence[int] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: str | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: Any = 0.99

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalizes `x`, and moves the running statistics where the batch's are used (not during initialization).

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; given in the call or in the constructor.
          mask: boolean, 0/1 or sample weights, as in `bnjax.batch_norm`.

        Returns:
          An array of the shape of `x`.
        """
        return self._call(x, use_running_average, mask)

    @property
    def statistics(self) -> Statistics:
        """The kind of running statistics that the layer has."""
        return self.declared.statistics

    @nn.nowrap
    def _call(self, x, use_running_average, mask, **call_options):
        """Calls the layer's function, with `call_options` besides the attributes."""
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = x if isinstance(x, Product) else jnp.asarray(x)
        features = tuple(x.shape[a] for a in _checks.feature_axes(self.axis, x.ndim))
        kinds = () if self.statistics.kinds is None else (self.statistics.kinds,)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean_dtype = jnp.promote_types(stats_dtype, x.dtype) if jnp.iscomplexobj(x) else stats_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, kinds + features, mean_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, kinds + features, stats_dtype)
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        dtype = dtypes.canonicalize_dtype(jnp.zeros((), x.dtype), *params.values(), dtype=self.dtype)
        y, batch_stats, m = _layers.call_layer(
            self,
            x if isinstance(x, Product) or jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype),
            params,
            {"mean": mean.value.astype(mean_dtype) if jnp.iscomplexobj(x) else mean.value, "var": var.value},
            training=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=_checks.flax_mask(mask, x.shape, self.axis),
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            dtype=dtype,
            key=None if use_running_average or self.takes_batch_statistics else self._key(),
            **self._own_options(not use_running_average),
            **call_options,
        )
        if m is not None and not self.is_initializing():
            if self.keeps_moments:
                # A model that Flax's transforms scan or map takes its statistics along.
                self.sow("batch_stats", MOMENTS_OF_CALLS, kept_moments(self, m))
            else:
                mean.value, var.value = batch_stats["mean"], batch_stats["var"]
                self._count_step()
        return y

    @nn.nowrap
    def _own_options(self, training: bool) -> dict[str, Any]:
        """Returns options of the layer's function that are not its attributes as they are."""
        return {}

    @nn.nowrap
    def _count_step(self) -> None:
        """Counts a call that has moved the running statistics, in layers that do."""

    @nn.nowrap
    def _key(self) -> Any:
        """Returns the random key of the call's noise, or None for layers without noise."""
        return None


class BatchNorm(_Normalizer):
    """`flax.linen.BatchNorm` computed by `bnjax.batch_norm`, with the same arguments, variables and names.

    Differences: the variance is numerically robust whether `use_fast_variance` is set or not (the argument is accepted
    and changes nothing), masks may be real sample weights and have the first dimensions of the input where they have
    fewer (`[batch]`), devices' moments are merged by their counts, a fully masked batch leaves the running statistics
    alone, and these keep their dtype (for complex inputs the mean is complex from the start). Where the collection
    'moments' is mutable, the batch's `Moments` are sown into it as 'batch' and the running statistics stay.

    Attributes:
      use_running_average: whether to normalize by the running statistics and leave them as they are.
      axis: feature axis or axes of the input.
      momentum: weight of the old running value; may be traced.
      epsilon: number added to the variance.
      dtype: dtype of the result; inferred from the input and the parameters by default.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a 'bias'.
      use_scale: whether there is a 'scale'.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: mapped axis over which to merge the moments; need not be bound during initialization.
      axis_index_groups: groups of indices of that axis that are normalized separately.
      use_fast_variance: accepted, without effect.
      force_float32_reductions: if false, the running statistics have `param_dtype`; they are computed in float32 still.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1), as PyTorch's does.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2.

    >>> import flax.linen as nn
    >>> from bnjax.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(4), BatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.BATCH_NORM

    bessel_correction: bool = False


class NoisyBatchNorm(_Normalizer):
    """`bnjax.variants.noisy_batch_norm` as a layer: `BatchNorm`, then noise where the batch's statistics are used.

    Arguments, variables and names are those of `BatchNorm`, but for the strengths of the noise. Its key comes from
    Flax's random stream 'noise': `model.apply(variables, x, rngs={'noise': key}, …)`, with a new key for each step.

    Attributes:
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).
      unit_shift: half-width of the uniform distribution about 0 of each unit's mean shift.
      unit_scale: upper end of the uniform distribution from 1 of each unit's mean scale.
      sample_shift: half-width of the uniform distribution of a sample's shift about its unit's.
      sample_scale: standard deviation of the normal distribution of a sample's scale about its unit's.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Algorithm 1.

    >>> import flax.linen as nn
    >>> from bnjax.linen import NoisyBatchNorm
    >>> model = nn.Sequential([nn.Dense(4), NoisyBatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> rngs = {'noise': jax.random.key(1)}
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), rngs=rngs, mutable=['batch_stats'])
    """

    declared = _layers.NOISY

    bessel_correction: bool = False
    unit_shift: Any = 0.5
    unit_scale: Any = 1.25
    sample_shift: Any = 0.1
    sample_scale: Any = 0.1

    def _key(self):
        try:
            return self.make_rng("noise")
        except InvalidRngError as error:
            raise ValueError(
                f"rngs must have a key named 'noise' where {'/'.join(self.path) or 'NoisyBatchNorm'} uses the batch's "
                "statistics, got none. Pass rngs={'noise': key} to apply, with a new key for each step."
            ) from error


class LpBatchNorm(_Normalizer, kw_only=True):
    """`bnjax.variants.lp_batch_norm` as a layer: `BatchNorm` with an l_p norm in place of the standard deviation.

    Arguments, variables and names are those of `BatchNorm`, but for `p` and without `bessel_correction`; the running
    'var' is that of the squared norm.

    Attributes:
      p: 1, 2 or `math.inf`.

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), section 3.3.

    >>> import flax.linen as nn
    >>> from bnjax.linen import LpBatchNorm
    >>> model = nn.Sequential([nn.Dense(4), LpBatchNorm(p=1, use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.LP

    p: float


_LIMITS = {"r_max": 3.0, "d_max": 5.0}  # those at the end of the paper's schedule


class BatchRenorm(_Normalizer):
    """`bnjax.variants.batch_renorm` as a layer: `BatchNorm`, in training moved towards what inference gives.

    Arguments, variables and names are those of `BatchNorm`, but for the two limits and their warm-up. The limits may be
    traced: a schedule makes the model in the step, with the limits of that step. With `warmup_steps` the layer counts
    its training calls itself, and is plain batch norm for so many: 'batch_stats' then also has 'steps', 'r_max' and
    'd_max', as in the layers of CrossQ, SBX and PureJaxQL, whose checkpoints it takes.

    Attributes:
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).
      r_max: limit of the correction of the deviation, at least 1; by default 3, or that of 'batch_stats'.
      d_max: limit of the correction of the mean, in running deviations; by default 5, or that of 'batch_stats'.
      warmup_steps: number of training calls before the limits count; None without a counter.

    References:
      Ioffe 2017 (arXiv 1702.03275), Algorithm 1; section 4 for the schedules.

    >>> import flax.linen as nn
    >>> from bnjax.linen import BatchRenorm
    >>> model = nn.Sequential([nn.Dense(4), BatchRenorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.RENORM

    bessel_correction: bool = False
    r_max: Any = None
    d_max: Any = None
    warmup_steps: Any = None

    @nn.nowrap
    def _own_options(self, training):
        limits = {name: getattr(self, name) for name in _LIMITS}
        if self.warmup_steps is None:
            return {name: _LIMITS[name] if limit is None else limit for name, limit in limits.items()}
        for name, limit in limits.items():
            start = _LIMITS[name] if limit is None else limit
            kept = self.variable("batch_stats", name, lambda start=start: jnp.asarray(start, jnp.float32))
            limits[name] = kept.value if limit is None else limit
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        return _layers.limits_after_warmup(training, steps.value, self.warmup_steps, **limits)

    @nn.nowrap
    def _count_step(self):
        if self.warmup_steps is not None:
            self.put_variable("batch_stats", "steps", self.get_variable("batch_stats", "steps") + 1)


class GhostBatchNorm(_Normalizer, kw_only=True):
    """`bnjax.variants.ghost_batch_norm` as a layer: `BatchNorm` of each `ghost_size` examples by themselves.

    Arguments, variables and names are those of `BatchNorm`, and the size; `axis_name` averages running statistics only.

    Attributes:
      ghost_size: examples in a ghost batch.
      bessel_correction: whether the running variance takes each ghost batch's times n / (n − 1).

    References:
      Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741), Algorithm 1.

    >>> import flax.linen as nn
    >>> from bnjax.linen import GhostBatchNorm
    >>> model = nn.Sequential([nn.Dense(4), GhostBatchNorm(ghost_size=2, use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.GHOST

    ghost_size: int
    bessel_correction: bool = False


class MovingBatchNorm(_Normalizer):
    """`bnjax.variants.moving_batch_norm` as a layer: `BatchNorm` by the running statistics in training too.

    Arguments, variables and names are those of `BatchNorm`. Where the batch's statistics would be used the running ones
    move before they are.

    Attributes:
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 2, on what a gradient that ignores the normalization does;
      Ioffe 2017 (arXiv 1702.03275), which reports that it does not work; Yan et al. 2020 (arXiv 2001.06838).

    >>> import flax.linen as nn
    >>> from bnjax.linen import MovingBatchNorm
    >>> model = nn.Sequential([nn.Dense(4), MovingBatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.MOVING

    bessel_correction: bool = False


class FrozenBatchNorm(_Normalizer):
    """`bnjax.variants.frozen_batch_norm` as a layer: `BatchNorm` by running statistics that never move.

    Arguments, variables and names are those of `BatchNorm`, so that its variables can be loaded into one of its name
    (automatic ones are the class's: `FrozenBatchNorm_0`); scale and bias get no gradient.

    References:
      He et al. 2016 (arXiv 1512.03385), appendix A, which fixes batch norms in detection networks; Wu & Johnson
      2021 (arXiv 2105.07576).

    >>> import flax.linen as nn
    >>> from bnjax.linen import FrozenBatchNorm
    >>> model = nn.Sequential([nn.Dense(4), FrozenBatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    declared = _layers.FROZEN


class SplitBatchNorm(_Normalizer, kw_only=True):
    """`bnjax.variants.split_batch_norm` as a layer: `BatchNorm` with statistics for each of several kinds of batches.

    Arguments and names are those of `BatchNorm`; 'mean' and 'var' have a leading axis of kinds, and the call says of
    which the batch is, or each of its examples. Scale and bias are common to all.

    Attributes:
      num_splits: number of kinds of batches.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).

    References:
      Xie et al. 2020 (arXiv 1911.09665), section 4.2 (auxiliary batch norm); Li et al. 2016 (arXiv 1603.04779) and
      Chang et al. 2019 (arXiv 1906.03950) for domains.

    >>> from bnjax.linen import SplitBatchNorm
    >>> layer = SplitBatchNorm(num_splits=2, use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 3)), split=0)
    >>> y, updates = layer.apply(variables, jnp.ones((8, 3)), split=1, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean'].shape
    (2, 3)
    """

    declared = _layers.SPLIT

    num_splits: int
    bessel_correction: bool = False

    @property
    def statistics(self) -> Statistics:
        """The kind of running statistics that the layer has."""
        return self.declared.statistics._replace(kinds=self.num_splits)

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, split: Any, mask: ArrayLike | None = None):
        """Normalizes `x`, and moves the running statistics of its kinds where the batch's are used.

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; given in the call or in the constructor.
          split: index of the batch's kind, from 0, or indices `[batch]` of the examples' kinds; may be traced.
          mask: boolean, 0/1 or sample weights, as in `bnjax.batch_norm`.

        Returns:
          An array of the shape of `x`.
        """
        return self._call(x, use_running_average, mask, split=split)
