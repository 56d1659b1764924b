"""The moments of a product y = a W + b that is not computed, from those of its input a.

With C the covariance of a over n rows, which have the weights w of `bnjax.moments`:

    mean_y = mean_a W + b        var_y = diag(Wᵀ C W)        C = Σ w (a − mean_a)ᵀ (a − mean_a) / n

C is a product of a with itself. It is taken about a shift s near the mean, in the dtype of a and with sums in float32:

    C = Σ w (a − s)ᵀ (a − s) / n − dᵀ d        d = Σ w (a − s) / n        mean_a = s + d

In formats of 16 bits a − s is made to have no error of its own. Where the mean is eight deviations or more from zero, s
is the mean, rounded to the format (Sterbenz's lemma, for all that lies within four deviations); else s = 0, which loses
the little that the square of so small a mean costs.

What cancels in Wᵀ C W is not mended: where a kernel lies along a direction in which a varies little, the variance is
off by about 2^-23 of the variance along the direction in which a kernel of its length would have the largest.

References:
  Sterbenz 1974, "Floating-Point Computation", theorem 4.3.1, by which a − s is exact for s / 2 ≤ a ≤ 2 s.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax import _dtypes
from bnjax._counts import nonzero
from bnjax._moments import by_parts, moments_of_part
from bnjax._remat import keeping_arguments
from bnjax._sums import expand, has_weight, of_size_one, weigh
from bnjax._sync import (
    AxisName,
    Groups,
    Moments,
    is_mesh_axis,
    merge_over_mesh_axis,
    merge_over_vmapped_axis,
    shards_of,
)

_FAR = 64  # variances in the square of a mean that counts as far from zero

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # of a few numbers for each channel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """A product `inputs @ kernel + bias` that stands for itself as the input of a batch norm.

    Attributes:
      inputs: array [..., channels], of the dtype that the product would have.
      kernel: array [channels, features], in the dtype of the parameters.
      bias: array [features], or None.
    """

    inputs: Array
    kernel: Array
    bias: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the product."""
        return (*self.inputs.shape[:-1], self.kernel.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of the product."""
        return self.inputs.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the product."""
        return self.inputs.dtype


def product_moments(
    product: Product, weights: Array | None, axis_name: AxisName | None, groups: Groups | None
) -> tuple[Moments, Array]:
    """Computes the moments of a product over all but its last axis, as `checked_moments` does, and its inputs' mean.

    Args:
      product: the product.
      weights: its mask, with as many axes, the last of size one.
      axis_name: mapped axis over which the moments are merged.
      groups: groups of indices of that axis.
    """
    inputs, kernel = product.inputs, product.kernel
    parts = shards_of(inputs, range(min(1, inputs.ndim - 1)))
    m = by_parts(inputs, weights, parts, lambda inputs, weights, _: _moments_of_part(inputs, weights, kernel))
    if axis_name is not None:
        merge = merge_over_mesh_axis if is_mesh_axis(axis_name) else merge_over_vmapped_axis
        m = merge(m, axis_name, groups, counts_differ=weights is not None)
    features = kernel.shape[-1]
    mean, of_inputs = m.mean[:features], m.mean[features:]
    if product.bias is not None:
        mean += product.bias.astype(mean.dtype)
    return Moments(mean, m.var[:features], m.count), of_inputs


def _moments_of_part(inputs: Array, weights: Array | None, kernel: Array) -> Moments:
    """Computes the moments of a product's features, and behind these its inputs', of one part of a batch."""
    axes = (inputs.ndim - 1,)
    of_inputs = moments_of_part(inputs, weights, axes)
    weights, count, _ = of_size_one(weights, of_inputs.mean.dtype, inputs.shape, axes)
    mean, kernel = of_inputs.mean, kernel.astype(of_inputs.mean.dtype)
    shift = _shift(of_inputs, inputs.dtype)
    offset = mean - shift
    covariance = _squares_about(inputs, weights, shift) / nonzero(count) - offset[:, None] * offset[None, :]
    var = jnp.concatenate([(kernel * matmul(covariance, kernel)).sum(0), jnp.zeros_like(mean)])  # of y alone
    return Moments(jnp.concatenate([matmul(mean, kernel), mean]), jnp.maximum(var, 0), of_inputs.count)


def _shift(m: Moments, dtype: Any) -> Array:
    """Returns the mean, or in formats of 16 bits a number near it by which the inputs' differences have no error."""
    mean, var = lax.stop_gradient((m.mean, m.var))
    if dtype == mean.dtype:
        return mean
    return jnp.where(_FAR * var <= jnp.square(mean), mean.astype(dtype).astype(mean.dtype), 0)


@keeping_arguments
def _squares_about(inputs: Array, weights: Array | None, shift: Array) -> Array:
    """Returns `Σ w (a − s)ᵀ (a − s)` over all rows, in float32 or wider."""
    centered = inputs.astype(shift.dtype) - expand(shift, inputs.ndim, (inputs.ndim - 1,))
    weighted = weigh(centered, weights)
    if weights is not None and weights.dtype != bool:  # products with real weights have more bits than the inputs
        return _products(weighted, weigh(centered, has_weight(weights)))
    return _squares(weighted.astype(inputs.dtype))


@jax.custom_jvp
def _squares(a: Array) -> Array:
    """Returns `aᵀ a`."""
    return _products(a, a)


@_squares.defjvp
def _squares_jvp(primals, tangents):
    """Computes the derivative of `aᵀ a` by one product, `∂aᵀ a` and its transpose, where JAX's rule takes two."""
    product = _products(tangents[0], primals[0])
    return _squares(primals[0]), product + product.T


def _products(a: Array, b: Array) -> Array:
    """Returns `aᵀ b`, over all axes but the last; exact to its sums, in float32 or wider."""
    dtype = _dtypes.wide(a.dtype)
    precision = lax.Precision.HIGHEST if a.dtype == dtype else lax.Precision.DEFAULT

    def product(a: Array, b: Array) -> Array:
        rows = tuple(range(a.ndim - 1))
        return lax.dot_general(a, b, ((rows, rows), ((), ())), precision=precision, preferred_element_type=dtype)

    def of_matrices(a: Array, b: Array) -> Array:
        return product(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

    # XLA's CPU backend would transpose what is no matrix; TPU's compiler would copy it to make it one.
    return lax.platform_dependent(a, b, cpu=of_matrices, default=product)
