"""Conversion of batch norms and models between Flax nnx and Flax linen."""

from collections.abc import Collection
from typing import Any

from bnjax.convert._framework import Framework, Names, batch_norm_from, variables_from, variables_to
from bnjax.convert.arrays import read_arrays
from bnjax.convert.state import BatchNormState

_SAME = ("kernel", "embedding", "scale", "bias", "mean", "var", "steps", "r_max", "d_max")
NNX = Framework(title="nnx", separator=".", leaves={name: name for name in _SAME} | {"linear bias": "bias"})


def batch_norm_from_nnx(layer: Any) -> BatchNormState:
    """Converts an `nnx.BatchNorm`, `flax.nnx`'s or `bnjax.nnx`'s: r ← ρ r + (1 − ρ) s with ρ its momentum.

    Args:
      layer: the layer.

    Returns:
      The batch norm.

    >>> from flax import nnx
    >>> batch_norm_from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0))).options()
    {'momentum': 0.99, 'epsilon': 1e-05, 'bessel_correction': False}
    """
    params, batch_stats = batch_norm_from(NNX, read_arrays(_values(_variables(layer))))
    return BatchNormState(
        params,
        batch_stats,
        epsilon=layer.epsilon,
        decay=layer.momentum,
        bessel_correction=getattr(layer, "bessel_correction", False),
    )


def batch_norm_to_nnx(state: BatchNormState, layer: Any) -> None:
    """Assigns a batch norm to an nnx layer, made with the momentum and epsilon of `state`.

    Args:
      state: the batch norm.
      layer: the layer.

    Returns:
      Nothing.

    Raises:
      ValueError: where names or shapes disagree.

    >>> from flax import nnx
    >>> layer = nnx.BatchNorm(1, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    >>> batch_norm_to_nnx(BatchNormState({}, {'mean': jnp.ones(1), 'var': jnp.ones(1)}), layer)
    >>> print(layer.mean[...])
    [1.]
    """
    variables_to_nnx(state.variables, layer)


def variables_from_nnx(module: Any, like: Any, names: Names = None, *, transposed: Collection[str] = ()) -> Any:
    """Converts the variables of an nnx model to those of a linen model, whose arrays have the same names and layouts.

    Args:
      module: the nnx model, or its state.
      like: variables of the linen model, or their shapes: `jax.eval_shape(model.init, …)`.
      names: path of each of our modules in the nnx model, such as {'Conv_0': 'layers.0'}; a function of our path does
        too. By default 'block/Conv_0' is 'block.Conv_0'.
      transposed: accepted without effect, as transposed convolutions have the same layout in both.

    Returns:
      Variables in the structure, shapes and dtypes of `like`.

    Raises:
      ValueError: for missing, unused or misshapen arrays and modules without a name, all in one message.

    >>> from flax import linen, nnx
    >>> like = jax.eval_shape(linen.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, variables_from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), like))
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    """
    return variables_from(NNX, _values(_variables(module)), like, names, transposed)


def variables_to_nnx(variables: Any, module: Any, names: Names = None, *, transposed: Collection[str] = ()) -> None:
    """Assigns the variables of a linen model to an nnx model.

    Args:
      variables: variables of the linen model.
      module: the nnx model.
      names: names of our modules, as in `variables_from_nnx`.
      transposed: accepted without effect, as in `variables_from_nnx`.

    Returns:
      Nothing.

    Raises:
      ValueError: where names or shapes disagree, before anything is assigned.

    >>> from flax import nnx
    >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> variables_to_nnx({'params': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}, layer)
    >>> print(layer.bias[...])
    [1. 1.]
    """
    theirs = _variables(module)
    for key, value in variables_to(NNX, variables, names, transposed, _values(theirs)).items():
        theirs[key][...] = value


def _variables(module: Any) -> dict[str, Any]:
    """Returns parameters and running statistics by path, without random keys and the like."""
    from flax import nnx

    state = module if isinstance(module, nnx.State) else nnx.state(module)
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): v for path, v in flat if isinstance(v, nnx.Param | nnx.BatchStat)}


def _values(variables: dict[str, Any]) -> dict[str, Any]:
    return {key: variable[...] for key, variable in variables.items()}
