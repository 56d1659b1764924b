import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.test_util import check_grads

import bnjax.nnx
from bnjax import batch_norm, init_batch_norm, training
from bnjax.linen import BatchNorm, BatchRenorm
from bnjax.variants import batch_renorm

pytestmark = pytest.mark.core

STATIC = ("training", "axis", "axis_name", "axis_index_groups", "dtype", "bessel_correction")
batch = jax.jit(batch_norm, static_argnames=STATIC)
renorm = jax.jit(batch_renorm, static_argnames=STATIC)


def example(shape=(8, 3), dtype=jnp.float64):
    """Input, parameters and statistics away from their initial values."""
    rng, features = np.random.default_rng(0), shape[-1:]
    params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
    stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.5, 1.5, features)}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), (rng.normal(1, 2, shape), params, stats))


def algorithm_1(x, params, stats, r_max, d_max, epsilon=1e-5):
    """Ioffe 2017, line by line in float64, for features last."""
    mean, deviation = x.mean(0), np.sqrt(x.var(0) + epsilon)
    running = np.sqrt(stats["var"] + epsilon)
    r = np.clip(deviation / running, 1 / r_max, r_max)
    d = np.clip((mean - stats["mean"]) / running, -d_max, d_max)
    return params["scale"] * ((x - mean) / deviation * r + d) + params["bias"]


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (100.0, 100.0)])
def test_algorithm_1(x64, r_max, d_max):
    x, params, stats = example()
    y, new = renorm(x, params, stats, training=True, r_max=r_max, d_max=d_max)
    np.testing.assert_allclose(y, algorithm_1(*jax.device_get((x, params, stats)), r_max, d_max), rtol=1e-12)
    expected, moved = batch(x, params, stats, training=True)
    chex.assert_trees_all_equal(new, moved)
    if r_max == 1:
        np.testing.assert_allclose(y, expected, rtol=1e-12)
    if r_max == 100:  # nothing is clipped: what inference gives
        np.testing.assert_allclose(y, batch(x, params, stats, training=False)[0], rtol=1e-12)


def test_inference_is_batch_norms():
    x, params, stats = example(dtype=jnp.float32)
    chex.assert_trees_all_equal(renorm(x, params, stats, training=False), batch(x, params, stats, training=False))


def test_no_gradient_through_the_corrections(x64):
    x, params, stats = example()
    running = np.sqrt(np.asarray(stats["var"]) + 1e-5)
    r = np.clip(np.sqrt(x.var(0) + 1e-5) / running, 1 / 1.2, 1.2)
    d = np.clip((np.asarray(x.mean(0)) - stats["mean"]) / running, -0.5, 0.5)

    def by_hand(x, params):
        deviation = jnp.sqrt(x.var(0)[None] + 1e-5)
        return jnp.sin(
            params["scale"][None] * ((x - x.mean(0)[None]) / deviation * r[None] + d[None]) + params["bias"][None]
        ).sum()

    def ours(x, params):
        return jnp.sin(renorm(x, params, stats, training=True, r_max=1.2, d_max=0.5)[0]).sum()

    chex.assert_trees_all_close(jax.grad(ours, (0, 1))(x, params), jax.grad(by_hand, (0, 1))(x, params), rtol=1e-9)
    f = functools.partial(renorm, x, batch_stats=stats, training=True)
    check_grads(lambda p: f(params=p)[0], (params,), order=2, modes=["fwd", "rev"])


def test_limits_may_be_traced_and_parameters_absent(x64):
    x, _, stats = example()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def y_of(limit):
        return batch_renorm(x, {}, stats, training=True, r_max=1 + limit, d_max=limit)[0]

    for limit in (0.0, 0.5):
        ones = {"scale": np.ones(3), "bias": np.zeros(3)}
        expected = algorithm_1(np.asarray(x), ones, jax.device_get(stats), 1 + limit, limit)
        np.testing.assert_allclose(y_of(limit), expected, rtol=1e-12)


def test_devices_masks_and_low_precision():
    x, params, stats = example((8, 3), jnp.float32)
    mask = jnp.arange(8) % 3 > 0
    whole = renorm(x, params, stats, training=True, mask=mask)
    parts = functools.partial(batch_renorm, params=params, batch_stats=stats, training=True, axis_name="i")
    y, new = jax.vmap(lambda x, mask: parts(x, mask=mask), axis_name="i")(x.reshape(4, 2, 3), mask.reshape(4, 2))
    np.testing.assert_allclose(y.reshape(8, 3)[mask], whole[0][mask], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], new), whole[1], rtol=1e-6)
    half, _ = renorm(x.astype(jnp.bfloat16), params, stats, training=True)
    assert half.dtype == jnp.bfloat16
    full = renorm(x.astype(jnp.bfloat16).astype(jnp.float32), params, stats, training=True)[0]
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))
    empty = batch_renorm(jnp.zeros((0, 3)), params, stats, training=True)
    assert empty[0].shape == (0, 3)
    chex.assert_trees_all_equal(empty[1], stats)


def test_the_layer_is_the_function_and_has_batch_norms_variables(x64):
    x = jax.random.normal(jax.random.key(0), (8, 3), jnp.float64) + 2
    layer, plain = BatchRenorm(r_max=2.0, d_max=1.0), BatchNorm()
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    chex.assert_trees_all_equal_shapes(variables, plain.init(jax.random.key(0), x, use_running_average=True))
    y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    expected, stats = renorm(x, *init_batch_norm(3), training=True, r_max=2.0, d_max=1.0)
    chex.assert_trees_all_close(y, expected, rtol=1e-12)
    chex.assert_trees_all_close(updates["batch_stats"], stats, rtol=1e-6)  # kept in float32


@pytest.mark.parametrize(
    ("options", "message"), [({"r_max": 0.5}, "r_max must be .* at least 1"), ({"d_max": -1.0}, "d_max must be")]
)
def test_limits_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        batch_renorm(jnp.ones((2, 1)), *init_batch_norm(1), training=True, **options)


def of_steps(apply, start, batches):
    """The outputs of training calls one after the other, and the statistics after them."""
    outputs, stats = [], start
    for x in batches:
        y, stats = apply(x, stats)
        outputs.append(np.asarray(y))
    return outputs, stats


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_warm_up_is_batch_norm_and_algorithm_1_after_it(library):
    batches = np.random.default_rng(0).normal(1, 2, (5, 8, 3)).astype(np.float32)
    params, stats = {"scale": np.ones(3), "bias": np.zeros(3)}, {"mean": np.zeros(3), "var": np.ones(3)}
    expected = []
    for step, x in enumerate(batches.astype(np.float64)):
        expected.append(algorithm_1(x, params, stats, *((1.5, 0.5) if step >= 3 else (1.0, 0.0))))
        new = {"mean": x.mean(0), "var": x.var(0)}
        stats = {name: 0.99 * stats[name] + 0.01 * new[name] for name in stats}
    options = {"r_max": 1.5, "d_max": 0.5, "warmup_steps": 3}
    if library == "nnx":
        layer = bnjax.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **options)
        outputs, _ = of_steps(lambda x, _: (nnx.jit(lambda layer, x: layer(x))(layer, x), None), None, batches)
        got = {"mean": layer.mean[...], "var": layer.var[...], "steps": layer.steps[...]}
        at_inference = layer(batches[0], use_running_average=True)
        assert layer.steps[...] == 5, "inference counts no step"
    else:
        layer = BatchRenorm(use_running_average=False, **options)
        variables = layer.init(jax.random.key(0), batches[0])
        assert variables["batch_stats"]["steps"] == 0, "initialization counts no step"

        @jax.jit
        def apply(x, stats):
            y, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        outputs, got = of_steps(apply, variables["batch_stats"], batches)
        at_inference = layer.clone(use_running_average=True).apply({**variables, "batch_stats": got}, batches[0])
        assert {"r_max", "d_max"} < set(got)
    for y, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    assert got["steps"] == 5
    np.testing.assert_allclose(got["mean"], stats["mean"], rtol=1e-5)
    wanted = (batches[0] - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(at_inference, wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_a_layer_that_counts_its_steps_is_taken_as_it_is():
    x = np.random.default_rng(0).normal(1, 2, (8, 3)).astype(np.float32)
    layer = BatchRenorm(use_running_average=False, warmup_steps=1000, epsilon=1e-3)
    variables = layer.init(jax.random.key(0), x)
    saved = {"mean": np.full(3, 0.5, np.float32), "var": np.full(3, 2.0, np.float32)}
    saved |= {"steps": 1000, "r_max": 3, "d_max": 5}
    raw = serialization.msgpack_serialize({"params": jax.device_get(variables["params"]), "batch_stats": saved})
    loaded = serialization.from_state_dict(variables, serialization.msgpack_restore(raw))
    y, updates = layer.apply(loaded, x, mutable=["batch_stats"])
    params = {"scale": 1.0, "bias": 0.0}
    np.testing.assert_allclose(y, algorithm_1(x.astype(float), params, saved, 3, 5, 1e-3), rtol=1e-4, atol=1e-5)
    assert updates["batch_stats"]["steps"] == 1001


class Counting(nn.Module):
    """A model with a batch renorm that counts its steps."""

    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dense(2)(BatchRenorm(use_running_average=not training, warmup_steps=1)(x))


def test_micro_batches_count_as_one_step_and_groups_of_devices_as_well():
    x, y = np.random.default_rng(0).normal(1, 2, (8, 3)).astype(np.float32), np.arange(8) % 2
    state = training.create_train_state(Counting(), optax.sgd(0.1), jax.random.key(0), x)
    step = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy, accumulate_steps=2))
    for _ in range(3):
        state, _ = step(state, x, y)
    assert state.batch_stats["BatchRenorm_0"]["steps"] == 3
    mesh = training.make_mesh(group_size=1, devices=jax.devices()[:2])
    apart = training.split_batch_stats(state, 2)
    apart, _ = training.make_train_step(training.cross_entropy, mesh)(apart, x, y)
    merged = training.merge_batch_stats(apart).batch_stats["BatchRenorm_0"]
    assert merged["steps"] == 4
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, state.batch_stats["BatchRenorm_0"])


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_limits_of_a_layer_that_counts_its_steps(library):
    x = 10 * np.random.default_rng(0).normal(1, 2, (8, 3)).astype(np.float32)
    outputs = []
    for limits in ({"r_max": 1.0, "d_max": 0.0}, {}, {"r_max": 3.0, "d_max": 5.0}):
        if library == "nnx":
            outputs.append(bnjax.nnx.BatchRenorm(3, warmup_steps=0, **limits, rngs=nnx.Rngs(0))(x))
        else:
            variables = BatchRenorm(False, r_max=1.5, d_max=0.5, warmup_steps=0).init(jax.random.key(0), x)
            layer = BatchRenorm(False, warmup_steps=0, **limits)
            outputs.append(layer.apply(variables, x, mutable=["batch_stats"])[0])
    stats = {"mean": np.zeros(3), "var": np.ones(3)}
    kept = (1.5, 0.5) if library == "linen" else (3.0, 5.0)  # those that the variables were made with
    for y, limits in zip(outputs, ((1.0, 0.0), kept, (3.0, 5.0)), strict=True):
        expected = algorithm_1(x.astype(float), {"scale": 1.0, "bias": 0.0}, stats, *limits)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
