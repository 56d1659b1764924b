import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.models import (
    VGG,
    CifarNetwork,
    Perceptron,
    RecurrentNetwork,
    ResNet,
    of_example,
    resnet18,
    resnet50,
)
from bnjax.training import SYNC_AXIS, make_mesh

KEY = jax.random.key(0)
NORM = functools.partial(BatchNorm, momentum=0.9)
# Small networks by name, with the size of their images.
SMALL = {
    "cifar": (lambda norm: CifarNetwork(3, norm, nn.sigmoid, filters=4, last_filters=5), 16),
    "vgg": (lambda norm: VGG(3, norm, width=2), 32),
    "basic": (lambda norm: ResNet(3, norm, (1, 1), stem="cifar", width=4), 8),
    "bottleneck": (lambda norm: ResNet(3, norm, (1, 1), bottleneck=True, width=4), 32),
}


def shapes(model, size, dtype=jnp.float32):
    """The variables of a model, without computing them."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), dtype)
    return jax.eval_shape(functools.partial(model.init, training=False), KEY, images)


def parameters(model, size=32):
    return sum(p.size for p in jax.tree.leaves(shapes(model, size)["params"]))


def random_variables(model, size):
    """Variables drawn by NumPy, which compiles nothing: kernels of the magnitude of He's, norms near the identity."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(random.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape), leaf.dtype)
        return jnp.asarray(random.uniform(0.1, 0.2, leaf.shape) + (name in ("scale", "var")), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(model, size))


def images(count, size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, size, size, 3)), jnp.float32)


def output_shapes(model, size, layer):
    """The shapes of the results of all layers of a class, in the order of their calls."""
    found = []

    def note(next_function, arguments, options, context):
        y = next_function(*arguments, **options)
        if isinstance(context.module, layer):
            found.append(y.shape)
        return y

    with nn.intercept_methods(note):
        shapes(model, size)
    return found


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_network_has_the_articles_parameters(classes):
    convolutions = 9 * (3 * 60 + 7 * 60 * 60 + 60 * 100 + 100 * 100) + 8 * 60 + 2 * 100
    dense = (2 * 2 * 100 + 1) * classes
    assert parameters(CifarNetwork(classes)) == convolutions + dense
    assert parameters(CifarNetwork(classes, NORM)) == convolutions + dense + 2 * (8 * 60 + 2 * 100)


@pytest.mark.parametrize(
    ("depth", "convolutions"), [(11, 9_220_480), (13, 9_404_992), (16, 14_714_688), (19, 20_024_384)]
)
def test_vgg_has_the_known_number_of_parameters(depth, convolutions):
    dense = 2 * (512 * 512 + 512) + 512 * 10 + 10
    assert parameters(VGG(10, depth=depth)) == convolutions + dense
    assert len(shapes(VGG(10, NORM, depth), 32)["batch_stats"]) == depth - 3


def test_resnets_have_the_known_numbers_of_parameters():
    assert parameters(resnet18(1000, NORM)) == 11_689_512
    assert parameters(resnet50(1000, NORM)) == 25_557_032
    assert len(shapes(resnet50(1000, NORM), 32)["batch_stats"]) == 53
    assert "bias" in shapes(resnet18(10), 32)["params"]["Conv_0"]


def test_resnets_reduce_images_as_published():
    for model, size, stem in ((resnet18(10, NORM), 224, 112), (resnet18(10, NORM, stem="cifar"), 32, 32)):
        sizes = [shape[1] for shape in output_shapes(model, size, nn.BatchNorm)]
        first = size // 4 if stem == 112 else size
        assert sizes == [stem] + [first] * 4 + [first // 2] * 5 + [first // 4] * 5 + [first // 8] * 5
    first_of_second_stage = output_shapes(resnet50(10, NORM), 224, nn.BatchNorm)[11:15]
    assert [shape[1:] for shape in first_of_second_stage] == [
        (56, 56, 128),
        (28, 28, 128),
        (28, 28, 512),
        (28, 28, 512),
    ]


def test_cifar_network_is_its_formula():
    model, size = CifarNetwork(3, NORM, filters=4, last_filters=5), 16
    variables, x = random_variables(model, size), images(2, size)

    def formula(variables, x):
        params, stats = variables["params"], variables["batch_stats"]
        for layer in range(10):
            kernel, bias = params[f"Conv_{layer}"]["kernel"], params[f"Conv_{layer}"]["bias"]
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            norm, running = params[f"BatchNorm_{layer}"], stats[f"BatchNorm_{layer}"]
            x = (x + bias[None, None, None] - running["mean"][None, None, None]) / jnp.sqrt(
                running["var"][None, None, None] + 1e-5
            )
            x = nn.relu(x * norm["scale"][None, None, None] + norm["bias"][None, None, None])
            if layer % 2 == 1 and layer < 9:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return x.reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]

    got = jax.jit(functools.partial(model.apply, training=False))(variables, x)
    np.testing.assert_allclose(got, jax.jit(formula)(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["cifar", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("vgg", "bottleneck"))]
)
def test_masked_examples_change_nothing(name):
    make, size = SMALL[name]
    model = make(NORM)
    variables, x, mask = random_variables(model, size), images(8, size), jnp.arange(8) < 4
    train = jax.jit(functools.partial(model.apply, training=True, mutable=["batch_stats"]))
    y, updates = train(variables, x, mask=mask)
    other_y, other_updates = train(variables, x.at[4:].mul(100.0), mask=mask)
    chex.assert_trees_all_close((other_y[:4], other_updates), (y[:4], updates), rtol=1e-3, atol=1e-4)
    assert (abs(other_y[4:] - y[4:]) > 1e-3).any()
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), updates["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", SMALL)
def test_without_a_normalizer_there_are_no_statistics(name):
    make, size = SMALL[name]
    assert set(shapes(make(None), size)) == {"params"}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_for_the_convolutions(name):
    make, size = SMALL[name]
    model = make(functools.partial(NORM, dtype=jnp.bfloat16)).clone(dtype=jnp.bfloat16)
    variables = shapes(model, size)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    convolved = []

    def note(next_function, arguments, options, context):
        y = next_function(*arguments, **options)
        if type(context.module).__name__ in ("Conv", "BatchNorm"):
            convolved.append(y.dtype)
        return y

    with nn.intercept_methods(note):
        x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        logits = jax.eval_shape(functools.partial(model.apply, training=False), variables, x)
    assert set(convolved) == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


def test_dropout_is_for_training_with_keys_and_each_example_has_its_own():
    make, size = SMALL["cifar"]
    model = make(None)
    variables, x, keys = random_variables(model, size), images(4, size), jax.random.split(KEY, 4)
    for options in ({"training": False, "keys": keys}, {"training": True}):
        assert "random" not in str(jax.make_jaxpr(functools.partial(model.apply, **options))(variables, x))
    apply = jax.jit(functools.partial(model.apply, training=True))
    dropped = apply(variables, x, keys=keys)
    order = jnp.array([2, 0, 3, 1])
    assert (abs(dropped - apply(variables, x, keys=keys[order])) > 1e-6).any(1).all()
    reordered = apply(variables, x[order], keys=keys[order])
    np.testing.assert_allclose(reordered, dropped[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vgg", "basic"])
def test_keys_are_accepted_without_dropout(name):
    make, size = SMALL[name]
    model = make(None)
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert jax.eval_shape(
        lambda v, x: model.apply(v, x, training=True, keys=jax.random.split(KEY, 2)), shapes(model, size), x
    )


def test_rejects_unknown_options():
    with pytest.raises(ValueError, match="depth must be one of 11, 13, 16, 19, got 12"):
        VGG(10, depth=12)
    with pytest.raises(ValueError, match="stem must be 'imagenet' or 'cifar', got 'mnist'"):
        resnet18(10, stem="mnist")


def by_hand(variables, x, statistics):
    """The recurrent network step by step; `statistics(t, i, z)` gives mean and variance of the i-th normalizer."""
    cell, dense = variables["params"]["cell"], variables["params"]["Dense_0"]
    state = np.zeros((len(x), 4))
    for t in range(x.shape[1]):
        parts = []
        for i, z in enumerate((x[:, t] @ cell["Dense_0"]["kernel"], state @ cell["Dense_1"]["kernel"])):
            mean, var = statistics(t, i, z)
            parts.append(0.1 * (z - mean) / np.sqrt(var + 1e-5))
        state = np.tanh(sum(parts) + cell["bias"])
    return state @ dense["kernel"] + dense["bias"]


@pytest.mark.parametrize("is_shared", [False, True])
def test_recurrent_network_normalizes_each_time_step(is_shared):
    x = jax.random.normal(jax.random.key(0), (6, 5, 3))
    model = RecurrentNetwork(2, 4, functools.partial(BatchNorm, momentum=0.5), is_shared)
    variables = model.init(jax.random.key(1), x, training=False)
    shape = (4,) if is_shared else (5, 4)
    assert {v.shape for v in jax.tree.leaves(variables["batch_stats"])} == {shape}
    y, updates = model.apply(variables, x, training=True, mutable=["batch_stats"])
    variables_, stats = jax.device_get((variables, updates["batch_stats"]["cell"]))
    seen = {}

    def batch(t, i, z):
        seen[t, i] = z.mean(0)
        return z.mean(0), z.var(0)

    np.testing.assert_allclose(y, by_hand(variables_, np.asarray(x), batch), rtol=1e-4, atol=1e-5)
    for i in range(2):
        running = np.zeros(4) if is_shared else np.zeros((5, 4))
        for t in range(5):
            if is_shared:
                running = 0.5 * running + 0.5 * seen[t, i]
            else:
                running[t] = 0.5 * seen[t, i]
        np.testing.assert_allclose(stats[f"BatchNorm_{i}"]["mean"], running, rtol=1e-4, atol=1e-6)

    def stored(t, i, z):
        mean, var = (stats[f"BatchNorm_{i}"][name] for name in ("mean", "var"))
        return (mean, var) if is_shared else (mean[t], var[t])

    inference = model.apply({**variables, **updates}, x, training=False)
    np.testing.assert_allclose(inference, by_hand(variables_, np.asarray(x), stored), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_shared", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_recurrent_network_trains_under_shard_map_as_under_jit(is_shared):
    x = jax.random.normal(jax.random.key(0), (16, 3, 2))
    model = RecurrentNetwork(2, 4, functools.partial(BatchNorm, axis_name=SYNC_AXIS), is_shared)
    states = []
    for how in ("jit", "shard_map"):
        step = training.make_train_step(training.cross_entropy, make_mesh(), parallel=how)
        state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(1), x[:1])
        state, _ = step(training.place_state(state, step.mesh), x, jnp.arange(16) % 2)
        states.append(jax.device_get((state.params, state.batch_stats)))
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.LayerNorm, functools.partial(nn.GroupNorm, num_groups=2)])
def test_normalizers_of_each_example_ignore_the_mask(layer):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    model = Perceptron((4,), 1, of_example(layer), "after")
    variables = model.init(jax.random.key(1), x, training=False)
    plain, masked = (model.apply(variables, x, training=True, mask=mask) for mask in (None, jnp.arange(4) < 2))
    np.testing.assert_array_equal(plain, masked)


def test_weight_norm_makes_a_convolution_independent_of_the_length_of_its_kernel():
    model = VGG(3, None, width=2, weight_norm=True)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(lambda: model.init(jax.random.key(1), x, training=False))()
    longer = jax.tree.map_with_path(
        lambda path, v: 3 * v if path[1].key.startswith("Conv") and path[2].key == "kernel" else v, variables
    )
    apply = jax.jit(lambda variables: model.apply(variables, x, training=True))
    np.testing.assert_allclose(apply(longer), apply(variables), rtol=1e-4, atol=1e-6)
