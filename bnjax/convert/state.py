"""One batch norm of any framework: its arrays, and the rule by which training moves its running statistics."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import ArrayLike

Update = Literal["exponential", "debiased", "cumulative", "first"]
SETTLED = 2**30  # a number of steps after which 1 − ρ^T is 1, and a debiased average moves as any other


class BatchNormState(NamedTuple):
    """A batch norm's arrays, options and update rule, whichever framework it comes from.

    With s the statistic of the batch of the T-th training step since the beginning, the running one moves by

        r ← m_T r + (1 − m_T) s

    | `update` | m_T | used by |
    |---|---|---|
    | 'exponential' | ρ | Flax, Keras, PyTorch (ρ = 1 − its momentum) |
    | 'cumulative' | 1 − 1/T | PyTorch's `momentum=None` |
    | 'debiased' | ρ (1 − ρ^(T−1)) / (1 − ρ^T) | Haiku, Equinox's mode 'batch' |
    | 'first' | 0 if T = 1, then ρ | Equinox's mode 'ema' |

    The debiased average is a = h / (1 − ρ^T) of h ← ρ h + (1 − ρ) s from h = 0, which moves a as the table says.
    Equinox's mode 'ema' also normalizes with the running statistics in training, not with the batch's; that is
    `bnjax.variants.moving_batch_norm`. Flax linen needs no conversion, as its variables are the arrays of this class:
    `BatchNormState(params, batch_stats, layer.epsilon, layer.momentum)`.

    Attributes:
      params: 'scale' and 'bias', either of which may be absent.
      batch_stats: running 'mean' and 'var', as they are used at inference.
      epsilon: number added to the variance.
      decay: ρ, the weight of the old value; None where `update` is 'cumulative'.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1).
      update: the rule, one of the four above.
      steps: number of training steps so far, which all rules but 'exponential' depend on.

    References:
      Kingma & Ba 2015 (arXiv 1412.6980), section 3, for the debiased average.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> state = BatchNormState(params, batch_stats, update='cumulative', decay=None)
    >>> for step, x in enumerate([1., 2., 6.], start=1):
    ...     x = jnp.full((4, 1), x)
    ...     _, batch_stats = bnjax.batch_norm(x, params, batch_stats, training=True, **state.options(step))
    >>> f"{batch_stats['mean'][0]:.3f}"  # the mean of the three
    '3.000'
    """

    params: dict[str, ArrayLike]
    batch_stats: dict[str, ArrayLike]
    epsilon: float = 1e-5
    decay: float | None = 0.99
    bessel_correction: bool = False
    update: Update = "exponential"
    steps: int = 0

    @property
    def variables(self) -> dict[str, dict[str, ArrayLike]]:
        """The variables of a Flax layer: `BatchNorm(**state.options()).apply(state.variables, x, …)`."""
        return {"params": dict(self.params), "batch_stats": dict(self.batch_stats)}

    def momentum(self, step: Any = 1) -> Any:
        """Returns the momentum m of the `step`-th training step from now, as `bnjax.batch_norm` takes it.

        Args:
          step: 1 for the next training step; may be traced.

        Returns:
          A number in [0, 1].
        """
        if self.update == "exponential":
            return self.decay
        total = jnp.asarray(self.steps + step, jnp.float32)
        if self.update == "cumulative":
            return 1 - 1 / total
        decay = self.decay or 0.0
        if self.update == "first":
            return jnp.where(total == 1, 0.0, decay)
        if not decay:
            return 0.0
        log = math.log(decay)  # 1 − ρ^T without the loss of digits that a ρ close to one brings
        return decay * jnp.expm1((total - 1) * log) / jnp.expm1(total * log)

    def options(self, step: Any = None) -> dict[str, Any]:
        """Returns arguments of `bnjax.batch_norm` and `bnjax.linen.BatchNorm` to go on training by the same rule.

        Args:
          step: number of the training step, 1 for the next; needed where the momentum changes with it.

        Returns:
          A dict of momentum, epsilon and bessel_correction.

        Raises:
          ValueError: without a `step` where the momentum changes with it.
        """
        if step is None and self.update != "exponential":
            raise ValueError(
                f"step must be given, as the momentum of the update rule {self.update!r} changes with it, got None. "
                "Pass options(step) with 1 for the next training step, or 1 for inference alone."
            )
        momentum = self.momentum(1 if step is None else step)
        return {"momentum": momentum, "epsilon": self.epsilon, "bessel_correction": self.bessel_correction}


def debiased_steps(state: BatchNormState) -> int:
    """Returns T for a framework that debiases: the averages' own, or one so large that it does not change them."""
    return state.steps if state.update == "debiased" else SETTLED
