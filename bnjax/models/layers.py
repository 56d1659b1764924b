"""Layers of convolutional networks that are fast on CPU too, and dropout that does not depend on the batch's split."""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import dtypes
from jax import lax
from jaxtyping import Array, Float, Key

# The bytes of windows and of tiles that a CPU makes at a time, which bound the memory; these were the fastest measured.
_WINDOWS_BYTES, _TILES_BYTES = 2**21, 2**23
_TILED_CHANNELS = 16  # the channels from which on a 3 × 3 convolution on CPU is faster by tiles than by windows
_NHWC = ("NHWC", "HWIO", "NHWC")

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]


class Conv(nn.Module):
    """A two-dimensional `flax.linen.Conv` with the same parameters and results, computed by `conv2d`.

    Attributes:
      features: number of output channels.
      kernel_size: height and width of the kernel.
      strides: strides of the window, one number or two.
      padding: 'SAME', 'VALID', or the numbers of zeros before and after, for height and width.
      use_bias: whether there is a 'bias'.
      dtype: dtype of the computation and the result; inferred from the input and the parameters by default.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the 'kernel' [height, width, channels, features].
      bias_init: initializer of the 'bias' [features].

    >>> from bnjax.models.layers import Conv
    >>> conv = Conv(4, (3, 3))
    >>> variables = conv.init(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    >>> jax.tree.map(jnp.shape, variables['params'])
    {'bias': (4,), 'kernel': (3, 3, 3, 4)}
    >>> conv.apply(variables, jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 4)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str | Sequence[Sequence[int]] = "SAME"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        """Convolves `x`.

        Args:
          x: images [batch, height, width, channels].
        """
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv2d(x, kernel, strides=self.strides, padding=self.padding)
        return y if bias is None else y + bias[None, None, None]


def local_response_norm(
    x: Float[Array, "... channels"], *, size: int = 5, bias: float = 2.0, scale: float = 1e-4, power: float = 0.75
) -> Float[Array, "... channels"]:
    """Divides each channel by the strength of its neighbors: `y_c = x_c / (k + α Σ_{|j − c| ≤ n / 2} x_j²)^β`.

    Args:
      x: activations, the channels last.
      size: n, the number of channels in the sum.
      bias: k, the constant in the denominator.
      scale: α, the weight of the sum of squares.
      power: β, the power of the denominator.

    References:
      Krizhevsky, Sutskever & Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section
      3.3.

    >>> from bnjax.models.layers import local_response_norm
    >>> y = local_response_norm(jnp.array([[1.0, 2.0, 4.0]]), size=3, bias=1.0, scale=1.0, power=0.5)
    >>> [f'{value:.3f}' for value in y[0]]
    ['0.408', '0.426', '0.873']
    """
    window, strides = (1,) * (x.ndim - 1) + (size,), (1,) * x.ndim
    squares = lax.reduce_window(jnp.square(x), np.zeros((), x.dtype), lax.add, window, strides, "SAME")
    return x * (bias + scale * squares) ** -power


class Dropout(nn.Module):
    """Dropout with a random key for each example, so that devices that share a batch drop what one device would.

    Each element is zero with probability `rate`, else divided by `1 − rate`. What is dropped from an example depends
    on its key and on the layer's path in the network alone.

    Attributes:
      rate: probability of dropping an element, in [0, 1).

    References:
      Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", section 4, with the
      scaling during training instead of at test time.

    >>> from bnjax.models.layers import Dropout
    >>> y = Dropout(0.5).apply({}, jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2))
    >>> set(y.ravel().tolist()) <= {0.0, 2.0}
    True
    """

    rate: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be at least 0 and less than 1, got {self.rate}.")

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], keys: Key[Array, " batch"] | None) -> Float[Array, "batch ..."]:
        """Drops elements of `x`, none without `keys`.

        Args:
          x: inputs.
          keys: a random key for each example (the layers of a network may share them), or None for inference.
        """
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())

        def keep(key):
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(keys), x / (1 - self.rate), jnp.zeros_like(x))


def conv2d(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
) -> Float[Array, "batch ..."]:
    """Convolves images with a kernel as `lax.conv_general_dilated` does, and fast on CPU too.

    `y[n, i, j] = Σ_ab x[n, s i + a − p, s j + b − p] @ kernel[a, b]`, with stride s and p zeros in front.

    On CPU it is made of products of matrices, a few examples at a time, because XLA's own convolution loses its threads
    there inside `lax.scan`, and is slow under `vmap`. Kernels of 3 × 3 with stride 1 and at least 16 channels take
    Winograd's 16 products, with 16 multiplications where the definition has 36 and rounding errors of the same size;
    other kernels take one product, of a matrix whose rows are the windows. Other platforms use XLA's convolution. The
    choice is made when the program is lowered for a platform.

    Args:
      x: images.
      kernel: kernel of the dtype of `x`.
      strides: strides of the window, one number or two.
      padding: 'SAME', 'VALID', or the numbers of zeros before and after, for height and width.

    Returns:
      Images [batch, ..., features] of the dtype of `x`.

    Raises:
      ValueError: where the images are smaller than the kernel.

    References:
      Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document Processing", section 3.1;
      Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1.

    >>> from bnjax.models.layers import conv2d
    >>> conv2d(jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    Array([[4., 6., 4.],
           [6., 9., 6.],
           [4., 6., 4.]], dtype=float32)
    """
    steps = _pair(strides)
    return _conv2d(x, kernel, steps, _pads(x.shape, kernel.shape[:2], steps, padding))


def max_pool(
    x: Float[Array, "batch height width channels"],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int],
    padding: str | Sequence[Sequence[int]] = "VALID",
) -> Float[Array, "batch rows columns channels"]:
    """Returns the largest value of each window as `flax.linen.max_pool` does, with a gradient that is fast on CPU too.

    `y[n, i, j] = max_ab x[n, s i + a − p, s j + b − p]`, with stride s and p of padding in front.

    Where several values of a window are the largest, XLA's gradient goes to the first; on CPU they share the gradient.

    Args:
      x: images.
      window_shape: height and width of the window, one number or two.
      strides: strides of the window, one number or two.
      padding: 'VALID', 'SAME', or the numbers of rows and columns of −∞ before and after.

    Raises:
      ValueError: where the images are smaller than the window.

    >>> from bnjax.models.layers import max_pool
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    window, steps = _pair(window_shape), _pair(strides)
    pads = _pads(x.shape, window, steps, padding)

    def of_shifts(x):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
        shifts = (_shifts(rows, 2, window[1], steps[1]) for rows in _shifts(x, 1, window[0], steps[0]))
        return functools.reduce(jnp.maximum, itertools.chain.from_iterable(shifts))

    def by_xla(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *steps, 1), ((0, 0), *pads, (0, 0)))

    return lax.platform_dependent(x, cpu=of_shifts, default=by_xla)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _conv2d(x, kernel, strides: Pair, pads: Pads):
    def by_xla(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_NHWC)

    def as_products(x, kernel):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        if kernel.shape[:2] == (1, 1):
            return _of_windows(x, kernel, strides)
        if kernel.shape[:2] == (3, 3) and strides == (1, 1) and x.shape[-1] >= _TILED_CHANNELS:
            kernels = _winograd_kernels(kernel)
            numbers = 16 * -(-y.shape[1] // 2) * -(-y.shape[2] // 2) * x.shape[-1]
            return _in_chunks(_of_tiles, x, kernels, numbers * kernels[0].dtype.itemsize, _TILES_BYTES)
        numbers = y.shape[1] * y.shape[2] * kernel[..., 0].size
        product = functools.partial(_of_windows, strides=strides)
        return _in_chunks(product, x, kernel, numbers * x.dtype.itemsize, _WINDOWS_BYTES)

    y = jax.eval_shape(by_xla, x, kernel)
    return lax.platform_dependent(x, kernel, cpu=as_products, default=by_xla)


def _in_chunks(
    product: Callable[[Array, Any], Array], x: Array, kernel: Any, example_bytes: int, chunk_bytes: int
) -> Array:
    """Computes `product(x, kernel)` for a few examples at a time, where it makes `example_bytes` of each example."""
    parts = math.gcd(x.shape[0], jax.device_count())  # devices can work on these parts without each other
    examples = x.shape[0] // parts
    # Each chunk adds to the whole gradient by the kernel, so that a chunk may be as large as the kernel.
    most = max(chunk_bytes, sum(k.size * k.dtype.itemsize for k in jax.tree.leaves(kernel)))
    fitting = (n for n in range(1, examples + 1) if examples % n == 0 and n * parts * example_bytes <= most)
    n = max(fitting, default=1)
    if n >= examples:
        return product(x, kernel)
    chunks = x.reshape(parts, -1, n, *x.shape[1:]).swapaxes(0, 1).reshape(-1, parts * n, *x.shape[1:])
    # Without the checkpoint the backward pass would keep all windows or tiles, several times the examples' size.
    checkpointed = jax.checkpoint(product, prevent_cse=False)
    y = lax.map(lambda chunk: checkpointed(chunk, kernel), chunks)
    return y.reshape(-1, parts, n, *y.shape[2:]).swapaxes(0, 1).reshape(x.shape[0], *y.shape[2:])


def _of_windows(x: Array, kernel: Array, strides: Pair) -> Array:
    """Convolves without padding, by one product of a matrix whose rows are windows."""
    for axis in (2, 1):
        x = jnp.concatenate(_shifts(x, axis, kernel.shape[axis - 1], strides[axis - 1]), axis=-1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def _of_tiles(x: Array, kernels: Sequence[Array]) -> Array:
    """Convolves without padding by a 3 × 3 kernel, given as `_winograd_kernels`, in 16 products of matrices.

    Winograd's minimal filtering F(2 × 2, 3 × 3) takes 16 multiplications for the 4 results of a tile instead of 36.
    With neighbors a, b, c, d and a kernel (g, h, k), both results along an axis come from four products,

        a g + b h + c k = p + q + r and b g + c h + d k = q − r − s, where p = (a − c) g, q = (b + c) (g + h + k) / 2,
        r = (c − b) (g − h + k) / 2 and s = (b − d) k,

    and this is done for columns of rows. The factors of the images are sums of four numbers, which keeps the precision.
    """
    rows, columns, dtype = x.shape[1] - 2, x.shape[2] - 2, x.dtype
    x = jnp.pad(x.astype(kernels[0].dtype), ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
    factors = [f for along_rows in _winograd_factors(x, 1) for f in _winograd_factors(along_rows, 2)]
    # The factors become matrices, which XLA multiplies faster than arrays of more axes.
    matrices = (f.reshape(math.prod(f.shape[:-1]), f.shape[-1]) for f in factors)
    products = [(m @ k).reshape(*factors[0].shape[:-1], k.shape[-1]) for m, k in zip(matrices, kernels, strict=True)]
    along_columns = [_winograd_results(products[i : i + 4], 2) for i in range(0, 16, 4)]
    return _winograd_results(along_columns, 1)[:, :rows, :columns].astype(dtype)


def _winograd_factors(x: Array, axis: int) -> tuple[Array, ...]:
    """Returns the images' factors for each pair of results along an axis."""
    # A reshape separates neighbors, as its transpose is faster than that of a slice of stride 2.
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
    (a, c), (b, d) = (_shifts(p, axis, 2, 1) for p in (even, odd))
    return a - c, b + c, c - b, b - d


def _winograd_kernels(kernel: Array) -> list[Array]:
    """Returns the kernel's 16 factors [channels, features], in float32 at least."""

    def along(axis, kernel):
        g, h, k = (lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3))
        return g, (g + h + k) / 2, (g - h + k) / 2, k

    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return [k for along_rows in along(0, kernel) for k in along(0, along_rows)]


def _winograd_results(products: Sequence[Array], axis: int) -> Array:
    """Returns the pairs of results along an axis, in the order of the pixels."""
    p, q, r, s = products
    pairs = jnp.stack([p + q + r, q - r - s], axis + 1)
    return pairs.reshape(*p.shape[:axis], 2 * p.shape[axis], *p.shape[axis + 1 :])


def _pair(value: int | Sequence[int]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _pads(shape: Sequence[int], window: Sequence[int], strides: Pair, padding: str | Sequence[Sequence[int]]) -> Pads:
    """Returns the numbers of rows and columns to add before and after an image."""
    if isinstance(padding, str):
        pads = np.asarray(lax.padtype_to_pads(shape[1:3], window, strides, padding)).tolist()
    else:
        pads = padding
    pads = _pair(pads[0]), _pair(pads[1])
    if any(size + sum(pad) < w for size, pad, w in zip(shape[1:3], pads, window, strict=True)):
        raise ValueError(
            f"x must be at least as large as the window {tuple(window)}, got shape {tuple(shape)} with padding {pads}. "
            "Use larger images, or padding='SAME'."
        )
    return pads


def _shifts(x: Array, axis: int, window: int, stride: int) -> list[Array]:
    """Returns the elements of `x` that each offset in a window meets along an axis."""
    size = (x.shape[axis] - window) // stride * stride + 1
    return [lax.slice_in_dim(x, start, start + size, stride, axis) for start in range(window)]
