"""Preparation of images for a network: centered, and varied at random by a key for each or for all of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key, Shaped


def random_affine_flip(
    images: Float[Array, "batch height width channels"],
    keys: Key[Array, " batch"],
    *,
    shear: float = 0.2,
    zoom: float = 0.2,
    flip: bool = True,
) -> Float[Array, "batch height width channels"]:
    """Shears, zooms and mirrors each image at random, as Keras's `ImageDataGenerator` does.

    `shear_zoom_flip` with an angle uniform in [−shear, shear], horizontal and vertical factors independently uniform in
    [1 − zoom, 1 + zoom], and a mirrored image with probability 1/2.

    Args:
      images: to vary.
      keys: a random key for each image.
      shear: largest angle in degrees, which is Keras's unit since 2.2; versions before took radians.
      zoom: largest deviation of a zoom factor from 1.
      flip: whether images are mirrored.

    References:
      Chollet et al. 2015, Keras, `ImageDataGenerator(shear_range, zoom_range, horizontal_flip)`.

    >>> from bnjax.studies.data.augmentation import random_affine_flip
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> random_affine_flip(images, jax.random.split(jax.random.key(0), 2)).shape
    (2, 32, 32, 3)
    """

    def vary(image, key):
        shear_key, zoom_key, flip_key = jax.random.split(key, 3)
        angle = jax.random.uniform(shear_key, minval=-shear, maxval=shear)
        factors = jax.random.uniform(zoom_key, (2,), minval=1 - zoom, maxval=1 + zoom)
        return shear_zoom_flip(image, angle, factors, flip & jax.random.bernoulli(flip_key))

    return jax.vmap(vary)(images, keys)


def random_crop_flip(
    images: Shaped[Array, "batch height width channels"], keys: Key[Array, " batch"], *, padding: int = 4
) -> Shaped[Array, "batch height width channels"]:
    """Moves each image by up to `padding` pixels in both directions, zeros coming in, and mirrors half of them.

    Args:
      images: to vary.
      keys: a random key for each image.
      padding: largest shift in pixels.

    References:
      He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2 (padding 4 for CIFAR-10).

    >>> from bnjax.studies.data.augmentation import random_crop_flip
    >>> images = jnp.ones((2, 32, 32, 3))
    >>> random_crop_flip(images, jax.random.split(jax.random.key(0), 2)).shape
    (2, 32, 32, 3)
    """

    def vary(image, key):
        place, flip = jax.random.split(key)
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        row, column = jax.random.randint(place, (2,), 0, 2 * padding + 1)
        moved = lax.dynamic_slice(padded, (row, column, 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip), moved[:, ::-1], moved)

    return jax.vmap(vary)(images, keys)


def shear_zoom_flip(
    image: Float[Array, "height width channels"],
    shear: Float[Array, ""],
    zoom: Float[Array, "2"],
    flip: Bool[Array, ""],
) -> Float[Array, "height width channels"]:
    """Shears and zooms an image about its center, then mirrors it.

    Column x and row y of the result, counted from the center, are the image's at column `zₓ x − sin(shear) z_y y` and
    row `cos(shear) z_y y`, interpolated bilinearly; beyond its edges the image continues as its nearest pixels. As the
    row depends on y alone, two matrix products interpolate exactly, first rows and then columns, without the gathers
    that are slow on TPU; their work grows with the third power of the size, so this is for small images.

    Args:
      image: of one example.
      shear: angle in degrees.
      zoom: the horizontal and the vertical factor; greater than one shows more of the scene.
      flip: whether to exchange left and right at last.

    >>> from bnjax.studies.data.augmentation import shear_zoom_flip
    >>> image = jnp.arange(4.0).reshape(1, 4, 1)
    >>> shear_zoom_flip(image, jnp.array(0.0), jnp.array([0.5, 1.0]), jnp.array(True))[0, :, 0]
    Array([2.25, 1.75, 1.25, 0.75], dtype=float32)
    """
    dtype = jnp.promote_types(image.dtype, jnp.float32)  # positions need more digits than bfloat16 has
    height, width, _ = image.shape
    angle = jnp.deg2rad(shear).astype(dtype)
    y = jnp.arange(height, dtype=dtype) - (height - 1) / 2
    x = (jnp.arange(width, dtype=dtype) - (width - 1) / 2) * jnp.where(flip, -1, 1)
    rows = jnp.cos(angle) * zoom[1] * y
    columns = zoom[0] * x[None, :] - jnp.sin(angle) * zoom[1] * y[:, None]

    def weights(position, size: int):
        """Returns the weights of `size` pixels along an axis at each position, counted from the center."""
        position = jnp.clip(position + (size - 1) / 2, 0, size - 1)
        return jnp.maximum(0, 1 - jnp.abs(jnp.subtract.outer(position, jnp.arange(size))))

    by_rows = jnp.einsum("yi,ijc->yjc", weights(rows, height), image, precision="highest")
    return jnp.einsum("yxj,yjc->yxc", weights(columns, width), by_rows, precision="highest").astype(image.dtype)


def centered(images: np.ndarray) -> Callable[[Array, Any], Array]:
    """Maps images of bytes, whatever their key, to pixels of mean 0 and deviation 1 over a training set."""
    mean, deviation = float(np.mean(images)), float(np.std(images))
    return lambda x, key: (x.astype(jnp.float32) - mean) / deviation


def distorted(
    images: Float[Array, "batch height width channels"], key: Key[Array, ""], strength: float
) -> Float[Array, "batch height width channels"]:
    """Gives each image a random contrast and brightness.

    Args:
      images: of mean 0 and deviation 1.
      key: random key of all.
      strength: by how much at most a deviation is changed, relatively, and a mean, in deviations.
    """
    scale, shift = jax.random.uniform(key, (2, images.shape[0], 1, 1, 1), minval=-strength, maxval=strength)
    return images * (1 + scale) + shift
