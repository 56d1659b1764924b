"""A linear layer and its batch norm as one layer of Flax linen."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes
from jaxtyping import ArrayLike

from bnjax import _fold


class ConvBatchNorm(nn.Module):
    """A convolution and the batch norm of its output as one layer, with the variables of the two.

    By default it is the pair, `norm(conv(x))`, or where that takes less memory and traffic the same by one product: a
    convolution by single elements with more outputs than inputs, as the last of a ResNet's bottleneck, is normalized in
    training by folding scale and statistics into its kernel, so that its own output is never written. Statistics,
    gradients and outputs are the pair's up to rounding. The running statistics stay where they are, and so do
    parameters: `conv` and `norm` are layers of the module that makes them, with their names and checkpoints.

        mean = mean_x W        var = diag(Wᵀ C W)        W' = W · scale / sqrt(var + epsilon)
        y = x W' + (bias − mean_x W')        C = covariance of x over all positions

    Attributes:
      conv: convolution, `flax.linen.Conv` or `bnjax.models.layers.Conv`.
      norm: `bnjax.linen.BatchNorm`, with its mask, synchronization and every other option. Any other normalizer is
        called as one of the pair.
      fold: 'auto' folds kernels of single elements with more outputs than inputs, where the input has four times as
        many rows as channels; True all kernels of single elements, False none. So shapes alone decide. In inference
        nothing is folded, as XLA fuses the pair as well.

    Raises:
      ValueError: with `fold=True`, where folding is not possible, with the reason.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2, for batch norm of a linear map; the formula is ours.

    >>> import flax.linen as nn
    >>> from bnjax.linen import BatchNorm, ConvBatchNorm
    >>> model = ConvBatchNorm(nn.Conv(16, (1, 1), use_bias=False), BatchNorm(use_running_average=False))
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8, 8, 4)))
    >>> jax.tree.map(jnp.shape, variables['params'])
    {'conv': {'kernel': (1, 1, 4, 16)}, 'norm': {'bias': (16,), 'scale': (16,)}}
    >>> y, updates = model.apply(variables, jnp.ones((2, 8, 8, 4)), mutable=['batch_stats'])
    """

    conv: nn.Module
    norm: nn.Module
    fold: bool | str = "auto"

    def __post_init__(self):
        _fold.check_fold(self.fold)
        super().__post_init__()

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Convolves and normalizes `x`.

        Args:
          x: the input of the convolution.
          use_running_average: as in `BatchNorm`.
          mask: which positions of the convolution's output count, as in `BatchNorm`.
        """
        return _call(self.conv, self.norm, self.fold, x, use_running_average, mask)


class DenseBatchNorm(nn.Module):
    """A dense layer and the batch norm of its output as one layer, with the variables of the two.

    As `ConvBatchNorm`, which describes it.

    Attributes:
      dense: dense layer, `flax.linen.Dense`.
      norm: `bnjax.linen.BatchNorm`; any other normalizer is called as one of the pair.
      fold: 'auto' folds kernels with more outputs than inputs, where the input has four times as many rows as
        channels; True all kernels, False none.

    Raises:
      ValueError: with `fold=True`, where folding is not possible, with the reason.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2, for batch norm of a linear map; the formula is ours.

    >>> import flax.linen as nn
    >>> from bnjax.linen import BatchNorm, DenseBatchNorm
    >>> model = DenseBatchNorm(nn.Dense(16, use_bias=False), BatchNorm(use_running_average=False))
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 4)))
    >>> y, updates = model.apply(variables, jnp.ones((8, 4)), mutable=['batch_stats'])
    """

    dense: nn.Module
    norm: nn.Module
    fold: bool | str = "auto"

    def __post_init__(self):
        _fold.check_fold(self.fold)
        super().__post_init__()

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Computes the dense layer of `x` and normalizes it.

        Args:
          x: the input of the dense layer.
          use_running_average: as in `BatchNorm`.
          mask: which rows count, as in `BatchNorm`.
        """
        return _call(self.dense, self.norm, self.fold, x, use_running_average, mask)


def _call(layer: Any, norm: Any, fold: Any, x: Any, use_running_average: Any, mask: Any) -> Any:
    """Calls the pair, or folds it."""
    options = {} if use_running_average is None else {"use_running_average": use_running_average}
    options |= {} if mask is None else {"mask": mask}
    is_running = getattr(norm, "use_running_average", None) if use_running_average is None else use_running_average
    if is_running is False and not layer.is_initializing() and _fold.takes_products():
        x = jnp.asarray(x)
        kernel = layer.get_variable("params", "kernel")
        reason = "there is no kernel" if kernel is None else _fold.why_not(layer, norm, kernel.shape, x, mask)
        if _fold.is_chosen(fold, reason, kernel.shape if kernel is not None else (0, 0), x) and kernel is not None:
            bias = layer.get_variable("params", "bias") if layer.use_bias else None
            promote = getattr(layer, "promote_dtype", dtypes.promote_dtype)
            x, _, _ = promote(x, kernel, bias, dtype=layer.dtype)
            return norm(_fold.product_of(x, kernel, bias, getattr(layer, "strides", 1)), **options)
    return norm(layer(x), **options)
