"""The contract of objectives, which training minimizes and `bnjax.analysis.losses` measures."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

Objective = Callable[[Any, Any], Any]
"""Maps outputs and labels of a batch to the loss of each example `[batch]`, or to a pair of that and of whether each
example is classified correctly `[batch]`."""


def losses_and_correctness(objective: Objective, outputs: Any, labels: Any) -> tuple[Array, Array]:
    """Calls an objective.

    Returns:
      The loss of each example, in float32 at least, and whether it is classified correctly; NaN where that is not said.
    """
    result = objective(outputs, labels)
    losses, correct = result if isinstance(result, tuple) else (result, None)
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    return losses, jnp.full_like(losses, jnp.nan) if correct is None else correct
