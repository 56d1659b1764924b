"""Directions in the space of parameters, and the loss over lines and planes through it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Key

from bnjax.analysis import _trees
from bnjax.analysis._trees import LossFn
from bnjax.analysis.probe import check_batch_size


class TrajectoryPlane(NamedTuple):
    """The plane (or line, or space) that best holds a training trajectory.

    Attributes:
      origin: pytree of parameters, the last of the trajectory.
      directions: the d principal components, orthonormal pytrees.
      coordinates: coordinates of the T points of the trajectory from the origin along the directions, `[T, d]`.
      explained_variance: fraction of the trajectory's variance along each direction, `[d]`.
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
      barrier: the largest excess of the loss over the line between the losses at the ends.
    """

    coordinates: Array
    loss: Array
    barrier: Array


def random_direction(key: Key[Array, ""], params: Any, *, filter_normalized: bool = True, filter_axis: int = -1) -> Any:
    """Draws a random Gaussian direction, by default with each filter scaled to the norm of the parameters' filter.

    Args:
      key: random key.
      params: pytree of arrays.
      filter_normalized: whether to apply `filter_normalize`; static.
      filter_axis: axis that counts filters, as in `filter_normalize`; static.

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


def filter_normalize(direction: Any, params: Any, *, filter_axis: int = -1) -> Any:
    """Scales each filter of a direction to the norm of the parameters' filter: `d_f ← d_f ‖W_f‖ / ‖d_f‖`.

    Vectors and scalars (biases, and the scales and biases of normalizers) become zero.

    Args:
      direction: pytree like `params`.
      params: pytree of arrays.
      filter_axis: axis of a kernel that counts its filters: the last, as in Flax; 0 for PyTorch's layout. Static.

    Raises:
      ValueError: if `direction` is not like `params`.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 4: filter-wise normalized directions.

    >>> from bnjax import analysis
    >>> print(analysis.filter_normalize(jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])))
    [[0.6 2. ]
     [0.8 0. ]]
    """
    _, free = _trees.differentiable(lambda params: jnp.zeros(()), params)
    direction = _trees.free_part("direction", direction, free)

    def scaled(d: Array, w: Array) -> Array:
        if w.ndim < 2:
            return jnp.zeros_like(d)
        axes, units = _trees.input_axes(w, filter_axis), [_trees.unit_of(v) for v in (w, d)]
        w, unit_direction = (_trees.in_units(v, unit) for v, unit in zip((w, d), units, strict=True))
        sizes = [jnp.sqrt(jnp.square(v).sum(axes, keepdims=True)) for v in (w, unit_direction)]
        ratio = sizes[0] / jnp.where(sizes[1] > 0, sizes[1], 1)
        return (unit_direction * ratio * units[0]).astype(d.dtype)

    return _trees.filled(jax.tree.map(scaled, direction, free), params)


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
    if jax.tree.structure(directions) == jax.tree.structure(params):
        directions, coordinates = (directions,), (coordinates,)
    elif len(directions) == 1 and not isinstance(coordinates, tuple | list):
        coordinates = (coordinates,)
    if len(directions) not in (1, 2) or len(coordinates) != len(directions):
        raise ValueError(
            f"directions must be one or two pytrees like params, with a vector of coordinates each, got "
            f"{len(directions)} directions and {len(coordinates)} vectors."
        )
    directions = [_trees.free_part("directions", direction, free) for direction in directions]
    axes = [jnp.asarray(values) for values in coordinates]
    if any(values.ndim != 1 for values in axes):
        raise ValueError(f"coordinates must be vectors, got shapes {[values.shape for values in axes]}.")
    dtype = jnp.promote_types(_trees.norm(free).dtype, jnp.float32)
    grid = jnp.stack([v.ravel() for v in jnp.meshgrid(*(v.astype(dtype) for v in axes), indexing="ij")], axis=1)

    def at(point: Array) -> Array:
        there = free
        for i, direction in enumerate(directions):
            there = _trees.moved(there, point[i], direction)
        return loss_fn(there, *args)

    return lax.map(at, grid, batch_size=batch_size).reshape([v.size for v in axes])


def trajectory_plane(trajectory: Any, num_directions: int = 2) -> TrajectoryPlane:
    """Computes the principal components of a training trajectory about its last point, and the path projected on them.

    Args:
      trajectory: pytree of parameters with a leading axis of T ≥ 2 points everywhere. (Stack a list of them by
        `jax.tree.map(lambda *points: jnp.stack(points), *trajectory)`.)
      num_directions: d, up to T − 1; static.

    Returns:
      A `TrajectoryPlane`: `loss_surface(loss_fn, plane.origin, plane.directions, …)` is the loss around the path. The
      T × T inner products of the points are decomposed, so that P parameters cost T P numbers and T² P operations. A
      direction that the points do not span, up to the rounding errors of these products, is zero.

    Raises:
      ValueError: for fewer than two points, or more directions than T − 1.

    References:
      Li et al. 2018 (arXiv 1712.09913), section 7: PCA of the differences to the last point.

    >>> from bnjax import analysis
    >>> plane = analysis.trajectory_plane(jnp.array([[4.0, 0.0], [2.0, 1.0], [0.0, 0.0]]))
    >>> print(abs(plane.coordinates).round(2)[0], plane.explained_variance.round(2))
    [3.98 0.41] [0.96 0.04]
    """
    leaves = jax.tree.leaves(trajectory)
    points = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
    if len(points) != 1 or min(points) < 2:
        raise ValueError(f"trajectory must have the same leading axis of at least 2 points everywhere, got {points}.")
    (count,) = points
    if not 1 <= num_directions < count:
        raise ValueError(f"num_directions must be from 1 to {count - 1} for {count} points, got {num_directions}.")
    _, free = _trees.differentiable(lambda params: jnp.zeros(()), trajectory)
    origin = jax.tree.map(lambda p: p[-1], trajectory)
    offsets = jax.tree.map(lambda p: (p - p[-1:]).reshape((count, -1)), free)
    dtype = _trees.norm(free).dtype
    gram = sum(
        (jnp.matmul(o, o.T, precision="highest", preferred_element_type=dtype) for o in jax.tree.leaves(offsets)),
        jnp.zeros((count, count), dtype),
    )
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    # A direction that the path does not span is lost in the rounding errors of the inner products, and becomes zero.
    values = jnp.where(values > 10 * count * jnp.finfo(dtype).eps * values[0], values, 0)
    lengths = jnp.sqrt(values[:num_directions])
    inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    weights = vectors[:, :num_directions] * inverse[None]

    def direction(i: int) -> Any:
        def of_leaf(offset, like):
            row = jnp.matmul(weights[:, i].astype(offset.dtype), offset, precision="highest")
            return row.reshape(like.shape[1:])

        return _trees.filled(jax.tree.map(of_leaf, offsets, free), origin)

    total = values.sum()
    explained = values[:num_directions] / jnp.where(total > 0, total, 1)
    coordinates = vectors[:, :num_directions] * lengths[None]
    return TrajectoryPlane(origin, tuple(direction(i) for i in range(num_directions)), coordinates, explained)


def linear_path(
    loss_fn: LossFn,
    params: Any,
    other_params: Any,
    *args: Any,
    coordinates: ArrayLike | None = None,
    batch_size: int | None = None,
) -> LinearPath:
    """Computes the loss on the straight line from one solution to another, and its barrier.

        L((1 − t) A + t B)        barrier = max_t L((1 − t) A + t B) − (1 − t) L(A) − t L(B)

    With batch norm, running statistics of the ends are wrong between them: use a loss in mode 'batch' or 'reestimated'
    (see `bnjax.analysis.losses`), which takes them anew at every point.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays, A; leaves that are not floating-point are constants.
      other_params: pytree like `params`, B.
      *args: further arguments of `loss_fn`.
      coordinates: t, increasing, the first 0 and the last 1, `[K]`; 25 equal steps by default.
      batch_size: number of points computed at once by vmap; one after the other by default. Static.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or ends that differ in structure.

    References:
      Goodfellow, Vinyals & Saxe 2015 (arXiv 1412.6544); Frankle et al. 2020 (arXiv 1912.05671), section 2, for the
      barrier.

    >>> from bnjax import analysis
    >>> path = analysis.linear_path(lambda w: jnp.cos(w), jnp.array(0.0), jnp.array(2 * jnp.pi))
    >>> print(path.loss.shape, path.barrier)
    (25,) 0.0
    """
    _, free = _trees.differentiable(loss_fn, params)
    other = _trees.free_part("other_params", other_params, free)
    t = jnp.linspace(0, 1, 25) if coordinates is None else jnp.asarray(coordinates)
    direction = _trees.filled(_trees.subtract(other, free), params)
    losses = loss_surface(loss_fn, params, (direction,), t, *args, batch_size=batch_size)
    return LinearPath(t, losses, (losses - (1 - t) * losses[0] - t * losses[-1]).max())
