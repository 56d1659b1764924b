"""Conversion of batch norms and models between Haiku and Flax."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.convert._framework import Framework, Names, batch_norm_from, variables_from, variables_to
from bnjax.convert.state import SETTLED, BatchNormState, debiased_steps

HAIKU = Framework(
    title="Haiku",
    separator="/",
    leaves={
        **{"kernel": "w", "linear bias": "b", "embedding": "embeddings", "scale": "scale", "bias": "offset"},
        **{"mean": "~/mean_ema/average", "var": "~/var_ema/average"},
    },
    ignored=("hidden", "counter"),
    transposed_swaps=True,
)
Tree = Mapping[str, Mapping[str, Any]]


def batch_norm_from_haiku(
    params: Tree, state: Tree, name: str, *, decay_rate: float, eps: float = 1e-5
) -> BatchNormState:
    """Converts an `hk.BatchNorm`, whose running statistics start at zero and are debiased:

        h ← ρ h + (1 − ρ) s, average = h / (1 − ρ^T) in step T

    Args:
      params: params of the model.
      state: state of the model.
      name: name of the batch norm, such as 'res_net/~/initial_batchnorm'.
      decay_rate: ρ, the weight of the old value.
      eps: number added to the variance.

    Returns:
      The batch norm, without the leading axes of size one.

    Raises:
      ValueError: for missing or misshapen arrays.

    References:
      haiku/_src/batch_norm.py and haiku/_src/moving_averages.py in Haiku 0.0.17.

    >>> ema = {'hidden': np.full((1, 2), 0.1), 'average': np.ones((1, 2)), 'counter': 1}
    >>> state = {'batch_norm/~/mean_ema': ema, 'batch_norm/~/var_ema': ema}
    >>> state = batch_norm_from_haiku({}, state, 'batch_norm', decay_rate=0.9)
    >>> print(state.batch_stats['mean'], [f'{state.momentum(step):.3f}' for step in (1, 2, 100)])
    [1. 1.] ['0.474', '0.631', '0.900']
    """
    arrays = _flat(params) | _flat(state)
    params_and_stats = batch_norm_from(HAIKU, arrays, name)
    steps = int(arrays.get(f"{name}/~/mean_ema/counter", 0))
    return BatchNormState(*params_and_stats, epsilon=eps, decay=decay_rate, update="debiased", steps=steps)


def batch_norm_to_haiku(state: BatchNormState, name: str, *, ndim: int = 2) -> tuple[dict, dict]:
    """Returns the params and state of an `hk.BatchNorm` made with `decay_rate=state.decay` and `eps=state.epsilon`.

    Statistics that are not debiased come with a counter so large that they go on as they did.

    Args:
      state: the batch norm.
      name: name of the batch norm.
      ndim: number of axes of its input, the batch's included; Haiku's arrays have as many.

    Returns:
      `(params, state)`, to be merged with those of other modules.

    >>> state = BatchNormState({}, {'mean': np.zeros(2), 'var': np.ones(2)})
    >>> params, state = batch_norm_to_haiku(state, 'batch_norm', ndim=4)
    >>> state['batch_norm/~/mean_ema']['average'].shape
    (1, 1, 1, 2)
    """
    arrays = variables_to(HAIKU, state.variables, lambda _: name)
    arrays = {key: value.reshape((1,) * (ndim - value.ndim) + value.shape) for key, value in arrays.items()}
    params, averages = ({k: v for k, v in arrays.items() if k.endswith("/average") == is_of} for is_of in (False, True))
    hidden = {f"{key.removesuffix('average')}hidden": value for key, value in averages.items()}
    counters = {f"{key.removesuffix('average')}counter": np.int32(0) for key in averages}
    template = averages | hidden | counters
    return _nested(params), _nested(_with_hidden(template, averages, state.decay or 0.0, debiased_steps(state)))


def variables_from_haiku(
    params: Tree, state: Tree, like: Any, names: Names = None, *, transposed: Collection[str] = ()
) -> Any:
    """Converts the variables of a Haiku model to those of a Flax model.

    Kernels have the same layout in both. A transposed convolution's kernel, [*window, out, in], becomes that of
    `nn.ConvTranspose`, [*window, in, out].

    Args:
      params: params of the Haiku model.
      state: state of the Haiku model; {} for none.
      like: variables of the Flax model, or their shapes: `jax.eval_shape(model.init, …)`.
      names: Haiku's name of each of our modules, such as {'Conv_0': 'res_net/~/initial_conv'}; a function of our path
        does too. By default both are the same.
      transposed: our paths of transposed convolutions, in addition to those called 'ConvTranspose…'.

    Returns:
      Variables in the structure, shapes and dtypes of `like`.

    Raises:
      ValueError: for missing, unused or misshapen arrays and modules without a name, all in one message.

    References:
      haiku/_src/conv.py in Haiku 0.0.17 for transposed convolutions.

    >>> import flax.linen as nn
    >>> like = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> params = {'mlp/~/linear_0': {'w': np.ones((3, 2)), 'b': np.zeros(2)}}
    >>> jax.tree.map(jnp.shape, variables_from_haiku(params, {}, like, {'': 'mlp/~/linear_0'}))
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    """
    return variables_from(HAIKU, _flat(params) | _flat(state), like, names, transposed)


def variables_to_haiku(
    variables: Any,
    params: Tree,
    state: Tree,
    names: Names = None,
    *,
    decay_rate: float = 0.0,
    steps: int = SETTLED,
    transposed: Collection[str] = (),
) -> tuple[dict, dict]:
    """Converts the variables of a Flax model to the params and state of a Haiku model.

    Args:
      variables: variables of the Flax model.
      params: params of the Haiku model, as its init gives them.
      state: state of the Haiku model, as its init gives it.
      names: names of our modules, as in `variables_from_haiku`.
      decay_rate: ρ of the batch norms, needed where `steps` is given.
      steps: T, the number of training steps since the averages began; by default so many that the averages go on as
        those that are not debiased.
      transposed: transposed convolutions, as in `variables_from_haiku`.

    Returns:
      `(params, state)` in the structure, shapes and dtypes of the arguments.

    Raises:
      ValueError: where names or shapes disagree.

    >>> params = {'linear': {'w': np.ones((3, 2), np.float32), 'b': np.ones(2, np.float32)}}
    >>> variables = {'params': {'kernel': jnp.zeros((3, 2)), 'bias': jnp.zeros(2)}}
    >>> variables_to_haiku(variables, params, {}, {'': 'linear'})[0]['linear']['b']
    array([0., 0.], dtype=float32)
    """
    template = _flat(state)
    arrays = variables_to(HAIKU, variables, names, transposed, _flat(params) | template)
    filled = _with_hidden(template, arrays, decay_rate, steps)
    return _nested({key: arrays[key] for key in _flat(params)}), _nested(filled)


def _with_hidden(template: Mapping[str, Any], arrays: Mapping[str, Any], decay: float, steps: int) -> dict[str, Any]:
    """Returns the state of `template` with the averages of `arrays`, and the hidden values and counters to these."""
    divisor = 1 - np.asarray(jnp.power(jnp.float32(decay), steps))  # as Haiku computes it
    filled = {}
    for key, old in template.items():
        base, _, leaf = key.rpartition("/")
        if leaf == "counter":
            filled[key] = np.asarray(steps, old.dtype)
        elif leaf == "hidden":
            average = arrays[f"{base}/average"]
            filled[key] = np.asarray(average * divisor, average.dtype)
        else:
            filled[key] = arrays[key]
    return filled


def _flat(tree: Tree) -> dict[str, Any]:
    return {f"{module}/{leaf}": np.asarray(value) for module, leaves in tree.items() for leaf, value in leaves.items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tree = {}
    for key, value in flat.items():
        module, _, leaf = key.rpartition("/")
        tree.setdefault(module, {})[leaf] = value
    return tree
