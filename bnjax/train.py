"""Training: a state with running statistics, one step body, and whole epochs as one compiled scan."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import lax
from jaxtyping import Array, Float, Shaped

Objective = Callable[[Array, Array], tuple[Array, Array]]
"""Maps outputs and labels of a batch to the loss of each example and whether each is classified correctly."""


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the running statistics of the model's batch norms.

    Attributes:
      batch_stats: the 'batch_stats' collection; empty for a model without batch norm.
    """

    batch_stats: Mapping[str, Any]


class Metrics(NamedTuple):
    """Means over examples.

    Attributes:
      loss: mean loss.
      accuracy: fraction of the examples that are classified correctly.
    """

    loss: Float[Array, "..."]
    accuracy: Float[Array, "..."]


def binary_cross_entropy(logits: Float[Array, "batch 1"], labels: Shaped[Array, "batch"]):
    """Cross-entropy of a sigmoid output: `log(1 + exp(−logit))` for label 1, `log(1 + exp(logit))` for label 0."""
    logits = logits[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels), (logits > 0) == (labels > 0)


def cross_entropy(logits: Float[Array, "batch classes"], labels: Shaped[Array, "batch"]):
    """Cross-entropy of a softmax output: `−log softmax(logits)[label]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(-1) == labels


def squared_error(logits: Float[Array, "batch 1"], labels: Shaped[Array, "batch"]):
    """Squared error of a sigmoid output: `(sigmoid(logit) − label)²`."""
    logits = logits[:, 0]
    return jnp.square(jax.nn.sigmoid(logits) - labels), (logits > 0) == (labels > 0)


def create_train_state(
    model, optimizer: optax.GradientTransformation, key: Array, x: Shaped[Array, "batch ..."]
) -> TrainState:
    """The state at step 0 of a Flax model, initialised for inputs like `x`.

    Args:
      model: linen module whose call takes `(x, training=…)`.
      optimizer: optax gradient transformation.
      key: random key of the initial parameters.
      x: a batch of inputs; only its shape and dtype matter.
    """
    variables = model.init(key, x, training=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optimizer,
        batch_stats=variables.get("batch_stats", {}),
    )


def loss_and_updates(state: TrainState, params: Any, x: Array, y: Array, objective: Objective):
    """Training loss of a batch at `params`, with `(metrics, new batch_stats)` beside it, for `jax.value_and_grad`."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    outputs, updates = state.apply_fn(variables, x, training=True, mutable=["batch_stats"])
    losses, correct = objective(outputs, y)
    loss = losses.mean()
    return loss, (Metrics(loss, correct.mean()), updates.get("batch_stats", {}))


def train_step(
    state: TrainState, x: Shaped[Array, "batch ..."], y: Shaped[Array, "batch"], *, objective: Objective
) -> tuple[TrainState, Metrics]:
    """One step of gradient descent on the mean loss of a batch: the one step body of all training.

    Args:
      state: parameters, running statistics and optimiser state.
      x: inputs of the batch.
      y: labels of the batch.
      objective: loss and correctness of each example; static.

    Returns:
      The next state, and the metrics of the batch before the update.
    """
    gradient = jax.grad(loss_and_updates, argnums=1, has_aux=True)
    grads, (metrics, batch_stats) = gradient(state, state.params, x, y, objective)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics


def train_epoch(
    state: TrainState,
    key: Array,
    x: Shaped[Array, "examples ..."],
    y: Shaped[Array, "examples"],
    *,
    batch_size: int,
    objective: Objective,
) -> tuple[TrainState, Metrics]:
    """One pass over the examples in random order: a scan of `train_step`, then a smaller batch of what remains.

    Args:
      state: where to begin.
      key: random key of the order.
      x: inputs of all examples.
      y: labels of all examples.
      batch_size: examples in a step; static.
      objective: loss and correctness of each example; static.

    Returns:
      The state after the epoch, and the means over its examples of each batch's metrics, as Keras reports them.
    """
    count = x.shape[0]
    order = jax.random.permutation(key, count)
    steps, rest = divmod(count, batch_size)

    def step(state, index):
        return train_step(state, x[index], y[index], objective=objective)

    state, metrics = lax.scan(step, state, order[: steps * batch_size].reshape((steps, batch_size)))
    total = jax.tree.map(lambda m: m.sum() * batch_size, metrics)
    if rest:
        state, metrics = step(state, order[steps * batch_size :])
        total = jax.tree.map(lambda t, m: t + m * rest, total, metrics)
    return state, jax.tree.map(lambda t: t / count, total)


def evaluate(
    state: TrainState, x: Shaped[Array, "examples ..."], y: Shaped[Array, "examples"], *, objective: Objective
) -> Metrics:
    """Metrics of all examples, normalised by the running statistics.

    Args:
      state: parameters and running statistics.
      x: inputs of all examples.
      y: labels of all examples.
      objective: loss and correctness of each example; static.
    """
    outputs = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, training=False)
    losses, correct = objective(outputs, y)
    return Metrics(losses.mean(), correct.mean())
