import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.models.layers import Conv, Dropout, conv2d, max_pool

KEY = jax.random.key(0)
# Batch, size, channels; kernel, features; strides, padding: by windows and, from 16 channels on, by tiles; in one chunk
# and in several, of one example and of more.
CASES = {
    "3x3": ((4, 6, 5, 3), (3, 3), 4, 1, "SAME"),
    "3x3 of many examples": ((6, 33, 32, 12), (3, 3), 2, 1, "SAME"),
    "3x3 of many channels": ((4, 6, 5, 16), (3, 3), 4, 1, "SAME"),
    "3x3 of many channels, examples": ((6, 33, 32, 16), (3, 3), 2, 1, "SAME"),
    "3x3 of many channels, large examples": ((3, 65, 64, 30), (3, 3), 2, 1, "SAME"),
    "3x3 of many channels, inside": ((2, 5, 8, 17), (3, 3), 3, 1, "VALID"),
    "3x3 of many channels, unequal padding": ((2, 4, 5, 16), (3, 3), 3, 1, ((2, 0), (0, 3))),
    "3x3 of many channels, one pixel": ((3, 1, 1, 16), (3, 3), 3, 1, "SAME"),
    "3x3 of many channels, one result": ((3, 3, 3, 16), (3, 3), 3, 1, "VALID"),
    "3x3 of many channels, stride 2": ((2, 7, 8, 16), (3, 3), 4, (1, 2), "SAME"),
    "1x1 of many channels": ((2, 5, 4, 16), (1, 1), 4, 1, "SAME"),
    "3x3 of stride 2": ((2, 7, 8, 3), (3, 3), 4, 2, ((1, 1), (1, 1))),
    "1x1 of stride 2": ((2, 7, 8, 3), (1, 1), 4, (2, 2), "VALID"),
    "7x7 of stride 2": ((2, 16, 16, 3), (7, 7), 4, (2, 2), ((3, 3), (3, 3))),
    "rectangular": ((3, 8, 9, 2), (2, 5), 3, (1, 3), "VALID"),
    "unequal padding": ((3, 8, 9, 2), (3, 4), 3, (2, 1), ((2, 0), (0, 3))),
}


def xla_conv(x, kernel, strides=1, padding="SAME"):
    strides = (strides, strides) if isinstance(strides, int) else strides
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def arguments(shape, kernel_size, features, dtype=np.float64):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=s), dtype) for s in (shape, (*kernel_size, shape[-1], features)))


@pytest.mark.parametrize("case", CASES)
def test_conv_is_flax_conv(x64, case):
    shape, kernel_size, features, strides, padding = CASES[case]
    x, kernel = arguments(shape, kernel_size, features)
    variables = {"params": {"kernel": kernel, "bias": jnp.arange(features, dtype=jnp.float64)}}

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(layer, variables, x):
        y, vjp = jax.vjp(layer.apply, variables, x)
        return y, vjp(jnp.sin(y))

    ours, flax = (layer(features, kernel_size, strides=strides, padding=padding) for layer in (Conv, nn.Conv))
    chex.assert_trees_all_close(*(value_and_gradient(n, variables, x) for n in (ours, flax)), rtol=1e-10, atol=1e-10)


def test_conv_has_flax_convs_parameters():
    x = jnp.zeros((2, 6, 6, 3))
    chex.assert_trees_all_equal(*jax.jit(lambda: [layer(4, (3, 3)).init(KEY, x) for layer in (Conv, nn.Conv)])())
    assert set(jax.eval_shape(Conv(4, (3, 3), use_bias=False).init, KEY, x)["params"]) == {"kernel"}


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((4, 6, 6, 3), 1, id="windows"),
        pytest.param((4, 6, 6, 3), 2, id="windows of stride 2", marks=pytest.mark.exhaustive),
        pytest.param((4, 5, 6, 16), 1, id="tiles", marks=pytest.mark.exhaustive),
        pytest.param((4, 33, 32, 16), 1, id="chunks of tiles", marks=pytest.mark.exhaustive),
    ],
)
def test_conv2d_has_all_derivatives(x64, shape, strides):
    x, kernel = arguments(shape, (3, 3), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(conv, x, kernel):
        def loss(at):
            return jnp.sin(conv(*at, strides=strides)).sum()

        at, tangent = (x, kernel), (jnp.sin(x), jnp.cos(kernel))
        gradient = jax.grad(loss)
        reverse_over_reverse = jax.grad(lambda at: sum(map(jnp.vdot, gradient(at), tangent)))
        return jax.jvp(loss, (at,), (tangent,)), jax.jvp(gradient, (at,), (tangent,)), reverse_over_reverse(at)

    chex.assert_trees_all_close(*(derivatives(conv, x, kernel) for conv in (conv2d, xla_conv)), rtol=1e-10, atol=1e-10)
    with jax.disable_jit():  # the platform is known before the derivative is taken
        chex.assert_trees_all_close(conv2d(x, kernel), xla_conv(x, kernel), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "channels", [pytest.param(3, id="windows"), pytest.param(16, id="tiles", marks=pytest.mark.exhaustive)]
)
def test_conv2d_maps_and_scans(x64, channels):
    x, kernel = arguments((5, 6, 6, channels), (3, 3), 2)
    kernels = jnp.stack([kernel, 2 * kernel])

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(conv):
        g = jax.grad(lambda kernel, x: jnp.sin(conv(x, kernel)).sum(), (0, 1))
        examples = jax.vmap(g, (None, 0))(kernel, x[:, None])
        seeds = jax.vmap(g, (0, None))(kernels, x)
        both = jax.vmap(g)(kernels, jnp.stack([x, x + 1]))
        steps = lax.scan(lambda kernel, _: (kernel - 0.01 * g(kernel, x)[0], None), kernel, length=3)[0]
        return examples, seeds, both, steps, lax.map(lambda kernel: g(kernel, x), kernels)

    chex.assert_trees_all_close(all_of(conv2d), all_of(xla_conv), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "channels", [pytest.param(15, id="windows"), pytest.param(60, id="tiles", marks=pytest.mark.exhaustive)]
)
def test_devices_share_a_batch_without_gathering_it(channels):
    x, kernel = arguments((16, 32, 32, channels), (3, 3), 2, np.float32)
    kernel /= 10  # else the sine of large numbers magnifies rounding errors, also those of XLA's convolution

    def gradient(conv, x, kernel):
        return jax.grad(lambda x, kernel: jnp.sin(conv(x, kernel)).sum(), (0, 1))(x, kernel)

    expected = jax.device_get(jax.jit(functools.partial(gradient, xla_conv))(x, kernel))
    ours = functools.partial(gradient, conv2d)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
        split = jax.device_put(x, NamedSharding(mesh, P("batch"))), jax.device_put(kernel, NamedSharding(mesh, P()))
        with jax.set_mesh(mesh):
            compiled = jax.jit(ours).lower(*split).compile()
        assert "all-gather" not in compiled.as_text()
        got = compiled(*split)
        assert got[0].sharding.spec[0] == "batch"
        chex.assert_trees_all_close(jax.device_get(got), expected, rtol=1e-4, atol=1e-3)
    # Replication is checked; the gradient by the kernel, which all devices share, is summed over them.
    mapped = jax.shard_map(ours, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P("batch"), P()))
    chex.assert_trees_all_close(jax.device_get(jax.jit(mapped)(*split)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [2, 9, 16])
def test_tiles_are_as_precise_as_windows(x64, size):
    x, kernel = arguments((4, size, size, 64), (3, 3), 32)

    def value_and_gradients(conv, dtype):
        @jax.jit
        def of(x, kernel):
            y, vjp = jax.vjp(conv, x, kernel)
            return y, *vjp(jnp.cos(x @ kernel[0, 0]))

        # The arguments are rounded alike, so that the error is the computation's alone.
        return of(*(a.astype(jnp.float32).astype(dtype) for a in (x, kernel)))

    for got, expected in zip(*map(value_and_gradients, (conv2d, xla_conv), (jnp.float32, jnp.float64)), strict=True):
        assert got.dtype == jnp.float32
        assert jnp.sqrt(jnp.square(got - expected).mean()) < 2e-6 * expected.std()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tiles_in_other_dtypes(dtype):
    x, kernel = (5 * a for a in arguments((2, 6, 5, 16), (3, 3), 4, np.float32))
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    y, expected = conv2d(x, kernel), xla_conv(*(a.astype(jnp.float32) for a in (x, kernel)))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=jnp.finfo(dtype).eps, atol=1e-3)


def test_bfloat16_computes_with_float32_parameters():
    x, kernel = arguments((2, 6, 6, 3), (3, 3), 4, np.float32)
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(4)}}
    y, expected = (layer(4, (3, 3), dtype=jnp.bfloat16).apply(variables, x) for layer in (Conv, nn.Conv))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_a_platform_gets_its_own_program_alone():
    x, kernel = jnp.zeros((128, 32, 32, 16)), jnp.zeros((3, 3, 16, 16))
    traced = jax.jit(jax.grad(lambda x, kernel: jnp.square(conv2d(x, kernel)).sum(), (0, 1))).trace(x, kernel)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == 3
        assert "stablehlo.while" not in text
        assert "stablehlo.dot_general" not in text
    compiled = traced.lower(lowering_platforms=("cpu",)).compile()
    assert " convolution(" not in compiled.as_text()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 8 * x.nbytes  # all patches would be 9 times the input


@pytest.mark.parametrize("channels", [3, 16], ids=["windows", "tiles"])
def test_conv2d_takes_an_empty_batch(channels):
    assert conv2d(jnp.zeros((0, 6, 6, channels)), jnp.zeros((3, 3, channels, 2))).shape == (0, 6, 6, 2)


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [((2, 2), (2, 2), "VALID"), ((3, 3), (2, 2), ((1, 1), (1, 1))), ((2, 3), 1, "SAME")],
)
def test_max_pool_is_flax_max_pool(x64, window, strides, padding):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8, 3)))
    pair = (strides, strides) if isinstance(strides, int) else strides

    def value_and_gradient(pool):
        y, vjp = jax.vjp(pool, x)
        return y, vjp(jnp.sin(y))

    got = value_and_gradient(lambda x: max_pool(x, window, strides, padding))
    chex.assert_trees_all_close(got, value_and_gradient(lambda x: nn.max_pool(x, window, pair, padding)))


def test_max_pool_shares_the_gradient_of_ties():
    gradient = jax.grad(lambda x: max_pool(x, 2, 2).sum())(jnp.zeros((1, 4, 4, 1)))
    np.testing.assert_allclose(lax.reduce_window(gradient, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), 1)


def test_images_smaller_than_the_window_are_rejected():
    with pytest.raises(ValueError, match=r"at least as large as the window \(2, 2\), got shape \(1, 4, 1, 1\)"):
        max_pool(jnp.zeros((1, 4, 1, 1)), 2, 2)
    with pytest.raises(ValueError, match=r"at least as large as the window \(3, 3\)"):
        conv2d(jnp.zeros((1, 2, 4, 1)), jnp.zeros((3, 3, 1, 1)), padding="VALID")


class TwoDropouts(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, keys):
        return Dropout(self.rate)(x, keys), Dropout(self.rate)(x, keys)


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((8, 1000))
    y = Dropout(0.2).apply({}, x, jax.random.split(KEY, 8))
    kept = np.asarray(y != 0)
    np.testing.assert_allclose(y[kept], 1.25)
    assert (abs(kept.mean(1) - 0.8) < 0.05).all()
    assert len(np.unique(kept, axis=0)) == 8
    for rate, keys in ((0.2, None), (0.0, jax.random.split(KEY, 8))):
        np.testing.assert_array_equal(Dropout(rate).apply({}, x, keys), x)
    with pytest.raises(ValueError, match="rate must be at least 0 and less than 1"):
        Dropout(1.0)


def test_dropout_depends_on_the_examples_key_and_the_layer_alone():
    x, keys = jnp.ones((8, 5, 6)), jax.random.split(KEY, 8)
    apply = jax.jit(functools.partial(TwoDropouts(0.5).apply, {}))
    first, second = apply(x, keys)
    assert (first != second).any()
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    chex.assert_trees_all_equal(apply(x, keys[order])[0], first[order])
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))
    chex.assert_trees_all_equal(jax.device_get(mapped(x, keys)), jax.device_get((first, second)))
