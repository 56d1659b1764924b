"""Counts, and arithmetic with what is divided by them, within the range of float32."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnjax._compat import is_in_jet


def add_counts(a: Any, a_remainder: Any, b: Any, b_remainder: Any = 0.0) -> tuple[Array, Array]:
    """Adds counts that are each given by a rounded value and its remainder; returns the sum in the same form.

    In float32 a sum of counts would stand still at 2^24. The remainder of the sum is computed without error, as

        s = a + b        b' = s − a        remainder = (a − (s − b')) + (b − b')

    References:
      Knuth 1997, "The Art of Computer Programming", volume 2, section 4.2.2, theorem B.
    """
    rounded = a + b
    of_b = rounded - a
    remainder = (a - (rounded - of_b)) + (b - of_b) + (a_remainder + b_remainder)
    count = rounded + remainder
    return count, remainder - (count - rounded)


def nonzero(count: Array) -> Array:
    """Returns the count, with one in place of zero, to divide by."""
    return jnp.where(count > 0, count, 1)


def product_of(a: Array, b: Array) -> Array:
    """Returns `a · b` of means or differences that are divided by counts.

    XLA would take known divisors out of a plain product, (a / n) · (b / n) as (a · b) / n², which then overflows. So it
    is not shown the second factor's. (JAX's `jet` has no rule for what hides it.)
    """
    return a * (b if is_in_jet(b) else lax.optimization_barrier(b))
