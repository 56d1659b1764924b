"""Trace-time checks of arguments: each error names the argument, what was expected, what came, and the fix."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Axes = int | Sequence[int]
Shape = tuple[Any, ...]  # of ints, or of the symbols of `jax.export`


def check_input(x: Any, *, or_complex: bool = False) -> jax.Array:
    """Returns `x` as an array, or raises `TypeError` unless its dtype is floating point, real or maybe complex."""
    x = _as_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.inexact if or_complex else jnp.floating):
        raise TypeError(
            f"x must have a {'' if or_complex else 'real '}floating-point dtype, got {x.dtype}{list(x.shape)}. "
            "Convert it first, for example with x.astype(jnp.float32)."
        )
    return x


def feature_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Returns the feature axes `axis` of an input of `ndim` dimensions, non-negative and ascending."""
    signed_axes = (axis,) if not isinstance(axis, Sequence) else tuple(axis)
    if not signed_axes or not all(isinstance(a, int | np.integer) for a in signed_axes):
        raise ValueError(
            f"axis must be one feature axis or a non-empty sequence of them, got {axis!r}. Pass an int such as -1."
        )
    for a in signed_axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"axis must lie in [{-ndim}, {ndim}) for an input x of {ndim} dimensions, got {axis!r}: "
                f"axis {a} is out of range. Count from 0, or from -1 at the end."
            )
    axes = sorted(int(a) % ndim for a in signed_axes)
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"axis must not name an axis twice, got {axis!r} for an input x of {ndim} dimensions. Leave one out."
        )
    return tuple(axes)


def sample_weights(mask: Any, shape: Shape, axes: tuple[int, ...]) -> jax.Array | None:
    """Returns `mask` as boolean or float weights with one dimension for each of `shape`, or None without a mask."""
    if mask is None:
        return None
    original_mask, mask = mask, _as_array("mask", mask)
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise TypeError(
            f"mask must be boolean, or real floating-point sample weights, got {mask.dtype}{list(mask.shape)}. "
            "Convert it first, for example with mask.astype(bool)."
        )
    full = _in_full(mask.shape, shape, axes)
    if full is None:
        whole = tuple(1 if a in axes else size for a, size in enumerate(shape))
        reduced = tuple(size for a, size in enumerate(shape) if a not in axes)
        raise ValueError(
            f"mask must broadcast to x of shape {shape}, as one of shape {whole} does, or have the first dimensions of "
            f"{reduced}, that is x's without the features, got shape {mask.shape}. A weight for each example has the "
            f"shape {reduced[:1]}."
        )
    if mask.dtype == bool:
        return mask.reshape(full)
    if not isinstance(original_mask, Tracer) and not (np.asarray(original_mask) >= 0).all():
        raise ValueError(
            f"mask must hold non-negative sample weights, got a smallest one of {np.asarray(original_mask).min()}. "
            "Clip them, for example with jnp.maximum(mask, 0)."
        )
    return jnp.where(mask < 0, 0, mask).reshape(full)  # traced negative weights count as zero


def _in_full(mask_shape: Shape, shape: Shape, axes: tuple[int, ...]) -> Shape | None:
    """Returns the shape of a mask in as many dimensions as `shape` has; None where it does not fit.

    The dimensions of a mask that has fewer are the first of `shape`, the feature axes left out.
    """
    reduced = [a for a in range(len(shape)) if a not in axes]
    if len(mask_shape) == len(shape):
        full = mask_shape
    elif len(mask_shape) <= len(reduced):
        sizes = dict(zip(reduced, mask_shape, strict=False))
        full = tuple(sizes.get(a, 1) for a in range(len(shape)))
    else:
        return None
    return full if all(m in (1, s) for m, s in zip(full, shape, strict=True)) else None


def _as_array(name: str, value: Any) -> jax.Array:
    message = (
        f"{name} must be an array, got {type(value).__name__}, which can't be made one. Pass a jax or numpy array."
    )
    if value is None or isinstance(value, str | bytes):
        raise TypeError(message)
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(message) from error


def check_dtype(dtype: Any, *, or_complex: bool = False) -> None:
    """Raises `TypeError` unless `dtype` is floating point, real or maybe complex."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.inexact if or_complex else jnp.floating):
        kind = "floating-point" if or_complex else "real floating-point"
        raise TypeError(f"dtype must be a {kind} dtype, got {jnp.dtype(dtype)}. Pass jnp.float32, say.")


def check_complex(x: Any, params: Any, batch_stats: Any, dtype: Any) -> None:
    """Raises `TypeError` where the dtypes do not fit a complex `x`, or another array is complex and `x` is not."""
    dtypes = {"batch_stats['mean']": batch_stats["mean"].dtype, "dtype": x.dtype if dtype is None else jnp.dtype(dtype)}
    are_complex = {name: jnp.issubdtype(kind, jnp.complexfloating) for name, kind in dtypes.items()}
    if jnp.iscomplexobj(x):
        if wrong := [name for name, is_complex in are_complex.items() if not is_complex]:
            raise TypeError(
                f"{wrong[0]} must be complex, as x is, {x.dtype}; it is real. "
                "Make the statistics with bnjax.init_batch_norm(…, dtype=jnp.complex64)."
            )
        return
    are_complex |= {f"params[{name!r}]": jnp.iscomplexobj(value) for name, value in params.items()}
    if wrong := [name for name, is_complex in are_complex.items() if is_complex]:
        raise TypeError(f"{wrong[0]} must be real, as x is, {x.dtype}; it is complex. Convert one of them.")


def flax_mask(mask: Any, shape: Shape, axis: Any) -> jax.Array | None:
    """Returns the `mask` of a layer as a mask of ours, integers as weights.

    Flax's layers take the dimensions of a mask for the last ones of the input, features included. That reading counts
    for a mask of at least two dimensions to which ours does not fit.

    Raises:
      ValueError: where both readings fit, and differ.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.integer):
        mask = mask.astype(jnp.float32)
    last = (1,) * (len(shape) - mask.ndim) + mask.shape
    if not 2 <= mask.ndim < len(shape) or any(m not in (1, s) for m, s in zip(last, shape, strict=True)):
        return mask
    first = _in_full(mask.shape, shape, feature_axes(axis, len(shape)))
    if first not in (None, last):
        raise ValueError(
            f"mask must say which dimensions of x it has, where the first and (as Flax's layers take it) the last fit: "
            f"got shape {mask.shape} for x of shape {shape}. Reshape it to {first} or to {last}."
        )
    return mask.reshape(last)


def check_params(params: Any, feature_shape: Shape, axes: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `params` is a mapping of at most 'scale' and 'bias' of `feature_shape`."""
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params must be a mapping with 'scale' and 'bias' (either may be absent), got {type(params).__name__}. "
            "Make one with bnjax.init_batch_norm, or pass {} for neither."
        )
    unknown = sorted(set(params) - {"scale", "bias"}, key=str)
    if unknown:
        fix = "Rename or remove them (other libraries call them gamma and beta, or weight and bias)."
        if {"mean", "var"} <= set(unknown):
            fix = "These are running statistics: they follow as batch_stats."
        elif "params" in unknown:
            fix = "These are a model's collections: pass variables['params'], or the part of the layer in it."
        raise ValueError(f"params must hold no other keys than 'scale' and 'bias', got {unknown}. {fix}")
    _check_shapes("params", params, feature_shape, axes)


def check_batch_stats(batch_stats: Any, feature_shape: Shape | None = None, axes: tuple[int, ...] = ()) -> None:
    """Raises `ValueError` unless `batch_stats` is a mapping with 'mean' and 'var' (of `feature_shape`, where given)."""
    if not isinstance(batch_stats, Mapping) or not {"mean", "var"} <= set(batch_stats):
        got = sorted(batch_stats, key=str) if isinstance(batch_stats, Mapping) else type(batch_stats).__name__
        raise ValueError(
            f"batch_stats must be a mapping with 'mean' and 'var', got {got}. Make one with bnjax.init_batch_norm."
        )
    if feature_shape is not None:
        _check_shapes("batch_stats", {k: batch_stats[k] for k in ("mean", "var")}, feature_shape, axes)


def _check_shapes(name: str, arrays: Mapping[str, Any], feature_shape: Shape, axes: tuple[int, ...]) -> None:
    for key, value in arrays.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise ValueError(
                f"{name}[{key!r}] must be an array of shape {feature_shape}, got {type(value).__name__}. "
                "Make one with bnjax.init_batch_norm."
            )
        kind = jnp.floating if key == "var" else jnp.inexact
        if not jnp.issubdtype(value.dtype, kind):
            expected = "real floating-point" if key == "var" else "floating-point"
            raise TypeError(f"{name}[{key!r}] must have a {expected} dtype, got {value.dtype}. Convert it with astype.")
        if tuple(value.shape) != feature_shape:
            raise ValueError(
                f"{name}[{key!r}] must have the shape {feature_shape} of x's feature axes {axes}, "
                f"got {tuple(value.shape)}. Initialize it with that num_features, or name another axis."
            )


def _pairs(size: int) -> list[list[int]]:
    return [list(range(i, min(i + 2, size))) for i in range(0, size, 2)]


def check_training(training: Any) -> None:
    """Raises `TypeError` for a traced or non-boolean `training`."""
    if not isinstance(training, bool | np.bool_):
        raise TypeError(
            f"training must be a Python bool, got {type(training).__name__}. "
            "Make it a static argument of jit, or choose between two calls with lax.cond."
        )


FINITE = float(np.finfo(np.float64).max)


def check_in_range(name: str, value: Any, low: int | float, high: int | float, fix: str = "") -> None:
    """Raises unless `value` is a real scalar in [low, high]; if it is traced, only shape and dtype are checked."""
    expected = f"in [{low}, {high}]" if high < FINITE else f"of at least {low}"
    expected = f"finite and {expected}" if high == FINITE else expected
    if not fix:
        fix = "It weighs the old value: 1 minus PyTorch's." if name == "momentum" else "Pass a small one such as 1e-5."
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    kinds = (jnp.floating, jnp.integer)
    real = any(jnp.issubdtype(value.dtype, k) for k in kinds) if array else isinstance(value, int | float)
    if not real or np.shape(value):
        got = f"{value.dtype}{list(np.shape(value))}" if array else repr(value)
        raise TypeError(f"{name} must be a real scalar {expected}, got {got}. {fix}")
    if not isinstance(value, Tracer) and not low <= float(value) <= high:
        raise ValueError(f"{name} must be a real scalar {expected}, got {value}. {fix}")


def check_axis_name(axis_name: Any, axis_index_groups: Any) -> tuple[tuple[int, ...], ...] | None:
    """Returns `axis_index_groups` as tuples; raises unless `axis_name` is bound and they split it evenly."""
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                f"axis_index_groups needs axis_name, the mapped axis that it splits, got {axis_index_groups} alone. "
                "Pass axis_name too."
            )
        return None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a mapped axis's name or a tuple of them, got {axis_name!r}. Pass a string.")
    try:
        size = lax.axis_size(axis_name)
    except NameError as error:
        raise NameError(
            f"axis_name must be an axis bound by an enclosing vmap, pmap or shard_map, got the unbound {axis_name!r}. "
            "Map the call over that axis, or pass axis_name=None for statistics of the local batch."
        ) from error
    if axis_index_groups is None:
        return None
    try:
        groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)
    except TypeError:
        groups = ()
    if len(names) > 1:
        raise ValueError(f"axis_index_groups splits a single mapped axis, got axis_name={axis_name!r}. Name one.")
    if sorted(i for group in groups for i in group) != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"axis_index_groups must split the {size} indices of axis {axis_name!r} into groups of one size, "
            f"each index once, got {axis_index_groups}. For pairs: {_pairs(size)}."
        )
    return groups
