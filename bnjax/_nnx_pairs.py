"""A linear layer and its batch norm as one layer of Flax nnx."""

from typing import Any

from flax import nnx
from jaxtyping import ArrayLike

from bnjax import _compat, _fold


class _Pair(nnx.Module):
    """The base of both layers, with their call; each has its linear layer, `norm` and `fold`."""

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Computes the linear layer of `x` and normalizes it.

        Args:
          x: the input of the linear layer.
          use_running_average: as in `BatchNorm`.
          mask: which rows or positions of the linear layer's output count, as in `BatchNorm`.
        """
        own: Any = self
        layer = own.conv if hasattr(own, "conv") else own.dense
        variables = (getattr(layer, name, None) for name in ("kernel", "bias"))
        kernel, bias = (None if v is None else _compat.get_value(v) for v in variables)

        def promoted(x):
            return _compat.promoted(layer, x, kernel, bias)

        given = {"kernel": kernel, "bias": bias, "promoted": promoted}
        return _fold.call_pair(layer, own.norm, own.fold, x, use_running_average, mask, **given)


class ConvBatchNorm(_Pair):
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


class DenseBatchNorm(_Pair):
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
