"""Directions in the space of parameters, and the loss over lines and planes through it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Key

from bnjax.analysis import _trees, selection
from bnjax.analysis._trees import LossFn
from bnjax.analysis.probe import check_batch_size
from bnjax.analysis.selection import FilterAxis


class TrajectoryPlane(NamedTuple):
    """The plane (or line, or space) that best holds a training trajectory.

    Attributes:
      origin: pytree of parameters, the last of the trajectory.
      directions: the d principal components, orthonormal pytrees.
      coordinates: coordinates of the T points of the trajectory from the origin along the directions, `[T, d]`.
      explained_variance: fraction of the points' squared distances from their center along each direction, `[d]`.
    """

    origin: Any
    directions: tuple[Any, ...]
    coordinates: Array
    explained_variance: Array


class LinearPath(NamedTuple):
    """The loss between two solutions.

    Attributes:
      coordinates: t from the first solution (0) to the second (1), `[K]`.
      loss: L((1 − t) A + t B), `[K]`.
      barrier: the largest loss less the mean of those at the ends; positive also where these differ.
      excess: the largest excess of the loss over the line between the losses at the ends; zero on any line.
    """

    coordinates: Array
    loss: Array
    barrier: Array
    excess: Array


def random_direction(
    key: Key[Array, ""], params: Any, *, filter_normalized: bool = True, filter_axis: FilterAxis = None
) -> Any:
    """Draws a random Gaussian direction, by default with each filter scaled to the norm of the parameters' filter.

    Args:
      key: random key.
      params: pytree of arrays.
      filter_normalized: whether to apply `filter_normalize`; static.
      filter_axis: axes that count filters, as in `filter_normalize`; static.

    Returns:
      A pytree like `params`, with zeros for leaves that are not floating-point.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 4.

    >>> from bnjax import analysis
    >>> d = analysis.random_direction(jax.random.key(0), {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)})
    >>> print(jnp.linalg.norm(d['kernel'], axis=0).round(4), d['bias'])
    [2. 2.] [0. 0.]
    """
    _, free = _trees.differentiable(lambda params: jnp.zeros(()), params)
    leaves, tree = jax.tree.flatten(free)
    keys = jax.random.split(key, len(leaves))
    values = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    direction = _trees.filled(jax.tree.unflatten(tree, values), params)
    return filter_normalize(direction, params, filter_axis=filter_axis) if filter_normalized else direction


def filter_normalize(direction: Any, params: Any, *, filter_axis: FilterAxis = None) -> Any:
    """Scales each filter of a direction to the norm of the parameters' filter: `d_f ← d_f ‖W_f‖ / ‖d_f‖`.

    Vectors and scalars, and what is called bias or scale, become zero.

    Args:
      direction: pytree like `params`.
      params: pytree of arrays.
      filter_axis: axis of a kernel that counts its filters: the last, as in Flax (for the queries, keys and values of
        its attention the last two, heads and their units); 0 for PyTorch's layout; a tuple where several do; or those
        of the kernels at some paths or patterns, as in `{'*/qkv/kernel': (-2, -1)}`, the last elsewhere. Static.

    Raises:
      ValueError: if `direction` is not like `params`, or a kernel lacks such an axis.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 4: filter-wise normalized directions.

    >>> from bnjax import analysis
    >>> print(analysis.filter_normalize(jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])))
    [[0.6 2. ]
     [0.8 0. ]]
    """
    _, free = _trees.differentiable(lambda params: jnp.zeros(()), params)
    direction = _trees.free_part("direction", direction, free)
    selection.check_patterns(filter_axis, [_trees.path_name(path) for path, _ in jax.tree.leaves_with_path(free)])

    def scaled(path: Any, w: Array, d: Array) -> Array:
        inputs = selection.input_axes(_trees.path_name(path), w, filter_axis)
        if inputs is None:
            return jnp.zeros_like(d)
        sizes = selection.filter_norms(d, inputs)
        return (d / jnp.where(sizes > 0, sizes, 1) * selection.filter_norms(w, inputs)).astype(d.dtype)

    return _trees.filled(jax.tree.map_with_path(scaled, free, direction), params)


def loss_surface(
    loss_fn: LossFn,
    params: Any,
    directions: Any,
    coordinates: Any,
    *args: Any,
    batch_size: int | None = None,
) -> Array:
    """Computes the loss over a line, `L(W + a d)`, or a plane, `L(W + a d₁ + b d₂)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays, W, at the coordinates 0; leaves that are not floating-point are constants.
      directions: a tuple of one or two pytrees like `params`; a single such pytree for a line.
      coordinates: a vector of numbers for each direction, `[K]` or `([K₁], [K₂])`.
      *args: further arguments of `loss_fn`.
      batch_size: number of points computed at once by vmap; one after the other by default. Static.

    Returns:
      Losses `[K]` or `[K₁, K₂]`, indexed by the coordinates.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, directions unlike the parameters, or
        other numbers of directions and coordinates than one or two of each.

    References:
      Goodfellow, Vinyals & Saxe 2015 (arXiv 1412.6544); Li et al. 2018 (arXiv 1712.09913).

    >>> from bnjax import analysis
    >>> loss = lambda w: (w ** 2).sum()
    >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> print(analysis.loss_surface(loss, jnp.zeros(2), axes, (jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0, 2.0]))))
    [[0. 1. 4.]
     [1. 2. 5.]]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    check_batch_size(batch_size)
    if _trees.have_one_structure(directions, params):
        directions, coordinates = (directions,), (coordinates,)
    elif len(directions) == 1 and not isinstance(coordinates, tuple | list):
        coordinates = (coordinates,)
    if len(directions) not in (1, 2) or len(coordinates) != len(directions):
        raise ValueError(
            f"directions must be one or two pytrees like params, with a vector of coordinates each, got "
            f"{len(directions)} directions and {len(coordinates)} vectors."
        )
    directions = [_trees.wide(_trees.free_part("directions", direction, free)) for direction in directions]
    axes = [jnp.asarray(values) for values in coordinates]
    if any(values.ndim != 1 for values in axes):
        raise ValueError(f"coordinates must be vectors, got shapes {[values.shape for values in axes]}.")
    dtype = jnp.promote_types(_trees.norm(free).dtype, jnp.float32)
    grid = jnp.stack([v.ravel() for v in jnp.meshgrid(*(v.astype(dtype) for v in axes), indexing="ij")], axis=1)

    def at(point: Array) -> Array:
        zeros = jax.tree.map(jnp.zeros_like, directions[0])
        offset = functools.reduce(lambda sum_, i: _trees.moved(sum_, point[i], directions[i]), range(len(axes)), zeros)
        return loss_fn(_trees.moved(free, jnp.ones((), dtype), offset), *args)

    return lax.map(at, grid, batch_size=batch_size).reshape([v.size for v in axes])


def trajectory_plane(trajectory: Any, num_directions: int = 2, *, center: str = "mean") -> TrajectoryPlane:
    """Computes the principal components of a training trajectory, and the path projected on the plane that they span.

    Args:
      trajectory: pytree of parameters with a leading axis of T ≥ 2 points everywhere. (Stack a list of them by
        `jax.tree.map(lambda *points: jnp.stack(points), *trajectory)`.)
      num_directions: d, up to T − 1; static.
      center: the point from which differences are decomposed: 'mean', the mean of all points, which is principal
        component analysis; or 'last', the last point, so that no plane through it is nearer to the others. Static.

    Returns:
      A `TrajectoryPlane`: `loss_surface(loss_fn, plane.origin, plane.directions, …)` is the loss around the path. For
      each direction the T × T inner products of the points are decomposed, so that P parameters cost T P numbers and
      d T² P operations. A direction that the points do not span, up to their rounding errors, is zero.

    Raises:
      ValueError: for fewer than two points, more directions than T − 1, or another center.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 7: PCA of the differences to the last point, which the authors' program
      centers, as PCA does.

    >>> from bnjax import analysis
    >>> plane = analysis.trajectory_plane(jnp.array([[4.0, 0.0], [2.0, 1.0], [0.0, 0.0]]))
    >>> print(abs(plane.coordinates).round(2), f'{plane.explained_variance[0]:.2f}')
    [[4. 0.]
     [2. 1.]
     [0. 0.]] 0.92
    """
    leaves = jax.tree.leaves(trajectory)
    points = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
    if len(points) != 1 or min(points) < 2:
        raise ValueError(f"trajectory must have the same leading axis of at least 2 points everywhere, got {points}.")
    (count,) = points
    if not 1 <= num_directions < count:
        raise ValueError(f"num_directions must be from 1 to {count - 1} for {count} points, got {num_directions}.")
    if center not in ("mean", "last"):
        raise ValueError(f"center must be 'mean' or 'last', got {center!r}.")
    _, free = _trees.differentiable(lambda params: jnp.zeros(()), trajectory)
    origin = jax.tree.map(lambda p: p[-1], trajectory)
    unit = _trees.unit_of(free)
    offsets = jax.tree.map(lambda p: _trees.in_units(p, unit).reshape((count, -1)), free)
    offsets = jax.tree.map(lambda o: o - o[-1:], offsets)
    centered = offsets if center == "last" else jax.tree.map(lambda o: o - o.mean(0, keepdims=True), offsets)
    total = _trees.row_products(centered, centered).sum()
    rows, values = [], []
    for _ in range(num_directions):  # each from what the ones before leave, whose rounding errors are small beside it
        value, row = _largest_component(centered, rows)
        # What is left of a path that spans no more directions are its rounding errors, and its direction becomes zero.
        least = (8 * jnp.finfo(value.dtype).eps) ** 2 * count * total
        row = jax.tree.map(lambda r, is_real=value > least: jnp.where(is_real, r, 0), row)
        along = _trees.products(centered, row)
        centered = jax.tree.map(lambda c, r, a=along: c - a[:, None].astype(c.dtype) * r[None], centered, row)
        rows.append(row)
        values.append(jnp.where(value > least, value, 0))
    coordinates = jnp.stack([_trees.products(offsets, row) for row in rows], 1) * unit
    explained = jnp.stack(values) / jnp.where(total > 0, total, 1)

    def direction(i: int) -> Any:
        return _trees.filled(jax.tree.map(lambda r, like: r.reshape(like.shape[1:]), rows[i], free), origin)

    return TrajectoryPlane(origin, tuple(direction(i) for i in range(num_directions)), coordinates, explained)


def _largest_component(points: Any, others: list[Any]) -> tuple[Array, Any]:
    """Returns the largest eigenvalue of the points' second moments, and its direction, orthogonal to others."""
    values, vectors = jnp.linalg.eigh(_trees.inner(points, points))
    row = jax.tree.map(lambda p: jnp.matmul(vectors[:, -1].astype(p.dtype), p, precision="highest"), points)
    for other in others:
        row = _trees.moved(row, -_trees.dot(row, other), other)
    size = _trees.norm(row)
    return values[-1], jax.tree.map(lambda r: r / jnp.where(size > 0, size, 1).astype(r.dtype), row)


def linear_path(
    loss_fn: LossFn,
    params: Any,
    other_params: Any,
    *args: Any,
    coordinates: ArrayLike | None = None,
    batch_size: int | None = None,
) -> LinearPath:
    """Computes the loss on the straight line from one solution to another, and its barrier.

        L((1 − t) A + t B)        barrier = max_t L((1 − t) A + t B) − (L(A) + L(B)) / 2
                                  excess = max_t L((1 − t) A + t B) − (1 − t) L(A) − t L(B)

    With batch norm, running statistics of the ends are wrong between them: use a loss in mode 'batch' or 'reestimated'
    (see `bnjax.analysis.losses`), which takes them anew at every point.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays, A; leaves that are not floating-point are constants.
      other_params: pytree like `params`, B.
      *args: further arguments of `loss_fn`.
      coordinates: t, increasing, the first 0 and the last 1, `[K]`; 25 equal steps by default. Where they are traced
        and not so, the results are NaN.
      batch_size: number of points computed at once by vmap; one after the other by default. Static.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, ends that differ in structure, or
        coordinates that do not run from 0 to 1.

    References:
      Goodfellow, Vinyals & Saxe 2015 (arXiv 1412.6544); Frankle et al. 2020 (arXiv 1912.05671), section 2, for the
      barrier (of errors there, and called linear interpolation instability); Entezari et al. 2022 (arXiv 2110.06296),
      Definition 2.1, for the excess.

    >>> from bnjax import analysis
    >>> path = analysis.linear_path(lambda w: jnp.cos(w), jnp.array(0.0), jnp.array(2 * jnp.pi))
    >>> print(path.loss.shape, path.barrier)
    (25,) 0.0
    >>> print(analysis.linear_path(lambda w: w, 0.0, 1.0).barrier)
    0.5
    """
    _, free = _trees.differentiable(loss_fn, params)
    other = _trees.free_part("other_params", other_params, free)
    t = jnp.linspace(0, 1, 25) if coordinates is None else jnp.asarray(coordinates)
    if t.ndim != 1 or t.size < 2:
        raise ValueError(f"coordinates must be a vector of at least 2 numbers, got shape {t.shape}.")
    runs = (t[0] == 0) & (t[-1] == 1) & (t[1:] >= t[:-1]).all()
    if not isinstance(runs, Tracer) and not runs:
        raise ValueError(f"coordinates must increase from 0 to 1, which are the two solutions, got {t}.")
    direction = _trees.filled(_trees.subtract(_trees.wide(other), _trees.wide(free)), params)
    losses = jnp.where(runs, loss_surface(loss_fn, params, (direction,), t, *args, batch_size=batch_size), jnp.nan)
    first, last = losses[0], losses[-1]
    excess = (losses - (1 - t) * first - t * last).max()
    return LinearPath(t, losses, losses.max() - (first + last) / 2, excess)
