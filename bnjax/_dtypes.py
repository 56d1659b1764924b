"""The dtypes in which batch norm computes."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np


def wide(*dtypes: Any) -> np.dtype:
    """The dtype to compute in with values of these: float32 at least; formats of 8 bits and less promote to it too."""
    wide_enough = (jnp.dtype(d) for d in dtypes if jnp.finfo(d).bits >= 16)
    return functools.reduce(jnp.promote_types, wide_enough, jnp.dtype(jnp.float32))


def real(dtype: Any) -> np.dtype:
    """The dtype of the parts of a complex dtype; a real one itself."""
    return jnp.finfo(dtype).dtype
