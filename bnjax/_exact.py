"""Moments of bfloat16 input by sums that float32 takes without an error, so that no provisional mean is needed.

A number x of bfloat16 has 8 bits, and so have the upper half of its square and the rest. Float32 has 24, and adds 2^14
such numbers of one binade, or of two or three, without rounding, in whatever order. The sums of a block of elements,

    S = Σ x        U = Σ upper(x²)        L = Σ (x² − upper(x²))

are plain sums of functions of each element, which TPU's compiler takes while it computes x, by a convolution or a
matrix product. All that follows is arithmetic of a few numbers for each block. With k elements in a block, s the mean
of all blocks rounded to bfloat16 and P = S rounded to 12 bits, every product below is exact in float32:

    R = Σ (x − s) = S − k s        Q = Σ (x − s)² = (U − s P) + L − s (S − P) − s R
    mean = s + Σ R / n             var = Σ Q / n − (mean − s)²

Where all elements of a feature lie in one binade, the variance is off by the last bits of float32 alone, however small
it is beside the mean. Where they do not, the sums do round: the variance is off by less than 2^-21 (1 + mean² / var) of
itself, and mean² / var is then at most some four times the elements of a block, for a single element near zero in a
block of others that are all the same. All this takes the device's float32 to round as IEEE 754 says.

References:
  Dekker 1971, "A floating-point technique for extending the available precision", for the halves.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax._checks import Shape
from bnjax._compat import is_in_jet
from bnjax._counts import nonzero, product_of
from bnjax._sums import expand, of_size_one, reduced_axes, repeats
from bnjax._sync import Moments, split_axis

_MOST = 2**14  # elements of a block, whose sums are exact
_EXPONENT, _MANTISSA = 8, 7  # explicit bits of bfloat16
_OF_SUM = 11  # explicit bits of a sum's upper half, whose product with a number of bfloat16 is exact
_SCALE = 2.0**-7  # its square is one element's part of the largest block: no sum of squares overflows before the mean


def can_sum(x: Array, weights: Array | None, axes: tuple[int, ...]) -> bool:
    """Returns whether there are exact sums of an array: of bfloat16, all of it or where a boolean mask is true."""
    is_plain = weights is None or weights.dtype == bool
    return x.dtype == jnp.bfloat16 and is_plain and not is_in_jet(x) and _block(x.shape, axes) is not None


def exact_moments(x: Array, weights: Array | None, axes: tuple[int, ...]) -> Moments:
    """Computes the moments of an array for which `can_sum` holds."""
    _, count, _ = of_size_one(weights, jnp.float32, x.shape, axes)
    values, k, axes, block = _in_blocks(x, weights, axes)
    values = values * _SCALE
    squares = values * values
    upper = _to_bfloat16(squares)
    sums, uppers, lowers = (v.sum(block, keepdims=True) for v in (values, upper, squares - upper))
    n = expand(nonzero(count), values.ndim, axes)

    def total(of_blocks: Array) -> Array:
        return of_blocks.sum(reduced_axes(values, axes), keepdims=True)

    s = _to_bfloat16(total(sums) / n)
    about_s = sums - k * s
    upper_sums = lax.reduce_precision(sums, _EXPONENT, _OF_SUM)
    squares_about_s = (uppers - s * upper_sums) + lowers - s * (sums - upper_sums) - s * about_s
    offset = total(about_s) / n
    var = total(squares_about_s / n) - product_of(offset, offset)
    mean, var = (
        v.squeeze(reduced_axes(values, axes)) for v in ((s + offset) / _SCALE, jnp.maximum(var, 0) / _SCALE**2)
    )
    return Moments(mean, var, count)


def _in_blocks(
    x: Array, weights: Array | None, axes: tuple[int, ...]
) -> tuple[Array, Array, tuple[int, ...], tuple[int, ...]]:
    """Returns the elements in float32, zero where the mask is false, maybe with an axis that is split in two.

    The others are the number of elements of each block that count, the feature axes, and those that a block extends
    over.
    """
    found = _block(x.shape, axes)
    assert found is not None
    block, axis, part = found
    if axis is not None:
        x = split_axis(x, axis, -1, part)
        if weights is not None:
            weights = split_axis(weights, axis, *((-1, part) if weights.shape[axis] > 1 else (1, 1)))
        axes = tuple(a + (a > axis) for a in axes)
        block = (*(a + (a > axis) for a in block), axis + 1)
    values = _to_bfloat16(x.astype(jnp.float32))  # XLA may have kept more bits of what x was rounded from
    if weights is None:
        return values, jnp.asarray(math.prod(x.shape[a] for a in block), jnp.float32), axes, block
    others = tuple(a for a in range(x.ndim) if a not in block)
    k = weights.astype(jnp.float32).sum(block, keepdims=True) * repeats(weights.shape, x.shape, others)
    return jnp.where(weights, values, 0), k, axes, block


def _to_bfloat16(values: Array) -> Array:
    return lax.reduce_precision(values, _EXPONENT, _MANTISSA)


def _block(shape: Shape, axes: tuple[int, ...]) -> tuple[tuple[int, ...], int | None, int] | None:
    """Returns the axes that a block extends over, and one of which it takes a part, with the size of that.

    None where a block would hold a single element, or where sizes are symbols of `jax.export`.
    """
    if not all(isinstance(size, int) for size in shape):
        return None
    room, whole = _MOST, []
    for axis in reversed([a for a in range(len(shape)) if a not in axes]):
        if shape[axis] > room:
            part = max(d for d in range(1, room + 1) if shape[axis] % d == 0)
            if part > 1:
                return tuple(whole), axis, part
            break
        whole.append(axis)
        room //= max(shape[axis], 1)
    return (tuple(whole), None, 1) if math.prod(shape[a] for a in whole) > 1 else None
