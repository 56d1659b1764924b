"""The dtypes in which batch norm computes."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np


def wide(*dtypes: Any) -> np.dtype:
    """Returns the dtype to compute in with values of some dtypes: at least float32.

    Formats of 8 bits and less are left out of the promotion, for which JAX has no rule among each other.
    """
    wide_enough = (jnp.dtype(d) for d in dtypes if jnp.finfo(d).bits >= 16)
    return functools.reduce(jnp.promote_types, wide_enough, jnp.dtype(jnp.float32))


def real(dtype: Any) -> np.dtype:
    """Returns the dtype of the parts of a complex dtype, and a real dtype itself."""
    return jnp.finfo(dtype).dtype
