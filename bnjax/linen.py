"""Batch norm as a Flax linen layer: a drop-in replacement for `flax.linen.BatchNorm`."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jaxtyping import ArrayLike

from bnjax import _checks
from bnjax.norm import batch_norm_and_moments


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` computed by `bnjax.batch_norm`: same arguments, variables and names.

    Differences: the variance is numerically robust whether `use_fast_variance` is set or not (the argument is accepted
    and changes nothing), masks may be real sample weights, devices' moments are merged by their counts, a fully masked
    batch leaves the running statistics alone, and these keep their dtype. Complex inputs are not supported. Where the
    collection 'moments' is mutable, the batch's `Moments` are sown into it as 'batch' and the running statistics stay.

    Attributes:
      use_running_average: whether to normalise by the running statistics and leave them as they are.
      axis: feature axis or axes of the input.
      momentum: weight of the old running value.
      epsilon: number added to the variance.
      dtype: dtype of the result; inferred from the input and the parameters by default.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a 'bias'.
      use_scale: whether there is a 'scale'.
      bias_init: initialiser of the bias.
      scale_init: initialiser of the scale.
      axis_name: mapped axis over which to merge the moments; need not be bound during initialisation.
      axis_index_groups: groups of indices of that axis that are normalised separately.
      use_fast_variance: accepted, without effect.
      force_float32_reductions: if false, the running statistics have `param_dtype`; they are computed in float32 still.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1), as PyTorch's does.

    >>> import flax.linen as nn
    >>> from bnjax.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(4), BatchNorm(use_running_average=False), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 3)), mutable=['batch_stats'])
    """

    axis: int | Sequence[int] = -1  # pyright: ignore[reportIncompatibleVariableOverride]
    axis_name: str | tuple[str, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    bessel_correction: bool = False

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalises `x`, and moves the running statistics where the batch's are used (not during initialisation).

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; here or in the constructor.
          mask: as Flax's, broadcastable to `x`; or with the feature axes dropped; boolean, 0/1, or sample weights.

        Returns:
          An array of the shape of `x`.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = jnp.asarray(x)
        features = tuple(x.shape[a] for a in _checks.feature_axes(self.axis, x.ndim))
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, features, stats_dtype)
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        y, batch_stats, m = batch_norm_and_moments(
            x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype),
            params,
            {"mean": mean.value, "var": var.value},
            training=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=_checks.flax_mask(mask, x.shape),
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            dtype=dtype,
            bessel_correction=self.bessel_correction,
        )
        if self.is_mutable_collection("moments") and m is not None and not self.is_initializing():
            self.sow("moments", "batch", m)
        elif not (use_running_average or self.is_initializing()):
            mean.value, var.value = batch_stats["mean"], batch_stats["var"]
        return y
