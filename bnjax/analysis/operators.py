"""Symmetric linear operators on pytrees: products with matrices that are too large to be written down.

`bnjax.analysis.curvature` makes them of losses and models; what measures them (eigenpairs, trace, density) takes any.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from bnjax.analysis import _trees, selection
from bnjax.analysis._conjugate import solve
from bnjax.analysis._iterate import Checkpoints, kept_in
from bnjax.analysis.selection import Layer

Product = Callable[[Any], Any]
"""The product `v → A v` of pytrees."""


@dataclasses.dataclass(frozen=True, eq=False)
class SymmetricOperator:
    """A symmetric linear operator A on a pytree, known by its products.

    Operators of the same parameters can be added, subtracted and multiplied by numbers; `shifted`, `restrict` and
    `inverse` make others of them, and `to_scipy` one of SciPy's.

    Attributes:
      product: `v → A v`, of pytrees like `like`; called with one vector.
      like: pytree of floating-point arrays (or `jax.ShapeDtypeStruct`), whose shapes and dtypes vectors have.
      on_host: whether `product` reads batches on the host, so that it cannot be traced. What measures the operator then
        runs there too, step by step, and can be resumed.

    >>> from bnjax import analysis
    >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 2.0, 5.0]) * v, jnp.zeros(3))
    >>> print((2 * a).shifted(1.0)(jnp.ones(3)))
    [ 3.  5. 11.]
    """

    product: Product
    like: Any
    on_host: bool = False
    _of_several: Product | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        like = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf), self.like)
        object.__setattr__(self, "like", like)

    @property
    def size(self) -> int:
        """The number of rows and columns."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.like))

    def __call__(self, vector: Any) -> Any:
        """Computes the product with a vector.

        Args:
          vector: v, a pytree like `like`.

        Raises:
          ValueError: for a vector of another structure or other shapes.
        """
        return self.product(_trees.free_part("vector", vector, self.like))

    def of_several(self, vectors: Any) -> Any:
        """Computes the products with several vectors, with a leading axis, reading each batch only once."""
        if self._of_several is not None:
            return self._of_several(vectors)
        if not self.on_host:
            return lax.map(self.product, vectors)
        count = jax.tree.leaves(vectors)[0].shape[0]
        products = [self.product(jax.tree.map(lambda v, i=i: v[i], vectors)) for i in range(count)]
        return jax.tree.map(lambda *v: jnp.stack(v), *products)

    def __add__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        return self._with(other, jnp.add)

    def __sub__(self, other: "SymmetricOperator") -> "SymmetricOperator":
        return self._with(other, jnp.subtract)

    def __mul__(self, factor: Any) -> "SymmetricOperator":
        return self._after(lambda product, _: jax.tree.map(lambda p: (factor * p).astype(p.dtype), product))

    __rmul__ = __mul__

    def __neg__(self) -> "SymmetricOperator":
        return self * -1

    def shifted(self, shift: Any) -> "SymmetricOperator":
        """Returns A + shift · I.

        >>> from bnjax import analysis
        >>> a = analysis.SymmetricOperator(lambda v: 2 * v, jnp.zeros(2))
        >>> print(a.shifted(0.5)(jnp.ones(2)))
        [2.5 2.5]
        """
        return self._after(lambda product, v: jax.tree.map(lambda p, v: (p + shift * v).astype(p.dtype), product, v))

    def restrict(self, layers: Sequence[Layer]) -> "SymmetricOperator":
        """Returns the block of A of some layers, the parts of `like` at their paths or patterns of paths.

        A product costs as much as one with A; `bnjax.analysis.restrict` of the loss differentiates less.

        Args:
          layers: paths of the parameters that stay, as in `bnjax.analysis.restrict`.

        Returns:
          An operator on a dict of the layers' arrays by their paths.

        Raises:
          ValueError: for paths that lead to nothing, or that overlap.

        >>> from bnjax import analysis
        >>> a = analysis.SymmetricOperator(lambda v: {'a': v['a'] + v['b'], 'b': v['a']}, {'a': 0.0, 'b': 0.0})
        >>> print(a.restrict(['a'])({'a': 3.0}))
        {'a': Array(3., dtype=float32...)}
        """
        parts, embed = selection.parts_of(self.like, layers)

        def whole(v: Any) -> Any:
            return embed(v, jax.tree.map(jnp.zeros_like, self.like))

        def block(product: Any) -> Any:
            return selection.parts_of(product, layers)[0]

        def of_several(vectors: Any) -> Any:
            return jax.vmap(block)(self.of_several(jax.vmap(whole)(vectors)))

        return SymmetricOperator(lambda v: block(self.product(whole(v))), parts, self.on_host, of_several)

    def inverse(
        self,
        damping: float = 0.0,
        *,
        tolerance: float = 1e-5,
        max_products: int = 1000,
        checkpoints: Checkpoints | None = None,
    ) -> "SymmetricOperator":
        """Returns `(A + damping · I)⁻¹`, each of whose products is found by the method of conjugate gradients.

        Args:
          damping: number that is added to all eigenvalues of A, which must then be positive.
          tolerance: norm of what is left of a vector, `v − (A + damping I) x`, over its own; static.
          max_products: number of products with A for each; static.
          checkpoints: where the state of one product is kept, for an operator that reads its data on the host, such as
            `bnjax.training.checkpoint.Checkpoints`; of another vector it is refused.

        Returns:
          An operator whose products are NaN where the tolerance is not reached, or `A + damping I` shows itself not to
          be positive definite.

        Raises:
          ValueError: for a tolerance or a number of products that is not positive.

        References:
          Hestenes & Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems".

        >>> from bnjax import analysis
        >>> a = analysis.SymmetricOperator(lambda v: jnp.array([1.0, 3.0]) * v, jnp.zeros(2))
        >>> print(a.inverse(damping=1.0)(jnp.ones(2)))
        [0.5  0.25]
        """
        if tolerance <= 0 or max_products < 1:
            raise ValueError(f"tolerance and max_products must be positive, got {tolerance} and {max_products}.")
        damped = self.shifted(damping)

        def product(v: Any) -> Any:
            kept = None
            if checkpoints is not None:
                sums = [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(v)] if self.on_host else []
                kept = kept_in(checkpoints, damped, "inverse", damping, tolerance, sums)
            return solve(damped, v, tolerance, max_products, kept)

        return SymmetricOperator(product, self.like, self.on_host)

    def to_scipy(self) -> Any:
        """Returns the operator as a `scipy.sparse.linalg.LinearOperator` of flat NumPy vectors, in A's precision.

        >>> from bnjax import analysis
        >>> a = analysis.SymmetricOperator(lambda v: {'a': 2 * v['a']}, {'a': jnp.zeros((2, 1))})
        >>> print(a.to_scipy() @ [1.0, 3.0])
        [2. 6.]
        """
        from scipy.sparse.linalg import LinearOperator

        flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, self.like))
        run = (lambda f: f) if self.on_host else jax.jit

        def product(v: Any) -> Any:
            return ravel_pytree(self.product(unravel(v)))[0]

        def products(block: Any) -> Any:
            return jax.vmap(lambda tree: ravel_pytree(tree)[0])(self.of_several(jax.vmap(unravel)(block)))

        product, products = run(product), run(products)

        def matvec(v: Any) -> Any:
            return np.asarray(product(jnp.asarray(np.ravel(v), flat.dtype)))

        def matmat(block: Any) -> Any:
            return np.asarray(products(jnp.asarray(block, flat.dtype).T)).T

        shape, dtype = (flat.size, flat.size), np.dtype(flat.dtype)
        return LinearOperator(shape, matvec, matvec, matmat, dtype, matmat)  # pyright: ignore[reportCallIssue]

    def _with(self, other: "SymmetricOperator", combine: Callable[[Any, Any], Any]) -> "SymmetricOperator":
        _trees.free_part("the other operator's parameters", other.like, self.like)

        def of(method: str) -> Product:
            return lambda v: jax.tree.map(combine, getattr(self, method)(v), getattr(other, method)(v))

        return SymmetricOperator(of("product"), self.like, self.on_host or other.on_host, of("of_several"))

    def _after(self, function: Callable[[Any, Any], Any]) -> "SymmetricOperator":
        """Returns the operator of `v → function(A v, v)`, elementwise in both."""

        def of(method: str) -> Product:
            return lambda v: function(getattr(self, method)(v), v)

        return SymmetricOperator(of("product"), self.like, self.on_host, of("of_several"))
