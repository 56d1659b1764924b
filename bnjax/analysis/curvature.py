"""Curvature without matrices: Hessian, Gauss–Newton, Fisher and gradient covariance, as operators and products."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from bnjax.analysis import _batches, _trees
from bnjax.analysis._batches import Batches, Weights
from bnjax.analysis._trees import LossFn
from bnjax.analysis.operators import SymmetricOperator

Progress = Callable[[str], Any]
_METHODS = ("forward over reverse", "linearized", "finite differences")
_DISTRIBUTIONS = ("categorical", "normal")


def hessian_operator(
    loss_fn: LossFn,
    params: Any,
    *args: Any,
    batches: Batches | None = None,
    weights: Weights | None = None,
    method: str = "forward over reverse",
    progress: Progress | None = None,
) -> SymmetricOperator:
    """Returns the Hessian of the loss of a batch or of a data set, `v → ∂/∂t ∇L(W + t v)` at t = 0.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, for a data set a mean over the examples of one batch.
      params: pytree of arrays, W; leaves that are not floating-point are constants.
      *args: further arguments of `loss_fn`, for one batch.
      batches: a data set in place of `args`: an iterable of tuples `args`, which the host reads anew for each product
        (a list, a data loader, any object with `__iter__`), or a tuple of arrays with a leading axis of batches, which
        the device scans. The memory does not grow with the number of batches. L is then the mean over all examples.
      weights: function `weights(*batch)` that gives the weights of a batch's examples, by whose sum its loss counts; by
        default a batch counts by the length of its first array.
      method: 'forward over reverse', about the cost of two gradients; 'linearized', whose products repeat nothing that
        depends on W alone, and keep it in memory (for `args` only); 'finite differences', two gradients at
        `W ± h v` with `h ‖v‖ = ∛ε (1 + ‖W‖)`, for losses that cannot be differentiated twice.
      progress: function that is called with a text on each batch that the host has read, such as `print`.

    Raises:
      TypeError, ValueError: for parameters without floating-point arrays, a loss that is no real scalar, an unknown
        method, or batches that can be read only once.

    References:
      Pearlmutter 1994, "Fast Exact Multiplication by the Hessian"; for differences Nocedal & Wright 2006, "Numerical
      Optimization", section 8.1.

    >>> from bnjax import analysis
    >>> hessian = analysis.hessian_operator(lambda w, x: (x * w ** 3).sum(), jnp.array([1.0, 2.0]), batches=[1.0, 3.0])
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}.")
    gradient = jax.grad(loss_fn)
    if method == "linearized":
        if batches is not None:
            raise ValueError("method 'linearized' keeps what it computed of one batch, and is not for data sets.")
        linear = jax.linearize(lambda p: gradient(p, *args), free)[1]
        return _batches.operator(lambda _, vector, index, *batch: linear(vector), free, args, None, None, None)

    def exact(free: Any, vector: Any, _: Any, *batch: Any) -> Any:
        return jax.jvp(lambda p: gradient(p, *batch), (free,), (vector,))[1]

    def differences(free: Any, vector: Any, _: Any, *batch: Any) -> Any:
        size = _trees.norm(vector)
        root = jnp.finfo(size.dtype).eps ** (1 / 3)
        h = root * (1 + _trees.norm(free)) / jnp.where(size > 0, size, 1)
        ahead, behind = (gradient(_trees.moved(free, sign * h, vector), *batch) for sign in (1, -1))
        return jax.tree.map(lambda a, b: (a - b) / (2 * h).astype(a.dtype), ahead, behind)

    product = exact if method == _METHODS[0] else differences
    return _batches.operator(product, free, args, batches, weights, progress)


def gauss_newton_operator(
    model_fn: Callable[..., Any],
    output_loss: LossFn,
    params: Any,
    *args: Any,
    batches: Batches | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> SymmetricOperator:
    """Returns the generalized Gauss–Newton matrix of the loss of a batch or of a data set, `G v = Jᵀ H_z J v`.

    J is the Jacobian of the outputs z = model_fn(params, *args), and H_z the Hessian of output_loss(z, *args). G is the
    Hessian's part without second derivatives of the model, positive semi-definite where the loss is convex in the
    outputs.

    Args:
      model_fn: `model_fn(params, *args) -> outputs`, a pytree of arrays.
      output_loss: `output_loss(outputs, *args) -> scalar`, for a data set a mean over the examples of one batch.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of both functions, for one batch.
      batches: a data set in place of `args`, as in `hessian_operator`.
      weights: weights of examples, as in `hessian_operator`.
      progress: function that is told of each batch, as in `hessian_operator`.

    Raises:
      TypeError, ValueError: as `hessian_operator` does.

    References:
      Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".

    >>> from bnjax import analysis
    >>> model, half_square = lambda w, x: x * w ** 2, lambda z, x: 0.5 * (z ** 2).sum()
    >>> gauss_newton = analysis.gauss_newton_operator(model, half_square, jnp.array([1.0, 2.0]), 1.0)
    >>> print(gauss_newton(jnp.array([1.0, 1.0])))
    [ 4. 16.]
    """
    _, free = _trees.differentiable(lambda p, *batch: output_loss(model_fn(p, *batch), *batch), params)

    def product(free: Any, vector: Any, _: Any, *batch: Any) -> Any:
        outputs, tangent, pullback = _linear(
            lambda free: model_fn(_trees.merged(free, params), *batch), (free,), (vector,)
        )
        return pullback(jax.jvp(jax.grad(lambda z: output_loss(z, *batch)), (outputs,), (tangent,))[1])[0]

    return _batches.operator(product, free, args, batches, weights, progress)


def fisher_operator(
    model_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    distribution: str = "categorical",
    samples: int | None = None,
    key: Key[Array, ""] | None = None,
    head: Callable[[Any, Array], Array] | None = None,
    chunk_size: int = 128,
    batches: Batches | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> SymmetricOperator:
    """Returns the Fisher information matrix of a model's distribution, `F = mean E[∇log p(y | z) ∇log p(y | z)ᵀ]`.

    The mean is over all examples (over tokens, where outputs have more axes), the expectation over labels y that are
    drawn from the model's own distribution given its outputs z = model_fn(params, *args): a categorical one whose
    logits are z, or a normal one of unit variance about z. F is then the Gauss–Newton matrix of the mean cross-entropy,
    or of the mean of half the summed squares.

    Args:
      model_fn: `model_fn(params, *args) -> z`, an array `[batch, …, classes]`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `model_fn`, for one batch.
      distribution: 'categorical' or 'normal'.
      samples: number of labels that are drawn for each example, the same ones in every product, in place of the exact
        expectation; static.
      key: random key of the samples.
      head: the model's last layer, `head(params, features) -> z`, where `model_fn` returns the features `[batch, …, d]`
        before it. It is called with at most `[chunk_size, d]`, so that no array of all tokens times classes is kept,
        and its parameters count as the others do.
      chunk_size: largest number of examples or tokens in a call of `head`; static.
      batches: a data set in place of `args`, as in `hessian_operator`.
      weights: weights of examples, as in `hessian_operator`: arrays that broadcast to `z.shape[:-1]`.
      progress: function that is told of each batch, as in `hessian_operator`.

    Raises:
      TypeError, ValueError: for bad parameters, outputs that are no array with an axis of classes, an unknown
        distribution, samples without a key, or a chunk size below 1.

    References:
      Martens 2020 (arXiv 1412.1193), sections 5 and 9; Kunstner, Balles & Hennig 2019 (arXiv 1905.12558).

    >>> from bnjax import analysis
    >>> fisher = analysis.fisher_operator(lambda w, x: x * w[None], jnp.zeros(2), jnp.ones((1, 2)))
    >>> print(fisher(jnp.array([1.0, -1.0])))
    [ 0.5 -0.5]
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution must be 'categorical' or 'normal', got {distribution!r}.")
    if (samples is None) != (key is None):
        raise ValueError("samples and key go together: the number of labels to draw, and the key to draw them with.")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    free = _trees.free_leaves(params)

    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")

    def of_outputs(z: Array, tangent: Array, key: Any) -> Array:
        """Computes the product of the Fisher matrix of each example's outputs and their tangent."""
        if samples is None or key is None:
            return _inner(distribution, z, tangent)
        drawn = _scores(distribution, z, samples, key)
        return (drawn * (drawn * tangent[None]).sum(-1, keepdims=True)).mean(0)

    def through_head(free: Any, vector: Any, key: Any, tokens: Any) -> tuple[Any, Array]:
        """Returns the part of the product in the head's own parameters, and the cotangents of its features."""

        def add(total: Any, chunk: Any) -> tuple[Any, Array]:
            features, tangent, shares, number = chunk
            z, of_vector, pullback = _linear(head_of_free, (free, features), (vector, tangent))
            own, cotangent = pullback(shares[:, None] * of_outputs(z, of_vector, _folded(key, number)))
            return jax.tree.map(lambda t, o: t + o.astype(t.dtype), total, own), cotangent

        count = tokens[2].size
        chunks = -(-count // min(chunk_size, max(count, 1)))
        ends = [(0, -count % max(chunks, 1)), (0, 0)]
        padded = *(jnp.pad(v, ends, "edge") for v in tokens[:2]), jnp.pad(tokens[2], ends[:1])
        chunked = jax.tree.map(lambda v: v.reshape((chunks, -1, *v.shape[1:])), padded)
        zeros = jax.tree.map(jnp.zeros_like, _trees.wide(free))
        total, cotangents = lax.scan(add, zeros, (*chunked, jnp.arange(chunks)))
        return total, cotangents.reshape((-1, *cotangents.shape[2:]))[:count]

    def head_of_free(free: Any, features: Array) -> Array:
        return head(_trees.merged(free, params), features)  # pyright: ignore[reportOptionalCall]

    def product(free: Any, vector: Any, index: Any, *batch: Any) -> Any:
        z, tangent, pullback = _linear(lambda free: model_fn(_trees.merged(free, params), *batch), (free,), (vector,))
        if not hasattr(z, "ndim") or not z.ndim:
            raise TypeError(f"model_fn must return an array [batch, …, classes], got {jax.tree.structure(z)}.")
        shares, key_of_batch = _shares(weights, batch, z.shape[:-1], z.dtype), _folded(key, index)
        if head is None:
            return pullback(shares[..., None] * of_outputs(z, tangent, key_of_batch))[0]
        tokens = *(v.reshape((-1, v.shape[-1])) for v in (z, tangent)), shares.ravel()
        own, cotangents = through_head(free, vector, key_of_batch, tokens)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), own, pullback(cotangents.reshape(z.shape))[0])

    return _batches.operator(product, free, args, batches, weights, progress)


def gradient_covariance_operator(
    losses_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    centered: bool = False,
    batches: Batches | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> SymmetricOperator:
    """Returns the second moment of the examples' gradients, `mean g_n g_nᵀ`, or about their mean, `− ḡ ḡᵀ`.

    Of a log-likelihood the uncentered one is called the empirical Fisher matrix. No gradient of a single example is
    formed. (In batch norm's mode 'batch', g_n is the gradient of one example's loss through the statistics of all.)

    Args:
      losses_fn: `losses_fn(params, *args) -> losses`, an array of the examples' (or tokens') losses.
      params: pytree of arrays; leaves that are not floating-point are constants.
      *args: further arguments of `losses_fn`, for one batch.
      centered: whether it is the covariance, about ḡ; static.
      batches: a data set in place of `args`, as in `hessian_operator`; centered, it is read once more for ḡ.
      weights: weights of examples, as in `hessian_operator`: arrays that broadcast to the losses.
      progress: function that is told of each batch, as in `hessian_operator`.

    Raises:
      TypeError, ValueError: for bad parameters, or losses that are no real array with an axis of examples.

    References:
      Kunstner, Balles & Hennig 2019 (arXiv 1905.12558), eq. (3).

    >>> from bnjax import analysis
    >>> losses = lambda w, x: w * x
    >>> covariance = analysis.gradient_covariance_operator(losses, 0.0, jnp.array([1.0, 3.0]), centered=True)
    >>> print(covariance(2.0))
    2.0
    """
    free = _trees.free_leaves(params)

    def losses_of(free: Any, batch: Any) -> Any:
        losses = losses_fn(_trees.merged(free, params), *batch)
        if not hasattr(losses, "ndim") or not losses.ndim or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise TypeError("losses_fn must return a real array of the examples' losses, which the mean is taken over.")
        return losses

    def gradient(free: Any, _: Any, index: Any, *batch: Any) -> Any:
        def mean(free: Any) -> Array:
            losses = losses_of(free, batch)
            return (_shares(weights, batch, losses.shape, losses.dtype) * losses).sum()

        return jax.grad(mean)(free)

    mean: Any = None
    if centered and batches is not None:
        mean = _batches.Mean(gradient, free, batches, weights, progress)(None)
    elif centered:
        mean = gradient(free, None, 0, *args)

    def product(free: Any, argument: Any, _: Any, *batch: Any) -> Any:
        vector, along_mean = argument
        losses, linear = jax.linearize(lambda p: losses_of(p, batch), free)
        along = linear(vector) - along_mean.astype(losses.dtype)
        weighted = _shares(weights, batch, losses.shape, losses.dtype) * along
        return jax.linear_transpose(linear, free)(weighted)[0]

    def prepare(vector: Any) -> Any:
        return vector, jnp.zeros(()) if mean is None else _trees.dot(mean, vector)

    return _batches.operator(product, free, args, batches, weights, progress, prepare)


def hessian_product(loss_fn: LossFn, params: Any, vector: Any, *args: Any) -> Any:
    """Computes the product of the loss's Hessian and a vector: `H v = ∂/∂t ∇L(W + t v)` at t = 0, forward over reverse.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays, W; leaves that are not floating-point are constants.
      vector: v, a pytree like `params`.
      *args: further arguments of `loss_fn`.

    Returns:
      A pytree like `params`, with zeros for leaves that are not floating-point. It costs about two gradients.

    Raises:
      TypeError, ValueError: for parameters without floating-point arrays, a loss that is no real scalar, or a vector
        unlike `params`.

    References:
      Pearlmutter 1994, "Fast Exact Multiplication by the Hessian".

    >>> from bnjax import analysis
    >>> print(analysis.hessian_product(lambda w: (w ** 3).sum(), jnp.array([1., 2.]), jnp.array([1., 1.])))
    [ 6. 12.]
    """
    return _trees.filled(hessian_operator(loss_fn, params, *args)(vector), params)


def gauss_newton_product(
    model_fn: Callable[..., Any], output_loss: LossFn, params: Any, vector: Any, *args: Any
) -> Any:
    """Computes the product of the generalized Gauss–Newton matrix and a vector: `G v = Jᵀ H_z J v`.

    Args:
      model_fn: `model_fn(params, *args) -> outputs`, as in `gauss_newton_operator`.
      output_loss: `output_loss(outputs, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      vector: v, a pytree like `params`.
      *args: further arguments of both functions.

    Returns:
      A pytree like `params`, with zeros for leaves that are not floating-point.

    Raises:
      TypeError, ValueError: as `hessian_product` does.

    References:
      Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".

    >>> from bnjax import analysis
    >>> model, half_square = lambda w: w ** 2, lambda z: 0.5 * (z ** 2).sum()
    >>> print(analysis.gauss_newton_product(model, half_square, jnp.array([1., 2.]), jnp.array([1., 1.])))
    [ 4. 16.]
    """
    return _trees.filled(gauss_newton_operator(model_fn, output_loss, params, *args)(vector), params)


def _linear(function: Callable[..., Any], at: tuple, tangents: tuple) -> tuple[Any, Any, Any]:
    """Returns the value, the Jacobian's product with tangents, and the product with its transpose."""
    value, linear = jax.linearize(function, *at)
    return value, linear(*tangents), lambda cotangent: jax.linear_transpose(linear, *at)(cotangent)


def _folded(key: Any, number: Any) -> Any:
    return None if key is None else jax.random.fold_in(key, number)


def _shares(weights: Weights | None, batch: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns each example's share of the batch's weight."""
    if weights is None:
        return jnp.full(shape, 1 / max(1, math.prod(shape)), dtype)
    given = jnp.broadcast_to(_trees.leading(_batches.weights_of(weights, batch), len(shape)), shape)
    total = given.sum()
    return (given / jnp.where(total > 0, total, 1)).astype(dtype)


def _inner(distribution: str, z: Array, tangent: Array) -> Array:
    """Computes the product of the outputs' Fisher matrix and their tangents."""
    if distribution == "normal":
        return tangent
    p = jax.nn.softmax(z)
    return p * (tangent - (p * tangent).sum(-1, keepdims=True))


def _scores(distribution: str, z: Array, samples: int, key: Array) -> Array:
    """Draws labels, and returns the derivatives of their log-likelihood by the outputs, samples first."""
    if distribution == "normal":
        return jax.random.normal(key, (samples, *z.shape), z.dtype)
    labels = jax.random.categorical(key, z, shape=(samples, *z.shape[:-1]))
    return jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype) - jax.nn.softmax(z)[None]
