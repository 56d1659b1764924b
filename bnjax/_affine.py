"""The normalization itself, `(x − mean) · multiplier + bias`, with rules of derivatives that keep `x` alone."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, DTypeLike

from bnjax._remat import keeping_arguments
from bnjax._sums import without_masked_extremes

inverse_root = jax.custom_jvp(lax.rsqrt)


@inverse_root.defjvp
def _inverse_root_jvp(primals, tangents):
    """Computes the derivative `−∂v · r³ / 2` of r = 1 / √v, one factor at a time, as r³ may lie outside the range."""
    root = inverse_root(*primals)
    return root, tangents[0] * root * root * (-0.5 * root)


def plain_scale_and_shift(
    x: Array, weights: Array | None, mean: Array, multiplier: Array, bias: Array, dtype: DTypeLike
) -> Array:
    """Computes `(x − mean) · multiplier + bias` with per-feature values that have `x`'s number of axes."""
    x = x.astype(mean.dtype)
    if weights is not None:
        x = without_masked_extremes(x, weights)
    return ((x - mean) * multiplier + bias).astype(dtype)


scale_and_shift = jax.custom_jvp(plain_scale_and_shift, nondiff_argnums=(5,))


@functools.partial(scale_and_shift.defjvp, symbolic_zeros=True)
def _scale_and_shift_jvp(dtype, primals, tangents):
    """Computes derivatives by a rule whose transpose takes two sums: of the cotangent, and of it times x − mean.

    ∂y = multiplier · ∂x + (x − mean) · ∂multiplier + (∂bias − multiplier · ∂mean)
    """
    x, weights, mean, multiplier, bias = primals
    dx, _, dmean, dmultiplier, dbias = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    shift = jnp.zeros_like(bias) if dbias is None else dbias
    if dmean is not None:
        shift = shift - multiplier * dmean

    # The checkpoint makes x itself, not x − mean, the residual that is kept for the backward pass. The result is
    # rounded in this function, lest a cotangent of higher precision than `dtype` be written out.
    @keeping_arguments
    def output_tangent(x, weights, mean, multiplier, dx, dmultiplier, shift):
        def clean(x):
            x = x.astype(mean.dtype)
            return x if weights is None else without_masked_extremes(x, weights)

        dy = jnp.zeros_like(x, mean.dtype) if dx is None else jax.jvp(clean, (x,), (dx,))[1] * multiplier
        if dmultiplier is not None:
            # This is the same mean, opaque to XLA, whose CPU backend would write out a difference that is shared.
            dy = dy + (clean(x) - lax.optimization_barrier(mean)) * dmultiplier
        return (dy + shift).astype(dtype)

    return scale_and_shift(x, weights, mean, multiplier, bias, dtype), output_tangent(
        x, weights, mean, multiplier, dx, dmultiplier, shift
    )
