"""The one step body of all training, on one device, on several together, and in micro-batches."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Shaped

from bnjax import _calls
from bnjax._calls import statistics_of
from bnjax._functional import NOISE, name_of, taking_products
from bnjax._layers import MOMENTS_OF_CALLS
from bnjax._objective import (
    Objective,
    as_weights,
    inputs_of,
    losses_and_correctness,
    mask_options,
    num_examples,
    phase,
    weights_of_losses,
)
from bnjax._sums import has_weight
from bnjax._sync import AxisName, merge_moments, vary_like
from bnjax.norm import moved_batch_stats, unbiased_var
from bnjax.training.state import TrainState

_FIXED = ("params", "random")  # the collections that a call does not change


class Metrics(NamedTuple):
    """The loss and accuracy of one example, or their means over several.

    Attributes:
      loss: the objective that training minimizes.
      accuracy: whether the example is classified correctly (1 or 0), or the fraction of examples that are.
    """

    loss: Float[ArrayLike, "..."]
    accuracy: Float[ArrayLike, "..."]


def binary_cross_entropy(logits: Float[Array, "batch 1"], labels: Shaped[Array, " batch"]):
    """Computes the cross-entropy of a sigmoid output: `log(1 + exp(−logit))` for label 1, `log(1 + exp(logit))` for 0.

    Returns the loss of each example, and whether it is classified correctly.
    """
    logits = logits[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)), (logits > 0) == (labels > 0)


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Shaped[Array, "*batch"]):
    """Computes the cross-entropy of a softmax output, of each example or token: `−log softmax(logits)[label]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(-1) == labels


def squared_error(logits: Float[Array, "batch 1"], labels: Shaped[Array, " batch"]):
    """Computes the squared error of a sigmoid output: `(sigmoid(logit) − label)²`."""
    logits = logits[:, 0]
    return jnp.square(jax.nn.sigmoid(logits) - labels.astype(logits.dtype)), (logits > 0) == (labels > 0)


class Batch(NamedTuple):
    """The arrays that a step trains on, each with the example axis first.

    Attributes:
      x: inputs, a tuple for a model of several.
      y: labels.
      weights: weights of the examples, in the loss and (as `mask`) in the batch norms; zero for padding; None for ones.
      keys: a random key for each example, for models that take `keys` (dropout).
    """

    x: Any  # arrays of JAX or NumPy
    y: Any
    weights: Any = None
    keys: Any = None


def pad_batch(batch: Any, multiple: int) -> Batch:
    """Pads a batch to a multiple of some number with copies of its first example, of weight zero.

    Args:
      batch: `Batch` of host arrays.
      multiple: number such as `mesh.size · accumulate_steps`, or a batch size.

    Returns:
      The batch with `weights`, which are zero for the copies: `step(state, *pad_batch(Batch(x, y), mesh.size))`.

    Raises:
      TypeError: for anything but a `Batch`.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be a Batch, got {type(batch).__name__}. Pass pad_batch(Batch(x, y), …).")
    count = num_examples(batch.x)
    missing = -count % multiple
    weights = np.ones(count, np.float32) if batch.weights is None else np.asarray(batch.weights)

    index = np.concatenate([np.arange(count), np.zeros(missing, np.int64)])
    keys = None if batch.keys is None else batch.keys[index]
    padded_weights = np.concatenate([weights, np.zeros((missing, *weights.shape[1:]), weights.dtype)])
    x, y = jax.tree.map(lambda values: np.asarray(values)[index], (batch.x, batch.y))
    return Batch(x, y, padded_weights, keys)


class _Sums(NamedTuple):
    """The sums over examples of gradients (of `weight · loss / expected number of examples`), metrics and weights."""

    grads: Any
    metrics: Metrics
    weight: Array


def _loss_sums(params: Any, state: TrainState, batch: Batch, objective: Objective, rngs: Any):
    """Returns sums over a batch: the weighted loss, and beside it metrics, weight and the updated collections."""
    x, y, weights, keys = batch
    options = mask_options(state.apply_fn, weights, is_needed=bool(jax.tree.leaves(state.batch_stats)))
    if keys is not None:
        options["keys"] = keys
    if rngs is not None:
        options["rngs"] = rngs
    options |= phase(state.argument, True, state.apply_fn)
    variables = state.variables | {"params": params}
    mutable = [name for name in variables if name not in _FIXED]
    outputs, updates = state.apply_fn(variables, *inputs_of(x), mutable=mutable, **options)
    losses, correct = losses_and_correctness(objective, outputs, y)
    losses = losses.astype(_sum_dtype(params, x))
    weights = weights_of_losses(objective, losses, weights)
    metrics = Metrics((weights * losses).sum(), (weights * correct.astype(losses.dtype)).sum())
    return metrics.loss, (metrics, weights.sum(), {name: updates.get(name, {}) for name in mutable})


def _sum_dtype(params: Any, x: Any) -> Any:
    """Returns the dtype in which sums over examples are taken: at least float32."""
    floating = [leaf for leaf in jax.tree.leaves((params, x)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.result_type(jnp.float32, *floating)


def train_step(
    state: TrainState,
    x: Any,
    y: Any,
    weights: Shaped[ArrayLike, "batch ..."] | None = None,
    keys: Shaped[Array, " batch"] | None = None,
    *,
    objective: Objective,
    axis_name: AxisName | None = None,
    accumulate_steps: int = 1,
    rngs: Mapping[str, Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one step of gradient descent on the mean loss of a batch: the one step body of all training.

    Args:
      state: parameters, running statistics and optimizer state.
      x: inputs of the batch, a tuple for a model of several; with `axis_name`, the part of this member.
      y: labels of the batch.
      weights: weights of the examples `[batch]`, or of parts of them such as tokens `[batch, time]`, in the loss and
        (as `mask`) in the batch norms; zero for padding.
      keys: a random key for each example, for models that take `keys`.
      objective: loss of each example, and whether it is classified correctly (else the accuracy is NaN); static.
      axis_name: mapped axis or axes whose members train on one batch together; static.
      accumulate_steps: number k of micro-batches, of the examples j, j + k, j + 2k, …, whose gradients are accumulated
        in a scan; the running statistics move once, by the merged moments of all (which needs layers of ours whose
        moments merge: not `LpBatchNorm`, `GhostBatchNorm` and `NoisyBatchNorm`), and what else the model changes with
        each; static.
      rngs: random keys by name for what the model draws, such as 'dropout', or the 'noise' of `NoisyBatchNorm`; the
        same for all members. Each member and each micro-batch has draws of its own, but for 'noise'.

    Returns:
      The next state, and the means over the batch of the metrics before the update.

    Raises:
      ValueError: if `accumulate_steps` is not positive or does not divide the batch; for weights whose dimensions are
        not the first of the losses, or with which a model has batch norms but its call no `mask`; with
        `accumulate_steps`, for statistics that a loop carries or that one branch of a condition moves.
    """
    check_accumulate_steps(accumulate_steps)
    x, y = jax.tree.map(jnp.asarray, (x, y))
    if weights is not None:
        weights = as_weights(weights)
        x = jax.tree.map(functools.partial(_without_padding, weights), x)
    batch = Batch(x, y, weights, keys)
    expected = num_examples(x) * (1 if axis_name is None else lax.axis_size(axis_name))
    if rngs is not None and not isinstance(rngs, Mapping):
        raise TypeError(f"rngs must be random keys by name, such as {{'dropout': key}}, got {type(rngs).__name__}.")
    for name in (axis_name,) if isinstance(axis_name, str) else axis_name or ():
        if lax.axis_size(name) > 1:  # along an axis of one member the key remains the same for all
            rngs = fold_in_rngs(rngs, lax.axis_index(name))
    sums, updates = _accumulate(state, batch, objective, accumulate_steps, expected, rngs)
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    total = jnp.where(sums.weight > 0, sums.weight, 1)
    grads = jax.tree.map(lambda g: g * (expected / total).astype(g.dtype), sums.grads)
    metrics = jax.tree.map(lambda m: m / total, sums.metrics)
    for name, value in updates.items():  # of the type before, as a loop of steps needs
        updates[name] = freeze(value) if isinstance(state.variables.get(name), FrozenDict) else value
    batch_stats = updates.pop("batch_stats")
    others = {**state.others, **updates} if updates else state.others
    return state.apply_gradients(grads=grads, batch_stats=batch_stats, others=others), metrics


def _without_padding(weights: Array, x: Any) -> Any:
    """Returns inputs with zeros where the weight is zero, lest NaN of a padding example reach the parameters."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or weights.shape != x.shape[: weights.ndim]:
        return x
    return jnp.where(has_weight(weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))), x, 0)


def fold_in_rngs(rngs: Any, number: Any) -> dict[str, Array] | None:
    """Returns random keys for one of several parts of a batch or training; that of 'noise' is common to all parts."""
    if rngs is None:
        return None
    return {name: key if name == NOISE else jax.random.fold_in(key, number) for name, key in rngs.items()}


def check_accumulate_steps(steps: int) -> None:
    """Raises `ValueError` unless there is at least one micro-batch."""
    if steps < 1:
        raise ValueError(f"accumulate_steps must be at least 1, got {steps}.")


def _accumulate(
    state: TrainState, batch: Batch, objective: Objective, steps: int, expected: int, rngs: Any = None
) -> tuple[_Sums, Any]:
    """Returns the sums over the examples of this member, in micro-batches, and the collections after them.

    The running statistics move once; what else the model changes, it changes with each micro-batch.
    """
    params = vary_like(state.params, first := jax.tree.leaves(batch.x)[0])

    def sums_of(batch: Batch, rngs: Any, collections: Any):
        others = {name: values for name, values in collections.items() if name != "batch_stats"}
        own = state.replace(
            batch_stats=collections.get("batch_stats", state.batch_stats), others={**(state.others or {}), **others}
        )

        def loss(params):
            value, aux = _loss_sums(params, own, batch, objective, rngs)
            return value / expected, aux

        grads, (metrics, weight, updates) = jax.grad(loss, has_aux=True)(params)
        return _Sums(grads, metrics, weight), updates

    if steps == 1:
        return sums_of(batch, rngs, {})
    if num_examples(batch.x) % steps:
        raise ValueError(f"accumulate_steps must divide the {num_examples(batch.x)} examples of a device, got {steps}.")

    def micro_step(carry, numbered):
        (sums, collections), (micro_batch, number) = carry, numbered
        try:
            with _calls.intercept(_calls.is_norm, _keep_moments):
                more, updates = sums_of(micro_batch, fold_in_rngs(rngs, number), collections)
        except TypeError as error:
            if "structure" not in str(error):
                raise
            raise ValueError(
                "accumulate_steps keeps the moments of each call of a batch norm beside its statistics, which it "
                "cannot where a loop carries the statistics, or only one branch of a condition has the batch norm."
            ) from error
        flat = flatten_dict(updates)
        kept = {path: flat.pop(path) for path in list(flat) if path[-1] == MOMENTS_OF_CALLS}
        return (jax.tree.map(jnp.add, sums, more), unflatten_dict(flat)), kept

    micro_batches = jax.tree.map(lambda v: v.reshape((-1, steps, *v.shape[1:])).swapaxes(0, 1), batch)
    zero = jnp.zeros((), _sum_dtype(params, batch.x))
    start = _Sums(jax.tree.map(jnp.zeros_like, params), Metrics(zero, zero), zero)
    names = [name for name in state.variables if name not in _FIXED]
    collections = unflatten_dict(flatten_dict({name: state.variables[name] for name in names}))
    (sums, collections), kept = lax.scan(
        micro_step, (vary_like(start, first), collections), (micro_batches, jnp.arange(steps))
    )
    missing = {name: {} for name in names if name not in collections}  # those without variables
    return sums, _moved_once(collections, kept) | missing


@taking_products
def _keep_moments(module: Any, call: Any, x: Any, options: dict[str, Any]) -> Any:
    """Calls a batch norm so that it keeps the moments of its input in place of moving its statistics."""
    statistics = statistics_of(module)
    if statistics is not None and statistics.moves:
        if not (statistics.merges and statistics.are_given):
            raise ValueError(
                f"accumulate_steps moves the running statistics once, by merged moments, which "
                f"{name_of(module.path)} ({type(module).__name__}) does not give. Use bnjax.linen.BatchNorm or "
                "bnjax.nnx.BatchNorm."
            )
        _calls.set_attribute(module, "keeps_moments", True)
    return call(x, **options)


def _moved_once(collections: Any, kept_by_path: Any) -> Any:
    """Moves running statistics once, by the kept moments of all micro-batches, which the first axis is over.

    All that is kept has the shape of the statistics, the axes of Flax's scan and vmap among them, wherever these are.
    """
    flat: dict[tuple[Any, ...], Any] = dict(flatten_dict(collections))
    for path, calls in kept_by_path.items():
        names = {name: (*path[:-1], name) for name in ("mean", "var")}
        if missing := [name_of(own[1:]) for own in names.values() if own not in flat]:
            raise ValueError(
                f"accumulate_steps moves the running statistics of each batch norm, of which {', '.join(missing)} are "
                "shared with another one. Give each its own."
            )
        for kept in calls:
            first, rest = (jax.tree.map(lambda v, part=part: v[part], kept["moments"]) for part in (0, slice(1, None)))
            merged = lax.scan(lambda a, b: (merge_moments(a, b), None), first, rest)[0]
            momentum, bessel_correction = (kept[name][0] for name in ("momentum", "bessel_correction"))
            merged = merged._replace(var=jnp.where(bessel_correction, unbiased_var(merged), merged.var))
            new = moved_batch_stats({name: flat[own] for name, own in names.items()}, merged, momentum)
            flat |= {own: new[name] for name, own in names.items()}
            if (steps := (*path[:-1], "steps")) in flat:  # the counter of a batch renorm's warm-up
                flat[steps] += 1
    return unflatten_dict(flat)


def gradients(
    state: TrainState, x: Any, y: Any, *, objective: Objective, rngs: Mapping[str, Array] | None = None
) -> Any:
    """Computes the gradient of the mean training loss of a batch by the parameters.

    Args:
      state: parameters and running statistics, which stay as they are.
      x: inputs of the batch, a tuple for a model of several.
      y: labels of the batch.
      objective: loss of each example.
      rngs: random keys by name for what the model draws, as in `train_step`.

    Returns:
      The gradient, in the structure of `state.params`.
    """
    x, y = jax.tree.map(jnp.asarray, (x, y))
    return _accumulate(state, Batch(x, y), objective, 1, num_examples(x), rngs)[0].grads
