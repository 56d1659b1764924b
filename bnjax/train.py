"""Training: a state with running statistics, one step body, and whole epochs as one compiled scan."""

from collections.abc import Callable
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

    step: Any
    params: Any  # of any container, where Flax's annotation says FrozenDict
    batch_stats: Any


class Metrics(NamedTuple):
    """Of one example, or the means over several.

    Attributes:
      loss: what training minimises.
      accuracy: whether the example is classified correctly (1 or 0); the fraction of those that are.
    """

    loss: Float[Array, "..."]
    accuracy: Float[Array, "..."]


def binary_cross_entropy(logits: Float[Array, "batch 1"], labels: Shaped[Array, " batch"]):
    """Cross-entropy of a sigmoid output: `log(1 + exp(−logit))` for label 1, `log(1 + exp(logit))` for label 0."""
    logits = logits[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels), (logits > 0) == (labels > 0)


def cross_entropy(logits: Float[Array, "batch classes"], labels: Shaped[Array, " batch"]):
    """Cross-entropy of a softmax output: `−log softmax(logits)[label]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(-1) == labels


def squared_error(logits: Float[Array, "batch 1"], labels: Shaped[Array, " batch"]):
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


def loss_and_updates(
    state: TrainState, params: Any, x: Array, y: Array, objective: Objective, weights: Array | None = None
):
    """Training loss of a batch at `params`, with `(metrics, new batch_stats)` beside it, for `jax.value_and_grad`."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    masked = {} if weights is None else {"mask": weights}
    outputs, updates = state.apply_fn(variables, x, training=True, mutable=["batch_stats"], **masked)
    metrics = Metrics(*(jnp.average(values, weights=weights) for values in objective(outputs, y)))
    return metrics.loss, (metrics, updates.get("batch_stats", {}))


def train_step(
    state: TrainState,
    x: Shaped[Array, "batch ..."],
    y: Shaped[Array, " batch"],
    weights: Float[Array, " batch"] | None = None,
    *,
    objective: Objective,
) -> tuple[TrainState, Metrics]:
    """One step of gradient descent on the mean loss of a batch: the one step body of all training.

    Args:
      state: parameters, running statistics and optimiser state.
      x: inputs of the batch.
      y: labels of the batch.
      weights: of the examples, in the loss and (as `mask`) in the batch norms; zero for padding.
      objective: loss and correctness of each example; static.

    Returns:
      The next state, and the metrics of the batch before the update.
    """
    gradient = jax.grad(loss_and_updates, argnums=1, has_aux=True)
    grads, (metrics, batch_stats) = gradient(state, state.params, x, y, objective, weights)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), metrics


def train_epoch(
    state: TrainState,
    key: Array,
    x: Shaped[Array, "examples ..."],
    y: Shaped[Array, " examples"],
    *,
    batch_size: int,
    objective: Objective,
) -> tuple[TrainState, Metrics]:
    """One pass over the examples in random order: a scan of `train_step`.

    What remains after the last full batch is a batch too, padded to the common size with examples of weight zero.

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
    steps = -(-count // batch_size)
    order = jnp.argsort(jax.random.bits(key, (count,)))  # jax.random.permutation sorts twice, and compiles slower
    batches = jnp.pad(order, (0, steps * batch_size - count)).reshape((steps, batch_size))
    sizes = jnp.minimum(batch_size, count - batch_size * jnp.arange(steps))

    def step(state, batch):
        index, size = batch
        padded = count % batch_size != 0
        weights = (jnp.arange(batch_size) < size).astype(jnp.float32) if padded else None
        return train_step(state, x[index], y[index], weights, objective=objective)

    state, metrics = lax.scan(step, state, (batches, sizes))
    return state, jax.tree.map(lambda m: (m * sizes).sum() / count, metrics)


def evaluate(
    state: TrainState, x: Shaped[Array, "examples ..."], y: Shaped[Array, " examples"], *, objective: Objective
) -> Metrics:
    """Loss and correctness of each example, normalised by the running statistics.

    Args:
      state: parameters and running statistics.
      x: inputs of all examples.
      y: labels of all examples.
      objective: loss and correctness of each example; static.

    Returns:
      `Metrics` of one value for each example: take the mean over the examples of a data set.
    """
    outputs = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, training=False)
    losses, correct = objective(outputs, y)
    return Metrics(losses, correct.astype(losses.dtype))
