import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from versions import SHARDING, needs_flax_0_12

import bnjax.linen
from bnjax.nnx import BatchNorm

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
CONFIGURATIONS = {
    "default": {},
    "bfloat16 result": {"dtype": jnp.bfloat16},
    "neither scale nor bias": {"use_scale": False, "use_bias": False},
    "other constants": {"momentum": 0.5, "epsilon": 1e-2, "use_fast_variance": False},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "middle axis": {"axis": 1},
    "own promotion": {"promote_dtype": lambda values, *, dtype: nnx.nn.dtypes.promote_dtype(values, dtype=dtype)},
}


def pure(module):
    return nnx.to_pure_dict(nnx.state(module))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize(
    "configuration", [pytest.param(c, marks=needs_flax_0_12 if c == "own promotion" else ()) for c in CONFIGURATIONS]
)
def test_same_variables_and_results_as_flax(configuration, x_dtype, masked):
    kwargs = CONFIGURATIONS[configuration]
    x = (jax.random.normal(KEY, (16, 6, 6)) * 3 + 1).astype(x_dtype)
    mask = jnp.arange(16)[:, None, None] % 3 > 0 if masked else None
    theirs, ours = (layer(6, rngs=nnx.Rngs(0), **kwargs) for layer in (nnx.BatchNorm, BatchNorm))
    chex.assert_trees_all_equal(pure(ours), pure(theirs))
    tolerance = 3e-2 if jnp.bfloat16 in (x_dtype, *kwargs.values()) else 2e-5
    for use_running_average in (False, True, False):
        y, expected = (layer(x, use_running_average, mask=mask) for layer in (ours, theirs))
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(np.float32(y), np.float32(expected), rtol=tolerance, atol=2 * tolerance)
    chex.assert_trees_all_close(pure(ours), pure(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kwargs", [{}, {"dtype": jnp.bfloat16}, {"momentum": 0.7, "epsilon": 1e-3}])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_bit_identical_to_the_linen_layer(x_dtype, kwargs):
    x = (jax.random.normal(KEY, (33, 6)) * 3 + 1).astype(x_dtype)
    linen = bnjax.linen.BatchNorm(use_running_average=False, **kwargs)
    variables = linen.init(KEY, x)
    layer = BatchNorm(6, rngs=nnx.Rngs(0), **kwargs)
    for _ in range(2):
        y, updates = linen.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updates}
        np.testing.assert_array_equal(y, layer(x))
        np.testing.assert_array_equal(variables["batch_stats"]["var"], layer.var[...])
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], layer.mean[...])


@needs_flax_0_12
def test_own_promotion_does_not_round_the_running_statistics():
    kwargs = {"dtype": jnp.bfloat16, "promote_dtype": functools.partial(nnx.nn.dtypes.promote_dtype)}
    theirs, ours = (layer(2, rngs=nnx.Rngs(0), **kwargs) for layer in (nnx.BatchNorm, BatchNorm))
    x = jax.random.normal(KEY, (64, 2)) * 3 + 5
    for _ in range(200):
        ours(x)
        theirs(x)
    chex.assert_trees_all_close(pure(ours), pure(theirs), rtol=1e-4)


class Network(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.norm = norm(8, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def test_replaces_flax_in_a_model_under_jit_and_grad():
    x = jax.random.normal(KEY, (16, 3))
    networks = [Network(norm, nnx.Rngs(0)) for norm in (nnx.BatchNorm, BatchNorm)]
    gradient = nnx.jit(nnx.grad(lambda network, x: jnp.sum(network(x) ** 2)))
    for _ in range(2):
        grads = [nnx.to_pure_dict(gradient(network, x)) for network in networks]
        chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(*(pure(network) for network in networks), rtol=1e-5, atol=1e-6)
    for network in networks:
        network.eval()
    before = jax.tree.map(np.asarray, pure(networks[1]))
    chex.assert_trees_all_close(networks[1](x), networks[0](x), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(pure(networks[1]), before)


def test_split_and_merge():
    network = Network(BatchNorm, nnx.Rngs(0))
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, stats, x):
        merged = nnx.merge(graphdef, params, stats)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    x = jax.random.normal(KEY, (16, 3))
    y, new = step(params, stats, x)
    chex.assert_trees_all_close(y, network(x), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(nnx.to_pure_dict(new), nnx.to_pure_dict(nnx.state(network, nnx.BatchStat)), rtol=1e-5)


def test_vmap_of_layers():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return BatchNorm(3, rngs=rngs)

    layers = create(nnx.Rngs(0))
    x = jax.random.normal(KEY, (4, 8, 3))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))(layers, x)
    chex.assert_trees_all_close(y.mean(1), jnp.zeros((4, 3)), atol=1e-5)
    chex.assert_trees_all_close(layers.mean[...], 0.01 * x.mean(1), rtol=1e-4, atol=1e-6)


def test_eval_shape():
    shapes = nnx.eval_shape(lambda: BatchNorm(3, rngs=nnx.Rngs(0)))
    assert shapes.scale.shape == (3,)


@needs_flax_0_12
def test_metadata():
    metadata = {"scale_metadata": {SHARDING: ("model",)}}
    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))):
        theirs, ours = (layer(3, rngs=nnx.Rngs(0), **metadata) for layer in (nnx.BatchNorm, BatchNorm))
    assert ours.scale.get_metadata() == theirs.scale.get_metadata()
    assert nnx.get_partition_spec(nnx.state(ours))["scale"].get_value() == PartitionSpec("model")


def test_synchronization():
    layer = BatchNorm(3, axis_name="batch", rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (4, 6, 3))
    graphdef, state = nnx.split(layer)
    y = jax.pmap(lambda state, x: nnx.merge(graphdef, state)(x), in_axes=(None, 0), axis_name="batch")(state, x)
    expected = bnjax.batch_norm(x.reshape((24, 3)), *bnjax.init_batch_norm(3), training=True)[0]
    chex.assert_trees_all_close(y.reshape((24, 3)), expected, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"params\['scale'\].*\(4,\).*got \(3,\)"):
        BatchNorm(3, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))


def test_both_layers_are_flax_layers():
    assert issubclass(BatchNorm, nnx.BatchNorm)
    assert issubclass(bnjax.linen.BatchNorm, nn.BatchNorm)


def test_the_dtype_of_the_statistics_is_that_of_their_own_but_for_complex_inputs(x64):
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    layer(jnp.ones((4, 3), jnp.float64))
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32
    layer.eval()
    layer(jnp.ones((4, 3), jnp.complex64))
    assert layer.mean[...].dtype == jnp.complex64 and layer.var[...].dtype == jnp.float32
