"""A linear layer and its batch norm as one layer of Flax nnx."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import ArrayLike

from bnjax import _compat, _fold


class ConvBatchNorm(nnx.Module):
    """A convolution and the batch norm of its output as one layer; `bnjax.linen.ConvBatchNorm` describes it.

    Args:
      conv: convolution, `flax.nnx.Conv`.
      norm: `bnjax.nnx.BatchNorm`; any other normalizer is called as one of the pair.
      fold: 'auto' folds kernels of single elements with more outputs than inputs, where the input has four times as
        many rows as channels; True all kernels of single elements, False none.

    Raises:
      ValueError: with `fold=True`, where folding is not possible, with the reason.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2, for batch norm of a linear map; the formula is ours.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm, ConvBatchNorm
    >>> rngs = nnx.Rngs(0)
    >>> layer = ConvBatchNorm(nnx.Conv(4, 16, (1, 1), use_bias=False, rngs=rngs), BatchNorm(16, rngs=rngs))
    >>> y = layer(jnp.ones((2, 8, 8, 4)))
    """

    def __init__(self, conv: nnx.Module, norm: nnx.Module, *, fold: bool | str = "auto"):
        _fold.check_fold(fold)
        self.conv, self.norm, self.fold = conv, norm, fold

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Convolves and normalizes `x`.

        Args:
          x: the input of the convolution.
          use_running_average: as in `BatchNorm`.
          mask: which positions of the convolution's output count, as in `BatchNorm`.
        """
        return _call(self.conv, self.norm, self.fold, x, use_running_average, mask)


class DenseBatchNorm(nnx.Module):
    """A dense layer and the batch norm of its output as one layer; `bnjax.linen.ConvBatchNorm` describes it.

    Args:
      dense: dense layer, `flax.nnx.Linear`.
      norm: `bnjax.nnx.BatchNorm`; any other normalizer is called as one of the pair.
      fold: 'auto' folds kernels with more outputs than inputs, where the input has four times as many rows as
        channels; True all kernels, False none.

    Raises:
      ValueError: with `fold=True`, where folding is not possible, with the reason.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2, for batch norm of a linear map; the formula is ours.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm, DenseBatchNorm
    >>> rngs = nnx.Rngs(0)
    >>> layer = DenseBatchNorm(nnx.Linear(4, 16, use_bias=False, rngs=rngs), BatchNorm(16, rngs=rngs))
    >>> y = layer(jnp.ones((8, 4)))
    """

    def __init__(self, dense: nnx.Module, norm: nnx.Module, *, fold: bool | str = "auto"):
        _fold.check_fold(fold)
        self.dense, self.norm, self.fold = dense, norm, fold

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
    if is_running is False and _fold.takes_products():
        x = jnp.asarray(x)
        kernel = getattr(layer, "kernel", None)
        reason = "there is no kernel" if kernel is None else _fold.why_not(layer, norm, kernel.shape, x, mask)
        if reason is None and _compat.promotion_of_ones_own(norm) is not None:
            reason = "the batch norm has a promote_dtype of its own"
        if _fold.is_chosen(fold, reason, kernel.shape if kernel is not None else (0, 0), x) and kernel is not None:
            kernel, bias = _compat.get_value(kernel), None if layer.bias is None else _compat.get_value(layer.bias)
            x = _compat.promoted(layer, x, kernel, bias)
            return norm(_fold.product_of(x, kernel, bias, getattr(layer, "strides", 1)), **options)
    return norm(layer(x), **options)
