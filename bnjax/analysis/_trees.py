"""Parameters as vectors: the floating-point leaves of a pytree, their inner products, and the layers they belong to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

_DRAWN_TOGETHER = 2**20  # elements of the leaves that are drawn as one array

LossFn = Callable[..., Array]
"""A loss `loss_fn(params, *args) -> scalar`."""


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
    return jax.tree.map(lambda new, old: old if new is None else new, free, params, is_leaf=is_none)


def free_part(name: str, tree: Any, free: Any) -> Any:
    """Returns the leaves of `tree` beside those of `free`; raises `ValueError` where structure or shapes differ."""
    expected, structure = jax.tree.structure(free, is_leaf=is_none), jax.tree.structure(tree, is_leaf=is_none)
    if expected != structure:
        raise ValueError(f"{name} must have the structure of params, {expected}, got {structure}.")
    pairs = zip(jax.tree.leaves_with_path(tree, is_leaf=is_none), jax.tree.leaves(free, is_leaf=is_none), strict=True)
    for (path, leaf), like in pairs:
        if like is not None and (leaf is None or jnp.shape(leaf) != like.shape):
            shape = "nothing" if leaf is None else f"shape {jnp.shape(leaf)}"
            raise ValueError(f"{name} must have the shapes of params, {like.shape} at {path_name(path)}, got {shape}.")
    return jax.tree.map(lambda like, leaf: None if like is None else jnp.asarray(leaf), free, tree, is_leaf=is_none)


def have_one_structure(tree: Any, params: Any) -> bool:
    """Returns whether a tree has the structure of the parameters, with or without what is no number there."""
    return jax.tree.structure(tree, is_leaf=is_none) == jax.tree.structure(params, is_leaf=is_none)


def filled(free: Any, params: Any) -> Any:
    """Returns `free` in the structure of `params`, with zeros where a number is not differentiated."""
    if jax.tree.structure(free) == jax.tree.structure(params):
        return free

    def fill(leaf, old):
        return leaf if leaf is not None or not is_number(old) else jnp.zeros_like(old)

    return jax.tree.map(fill, free, params, is_leaf=is_none)


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
    """Returns the shapes of a tree in float32 at least, with its sharding over a mesh."""

    def of_leaf(v: Any) -> Any:
        return jax.ShapeDtypeStruct(v.shape, jnp.promote_types(v.dtype, jnp.float32), sharding=sharding_of(v))

    return jax.tree.map(of_leaf, tree)


def sharding_of(leaf: Any, leading: int = 0) -> Any:
    """Returns the sharding over a mesh of an array, with further leading axes; None for what is traced or not split."""
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * leading, *sharding.spec))


def zeros(shapes: Any, like: Any) -> Any:
    """Returns zeros of some shapes, which are those of `like` with a leading axis, split over a mesh as these."""
    return jax.tree.map(lambda s, leaf: jnp.zeros(s.shape, s.dtype, device=sharding_of(leaf, 1)), shapes, like)


def random_like(key: Array, like: Any, draw: Callable[..., Array]) -> Any:
    """Draws a random tree by `draw(key, shape, dtype)`, split over a mesh as `like` is.

    Small leaves side by side are drawn as one array, since compiling a generator takes longer than running it.
    """
    leaves, tree = jax.tree.flatten(like)
    groups: list[list[Any]] = []
    for leaf in leaves:
        last = groups[-1] if groups else []
        fits = sum(one.size for one in last) + leaf.size <= _DRAWN_TOGETHER
        if last and last[0].dtype == leaf.dtype and fits:
            last.append(leaf)
        else:
            groups.append([leaf])

    def drawn(key: Array, group: list[Any]) -> list[Array]:
        def of_key(key: Array) -> list[Array]:
            if len(group) == 1:
                return [draw(key, group[0].shape, group[0].dtype)]
            ends = np.cumsum([leaf.size for leaf in group])
            parts = jnp.split(draw(key, (int(ends[-1]),), group[0].dtype), ends[:-1])
            return [part.reshape(leaf.shape) for part, leaf in zip(parts, group, strict=True)]

        shardings = [sharding_of(leaf) for leaf in group]
        return jax.jit(of_key, out_shardings=shardings)(key) if any(shardings) else of_key(key)

    keys = jax.random.split(key, len(groups))
    drawn_leaves = [leaf for k, group in zip(keys, groups, strict=True) for leaf in drawn(k, group)]
    return jax.tree.unflatten(tree, drawn_leaves)


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


def distance(a: Any, b: Any) -> Array:
    """Computes the Euclidean distance of two trees, in float32 at least."""
    return norm(subtract(wide(a), wide(b)))


def cosine(a: Any, b: Any) -> Array:
    """Computes the cosine of the angle between two trees; NaN where one is zero."""
    a, b = (in_units(tree, unit_of(tree)) for tree in (a, b))
    return dot(a, b) / (norm(a) * norm(b))


def leading(weights: Array, ndim: int) -> Array:
    """Gives weights the trailing axes that they lack: `[batch]` is one weight an example."""
    return weights.reshape(weights.shape + (1,) * (ndim - weights.ndim))


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


def is_number(leaf: Any) -> bool:
    """Returns whether a leaf is an array or a number, and not, say, a function in a module of Equinox."""
    return hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)


def _kind(leaf: Any, kind: Any) -> bool:
    if not is_number(leaf):
        return False
    return jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf), kind)


def is_none(leaf: Any) -> bool:
    """Returns whether a leaf is None, which stands for what is not differentiated."""
    return leaf is None
