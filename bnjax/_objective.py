"""The contract of objectives, which training minimizes and `bnjax.analysis.losses` measures, and of what they weigh."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Objective = Callable[[Any, Any], Any]
"""Maps outputs and labels of a batch to the loss of each example `[batch]`, or of each of its parts, such as tokens
`[batch, time]`; or to a pair of that and of whether each is classified correctly."""


def losses_and_correctness(objective: Objective, outputs: Any, labels: Any) -> tuple[Array, Array]:
    """Calls an objective.

    Returns:
      The loss of each example, in float32 at least, and whether it is classified correctly; NaN where that is not said.

    Raises:
      ValueError: where these two differ in shape.
    """
    result = objective(outputs, labels)
    losses, correct = result if isinstance(result, tuple) else (result, None)
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    if correct is None:
        return losses, jnp.full_like(losses, jnp.nan)
    if jnp.shape(correct) != losses.shape:
        raise ValueError(
            f"the objective {_name(objective)} must say of each loss whether the example is classified correctly, got "
            f"losses of shape {losses.shape} and correctness of shape {jnp.shape(correct)}."
        )
    return losses, correct


def weights_of_losses(objective: Objective, losses: Array, weights: Any) -> Array:
    """Returns the weight of each loss; `weights` are those of the examples, or ones where they are None.

    The dimensions of the weights are the first of the losses, as those of a batch norm's mask are.

    Raises:
      ValueError: where they are not, as when the objective has taken the mean already.
    """
    if weights is None:
        return jnp.ones_like(losses)
    weights = jnp.asarray(weights).astype(losses.dtype)
    if weights.shape != losses.shape[: weights.ndim]:
        raise ValueError(
            f"the objective {_name(objective)} must return a loss for each example, so that weights of shape "
            f"{weights.shape} weigh them, got shape {losses.shape}. Leave the mean over examples to what calls it."
        )
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (losses.ndim - weights.ndim)), losses.shape)


def as_weights(weights: Any) -> Array:
    """Returns weights of examples as an array, integers as numbers of float32."""
    weights = jnp.asarray(weights)
    return weights.astype(jnp.float32) if jnp.issubdtype(weights.dtype, jnp.integer) else weights


def inputs_of(x: Any) -> tuple:
    """Returns the inputs of a model's call: `x`, or several where it is a tuple."""
    return x if isinstance(x, tuple) else (x,)


def num_examples(x: Any) -> int:
    """Returns the number of examples of a batch, the first axis of the first of its arrays."""
    return jnp.shape(jax.tree.leaves(x)[0])[0]


def mask_options(model: Any, weights: Any, *, is_needed: bool) -> dict[str, Any]:
    """Returns the option that gives a model's batch norms the weights of the examples, if its call takes a `mask`.

    Args:
      model: linen module, its bound method `apply`, or the functional form of an nnx model.
      weights: weights of the examples; None for none.
      is_needed: whether the model has batch norms that take the statistics of the batch.

    Raises:
      ValueError: where the call takes no mask and one is needed.
    """
    if weights is None:
        return {}
    weights = as_weights(weights)
    model = getattr(model, "__self__", model)
    kind = getattr(model, "model_class", type(model))  # of a model in its functional form, that of the model
    parameters, takes_any = ({}, False) if inspect.isroutine(model) else call_of(kind)
    takes_any &= kind.__name__ != "Sequential"  # nnx's, which gives all options to its first layer
    if "mask" in parameters or takes_any or inspect.isroutine(model):
        return {"mask": weights}
    if is_needed:
        raise ValueError(
            f"the call of {kind.__name__} must take a `mask` for its batch norms where examples have weights: "
            "else the statistics would count those of weight zero. Give it `mask=None`, and pass that on to the layers."
        )
    return {}


def call_of(kind: type) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Returns the parameters of the call of a class's instances, and whether it takes options of any name."""
    parameters = inspect.signature(kind.__call__).parameters
    return parameters, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


_INVERTED = ("use_running_average", "deterministic", "eval", "inference", "test")
PHASES = ("training", "train", "is_training", *_INVERTED)
"""Names by which models' calls are told whether they train."""


def phase(argument: str | None, training: bool, apply: Any = None) -> dict[str, Any]:
    """Returns the option of a model's call that says whether it trains, if it has one.

    Args:
      argument: name of the option ('training', 'train', …), or of one that says the contrary ('use_running_average',
        'deterministic', …); None for a model without.
      training: whether the model trains.
      apply: the `apply` of a linen module, whose call is to have such an option.

    Raises:
      TypeError: where it has none of this name.
    """
    if argument is not None and (model := getattr(apply, "__self__", None)) is not None:
        parameters, takes_any = call_of(type(model))
        if argument not in parameters and not takes_any:
            raise TypeError(
                f"{type(model).__name__}'s call takes ({', '.join(parameters)}) and no {argument!r}. "
                "Pass argument= the name of its option that says whether it trains, such as 'train' or "
                "'deterministic', or argument=None where it has none."
            )
    return {} if argument is None else {argument: training != (argument in _INVERTED)}


def is_training(argument: str, value: Any) -> bool:
    """Returns whether a model trains, by the value of an option as in `phase`."""
    return bool(value) != (argument in _INVERTED)


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", repr(objective))
