import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from versions import List

import bnjax.nnx
from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.training import loop

KEY = jax.random.key(0)


def classifier(place="before"):
    return Perceptron((8,), 3, None if place == "none" else functools.partial(BatchNorm, momentum=0.9), place)


def new_state(place="before", optimizer=None):
    return training.create_train_state(classifier(place), optimizer or optax.sgd(0.1), KEY, jnp.zeros((1, 4)))


def examples(n, seed=1):
    x = jax.random.normal(jax.random.key(seed), (n, 4))
    return x, jnp.argmax(x[:, :3], axis=1)


def test_a_state_of_variables_that_are_there():
    x, y = examples(16)
    model = Perceptron((8,), 3, BatchNorm, "before")
    variables = model.init(jax.random.key(5), x, training=False)
    state = training.create_train_state(model, optax.adam(0.1), variables=variables)
    chex.assert_trees_all_equal(state.params, variables["params"])
    after, _ = training.make_train_step(training.cross_entropy)(state, x, y)
    chex.assert_tree_all_finite(variables)  # which the step has not donated
    assert (after.batch_stats["BatchNorm_0"]["mean"] != variables["batch_stats"]["BatchNorm_0"]["mean"]).all()
    fresh = training.create_train_state(model, optax.adam(0.1), jax.random.key(5), x)
    chex.assert_trees_all_close(after.params, training.make_train_step(training.cross_entropy)(fresh, x, y)[0].params)
    for given in ({"key": jax.random.key(0), "x": x, "variables": variables}, {}, {"x": x}):
        with pytest.raises(TypeError, match="variables"):
            training.create_train_state(model, optax.adam(0.1), **given)


def test_only_a_batch_is_padded():
    x, y = examples(6)
    with pytest.raises(TypeError, match=r"Pass pad_batch\(Batch\(x, y\)"):
        training.pad_batch((x, y), 4)


@pytest.mark.parametrize("place", ["none", "before", "after", "input"])
def test_perceptron_places_its_normalizer(place):
    state = new_state(place)
    x, _ = examples(16)
    shapes = jax.tree.map(jnp.shape, state.batch_stats)
    features = {"before": 8, "after": 8, "input": 4}.get(place)
    assert shapes == ({"BatchNorm_0": {"mean": (features,), "var": (features,)}} if features else {})
    captured = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        x,
        training=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.BatchNorm | nn.Dense),
    )[1]["intermediates"]
    kernel, bias = state.params["Dense_0"]["kernel"], state.params["Dense_0"]["bias"]
    if place != "none":
        before = {"input": x, "before": x @ kernel + bias[None], "after": nn.relu(x @ kernel + bias[None])}[place]
        expected = (before - before.mean(0)[None]) / jnp.sqrt(before.var(0)[None] + 1e-5)
        chex.assert_trees_all_close(captured["BatchNorm_0"]["__call__"][0], expected, rtol=1e-3, atol=1e-4)


def test_perceptron_rejects_contradictions():
    with pytest.raises(ValueError, match="place must be one of none, before, after, input"):
        Perceptron((8,), 1, BatchNorm, "inside")
    with pytest.raises(ValueError, match="norm must be given exactly where"):
        Perceptron((8,), 1, None, "before")


def test_objectives_are_the_textbook_formulas():
    logits, labels = jnp.array([[2.0], [-1.0], [0.5]]), jnp.array([1, 0, 0])
    probability = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5])))
    losses, correct = training.binary_cross_entropy(logits, labels)
    np.testing.assert_allclose(losses, -np.log([probability[0], 1 - probability[1], 1 - probability[2]]), rtol=1e-6)
    np.testing.assert_array_equal(correct, [True, True, False])
    losses, _ = training.squared_error(logits, labels)
    np.testing.assert_allclose(losses, (probability - [1, 0, 0]) ** 2, rtol=1e-6)
    logits = jnp.array([[1.0, 2.0, 0.0]])
    losses, correct = training.cross_entropy(logits, jnp.array([1]))
    np.testing.assert_allclose(losses, [-np.log(np.exp(2) / np.exp([1, 2, 0]).sum())], rtol=1e-6)
    assert correct.all()


def test_a_step_descends_the_gradient_and_moves_the_statistics():
    state = new_state()
    x, y = examples(16)
    after, metrics = training.train_step(state, x, y, objective=training.cross_entropy)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updates = state.apply_fn(variables, x, training=True, mutable=["batch_stats"])
        return training.cross_entropy(outputs, y)[0].mean(), updates["batch_stats"]

    (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-6)
    chex.assert_trees_all_close(after.batch_stats, batch_stats, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    assert after.step == 1


def test_padding_changes_nothing():
    state = new_state()
    x, y = examples(11)
    expected = training.train_step(state, x, y, objective=training.cross_entropy)
    padded_x, padded_y = jnp.pad(x, ((0, 5), (0, 0)), constant_values=1e6), jnp.pad(y, (0, 5))
    weights = (jnp.arange(16) < 11).astype(jnp.float32)
    got = training.train_step(state, padded_x, padded_y, weights, objective=training.cross_entropy)
    relevant = [(state.params, state.batch_stats, metrics) for state, metrics in (got, expected)]
    chex.assert_trees_all_close(*relevant, rtol=1e-5, atol=1e-6)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("count", [32, 27])
def test_an_epoch_visits_every_example_once(count):
    state = new_state("before", optax.sgd(0.0))  # parameters stay, so that the metrics are those of fixed batches
    x, y = examples(count)
    order = jnp.argsort(jax.random.bits(jax.random.key(5), (count,)))
    assert sorted(order.tolist()) == list(range(count))
    after, metrics = training.train_epoch(
        state, jax.random.key(5), x, y, batch_size=8, objective=training.cross_entropy
    )
    expected, losses = state, []
    for start in range(0, count, 8):
        batch = order[start : start + 8]
        expected, one = training.train_step(expected, x[batch], y[batch], objective=training.cross_entropy)
        losses.append(one.loss * len(batch))
    chex.assert_trees_all_close(after.batch_stats, expected.batch_stats, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, sum(losses) / count, rtol=1e-5)
    assert after.step == -(-count // 8)


def test_the_order_is_that_of_a_stable_sort():
    bits = jnp.array([[3, 0, 2**32 - 1, 3, 2**31, 0, 3]] * 2, jnp.uint32)
    order = jax.vmap(loop._order)(bits)
    assert order.dtype == jnp.int32
    chex.assert_trees_all_equal(order, jnp.argsort(bits, stable=True))
    jax.block_until_ready(jax.jit(loop._order)(bits[0]) + 1)  # nothing of 64 bits is left behind
    assert (jnp.ones(1) / 3).dtype == jnp.float32


def test_evaluation_uses_running_statistics_and_changes_nothing():
    state = new_state()
    x, y = examples(16)
    got = training.evaluate(state, x, y, objective=training.cross_entropy)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    losses, correct = training.cross_entropy(state.apply_fn(variables, x, training=False), y)
    chex.assert_trees_all_close(got, training.Metrics(losses, correct.astype(jnp.float32)))


def test_training_vmaps_over_seeds_with_one_trace_and_learns():
    x, y = examples(64)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def fit(keys):
        def one(key):
            state = training.create_train_state(classifier(), optax.adam(0.05), key, x[:1])

            def epoch(state, e):
                return training.train_epoch(
                    state, jax.random.fold_in(key, e), x, y, batch_size=16, objective=training.cross_entropy
                )

            state, metrics = jax.lax.scan(epoch, state, jnp.arange(15))
            return metrics, training.evaluate(state, x, y, objective=training.cross_entropy).accuracy.mean()

        return jax.vmap(one)(keys)

    keys = jax.random.split(KEY, 4)
    metrics, accuracy = fit(keys)
    assert metrics.loss.shape == (4, 15)
    assert (metrics.loss[:, -1] < 0.6 * metrics.loss[:, 0]).all()
    assert (accuracy > 0.8).all()
    again, _ = fit(keys[::-1])
    chex.assert_trees_all_close(
        again.loss[::-1], metrics.loss, rtol=1e-4, atol=1e-5
    )  # a seed does not depend on the others


class Normalized(nnx.Module):
    """An nnx model with batch norms, one of them in a list, and another normalization."""

    def __init__(self, rngs):
        self.layers = List([nnx.Linear(2, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs)])
        self.layer_norm = nnx.LayerNorm(4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layer_norm(self.layers[1](self.layers[0](x))))


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_frozen_collections_stay_so(accumulate_steps):
    x, y = jnp.ones((4, 2)), jnp.array([0, 1, 0, 1])
    state = training.create_train_state(Perceptron((4,), 2, BatchNorm, "before"), optax.sgd(0.1), jax.random.key(0), x)
    state = state.replace(batch_stats=freeze(state.batch_stats))

    def step(state, _):
        options = {"objective": training.cross_entropy, "accumulate_steps": accumulate_steps}
        return training.train_step(state, x, y, **options)

    after = jax.lax.scan(step, state, None, length=2)[0]
    chex.assert_trees_all_equal_structs(after, state)


def test_batch_norm_parameters_by_path_and_as_a_mask():
    model = Perceptron((4,), 2, BatchNorm, "before")
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((3, 2)), training=False))
    assert training.batch_norm_parameters(variables) == [("BatchNorm_0", "bias"), ("BatchNorm_0", "scale")]
    expected = {"BatchNorm_0": {"bias": True, "scale": True}} | {
        name: {"bias": False, "kernel": False} for name in ("Dense_0", "Dense_1")
    }
    assert training.batch_norm_mask(variables) == expected
    with pytest.raises(TypeError, match="must be the variables of a linen model"):
        training.batch_norm_parameters(model)
    with pytest.raises(ValueError, match="must hold the collection 'batch_stats', by which batch norms are known"):
        training.batch_norm_mask({"params": variables["params"]})
    # A user's layer with running statistics and a kernel is none.
    own = {"params": {"whiten": {"kernel": 0, "scale": 0}}, "batch_stats": {"whiten": {"mean": 0, "var": 0}}}
    assert training.batch_norm_mask(own) == {"whiten": {"kernel": False, "scale": True}}
    assert training.batch_norm_mask({"batch_stats": {"mean": 0, "var": 0}}) == {}


def test_weight_decay_without_batch_norms_in_linen_and_nnx():
    model = Perceptron((4,), 2, BatchNorm, "before")
    variables = model.init(jax.random.key(0), jnp.ones((3, 2)), training=False)
    module = Normalized(nnx.Rngs(0))
    paths = [("layers", 1, "bias"), ("layers", 1, "scale"), ("norm", "scale")]
    assert training.batch_norm_parameters(module) == paths
    for params, mask in (
        (variables["params"], training.batch_norm_mask(variables)),
        (training.create_train_state(module, optax.sgd(0.1)).params, training.batch_norm_mask(module)),
    ):
        decay = optax.masked(optax.add_decayed_weights(0.5), jax.tree.map(operator.not_, mask))
        updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
        expected = jax.tree.map(lambda p, of_norm: jnp.zeros_like(p) if of_norm else 0.5 * p, params, mask)
        chex.assert_trees_all_close(jax.tree.leaves(updates), jax.tree.leaves(expected))
        assert any(jax.tree.leaves(mask))
    decay = optax.masked(optax.add_decayed_weights(0.5), nnx.State(training.batch_norm_mask(module)))
    kernel, scale = (jnp.copy(v[...]) for v in (module.layers[0].kernel, module.norm.scale))
    optimizer = nnx.Optimizer(module, optax.chain(decay, optax.sgd(0.1)), wrt=nnx.Param)
    optimizer.update(module, jax.tree.map(jnp.zeros_like, nnx.state(module, nnx.Param)))
    np.testing.assert_allclose(module.norm.scale[...], 0.95 * scale)
    np.testing.assert_array_equal(module.layers[0].kernel[...], kernel)
