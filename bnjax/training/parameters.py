"""The parameters of a model's batch norms, which optimizers often treat apart from the others."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from bnjax import _compat
from bnjax.nnx import statistics_of


def batch_norm_parameters(model: Any) -> list[tuple[Any, ...]]:
    """Returns the paths of the parameters of all batch norms: ('block', 'BatchNorm_0', 'scale'), ….

    Args:
      model: collections 'params' and 'batch_stats' of a linen model, or their shapes; or an nnx model.

    Returns:
      Paths into `variables['params']`, or into `nnx.state(model, nnx.Param)`.

    Raises:
      ValueError: for variables without 'batch_stats'.
      TypeError: for something else.

    >>> from bnjax.linen import BatchNorm
    >>> variables = BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((8, 3)))
    >>> batch_norm_parameters(variables)
    [('bias',), ('scale',)]
    """
    if isinstance(model, nnx.Module):
        norms = [path for path, module in _compat.iter_modules(model) if statistics_of(module) is not None]
        params = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    elif isinstance(model, Mapping):
        if "batch_stats" not in model:
            raise ValueError(
                "model must hold the collection 'batch_stats', by which batch norms are known, got the collections "
                f"{sorted(model)}. Add an empty one for a model without batch norms."
            )
        stats, flat = (flatten_dict(dict(model.get(name, {}))) for name in ("batch_stats", "params"))
        norms = [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]
        params = [path for path in flat if path[-1] in ("scale", "bias")]
    else:
        raise TypeError(
            f"model must be the variables of a linen model (params and batch_stats), or an nnx model, got "
            f"{type(model).__name__}."
        )
    return sorted((path for path in params if path[:-1] in norms), key=lambda path: [*map(str, path)])


def batch_norm_mask(model: Any) -> Any:
    """Returns a tree in the structure of a model's parameters that is True for those of batch norms, else False.

    `optax.masked(optax.set_to_zero(), …)` takes it, and others that treat some parameters apart; with `jax.tree.map` of
    `operator.not_` it is the mask for weight decay.

    Args:
      model: variables of a linen model, or an nnx model, as in `batch_norm_parameters`.

    Returns:
      A tree in the structure of `variables['params']`, or of a `create_train_state(model, …).params` of an nnx model;
      `nnx.State` of it is what an `nnx.Optimizer` takes.

    >>> from bnjax.linen import BatchNorm
    >>> variables = BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((8, 3)))
    >>> batch_norm_mask(variables)
    {'bias': True, 'scale': True}
    """
    paths = set(batch_norm_parameters(model))
    is_nnx = isinstance(model, nnx.Module)
    params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param)) if is_nnx else model.get("params", {})

    def is_of_batch_norm(path: Any, _: Any) -> bool:
        names = tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
        return any(names[:end] in paths for end in range(1, len(names) + 1))  # a box of metadata adds to the path

    return jax.tree_util.tree_map_with_path(is_of_batch_norm, params)
