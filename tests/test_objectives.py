"""The contract of objectives and weights, in losses and training: a loss for each example or token, or an error."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bnjax import nnx as layers_of_nnx
from bnjax import training
from bnjax.analysis import losses
from bnjax.linen import BatchNorm

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(4, 5, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, (4, 5))
OF_STEPS = (np.arange(5) < np.array([[5], [3], [1], [0]])).astype(np.float32)  # [batch, time]


class Tagger(nn.Module):
    """A model of sequences."""

    @nn.compact
    def __call__(self, x, *, training, mask=None):
        return nn.Dense(3)(BatchNorm(use_running_average=not training)(x, mask=mask))


class NnxTagger(nnx.Module):
    def __init__(self):
        self.norm = layers_of_nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(1))

    def __call__(self, x, mask=None):
        return self.dense(self.norm(x, mask=mask))


def cross_entropies(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def of_definition(kernel, bias, x, labels, weights):
    """The loss of a tagger with a fresh batch norm: weighted moments over batch and time, a weighted mean of losses."""
    w = weights[..., None] / weights.sum()
    mean = (w * x).sum((0, 1))
    var = (w * (x - mean) ** 2).sum((0, 1))
    logits = (x - mean) / np.sqrt(var + 1e-5) @ kernel + bias
    logits -= logits.max(-1, keepdims=True)
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (w[..., 0] * each).sum()


def test_losses_of_tokens_are_weighted_by_steps_and_by_examples():
    model = Tagger()
    variables = model.init(KEY, TOKENS, training=False)
    loss = losses.linen_loss(model, variables, cross_entropies)
    dense = jax.device_get(variables["params"]["Dense_0"])
    for weights in (OF_STEPS, np.array([1.0, 0.5, 2.0, 0.0], np.float32)):
        whole = np.broadcast_to(weights.reshape((4, -1)), (4, 5)).astype(np.float64)
        expected = of_definition(dense["kernel"], dense["bias"], TOKENS.astype(np.float64), LABELS, whole)
        np.testing.assert_allclose(loss(variables["params"], TOKENS, LABELS, weights), expected, rtol=1e-5)
    by_nnx, params = losses.nnx_loss(NnxTagger(), cross_entropies)
    params["dense"] = {name: jnp.asarray(dense[name]) for name in ("kernel", "bias")}
    expected = loss(variables["params"], TOKENS, LABELS, OF_STEPS)
    np.testing.assert_allclose(by_nnx(params, TOKENS, LABELS, OF_STEPS), expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_training_on_tokens_leaves_padding_out(accumulate_steps):
    state = training.create_train_state(Tagger(), optax.sgd(0.1), KEY, TOKENS)
    polluted = np.where(OF_STEPS[..., None] > 0, TOKENS, np.nan)
    take = lambda x, weights: training.train_step(
        state, x, LABELS, weights, objective=cross_entropies, accumulate_steps=accumulate_steps
    )
    (got, metrics), (expected, wanted) = take(polluted, OF_STEPS), take(TOKENS, OF_STEPS)
    chex.assert_trees_all_close((got.params, got.batch_stats), (expected.params, expected.batch_stats), rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-6)
    if accumulate_steps == 1:
        loss = losses.linen_loss(Tagger(), {"params": state.params, "batch_stats": state.batch_stats}, cross_entropies)
        np.testing.assert_allclose(metrics.loss, loss(state.params, TOKENS, LABELS, OF_STEPS), rtol=1e-5)


def test_evaluation_in_batches_counts_each_example_once():
    state = training.create_train_state(Tagger(), optax.sgd(0.1), KEY, TOKENS)
    found = training.evaluate_in_batches(state, TOKENS, LABELS, objective=cross_entropies, batch_size=3)
    each = training.evaluate(state, TOKENS, LABELS, objective=cross_entropies).loss
    np.testing.assert_allclose(found.loss, each.mean(), rtol=1e-6)


def test_weights_of_integers_are_numbers():
    weights = np.array([1, 0, 5, 2])
    state = training.create_train_state(Tagger(), optax.sgd(0.1), KEY, TOKENS)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    loss = losses.linen_loss(Tagger(), variables, cross_entropies)
    by_nnx, params = losses.nnx_loss(NnxTagger(), cross_entropies)
    layer = BatchNorm(use_running_average=False)
    of_layer = layer.init(KEY, TOKENS)
    for measure in (
        lambda w: loss(state.params, TOKENS, LABELS, w),
        lambda w: by_nnx(params, TOKENS, LABELS, w),
        lambda w: losses.linen_batch_stats(Tagger(), variables, TOKENS, weights=w),
        lambda w: training.train_step(state, TOKENS, LABELS, w, objective=cross_entropies)[1].loss,
        lambda w: layer.apply(of_layer, TOKENS, mask=w, mutable=["batch_stats"]),
        lambda w: layers_of_nnx.BatchNorm(3, rngs=nnx.Rngs(0))(TOKENS, mask=w),
    ):
        chex.assert_trees_all_equal(measure(weights), measure(weights.astype(np.float32)))


def test_weights_of_parts_are_padded_with_zeros():
    batch = training.pad_batch(training.Batch(TOKENS[:3], LABELS[:3], OF_STEPS[:3]), 4)
    np.testing.assert_array_equal(batch.weights, np.concatenate([OF_STEPS[:3], np.zeros((1, 5))]))
    np.testing.assert_array_equal(batch.x[3], TOKENS[0])


@pytest.mark.parametrize("result", ["a mean", "a wrong axis"])
def test_evaluation_needs_a_loss_for_each_example(result):
    state = training.create_train_state(Tagger(), optax.sgd(0.1), KEY, TOKENS)
    wrong = lambda logits, labels: cross_entropies(logits, labels).mean(None if result == "a mean" else 0)
    with pytest.raises(ValueError, match=r"must return a loss for each example"):
        training.evaluate_in_batches(state, TOKENS, LABELS, objective=wrong, batch_size=3)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dense(3)(x)


@pytest.mark.parametrize("result", ["a mean", "a wrong axis"])
def test_weights_need_a_loss_for_each_example(result):
    x, y, weights = np.ones((4, 5), np.float32), np.array([0, 1, 2, 0]), np.array([1.0, 0, 0, 0], np.float32)

    def objective(logits, labels):
        each = cross_entropies(logits, labels)
        return each.mean() if result == "a mean" else each[None]

    model = Plain()
    variables = model.init(KEY, x)
    loss = losses.linen_loss(model, variables, objective)
    with pytest.raises(ValueError, match=r"objective objective must return a loss for each example.*\(4,\)"):
        loss(variables["params"], x, y, weights)
    state = training.create_train_state(model, optax.sgd(0.1), KEY, x)
    with pytest.raises(ValueError, match="must return a loss for each example"):
        training.train_step(state, x, y, weights, objective=objective)
    assert loss(variables["params"], x, y).shape == ()


def test_a_last_axis_of_one_is_weighted_as_without_it():
    x, y, weights = RNG.normal(size=(4, 5)).astype(np.float32), np.array([0, 1, 2, 0]), np.array([1.0, 0, 3, 0])
    model = Plain()
    variables = model.init(KEY, x)
    made = [
        losses.linen_loss(model, variables, objective)(variables["params"], x, y, weights)
        for objective in (cross_entropies, lambda logits, labels: cross_entropies(logits, labels)[:, None])
    ]
    np.testing.assert_allclose(*made, rtol=1e-6)


def test_correctness_has_the_shape_of_the_losses():
    state = training.create_train_state(Plain(), optax.sgd(0.1), KEY, np.ones((4, 5), np.float32))

    def objective(logits, labels):
        return cross_entropies(logits, labels), (logits.argmax(-1) == labels)[:, None]

    with pytest.raises(ValueError, match=r"objective objective must say of each loss"):
        training.train_step(state, np.ones((4, 5), np.float32), np.zeros(4, int), objective=objective)


class WithoutMask(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        return nn.Dense(3)(BatchNorm(use_running_average=not training)(x))


def test_a_model_without_mask_is_weighted_unless_its_statistics_would_count_padding():
    x, y, weights = RNG.normal(size=(4, 5)).astype(np.float32), np.array([0, 1, 2, 0]), np.array([1.0, 0, 3, 0])
    variables = Plain().init(KEY, x)
    each = cross_entropies(Plain().apply(variables, x), y)
    loss = losses.linen_loss(Plain(), variables, cross_entropies)(variables["params"], x, y, weights)
    np.testing.assert_allclose(loss, (each * weights).sum() / 4, rtol=1e-5)
    model = WithoutMask()
    variables = model.init(KEY, x, False)
    with pytest.raises(ValueError, match="call of WithoutMask must take a `mask`"):
        losses.linen_loss(model, variables, cross_entropies)(variables["params"], x, y, weights)
    running = losses.linen_loss(model, variables, cross_entropies, mode="running")
    assert np.isfinite(running(variables["params"], x, y, weights))
    state = training.create_train_state(model, optax.sgd(0.1), KEY, x)
    with pytest.raises(ValueError, match="call of WithoutMask must take a `mask`"):
        training.train_step(state, x, y, weights, objective=cross_entropies)


class OfTwo(nn.Module):
    @nn.compact
    def __call__(self, x, z, *, training, mask=None):
        joint = jnp.concatenate([x, z], -1)
        return nn.Dense(3)(BatchNorm(use_running_average=not training)(joint, mask=mask))


class Joint(nn.Module):
    @nn.compact
    def __call__(self, x, *, training, mask=None):
        return OfTwo(name="of_two")(x[:, :2], x[:, 2:], training=training, mask=mask)


def test_models_of_several_inputs():
    x, y = RNG.normal(size=(6, 5)).astype(np.float32), np.arange(6) % 3
    weights = np.array([1, 1, 0.5, 0, 2, 1], np.float32)
    parts = x[:, :2], x[:, 2:]
    variables = OfTwo().init(KEY, *parts, training=False)
    joint = jax.tree.map(lambda v: {"of_two": v}, variables, is_leaf=lambda v: "Dense_0" in v or "BatchNorm_0" in v)
    loss, whole = (
        losses.linen_loss(model, of, cross_entropies) for model, of in ((OfTwo(), variables), (Joint(), joint))
    )
    np.testing.assert_allclose(
        loss(variables["params"], parts, y, weights), whole(joint["params"], x, y, weights), rtol=1e-6
    )
    states = [
        training.TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **of)
        for model, of in ((OfTwo(), variables), (Joint(), joint))
    ]
    got, expected = (
        training.train_step(state, inputs, y, weights, objective=cross_entropies, accumulate_steps=2)[0]
        for state, inputs in zip(states, (parts, x), strict=True)
    )
    chex.assert_trees_all_close(got.params, expected.params["of_two"], rtol=1e-5)
    chex.assert_trees_all_close(got.batch_stats, expected.batch_stats["of_two"], rtol=1e-5)
