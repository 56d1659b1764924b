"""Batch norms and models of other frameworks (the extra `peers`), converted: same inference, training and way back."""

import functools
import os
import pickle
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import List

from bnjax import batch_norm, convert
from bnjax.convert import BatchNormState
from bnjax.linen import BatchNorm
from bnjax.models import ResNet, resnet18

RNG = np.random.default_rng(0)
IMAGES = (RNG.standard_normal((16, 8, 6, 6, 3)) * 2 + 1).astype(
    np.float32
)  # three steps to train theirs, ten to compare
LABELS = np.arange(8) % 2
START, FURTHER = range(3), range(3, 13)


class Net(nn.Module):
    """conv – norm – ReLU – mean over pixels – dense – norm – ReLU – dense, as each framework's below."""

    norm: functools.partial

    @nn.compact
    def __call__(self, x, training):
        def normalized(x):
            return nn.relu(self.norm(use_running_average=not training)(x))

        x = normalized(nn.Conv(4, (3, 3), padding="VALID")(x)).mean((1, 2))
        x = normalized(nn.Dense(5)(x))
        return nn.Dense(2)(x)


LIKE = jax.eval_shape(lambda: Net(BatchNorm).init(jax.random.key(0), IMAGES[0], False))


def predicted(variables, epsilon):
    return Net(functools.partial(BatchNorm, epsilon=epsilon)).apply(variables, IMAGES[0], False)


def trained_further(variables, state: BatchNormState):
    """Our running statistics after ten further training steps by the rule of `state`, parameters being held."""

    @jax.jit
    def step(batch_stats, x, number):
        model = Net(functools.partial(BatchNorm, **state.options(number)))
        return model.apply({**variables, "batch_stats": batch_stats}, x, True, mutable=["batch_stats"])[1]

    batch_stats = variables["batch_stats"]
    for number, index in enumerate(FURTHER, start=1):
        batch_stats = step(batch_stats, IMAGES[index], number)["batch_stats"]
    return batch_stats


def layer_trained_further(state: BatchNormState, batches):
    """`state`'s running statistics after training steps of one layer, features last."""
    stats = state.batch_stats
    for number, x in enumerate(batches, start=1):
        _, stats = batch_norm(x, state.params, stats, training=True, **state.options(number))
    return stats


def close(ours, theirs):
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


# PyTorch


def torch_net(torch, momentum):
    layers = torch.nn
    torch.manual_seed(0)
    flat = [layers.AdaptiveAvgPool2d(1), layers.Flatten()]
    first = [layers.Conv2d(3, 4, 3), layers.BatchNorm2d(4, momentum=momentum), layers.ReLU()]
    second = [layers.Linear(4, 5), layers.BatchNorm1d(5, eps=1e-5, momentum=momentum), layers.ReLU()]
    return layers.Sequential(*first, *flat, *second, layers.Linear(5, 2))


TORCH_NAMES = {"Conv_0": "0", "BatchNorm_0": "1", "Dense_0": "5", "BatchNorm_1": "6", "Dense_1": "8"}


def channels_first(torch, x):
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


@pytest.mark.parametrize("momentum", [0.2, None])
def test_torch(momentum):
    torch = pytest.importorskip("torch")
    net = torch_net(torch, momentum)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index in START:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(channels_first(torch, IMAGES[index])), torch.tensor(LABELS))
        loss.backward()
        optimizer.step()
    variables = convert.variables_from_torch(net, LIKE, TORCH_NAMES)
    state = convert.batch_norm_from_torch(net, "6")
    assert state.bessel_correction and state.steps == 3
    chex.assert_trees_all_equal(state.batch_stats, variables["batch_stats"]["BatchNorm_1"])
    net.eval()
    close(predicted(variables, state.epsilon), net(channels_first(torch, IMAGES[0])).detach().numpy())
    back = convert.variables_to_torch(variables, TORCH_NAMES, steps=3)
    again = torch_net(torch, momentum)
    again.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    chex.assert_trees_all_equal(back, {key: value.numpy() for key, value in net.state_dict().items()})
    again.train()
    with torch.no_grad():
        for index in FURTHER:
            again(channels_first(torch, IMAGES[index]))
    theirs = convert.variables_from_torch(again.state_dict(), LIKE, TORCH_NAMES)
    close(trained_further(variables, state), theirs["batch_stats"])


def test_torch_one_layer():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(4, momentum=0.3, eps=1e-4)
    layer(torch.tensor(RNG.standard_normal((8, 4)), dtype=torch.float32))
    state = convert.batch_norm_from_torch(layer)
    assert state.options() == {"momentum": 0.7, "epsilon": 1e-4, "bessel_correction": True}
    back = convert.batch_norm_to_torch(state, "bn")
    assert sorted(back) == sorted(f"bn.{key}" for key in layer.state_dict())
    layer.load_state_dict({key.removeprefix("bn."): torch.from_numpy(value) for key, value in back.items()})
    plain = torch.nn.BatchNorm1d(4, affine=False)
    assert convert.batch_norm_from_torch(plain).params == {}
    with pytest.raises(ValueError, match="running_mean and running_var"):
        convert.batch_norm_from_torch(torch.nn.BatchNorm1d(4, track_running_stats=False))


@pytest.mark.parametrize("of_numpy", [False, True], ids=["module", "arrays"])
def test_converted_arrays_stay_when_the_source_is_trained_further(of_numpy):
    if of_numpy:
        source = {f"bn.{name}": np.ones(64, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
        arrays = source
    else:
        torch = pytest.importorskip("torch")
        source = torch.nn.Sequential()
        source.add_module("bn", torch.nn.BatchNorm1d(64))
        arrays = {name: value.detach() for name, value in source.state_dict().items()}
    like = jax.eval_shape(lambda: BatchNorm(use_running_average=True).init(jax.random.key(0), np.ones((2, 64))))
    converted = convert.variables_from_torch(source, like, {"": "bn"}), convert.batch_norm_from_torch(source, "bn")[:2]
    before = jax.tree.map(np.array, converted)
    for value in arrays.values():
        value += 1  # in place, as their optimizers do
    chex.assert_trees_all_equal(converted, before)


# Keras


@pytest.fixture
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    with jax.numpy_rank_promotion("allow"):
        yield keras


KERAS_NAMES = {name: name.lower() for name in TORCH_NAMES}


def keras_net(keras):
    layers = keras.layers
    first = [layers.Conv2D(4, 3, name="conv_0"), layers.BatchNormalization(momentum=0.8, name="batchnorm_0")]
    middle = [layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(5, name="dense_0")]
    last = [layers.BatchNormalization(momentum=0.8, name="batchnorm_1"), layers.ReLU(), layers.Dense(2, name="dense_1")]
    return keras.Sequential([keras.Input((6, 6, 3)), *first, *middle, *last])


@pytest.mark.filterwarnings("ignore")
def test_keras(keras):
    net = keras_net(keras)
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for index in START:
        net.train_on_batch(IMAGES[index], LABELS)
    variables = convert.variables_from_keras(net, LIKE, KERAS_NAMES)
    state = convert.batch_norm_from_keras(net.layers[1])
    assert state.options() == {"momentum": 0.8, "epsilon": 1e-3, "bessel_correction": False}
    close(predicted(variables, state.epsilon), np.asarray(net(IMAGES[0], training=False)))
    again = keras_net(keras)
    convert.variables_to_keras(variables, again, KERAS_NAMES)
    for ours, theirs in zip(again.weights, net.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for index in FURTHER:
        again(IMAGES[index], training=True)
    theirs = convert.variables_from_keras(again, LIKE, KERAS_NAMES)["batch_stats"]
    close(trained_further(variables, state), theirs)
    convert.batch_norm_to_keras(state, again.layers[1])
    np.testing.assert_array_equal(np.asarray(again.layers[1].gamma), state.params["scale"])


# Haiku

HAIKU_NAMES = {"Conv_0": "conv2_d", "BatchNorm_0": "batch_norm", "Dense_0": "linear", "BatchNorm_1": "batch_norm_1"}
HAIKU_NAMES |= {"Dense_1": "linear_1"}


@pytest.mark.filterwarnings("ignore")
def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x, training):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.8)(hk.Conv2D(4, 3, padding="VALID")(x), training)).mean((1, 2))
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.8)(hk.Linear(5)(x), training))
        return hk.Linear(2)(x)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), IMAGES[0], True)
    fresh = params, state

    @jax.jit
    def step(params, state, x):
        def loss(params):
            y, new = net.apply(params, state, x, True)
            return (y * LABELS[:, None]).mean(), new

        gradient, state = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state

    for index in START:
        params, state = step(params, state, IMAGES[index])
    variables = convert.variables_from_haiku(params, state, LIKE, HAIKU_NAMES)
    ours = convert.batch_norm_from_haiku(params, state, "batch_norm_1", decay_rate=0.8)
    assert ours.update == "debiased" and ours.steps == 3
    close(predicted(variables, ours.epsilon), net.apply(params, state, IMAGES[0], False)[0])
    back = convert.variables_to_haiku(variables, *fresh, HAIKU_NAMES, decay_rate=0.8, steps=3)
    for part, expected in zip(back, (params, state), strict=True):  # hidden = average · (1 − ρ³), to rounding
        chex.assert_trees_all_close(part, expected, rtol=1e-6)
    new_params, new_state = convert.batch_norm_to_haiku(ours, "batch_norm_1")
    chex.assert_trees_all_close(new_params["batch_norm_1"], params["batch_norm_1"], rtol=0)
    close(new_state, {key: value for key, value in state.items() if key.startswith("batch_norm_1/")})
    held, state = back
    settled = convert.variables_to_haiku(variables, *fresh, HAIKU_NAMES)[1]
    training = jax.jit(lambda state, x: net.apply(held, state, x, True)[1])
    for index in FURTHER:
        state, settled = training(state, IMAGES[index]), training(settled, IMAGES[index])
    theirs = convert.variables_from_haiku(held, state, LIKE, HAIKU_NAMES)
    close(trained_further(variables, ours), theirs["batch_stats"])
    # Without steps the averages go on as those that are not debiased.
    theirs = convert.variables_from_haiku(held, settled, LIKE, HAIKU_NAMES)
    close(trained_further(variables, ours._replace(update="exponential")), theirs["batch_stats"])


# Equinox

EQUINOX_NAMES = {"Conv_0": "layers.0", "BatchNorm_0": "layers.1", "Dense_0": "dense"}
EQUINOX_NAMES |= {"BatchNorm_1": "layers.2", "Dense_1": "head.0"}


@pytest.mark.filterwarnings("ignore")
def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        layers: list
        dense: eqx.nn.Linear
        head: tuple

        def __init__(self, key):
            norm = functools.partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch", momentum=0.8)
            self.layers = [eqx.nn.Conv2d(3, 4, 3, key=key), norm(4), norm(5)]
            self.dense, self.head = eqx.nn.Linear(4, 5, key=key), (eqx.nn.Linear(5, 2, key=key), jax.nn.relu)

        def __call__(self, x, state):
            x, state = self.layers[1](self.layers[0](x), state)
            x, state = self.layers[2](self.dense(jax.nn.relu(x).mean((1, 2))), state)
            return self.head[0](self.head[1](x)), state

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    fresh = model, state

    apply = lambda model, state, x: jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)

    @eqx.filter_jit
    def step(model, state, x):
        def loss(model):
            y, new = apply(model, state, x)
            return (y * LABELS[:, None]).mean(), new

        gradient, state_after = eqx.filter_grad(loss, has_aux=True)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient)), state_after

    images = np.moveaxis(IMAGES, -1, 2)
    for index in START:
        model, state = step(model, state, images[index])
    variables = convert.variables_from_equinox(model, state, LIKE, EQUINOX_NAMES)
    ours = convert.batch_norm_from_equinox(model.layers[2], state)
    assert ours.update == "debiased" and ours.steps == 3
    inference = eqx.filter_jit(apply)(eqx.nn.inference_mode(model), state, images[0])[0]
    close(predicted(variables, ours.epsilon), inference)
    held, again = convert.variables_to_equinox(variables, *fresh, EQUINOX_NAMES, steps=3)
    chex.assert_trees_all_equal(jax.tree.leaves(held), jax.tree.leaves(model))
    chex.assert_trees_all_close(jax.tree.leaves(again), jax.tree.leaves(state), rtol=1e-6)
    training = eqx.filter_jit(lambda state, x: apply(held, state, x)[1])
    for index in FURTHER:
        again = training(again, images[index])
    theirs = convert.variables_from_equinox(held, again, LIKE, EQUINOX_NAMES)
    close(trained_further(variables, ours), theirs["batch_stats"])


@pytest.mark.filterwarnings("ignore")
# Mode 'batch' starts its variance at one but debiases it as if it had started at zero: not before the first step.
@pytest.mark.parametrize(("mode", "start"), [("ema", 0), ("ema", 1), ("ema", 4), ("batch", 1), ("batch", 4)])
def test_equinox_modes(mode, start):
    eqx = pytest.importorskip("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode, momentum=0.8)
    batches = IMAGES[:, :, 0, 0]

    def trained(state, batches):
        for x in batches:
            _, state = jax.vmap(layer, (0, None), (0, None), axis_name="batch")(x, state)
        return state

    state = trained(state, batches[:start])
    ours = convert.batch_norm_from_equinox(layer, state)
    x = batches[0]
    y, _ = jax.vmap(eqx.nn.inference_mode(layer), (0, None), (0, None), axis_name="batch")(x, state)
    if start:
        close(batch_norm(x, ours.params, ours.batch_stats, training=False, epsilon=ours.epsilon)[0], y)
        _, back = convert.batch_norm_to_equinox(ours, layer, state)
        chex.assert_trees_all_close(jax.tree.leaves(back), jax.tree.leaves(state), rtol=1e-6)
    theirs = convert.batch_norm_from_equinox(layer, trained(state, batches[start : start + 10]))
    close(layer_trained_further(ours, batches[start : start + 10]), theirs.batch_stats)


# nnx


def test_nnx():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            norm = functools.partial(nnx.BatchNorm, momentum=0.8, rngs=rngs)
            self.layers = List([nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs), norm(4), norm(5)])
            self.dense, self.head = nnx.Linear(4, 5, rngs=rngs), List([nnx.Linear(5, 2, rngs=rngs)])
            self.dropout = nnx.Dropout(0.0, rngs=rngs)  # has random state, which is no array of the model's

        def __call__(self, x, training):
            x = nnx.relu(self.layers[1](self.layers[0](x), use_running_average=not training)).mean((1, 2))
            x = self.layers[2](self.dense(x), use_running_average=not training)
            return self.head[0](nnx.relu(x))

    net = Model(nnx.Rngs(0))

    @nnx.jit
    def step(net, x):
        gradient = nnx.grad(lambda net: (net(x, True) * LABELS[:, None]).mean())(net)
        nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(net, nnx.Param), nnx.state(gradient)))

    for index in START:
        step(net, IMAGES[index])
    variables = convert.variables_from_nnx(net, LIKE, EQUINOX_NAMES)
    chex.assert_trees_all_equal(variables, convert.variables_from_nnx(nnx.state(net), LIKE, EQUINOX_NAMES))
    state = convert.batch_norm_from_nnx(net.layers[1])
    close(predicted(variables, state.epsilon), net(IMAGES[0], False))
    again = Model(nnx.Rngs(1))
    convert.variables_to_nnx(variables, again, EQUINOX_NAMES)
    kinds = (nnx.Param, nnx.BatchStat)
    chex.assert_trees_all_equal(*(jax.tree.leaves(nnx.state(model, kinds)) for model in (again, net)))
    training = nnx.jit(lambda net, x: net(x, True))
    for index in FURTHER:
        training(again, IMAGES[index])
    close(trained_further(variables, state), convert.variables_from_nnx(again, LIKE, EQUINOX_NAMES)["batch_stats"])
    convert.batch_norm_to_nnx(state, again.layers[1])
    chex.assert_trees_all_equal(again.layers[1].mean[...], net.layers[1].mean[...])


# Kernels of transposed convolutions

UP = nn.ConvTranspose(3, (3, 2), strides=(2, 2), padding="VALID")
UP_LIKE = jax.eval_shape(UP.init, jax.random.key(0), IMAGES[0])
PIXELS = IMAGES[0, :2, :4, :4]


def test_transposed_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.ConvTranspose2d(3, 3, (3, 2), stride=2)
    variables = convert.variables_from_torch(layer, UP_LIKE, transposed=[""])
    expected = layer(channels_first(torch, PIXELS)).detach().numpy()
    close(UP.apply(variables, PIXELS), np.moveaxis(expected, 1, -1))
    back = convert.variables_to_torch(variables, transposed=[""])
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    np.testing.assert_array_equal(expected, layer(channels_first(torch, PIXELS)).detach().numpy())


@pytest.mark.filterwarnings("ignore")
def test_transposed_keras(keras):
    layer = keras.layers.Conv2DTranspose(3, (3, 2), strides=2)
    layer.build(PIXELS.shape)
    variables = convert.variables_from_keras(layer, UP_LIKE, transposed=[""])
    close(UP.apply(variables, PIXELS), np.asarray(layer(PIXELS)))


@pytest.mark.filterwarnings("ignore")
def test_depthwise_keras(keras):
    layer = keras.layers.DepthwiseConv2D((3, 2), depth_multiplier=2)
    x = RNG.standard_normal((2, 6, 6, 3)).astype(np.float32)
    expected = np.asarray(layer(x))
    ours = nn.Conv(6, (3, 2), feature_group_count=3, padding="VALID")
    like = jax.eval_shape(ours.init, jax.random.key(0), x)
    variables = convert.variables_from_keras(layer, like)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
    again = keras.layers.DepthwiseConv2D((3, 2), depth_multiplier=2)
    again.build(x.shape)
    convert.variables_to_keras(variables, again)
    np.testing.assert_array_equal(again.kernel, layer.kernel)


@pytest.mark.filterwarnings("ignore")
def test_renorm_keras(keras):
    layer = keras.layers.BatchNormalization(renorm=True)
    x = RNG.standard_normal((8, 3)).astype(np.float32)
    layer(x, training=True)
    ours = BatchNorm(use_running_average=True, epsilon=1e-3)
    variables = convert.variables_from_keras(layer, ours.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), layer(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_transposed_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2DTranspose(3, (3, 2), 2, padding="VALID")(x)))
    params = net.init(jax.random.key(0), PIXELS)
    variables = convert.variables_from_haiku(params, {}, UP_LIKE, {"": "conv2_d_transpose"}, transposed=[""])
    close(UP.apply(variables, PIXELS), net.apply(params, PIXELS))


@pytest.mark.filterwarnings("ignore")
def test_transposed_equinox():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.ConvTranspose2d(3, 3, (3, 2), 2, key=jax.random.key(0))
    variables = convert.variables_from_equinox(layer, None, UP_LIKE, transposed=[""])
    expected = jax.vmap(layer)(np.moveaxis(PIXELS, -1, 1))
    close(UP.apply(variables, PIXELS), np.moveaxis(np.asarray(expected), 1, -1))


def test_transposed_by_name():
    variables = {"params": {"ConvTranspose_0": {"kernel": jnp.arange(12.0).reshape((2, 1, 3, 2))}}}
    kernel = convert.variables_to_torch(variables)["ConvTranspose_0.weight"]
    assert kernel.shape == (3, 2, 2, 1)
    assert kernel[0, 1, :, 0].tolist() == [7, 1]
    like = jax.eval_shape(lambda: variables)
    back = convert.variables_from_torch({"ConvTranspose_0.weight": kernel}, like)
    chex.assert_trees_all_equal(back, variables)


# torchvision's ResNet


def torchvision_resnet(torch, blocks, bottleneck, width, num_classes):
    """torchvision's network by the names of its state dict."""
    layers = torch.nn

    class Block(layers.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            outputs = 4 * features if bottleneck else features
            sizes = [(inputs, features, 1, 1), (features, features, 3, stride), (features, outputs, 1, 1)]
            sizes = sizes if bottleneck else [(inputs, features, 3, stride), (features, features, 3, 1)]
            self.number = len(sizes)
            for i, (before, after, size, step) in enumerate(sizes, start=1):
                setattr(self, f"conv{i}", layers.Conv2d(before, after, size, step, size // 2, bias=False))
                setattr(self, f"bn{i}", layers.BatchNorm2d(after))
            if stride > 1 or inputs != outputs:
                past = layers.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = layers.Sequential(past, layers.BatchNorm2d(outputs))

        def forward(self, x):
            y = x
            for i in range(1, self.number + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.number else y
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class Net(layers.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = layers.Conv2d(3, width, 7, 2, 3, bias=False), layers.BatchNorm2d(width)
            inputs = width
            for stage, number in enumerate(blocks):
                features = width * 2**stage
                made = []
                for index in range(number):
                    made.append(Block(inputs, features, 2 if stage > 0 and index == 0 else 1))
                    inputs = 4 * features if bottleneck else features
                setattr(self, f"layer{stage + 1}", layers.Sequential(*made))
            self.fc = layers.Linear(inputs, num_classes)

        def forward(self, x):
            x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            for stage in range(len(blocks)):
                x = getattr(self, f"layer{stage + 1}")(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, layers.BatchNorm2d):
            for array in (module.weight.data, module.running_var):
                array.uniform_(0.5, 1.5)
            for array in (module.bias.data, module.running_mean):
                array.normal_(0, 0.3)
    return net


@pytest.mark.by_default(1)
@pytest.mark.parametrize("kind", ["resnet18", "bottleneck"])
def test_torchvision_resnet(kind):
    torch = pytest.importorskip("torch")
    if kind == "resnet18":
        net = torchvision_resnet(torch, (2, 2, 2, 2), False, 64, 1000)
        ours = resnet18(1000, BatchNorm)
        assert len(net.state_dict()) == 122  # as torchvision's
    else:
        net = torchvision_resnet(torch, (1, 2), True, 4, 7)
        ours = ResNet(7, BatchNorm, (1, 2), bottleneck=True, width=4)
    images = jnp.asarray(RNG.standard_normal((2, 64, 64, 3)), jnp.float32)
    like = jax.eval_shape(lambda: ours.init(jax.random.key(0), images, training=False))
    names = convert.torchvision_names(like)
    variables = convert.variables_from_torch(net.state_dict(), like, names)
    predicted = jax.jit(functools.partial(ours.apply, training=False))(variables, images)
    expected = net.eval()(channels_first(torch, images)).detach().numpy()
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    back = convert.variables_to_torch(variables, names)
    chex.assert_trees_all_equal(back, {key: value.numpy() for key, value in net.state_dict().items()})
    if kind == "bottleneck":  # in training too
        ours = ours.clone(norm=functools.partial(BatchNorm, momentum=0.9, bessel_correction=True))
        train = jax.jit(functools.partial(ours.apply, training=True, mutable=["batch_stats"]))
        updates = train(variables, images)[1]
        net.train()(channels_first(torch, images))
        close(updates["batch_stats"], convert.variables_from_torch(net, like, names)["batch_stats"])


def test_torchvision_names_of_another_model():
    with pytest.raises(ValueError, match=r"must hold the variables of a bnjax\.models\.ResNet"):
        convert.torchvision_names(LIKE["params"])


# Arrays and files

VARIABLES = Net(BatchNorm).init(jax.random.key(0), IMAGES[0], False)


def test_safetensors_without_torch(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    arrays = convert.variables_to_torch(VARIABLES, TORCH_NAMES, steps=7)
    convert.save_safetensors(arrays, path)
    chex.assert_trees_all_equal(convert.variables_from_torch(path, LIKE, TORCH_NAMES), VARIABLES)
    code = """
import sys
from bnjax import convert
frameworks = ("torch", "keras", "haiku", "equinox", "safetensors")
assert not [name for name in frameworks if name in sys.modules]
assert convert.batch_norm_from_torch(sys.argv[1], "6").steps == 7
assert [name for name in frameworks if name in sys.modules] == ["safetensors"]
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float64", "uint8", "bool"])
def test_safetensors_of_any_dtype(tmp_path, dtype):
    pytest.importorskip("safetensors")
    arrays = {"a": np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype)), "b": np.ones((), jnp.dtype(dtype))}
    convert.save_safetensors(arrays, tmp_path / "x.safetensors")
    chex.assert_trees_all_equal(convert.read_arrays(tmp_path / "x.safetensors"), arrays)


def test_safetensors_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    files = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3).to(torch.bfloat16), "b": torch.randn(2, 3).half(), "c": torch.arange(4)}
    files.save_file(tensors, tmp_path / "a.safetensors")
    read = convert.read_arrays(str(tmp_path / "a.safetensors"))
    assert [str(value.dtype) for _, value in sorted(read.items())] == ["bfloat16", "float16", "int64"]
    chex.assert_trees_all_equal(read, convert.read_arrays(tensors))
    np.testing.assert_array_equal(read["a"].astype(np.float32), tensors["a"].float().numpy())
    convert.save_safetensors(read, tmp_path / "b.safetensors")
    again = files.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_what_torch_reads_of_its_own_file_goes_in_as_it_is(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    module(torch.randn(5, 3, 6, 6))
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "model.pt")
    holder = torch.load(tmp_path / "model.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"pass source\['state_dict'\]"):
        convert.read_arrays(holder)
    model = nn.Sequential([nn.Conv(4, (3, 3), padding=1), BatchNorm(use_running_average=True), nn.relu])
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = convert.variables_from_torch(holder["state_dict"], like, {"layers_0": "0", "layers_1": "1"})
    expected = module.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-5)


def test_pickles_are_refused(tmp_path):
    for name in ("model.pt", "model.pth", "model.pkl", "model"):
        with pytest.raises(ValueError, match="never loaded"):
            convert.read_arrays(tmp_path / name)
    with pytest.raises(ValueError, match="never loaded"):
        convert.save_safetensors({}, tmp_path / "model.pt")
    pytest.importorskip("safetensors")
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps({"a": [1.0] * 100}))
    with pytest.raises(ValueError, match="is not one"):
        convert.read_arrays(disguised)
    with pytest.raises(FileNotFoundError):
        convert.read_arrays(tmp_path / "missing.safetensors")
    with pytest.raises(TypeError, match="state_dict"):
        convert.read_arrays([1.0])


def test_safetensors_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'bnjax\[safetensors\]'"):
        convert.read_arrays(tmp_path / "model.safetensors")


# What is wrong is listed at once


def test_what_holds_a_state_dict_and_names_with_a_prefix_are_told():
    state = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    like = {"params": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
    with pytest.raises(ValueError, match=r"pass source\['model'\]"):
        convert.read_arrays({"epoch": np.int32(3), "model": state})
    wrapped = {f"module.fc.{name}": value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"among the unused, with the prefix: 'module\.'"):
        convert.variables_from_torch(wrapped, like, {"": "fc"})
    found = convert.variables_from_torch(wrapped, like, {"": "module.fc"})
    np.testing.assert_array_equal(found["params"]["kernel"], state["weight"].T)
    with pytest.raises(ValueError, match="unused: other") as raised:
        convert.variables_from_torch({"fc.weight": state["weight"], "other": np.ones(1)}, like, {"": "fc"})
    assert "prefix" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_var", -np.ones(3), "negative variances: bn.running_var"),
        ("weight", np.array([object()] * 3), "none of numbers: bn.weight is of object"),
        ("weight", [None] * 3, "none of numbers: bn.weight is of object"),
        ("bias", np.array(["a"] * 3), "none of numbers: bn.bias is of <U1"),
        ("running_mean", np.ones(3, complex), "complex arrays where ours are real: bn.running_mean"),
    ],
)
def test_arrays_that_can_be_no_batch_norms(name, value, message):
    arrays = {f"bn.{n}": np.ones(3, np.float32) for n in ("weight", "bias", "running_mean", "running_var")}
    arrays[f"bn.{name}"] = value
    ones = np.ones(3, np.float32)
    like = {"params": {"bn": {"scale": ones, "bias": ones}}, "batch_stats": {"bn": {"mean": ones, "var": ones}}}
    with pytest.raises(ValueError, match=message):
        convert.variables_from_torch(arrays, like)
    if name != "running_mean":  # a batch norm alone may be one of complex numbers
        with pytest.raises(
            ValueError, match=f"PyTorch's bn.{name} must be (at least 0|of floating-point numbers), got "
        ):
            convert.batch_norm_from_torch(arrays, "bn")


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F8_E8M0X", "X9"])
def test_safetensors_of_a_dtype_that_numpy_lacks(tmp_path, name):
    path = tmp_path / "model.safetensors"
    convert.save_safetensors({"weight": np.ones(8, np.float32)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"%s"' % name.encode()))
    with pytest.raises(ValueError, match="source must "):
        convert.read_arrays(path)


def test_a_message_on_very_many_arrays_is_short():
    arrays = {f"layer{i}.weight": np.ones(1, np.float32) for i in range(20_000)}
    with pytest.raises(ValueError, match="and 19,950 more") as raised:
        convert.variables_from_torch(arrays, {"params": {"kernel": np.ones((1, 1))}})
    assert len(str(raised.value)) < 3000


def test_all_problems_in_one_message():
    arrays = convert.variables_to_torch(VARIABLES, TORCH_NAMES)
    del arrays["6.running_var"], arrays["0.bias"]
    arrays |= {"5.weight": np.zeros((5, 6)), "head.weight": np.zeros(2), "head.num_batches_tracked": np.zeros(())}
    names = {key: name for key, name in TORCH_NAMES.items() if key != "Dense_1"}
    with pytest.raises(ValueError, match="must agree") as error:
        convert.variables_from_torch(arrays, LIKE, names)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:-1] == [
        "modules without a name in `names`: Dense_1",
        "missing: 0.bias (for params/Conv_0/bias), 6.running_var (for batch_stats/BatchNorm_1/var)",
        "unused: 8.bias, 8.weight, head.weight",
        "wrong shapes: 5.weight is (5, 6), expected (5, 4) (params/Dense_0/kernel)",
    ]


def test_other_problems():
    with pytest.raises(ValueError, match=r"names that two modules have: x\.running_mean"):
        convert.variables_to_torch(VARIABLES, lambda path: "x")
    with pytest.raises(ValueError, match="modules without a name in `names`: BatchNorm_0"):
        convert.variables_to_torch(VARIABLES, lambda path: None)
    with pytest.raises(ValueError, match="without a counterpart: params/Cell/gate"):
        convert.variables_to_torch({"params": {"Cell": {"gate": np.ones(2)}}})
    with pytest.raises(ValueError, match="'params' and 'batch_stats' alone"):
        convert.variables_to_torch(VARIABLES["params"])
    with pytest.raises(ValueError, match=r"must have bn.running_mean and bn.running_var, got the arrays bn.weight"):
        convert.batch_norm_from_torch({"bn.weight": np.ones(2), "fc.weight": np.ones(2)}, "bn")
    with pytest.raises(ValueError, match="arrays of one shape"):
        convert.batch_norm_from_torch({"running_mean": np.ones(2), "running_var": np.ones(3)})
    with pytest.raises(ValueError, match="step must be given"):
        BatchNormState({}, {}, update="cumulative", decay=None).options()


def test_kernels_of_another_layout_are_not_reshaped():
    like = jax.eval_shape(nn.Dense(5, use_bias=False).init, jax.random.key(0), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="wrong shapes"):
        convert.variables_from_keras({"kernel": np.ones((5, 1))}, like)


def test_structure_and_dtypes_are_those_of_like():
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), nn.FrozenDict(LIKE))
    arrays = {key: np.float64(value) for key, value in convert.variables_to_torch(VARIABLES, TORCH_NAMES).items()}
    variables = convert.variables_from_torch(arrays, like, TORCH_NAMES)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, like)


# The update rules


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.99999])
def test_debiased_momentum(decay):
    state = BatchNormState({}, {}, decay=decay, update="debiased")
    hidden = average = 0.0
    for step, value in enumerate([3.0, -1.0, 4.0, 1.0], start=1):
        hidden = decay * hidden + (1 - decay) * value
        momentum = float(state.momentum(step))
        average = momentum * average + (1 - momentum) * value
        np.testing.assert_allclose(average, hidden / (1 - decay**step), rtol=1e-6)


def test_momentum_goes_on_from_the_steps_so_far():
    for update in ("cumulative", "debiased", "first"):
        begun = BatchNormState({}, {}, decay=0.9, update=update, steps=3)
        np.testing.assert_allclose(begun.momentum(2), begun._replace(steps=0).momentum(5))
        assert begun._replace(steps=0).momentum(1) == 0
    np.testing.assert_allclose(BatchNormState({}, {}, update="debiased", steps=10**6).momentum(1), 0.99, rtol=1e-6)
