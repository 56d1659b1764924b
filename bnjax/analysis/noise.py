"""The noise of gradients, and how far those of several batches agree."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from bnjax.analysis import _trees
from bnjax.analysis._trees import LossFn
from bnjax.analysis.traces import quantile

_GROUPS = 10  # of gradients, whose sums are kept


class GradientNoise(NamedTuple):
    """The noise of a batch's gradient.

    Attributes:
      scale: tr Σ / ‖G‖², the batch size, in examples, at which noise and gradient are of one size. It is negative, or
        far off, where the batches can't separate the gradient from the noise (`squared_norm` near or below zero).
      squared_norm: unbiased estimate of ‖G‖², G being the gradient without noise.
      trace: unbiased estimate of tr Σ, the summed variances of one example's gradient.
      low: lower end of a 95 % interval of the scale.
      high: upper end; infinite where the batches can't tell ‖G‖² from zero.
    """

    scale: Array
    squared_norm: Array
    trace: Array
    low: Array
    high: Array


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


def gradient_noise_scale(loss_fn: LossFn, params: Any, *args: Any, num_batches: int) -> GradientNoise:
    """Computes the simple noise scale `tr Σ / ‖G‖²` from the gradients g_i of n parts of a batch, b examples each.

        s² = Σ ‖g_i − ḡ‖² / (n − 1)        tr Σ = b s²        ‖G‖² = ‖ḡ‖² − s² / n

    With batch norm in mode 'batch' each part is normalized by its own statistics, as a batch of b in training is.

    The interval is Fieller's for a ratio of means, by Student's t and the jackknife's covariance of numerator and
    denominator, with up to 10 groups of parts, whose sums are kept in memory, left out in turn. Simulated, it holds the
    scale in 90 to 99 % of the cases.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, the mean over the examples.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: arrays whose leading axis counts the B examples of the batch (pytrees of them too).
      num_batches: n ≥ 2, which divides B; static. The interval needs 3, and is of use from about 8 on.

    Raises:
      TypeError, ValueError: for bad parameters, a loss that is no real scalar, or a batch that does not divide.

    References:
      McCandlish et al. 2018 (arXiv 1812.06162), section 2.2 and appendix A.1; Fieller 1954, "Some Problems in Interval
      Estimation"; Busing, Meijer & van der Leeden 1999, "Delete-m Jackknife for Unequal m".

    >>> from bnjax import analysis
    >>> loss = lambda w, x: (w * x).mean()                          # whose gradients are the examples
    >>> noise = analysis.gradient_noise_scale(loss, jnp.array(1.0), jnp.array([1.0, 3.0]), num_batches=2)
    >>> print(noise.trace, noise.squared_norm, noise.scale)
    2.0 3.0 0.6666667
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    parts, size = _parts(args, num_batches)
    groups = min(num_batches, _GROUPS)
    group_of = np.arange(num_batches) * groups // num_batches
    counts = jnp.asarray(np.bincount(group_of), _trees.norm(free).dtype)

    def add(carry: Any, inputs: Any) -> tuple[Any, None]:
        """Adds a part's offset from the first part's gradient, all in units of the largest gradient's size so far."""
        unit, first, sums, squares = carry
        number, group, part = inputs
        gradient = _trees.wide(jax.grad(loss_fn)(free, *part))
        own = jnp.where(_trees.norm(gradient) == 0, 0, _trees.unit_of(gradient))
        larger = jnp.maximum(unit, own)
        divisor = jnp.where(larger > 0, larger, 1)
        ratio = unit / divisor
        gradient = _trees.in_units(gradient, divisor)
        first = jax.tree.map(lambda f, g: jnp.where(number == 0, g, f * ratio.astype(f.dtype)), first, gradient)
        offset = _trees.subtract(gradient, first)
        sums = jax.tree.map(lambda s, o: (s * ratio.astype(s.dtype)).at[group].add(o), sums, offset)
        squares = (squares * ratio**2).at[group].add(_trees.dot(offset, offset))
        return (larger, first, sums, squares), None

    zero = jax.tree.map(jnp.zeros_like, _trees.wide(free))
    sums = jax.tree.map(lambda z: jnp.zeros((groups, *z.shape), z.dtype), zero)
    start = (counts[0] * 0, zero, sums, counts * 0)
    numbered = (jnp.arange(num_batches), jnp.asarray(group_of), parts)
    unit, first, sums, squares = lax.scan(add, start, numbered)[0]
    total, square = jax.tree.map(lambda s: s.sum(0), sums), squares.sum()

    def estimates(offsets: Any, square: Array, count: Array) -> Array:
        """Returns tr Σ and ‖G‖² by the summed offsets of some parts, their squares, and their number."""
        mean = jax.tree.map(lambda f, o: f + o / count.astype(o.dtype), first, offsets)
        variance = (square - _trees.dot(offsets, offsets) / count) / (count - 1)
        return jnp.stack([size * variance, _trees.dot(mean, mean) - variance / count])

    def without(group: tuple[Any, Array, Array]) -> Array:
        return estimates(_trees.subtract(total, group[0]), square - group[1], counts.sum() - group[2])

    found = estimates(total, square, counts.sum())
    low = high = jnp.full((), jnp.nan)
    if num_batches > 2:
        low, high = _interval_of_ratio(found, lax.map(without, (sums, squares, counts)), counts)
    trace, squared_norm = found * jnp.where(unit > 0, unit, 1) ** 2
    return GradientNoise(found[0] / found[1], squared_norm, trace, low, high)


def _interval_of_ratio(found: Array, without: Array, counts: Array) -> tuple[Array, Array]:
    """Returns Fieller's interval of the ratio of two estimates, neither of which is negative in truth.

    Args:
      found: numerator A and denominator B, `[2]`.
      without: the same with each group of observations left out, `[groups, 2]`.
      counts: observations in each group.
    """
    share = (counts.sum() / counts)[:, None]
    pseudo = share * found[None] - (share - 1) * without
    offset = pseudo - pseudo.mean(0, keepdims=True)
    (aa, ab), (_, bb) = (offset[:, :, None] * offset[:, None, :] / (share - 1)[..., None]).mean(0)
    square, (a, b) = quantile(len(counts)) ** 2, found
    # The ratio may be r where (A − r B)² ≤ t² (V_AA − 2 r V_AB + r² V_BB): a quadratic p r² − 2 q r + … ≤ 0.
    p, q = b**2 - square * bb, a * b - square * ab
    root = jnp.sqrt(jnp.maximum(0, square * (a**2 * bb + b**2 * aa - 2 * a * b * ab) + square**2 * (ab**2 - aa * bb)))
    safe = jnp.where(p == 0, 1, p)
    lower, upper = (q - root) / safe, (q + root) / safe  # in this order where p > 0, else in the other
    # Elsewhere the set is what lies outside of the two roots; its negative part cannot be true.
    is_bounded = (p > 0) & (b > 0)
    low = jnp.where(is_bounded, lower, jnp.where((p < 0) & (root > 0) & (upper < 0), lower, 0))
    is_known = ~jnp.isnan(a + b)
    return jnp.where(is_known, jnp.maximum(low, 0), jnp.nan), jnp.where(
        is_known, jnp.where(is_bounded, upper, jnp.inf), jnp.nan
    )


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


def _parts(args: tuple, count: int) -> tuple[Any, int]:
    """Splits the arguments' examples into `count` parts along a new leading axis; also returns the size of a part."""
    sizes = {leaf.shape[0] if jnp.ndim(leaf) else -1 for leaf in jax.tree.leaves(args)}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(f"args must be arrays with the same number of examples first, got {sizes or 'none'}.")
    (size,) = sizes
    if count < 2 or size == 0 or size % count:
        raise ValueError(f"num_batches must be at least 2 and divide the {size} examples, got {count}.")
    return jax.tree.map(lambda v: jnp.reshape(v, (count, size // count, *v.shape[1:])), args), size // count
