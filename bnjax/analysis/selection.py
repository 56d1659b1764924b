"""Parts of the parameters: layers by their paths or by patterns of paths, and the filters of kernels."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnjax.analysis._trees import LossFn, is_none, is_number, path_name, wide

Layer = str | Sequence[str]
"""A subtree of the parameters by its path, such as 'Conv_0' or 'block/Dense_1', or several that form a layer.

In patterns * stands for any text, ? for any character and [ab] for a or b: '*/query' (at the root too), 'Block_[0-3]'.
"""
FilterAxis = int | Sequence[int] | Mapping[str, int | Sequence[int]] | None
"""The axis, or axes, of a kernel that count its filters, or those of the kernels at some paths or patterns of paths.

By default it is the last, and for the queries, keys and values of Flax's attention the last two.
"""


def input_axes(path: str, leaf: Array, filter_axis: FilterAxis) -> tuple[int, ...] | None:
    """Returns the axes of a kernel that do not count its filters; None for a leaf that is no kernel.

    Vectors are none, nor is what is called bias or scale.
    """
    *parents, name = ["", *path.split("/")]
    if leaf.ndim < 2 or name in ("bias", "scale"):
        return None
    if isinstance(filter_axis, Mapping):
        filter_axis = next((axes for pattern, axes in filter_axis.items() if is_at(path, pattern)), None)
    if filter_axis is None:
        of_heads = name == "kernel" and parents[-1] in ("query", "key", "value") and leaf.ndim == 3
        filter_axis = (-2, -1) if of_heads else -1
    axes = (filter_axis,) if isinstance(filter_axis, int) else tuple(filter_axis)
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(f"filter_axis must be axes of the kernel {list(leaf.shape)} at {path!r}, got {filter_axis}.")
    filters = {axis % leaf.ndim for axis in axes}
    return tuple(axis for axis in range(leaf.ndim) if axis not in filters)


def check_patterns(filter_axis: FilterAxis, paths: Sequence[str]) -> None:
    """Raises `ValueError` for a pattern of `filter_axis` that no path has."""
    for pattern in filter_axis if isinstance(filter_axis, Mapping) else ():
        if not any(is_at(path, pattern) for path in paths):
            raise ValueError(f"filter_axis must name parts of params; nothing is at {pattern!r}. There are {paths}.")


def filter_units(kernel: Array, inputs: tuple[int, ...]) -> Array:
    """Returns the largest element of each filter by size, by which squares stay in range; 1 for zero."""
    largest = jnp.abs(kernel).max(inputs, keepdims=True, initial=0)
    return jnp.where(largest == 0, 1, largest)


def filter_norms(kernel: Array, inputs: tuple[int, ...]) -> Array:
    """Computes the norm of each filter over the axes of its inputs, which are kept, in float32 at least."""
    kernel = wide(kernel)
    unit = filter_units(kernel, inputs)
    return unit * jnp.sqrt(jnp.square(kernel / unit).sum(inputs, keepdims=True))


def ordered_layer_leaves(params: Any, layers: Sequence[Layer] | None) -> dict[str, list[int]]:
    """Returns the leaves (by their number) of each layer, with the layers in the order of the network.

    Args:
      params: parameters.
      layers: layers in the order in which the network applies them; by default the order of a list, or of names that
        count, such as 'Dense_0', 'Dense_1'.

    Raises:
      ValueError: if the order is not known, a layer holds nothing, or a leaf belongs to two.
    """
    if layers is None:
        layers = _counted_children(params)
    return layer_leaves(params, layers)


def layer_leaves(params: Any, layers: Sequence[Layer] | None) -> dict[str, list[int]]:
    """Returns the leaves (by number) of each layer; by default each child of the root is a layer, in natural order."""
    keys = [path for path, _ in jax.tree.leaves_with_path(params, is_leaf=is_none)]
    paths = [path_name(path) for path in keys]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"params must have leaves of different paths, got {twice!r} twice. Rename keys that hold a '/'."
        )
    if layers is None:  # what holds no numbers, such as a module's activation function, is no layer
        leaves = jax.tree.leaves(params, is_leaf=is_none)
        held = [path for path, leaf in zip(keys, leaves, strict=True) if is_number(leaf)]
        layers = sorted({path_name(path[:1]) for path in held}, key=_natural)
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        parts = (layer,) if isinstance(layer, str) else tuple(layer)
        leaves = [i for i, path in enumerate(paths) if any(is_at(path, part) for part in parts)]
        twice = [paths[i] for i in leaves if any(i in others for others in numbers.values())]
        if not leaves or twice:
            problem = f"{twice[0]} is in two of them" if twice else f"nothing is at {layer!r}"
            raise ValueError(f"layers must name disjoint parts of params by their paths; {problem}. There are {paths}.")
        numbers[parts[0]] = leaves
    return numbers


def is_at(path: str, place: str) -> bool:
    """Returns whether a leaf is in the subtree at a path, or at a path that has the pattern `place`."""
    if path == place or path.startswith(f"{place}/"):
        return True
    names = path.split("/")
    if place.startswith("*/") and is_at(path, place[2:]):
        return True
    return any(fnmatch.fnmatchcase("/".join(names[: i + 1]), place) for i in range(len(names)))


def restrict(loss_fn: LossFn, params: Any, layers: Sequence[Layer]) -> tuple[LossFn, dict[str, Any]]:
    """Returns the loss as a function of some layers' parameters, the others frozen, for any measurement.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays.
      layers: paths of the parameters that are not frozen, such as 'Conv_0' or 'Dense_1/kernel', or patterns of paths:
        '*/lora_[ab]' (see `Layer`).

    Returns:
      `loss(arrays, *args)` and `arrays`, the parameters of the layers by their paths.

    Raises:
      ValueError: for paths that lead to nothing, or that overlap.

    >>> from bnjax import analysis
    >>> loss, chosen = analysis.restrict(lambda w: w['a'] * w['b'] ** 2, {'a': 3.0, 'b': 2.0}, ['b'])
    >>> print(analysis.gradient_probe(loss, chosen, 0.1).gradient_norm)
    12.0
    """
    parts, embed = parts_of(params, layers)
    return lambda arrays, *args: loss_fn(embed(arrays, params), *args), parts


def parts_of(params: Any, layers: Sequence[Layer]) -> tuple[dict[str, Any], Callable[[Any, Any], Any]]:
    """Returns some layers' arrays by their paths, and `embed(arrays, others)`, which puts such arrays into a tree."""
    paths, leaves = zip(*jax.tree.leaves_with_path(params, is_leaf=is_none), strict=True)
    numbers = [n for group in layer_leaves(params, layers).values() for n in group if leaves[n] is not None]
    tree, names = jax.tree.structure(params, is_leaf=is_none), [path_name(path) for path in paths]

    def embed(arrays: Mapping[str, Any], others: Any) -> Any:
        rest = jax.tree.leaves(others, is_leaf=is_none)
        return jax.tree.unflatten(tree, [arrays.get(name, leaf) for name, leaf in zip(names, rest, strict=True)])

    return {names[n]: leaves[n] for n in numbers}, embed


def of_leaves(tree: Any, numbers: Sequence[int]) -> list[Any]:
    """Returns some leaves of a tree, by their numbers among all (None counts as a leaf)."""
    leaves = jax.tree.leaves(tree, is_leaf=is_none)
    return [leaves[i] for i in numbers if leaves[i] is not None]


def _counted_children(params: Any) -> list[str]:
    if isinstance(params, list | tuple) and not hasattr(params, "_fields"):
        return [str(i) for i, layer in enumerate(params) if jax.tree.leaves(layer)]
    if isinstance(params, Mapping):
        names = [re.fullmatch(r"(.*?)(\d+)", str(key)) for key in params]
        if all(names) and len({match[1] for match in names if match}) == 1:
            return sorted(map(str, params), key=_natural)
    keys = sorted(map(str, params)) if isinstance(params, Mapping) else [type(params).__name__]
    raise ValueError(
        f"layers must be given in the network's order, which the names {keys} do not tell; for a model of Flax "
        "bnjax.analysis.losses.layers_in_order(model, variables, x) finds it."
    )


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
