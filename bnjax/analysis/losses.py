"""Losses of Flax models for `bnjax.analysis`, with an explicit batch-norm mode; running statistics never move.

The function that is measured depends on how the batch norms normalize. With W the parameters and S the statistics:

    'batch'        L(W; statistics of the measured batch at W): the function that training descends
    'running'      L(W; S), S being the running statistics: inference
    'frozen'       L(W; S), S being the statistics of a given batch at a given W₀, held (for a layer that is called
                   several times, those of its last call)
    'reestimated'  L(W; S(W)), S(W) being the statistics of a given batch at the same W, such as on a path of solutions

These functions have different gradients and Hessians. Only in mode 'batch' the model is in its training phase, with the
noise of dropout and of `bnjax.linen.NoisyBatchNorm`; statistics of a batch are taken without it. (On a mesh global and
each device's statistics differ too: see `bnjax.analysis.shard_loss`.)
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import lax
from jaxtyping import Array

from bnjax import _calls
from bnjax._functional import functional, name_of
from bnjax._objective import Objective, inputs_of, losses_and_correctness, mask_options, phase, weights_of_losses
from bnjax.analysis import _trees

MODES = ("batch", "running", "frozen", "reestimated")


def linen_loss(
    model: nn.Module,
    variables: Mapping[str, Any],
    objective: Objective,
    *,
    mode: str = "batch",
    at: Any = None,
    argument: str | None = "training",
    rngs: Mapping[str, Array] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., Array]:
    """Returns the mean loss of a linen model on a batch, as a function of its parameters.

    Args:
      model: linen module, with batch norms of `bnjax.linen` or of Flax.
      variables: collections of the model; 'params' matters in mode 'frozen' alone, where it is W₀.
      objective: maps outputs and labels to the loss of each example, such as `bnjax.training.cross_entropy`; of a pair
        with whether each is classified correctly, the loss counts.
      mode: mode in which the batch norms normalize, 'batch', 'running', 'frozen' or 'reestimated' (see the module).
      at: inputs of the batch whose statistics are taken, for 'frozen' and 'reestimated'.
      argument: name of the argument of the model's call that says whether it trains ('training', 'train', …) or the
        contrary ('use_running_average', 'deterministic', …); None for a model without such an argument.
      rngs: random keys by name, for dropout; the same at every call, so that the loss is one function.
      axis_name: mapped axes over which weights are summed, where the loss is called on parts of a batch whose mean is
        taken (`bnjax.analysis.shard_loss`); without weights it makes no difference.

    Returns:
      `loss_fn(params, x, y, weights=None) -> scalar`: `Σ w l / Σ w`; the weights are the batch norms' `mask` too.

    Raises:
      ValueError: for an unknown mode, or one that needs `at` without it.

    >>> from bnjax import training
    >>> from bnjax.analysis import losses
    >>> from bnjax.linen import BatchNorm
    >>> from bnjax.models import Perceptron
    >>> model = Perceptron((4,), 2, BatchNorm, 'before')
    >>> x, y = jnp.arange(6.0).reshape(3, 2), jnp.array([0, 1, 0])
    >>> variables = model.init(jax.random.key(0), x, training=False)
    >>> loss = losses.linen_loss(model, variables, training.cross_entropy, mode='running')
    >>> loss(variables['params'], x, y).shape
    ()
    """
    return _loss_of(model.apply, variables, objective, mode, at, argument, rngs, axis_name)


def _loss_of(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    objective: Objective,
    mode: str,
    at: Any,
    argument: str | None,
    rngs: Mapping[str, Array] | str | None,
    axis_name: str | tuple[str, ...] | None,
) -> Callable[..., Array]:
    """Returns the mean loss of a model in its functional form."""
    _check_mode(mode, at)
    others = {name: values for name, values in variables.items() if name != "params"}
    options = {} if rngs is None else {"rngs": rngs}
    if mode == "frozen":
        others |= {"batch_stats": _batch_stats_of(apply, variables, at, None, argument, rngs)}
    has_norms = bool(jax.tree.leaves(others.get("batch_stats", {})))

    def loss(params: Any, x: Any, y: Any, weights: Any = None) -> Array:
        collections = {**others, "params": params}
        if mode == "reestimated":
            collections["batch_stats"] = _batch_stats_of(apply, collections, at, None, argument, rngs)
        masked = mask_options(apply, weights, is_needed=mode == "batch" and has_norms)
        told = {**phase(argument, mode == "batch", apply), **masked, **options}
        outputs = apply(collections, *inputs_of(x), **told, mutable=list(others))[0]
        return _mean(objective, outputs, y, weights, axis_name)

    return loss


def linen_batch_stats(
    model: nn.Module,
    variables: Mapping[str, Any],
    x: Any,
    *,
    weights: Any = None,
    argument: str | None = "training",
    rngs: Mapping[str, Array] | None = None,
) -> Any:
    """Returns the collection 'batch_stats' with the statistics of one batch in place of the running ones.

    Args:
      model: linen module.
      variables: collections of the model, the parameters among them.
      x: inputs of the batch.
      weights: weights of the examples, as the batch norms' `mask`.
      argument: name of the call's argument, as in `linen_loss`.
      rngs: random keys by name, with which dropout is on, as in training; by default it is off.

    Returns:
      Means and biased variances, in the structure of `variables['batch_stats']`.

    >>> from bnjax.analysis import losses
    >>> model = nn.BatchNorm(use_running_average=None)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = model.init(jax.random.key(0), x, use_running_average=True)
    >>> losses.linen_batch_stats(model, variables, x, argument='use_running_average')
    {'mean': Array([2.], dtype=float32), 'var': Array([1.], dtype=float32)}
    """
    return _batch_stats_of(model.apply, variables, x, weights, argument, rngs, has_noise=rngs is not None)


def _batch_stats_of(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    x: Any,
    weights: Any,
    argument: Any,
    rngs: Any,
    *,
    has_noise: bool = False,
) -> Any:
    """Returns the statistics of one batch, of a model in its functional form.

    Without noise they are those of a call as in inference, but for the batch norms that use the batch's statistics in
    training; these are normalized by them alone.
    """
    keys = {} if rngs is None else {"rngs": rngs}
    mutable = [name for name in variables if name != "params"]

    def call(training: bool, keys: Mapping[str, Any], **options: Any) -> Any:
        told = {**phase(argument, training, apply), **options, **keys}
        return apply(variables, *inputs_of(x), **told, mutable=mutable)[1]

    # What is only traced may take any keys: in linen that of 'params' stands for all others, an nnx model has its own.
    any_keys = {"rngs": "own" if hasattr(apply, "argument") else {"params": jax.random.key(0), **(rngs or {})}}
    moving = _calls.moving_norms(lambda: call(True, any_keys))

    def replace(module: Any, call: _calls.Call, x: Any, options: dict[str, Any]) -> Any:
        if name_of(module.path) in moving:
            return _calls.taking_batch_statistics(module, call, x, options)
        return call(x, **options)

    masked = mask_options(apply, weights, is_needed=True)
    with _calls.intercept(_calls.is_norm, replace):
        updates = call(has_noise, keys, **masked)
    return updates.get("batch_stats", {})


def layers_in_order(
    model: Any, variables: Mapping[str, Any], x: Any, *, argument: str | None = "training"
) -> list[tuple[str, ...]]:
    """Returns the layers of a model in the order in which their parameters are used, as paths into these.

    A layer begins with each module that has a kernel (any parameter of two and more dimensions); the modules without
    kernels that follow it, such as its batch norm, belong to it.

    Args:
      model: linen module, or the function `apply` that `bnjax.nnx.functional` makes of an nnx model.
      variables: collections of the model.
      x: a batch of inputs; only its shape and dtype matter.
      argument: name of the call's argument, as in `linen_loss`; for an nnx model, that which `functional` was told.

    Raises:
      ValueError: for parameters that the model does not use.

    >>> from bnjax.analysis import losses
    >>> from bnjax.linen import BatchNorm
    >>> from bnjax.models import Perceptron
    >>> model = Perceptron((4, 4), 2, BatchNorm, 'before')
    >>> variables = model.init(jax.random.key(0), jnp.ones((3, 2)), training=False)
    >>> losses.layers_in_order(model, variables, jnp.ones((3, 2)))
    [('Dense_0', 'BatchNorm_0'), ('Dense_1', 'BatchNorm_1'), ('Dense_2',)]
    """
    params = variables["params"]

    def call(params: Any, others: Mapping[str, Any]) -> Any:
        return _call(model, {**others, "params": params}, x, False, argument, None)

    program = jax.make_jaxpr(call)(params, {name: values for name, values in variables.items() if name != "params"})
    paths = [tuple(_trees.path_name((key,)) for key in path) for path, _ in jax.tree.leaves_with_path(params)]
    uses = dict(zip(paths, _calls.first_uses(program.jaxpr), strict=False))  # the parameters are its first inputs
    if missing := ["/".join(path) for path, use in uses.items() if use is None]:
        raise ValueError(f"params must all be used by the model's call, for their order, got {', '.join(missing)} too.")
    # A module that has parameters of its own beside those of others is not one layer: each of its own counts by itself.
    nested = {(), *(path[:i] for path in paths for i in range(len(path) - 1))}
    modules: dict[str, list[Any]] = {}
    for path, use in uses.items():
        modules.setdefault("/".join(path if path[:-1] in nested else path[:-1]), []).append(use)
    layers: list[tuple[str, ...]] = []
    for name in sorted(modules, key=lambda name: min(modules[name])):
        if not layers or any(ndim >= 2 for _, ndim in modules[name]):
            layers.append((name,))
        else:
            layers[-1] += (name,)
    return layers


def layer_outputs(
    model: Any,
    variables: Mapping[str, Any],
    x: Any,
    *,
    mode: str = "batch",
    argument: str | None = "training",
    rngs: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Returns the output of each layer of a model: of its batch norm where there is one, else of its kernel.

    Where the nonlinearity follows directly, this is its input, for `bnjax.analysis.activation_statistics`.

    Args:
      model: linen module, or `apply` of an nnx model, as in `layers_in_order`.
      variables: collections of the model.
      x: inputs of a batch.
      mode: whether batch norms normalize by the batch's statistics ('batch') or by the running ones ('running').
      argument: name of the call's argument, as in `layers_in_order`.
      rngs: random keys, as in `linen_loss`; of an nnx model by default its own random states.

    Returns:
      Arrays `[batch, …, units]` by the layer's first path, as in `layers_in_order`.

    Raises:
      ValueError: for a layer that is called by another method than `__call__`, or does not end with a module.

    >>> from bnjax.analysis import losses
    >>> from bnjax.models import Perceptron
    >>> model = Perceptron((4,), 2)
    >>> variables = model.init(jax.random.key(0), jnp.ones((3, 2)), training=False)
    >>> {name: h.shape for name, h in losses.layer_outputs(model, variables, jnp.ones((3, 2))).items()}
    {'Dense_0': (3, 4), 'Dense_1': (3, 2)}
    """
    if mode not in MODES[:2]:
        raise ValueError(f"mode must be 'batch' or 'running', got {mode!r}.")
    layers = layers_in_order(model, variables, x, argument=argument)
    last = {layer[-1]: layer[0] for layer in layers}

    def keep(module: Any, call: Callable[..., Any], x: Any, options: dict[str, Any]) -> Any:
        y = call(x, **options)
        if name_of(module.path) in last:
            setattr(module, kept, nnx.Intermediate((y,)))
        return y

    options: dict[str, Any] = {"mutable": ["intermediates", "batch_stats"]}
    if isinstance(model, nn.Module):
        kept, keeping = "__call__", contextlib.nullcontext()
        options["capture_intermediates"] = lambda module, name: name == kept and name_of(module.path) in last
    else:
        kept, keeping = "output_of_layer", _calls.intercept(_has_parameters, keep)
    with keeping:
        outputs = _call(model, variables, x, mode == "batch", argument, rngs, **options)[1].get("intermediates", {})
    found: Any = {name_of(path): sown for path, sown in flatten_dict(outputs).items()}
    if missing := [path for path in last if f"{path}/{kept}" not in found]:
        raise ValueError(f"layers must end with a module that is called, got {', '.join(missing)}.")
    return {name: found[f"{path}/{kept}"][0] for path, name in last.items()}


def _has_parameters(module: Any) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _call(
    model: Any, variables: Mapping[str, Any], x: Any, training: bool, argument: str | None, rngs: Any, **options: Any
) -> Any:
    """Calls a linen module, or an nnx model in its functional form."""
    if not isinstance(model, nn.Module):
        argument, rngs = model.argument, "own" if rngs is None else rngs
    keys = {} if rngs is None else {"rngs": rngs}
    apply = getattr(model, "apply", model)
    return apply(variables, *inputs_of(x), **phase(argument, training, apply), **keys, **options)


def nnx_loss(
    model: nnx.Module,
    objective: Objective,
    *,
    mode: str = "batch",
    at: Any = None,
    argument: str | None = "training",
    rngs: Mapping[str, Array] | str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Callable[..., Array], Any]:
    """Returns the mean loss of an nnx model on a batch, as a function of its parameters, and the parameters.

    Args:
      model: nnx module, with batch norms of `bnjax.nnx` or of Flax; it stays as it is.
      objective: loss of each example, as in `linen_loss`.
      mode: mode of the batch norms, as in `linen_loss`; W₀ are the model's parameters.
      at: inputs of the batch whose statistics are taken, as in `linen_loss`.
      argument: name of the call's argument, as in `linen_loss`, where the model's call takes one of this name; without
        it the model's `train()` and `eval()` say whether it trains.
      rngs: random keys by name; by default the model's own random states, the same at every call.
      axis_name: mapped axes, as in `linen_loss`.

    Returns:
      `loss_fn(params, x, y, weights=None) -> scalar`, and `params`, a dict of arrays.

    Raises:
      ValueError: for an unknown mode, or one that needs `at` without it.

    >>> from flax import nnx
    >>> from bnjax import training
    >>> from bnjax.analysis import losses
    >>> from bnjax.nnx import BatchNorm
    >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> loss, params = losses.nnx_loss(model, training.cross_entropy)
    >>> loss(params, jnp.ones((3, 2)), jnp.array([0, 1, 0])).shape
    ()
    """
    apply, variables = functional(model, argument=argument)
    rngs = "own" if rngs is None else rngs
    loss = _loss_of(apply, variables, objective, mode, at, apply.argument, rngs, axis_name)
    return loss, variables["params"]


def nnx_batch_stats(
    model: nnx.Module,
    x: Any,
    *,
    weights: Any = None,
    argument: str | None = "training",
    rngs: Mapping[str, Array] | str | None = None,
) -> Any:
    """Returns the collection 'batch_stats' of an nnx model with the statistics of one batch, as `linen_batch_stats`.

    Args:
      model: nnx module; it stays as it is. `bnjax.nnx.update(model, {'batch_stats': …})` puts them into it.
      x: inputs of the batch.
      weights: weights of the examples, as the batch norms' `mask`.
      argument: name of the call's argument, as in `nnx_loss`.
      rngs: random keys by name, or 'own' for the model's own random states, with which dropout is on, as in training;
        by default it is off.

    Returns:
      Means and biased variances, in the structure of the 'batch_stats' of `bnjax.nnx.functional`.

    >>> from bnjax.analysis import losses
    >>> from bnjax.nnx import BatchNorm
    >>> model = BatchNorm(1, rngs=nnx.Rngs(0))
    >>> losses.nnx_batch_stats(model, jnp.array([[1.0], [3.0]]), argument='use_running_average')
    {'mean': Array([2.], dtype=float32), 'var': Array([1.], dtype=float32)}
    """
    apply, variables = functional(model, argument=argument)
    keys = "own" if rngs is None else rngs
    return _batch_stats_of(apply, variables, x, weights, apply.argument, keys, has_noise=rngs is not None)


def _mean(objective: Objective, outputs: Any, labels: Any, weights: Any, axis_name: Any) -> Array:
    """Computes the weighted mean of the examples' losses; with `axis_name`, members' values whose mean is that mean."""
    losses = losses_and_correctness(objective, outputs, labels)[0]
    if weights is None:
        return losses.mean()
    weights = weights_of_losses(objective, losses, weights)
    total, members = weights.sum(), 1
    if axis_name is not None:
        total, members = lax.psum(total, axis_name), lax.axis_size(axis_name)
    kept = jnp.where(weights > 0, losses, 0)  # a masked loss may be NaN; inputs must be finite for the gradient
    return members * (weights * kept).sum() / jnp.where(total > 0, total, 1)


def _check_mode(mode: str, at: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode in ("frozen", "reestimated") and at is None:
        raise ValueError(f"mode {mode!r} needs the inputs of a batch whose statistics are taken: give at=x.")
