"""One step body under jit, shard_map and pmap: the same numbers as on one device, and no more collectives."""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from versions import needs_jax_0_8

import bnjax
from bnjax import linen, training
from bnjax._compat import as_varying
from bnjax.linen import BatchNorm, LpBatchNorm
from bnjax.models import Perceptron

BY_PMAP = pytest.param("pmap", marks=needs_jax_0_8)
WAYS = ["jit", "shard_map", BY_PMAP]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
KEY = jax.random.key(0)
STEPS = 50
# Sizes at which a batch norm's mean is far from zero, and a device has nothing valid.
RNG = np.random.default_rng(0)
X = (5 + 3 * RNG.normal(size=(STEPS, 32, 4))).astype(np.float32)
Y = X[..., :3].argmax(-1).astype(np.int32)
WEIGHTS = (RNG.random((STEPS, 32)) > 0.3).astype(np.float32)
WEIGHTS[:, :4] = 0


def model(axis_name=training.SYNC_AXIS, groups=None, norm=BatchNorm):
    made = functools.partial(norm, momentum=0.9, axis_name=axis_name, axis_index_groups=groups)
    return Perceptron((8, 8), 3, made, "before", use_hidden_bias=False)


def new_state(model, dtype=jnp.float32):
    state = training.create_train_state(model, optax.adam(0.01), KEY, jnp.zeros((1, 4)))
    return jax.tree.map(lambda v: v.astype(dtype) if v.dtype == jnp.float32 else v, state)


def collectives(compiled):
    """How often each kind of collective stands in a compiled program."""
    found = {kind: len(re.findall(rf"= .*? {kind}(?:-start)?\(", compiled.as_text())) for kind in COLLECTIVES}
    return {kind: count for kind, count in found.items() if count}


def fit(step, state, dtype=np.float32, weights=WEIGHTS):
    metrics = []
    for i in range(STEPS):
        state, m = step(state, X[i].astype(dtype), Y[i], weights[i].astype(dtype))
        metrics.append(m)
    return state, jax.device_get(metrics)


@functools.cache
def on_one_device(dtype, accumulate_steps):
    step = functools.partial(training.train_step, objective=training.cross_entropy, accumulate_steps=accumulate_steps)
    state, metrics = fit(jax.jit(step), new_state(model(None), dtype), dtype)
    return jax.device_get((state.params, state.batch_stats)), metrics


@pytest.mark.by_default(1)
@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_on_eight_devices_equal_those_on_one_in_float64(way, accumulate_steps, x64):
    traces = chex.assert_max_traces(training.cross_entropy, n=1)
    chex.clear_trace_counter()
    step = training.make_train_step(traces, parallel=way, accumulate_steps=accumulate_steps)
    start = training.place_state(new_state(model(), np.float64), step.mesh)
    state, metrics = fit(step, start, np.float64)
    assert step.compiled._cache_size() == 1
    (params, batch_stats), expected = on_one_device(np.float64, accumulate_steps)
    chex.assert_trees_all_close(jax.device_get(state.params), params, rtol=1e-10, atol=1e-10)
    chex.assert_trees_all_close(jax.device_get(state.batch_stats), batch_stats, rtol=1e-6)  # kept in float32
    chex.assert_trees_all_close(metrics, expected, rtol=1e-10)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))  # donated


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_in_float32_agree_to_rounding(way):
    state, metrics = fit(training.make_train_step(training.cross_entropy, parallel=way), new_state(model()))
    (params, batch_stats), expected = on_one_device(np.float32, 1)
    chex.assert_trees_all_close(jax.device_get(state.params), params, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(jax.device_get(state.batch_stats), batch_stats, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-3, atol=1e-4)


def test_running_statistics_in_float64_too(x64):
    dtype = {"param_dtype": jnp.float64, "force_float32_reductions": False}
    norm = functools.partial(BatchNorm, **dtype)
    one = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy))
    expected, _ = fit(one, new_state(model(None, norm=norm), np.float64), np.float64)
    got, _ = fit(
        training.make_train_step(training.cross_entropy, parallel="shard_map"),
        new_state(model(norm=norm), np.float64),
        np.float64,
    )
    assert jax.tree.leaves(got.batch_stats)[0].dtype == np.float64
    chex.assert_trees_all_close(
        jax.device_get(got.batch_stats), jax.device_get(expected.batch_stats), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("accumulate_steps", [2, 4])
def test_micro_batches_move_the_statistics_once_by_the_moments_of_the_whole_batch(accumulate_steps, x64):
    class OneLayer(nn.Module):
        @nn.compact
        def __call__(self, x, *, training, mask=None):
            masked = {} if mask is None else {"mask": mask[:, None]}
            layer = BatchNorm(use_running_average=not training, momentum=0.9, bessel_correction=True)
            return layer(x, **masked).sum(1, keepdims=True)

    state = training.create_train_state(OneLayer(), optax.sgd(0.0), KEY, jnp.zeros((1, 4)))
    weights = jnp.asarray(WEIGHTS[0]).at[::accumulate_steps].set(0)  # the first micro-batch has nothing valid
    after, _ = training.train_step(
        state,
        jnp.asarray(X[0]),
        jnp.asarray(Y[0]) % 2,
        weights,
        objective=training.squared_error,
        accumulate_steps=accumulate_steps,
    )
    stats = {"mean": jnp.zeros(4, jnp.float32), "var": jnp.ones(4, jnp.float32)}
    whole = bnjax.moments(X[0], mask=weights)
    expected = bnjax.update_batch_stats(stats, whole, momentum=0.9, bessel_correction=True)
    chex.assert_trees_all_close(next(iter(after.batch_stats.values())), expected, rtol=1e-6)


MERGING = {
    "renorm": linen.BatchRenorm,
    "moving": linen.MovingBatchNorm,
    "split": functools.partial(linen.SplitBatchNorm, num_splits=3),
    "frozen": linen.FrozenBatchNorm,
}


@pytest.mark.parametrize("kind", MERGING)
def test_micro_batches_of_layers_whose_moments_merge(kind):
    class OneLayer(nn.Module):
        @nn.compact
        def __call__(self, x, *, training, mask=None):
            further = {"split": 2} if kind == "split" else {}
            layer = MERGING[kind](use_running_average=not training, momentum=0.9)
            return layer(x, **further).sum(1, keepdims=True)

    state = training.create_train_state(OneLayer(), optax.sgd(0.0), KEY, jnp.zeros((1, 4)))
    x, y = jnp.asarray(X[0]), jnp.asarray(Y[0]) % 2
    after, _ = training.train_step(state, x, y, objective=training.squared_error, accumulate_steps=4)
    (stats,), (moved,) = state.batch_stats.values(), after.batch_stats.values()
    own = jax.tree.map(lambda v: v[2], stats) if kind == "split" else stats
    expected = own if kind == "frozen" else bnjax.update_batch_stats(own, bnjax.moments(x), momentum=0.9)
    if kind == "split":
        expected = jax.tree.map(lambda all_kinds, one: all_kinds.at[2].set(one), stats, expected)
    chex.assert_trees_all_close(moved, expected, rtol=1e-5)


def test_micro_batches_need_our_batch_norm():
    state = new_state(model(None, norm=nn.BatchNorm))
    with pytest.raises(ValueError, match=r"BatchNorm_0 \(BatchNorm\) does not give.*bnjax.linen.BatchNorm"):
        training.train_step(
            state, jnp.asarray(X[0]), jnp.asarray(Y[0]), objective=training.cross_entropy, accumulate_steps=2
        )
    for norm in (functools.partial(linen.GhostBatchNorm, ghost_size=4), functools.partial(LpBatchNorm, p=2)):
        state = new_state(model(None, norm=norm))
        with pytest.raises(ValueError, match=r"does not give. Use bnjax.linen.BatchNorm"):
            training.train_step(
                state, jnp.asarray(X[0]), jnp.asarray(Y[0]), objective=training.cross_entropy, accumulate_steps=2
            )
    with pytest.raises(ValueError, match="must divide the 32 examples"):
        training.train_step(
            state, jnp.asarray(X[0]), jnp.asarray(Y[0]), objective=training.cross_entropy, accumulate_steps=3
        )


# --- collectives ------------------------------------------------------------------------------------------------------


def one_layer(norm, x, params, stats):
    """Output sum and moved statistics of one batch norm: what a training step differentiates."""

    def loss(x, params):
        y, new = norm(x, params, stats)
        return (y**3).sum(), new

    (_, new), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return new, grads


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["shard_map", "unchecked shard_map", BY_PMAP])
def test_a_batch_norm_costs_one_collective_forward_and_one_backward(way, masked):
    params, stats = bnjax.init_batch_norm(16)
    x, mask = jnp.ones((64, 4, 4, 16)), jnp.arange(64) % 3 > 0

    def local(x, mask, backward):
        def norm(x, params, stats):
            masks = {"mask": mask[:, None, None]} if masked else {}
            return bnjax.batch_norm(x, params, stats, training=True, axis_name="batch", **masks)

        if not backward:
            return norm(x, params, stats)
        own = jax.tree.map(lambda v: as_varying(v, ("batch",)), params) if way == "shard_map" else params
        new, (gradient, _) = one_layer(norm, x, own, stats)
        return gradient, new

    for backward in (False, True):
        function = functools.partial(local, backward=backward)
        if way == "pmap":
            x, mask = x.reshape((8, -1, 4, 4, 16)), mask.reshape((8, -1))
            mapped = jax.pmap(function, axis_name="batch")
        else:
            specs = {"in_specs": P("batch"), "out_specs": (P("batch"), P()), "check_vma": way == "shard_map"}
            mapped = jax.jit(jax.shard_map(function, mesh=training.make_mesh(), **specs))
        compiled = mapped.lower(x, mask).compile()
        assert collectives(compiled) == {"all-reduce": 1 + backward}
        # Forward each device's 2 numbers for each feature, and its count where counts differ; backward the sums of 2.
        sizes = [
            sum(np.prod([int(n) for n in shape.split(",") if n]) for shape in re.findall(r"f32\[([\d,]*)\]", kinds))
            for kinds in re.findall(r"= (.*) all-reduce\(", compiled.as_text())
        ]
        assert sorted(sizes) == sorted([8 * (32 + masked)] + [32] * backward)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_automatic_partitioning_costs_no_more_collectives_than_flax(axis_type):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    x = jax.device_put(jnp.ones((64, 4, 4, 16)), NamedSharding(mesh, P("batch")))
    counts = []
    for layer in (BatchNorm(use_running_average=False), nn.BatchNorm(use_running_average=False)):
        variables = jax.device_put(layer.init(KEY, jnp.ones((1, 4, 4, 16))), NamedSharding(mesh, P()))

        def norm(x, params, stats, layer=layer):
            return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

        arguments = x, variables["params"], variables["batch_stats"]
        forward = collectives(jax.jit(norm).lower(*arguments).compile())
        both = collectives(jax.jit(functools.partial(one_layer, norm)).lower(*arguments).compile())
        counts.append((forward, both))
    assert counts[0] == counts[1] == ({"all-reduce": 1}, {"all-reduce": 2})


@pytest.mark.by_default(1)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_costs_two_collectives_for_each_batch_norm_and_one_for_all_gradients(way):
    step = training.make_train_step(training.cross_entropy, parallel=way)
    state = training.place_state(new_state(model()), step.mesh)
    batch = training.shard_batch(training.Batch(X[0], Y[0], WEIGHTS[0]), step.mesh)
    assert collectives(step.compiled.lower(state, batch, None).compile()) == {"all-reduce": 2 * 2 + 1}


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_synchronized_variance_is_accurate_far_from_zero(way, offset):
    mesh = training.make_mesh()
    x = (offset + np.random.default_rng(3).normal(size=(512, 3))).astype(np.float32)
    if way == "jit":
        function = jax.jit(bnjax.moments)
    else:
        local = functools.partial(bnjax.moments, axis_name="batch")
        function = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("batch"), out_specs=P()))
    got = function(jax.device_put(x, training.batch_sharding(mesh)))
    np.testing.assert_allclose(got.mean, x.astype(np.float64).mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.var, x.astype(np.float64).var(0), rtol=1e-4)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", [-1, 1, (0, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_arrays_give_the_moments_of_the_whole(axis, masked, axis_type, x64):
    """Whatever axes are split over devices, and when the size of others does not divide by them."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    for shape in ((16, 8, 3), (6, 8, 16)):
        x = 100 + np.random.default_rng(1).normal(size=shape)
        mask = (np.random.default_rng(2).random(shape[0]) > 0.5)[:, None, None] if masked and axis == -1 else None
        expected = bnjax.moments(x, axis=axis, mask=mask)
        for spec in (P("a"), P(("a", "b")), P(None, "a"), P("b", "a"), P(None, None, ("a", "b"))):
            splits = [
                np.prod([mesh.shape[n] for n in (names if isinstance(names, tuple) else (names,)) if n])
                for names in spec
            ]
            if all(size % split == 0 for size, split in zip(shape, splits, strict=False)):
                sharded = jax.device_put(x, NamedSharding(mesh, spec))
                got = jax.jit(functools.partial(bnjax.moments, axis=axis, mask=mask))(sharded)
                chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-10)


# --- groups -----------------------------------------------------------------------------------------------------------


def split_over_groups(size, x, weights):
    """Reference: each group's statistics over the steps, by the function on one device."""
    groups = 8 // size
    stats = [{"mean": jnp.zeros(4), "var": jnp.ones(4)} for _ in range(groups)]
    for i in range(3):
        for g in range(groups):
            part = slice(g * 32 // groups, (g + 1) * 32 // groups)
            m = bnjax.moments(x[i, part], mask=weights[i, part])
            stats[g] = bnjax.update_batch_stats(stats[g], m, momentum=0.9)
    return stats


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [8, 4, 1])
@pytest.mark.parametrize("way", WAYS)
def test_groups_without_weights(way, size):
    """A group may be all devices, too."""
    mesh = training.make_mesh(size)
    groups = training.index_groups(mesh) if way == "pmap" else None
    state = new_state(model(groups=groups))
    state = training.split_batch_stats(state, 8 // size) if size < 8 else state
    step = training.make_train_step(training.cross_entropy, mesh, parallel=way, accumulate_steps=2)
    after, metrics = step(state, X[0], Y[0])
    alone, expected = in_groups_on_one_device(8 // size)
    chex.assert_trees_all_close(jax.device_get(metrics), expected, rtol=1e-4)
    chex.assert_trees_all_close(
        jax.device_get(training.merge_batch_stats(after).batch_stats), alone, rtol=1e-3, atol=1e-4
    )


@functools.cache
def in_groups_on_one_device(groups):
    """The merged statistics and the mean metrics of a step whose groups each see their part of the batch."""
    parts, metrics = [], []
    for part in np.split(np.arange(32), groups):
        step = functools.partial(training.train_step, objective=training.cross_entropy, accumulate_steps=2)
        # Of a group's examples each device takes every second of its own four for a micro-batch, as does one device.
        state, m = jax.jit(step)(new_state(model(None)), jnp.asarray(X[0, part]), jnp.asarray(Y[0, part]))
        parts.append(state.batch_stats)
        metrics.append(m)
    stats = jax.tree.map(lambda *v: jnp.stack(v), *parts)
    apart = new_state(model(None)).replace(batch_stats=stats, examples_seen=jnp.ones(groups))
    mean = jax.tree.map(lambda *v: np.mean(v), *metrics)
    return jax.device_get(training.merge_batch_stats(apart).batch_stats), jax.device_get(mean)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("way", WAYS)
def test_groups_keep_their_statistics_apart_and_merge_them_by_count(way, size):
    mesh = training.make_mesh(size)
    norm = functools.partial(
        BatchNorm,
        momentum=0.9,
        axis_name="batch",
        axis_index_groups=training.index_groups(mesh) if way == "pmap" else None,
    )
    state = training.create_train_state(Perceptron((), 3, norm, "input"), optax.sgd(0.0), KEY, jnp.zeros((1, 4)))
    state = training.split_batch_stats(state, 8 // size)
    step = training.make_train_step(training.cross_entropy, mesh, parallel=way)
    for i in range(3):
        state, _ = step(state, X[i], Y[i], WEIGHTS[i])
    assert step.compiled._cache_size() == 1
    assert state.stats_groups == 8 // size
    expected = split_over_groups(size, X, WEIGHTS)
    (apart,) = state.batch_stats.values()
    assert apart["mean"].sharding.spec == P("group")
    for g, stats in enumerate(expected):
        chex.assert_trees_all_close(jax.tree.map(lambda v, g=g: v[g], apart), stats, rtol=1e-5, atol=1e-5)
    seen = WEIGHTS[:3].reshape((3, 8 // size, -1)).sum((0, 2))
    np.testing.assert_allclose(state.examples_seen, seen)
    long = jax.tree.map(jnp.copy, state).replace(examples_seen=jnp.full(8 // size, 2.0**24))
    long, _ = step(long, X[0], Y[0], (np.arange(32) % (4 * size) > 0).astype(np.float32))
    exact = np.asarray(long.examples_seen, int) + np.asarray(long.examples_remainder, int)
    assert [*exact] == [2**24 + 4 * size - 1] * (8 // size), "from there on float32 has even numbers only"
    merged = training.merge_batch_stats(state)
    assert merged.stats_groups is None
    mean = sum(n * s["mean"] for n, s in zip(seen, expected, strict=True)) / seen.sum()
    var = sum(n * (s["var"] + (s["mean"] - mean) ** 2) for n, s in zip(seen, expected, strict=True)) / seen.sum()
    (stats,) = merged.batch_stats.values()
    chex.assert_trees_all_close(dict(stats), {"mean": mean, "var": var}, rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class OfProcess:
    """All of a device that decides its place in a mesh."""

    process_index: int
    id: int


def test_groups_stay_within_a_process_or_hold_whole_ones():
    def devices(processes, each):
        """In an order that mixes the processes."""
        return [OfProcess(i % processes, i) for i in range(processes * each)]

    def owners(mesh):
        return [{device.process_index for device in group} for group in mesh.devices]

    assert owners(training.make_mesh(2, devices=devices(2, 4))) == [{0}, {0}, {1}, {1}]
    assert owners(training.make_mesh(4, devices=devices(4, 2))) == [{0, 1}, {2, 3}]
    with pytest.raises(ValueError, match=r"divide the devices of a process.*got 4 for \[6\] devices a process"):
        training.make_mesh(4, devices=devices(2, 6))


def test_states_that_do_not_fit_are_errors():
    state = new_state(model())
    apart = training.split_batch_stats(state, 4)
    over_all = training.make_train_step(training.cross_entropy)
    in_pairs = training.make_train_step(training.cross_entropy, training.make_mesh(2))
    with pytest.raises(ValueError, match=r"one set of running statistics.*4 groups.*merge_batch_stats"):
        over_all(apart, X[0], Y[0])
    with pytest.raises(ValueError, match=r"4 groups of devices apart, this state holds one set.*split_batch_stats"):
        in_pairs(state, X[0], Y[0])
    with pytest.raises(ValueError, match=r"evaluate needs a state with one set"):
        training.evaluate(apart, jnp.asarray(X[0]), jnp.asarray(Y[0]), objective=training.cross_entropy)
    with pytest.raises(ValueError, match=r"split_batch_stats needs a state with one set"):
        training.split_batch_stats(apart, 2)
    merged = training.merge_batch_stats(apart)  # before any step
    chex.assert_trees_all_equal(merged.batch_stats, state.batch_stats)


@pytest.mark.parametrize("way", ["shard_map", BY_PMAP])
def test_a_model_that_does_not_synchronize_is_an_error(way):
    step = training.make_train_step(training.cross_entropy, parallel=way)
    with pytest.raises(ValueError, match=r"BatchNorm_0 must be made with axis_name='batch'.*group_size=1"):
        step(new_state(model(None)), X[0], Y[0])
    in_pairs = training.make_train_step(training.cross_entropy, training.make_mesh(2), parallel=way)
    wrong = model(groups=None if way == "pmap" else training.index_groups(in_pairs.mesh))
    with pytest.raises(ValueError, match="axis_index_groups="):
        in_pairs(training.split_batch_stats(new_state(wrong), 4), X[0], Y[0])


def test_pmap_with_an_old_jax_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(NotImplementedError, match=r"pmap' needs jax 0\.8 or newer, this is 0\.7\.2\. Use 'shard_map'"):
        training.make_train_step(training.cross_entropy, parallel="pmap")


def test_bad_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="parallel must be one of jit, shard_map, pmap"):
        inspect.unwrap(training.make_train_step)(training.cross_entropy, parallel="vmap")
    with pytest.raises(ValueError, match="group_size must divide the 8 devices, got 3"):
        training.make_mesh(3)
    step = training.make_train_step(training.cross_entropy)
    with pytest.raises(ValueError, match=r"split evenly.*got 30 examples.*pad_batch"):
        step(new_state(model()), X[0, :30], Y[0, :30])
    with pytest.raises(TypeError, match=r"compiled.*not within jax.jit, scan or vmap. bnjax.training.train_step"):
        jax.jit(step)(new_state(model()), X[0], Y[0])
    for shape, names in (((8,), ("data",)), ((2, 4), ("batch", "group")), ((2, 4), ("batch", "model"))):
        with pytest.raises(ValueError, match=r"mesh must have the axis 'batch'.*make_mesh"):
            training.make_train_step(
                training.cross_entropy, jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
            )
    with pytest.raises(ValueError, match=r"of type Auto, got \('batch',\) of .*Explicit"):
        training.make_train_step(
            training.cross_entropy, jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
        )
    with pytest.raises(ValueError, match="accumulate_steps must be at least 1, got 0"):
        training.make_train_step(training.cross_entropy, accumulate_steps=0)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="at least one example"):
        training.evaluate_in_batches(new_state(model()), *nothing, objective=training.cross_entropy, batch_size=8)
    with pytest.raises(ValueError, match=r"coordinator and process_id missing"):
        training.initialize(num_processes=2)
    with pytest.raises(ValueError, match="'host:port', got 'here'"):
        training.initialize("here", 2, 0)
    with pytest.raises(ValueError, match="process_id must be from 0 to 1, got 2"):
        training.initialize("127.0.0.1:1", 2, 2)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_does_not_divide_is_padded_and_counts_once(way, x64):
    x, y = X[0, :27].astype(np.float64), Y[0, :27]
    one = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy))
    expected, expected_metrics = one(new_state(model(None), np.float64), x, y)
    padded = training.pad_batch(training.Batch(x, y), 16)
    assert len(padded.x) == 32
    step = training.make_train_step(training.cross_entropy, parallel=way)
    got, metrics = step(new_state(model(), np.float64), padded.x, padded.y, padded.weights)
    chex.assert_trees_all_close(jax.device_get(got.params), jax.device_get(expected.params), rtol=1e-9)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-9)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("way", WAYS)
def test_examples_have_random_keys_of_their_own_however_they_are_split(way):
    def noisy(x, keys):
        return x + jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)

    class TakesKeys(nn.Module):
        @nn.compact
        def __call__(self, x, *, training, keys=None):
            return nn.Dense(3)(x)

    state = training.create_train_state(TakesKeys(), optax.sgd(1.0), KEY, jnp.zeros((1, 4)))
    step = training.make_train_step(training.cross_entropy, parallel=way, preprocess=noisy)
    _, metrics = step(state, X[0], Y[0], None, jax.random.key(7))
    alone = training.make_mesh(devices=jax.devices()[:1])
    single = training.make_train_step(training.cross_entropy, alone, preprocess=noisy)
    state = training.create_train_state(TakesKeys(), optax.sgd(1.0), KEY, jnp.zeros((1, 4)))
    _, expected = single(state, X[0], Y[0], None, jax.random.key(7))
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=1e-5)


class Centered(nn.Module):
    """Keeps a running mean of its own, which does not synchronize."""

    @nn.compact
    def __call__(self, x, *, training):
        mean = self.variable("batch_stats", "center", jnp.zeros, (4,))
        if training:
            mean.value = x.mean(0)
        return nn.Dense(3)(x)


@pytest.mark.parametrize("way", ["shard_map", BY_PMAP])
def test_statistics_that_may_differ_between_devices_are_an_error(way):
    state = training.create_train_state(Centered(), optax.sgd(0.1), KEY, jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="center belong to no batch norm" if way == "pmap" else "replicat"):
        training.make_train_step(training.cross_entropy, parallel=way)(state, X[0], Y[0])
    apart = training.split_batch_stats(state, 8)
    with pytest.raises(ValueError, match="another statistic"):
        training.merge_batch_stats(apart)


def test_a_frozen_batch_norm_needs_no_axis_name():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, *, training):
            return nn.Dense(3)(BatchNorm(use_running_average=True)(x))

    state = training.create_train_state(Frozen(), optax.sgd(0.1), KEY, jnp.zeros((1, 4)))
    after, _ = training.make_train_step(training.cross_entropy, parallel="shard_map")(state, X[0], Y[0])
    chex.assert_trees_all_equal(jax.device_get(after.batch_stats), jax.device_get(state.batch_stats))


@pytest.mark.by_default(1)
@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_half_precision_are_summed_in_float32(dtype, accumulate_steps):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, *, training):
            return nn.Dense(3, dtype=dtype)(x)

    n = 2**17  # more than float16 can count
    x, y = jnp.tile(jnp.asarray(X[0]), (n // 32, 1)), jnp.tile(jnp.asarray(Y[0]), n // 32)
    states = []
    for examples in (n, 32):
        state = training.create_train_state(Half(), optax.sgd(1.0), KEY, jnp.zeros((1, 4)))
        step = training.make_train_step(
            training.cross_entropy, accumulate_steps=accumulate_steps if examples > 64 else 1
        )
        mesh_of_one = training.make_train_step(training.cross_entropy, training.make_mesh(devices=jax.devices()[:1]))
        step = step if examples > 64 else mesh_of_one
        after, metrics = step(state, x[:examples], y[:examples])
        states.append((jax.device_get(metrics.loss), jax.device_get(after.params)))
        assert metrics.loss.dtype == jnp.float32
    chex.assert_trees_all_close(*states, rtol=0.03, atol=0.03)


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
def test_float64_inputs_of_a_float32_model_accumulate(way, x64):
    step = training.make_train_step(training.cross_entropy, parallel=way, accumulate_steps=2)
    _, metrics = step(new_state(model()), X[0].astype(np.float64), Y[0])
    assert np.isfinite(metrics.loss)


def test_integer_weights_and_padding_of_any_value():
    step = training.make_train_step(training.cross_entropy, parallel="shard_map")
    x = X[0].copy()
    weights = np.array([2] * 16 + [1] * 8 + [0] * 8)
    expected, _ = step(new_state(model()), x, Y[0], weights.astype(np.float32))
    x[24:] = np.nan
    got, _ = step(new_state(model()), x, Y[0], weights)
    chex.assert_trees_all_close(jax.device_get(got.params), jax.device_get(expected.params))
    chex.assert_trees_all_close(jax.device_get(got.batch_stats), jax.device_get(expected.batch_stats))


def test_norms_that_groups_can_not_merge_are_refused():
    mesh = training.make_mesh(2)
    for norm in (functools.partial(LpBatchNorm, p=2), functools.partial(linen.GhostBatchNorm, ghost_size=4)):
        net = Perceptron((4,), 3, functools.partial(norm, axis_name="batch"), "before")
        state = training.create_train_state(net, optax.sgd(0.1), KEY, jnp.zeros((1, 4)))
        with pytest.raises(ValueError, match=rf"{norm.func.__name__}_0 .*can't be merged"):
            training.make_train_step(training.cross_entropy, mesh)(training.split_batch_stats(state, 4), X[0], Y[0])


def test_a_state_merged_and_split_again_compiles_no_second_time():
    mesh = training.make_mesh(2)
    step = training.make_train_step(training.cross_entropy, mesh)
    state = training.split_batch_stats(new_state(model()), 4)
    for _ in range(2):
        state, _ = step(state, X[0], Y[0])
        state = training.split_batch_stats(training.merge_batch_stats(state), 4)
    assert step.compiled._cache_size() == 1


def test_an_empty_device_and_huge_values_give_no_nan():
    x = (1e19 * (3 + 0.1 * np.random.default_rng(0).normal(size=(64, 2)))).astype(np.float32)
    mask = np.arange(64) >= 8  # the first device has nothing valid
    mesh = training.make_mesh()
    specs = {"in_specs": P("batch"), "out_specs": P()}
    local = jax.shard_map(lambda x, mask: bnjax.moments(x, mask=mask, axis_name="batch"), mesh=mesh, **specs)
    m = jax.jit(local)(x, mask)
    np.testing.assert_allclose(m.mean, x[8:].astype(np.float64).mean(0), rtol=1e-5)
    assert not np.isnan(m.var).any()


def test_moments_over_a_part_of_the_axes_of_a_mesh():
    """Without a mask, and beside an axis that is not synchronized, or is partitioned automatically."""
    x = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    mesh = training.make_mesh(2)
    groups = jax.shard_map(
        lambda x: jax.tree.map(lambda v: v[None], bnjax.moments(x, axis_name="batch")),
        mesh=mesh,
        in_specs=P(("group", "batch")),
        out_specs=P("group"),
    )
    expected = [bnjax.moments(part) for part in np.split(x, 4)]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *expected)
    chex.assert_trees_all_close(jax.device_get(jax.jit(groups)(x)), jax.device_get(expected), rtol=1e-5, atol=1e-6)
    with_model = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    partly = jax.shard_map(
        lambda x: bnjax.moments(x, axis_name="batch"),
        mesh=with_model,
        in_specs=P("batch"),
        out_specs=P(),
        axis_names={"batch"},
    )
    got = jax.jit(partly)(jax.device_put(x, NamedSharding(with_model, P("batch", "model"))))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(bnjax.moments(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("spec", [P(None, None, "a"), P("b", None, "a"), P("a", "b"), P("a", None, None, "b")])
def test_batch_norm_of_explicitly_sharded_images(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = np.random.default_rng(0).normal(5, 2, size=(64, 16, 16, 8)).astype(np.float32)
    params, stats = bnjax.init_batch_norm(8)
    for mask in (None, (np.arange(64) % 3 > 0)[:, None, None]):
        function = jax.jit(functools.partial(bnjax.batch_norm, training=True, mask=mask))
        got = function(jax.device_put(x, NamedSharding(mesh, spec)), params, stats)
        expected = function(x, params, stats)
        chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-4, atol=1e-4)


def test_host_arrays_come_back_whole():
    mesh = training.make_mesh()
    tree = {"a": np.arange(16.0), "key": jax.random.key(3)}
    batch = training.shard_batch({"a": tree["a"]}, mesh)
    np.testing.assert_array_equal(training.to_host(batch)["a"], tree["a"])
    placed = training.replicate(tree, mesh)
    assert placed["a"].is_fully_replicated
    assert placed["key"] == tree["key"]
