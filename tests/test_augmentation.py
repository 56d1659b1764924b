import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bnjax.studies.data.augmentation import random_affine_flip, random_crop_flip, shear_zoom_flip

KEY = jax.random.key(0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shear", "zoom"), [(0.0, (1.0, 1.0)), (10.0, (0.8, 1.2)), (-25.0, (1.3, 0.9))])
def test_is_scipys_affine_transform(x64, shear, zoom, flip):
    image = np.random.default_rng(0).normal(size=(7, 10, 2))
    angle = np.deg2rad(shear)
    matrix = np.array([[np.cos(angle) * zoom[1], 0], [-np.sin(angle) * zoom[1], zoom[0]]])  # rows, then columns
    center = (np.array(image.shape[:2]) - 1) / 2
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(channel, matrix, center - matrix @ center, order=1, mode="nearest")
            for channel in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )
    got = shear_zoom_flip(jnp.asarray(image), jnp.array(shear), jnp.array(zoom), jnp.array(flip))
    np.testing.assert_allclose(got, expected[:, ::-1] if flip else expected, rtol=1e-12, atol=1e-12)


def positions(count, **options):
    """For each of `count` random maps, the rows and columns of the image that it reads, counted from the center."""
    y, x = np.mgrid[:17, :17] - 8.0
    images = jnp.broadcast_to(jnp.asarray(np.stack([y, x], -1), jnp.float32)[None], (count, 17, 17, 2))
    return np.asarray(jax.jit(lambda keys: random_affine_flip(images, keys, **options))(jax.random.split(KEY, count)))


def test_draws_are_uniform_in_their_ranges():
    read = positions(2000, shear=10.0, zoom=0.2)
    flipped = read[:, 8, 9, 1] < 0
    horizontal = abs(read[:, 8, 9, 1])
    row, shift = read[:, 9, 8, 0], -read[:, 9, 8, 1]  # cos(shear) z_y and sin(shear) z_y
    vertical, shear = np.hypot(row, shift), np.rad2deg(np.arctan2(shift, row))
    assert abs(flipped.mean() - 0.5) < 0.05
    for values, low, high in ((horizontal, 0.8, 1.2), (vertical, 0.8, 1.2), (shear, -10, 10)):
        scaled = (values - low) / (high - low)
        assert scaled.min() > -1e-4
        assert scaled.max() < 1 + 1e-4
        np.testing.assert_allclose(np.quantile(scaled, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)
    correlation = np.corrcoef([flipped, horizontal, vertical, shear])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.1)


def test_nothing_changes_without_a_range():
    y, x = np.mgrid[:17, :17] - 8.0
    read = positions(3, shear=0.0, zoom=0.0, flip=False)
    np.testing.assert_allclose(read, np.broadcast_to(np.stack([y, x], -1)[None], read.shape), atol=1e-5)


def test_an_image_varies_by_its_own_key_alone():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 3)), jnp.float32)
    keys = jax.random.split(KEY, 8)
    whole = jax.jit(random_affine_flip)(images, keys)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(random_affine_flip, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))
    np.testing.assert_allclose(mapped(images, keys), whole, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(whole).reshape(8, -1), axis=0)) == 8


def test_keeps_the_dtype_and_needs_no_gather():
    images, keys = jnp.ones((2, 8, 8, 3), jnp.bfloat16), jax.random.split(KEY, 2)
    lowered = jax.jit(random_affine_flip).lower(images, keys)
    assert lowered.out_info.dtype == jnp.bfloat16
    assert "stablehlo.gather" not in lowered.as_text()


def test_crop_and_flip_move_each_image_as_a_whole():
    place = np.arange(1, 37).reshape(1, 6, 6, 1)
    images = jnp.asarray(np.broadcast_to(place, (1000, 6, 6, 1)), jnp.uint8)
    moved = np.asarray(jax.jit(lambda keys: random_crop_flip(images, keys, padding=2))(jax.random.split(KEY, 1000)))[
        ..., 0
    ]
    padded = np.pad(place[0, :, :, 0], 2)
    windows = {(i, j): padded[i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
    found = [
        [(*at, flip) for at, window in windows.items() for flip in (1, -1) if (image == window[:, ::flip]).all()]
        for image in moved
    ]
    assert [len(one) for one in found] == [1] * 1000
    assert {one[0] for one in found} == {(i, j, flip) for i in range(5) for j in range(5) for flip in (1, -1)}
