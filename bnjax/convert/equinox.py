"""Conversion of batch norms and models between Equinox and Flax."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.convert._framework import Framework, Names, batch_norm_from, variables_from, variables_to
from bnjax.convert.state import SETTLED, BatchNormState, debiased_steps

EQUINOX = Framework(
    title="Equinox",
    separator=".",
    leaves={
        **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
        **dict.fromkeys(("linear bias", "bias"), "bias"),
        **{"mean": "mean", "var": "var"},  # these are in the state, by names of ours
    },
    out_first=True,
)


def batch_norm_from_equinox(module: Any, state: Any) -> BatchNormState:
    """Converts an `equinox.nn.BatchNorm` of either mode. In mode 'batch' the running statistics are debiased:

        h ← ρ h + (1 − ρ) s, average = h / (1 − ρ^T) in step T

    In mode 'ema' they are those of the first batch after the first step, then r ← ρ r + (1 − ρ) s; there training
    normalizes with r too, as `bnjax.variants.moving_batch_norm` does. In mode 'batch', Equinox 0.13 starts the
    variance's h at one but divides it all the same, so that its average begins far too large. The average that Equinox
    uses at inference is converted, and from the second step on it moves by the same rule in both libraries.

    Args:
      module: the batch norm.
      state: state of the model or of the batch norm.

    Returns:
      The batch norm. Equinox does not count the steps of mode 'ema'; there `steps` is 0 before the first and 1 after.

    References:
      equinox/nn/_batch_norm.py in Equinox 0.13.8.

    >>> import equinox as eqx
    >>> layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, 'batch', mode='batch')
    >>> batch_norm_from_equinox(layer, state).update
    'debiased'
    """
    params, batch_stats = batch_norm_from(EQUINOX, _arrays(module, state))
    if module.mode == "ema":
        update, steps = "first", int(not state.get(module.ema_first_time_index))
    else:
        update, steps = "debiased", int(state.get(module.batch_counter))
    return BatchNormState(params, batch_stats, module.eps, module.momentum, update=update, steps=steps)


def batch_norm_to_equinox(state: BatchNormState, module: Any, module_state: Any) -> tuple[Any, Any]:
    """Returns an `equinox.nn.BatchNorm` and its state with the arrays of a batch norm.

    In mode 'batch', statistics that are not debiased come with a counter so large that they go on as they did.

    Args:
      state: the batch norm.
      module: module of either mode, made with `eps=state.epsilon` and `momentum=state.decay`.
      module_state: state of the module, which stays usable.

    Returns:
      `(module, module_state)` of the same structure.

    Raises:
      ValueError: where names or shapes disagree.

    >>> import equinox as eqx
    >>> layer, layer_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, 'batch', mode='batch')
    >>> state = batch_norm_from_equinox(layer, layer_state)
    >>> layer, layer_state = batch_norm_to_equinox(state, layer, layer_state)
    """
    return variables_to_equinox(state.variables, module, module_state, steps=debiased_steps(state))


def variables_from_equinox(
    model: Any, state: Any, like: Any, names: Names = None, *, transposed: Collection[str] = ()
) -> Any:
    """Converts the variables of an Equinox model to those of a Flax model.

    Kernels [out, in, *window] become [*window, in, out], those of transposed convolutions too, and biases lose their
    axes of size one. Mind that Equinox pads both sides alike and flattens [channels, height, width], as PyTorch does.

    Args:
      model: the Equinox model.
      state: state of the model.
      like: variables of the Flax model, or their shapes: `jax.eval_shape(model.init, …)`.
      names: path of each of our modules in the Equinox model, such as {'Conv_0': 'layers.0'}; a function of our path
        does too.
      transposed: our paths of transposed convolutions, in addition to those called 'ConvTranspose…'.

    Returns:
      Variables in the structure, shapes and dtypes of `like`.

    Raises:
      ValueError: for missing, unused or misshapen arrays and modules without a name, all in one message.

    >>> import equinox as eqx, flax.linen as nn
    >>> model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    >>> like = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, variables_from_equinox(model, None, like))
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    """
    return variables_from(EQUINOX, _arrays(model, state), like, names, transposed)


def variables_to_equinox(
    variables: Any,
    model: Any,
    state: Any,
    names: Names = None,
    *,
    steps: int = SETTLED,
    transposed: Collection[str] = (),
) -> tuple[Any, Any]:
    """Returns an Equinox model and its state with the variables of a Flax model.

    Args:
      variables: variables of the Flax model.
      model: the Equinox model.
      state: state of the model, which stays usable.
      names: names of our modules, as in `variables_from_equinox`.
      steps: T, the number of training steps since the averages of batch norms of mode 'batch' began; by default so many
        that the averages go on as those that are not debiased.
      transposed: transposed convolutions, as in `variables_from_equinox`.

    Returns:
      `(model, state)` of the same structure.

    Raises:
      ValueError: where names or shapes disagree.

    >>> import equinox as eqx
    >>> model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    >>> model, _ = variables_to_equinox({'params': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}, model, None)
    >>> print(model.bias)
    [1. 1.]
    """
    arrays = variables_to(EQUINOX, variables, names, transposed, _arrays(model, state))
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy, as setting a value spends the state
    for path, module in _batch_norms(model):
        mean, var = (jnp.asarray(arrays[_join(path, leaf)]) for leaf in ("mean", "var"))
        if module.mode == "ema":
            state = state.set(module.ema_first_time_index, jnp.array(False))
            state = state.set(module.ema_state_index, (mean, var))
        else:
            counter = state.get(module.batch_counter) * 0 + steps  # keeps the counter's dtype and weak type
            divisor = _divisor(module, counter)
            state = state.set(module.batch_counter, counter)
            state = state.set(module.batch_state_index, (mean * divisor, var * divisor))

    def put(path, leaf):
        return jnp.asarray(arrays[key]) if (key := _key(path)) in arrays else leaf

    return jax.tree_util.tree_map_with_path(put, model), state


def _is_batch_norm(x: Any) -> bool:
    return hasattr(x, "ema_state_index") and hasattr(x, "batch_state_index")


def _batch_norms(model: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_batch_norm)[0]
    return [(_key(path), leaf) for path, leaf in leaves if _is_batch_norm(leaf)]


def _arrays(model: Any, state: Any) -> dict[str, Any]:
    """Returns parameters by their path, and the running statistics by the path of their batch norm."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_batch_norm)[0]
    arrays = {_key(path): leaf for path, leaf in leaves if isinstance(leaf, np.ndarray | jax.Array)}
    for path, module in _batch_norms(model):
        own = {"weight": module.weight, "bias": module.bias} | _averages(module, state)
        arrays |= {_join(path, name): value for name, value in own.items() if value is not None}
    return arrays


def _averages(module: Any, state: Any) -> dict[str, Any]:
    """Returns the running statistics that inference uses."""
    if module.mode == "ema":
        mean, var = state.get(module.ema_state_index)
    else:
        mean, var = (h / _divisor(module, state.get(module.batch_counter)) for h in state.get(module.batch_state_index))
    return {"mean": mean, "var": var}


def _divisor(module: Any, counter: Any) -> Any:
    """Computes 1 − ρ^T as Equinox does, with 1 before the first step."""
    return jnp.where(counter == 0, 1, 1 - module.momentum**counter)


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
