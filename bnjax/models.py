"""The studies' networks in Flax linen, parametrised by their normaliser and its place."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

Place = Literal["none", "before", "after", "input"]
"""Where the normaliser stands: nowhere, before or after each hidden activation, or on the network's input."""


class Perceptron(nn.Module):
    """A multilayer perceptron: `Dense – [norm] – activation – [norm]` for each hidden layer, then a Dense of outputs.

    Attributes:
      hidden: sizes of the hidden layers.
      outputs: size of the output, which has no activation (logits).
      norm: makes the normaliser from `use_running_average`, such as `bnjax.linen.BatchNorm` or a partial of it.
      place: 'none', 'before' or 'after' every hidden activation, or on the 'input'.
      activation: of the hidden layers.
      hidden_init: initialiser of the hidden kernels.
      output_init: initialiser of the output kernel.
      use_hidden_bias: whether the hidden layers have a bias (which a batch norm before the activation makes redundant).

    >>> from bnjax.linen import BatchNorm
    >>> model = Perceptron(hidden=(8,), outputs=1, norm=BatchNorm, place='after')
    >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)), training=False)
    >>> sorted(variables['params'])
    ['BatchNorm_0', 'Dense_0', 'Dense_1']
    """

    hidden: Sequence[int]
    outputs: int
    norm: Callable[..., nn.Module] | None = None
    place: str = "none"
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    hidden_init: Any = nn.initializers.glorot_uniform()
    output_init: Any = nn.initializers.glorot_uniform()
    use_hidden_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.place not in get_args(Place):
            raise ValueError(f"place must be one of {', '.join(get_args(Place))}, got {self.place!r}.")
        if (self.norm is None) != (self.place == "none"):
            raise ValueError(
                f"norm must be given exactly where place is not 'none', got {self.norm} with {self.place!r}."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], *, training: bool, mask: Shaped[Array, " batch"] | None = None
    ) -> Float[Array, "batch outputs"]:
        """Logits of a batch; with `training`, normalised by the batch's statistics, which move the running ones.

        Args:
          x: inputs, flattened to one vector for each example.
          training: whether the normaliser uses the batch's statistics.
          mask: which examples count in them, or with what weight; all by default.
        """

        def normalize(place: str, x):
            if self.norm is None or self.place != place:
                return x
            return self.norm(use_running_average=not training)(x, **masked)

        masked = {} if mask is None else {"mask": mask[:, None]}

        x = normalize("input", x.reshape((x.shape[0], -1)))
        for size in self.hidden:
            x = nn.Dense(size, use_bias=self.use_hidden_bias, kernel_init=self.hidden_init)(x)
            x = normalize("after", self.activation(normalize("before", x)))
        return nn.Dense(self.outputs, kernel_init=self.output_init)(x)
