"""Batch norm of a product as one product, in training: the product that is normalized is never written.

    W' = W · scale / sqrt(var + epsilon)        out = a W' + (bias − mean_a W')

with the moments of `bnjax._product`. W' is rounded once, to the dtype of a, and the mean that is subtracted is that of
the product by what it was rounded to.

This pays where W makes more features than a has: then C takes less time to compute than y takes to be written and read
again, and y is neither kept for the backward pass nor read in it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array

from bnjax import _dtypes
from bnjax._checks import feature_axes
from bnjax._compat import is_in_jet, promotion_of_ones_own
from bnjax._functional import INTERCEPTORS, is_of_library
from bnjax._product import Product, matmul, product_moments
from bnjax._remat import named_input
from bnjax._sums import expand, without_masked_extremes
from bnjax._sync import Moments, select, vary_like
from bnjax.norm import BatchStats, Call, Result, batch_norm_of, trained

# What a layer's product may not have; where the layer has no such attribute, it has none of this.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "feature_group_count": (1,),
    "mask": (None,),
    "precision": (None,),
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "preferred_element_type": (None,),
}
_ROWS = 4  # rows for each channel from which on folding pays: it multiplies matrices of channels and features, too


def product_batch_norm_of(call: Call) -> Result:
    """Computes `batch_norm` in training of a checked call whose input is a `Product`."""
    return trained(call, _train)


def _train(call: Call) -> tuple[Array, BatchStats, Moments]:
    product: Any = call.x
    inputs, kernel = product.inputs, product.kernel
    if call.weights is not None:
        inputs = without_masked_extremes(inputs, call.weights)
    m, mean_of_inputs = product_moments(
        Product(inputs, kernel, product.bias), call.weights, call.axis_name, call.groups
    )
    mean, var = call.batch_statistics(m)
    dtype = product.dtype if call.dtype is None else call.dtype
    wide = _dtypes.wide(product.dtype, dtype)
    multiplier, bias = call.multiplier_and_bias(var.astype(wide), call.params, wide)
    folded = (kernel.astype(wide) * multiplier[None]).astype(product.dtype)
    mean_of_inputs = vary_like(mean_of_inputs, inputs)
    subtracted = matmul(mean_of_inputs, folded.astype(wide))
    own = mean if product.bias is None else mean - product.bias  # where the batch has no weight, the running mean
    subtracted = select(m.count != 0, subtracted, own.astype(wide) * multiplier)
    y = lax.dot_general(inputs, folded, (((inputs.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide)
    y = (y + expand(bias - subtracted, y.ndim, (y.ndim - 1,))).astype(dtype)
    return named_input(y), call.moved(m), m


def call_pair(
    layer: Any,
    norm: Any,
    fold: Any,
    x: Any,
    use_running_average: bool | None,
    mask: Any,
    *,
    kernel: Any,
    bias: Any,
    promoted: Callable[[Any], Array],
) -> Any:
    """Calls a linear layer and its batch norm, of linen or nnx, as a pair or as one product.

    Args:
      layer: convolution or dense layer.
      norm: batch norm of its output.
      fold: 'auto', True or False.
      x: the layer's input.
      use_running_average: option of the batch norm's call, where given.
      mask: another one.
      kernel: the layer's kernel, if any.
      bias: its bias, if any.
      promoted: returns the input in the dtype in which the layer computes.
    """
    options = {"use_running_average": use_running_average, "mask": mask}
    options = {name: value for name, value in options.items() if value is not None}
    is_running = getattr(norm, "use_running_average", None) if use_running_average is None else use_running_average
    if fold is not False and is_running is False and takes_products():
        x = jnp.asarray(x)
        if is_chosen(fold, why_not(layer, norm, kernel, x, mask), kernel, x):
            spatial = kernel.ndim - 2
            strides = _steps(getattr(layer, "strides", 1), spatial)
            x = promoted(x)[(..., *(slice(None, None, step) for step in strides), slice(None))]
            return norm(Product(x, kernel.reshape(kernel.shape[-2:]), bias), **options)
    return norm(layer(x), **options)


def why_not(layer: Any, norm: Any, kernel: Array | None, x: Array, mask: Any) -> str | None:
    """Returns why a layer and its batch norm cannot be folded, None where they can.

    Args:
      layer: convolution or dense layer of linen or nnx.
      norm: batch norm of its output.
      kernel: the layer's kernel, if any.
      x: the layer's input.
      mask: mask of the batch norm.
    """
    if kernel is None:
        return "there is no kernel"
    spatial, ndim = kernel.shape[:-2], x.ndim
    if jnp.iscomplexobj(x) or is_in_jet(x):
        return "the input is complex, or expanded by jet"
    if any(size != 1 for size in spatial):
        return f"a kernel of {'×'.join(map(str, spatial))} has more than one element for each input and output"
    if not is_of_library(type(layer).__call__):
        return f"{type(layer).__name__} has a call of its own"
    for name, plain in _PLAIN.items():
        value = getattr(layer, name, plain[0])
        if not any(value is p or (isinstance(p, int) and value == p) for p in plain):
            return f"{name} is {value!r}"
    if spatial and not _is_unpadded(layer.padding):
        return f"padding={layer.padding!r} adds zeros"
    if spatial and any(step != 1 for step in _steps(getattr(layer, "input_dilation", 1), len(spatial))):
        return "input_dilation is not 1"
    is_ours = getattr(getattr(norm, "declared", None), "function", None) is batch_norm_of
    if not is_ours or not is_of_library(type(norm).__call__):
        return f"{type(norm).__name__} is not bnjax's BatchNorm"
    if not isinstance(norm, nn.Module) and promotion_of_ones_own(norm) is not None:
        return "the batch norm has a promote_dtype of its own"
    if feature_axes(norm.axis, ndim) != (ndim - 1,):
        return f"axis={norm.axis!r} is not the last"
    if mask is not None and jnp.ndim(mask) == ndim and jnp.shape(mask)[-1] != 1:
        return "the mask differs between features"
    return None


def is_chosen(fold: Any, reason: str | None, kernel: Any, x: Array) -> bool:
    """Returns whether to fold, by the option; raises `ValueError` where that is asked for and cannot be.

    It pays where there are more features than channels, and rows enough.
    """
    if fold is True and reason is not None:
        raise ValueError(f"fold must be 'auto' or False here, got True, but {reason}.")
    if reason is not None or isinstance(fold, bool):
        return reason is None and fold is True
    channels, features = kernel.shape[-2:]
    rows = math.prod(x.shape[:-1])  # maybe a symbol of `jax.export`
    return features > channels and isinstance(rows, int) and rows >= _ROWS * channels


def check_fold(fold: Any) -> None:
    """Raises `ValueError` for an option that is none."""
    if fold not in ("auto", True, False):
        raise ValueError(f"fold must be 'auto', True or False, got {fold!r}.")


def takes_products() -> bool:
    """Returns whether nothing that stands for the calls of batch norms needs their inputs as arrays."""
    replacements: list[Any] = [getattr(replace, "func", replace) for _, replace in INTERCEPTORS.get()]
    return all(getattr(replace, "takes_products", False) for replace in replacements)


def _steps(value: Any, spatial: int) -> tuple[int, ...]:
    """Returns strides or dilations along each of the spatial axes; None stands for 1."""
    return (value or 1,) * spatial if value is None or isinstance(value, int) else tuple(value)


def _is_unpadded(padding: Any) -> bool:
    """Returns whether a convolution by one element adds no zeros at its input's edges."""
    if isinstance(padding, str):
        return padding in ("SAME", "VALID", "CIRCULAR", "REFLECT")
    return not np.any(padding)
