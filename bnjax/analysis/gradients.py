"""Measurements of gradients: norms by layer, sharpness, scale invariance."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from bnjax.analysis import _trees, selection
from bnjax.analysis._trees import LossFn
from bnjax.analysis.selection import FilterAxis, Layer


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
    groups = selection.layer_leaves(free, layers)
    return {name: _trees.norm(selection.of_leaves(gradient, numbers)) for name, numbers in groups.items()}


def sam_sharpness(loss_fn: LossFn, params: Any, *args: Any, radius: ArrayLike = 0.05, num_steps: int = 1) -> Array:
    """Computes the loss's rise to the worst point that steepest ascent finds in a ball: `L(W + e) − L(W)`, ‖e‖ ≤ ρ.

    One step gives the first-order solution `e = ρ g / ‖g‖`; several steps have the length 2 ρ / num_steps each and are
    projected back into the ball. The worst is that of all points of the ascent, W among them.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      radius: ρ ≥ 0, by default that of the paper's experiments; may be traced, and a negative one gives NaN then.
      num_steps: number of steps, each of which takes a gradient; static.

    Returns:
      The rise, a scalar; zero where the gradient is zero, or all points found are better than W, and NaN where a loss
      is. Parameters of 16 bits lose moves below half their spacing.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, a negative radius, or no steps.

    References:
      Foret et al. 2021 (arXiv 2010.01412), section 2, equation 2.

    >>> from bnjax import analysis
    >>> print(analysis.sam_sharpness(lambda w: (w ** 2).sum(), jnp.array([3.0, 4.0]), radius=1.0))
    11.0
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    radius = jnp.asarray(radius, _trees.norm(free).dtype)
    if not isinstance(radius, Tracer) and not radius >= 0:
        raise ValueError(f"radius must not be negative, got {radius}.")
    radius = jnp.where(radius >= 0, radius, jnp.nan)
    length, one = radius if num_steps == 1 else 2 * radius / num_steps, jnp.ones((), radius.dtype)

    def ascend(offset, _):
        loss, gradient = jax.value_and_grad(loss_fn)(_trees.moved(free, one, offset), *args)
        size = _trees.norm(gradient)
        offset = _trees.moved(offset, length / jnp.where(size > 0, size, 1), gradient)
        size = _trees.norm(offset)
        shrink = jnp.where(size > radius, radius / size, 1)
        return jax.tree.map(lambda o: o * shrink.astype(o.dtype), offset), loss

    start = jax.tree.map(jnp.zeros_like, _trees.wide(free))
    offset, losses = lax.scan(ascend, start, None, num_steps)
    return jnp.maximum(losses.max(), loss_fn(_trees.moved(free, one, offset), *args)) - losses[0]


def scale_invariance(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    layers: Sequence[str] | None = None,
    learning_rate: ArrayLike | None = None,
    filter_axis: FilterAxis = None,
) -> ScaleInvariance:
    """Measures whether each kernel's scale matters to the loss, and how fast its direction learns.

    Weights that feed a batch norm do not change its output with their scale, BN((a w)ᵀ u) = BN(wᵀ u) for a > 0 (up to
    epsilon), so that by Euler's theorem ⟨w_j, ∂L/∂w_j⟩ = 0 for every unit j.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`.
      layers: paths of the kernels; by default all arrays of two and more dimensions that are not called bias or scale.
      learning_rate: η, for the effective learning rate η / ‖W‖²; may be traced.
      filter_axis: axes of a kernel that count its units, as in `bnjax.analysis.filter_normalize`. Static.

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
    pairs = zip(jax.tree.leaves_with_path(free), jax.tree.leaves(gradient), strict=True)
    of_paths = [(_trees.path_name(path), w, g) for (path, w), g in pairs]
    selection.check_patterns(filter_axis, [path for path, _, _ in of_paths])
    all_inputs = [selection.input_axes(path, w, filter_axis) for path, w, _ in of_paths]
    kernels = {path: (w, g, inputs) for (path, w, g), inputs in zip(of_paths, all_inputs, strict=True) if inputs}
    names = tuple(kernels) if layers is None else tuple(layers)
    unknown = [name for name in names if name not in kernels]
    if unknown or not names:
        raise ValueError(f"layers must name kernels among {list(kernels)}, got {unknown or 'none'}.")

    def measured(w: Array, g: Array, inputs: tuple[int, ...]) -> tuple[Array, Array, Array]:
        w, g = _trees.wide(w), _trees.wide(g)
        a, b = (v / selection.filter_units(v, inputs) for v in (w, g))  # lest their squares underflow
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
