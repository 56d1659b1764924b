"""A linear layer and its batch norm as one layer of Flax linen."""

from typing import Any

from flax import linen as nn
from flax.linen import dtypes
from jaxtyping import ArrayLike

from bnjax import _fold


class _Pair(nn.Module):
    """The base of both layers, with their call; each has its linear layer, `norm` and `fold`."""

    def __post_init__(self):
        _fold.check_fold(self.fold)  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__()

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Computes the linear layer of `x` and normalizes it.

        Args:
          x: the input of the linear layer.
          use_running_average: as in `BatchNorm`.
          mask: which rows or positions of the linear layer's output count, as in `BatchNorm`.
        """
        own: Any = self
        layer = own.conv if hasattr(own, "conv") else own.dense
        fold = False if layer.is_initializing() else own.fold  # the pair makes the variables
        kernel = layer.get_variable("params", "kernel")
        bias = layer.get_variable("params", "bias") if getattr(layer, "use_bias", False) else None

        def promoted(x):
            promote = getattr(layer, "promote_dtype", dtypes.promote_dtype)
            return promote(x, kernel, bias, dtype=layer.dtype)[0]

        given = {"kernel": kernel, "bias": bias, "promoted": promoted}
        return _fold.call_pair(layer, own.norm, fold, x, use_running_average, mask, **given)


class ConvBatchNorm(_Pair):
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


class DenseBatchNorm(_Pair):
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
