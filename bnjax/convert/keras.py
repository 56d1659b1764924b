"""Conversion of batch norms and models between Keras 3, on any backend, and Flax."""

from collections.abc import Collection, Mapping
from typing import Any

from bnjax.convert._framework import Framework, Names, batch_norm_from, variables_from, variables_to
from bnjax.convert.arrays import read_arrays
from bnjax.convert.state import BatchNormState

KERAS = Framework(
    title="Keras",
    separator="/",
    leaves={
        **{"kernel": "kernel", "linear bias": "bias", "embedding": "embeddings"},
        **{"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    },
    ignored=("moving_stddev", "renorm_mean", "renorm_stddev"),  # the arrays that renorm moves besides
    transposed_swaps=True,
    transposed_flips=True,
    depthwise_apart=True,
)


def batch_norm_from_keras(layer: Any) -> BatchNormState:
    """Converts a `keras.layers.BatchNormalization`: r ← ρ r + (1 − ρ) s with ρ its momentum.

    The layer's epsilon is 1e-3 by default. With `renorm=True`, the result is what the layer uses at inference; its
    training moves a running deviation instead.

    Args:
      layer: the layer, built.

    Returns:
      The batch norm.

    Raises:
      ValueError: for a layer without moving statistics, or not built yet.

    References:
      keras/src/layers/normalization/batch_normalization.py in Keras 3.15.

    >>> import keras
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 3))
    >>> batch_norm_from_keras(layer).options()
    {'momentum': 0.99, 'epsilon': 0.001, 'bessel_correction': False}
    """
    params, batch_stats = batch_norm_from(KERAS, read_arrays({weight.name: weight for weight in layer.weights}))
    return BatchNormState(params, batch_stats, epsilon=layer.epsilon, decay=layer.momentum)


def batch_norm_to_keras(state: BatchNormState, layer: Any) -> None:
    """Assigns a batch norm to a `keras.layers.BatchNormalization`, made with the momentum and epsilon of `state`.

    Args:
      state: the batch norm.
      layer: the layer, built, without renorm.

    Returns:
      Nothing.

    Raises:
      ValueError: where names or shapes disagree.

    >>> import keras
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 1))
    >>> one = np.ones(1)
    >>> batch_norm_to_keras(BatchNormState({'scale': one, 'bias': one}, {'mean': 2 * one, 'var': one}), layer)
    >>> np.asarray(layer.moving_mean)
    array([2.], dtype=float32)
    """
    _assign(state.variables, {weight.name: weight for weight in layer.weights}, None, ())


def variables_from_keras(model: Any, like: Any, names: Names = None, *, transposed: Collection[str] = ()) -> Any:
    """Converts the variables of a Keras model to those of a Flax model.

    Kernels have the same layout in both. A transposed convolution's kernel, [*window, out, in], becomes that of
    `nn.ConvTranspose`, [*window, in, out], with its window reversed.

    Args:
      model: the model, built; or arrays by the path of their weights.
      like: variables of the Flax model, or their shapes: `jax.eval_shape(model.init, …)`.
      names: Keras's name of each of our modules, such as {'Conv_0': 'conv2d'}: the path of its weights without their
        last part, and without the model's own name in front; a function of our path does too.
      transposed: our paths of transposed convolutions, in addition to those called 'ConvTranspose…'.

    Returns:
      Variables in the structure, shapes and dtypes of `like`.

    Raises:
      ValueError: for missing, unused or misshapen arrays and modules without a name, all in one message.

    References:
      keras/src/backend/jax/nn.py in Keras 3.15 for transposed convolutions.

    >>> import flax.linen as nn
    >>> like = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> arrays = {'dense_1/kernel': np.ones((3, 2)), 'dense_1/bias': np.zeros(2)}
    >>> jax.tree.map(jnp.shape, variables_from_keras(arrays, like, {'': 'dense_1'}))
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    """
    arrays = model if isinstance(model, Mapping) else _weights(model)
    return variables_from(KERAS, read_arrays(arrays), like, names, transposed)


def variables_to_keras(variables: Any, model: Any, names: Names = None, *, transposed: Collection[str] = ()) -> None:
    """Assigns the variables of a Flax model to a Keras model.

    Args:
      variables: variables of the Flax model.
      model: the Keras model, built.
      names: names of our modules, as in `variables_from_keras`.
      transposed: transposed convolutions, as in `variables_from_keras`.

    Returns:
      Nothing.

    Raises:
      ValueError: where names or shapes disagree, before anything is assigned.

    >>> import keras
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name='dense')])
    >>> variables_to_keras({'params': {'kernel': jnp.ones((1, 1)), 'bias': jnp.full(1, 2.)}}, model, {'': 'dense'})
    >>> np.asarray(model.layers[0].bias)
    array([2.], dtype=float32)
    """
    _assign(variables, _weights(model), names, transposed)


def _weights(model: Any) -> dict[str, Any]:
    return {weight.path.removeprefix(f"{model.name}/"): weight for weight in model.weights}


def _assign(variables: Any, weights: dict[str, Any], names: Names, transposed: Collection[str]) -> None:
    arrays = variables_to(KERAS, variables, names, transposed, read_arrays(weights))
    for key, value in arrays.items():
        weights[key].assign(value)
