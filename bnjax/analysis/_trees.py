"""Parameters as vectors: the floating-point leaves of a pytree, their inner products, and the layers they belong to."""

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LossFn = Callable[..., Array]
"""A loss `loss_fn(params, *args) -> scalar`."""
Layer = str | Sequence[str]
"""A subtree of the parameters by its path, such as 'Conv_0' or 'block/Dense_1', or several that form a layer.

In patterns * stands for any text, ? for any character and [ab] for a or b: '*/query', 'Block_[0-3]'.
"""
FilterAxis = int | Sequence[int] | Mapping[str, int | Sequence[int]]
"""The axis, or axes, of a kernel that count its filters; or those of the kernels at some paths or patterns of paths."""


def differentiable(loss_fn: LossFn, params: Any) -> tuple[LossFn, Any]:
    """Returns the loss as a function of the floating-point leaves alone, and these leaves, with None for the others.

    Raises:
      ValueError: for parameters without any array, or when the loss is called, if it is not a scalar.
      TypeError: for parameters without floating-point arrays or with complex ones; for a loss that is not real.
    """
    free = free_leaves(params)

    def loss_of_free(free: Any, *args: Any) -> Array:
        value = loss_fn(merged(free, params), *args)
        if not (hasattr(value, "dtype") or isinstance(value, float)):
            raise TypeError(
                f"loss_fn must return a scalar array, got {type(value).__name__}. Leave auxiliary values out, for "
                "example with lambda params, *args: loss_fn(params, *args)[0]."
            )
        if jnp.shape(value) != () or not _kind(value, jnp.floating):
            raise TypeError(
                f"loss_fn must return a real floating-point scalar, got {jnp.result_type(value)}"
                f"{list(jnp.shape(value))}. Take the mean over the batch."
            )
        return jnp.asarray(value)

    return loss_of_free, free


def free_leaves(params: Any) -> Any:
    """Returns the floating-point leaves of the parameters, with None for the others; raises as `differentiable`."""
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("params must hold at least one array, got an empty pytree. Pass variables['params'].")
    complex_ = [jnp.result_type(leaf) for leaf in leaves if _kind(leaf, jnp.complexfloating)]
    if complex_:
        raise TypeError(f"params must be real, got an array of {complex_[0]}. Pass its real and imaginary parts.")
    free = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _kind(leaf, jnp.floating) else None, params)
    if not jax.tree.leaves(free):
        dtypes = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves})
        raise TypeError(f"params must hold floating-point arrays, got {', '.join(dtypes)} only. Convert them first.")
    return free


def merged(free: Any, params: Any) -> Any:
    """Returns `params` with the leaves of `free` in place of their own, where it has one."""
    return jax.tree.map(lambda new, old: old if new is None else new, free, params, is_leaf=_is_none)


def free_part(name: str, tree: Any, free: Any) -> Any:
    """Returns the leaves of `tree` beside those of `free`; raises `ValueError` where structure or shapes differ."""
    expected, structure = jax.tree.structure(free, is_leaf=_is_none), jax.tree.structure(tree, is_leaf=_is_none)
    if expected != structure:
        raise ValueError(f"{name} must have the structure of params, {expected}, got {structure}.")
    pairs = zip(jax.tree.leaves_with_path(tree, is_leaf=_is_none), jax.tree.leaves(free, is_leaf=_is_none), strict=True)
    for (path, leaf), like in pairs:
        if like is not None and (leaf is None or jnp.shape(leaf) != like.shape):
            shape = "nothing" if leaf is None else f"shape {jnp.shape(leaf)}"
            raise ValueError(f"{name} must have the shapes of params, {like.shape} at {path_name(path)}, got {shape}.")
    return jax.tree.map(lambda like, leaf: None if like is None else jnp.asarray(leaf), free, tree, is_leaf=_is_none)


def filled(free: Any, params: Any) -> Any:
    """Returns `free` in the structure of `params`, with zeros where a number is not differentiated."""
    if jax.tree.structure(free) == jax.tree.structure(params):
        return free

    def fill(leaf, old):
        return leaf if leaf is not None or not is_number(old) else jnp.zeros_like(old)

    return jax.tree.map(fill, free, params, is_leaf=_is_none)


def dot(a: Any, b: Any) -> Array:
    """Computes the inner product of two trees, accumulated in float32 at least."""

    def of_leaves(x, y):
        dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
        return jnp.vdot(jnp.ravel(x), jnp.ravel(y), precision="highest", preferred_element_type=dtype)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaves, a, b)), jnp.zeros((), jnp.float32))


def products(rows: Any, vector: Any) -> Array:
    """Computes the inner products of several trees, with a leading axis, and one."""

    def of_leaves(r: Array, v: Array) -> Array:
        return jnp.tensordot(r.reshape((r.shape[0], -1)), v.ravel(), 1, precision="highest")

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaves, rows, vector)))


def inner(a: Any, b: Any) -> Array:
    """Computes the inner products `[k, l]` of k and l trees, each with a leading axis."""

    def of_leaves(x: Array, y: Array) -> Array:
        x, y = (v.reshape((v.shape[0], -1)) for v in (x, y))
        return jnp.matmul(x, y.T, precision="highest")

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaves, a, b)))


def row_products(a: Any, b: Any) -> Array:
    """Computes the inner products `[k]` of k trees and as many others, one by one."""
    return jax.vmap(dot)(a, b)


def wide(tree: Any) -> Any:
    """Returns a tree in float32 at least."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def wide_shapes(tree: Any) -> Any:
    """Returns the shapes of a tree in float32 at least."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.promote_types(v.dtype, jnp.float32)), tree)


def random_like(key: Array, like: Any, draw: Callable[..., Array]) -> Any:
    """Draws a random tree by `draw(key, shape, dtype)`."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])


def unit_of(tree: Any) -> Array:
    """Returns a power of two of the size of a tree's largest element, by which squares stay in range; 1 for zero."""
    leaves = [jnp.abs(leaf).max(initial=0) for leaf in jax.tree.leaves(tree)]
    dtype = jnp.result_type(jnp.float32, *leaves)
    largest = jnp.stack([jnp.zeros((), dtype), *(leaf.astype(dtype) for leaf in leaves)]).max()
    bits = jnp.finfo(dtype)
    half = jnp.clip(largest / 2, bits.tiny, 1 / bits.tiny)  # so that the unit's reciprocal is normal too
    unit = lax.reduce_precision(half, bits.nexp, 0)
    return lax.stop_gradient(jnp.where((largest > 0) & (largest < jnp.inf), unit, jnp.ones_like(unit)))


def in_units(tree: Any, unit: Array) -> Any:
    """Divides a tree by a unit, in the unit's precision at least."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, unit.dtype)) / unit, tree)


def norm(tree: Any) -> Array:
    """Computes the Euclidean norm of a tree, whose derivative at zero is zero."""
    unit = unit_of(tree)
    scaled = in_units(tree, unit)
    square = dot(scaled, scaled)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square))) * unit.astype(square.dtype)


def cosine(a: Any, b: Any) -> Array:
    """Computes the cosine of the angle between two trees; NaN where one is zero."""
    a, b = (in_units(tree, unit_of(tree)) for tree in (a, b))
    return dot(a, b) / (norm(a) * norm(b))


def leading(weights: Array, ndim: int) -> Array:
    """Gives weights the trailing axes that they lack: `[batch]` is one weight an example."""
    return weights.reshape(weights.shape + (1,) * (ndim - weights.ndim))


def input_axes(path: str, leaf: Array, filter_axis: FilterAxis) -> tuple[int, ...] | None:
    """Returns the axes of a kernel that do not count its filters; None for a leaf that is no kernel.

    Vectors are none, nor is what is called bias or scale. The kernels of Flax's attention for queries, keys and values
    have an axis of heads beside that of a head's units, unless `filter_axis` says otherwise.
    """
    *parents, name = ["", *path.split("/")]
    if leaf.ndim < 2 or name in ("bias", "scale"):
        return None
    if isinstance(filter_axis, Mapping):
        filter_axis = next((axes for pattern, axes in filter_axis.items() if is_at(path, pattern)), -1)
    axes = (filter_axis,) if isinstance(filter_axis, int) else tuple(filter_axis)
    if axes == (-1,) and name == "kernel" and parents[-1] in ("query", "key", "value") and leaf.ndim == 3:
        axes = (-2, -1)
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(f"filter_axis must be axes of the kernel {list(leaf.shape)} at {path!r}, got {filter_axis}.")
    filters = {axis % leaf.ndim for axis in axes}
    return tuple(axis for axis in range(leaf.ndim) if axis not in filters)


def filter_norms(kernel: Array, inputs: tuple[int, ...]) -> Array:
    """Computes the norm of each filter over the axes of its inputs, which are kept, in float32 at least."""
    kernel = wide(kernel)
    largest = jnp.abs(kernel).max(inputs, keepdims=True, initial=0)
    unit = jnp.where(largest == 0, 1, largest)
    return unit * jnp.sqrt(jnp.square(kernel / unit).sum(inputs, keepdims=True))


def subtract(a: Any, b: Any) -> Any:
    """Computes `a − b` of trees."""
    return jax.tree.map(jnp.subtract, a, b)


def moved(params: Any, step: Array, direction: Any) -> Any:
    """Computes `params + step · direction`, rounded once to the dtypes of `params`."""

    def of_leaves(p: Array, d: Array) -> Array:
        dtype = jnp.promote_types(jnp.promote_types(p.dtype, d.dtype), step.dtype)
        return _rounded(p.astype(dtype) + step.astype(dtype) * d.astype(dtype), p.dtype)

    return jax.tree.map(of_leaves, params, direction)


def _rounded(x: Array, dtype: Any) -> Array:
    """Rounds to a dtype, also where the compiler may keep the excess precision of what it computes further with."""
    bits = jnp.finfo(dtype)
    if bits.bits < jnp.finfo(x.dtype).bits:
        x = lax.reduce_precision(x, bits.nexp, bits.nmant)
    return x.astype(dtype)


def path_name(path: Any) -> str:
    """Returns a leaf's path as text, such as 'Conv_0/kernel'."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


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
    keys = [path for path, _ in jax.tree.leaves_with_path(params, is_leaf=_is_none)]
    paths = [path_name(path) for path in keys]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"params must have leaves of different paths, got {twice!r} twice. Rename keys that hold a '/'."
        )
    if layers is None:
        layers = sorted({path_name(path[:1]) for path in keys}, key=_natural)
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
    paths, leaves = zip(*jax.tree.leaves_with_path(params, is_leaf=_is_none), strict=True)
    numbers = [n for group in layer_leaves(params, layers).values() for n in group if leaves[n] is not None]
    tree, names = jax.tree.structure(params, is_leaf=_is_none), [path_name(path) for path in paths]

    def embed(arrays: Mapping[str, Any], others: Any) -> Any:
        rest = jax.tree.leaves(others, is_leaf=_is_none)
        return jax.tree.unflatten(tree, [arrays.get(name, leaf) for name, leaf in zip(names, rest, strict=True)])

    return {names[n]: leaves[n] for n in numbers}, embed


def of_leaves(tree: Any, numbers: Sequence[int]) -> list[Any]:
    """Returns some leaves of a tree, by their numbers among all (None counts as a leaf)."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_none)
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


def is_number(leaf: Any) -> bool:
    """Returns whether a leaf is an array or a number, and not, say, a function in a module of Equinox."""
    return hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)


def _kind(leaf: Any, kind: Any) -> bool:
    if not is_number(leaf):
        return False
    return jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf), kind)


def _is_none(leaf: Any) -> bool:
    return leaf is None
