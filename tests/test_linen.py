import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import bnjax.linen
import bnjax.nnx
import bnjax.variants
from bnjax.linen import BatchNorm

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
CONFIGURATIONS = {
    "default": {},
    "bfloat16 result": {"dtype": jnp.bfloat16},
    "neither scale nor bias": {"use_scale": False, "use_bias": False},
    "leading axis": {"axis": 0},
    "two axes": {"axis": (1, -1)},
    "other constants": {"momentum": 0.5, "epsilon": 1e-2, "use_fast_variance": False},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
    "low-precision reductions": {"param_dtype": jnp.bfloat16, "force_float32_reductions": False},
    "initializers": {"scale_init": nn.initializers.uniform(), "bias_init": nn.initializers.normal()},
}


def assert_close(got, expected, tolerance):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    wide = lambda v: np.asarray(v, np.complex64 if jnp.iscomplexobj(v) else np.float32)
    as_float32 = functools.partial(jax.tree.map, wide)
    chex.assert_trees_all_close(as_float32(got), as_float32(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_same_variables_and_results_as_flax(configuration, x_dtype, masked):
    kwargs = CONFIGURATIONS[configuration]
    x = (jax.random.normal(KEY, (16, 5, 6)) * 3 + 1).astype(x_dtype)
    mask = jnp.arange(16)[:, None, None] % 3 > 0 if masked else None
    if masked and 0 in np.atleast_1d(kwargs.get("axis", -1)):
        mask = jnp.arange(5)[None, :, None] > 0
    theirs, ours = nn.BatchNorm(**kwargs), BatchNorm(**kwargs)
    variables = ours.init(KEY, x, use_running_average=False)
    chex.assert_trees_all_equal(variables, theirs.init(KEY, x, use_running_average=False))
    coarse = jnp.bfloat16 in (x_dtype, kwargs.get("dtype")) or "force_float32_reductions" in kwargs
    for use_running_average in (False, True):
        call = {"use_running_average": use_running_average, "mask": mask, "mutable": ["batch_stats"]}
        got, expected = ours.apply(variables, x, **call), theirs.apply(variables, x, **call)
        if "force_float32_reductions" in kwargs:  # where Flax's statistics take the dtype of x, ours keep theirs
            chex.assert_trees_all_equal_shapes_and_dtypes(got[1]["batch_stats"], variables["batch_stats"])
            expected = (expected[0], jax.tree.map(lambda v: v.astype(jnp.bfloat16), expected[1]))
        assert_close(got, expected, 2e-2 if coarse else 2e-5)


def test_same_gradients_as_flax():
    x = jax.random.normal(KEY, (16, 4))
    variables = BatchNorm(use_running_average=False).init(KEY, x)

    def loss(layer, params, x):
        y, updates = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)) + jnp.sum(updates["batch_stats"]["var"])

    ours, theirs = (
        jax.grad(loss, (1, 2))(layer(use_running_average=False), variables["params"], x)
        for layer in (BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Network(nn.Module):
    norm: type[nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x, *, training):
        x = nn.relu(self.norm(use_running_average=not training)(nn.Dense(8)(x)))
        return nn.Dense(2)(self.norm(use_running_average=not training, momentum=0.9)(x))


def test_replaces_flax_in_a_model_and_its_checkpoint():
    x = jax.random.normal(KEY, (32, 3))
    variables = Network(nn.BatchNorm).init(KEY, x, training=False)
    chex.assert_trees_all_equal(variables, Network(BatchNorm).init(KEY, x, training=False))
    for _ in range(3):
        outputs = [
            Network(norm).apply(variables, x, training=True, mutable=["batch_stats"])
            for norm in (nn.BatchNorm, BatchNorm)
        ]
        chex.assert_trees_all_close(*outputs, rtol=1e-4, atol=1e-5)
        variables = {**variables, **outputs[0][1]}


def test_initialization_needs_no_bound_axis():
    layer = BatchNorm(use_running_average=False, axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    x = jax.random.normal(KEY, (4, 6, 3))
    variables = layer.init(KEY, x[0])
    chex.assert_trees_all_equal(variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)})
    for mapping in (jax.vmap, jax.pmap):
        y, updates = mapping(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="batch")(x)
        whole = BatchNorm(use_running_average=False)
        for pair in (slice(0, 2), slice(2, 4)):
            expected, updated = whole.apply(variables, x[pair].reshape((12, 3)), mutable=["batch_stats"])
            chex.assert_trees_all_close(y[pair].reshape((12, 3)), expected, rtol=1e-4, atol=1e-5)
            chex.assert_trees_all_close(jax.tree.map(lambda v: v[pair][0], updates), updated, rtol=1e-5)


def test_flax_vmap_keeps_separate_statistics():
    x = jax.random.normal(KEY, (5, 8, 3))
    axes = {"params": 0, "batch_stats": 0}
    many = nn.vmap(BatchNorm, variable_axes=axes, split_rngs={"params": True}, in_axes=0)(use_running_average=False)
    variables = many.init(KEY, x)
    y, updates = many.apply(variables, x, mutable=["batch_stats"])
    for i in range(5):
        one = jax.tree.map(lambda v: v[i], variables)
        expected = BatchNorm(use_running_average=False).apply(one, x[i], mutable=["batch_stats"])
        chex.assert_trees_all_close((y[i], jax.tree.map(lambda v: v[i], updates)), expected, rtol=1e-5, atol=1e-6)


def test_flax_scan_moves_shared_statistics_at_every_step():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, BatchNorm(use_running_average=False, momentum=0.5)(x)

    scanned = nn.scan(Cell, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False})()
    x = jax.random.normal(KEY, (3, 8, 2))
    variables = Cell().init(KEY, (), x[0])
    (_, y), updates = scanned.apply(variables, (), x, mutable=["batch_stats"])
    expected = variables["batch_stats"]["BatchNorm_0"]
    for step in x:
        expected = {
            "mean": 0.5 * expected["mean"] + 0.5 * step.mean(0),
            "var": 0.5 * expected["var"] + 0.5 * step.var(0),
        }
    chex.assert_trees_all_close(updates["batch_stats"]["BatchNorm_0"], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(y.mean(1), jnp.zeros((3, 2)), atol=1e-5)


def test_flax_remat_has_the_same_gradient():
    x = jax.random.normal(KEY, (8, 3))
    variables = BatchNorm(use_running_average=False).init(KEY, x)

    def loss(layer):
        return lambda x: jnp.sum(jnp.sin(layer.apply(variables, x, mutable=["batch_stats"])[0]))

    layers = (BatchNorm(use_running_average=False), nn.remat(BatchNorm)(use_running_average=False))
    chex.assert_trees_all_close(*(jax.grad(loss(layer))(x) for layer in layers), rtol=1e-5, atol=1e-6)


def test_eval_shape_and_partitioning_metadata():
    layer = BatchNorm(use_running_average=True, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    shapes = jax.eval_shape(layer.init, KEY, jnp.zeros((2, 3)))
    assert nn.get_partition_spec(shapes)["params"]["scale"] == PartitionSpec("model")
    variables = layer.init(KEY, jnp.zeros((2, 3)))
    assert layer.apply(variables, jnp.ones((2, 3))).shape == (2, 3)


def test_masks_as_flax_reads_them():
    x = jax.random.normal(KEY, (6, 4, 3))
    columns = np.array([[1], [0], [1], [1]])  # integers, and without the leading axis
    layer = BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    flax = nn.BatchNorm(use_running_average=False)
    expected = flax.apply(variables, x, mask=columns.astype(bool), mutable=["batch_stats"])
    chex.assert_trees_all_close(
        layer.apply(variables, x, mask=columns, mutable=["batch_stats"]), expected, rtol=1e-4, atol=1e-5
    )
    steps = np.array([[True, True, False, False]] * 6)  # not broadcastable to x from the right: one entry for each step
    y = layer.apply(variables, x, mask=steps, mutable=["batch_stats"])
    chex.assert_trees_all_close(y, layer.apply(variables, x, mask=steps[..., None], mutable=["batch_stats"]))


def test_robust_where_flax_is_not():
    x = np.random.default_rng(0).standard_normal((4096, 1)).astype(np.float32) + np.float32(1e4)
    variables = BatchNorm().init(KEY, x, use_running_average=False)
    y, _ = BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y.std(), 1, rtol=1e-3)
    y, _ = nn.BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    assert y.std() > 100


def test_missing_use_running_average_is_an_error():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().init(KEY, jnp.ones((2, 3)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.exhaustive
def test_complex_input_as_in_flax(masked):
    x = jax.random.normal(KEY, (16, 4, 3), jnp.complex64) * 2 + (3 - 1j)
    mask = (jnp.arange(16) % 3 > 0)[:, None, None] if masked else None
    theirs, ours = (layer(use_running_average=False, momentum=0.9) for layer in (nn.BatchNorm, BatchNorm))
    variables = {layer: layer.init(KEY, x) for layer in (theirs, ours)}
    assert variables[ours]["batch_stats"]["mean"].dtype == jnp.complex64
    started = variables[theirs]  # with a real mean, as Flax begins
    for variables_of in (variables, dict.fromkeys(variables, started)):
        (expected, moved), (y, new) = (
            layer.apply(variables_of[layer], x, mask=mask, mutable=["batch_stats"]) for layer in (theirs, ours)
        )
        assert_close((y, new), (expected, moved), 1e-5)
    loss = lambda layer: jax.grad(lambda x: jnp.abs(layer.apply(started, x, mutable=["batch_stats"])[0][:2]).sum())
    assert_close(loss(ours)(x), loss(theirs)(x), 1e-4)
    layer = bnjax.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))  # Flax's own keeps the real part of the mean
    assert_close(layer(x, mask=mask), y, 1e-6)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, new["batch_stats"], 1e-6)


# --- signatures -------------------------------------------------------------------------------------------------------


def signatures():
    """Those of all public functions, and of the constructors and calls of all layers."""
    for module in (bnjax, bnjax.variants):
        for name in module.__all__:
            if inspect.isfunction(function := getattr(module, name)):
                yield name, inspect.signature(function)
    for module in (bnjax.linen, bnjax.nnx):
        for name, layer in vars(module).items():
            if inspect.isclass(layer) and layer.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{module.__name__}.{name}", inspect.signature(layer.__init__)  # not that of nnx's metaclass
                yield f"{module.__name__}.{name}()", inspect.signature(layer.__call__)


# Batch norm's are Flax's; batch renorm's those at the end of its paper's schedule, the noise's those of its paper.
DEFAULTS = {"axis": -1, "momentum": 0.99, "epsilon": 1e-5, "bessel_correction": False, "r_max": 3.0, "d_max": 5.0}
DEFAULTS |= {"unit_shift": 0.5, "unit_scale": 1.25, "sample_shift": 0.1, "sample_scale": 0.1}
DEFAULTS |= {"use_scale": True, "use_bias": True, "warmup_steps": None}


def test_every_argument_can_be_named_and_options_must_be():
    found = dict(signatures())
    assert len(found) > 30
    for name, signature in found.items():
        has_flax_order = name.startswith("bnjax.linen.") and not name.endswith("()")
        for parameter in signature.parameters.values():
            assert parameter.kind is not parameter.POSITIONAL_ONLY, (name, parameter)
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "use_running_average":
                assert has_flax_order or parameter.default is parameter.empty, (name, parameter)


def test_an_argument_has_one_default_everywhere():
    defaults = [
        (name, parameter.name, parameter.default)
        for name, signature in signatures()
        for parameter in signature.parameters.values()
        if parameter.name in DEFAULTS and parameter.default is not parameter.empty
    ]
    assert {argument for _, argument, _ in defaults} == set(DEFAULTS)
    limits = {"bnjax.linen.BatchRenorm": ("r_max", "d_max")}  # None, for those that a checkpoint may hold
    for name, argument, default in defaults:
        expected = None if argument in limits.get(name, ()) else DEFAULTS[argument]
        assert default == expected, (name, argument)
    for argument, default in bnjax.linen._LIMITS.items():
        assert default == DEFAULTS[argument]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 5}])
def test_interceptors_see_one_call_of_a_layer(options):
    """As of Flax's layer: what a layer does within its call is not their concern."""
    seen = []

    def note(next_function, arguments, keywords, context):
        seen.append(context.method_name)
        return next_function(*arguments, **keywords)

    layer, x = bnjax.linen.BatchRenorm(use_running_average=False, **options), jnp.ones((4, 3))
    variables = layer.init(jax.random.key(0), x)
    with nn.intercept_methods(note):
        layer.apply(variables, x, mutable=["batch_stats"])
    assert seen == ["__call__"]


def test_complex_inputs_have_complex_running_means():
    x = jax.random.normal(jax.random.key(0), (6, 2)) + 1j * jax.random.normal(jax.random.key(1), (6, 2))
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(2), x)
    assert variables["batch_stats"]["mean"].dtype == jnp.complex64
    stats = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-5)
    real = layer.init(jax.random.key(2), jnp.ones((6, 2), jnp.bfloat16))["batch_stats"]
    assert real["mean"].dtype == real["var"].dtype == stats["var"].dtype == jnp.float32
