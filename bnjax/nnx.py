"""Batch norm as a Flax nnx layer: a drop-in replacement for `flax.nnx.BatchNorm`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jaxtyping import ArrayLike

from bnjax import _checks
from bnjax.norm import batch_norm


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` computed by `bnjax.batch_norm`: same constructor, variables and names.

    Differences: the variance is numerically robust whether `use_fast_variance` is set or not (the argument is accepted
    and changes nothing), masks may be real sample weights, devices' moments are merged by their counts, a fully masked
    batch leaves the running statistics alone, and inputs are not rounded to `dtype` before use (a `promote_dtype` of
    one's own is applied to input, scale and bias as in Flax). Complex inputs are not supported.

    Args:
      num_features: size of the feature axis.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1), as PyTorch's does.
      **kwargs: every other argument of `flax.nnx.BatchNorm`.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm
    >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((8, 3)))
    """

    def __init__(self, num_features: int, *, bessel_correction: bool = False, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.bessel_correction = bessel_correction

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalises `x`, and moves the running statistics where the batch's are used.

        Args:
          x: the input.
          use_running_average: whether to use the running statistics; takes precedence over the constructor's.
          mask: as Flax's, broadcastable to `x`; or with the feature axes dropped; boolean, 0/1, or sample weights.

        Returns:
          An array of the shape of `x`.
        """
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average must be given to BatchNorm's constructor, to its call, or by nnx.view.",
        )
        x = jnp.asarray(x)
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        values = (x, self.mean[...], self.var[...], scale, bias)
        promoted = self.promote_dtype(values, dtype=self.dtype)
        dtype = promoted[0].dtype
        if self.promote_dtype is not dtypes.promote_dtype:
            values = (promoted[0], *values[1:3], *promoted[3:])  # the running statistics move unrounded, as in Flax
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            values = (x.astype(dtype), *values[1:])
        x, mean, var, scale, bias = values
        y, batch_stats = batch_norm(
            x,
            {k: v for k, v in (("scale", scale), ("bias", bias)) if v is not None},
            {"mean": mean, "var": var},
            training=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=_checks.flax_mask(mask, x.shape),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=dtype,
            bessel_correction=self.bessel_correction,
        )
        if not use_running_average:
            # Variables that are mutable array references can't hold values that are being differentiated.
            is_reference = getattr(self.mean, "_can_update", False) or getattr(self.var, "_can_update", False)
            keep = jax.lax.stop_gradient if is_reference else lambda value: value
            self.mean[...], self.var[...] = keep(batch_stats["mean"]), keep(batch_stats["var"])
        return y
