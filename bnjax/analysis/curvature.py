"""Second derivatives without matrices: products with the Hessian and Gauss–Newton matrices, and their eigenpairs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key

from bnjax.analysis import _trees
from bnjax.analysis._lanczos import block_lanczos
from bnjax.analysis._trees import Layer, LossFn

_WHICH = ("largest", "magnitude", "smallest")


class Eigenpairs(NamedTuple):
    """The k first eigenpairs of a symmetric operator.

    Attributes:
      values: eigenvalues in the order asked for, `[k]`.
      vectors: orthonormal eigenvectors, as a pytree like the parameters with a leading axis of k.
      residuals: ‖H v − λ v‖₂, `[k]`, which more steps make smaller: some eigenvalue lies within this distance of each
        value, up to the rounding errors of the products (some hundred ε max |λ|), which come in addition.
    """

    values: Array
    vectors: Any
    residuals: Array


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
    loss_fn, free = _trees.differentiable(loss_fn, params)
    vector = _trees.free_part("vector", vector, free)
    return _trees.filled(product_with(loss_fn, free, args)(vector), params)


def gauss_newton_product(
    model_fn: Callable[..., Any], output_loss: LossFn, params: Any, vector: Any, *args: Any
) -> Any:
    """Computes the product of the generalized Gauss–Newton matrix and a vector: `G v = Jᵀ H_z J v`.

    J is the Jacobian of the outputs z = model_fn(params, *args), and H_z the Hessian of output_loss(z). For a
    cross-entropy of logits G is the Fisher information matrix. G is the Hessian's part without second derivatives of
    the model, positive semi-definite where the loss is convex in the outputs.

    Args:
      model_fn: `model_fn(params, *args) -> outputs`, a pytree of arrays.
      output_loss: `output_loss(outputs) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      vector: v, a pytree like `params`.
      *args: further arguments of `model_fn`.

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
    _, free = _trees.differentiable(lambda params, *args: output_loss(model_fn(params, *args)), params)
    vector = _trees.free_part("vector", vector, free)

    def outputs(free):
        return model_fn(_trees.merged(free, params), *args)

    z, pullback = jax.vjp(outputs, free)
    tangent = jax.jvp(outputs, (free,), (vector,))[1]
    return _trees.filled(pullback(jax.jvp(jax.grad(output_loss), (z,), (tangent,))[1])[0], params)


def hessian_eigenpairs(
    loss_fn: LossFn,
    params: Any,
    k: int,
    *args: Any,
    key: Key[Array, ""],
    num_steps: int | None = None,
    which: str = "largest",
) -> Eigenpairs:
    """Computes the k first eigenpairs of the loss's Hessian, by block Lanczos with full reorthogonalization.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays with P numbers; leaves that are not floating-point are constants.
      k: number of eigenpairs, 1 to P; static.
      *args: further arguments of `loss_fn`.
      key: random key of the first vector.
      num_steps: Hessian products, k to P; static. More make smaller residuals; by default 6 k + 40, or P if that is
        less. As many vectors of the parameters' size are kept. From 40 on they are made in blocks of up to 8 vectors
        (the largest divisor of num_steps that leaves 20 blocks), which spares passes over these vectors.
      which: 'largest' or 'smallest' by value, or by 'magnitude'; static.

    Returns:
      `Eigenpairs`; a multiple eigenvalue may come fewer times than it is multiple.

    Raises:
      TypeError, ValueError: for bad parameters or a loss that is no real scalar (as `hessian_product`), or k, num_steps
        or which out of range.

    References:
      Lanczos 1950; Golub & Van Loan, "Matrix Computations", sections 10.1 and 10.3.6.

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> pairs = analysis.hessian_eigenpairs(loss, jnp.ones(3), 2, key=jax.random.key(0))
    >>> print(pairs.values.round(4))
    [5. 2.]
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    pairs = eigenpairs(product_with(loss_fn, free, args), free, k, key=key, num_steps=num_steps, which=which)
    vectors = jax.tree.map(lambda p: jnp.broadcast_to(p, (k, *jnp.shape(p))), params)
    return pairs._replace(vectors=_trees.filled(pairs.vectors, vectors))


def layer_eigenpairs(
    loss_fn: LossFn,
    params: Any,
    k: int,
    *args: Any,
    key: Key[Array, ""],
    layers: Sequence[Layer] | None = None,
    num_steps: int | None = None,
    which: str = "largest",
) -> dict[str, Eigenpairs]:
    """Computes the k first eigenpairs of each layer's block of the Hessian, with the other layers held.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays.
      k: number of eigenpairs of each layer, at most the number of parameters in the smallest layer; static.
      *args: further arguments of `loss_fn`.
      key: random key.
      layers: paths of the layers' parameters; by default each child of the root is a layer.
      num_steps: number of products, as in `hessian_eigenpairs`.
      which: order of the eigenvalues, as in `hessian_eigenpairs`.

    Returns:
      `Eigenpairs` by the layer's name, whose vectors are dicts of the layer's arrays by their paths.

    Raises:
      TypeError, ValueError: as `hessian_eigenpairs` does; also for layers that are unknown or overlap.

    >>> from bnjax import analysis
    >>> loss = lambda w: w['a'].sum() ** 2 + 3 * w['a'].sum() * w['b'].sum() + 2 * (w['b'] ** 2).sum()
    >>> params = {'a': jnp.ones(2), 'b': jnp.ones(3)}
    >>> found = analysis.layer_eigenpairs(loss, params, 1, key=jax.random.key(0))
    >>> print({layer: pairs.values.round(3).tolist() for layer, pairs in found.items()})
    {'a': [4.0], 'b': [4.0]}
    """
    loss_fn, free = _trees.differentiable(loss_fn, params)
    groups = _trees.layer_leaves(free, layers)  # raises for layers that overlap
    if layers is None:
        layers = [name for name, leaves in groups.items() if _trees.of_leaves(free, leaves)]
    pairs = {}
    for i, layer in enumerate(layers):
        parts = (layer,) if isinstance(layer, str) else tuple(layer)
        options = {"key": jax.random.fold_in(key, i), "num_steps": num_steps, "which": which}
        pairs[parts[0]] = hessian_eigenpairs(*_trees.restrict(loss_fn, free, parts), k, *args, **options)
    return pairs


def eigenpairs(
    product: Callable[[Any], Any],
    like: Any,
    k: int,
    *,
    key: Key[Array, ""],
    num_steps: int | None = None,
    which: str = "largest",
) -> Eigenpairs:
    """Computes the k first eigenpairs of any symmetric operator on pytrees, such as a Gauss–Newton matrix.

    Args:
      product: maps a pytree like `like` to its product with the operator.
      like: pytree of floating-point arrays.
      k: number of eigenpairs, as in `hessian_eigenpairs`.
      key: random key, as in `hessian_eigenpairs`.
      num_steps: number of products, as in `hessian_eigenpairs`.
      which: order of the eigenvalues, as in `hessian_eigenpairs`.

    Raises:
      ValueError: for k, num_steps or which out of range.

    >>> from bnjax import analysis
    >>> pairs = analysis.eigenpairs(lambda v: 3 * v, jnp.zeros(4), 2, key=jax.random.key(0))
    >>> print(pairs.values.round(4))
    [3. 3.]
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(like))
    if which not in _WHICH:
        raise ValueError(f"which must be one of {', '.join(_WHICH)}, got {which!r}.")
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the number of parameters, {size}, got {k}.")
    num_steps = min(size, 6 * k + 40) if num_steps is None else num_steps
    if not k <= num_steps <= size:
        raise ValueError(f"num_steps must be from k = {k} to the number of parameters, {size}, got {num_steps}.")
    basis, values, vectors, residuals = block_lanczos(product, like, num_steps, key)
    order = {"largest": -values, "magnitude": -jnp.abs(values), "smallest": values}[which]
    indices = jnp.argsort(order)[:k]
    unravel = ravel_pytree(like)[1]
    flat_vectors = jnp.matmul(vectors[:, indices].T, basis, precision="highest")
    return Eigenpairs(values[indices], jax.vmap(unravel)(flat_vectors), residuals[indices])


def product_with(loss_fn: LossFn, free: Any, args: tuple) -> Callable[[Any], Any]:
    """Returns the function `v → H v` of trees without constants; the common part of all products is computed once."""
    linear = jax.linearize(lambda p: jax.grad(loss_fn)(p, *args), free)[1]
    return lambda v: linear(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), v, free))
