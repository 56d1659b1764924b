"""A linear layer and its batch norm as one: the pair in everything but rounding, and folded where it says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx as flax_nnx
from jax.sharding import AxisType

from bnjax import linen, models, nnx, training
from bnjax._product import Product, product_moments
from bnjax.inference import reestimate_batch_stats
from bnjax.models import layers

P = jax.P
RNG = np.random.default_rng(0)
MASKS = {
    "none": None,
    "examples": np.arange(8) % 3 > 0,
    "positions": RNG.random((8, 3, 4)) < 0.6,
    "weights": RNG.random((8, 3, 4)),
    "nothing": np.zeros(8, bool),
}


class Pair(nn.Module):
    """A pair in a module of its own, with the names that Flax gives."""

    fold: bool | str
    dense: bool = False
    conv: type = nn.Conv
    axis_name: str | None = None
    axis_index_groups: tuple | None = None
    dtype: object = None
    features: int = 16
    bias: bool = True

    @nn.compact
    def __call__(self, x, *, training=True, mask=None):
        options = {"use_bias": self.bias, "param_dtype": x.dtype, "dtype": self.dtype}
        norm = linen.BatchNorm(
            use_running_average=not training,
            momentum=0.9,
            param_dtype=x.dtype,
            dtype=self.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            bias_init=nn.initializers.normal(),
        )
        if self.dense:
            return linen.DenseBatchNorm(nn.Dense(self.features, **options), norm, fold=self.fold)(x, mask=mask)
        conv = self.conv(self.features, (1, 1), strides=2, bias_init=nn.initializers.normal(), **options)
        return linen.ConvBatchNorm(conv, norm, fold=self.fold)(x, mask=mask)


def images(dtype=np.float64):
    return jnp.asarray(RNG.standard_normal((8, 5, 7, 4)) + np.arange(4) * 2, dtype)


def weighed(y):
    """A sum in which features count differently, with second derivatives."""
    return (jnp.sin(y).sum(range(y.ndim - 1)) * (1 + jnp.arange(y.shape[-1]) % 3)).sum()


def both(model, x, mask=None, **options):
    """Output, running statistics and all derivatives of a model that folds and of one that does not."""
    variables = model.init(jax.random.key(0), x)

    def outcome(fold):
        def loss(params, x, mask):
            y, updates = model.clone(fold=fold).apply(
                {**variables, "params": params}, x, mask=mask, mutable=["batch_stats"], **options
            )
            counted = y if mask is None else y * (mask > 0).reshape(mask.shape + (1,) * (y.ndim - mask.ndim))
            return weighed(counted), (counted, updates)

        is_real = mask is not None and jnp.issubdtype(mask.dtype, jnp.floating)
        of = (0, 1, 2) if is_real else (0, 1)
        derived = jax.jit(jax.value_and_grad(loss, of, has_aux=True))(variables["params"], x, mask)
        gradient = jax.grad(lambda *a: loss(*a)[0], (0, 1))
        tangents = jax.tree.map(jnp.cos, (variables["params"], x))
        product = jax.jit(lambda p, x: jax.jvp(lambda p, x: gradient(p, x, mask), (p, x), tangents)[1])
        return derived, product(variables["params"], x)

    return outcome(True), outcome(False)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("mask", MASKS)
def test_a_folded_convolution_is_the_pair(x64, mask):
    """Outputs, statistics, gradients by parameters, inputs and weights, and products of the Hessian."""
    mask = None if MASKS[mask] is None else jnp.asarray(MASKS[mask])
    folded, plain = both(Pair(True), images(), mask)
    chex.assert_trees_all_close(folded, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", ["none", "weights"])
def test_a_folded_dense_layer_is_the_pair(x64, mask):
    mask = None if MASKS[mask] is None else jnp.asarray(MASKS[mask])
    folded, plain = both(Pair(True, dense=True), images()[:, :3, :4], mask)
    chex.assert_trees_all_close(folded, plain, rtol=1e-9, atol=1e-9)


def test_the_models_own_convolution_is_folded_too(x64):
    folded, plain = both(Pair(True, conv=layers.Conv), images())
    chex.assert_trees_all_close(folded, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", ["none", "examples"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_a_folded_pair_of_nnx_is_the_pair(x64, kind, mask):
    x, mask = images(), None if MASKS[mask] is None else jnp.asarray(MASKS[mask])

    def outcome(fold):
        rngs = flax_nnx.Rngs(0)
        norm = nnx.BatchNorm(16, momentum=0.9, param_dtype=jnp.float64, rngs=rngs)
        if kind == "conv":
            conv = flax_nnx.Conv(4, 16, (1, 1), strides=(2, 2), param_dtype=jnp.float64, rngs=rngs)
            model = nnx.ConvBatchNorm(conv, norm, fold=fold)
        else:
            model = nnx.DenseBatchNorm(flax_nnx.Linear(4, 16, param_dtype=jnp.float64, rngs=rngs), norm, fold=fold)

        def loss(model):
            y = model(x, mask=mask)
            return weighed(y if mask is None else y * mask[:, None, None, None])

        value, gradients = flax_nnx.value_and_grad(loss)(model)
        return value, flax_nnx.to_pure_dict(gradients), flax_nnx.to_pure_dict(flax_nnx.state(model))

    chex.assert_trees_all_close(outcome(True), outcome(False), rtol=1e-9, atol=1e-9)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("way", ["shard_map", "shard_map, unchecked", "vmap", "pmap", "jit", "groups"])
@pytest.mark.parametrize("mask", ["none", "weights"])
def test_a_folded_pair_synchronizes_as_the_pair_does(x64, way, mask):
    """The whole batch in one place without a mapped axis is what all agree with, but for groups."""
    x = jnp.asarray(RNG.standard_normal((16, 3, 2, 4)) + np.arange(4))
    mask = None if MASKS[mask] is None else jnp.asarray(RNG.random((16, 2, 1)))
    sync = {"jit": None}.get(way, "batch")
    groups = ((0, 1), (2, 3)) if way == "groups" else None
    model = Pair(True, axis_name=sync, axis_index_groups=groups, bias=False)
    variables = Pair(True, bias=False).init(jax.random.key(0), x)

    def step(model, params, x, mask):
        def loss(params, x):
            y, updates = model.apply({**variables, "params": params}, x, mask=mask, mutable=["batch_stats"])
            return weighed(y), updates

        (value, updates), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return gradients[1], (value, gradients[0], updates)

    def mapped(fold):
        f = functools.partial(step, model.clone(fold=fold))
        split = lambda v: None if v is None else v.reshape((4, -1, *v.shape[1:]))
        if way == "jit":
            mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
            with jax.set_mesh(mesh):
                return jax.jit(f)(variables["params"], jax.device_put(x, jax.NamedSharding(mesh, P("batch"))), mask)
        if way.startswith("shard_map"):
            mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

            def of_device(params, x, mask):
                gradient, (value, of_params, updates) = f(params, x, mask)
                checked = way == "shard_map"
                of_params = of_params if checked else jax.lax.psum(of_params, "batch")
                return gradient, (jax.lax.psum(value, "batch"), of_params, updates)

            body = jax.shard_map(
                of_device, mesh=mesh, in_specs=(P(), P("batch"), None if mask is None else P("batch")),
                out_specs=(P("batch"), P()), check_vma=way == "shard_map",
            )  # fmt: skip
            return jax.jit(body)(variables["params"], x, mask)
        mapping = jax.pmap if way == "pmap" else jax.vmap
        in_axes = (None, 0, None if mask is None else 0)
        gradient, (value, of_params, updates) = mapping(f, axis_name="batch", in_axes=in_axes)(
            variables["params"], split(x), split(mask)
        )
        of_params = jax.tree.map(lambda v: v.sum(0), of_params)
        updates = updates if groups else jax.tree.map(lambda v: v[0], updates)
        return gradient.reshape(x.shape), (value.sum(), of_params, updates)

    folded = jax.device_get(mapped(True))
    chex.assert_trees_all_close(folded, jax.device_get(mapped(False)), rtol=1e-9, atol=1e-9)
    if not groups:
        whole = step(Pair(False, bias=False), variables["params"], x, mask)
        chex.assert_trees_all_close(folded, jax.device_get(whole), rtol=1e-9, atol=1e-9)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("parallel", "steps"), [("jit", 1), ("shard_map", 2)])
def test_a_residual_network_trains_the_same_folded(x64, parallel, steps):
    """In micro-batches too, whose moments move the running statistics once."""
    mesh = training.make_mesh(devices=jax.devices()[:2])
    x, y = jnp.asarray(RNG.standard_normal((16, 8, 8, 3))), jnp.arange(16) % 5
    norm = functools.partial(linen.BatchNorm, axis_name=training.SYNC_AXIS, param_dtype=jnp.float64)

    def trained(fold):
        model = models.ResNet(5, norm, (1,), True, stem="cifar", width=4, fold=fold)
        state = training.create_train_state(model, optax.sgd(0.05), jax.random.key(0), x)
        step = training.make_train_step(training.cross_entropy, mesh, parallel=parallel, accumulate_steps=steps)
        state, metrics = step(training.place_state(state, mesh), *training.shard_batch((x, y), mesh))
        return jax.device_get((state.params, state.batch_stats, metrics))

    chex.assert_trees_all_close(trained("auto"), trained(False), rtol=1e-6, atol=1e-7)  # the kernels are float32


# --- what is folded ---------------------------------------------------------------------------------------------------


def is_folded(module, x, **options):
    """Whether the layer's own output is left out, as the traced program shows."""
    options |= {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}

    def traced(x):
        return module.apply(module.init(jax.random.key(0), x), x, **options)[1]

    state = jax.eval_shape(traced, x)
    return "conv" not in state["intermediates"] and "dense" not in state["intermediates"]


def conv_norm(conv, norm=None, **options):
    return linen.ConvBatchNorm(conv, norm or linen.BatchNorm(use_running_average=False), **options)


@pytest.mark.parametrize(
    ("features", "size", "fold", "found"),
    [
        (16, (1, 1), "auto", True),
        (4, (1, 1), "auto", False),
        (2, (1, 1), "auto", False),
        (2, (1, 1), True, True),
        (16, (1, 1), False, False),
        (16, (3, 3), "auto", False),
        (16, (1, 3), "auto", False),
    ],
)
def test_it_folds_where_that_pays(features, size, fold, found):
    assert is_folded(conv_norm(nn.Conv(features, size), fold=fold), images(jnp.float32)) is found


def test_it_folds_dense_layers_with_more_outputs_than_inputs_and_rows_enough():
    for features, rows, found in ((8, 16, True), (4, 16, False), (8, 15, False)):
        model = linen.DenseBatchNorm(nn.Dense(features), linen.BatchNorm(use_running_average=False))
        assert is_folded(model, jnp.ones((rows, 4))) is found
        assert is_folded(model.clone(fold=True), jnp.ones((rows, 4)))


class OwnConv(nn.Conv):
    def __call__(self, x):
        return super().__call__(x) + 1


class OwnNorm(linen.BatchNorm):
    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


UNFOLDED = {
    "a kernel of 3×3": (nn.Conv(16, (3, 3)), None),
    "adds zeros": (nn.Conv(16, (1, 1), padding=((1, 0), (0, 0))), None),
    "feature_group_count is 2": (nn.Conv(16, (1, 1), feature_group_count=2), None),
    "mask is": (nn.Conv(16, (1, 1), mask=jnp.ones((1, 1, 4, 16))), None),
    "precision is 'highest'": (nn.Conv(16, (1, 1), precision="highest"), None),
    "input_dilation is not 1": (nn.Conv(16, (1, 1), input_dilation=2, padding=((0, 0), (0, 0))), None),
    "OwnConv has a call of its own": (OwnConv(16, (1, 1)), None),
    "OwnNorm is not bnjax's BatchNorm": (nn.Conv(16, (1, 1)), OwnNorm(use_running_average=False)),
    "LpBatchNorm is not bnjax's": (nn.Conv(16, (1, 1)), linen.LpBatchNorm(p=1, use_running_average=False)),
    "axis=1 is not the last": (nn.Conv(16, (1, 1)), linen.BatchNorm(axis=1, use_running_average=False)),
}


@pytest.mark.parametrize("reason", UNFOLDED)
def test_what_cannot_be_folded_says_why(reason):
    conv, norm = UNFOLDED[reason]
    x = images(jnp.float32)
    assert not is_folded(conv_norm(conv, norm), x)
    with pytest.raises(ValueError, match=f"fold must be 'auto' or False here, got True, but .*{reason}"):
        is_folded(conv_norm(conv, norm, fold=True), x)


def test_a_mask_of_each_feature_is_not_folded():
    x, mask = images(jnp.float32), jnp.ones((8, 1, 1, 16), bool)
    assert not is_folded(conv_norm(nn.Conv(16, (1, 1))), x, mask=mask)
    assert is_folded(conv_norm(nn.Conv(16, (1, 1))), x, mask=mask[..., :1])


def test_an_option_that_is_none():
    rngs = flax_nnx.Rngs(0)
    pair = flax_nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    for make in (lambda: conv_norm(nn.Conv(4, (1, 1)), fold="always"), lambda: nnx.DenseBatchNorm(*pair, fold="never")):
        with pytest.raises(ValueError, match="fold must be 'auto', True or False, got"):
            make()


def test_inference_is_the_pairs_own():
    x = images(jnp.float32)
    model = Pair(True)
    variables = model.init(jax.random.key(0), x)
    plain = Pair(False).apply(variables, x, training=False)
    np.testing.assert_array_equal(model.apply(variables, x, training=False), plain)


def test_variables_are_the_pairs_and_keep_its_names():
    variables = Pair("auto").init(jax.random.key(0), images(jnp.float32))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "Conv_0": {"kernel": (1, 1, 4, 16), "bias": (16,)},
        "BatchNorm_0": {"scale": (16,), "bias": (16,)},
    }
    model = nnx.ConvBatchNorm(
        flax_nnx.Conv(4, 16, (1, 1), rngs=flax_nnx.Rngs(0)), nnx.BatchNorm(16, rngs=flax_nnx.Rngs(0))
    )
    assert set(flax_nnx.to_pure_dict(flax_nnx.state(model))) == {"conv", "norm"}


def test_what_looks_at_a_models_batch_norms_sees_the_pair():
    """Re-estimated statistics are those of unfolded layers, and folding for inference finds each pair."""
    x = images(jnp.float32)
    folded, plain = (Pair(fold, bias=False) for fold in (True, False))
    variables = folded.init(jax.random.key(0), x)
    found, expected = (reestimate_batch_stats(m.apply, variables, [x, x + 1], training=True) for m in (folded, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


# --- precision --------------------------------------------------------------------------------------------------------


def exact(a, kernel):
    y = np.asarray(a, np.float64).reshape(-1, a.shape[-1]) @ np.asarray(kernel, np.float64)
    return y.mean(0), y.var(0)


INPUTS = {
    "normal": lambda x: x,
    "rectified": lambda x: np.maximum(x, 0),
    "correlated": lambda x: np.maximum(x @ RNG.standard_normal((32, 32)) / 6 + RNG.standard_normal((len(x), 1)), 0),
    "mean 3": lambda x: x + 3,
    "mean 10": lambda x: x + 10,
    "mean 100": lambda x: x + 100,
    "mean 1000": lambda x: x + 1000,
}


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-6), ("bfloat16", 3e-5), ("float16", 3e-5)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_variance_of_a_product(inputs, dtype, bound):
    """It loses no more than the inputs' own moments do, whatever their mean: unshifted it would lose everything."""
    a = jnp.asarray(INPUTS[inputs](RNG.standard_normal((20_000, 32))), dtype)
    kernel = jnp.asarray(RNG.standard_normal((32, 64)) / 6, jnp.float32)
    m, mean_of_inputs = jax.jit(lambda a, k: product_moments(Product(a, k), None, None, None))(a, kernel)
    mean, var = exact(a, kernel)
    np.testing.assert_allclose(m.var, var, rtol=bound)
    terms = np.abs(np.asarray(a, np.float64).mean(0)) @ np.abs(np.asarray(kernel, np.float64))
    assert (np.abs(m.mean - mean) < 2e-6 * (terms + np.sqrt(var))).all()
    np.testing.assert_allclose(mean_of_inputs, np.asarray(a, np.float64).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("small", [1e-1, 1e-2, 1e-3])
def test_the_worst_kernel_lies_along_a_direction_of_small_variance(small):
    """The error is 2^-23 of the largest direction's variance, in the worst of a thousand rotations about twice that."""
    c = 16
    a = RNG.standard_normal((30_000, c)) * np.append(np.ones(c - 1), small)
    rotation = np.linalg.qr(RNG.standard_normal((c, c)))[0]
    a = jnp.asarray(a @ rotation.T, jnp.float32)
    kernel = jnp.asarray(rotation[:, -1:] + 1e-3 * small * RNG.standard_normal((c, 1000)), jnp.float32)
    m, _ = product_moments(Product(a, kernel), None, None, None)
    _, var = exact(a, kernel)
    error = np.abs(m.var / var - 1).max()
    assert error < 2.0**-21 / small**2
    assert small > 1e-2 or error > 2.0**-28 / small**2  # the bound is of the right size


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_outputs_in_bfloat16_are_no_worse_than_the_pairs(scale):
    """Against float64, on inputs as a rectified batch norm gives them, or far from zero."""
    x = jnp.asarray(np.maximum(RNG.standard_normal((16, 15, 14, 8)), 0) + (scale > 1) * scale, jnp.bfloat16)
    variables = Pair(True).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))

    def outputs(fold):
        model = Pair(fold, dtype=jnp.bfloat16)
        return model.apply(variables, x.astype(jnp.float32), mutable=["batch_stats"])[0]

    with jax.enable_x64():
        wide = jax.tree.map(lambda v: v.astype(jnp.float64), variables)
        expected = np.asarray(Pair(False).apply(wide, x.astype(jnp.float64), mutable=["batch_stats"])[0])
    folded, plain = (np.abs(np.asarray(outputs(fold), np.float64) - expected).mean() for fold in (True, False))
    assert folded < 1.1 * plain
