"""Agreement with the other libraries' batch norms where they are installed (the extra `peers`)."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import batch_norm, init_batch_norm

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((16, 5, 3)) * 2 + 1).astype(np.float32)
SCALE, BIAS = RNG.standard_normal((2, 3)).astype(np.float32)
PARAMS = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
COTANGENT = RNG.standard_normal(X.shape).astype(np.float32)


def three_steps(epsilon, momentum, **options):
    """Outputs of three training steps on growing inputs, the last gradients, and inference after them."""
    _, stats = init_batch_norm(3)
    outputs = []
    for step in range(3):
        y, stats = batch_norm(
            X * (step + 1), PARAMS, stats, training=True, epsilon=epsilon, momentum=momentum, **options
        )
        outputs.append(y)

    def f(x, params):
        return batch_norm(x, params, stats, training=True, epsilon=epsilon)[0]

    gradients = jax.vjp(f, jnp.asarray(X * 3), PARAMS)[1](jnp.asarray(COTANGENT))
    return outputs, stats, gradients, batch_norm(X, PARAMS, stats, training=False, epsilon=epsilon)[0]


def test_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(3, momentum=0.2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(SCALE))
        layer.bias.copy_(torch.tensor(BIAS))
    channels_second = torch.tensor(X).movedim(-1, 1)
    outputs, stats, gradients, inference = three_steps(1e-5, 0.8, bessel_correction=True)
    for step in range(3):
        x = (channels_second * (step + 1)).requires_grad_()
        y = layer(x)
        chex.assert_trees_all_close(outputs[step], y.detach().movedim(1, -1).numpy(), rtol=1e-4, atol=1e-5)
    layer.zero_grad()
    y.backward(torch.tensor(COTANGENT).movedim(-1, 1))
    expected = (x.grad.movedim(1, -1).numpy(), {"scale": layer.weight.grad.numpy(), "bias": layer.bias.grad.numpy()})
    chex.assert_trees_all_close(gradients, expected, rtol=1e-3, atol=1e-5)
    running = {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()}
    chex.assert_trees_all_close(stats, running, rtol=1e-5, atol=1e-6)
    layer.eval()
    chex.assert_trees_all_close(inference, layer(channels_second).detach().movedim(1, -1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_keras():
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=1e-3)
    layer.build(X.shape)
    layer.gamma.assign(SCALE)
    layer.beta.assign(BIAS)
    outputs, stats, _, inference = three_steps(1e-3, 0.8)
    for step in range(3):
        chex.assert_trees_all_close(
            outputs[step], jnp.asarray(layer(X * (step + 1), training=True)), rtol=1e-4, atol=1e-5
        )
    running = {"mean": jnp.asarray(layer.moving_mean), "var": jnp.asarray(layer.moving_variance)}
    chex.assert_trees_all_close(stats, running, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(inference, jnp.asarray(layer(X, training=False)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_haiku():
    haiku = pytest.importorskip("haiku")
    f = haiku.transform_with_state(lambda x, training: haiku.BatchNorm(True, True, 0.8, eps=1e-5)(x, training))
    params, state = f.init(None, jnp.asarray(X), True)
    params = {"batch_norm": {"scale": SCALE.reshape((1, 1, 3)), "offset": BIAS.reshape((1, 1, 3))}}
    outputs, stats, _, _ = three_steps(1e-5, 0.8)
    for step in range(3):
        y, state = f.apply(params, state, None, jnp.asarray(X * (step + 1)), True)
        chex.assert_trees_all_close(outputs[step], y, rtol=1e-3, atol=1e-4)
    # Haiku starts at zero and divides by 1 − decayᵗ: what ours gives once its start is taken out.
    unbiased = 1 - 0.8**3
    average = {key: state[f"batch_norm/~/{key}_ema"]["average"].ravel() for key in ("mean", "var")}
    chex.assert_trees_all_close(stats["mean"] / unbiased, average["mean"], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close((stats["var"] - 0.8**3) / unbiased, average["var"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_equinox():
    equinox = pytest.importorskip("equinox")
    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, "batch", momentum=0.8, mode="batch")
    layer = equinox.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(SCALE), jnp.asarray(BIAS)))
    outputs, _, _, _ = three_steps(1e-5, 0.8)
    for step in range(3):
        x = jnp.moveaxis(jnp.asarray(X * (step + 1)), -1, 1)  # examples, channels, positions
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        chex.assert_trees_all_close(outputs[step], jnp.moveaxis(y, 1, -1), rtol=1e-4, atol=1e-4)
