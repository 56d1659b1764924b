"""Eigenpairs of symmetric operators: of Hessians, of their layers' blocks, and of any other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from bnjax.analysis import _trees, selection
from bnjax.analysis._iterate import Checkpoints, iterate, kept_in
from bnjax.analysis._lanczos import LanczosState, ThickRestart
from bnjax.analysis._trees import LossFn
from bnjax.analysis.curvature import hessian_operator
from bnjax.analysis.operators import SymmetricOperator
from bnjax.analysis.selection import Layer

_WHICH = ("largest", "smallest", "both", "magnitude")
_LEAST_SUBSPACE = 40


class Eigenpairs(NamedTuple):
    """The k first eigenpairs of a symmetric operator.

    Attributes:
      values: eigenvalues in the order asked for, `[k]`.
      vectors: orthonormal eigenvectors, as a pytree like the parameters with a leading axis of k.
      residuals: ‖A v − λ v‖₂, `[k]`: some eigenvalue lies within this distance of each value, up to the rounding errors
        of the products (some hundred ε max |λ|), which come in addition.
      products: number of products that they took.
      state: what a later call with `state=` goes on from, where it was asked for.
    """

    values: Array
    vectors: Any
    residuals: Array
    products: Array
    state: LanczosState | None = None


def eigenpairs(
    operator: SymmetricOperator,
    k: int,
    *,
    key: Key[Array, ""],
    tolerance: float = 1e-3,
    which: str = "largest",
    subspace: int | None = None,
    max_products: int = 1000,
    num_steps: int | None = None,
    block_size: int = 1,
    start: Any = None,
    state: LanczosState | None = None,
    return_state: bool = False,
    checkpoints: Checkpoints | None = None,
) -> Eigenpairs:
    """Computes the k first eigenpairs of a symmetric operator, by Lanczos's method with thick restarts.

    It asks for one product after the other, and stops as soon as `‖A v − λ v‖₂ ≤ tolerance · |λ|` for all k (for values
    below ε^⅔ of the largest, of that), as ARPACK does, which looks only after each of its restarts.

    Args:
      operator: A, of P parameters.
      k: number of eigenpairs, 1 to P; static.
      key: random key of the first vector.
      tolerance: relative residual; an eigenvalue's error is at most the residual, and much smaller (the square of the
        residual over the distance to the other eigenvalues) where it stands alone; static.
      which: 'largest' or 'smallest' by value, 'both' ends in turn, beginning with the largest, or by 'magnitude';
        static.
      subspace: number of vectors of the parameters' size that are kept, k + 1 to P; by default 2 k + 20, at least 40.
        More take fewer products; static.
      max_products: number of products after which it stops in any case; the residuals tell; static.
      num_steps: number of products, k to P, that are made and kept whatever the residuals, in place of a tolerance, a
        subspace and max_products; static.
      block_size: number of products that are made at once. Of an eigenvalue that is b-fold, or of b that lie closer
        together than the tolerance, only blocks of b are sure to find all; they take more products. A data set on the
        host is read once for each block; static.
      start: vectors to begin with, a pytree like the parameters with a leading axis, such as the `vectors` of a step
        before; their sum is taken. A random vector by default.
      state: where to go on from, a state of the same operator and options but for tolerance and max_products.
      return_state: whether to return the state; static.
      checkpoints: where the state of an operator on the host is kept, such as `bnjax.training.checkpoint.Checkpoints`,
        so that a call that was interrupted goes on from there, if it has the same options (but for the tolerance and
        max_products) and key; what it is of, parameters and data, the caller vouches for. Each measurement needs a
        directory of its own, and in several processes each must hold the whole state.

    Returns:
      `Eigenpairs`; a multiple eigenvalue may come fewer times than it is multiple.

    Raises:
      ValueError: for k, subspace, which, tolerance or a number of products out of range, or start vectors unlike the
        parameters.

    References:
      Wu & Simon 2000, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems".

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> pairs = analysis.eigenpairs(a, 2, key=jax.random.key(0), which='both')
    >>> print(pairs.values.round(4), pairs.products)
    [5. 1.] 3
    """
    size = operator.size
    if which not in _WHICH:
        raise ValueError(f"which must be one of {', '.join(_WHICH)}, got {which!r}.")
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to the number of parameters, {size}, got {k}.")
    if num_steps is not None:
        if not k <= num_steps <= size:
            raise ValueError(f"num_steps must be from k = {k} to the number of parameters, {size}, got {num_steps}.")
        tolerance, subspace, max_products = 0, min(size, max(num_steps, k + 1)), num_steps
    subspace = min(size, max(_LEAST_SUBSPACE, 2 * k + 20)) if subspace is None else subspace
    if not min(k + 1, size) <= subspace <= size:
        raise ValueError(f"subspace must be from k + 1 = {k + 1} to the number of parameters, {size}, got {subspace}.")
    if not 1 <= block_size <= max(1, min(subspace - k, size - subspace)):
        raise ValueError(
            f"block_size must be 1, or leave room beside k in the subspace, {subspace - k}, and beside the subspace, "
            f"{size - subspace}, got {block_size}."
        )
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and below 1, got {tolerance}.")
    if max_products < k:
        raise ValueError(f"max_products must be at least k = {k}, got {max_products}.")
    kept = kept_in(checkpoints, operator, "eigenpairs", which, k, subspace, block_size, key)
    method = ThickRestart(subspace, k, which, float(tolerance), max_products, block=block_size)
    if block_size > 1:
        operator = SymmetricOperator(operator.of_several, operator.like, operator.on_host)
    if state is None:
        first_key, key = jax.random.split(key)
        begun = method.start(_first(operator, start, first_key), key)
    else:
        begun = method.judged(state)
    found: LanczosState = iterate(operator, method, begun, kept)
    ritz = method.ritz(found)
    vectors = method.vectors(found, ritz.vectors[:, :k])
    values, residuals = ritz.values[:k] * found.unit, ritz.residuals[:k] * found.unit
    return Eigenpairs(values, vectors, residuals, found.products, found if return_state else None)


def hessian_eigenpairs(
    loss_fn: LossFn, params: Any, k: int, *args: Any, key: Key[Array, ""], **options: Any
) -> Eigenpairs:
    """Computes the k first eigenpairs of the Hessian of a batch's loss.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays; leaves that are not floating-point are constants.
      k: number of eigenpairs, as in `eigenpairs`.
      *args: further arguments of `loss_fn`.
      key: random key of the first vector.
      **options: `tolerance`, `which` and others of `eigenpairs`.

    Returns:
      `Eigenpairs`, whose vectors are zero for leaves that are not floating-point.

    Raises:
      TypeError, ValueError: for bad parameters or a loss that is no real scalar (as `hessian_operator`), and as
        `eigenpairs` does.

    References:
      Wu & Simon 2000, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems".

    >>> from bnjax import analysis
    >>> loss = lambda w: 0.5 * (jnp.array([1.0, 2.0, 5.0]) * w ** 2).sum()
    >>> pairs = analysis.hessian_eigenpairs(loss, jnp.ones(3), 2, key=jax.random.key(0))
    >>> print(pairs.values.round(4))
    [5. 2.]
    """
    operator = hessian_operator(loss_fn, params, *args, method="linearized")
    pairs = eigenpairs(operator, k, key=key, **options)
    like = jax.tree.map(lambda p: jnp.broadcast_to(p, (k, *jnp.shape(p))) if _trees.is_number(p) else None, params)
    return pairs._replace(vectors=_trees.filled(pairs.vectors, like))


def layer_eigenpairs(
    loss_fn: LossFn,
    params: Any,
    k: int,
    *args: Any,
    key: Key[Array, ""],
    layers: Sequence[Layer] | None = None,
    **options: Any,
) -> dict[str, Eigenpairs]:
    """Computes the k first eigenpairs of each layer's block of the Hessian, with the other layers held.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of arrays.
      k: number of eigenpairs of each layer, at most the number of parameters in the smallest layer; static.
      *args: further arguments of `loss_fn`.
      key: random key.
      layers: paths of the layers' parameters; by default each child of the root is a layer.
      **options: `tolerance`, `which` and others of `eigenpairs`.

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
    groups = selection.layer_leaves(free, layers)  # raises for layers that overlap
    if layers is None:
        layers = [name for name, leaves in groups.items() if selection.of_leaves(free, leaves)]
    pairs = {}
    for i, layer in enumerate(layers):
        parts = (layer,) if isinstance(layer, str) else tuple(layer)
        restricted = selection.restrict(loss_fn, free, parts)
        pairs[parts[0]] = hessian_eigenpairs(*restricted, k, *args, key=jax.random.fold_in(key, i), **options)
    return pairs


def layer_weights(vectors: Any, layers: Sequence[Layer] | None = None) -> dict[str, Array]:
    """Computes how much of each vector lies in each layer, `‖v_l‖² / ‖v‖²`.

    Args:
      vectors: k vectors, a pytree like the parameters with a leading axis, such as `vectors` of `Eigenpairs`.
      layers: paths of the layers' parameters, or patterns; by default each child of the root is a layer.

    Returns:
      Parts `[k]` by the layer's name, which sum to 1 where the layers hold all parameters; NaN for a zero vector.

    Raises:
      ValueError: for layers that are unknown or overlap.

    >>> from bnjax import analysis
    >>> weights = analysis.layer_weights({'a': jnp.array([[3.0], [0.0]]), 'b': jnp.array([[4.0], [2.0]])})
    >>> print([f'{part:.2f}' for part in weights['a']], [f'{part:.2f}' for part in weights['b']])
    ['0.36', '0.00'] ['0.64', '1.00']
    """
    groups = selection.layer_leaves(vectors, layers)

    def of_vector(vector: Any) -> Array:
        size = _trees.norm(vector)
        return jnp.stack([jnp.square(_trees.norm(selection.of_leaves(vector, n)) / size) for n in groups.values()])

    parts = jax.vmap(of_vector)(vectors)
    return {name: parts[:, i] for i, name in enumerate(groups)}


def _first(operator: SymmetricOperator, start: Any, key: Array) -> Any:
    """Returns the first vector: random, or the sum of given ones."""
    if start is None:
        return _trees.random_like(key, _trees.wide_shapes(operator.like), jax.random.normal)
    vector = jax.tree.map(lambda v: jnp.asarray(v).sum(0), start)
    return _trees.free_part("start", vector, operator.like)
