"""Measurements of gradients: norms by layer, noise, agreement between batches, sharpness, scale invariance."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from bnjax.analysis import _trees
from bnjax.analysis._trees import Layer, LossFn


class GradientNoise(NamedTuple):
    """The noise of a batch's gradient.

    Attributes:
      scale: tr Σ / ‖G‖², the batch size, in examples, at which noise and gradient are of one size. It is negative, or
        far off, where the batches can't separate the gradient from the noise (`squared_norm` near or below zero).
      squared_norm: unbiased estimate of ‖G‖², G being the gradient without noise.
      trace: unbiased estimate of tr Σ, the summed variances of one example's gradient.
    """

    scale: Array
    squared_norm: Array
    trace: Array


class GradientConfusion(NamedTuple):
    """The disagreement of the gradients of n batches.

    Attributes:
      confusion: the smallest η ≥ 0 with ⟨g_i, g_j⟩ ≥ −η for all i ≠ j.
      min_cosine: smallest cosine between two gradients; NaN where one is zero.
      mean_cosine: mean cosine over all pairs.
      products: all inner products, `[n, n]`.
    """

    confusion: Array
    min_cosine: Array
    mean_cosine: Array
    products: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cosine", "weight_norm", "gradient_norm", "effective_learning_rate"],
    meta_fields=["layers"],
)
@dataclasses.dataclass(frozen=True)
class ScaleInvariance:
    """The dependence of the loss on the scale of each kernel; arrays `[layers]`.

    Attributes:
      layers: paths of the kernels.
      cosine: largest |⟨w_j, ∂L/∂w_j⟩| / (‖w_j‖ ‖∂L/∂w_j‖) over the units j: 0 where the loss does not change with the
        scale of a unit's weights. Units without gradient or weights are left out; NaN where that leaves none.
      weight_norm: ‖W‖₂ of each kernel.
      gradient_norm: ‖∂L/∂W‖₂ of each kernel.
      effective_learning_rate: learning rate / ‖W‖², which decides how fast the direction of scale-invariant weights
        turns; NaN without a learning rate.
    """

    layers: tuple[str, ...]
    cosine: Any  # arrays, or any other leaf of a tree
    weight_norm: Any
    gradient_norm: Any
    effective_learning_rate: Any


def gradient_norms(loss_fn: LossFn, params: Any, *args: Any, layers: Sequence[Layer] | None = None) -> dict[str, Array]:
    """Computes the norm of the gradient by each layer's parameters, ‖∂L/∂W_i‖₂.

    Gradients vanish where these norms shrink towards the input.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      layers: paths of the layers' parameters; by default each child of the root is a layer.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or layers unknown or overlapping.

    References:
      Glorot & Bengio 2010, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", section 4.2.

    >>> from bnjax import analysis
    >>> print(analysis.gradient_norms(lambda w: w['a'] ** 2 * w['b'], {'a': 2.0, 'b': 3.0}))
    {'a': Array(12., dtype=float32...), 'b': Array(4., dtype=float32...)}
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    gradient = jax.grad(loss_fn)(free, *args)
    groups = _trees.layer_leaves(free, layers)
    return {name: _trees.norm(_trees.of_leaves(gradient, numbers)) for name, numbers in groups.items()}


def gradient_noise_scale(loss_fn: LossFn, params: Any, *args: Any, num_batches: int) -> GradientNoise:
    """Computes the simple noise scale `tr Σ / ‖G‖²` from the gradients g_i of n parts of a batch, b examples each.

        s² = Σ ‖g_i − ḡ‖² / (n − 1)        tr Σ = b s²        ‖G‖² = ‖ḡ‖² − s² / n

    With batch norm in mode 'batch' each part is normalized by its own statistics, as a batch of b in training is.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the examples.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: arrays whose leading axis counts the B examples of the batch (pytrees of them too).
      num_batches: n ≥ 2, which divides B; static.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or a batch that does not divide.

    References:
      McCandlish et al. 2018 (arXiv 1812.06162), section 2.2 and appendix A.1.

    >>> from bnjax import analysis
    >>> loss = lambda w, x: (w * x).mean()                          # whose gradients are the examples
    >>> noise = analysis.gradient_noise_scale(loss, jnp.array(1.0), jnp.array([1.0, 3.0]), num_batches=2)
    >>> print(noise.trace, noise.squared_norm, noise.scale)
    2.0 3.0 0.6666667
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    parts, size = _parts(args, num_batches)

    def add(carry, part):
        count, mean, square = carry
        gradient = jax.grad(loss_fn)(free, *part)
        offset = _trees.subtract(gradient, mean)
        mean = jax.tree.map(lambda m, o: m + o / (count + 1).astype(o.dtype), mean, offset)
        return (count + 1, mean, square + _trees.dot(offset, _trees.subtract(gradient, mean))), None

    zero = _trees.dot(free, free) * 0
    start = (jnp.zeros((), zero.dtype), jax.tree.map(jnp.zeros_like, free), zero)
    _, mean, square = lax.scan(add, start, parts)[0]
    variance = square / (num_batches - 1)
    trace, squared_norm = size * variance, _trees.dot(mean, mean) - variance / num_batches
    return GradientNoise(trace / squared_norm, squared_norm, trace)


def gradient_confusion(loss_fn: LossFn, params: Any, *args: Any, num_batches: int) -> GradientConfusion:
    """Measures how far gradients of n parts of a batch oppose each other: `η = max(0, −min_{i≠j} ⟨g_i, g_j⟩)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the examples.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: arrays whose leading axis counts the examples of the batch (pytrees of them too).
      num_batches: n ≥ 2, which divides the batch (the whole of it for single examples); static. n gradients are kept.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or a batch that does not divide.

    References:
      Sankararaman et al. 2020 (arXiv 1904.06963), Definition 2.1.

    >>> from bnjax import analysis
    >>> found = analysis.gradient_confusion(lambda w, x: (w * x).mean(), 1.0, jnp.array([1.0, -3.0]), num_batches=2)
    >>> print(found.confusion, found.min_cosine)
    3.0 -1.0
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    parts, _ = _parts(args, num_batches)
    gradients = lax.map(lambda part: jax.grad(loss_fn)(free, *part), parts)

    def products_of(leaf: Array) -> Array:
        flat = leaf.reshape((num_batches, -1))
        return jnp.matmul(flat, flat.T, precision="highest")

    units = jax.vmap(_trees.unit_of)(gradients)  # by which the squares stay in range
    scaled = jax.vmap(_trees.in_units)(gradients, units)
    products = functools.reduce(jnp.add, map(products_of, jax.tree.leaves(scaled)))
    norms = jnp.sqrt(jnp.diagonal(products))
    cosines = products / (norms[:, None] * norms[None, :])
    products = products * units[:, None] * units[None, :]
    first, second = jnp.triu_indices(num_batches, 1)
    confusion = jnp.maximum(0, -products[first, second].min())
    return GradientConfusion(confusion, cosines[first, second].min(), cosines[first, second].mean(), products)


def sam_sharpness(loss_fn: LossFn, params: Any, radius: ArrayLike, *args: Any, num_steps: int = 1) -> Array:
    """Computes the loss's rise to the worst point that steepest ascent finds in a ball: `L(W + e) − L(W)`, ‖e‖ ≤ ρ.

    One step gives the first-order solution `e = ρ g / ‖g‖`; several steps have the length 2 ρ / num_steps each and are
    projected back into the ball.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      radius: ρ > 0; may be traced.
      *args: further arguments of `loss_fn`.
      num_steps: number of steps, each of which takes a gradient; static.

    Returns:
      The rise, a scalar; zero where the gradient is zero. Parameters of 16 bits lose moves below half their spacing.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or no steps.

    References:
      Foret et al. 2021 (arXiv 2010.01412), section 2, equation 2.

    >>> from bnjax import analysis
    >>> print(analysis.sam_sharpness(lambda w: (w ** 2).sum(), jnp.array([3.0, 4.0]), 1.0))
    11.0
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    radius = jnp.asarray(radius, _trees.norm(free).dtype)
    length = radius if num_steps == 1 else 2 * radius / num_steps

    def ascend(offset, _):
        loss, gradient = jax.value_and_grad(loss_fn)(_trees.moved(free, jnp.ones((), radius.dtype), offset), *args)
        size = _trees.norm(gradient)
        offset = _trees.moved(offset, length / jnp.where(size > 0, size, 1), gradient)
        size = _trees.norm(offset)
        shrink = jnp.where(size > radius, radius / size, 1)
        return jax.tree.map(lambda o: o * shrink.astype(o.dtype), offset), loss

    offset, losses = lax.scan(ascend, jax.tree.map(jnp.zeros_like, free), None, num_steps)
    return loss_fn(_trees.moved(free, jnp.ones((), radius.dtype), offset), *args) - losses[0]


def scale_invariance(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    layers: Sequence[str] | None = None,
    learning_rate: ArrayLike | None = None,
    filter_axis: int = -1,
) -> ScaleInvariance:
    """Measures whether each kernel's scale matters to the loss, and how fast its direction learns.

    Weights that feed a batch norm do not change its output with their scale, BN((a w)ᵀ u) = BN(wᵀ u) for a > 0 (up to
    epsilon), so that by Euler's theorem ⟨w_j, ∂L/∂w_j⟩ = 0 for every unit j.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      layers: paths of the kernels; by default all arrays of two and more dimensions.
      learning_rate: η, for the effective learning rate η / ‖W‖²; may be traced.
      filter_axis: axis of a kernel that counts its units: the last, as in Flax. Static.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or paths that name no kernel.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.3; van Laarhoven 2017 (arXiv 1706.05350) for the effective
      learning rate.

    >>> from bnjax import analysis
    >>> loss = lambda w: (w['a'][0] / jnp.linalg.norm(w['a'], axis=0)).sum() + (w['b'] ** 2).sum()
    >>> found = analysis.scale_invariance(loss, {'a': jnp.eye(2) + 1, 'b': jnp.eye(2)})
    >>> print(found.layers, abs(found.cosine.round(3)))
    ('a', 'b') [0. 1.]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    gradient = jax.grad(loss_fn)(free, *args)
    kernels = {
        _trees.path_name(path): (w, g)
        for (path, w), g in zip(jax.tree.leaves_with_path(free), jax.tree.leaves(gradient), strict=True)
        if w.ndim >= 2
    }
    names = tuple(kernels) if layers is None else tuple(layers)
    unknown = [name for name in names if name not in kernels]
    if unknown or not names:
        raise ValueError(f"layers must name kernels among {list(kernels)}, got {unknown or 'none'}.")

    def measured(w: Array, g: Array) -> tuple[Array, Array, Array]:
        dtype = jnp.promote_types(w.dtype, jnp.float32)
        inputs = _trees.input_axes(w, filter_axis)
        w, g = w.astype(dtype), g.astype(dtype)

        def scaled(v: Array) -> Array:  # scales each unit's weights, lest their squares underflow
            largest = jnp.abs(v).max(inputs, keepdims=True, initial=0)
            return v / jnp.where(largest == 0, 1, largest)

        a, b = scaled(w), scaled(g)
        sizes = jnp.sqrt(jnp.square(a).sum(inputs) * jnp.square(b).sum(inputs))
        counted = ~(sizes <= 0)  # NaN counts
        cosines = jnp.where(counted, jnp.abs((a * b).sum(inputs)) / jnp.where(counted, sizes, 1), -1)
        largest = cosines.max(initial=-1)
        return jnp.where(largest < 0, jnp.nan, largest), _trees.norm(w), _trees.norm(g)

    cosine, weight_norm, gradient_norm = (
        jnp.stack(values) for values in zip(*(measured(*kernels[name]) for name in names), strict=True)
    )
    rate = jnp.asarray(jnp.nan if learning_rate is None else learning_rate, weight_norm.dtype)
    return ScaleInvariance(names, cosine, weight_norm, gradient_norm, rate / jnp.square(weight_norm))


def _parts(args: tuple, count: int) -> tuple[Any, int]:
    """Splits the arguments' examples into `count` parts along a new leading axis; also returns the size of a part."""
    sizes = {leaf.shape[0] if jnp.ndim(leaf) else -1 for leaf in jax.tree.leaves(args)}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(f"args must be arrays with the same number of examples first, got {sizes or 'none'}.")
    (size,) = sizes
    if count < 2 or size == 0 or size % count:
        raise ValueError(f"num_batches must be at least 2 and divide the {size} examples, got {count}.")
    return jax.tree.map(lambda v: jnp.reshape(v, (count, size // count, *v.shape[1:])), args), size // count
