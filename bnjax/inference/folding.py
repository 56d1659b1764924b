"""Folding of a batch norm into the linear layer beside it, for inference with fewer operations."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnjax import _checks, _dtypes
from bnjax.norm import BatchStats, Params


def fold(
    kernel: Float[Array, "..."],
    bias: Float[Array, " features"] | None,
    params: Params,
    batch_stats: BatchStats,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[Float[Array, "..."], Float[Array, " features"]]:
    """Returns kernel and bias of the layer that does what a linear layer and the batch norm after it do at inference.

        kernel' = kernel · scale / sqrt(var + epsilon)
        bias' = bias' + (bias − mean) · scale / sqrt(var + epsilon)

    Args:
      kernel: kernel of a dense layer or a convolution, grouped and transposed ones included.
      bias: bias of the layer; None for a layer without one.
      params: 'scale' and 'bias' of the batch norm; either may be absent.
      batch_stats: running 'mean' and 'var' of the batch norm.
      epsilon: number that the batch norm adds to the variance.
      axis: axis of the kernel's output features: the last, but for the kernel of Flax's `ConvTranspose` with
        `transpose_kernel=True`, where it is −2.

    Returns:
      Kernel and bias in the kernel's dtype, computed in float32 at least.

    Raises:
      TypeError, ValueError: for an invalid axis, or arrays that do not fit it.

    References:
      Jacob et al. 2018 (arXiv 1712.05877), section 3.2.

    >>> params, batch_stats = {'scale': jnp.array([3.])}, {'mean': jnp.array([1.]), 'var': jnp.array([4.])}
    >>> kernel, bias = fold(jnp.array([[2.], [4.]]), None, params, batch_stats, epsilon=0.)
    >>> print(kernel.ravel(), bias)
    [3. 6.] [-1.5]
    """
    axis, *more = _checks.feature_axes(axis, kernel.ndim)
    if more or not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise ValueError(
            f"kernel must be floating point with one axis of features, got {kernel.dtype}, and axis={(axis, *more)}."
        )
    _check_bias(bias, kernel.shape[axis])
    multiplier, offset = _affine(params, batch_stats, (kernel.shape[axis],), epsilon, kernel.dtype)
    shape = tuple(size if a == axis else 1 for a, size in enumerate(kernel.shape))
    folded = kernel.astype(multiplier.dtype) * multiplier.reshape(shape)
    if bias is not None:
        offset = offset + bias.astype(multiplier.dtype) * multiplier
    return folded.astype(kernel.dtype), offset.astype(kernel.dtype)


def fold_before(
    kernel: Float[Array, "..."],
    bias: Float[Array, " features"] | None,
    params: Params,
    batch_stats: BatchStats,
    *,
    epsilon: float = 1e-5,
    groups: int = 1,
) -> tuple[Float[Array, "..."], Float[Array, " features"]]:
    """Returns kernel and bias of the layer that does what a batch norm and the linear layer after it do at inference.

    With a = scale / sqrt(var + epsilon) and c = bias − mean · a of the batch norm, and sums over the window and over
    the input features i of each output feature's group:

        kernel'_io = kernel_io · a_i        bias'_o = bias_o + Σ_i kernel_io · c_i

    This is exact for dense layers, and for convolutions that pad nothing (padding is with zeros, not with c).

    Args:
      kernel: kernel of the layer, `[…, input features of a group, output features]`.
      bias: bias of the layer; None for a layer without one.
      params: 'scale' and 'bias' of the batch norm; either may be absent.
      batch_stats: running 'mean' and 'var' of the batch norm.
      epsilon: number that the batch norm adds to the variance.
      groups: number of groups of a grouped convolution.

    Returns:
      Kernel and bias in the kernel's dtype, computed in float32 at least.

    Raises:
      TypeError, ValueError: for arrays that do not fit the kernel.

    >>> params, batch_stats = {'scale': jnp.array([3.])}, {'mean': jnp.array([1.]), 'var': jnp.array([4.])}
    >>> kernel, bias = fold_before(jnp.array([[2., 4.]]), None, params, batch_stats, epsilon=0.)
    >>> print(kernel.ravel(), bias)
    [3. 6.] [-3. -6.]
    """
    *window, inputs, outputs = kernel.shape
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"groups must divide the {outputs} output features of the kernel {kernel.shape}, got {groups}."
        )
    _check_bias(bias, outputs)
    a, c = _affine(params, batch_stats, (groups * inputs,), epsilon, kernel.dtype)
    of_group = kernel.astype(a.dtype).reshape((*window, inputs, groups, outputs // groups))
    a, c = (v.reshape((groups, inputs)).T.reshape((*(1 for _ in window), inputs, groups, 1)) for v in (a, c))
    folded = (of_group * a).reshape(kernel.shape)
    offset = (of_group * c).sum(range(len(window) + 1)).reshape(outputs)
    if bias is not None:
        offset = offset + bias.astype(a.dtype)
    return folded.astype(kernel.dtype), offset.astype(kernel.dtype)


def _check_bias(bias: Any, outputs: int) -> None:
    if bias is not None and jnp.shape(bias) != (outputs,):
        raise ValueError(f"bias must have the shape ({outputs},), of the kernel's outputs, got {jnp.shape(bias)}.")


def _affine(params: Params, batch_stats: BatchStats, features: tuple[int, ...], epsilon: Any, dtype: Any):
    """Returns multiplier and offset of a batch norm at inference."""
    _checks.check_params(params, features, ())
    _checks.check_batch_stats(batch_stats, features, ())
    _checks.check_in_range("epsilon", epsilon, 0, float("inf"))
    dtype = _dtypes.wide(dtype)
    mean, var = (jnp.asarray(batch_stats[name], dtype) for name in ("mean", "var"))
    multiplier = lax.rsqrt(var + jnp.asarray(epsilon, dtype)) * jnp.asarray(params.get("scale", 1), dtype)
    return multiplier, jnp.asarray(params.get("bias", 0), dtype) - mean * multiplier
