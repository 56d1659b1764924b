"""Variants that differ from batch norm in whose statistics they use: ghost batches, kinds, running ones, fixed ones."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import operations

import bnjax.linen
import bnjax.nnx
from bnjax import batch_norm, init_batch_norm
from bnjax.variants import (
    frozen_batch_norm,
    ghost_batch_norm,
    init_split_batch_norm,
    moving_batch_norm,
    split_batch_norm,
)

STATIC = ("training", "axis", "axis_name", "axis_index_groups", "dtype", "bessel_correction")
batch = jax.jit(batch_norm, static_argnames=STATIC)
ghost = jax.jit(ghost_batch_norm, static_argnames=("ghost_size", *STATIC))
frozen = jax.jit(frozen_batch_norm, static_argnames=STATIC)
moving = jax.jit(moving_batch_norm, static_argnames=STATIC)
split = jax.jit(split_batch_norm, static_argnames=STATIC)
CALLS = {"ghost": functools.partial(ghost, ghost_size=3), "frozen": frozen, "moving": moving}


def example(shape=(8, 3), dtype=jnp.float64):
    """Input, parameters and statistics away from their initial values."""
    rng, features = np.random.default_rng(0), shape[-1:]
    params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
    stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.5, 1.5, features)}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), (rng.normal(1, 2, shape), params, stats))


# --- ghost batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bessel_correction", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batches_are_a_device_split(masked, bessel_correction, x64):
    x, params, stats = example((12, 5, 3))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(12, 5)) > 0.3) if masked else None
    options = {"training": True, "momentum": 0.9, "bessel_correction": bessel_correction}
    y, new = ghost(x, params, stats, ghost_size=3, mask=mask, **options)

    def on_device(x, mask):
        return batch_norm(x, params, stats, mask=mask, **options)

    parts = x.reshape((4, 3, 5, 3)), None if mask is None else mask.reshape((4, 3, 5))
    split_y, split_stats = jax.vmap(on_device, (0, None if mask is None else 0))(*parts)
    chex.assert_trees_all_close(y, split_y.reshape(x.shape), rtol=1e-12)
    counts = np.full(4, 15.0) if mask is None else np.asarray(parts[1]).sum((1, 2))
    averaged = jax.tree.map(lambda v: np.average(v, axis=0, weights=counts), split_stats)
    chex.assert_trees_all_close(new, averaged, rtol=1e-12)


@pytest.mark.parametrize("ghost_size", [1, 3, 8, 100])
def test_a_smaller_last_ghost_batch(ghost_size, x64):
    x, params, stats = example()
    y, new = ghost(x, params, stats, ghost_size=ghost_size, training=True, momentum=0.0)
    parts = [x[i : i + ghost_size] for i in range(0, 8, ghost_size)]
    expected = np.concatenate([oracle.batch_norm(part, params, (1,))[0] for part in parts])
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    sizes = [len(part) for part in parts]
    means = {"mean": [np.mean(p, 0) for p in parts], "var": [np.var(p, 0) for p in parts]}
    averaged = {name: np.average(values, axis=0, weights=sizes) for name, values in means.items()}
    chex.assert_trees_all_close(new, averaged, rtol=1e-12)
    if ghost_size >= 8:
        chex.assert_trees_all_close((y, new), batch(x, params, stats, training=True, momentum=0.0), rtol=1e-12)


def test_a_ghost_batch_without_weight_is_normalized_by_the_running_statistics(x64):
    x, params, stats = example()
    mask = jnp.arange(8) >= 4
    y, new = ghost(x.at[:2].set(jnp.nan), params, stats, ghost_size=4, training=True, mask=mask)
    chex.assert_trees_all_close(y[2:4], batch(x, params, stats, training=False)[0][2:4], rtol=1e-12)
    rest = batch(x[4:], params, stats, training=True)
    chex.assert_trees_all_close((y[4:], new), rest, rtol=1e-12)


def test_ghost_batches_of_other_axes(x64):
    x, params, stats = example((6, 5, 3))
    y, new = ghost(x, params, stats, ghost_size=2, training=True)
    for axis, order in ((0, (2, 0, 1)), (1, (0, 2, 1))):
        turned = ghost(x.transpose(order), params, stats, ghost_size=2, training=True, axis=axis)
        chex.assert_trees_all_close((turned[0].transpose(np.argsort(order)), turned[1]), (y, new), rtol=1e-12)


def test_ghost_derivatives_are_those_of_the_parts(x64):
    x, params, stats = example()
    by_parts = lambda x, p: jnp.concatenate([batch_norm(x[i : i + 3], p, stats, training=True)[0] for i in (0, 3, 6)])
    ours = lambda x, p: ghost_batch_norm(x, p, stats, training=True, ghost_size=3)[0]
    derivative = lambda f: jax.jit(jax.grad(lambda x, p: jnp.sin(f(x, p)).sum(), (0, 1)))
    chex.assert_trees_all_close(derivative(ours)(x, params), derivative(by_parts)(x, params), rtol=1e-10, atol=1e-12)
    tangents = [jax.jvp(jax.jit(lambda x, f=f: f(x, params)), (x,), (jnp.sin(x),))[1] for f in (ours, by_parts)]
    np.testing.assert_allclose(*tangents, rtol=1e-10, atol=1e-12)


def test_ghost_batches_stay_on_their_device_and_running_statistics_are_averaged(x64):
    x, params, stats = example((16, 3))
    mask = jnp.arange(16) % 5 > 0
    expected = ghost(x, params, stats, ghost_size=2, training=True, mask=mask)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    f = functools.partial(ghost_batch_norm, ghost_size=2, training=True, axis_name="batch")
    specs = {"in_specs": (P("batch"), P(), P(), P("batch")), "out_specs": (P("batch"), P())}
    mapped = jax.jit(jax.shard_map(lambda x, p, s, m: f(x, p, s, mask=m), mesh=mesh, **specs))
    chex.assert_trees_all_close(mapped(x, params, stats, mask), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4", None])
def test_a_bad_ghost_size_is_a_clear_error(size):
    with pytest.raises(ValueError, match=r"ghost_size must be a positive int.*Pass 32"):
        inspect.unwrap(ghost_batch_norm)(jnp.ones((4, 3)), *init_batch_norm(3), training=True, ghost_size=size)


def test_ghost_batches_need_an_axis_of_examples():
    with pytest.raises(ValueError, match=r"must have an axis of examples.*x\[None\]"):
        ghost_batch_norm(jnp.ones(3), *init_batch_norm(3), training=True, ghost_size=2)


# --- kinds of batches -------------------------------------------------------------------------------------------------


def test_each_kind_has_its_statistics(x64):
    x, params, _ = example()
    _, stats = init_split_batch_norm(3, 3, dtype=jnp.float64)
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(split_batch_norm, n=1), static_argnames=STATIC)  # the kind among what is
    for kind, factor in ((2, 1.0), (0, 10.0), (2, 1.0)):
        y, stats = traced(factor * x, params, stats, training=True, split=kind, momentum=0.5)
        chex.assert_trees_all_close(y, batch(factor * x, params, init_batch_norm(3)[1], training=True)[0], rtol=1e-6)
    mean, var = np.mean(x, 0), np.var(x, 0)
    np.testing.assert_allclose(stats["mean"], [5 * mean, 0 * mean, 0.75 * mean], rtol=1e-12)
    np.testing.assert_allclose(stats["var"], [0.5 + 50 * var, 1 + 0 * var, 0.25 + 0.75 * var], rtol=1e-12)
    y, same = split(x, params, stats, training=False, split=0)
    own = {name: value[0] for name, value in stats.items()}
    chex.assert_trees_all_close(y, batch(x, params, own, training=False)[0], rtol=1e-12)
    chex.assert_trees_all_equal(same, stats)


KINDS = np.array([2, 0, 2, 2, 0, 2, 0, 2])


@pytest.mark.by_default(1)
@pytest.mark.parametrize("masked", [None, "examples", "elements"])
@pytest.mark.parametrize("mapped", [False, True], ids=["whole", "mapped"])
def test_a_kind_for_each_example_is_right_against_separate_batches(masked, mapped, x64):
    x, params, _ = example((8, 5, 3))
    _, stats = init_split_batch_norm(3, 3, dtype=jnp.float64)
    stats = {"mean": stats["mean"] + jnp.arange(3.0)[:, None], "var": stats["var"] * jnp.arange(1.0, 4.0)[:, None]}
    mask = np.ones((8, 1, 1)) if masked is None else np.random.default_rng(1).random((8, 5, 1)) + 0.1
    mask = mask[:, :1] if masked == "examples" else mask
    weigh = {} if masked is None else {"mask": mask[:, 0, 0] if masked == "examples" else mask}

    def ours(x, params, kinds, weigh):
        options = {"axis_name": "i"} if mapped else {}
        return split_batch_norm(x, params, stats, training=True, split=kinds, **options, **weigh)

    def whole(x, params):
        if not mapped:
            return jax.jit(ours)(x, params, KINDS, weigh)
        parts = jax.tree.map(lambda v: jnp.reshape(v, (2, 4, *v.shape[1:])), (x, KINDS, weigh))
        y, new = jax.vmap(ours, (0, None, 0, 0), (0, None), axis_name="i")(parts[0], params, *parts[1:])
        return y.reshape(x.shape), new

    def apart(x, params):
        y, new = jnp.zeros_like(x), stats
        for kind in set(KINDS):
            own = {name: value[kind] for name, value in stats.items()}
            of_kind = kind == KINDS
            y_own, moved = batch_norm(x[of_kind], params, own, training=True, mask=mask[of_kind])
            y = y.at[of_kind].set(y_own)
            new = {name: value.at[kind].set(moved[name]) for name, value in new.items()}
        return y, new

    chex.assert_trees_all_close(whole(x, params), apart(x, params), rtol=1e-9, atol=1e-12)
    losses = [lambda x, params, f=f: jnp.sin(3 * f(x, params)[0]).sum() for f in (whole, apart)]
    chex.assert_trees_all_close(*(jax.grad(loss, (0, 1))(x, params) for loss in losses), rtol=1e-8, atol=1e-10)
    y, same = split(x, params, stats, training=False, split=KINDS)
    own = {name: value[KINDS][:, None] for name, value in stats.items()}
    x, params, own = jax.tree.map(np.asarray, (x, params, own))
    expected = params["scale"] * (x - own["mean"]) / np.sqrt(own["var"] + 1e-5) + params["bias"]
    chex.assert_trees_all_close(y, expected, rtol=1e-12)
    chex.assert_trees_all_equal(same, stats)


def test_a_kind_for_each_example_under_a_boolean_mask(x64):
    x, params, _ = example((8, 5, 3))
    _, stats = init_split_batch_norm(3, 3, dtype=jnp.float64)
    mask = np.random.default_rng(1).random((8, 5, 1)) > 0.4
    found = split_batch_norm(x, params, stats, training=True, split=KINDS, mask=mask)
    expected = split_batch_norm(x, params, stats, training=True, split=KINDS, mask=mask.astype(np.float32))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    kept = np.asarray(x)[KINDS == 0][np.broadcast_to(mask, x.shape)[KINDS == 0]].reshape((-1, 3))
    np.testing.assert_allclose(found[1]["mean"][0], 0.01 * kept.mean(0), rtol=1e-4, atol=1e-6)


def test_a_kind_for_each_example_on_an_explicit_mesh():
    x, params, _ = example((8, 3), jnp.float32)
    _, stats = init_split_batch_norm(3, 3)
    expected = split(x, params, stats, training=True, split=KINDS)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, kinds = (jax.device_put(np.asarray(v), NamedSharding(mesh, P("batch"))) for v in (x, KINDS))
        params, stats = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), (params, stats))
        got = jax.jit(lambda x, kinds: split_batch_norm(x, params, stats, training=True, split=kinds))(x, kinds)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_layers_take_a_kind_for_each_example(library):
    x = jax.random.normal(jax.random.key(0), (8, 3))
    _, expected = split_batch_norm(x, {}, init_split_batch_norm(3, 3)[1], training=True, split=KINDS)
    if library == "nnx":
        layer = bnjax.nnx.SplitBatchNorm(3, num_splits=3, rngs=nnx.Rngs(0))
        layer(x, split=KINDS)
        got = {"mean": layer.mean[...], "var": layer.var[...]}
    else:
        layer = bnjax.linen.SplitBatchNorm(num_splits=3, use_running_average=False)
        variables = layer.init(jax.random.key(0), x, split=0)
        got = layer.apply(variables, x, split=KINDS, mutable=["batch_stats"])[1]["batch_stats"]
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (2, ValueError, r"split must lie in \[0, 2\)"),
        (-1, ValueError, r"split must lie in \[0, 2\)"),
        (0.0, TypeError, "split must be an integer scalar"),
        (True, TypeError, "split must be an integer scalar"),
        (np.zeros(2, int), TypeError, r"or an integer array of shape \(4,\).*got int64\[2\]"),
        (np.array([0, 1, 2, 0]), ValueError, r"split must lie in \[0, 2\).*got 2"),
    ],
)
def test_a_bad_kind_is_a_clear_error(kind, error, message):
    with pytest.raises(error, match=message):
        split_batch_norm(jnp.ones((4, 3)), *init_split_batch_norm(3, 2), training=True, split=kind)


def test_a_narrow_index_of_many_kinds():
    _, stats = init_split_batch_norm(1, 300)
    _, new = split_batch_norm(jnp.ones((2, 1)), {}, stats, training=True, split=jnp.uint8(50))
    assert np.flatnonzero(new["mean"]).tolist() == [50]


def test_statistics_without_kinds_are_a_clear_error():
    with pytest.raises(ValueError, match=r"leading axis of kinds.*init_split_batch_norm"):
        split_batch_norm(jnp.ones(4), {}, {"mean": jnp.zeros(()), "var": jnp.ones(())}, training=True, split=0)
    _, stats = init_split_batch_norm(3, 2)
    for wrong in ({"var": stats["var"][:1]}, {"steps": jnp.zeros(())}):
        with pytest.raises(ValueError, match="must have a leading axis of kinds"):
            split_batch_norm(jnp.ones((4, 3)), {}, {**stats, **wrong}, training=True, split=1)
    with pytest.raises(ValueError, match="num_splits must be a positive int"):
        init_split_batch_norm(3, 0)


# --- running statistics in training -----------------------------------------------------------------------------------


def test_moving_statistics_normalize_after_they_have_moved(x64):
    x, params, stats = example()
    moved = stats
    for factor in (1.0, 2.0):
        y, moved = moving(factor * x, params, moved, training=True, momentum=0.75)
    weights = {"mean": (0.75 * 0.25 + 0.25 * 2) * np.mean(x, 0), "var": (0.75 * 0.25 + 0.25 * 4) * np.var(x, 0)}
    expected = {name: 0.75**2 * np.asarray(stats[name]) + value for name, value in weights.items()}
    chex.assert_trees_all_close(moved, expected, rtol=1e-12)
    chex.assert_trees_all_close(y, batch(2 * x, params, expected, training=False)[0], rtol=1e-12)


def test_moving_without_a_past_is_batch_norm(x64):
    x, params, stats = example()
    options = {"training": True, "momentum": 0.0}
    chex.assert_trees_all_close(moving(x, params, stats, **options), batch(x, params, stats, **options), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_moving_derivatives_go_through_the_batchs_share(momentum, x64):
    x, params, stats = example()

    def definition(x, params):
        mean, var = (momentum * stats[n] + (1 - momentum) * f(x, 0) for n, f in (("mean", jnp.mean), ("var", jnp.var)))
        return params["scale"][None] * (x - mean[None]) / jnp.sqrt(var + 1e-5)[None] + params["bias"][None]

    ours = lambda x, params: moving_batch_norm(x, params, stats, training=True, momentum=momentum)[0]
    derivative = lambda f: jax.jit(jax.grad(lambda x, p: jnp.sin(f(x, p)).sum(), (0, 1)))
    chex.assert_trees_all_close(derivative(ours)(x, params), derivative(definition)(x, params), rtol=1e-9, atol=1e-12)


# --- fixed statistics -------------------------------------------------------------------------------------------------


def test_frozen_is_a_fixed_affine_map(x64):
    x, params, stats = example()

    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def derivatives(x, params, stats):
        y, new = frozen_batch_norm(x, params, stats, training=True, momentum=0.0)
        return jnp.sin(y).sum() + sum(map(jnp.sum, new.values())), (y, new)

    (d_x, d_params, d_stats), (y, new) = jax.jit(derivatives)(x, params, stats)
    expected = batch(x, params, stats, training=False)
    chex.assert_trees_all_close((y, new), expected, rtol=1e-12)
    chex.assert_trees_all_equal(d_params, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(d_stats, jax.tree.map(jnp.ones_like, stats))  # of the sum of what is returned alone
    multiplier = params["scale"] / jnp.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(d_x, jnp.cos(y) * multiplier[None], rtol=1e-12)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_without_weight_keeps_the_state_and_is_finite(name):
    _, params, stats = example(dtype=jnp.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(x, params):
        y, new = CALLS[name](x, params, stats, training=True, mask=jnp.zeros(4))
        return y.sum() + new["var"].sum(), (y, new)

    for fill in (2.0, np.nan, np.inf):
        got, (y, new) = gradients(jnp.full((4, 3), fill), params)
        chex.assert_trees_all_equal(new, stats)
        chex.assert_tree_all_finite(got)
        if fill == 2:
            chex.assert_trees_all_close(y, batch(jnp.full((4, 3), fill), params, stats, training=False)[0], rtol=1e-6)
    y, new = CALLS[name](jnp.zeros((0, 3)), params, stats, training=True)
    assert y.shape == (0, 3)
    chex.assert_trees_all_equal(new, stats)


@pytest.mark.parametrize("name", CALLS)
def test_state_keeps_structure_and_dtypes(name):
    x, params, stats = example(dtype=jnp.float16)
    before = after = FrozenDict(mean=stats["mean"].astype(jnp.bfloat16), var=stats["var"].astype(jnp.float32))
    for _ in range(2):
        y, after = CALLS[name](x, params, after, training=True)
        assert y.dtype == jnp.float16
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert type(after) is FrozenDict
    inference = {"training": False, "dtype": jnp.float32}
    chex.assert_trees_all_equal(*(f(x, params, after, **inference) for f in (CALLS[name], batch)))


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_a_clear_error(name):
    plain = {"ghost": functools.partial(ghost_batch_norm, ghost_size=3), "frozen": frozen_batch_norm}
    f = functools.partial(plain.get(name, moving_batch_norm), jnp.ones((4, 3)), *init_batch_norm(3))
    for options in ({"momentum": 2.0}, {"epsilon": -1.0}, {"mask": np.ones(7)}, {"axis": 5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
            f(training=True, **options)


# --- layers -----------------------------------------------------------------------------------------------------------

OPTIONS = {"Ghost": {"ghost_size": 3}, "Moving": {}, "Frozen": {}, "Split": {"num_splits": 2}}


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_are_the_functions(name):
    x, call = jax.random.normal(jax.random.key(0), (8, 3)) + 2, {"split": 1} if name == "Split" else {}
    functions = {"Ghost": ghost, "Moving": moving, "Frozen": frozen, "Split": split}
    start = init_split_batch_norm(3, 2) if name == "Split" else init_batch_norm(3)
    own = {**call, **(OPTIONS[name] if name == "Ghost" else {})}
    options = {"momentum": 0.5, "epsilon": 1e-2}
    expected = functions[name](x, *start, training=True, **own, **options)
    linen = getattr(bnjax.linen, f"{name}BatchNorm")(use_running_average=False, **OPTIONS[name], **options)
    variables = linen.init(jax.random.key(1), x, **call)
    chex.assert_trees_all_equal((variables["params"], variables["batch_stats"]), start)
    y, updates = linen.apply(variables, x, mutable=["batch_stats"], **call)
    chex.assert_trees_all_close((y, updates["batch_stats"]), expected, rtol=1e-5, atol=1e-6)
    layer = getattr(bnjax.nnx, f"{name}BatchNorm")(3, **OPTIONS[name], **options, rngs=nnx.Rngs(0))
    y = layer(x, **call)
    got = {"mean": layer.mean[...], "var": layer.var[...]}
    chex.assert_trees_all_close((y, got), expected, rtol=1e-5, atol=1e-6)
    inference = functions[name](x, start[0], expected[1], training=False, **own, **options)[0]
    chex.assert_trees_all_close(layer(x, use_running_average=True, **call), inference, rtol=1e-5, atol=1e-6)


def test_nnx_layers_of_the_other_variants():
    x, rngs = jax.random.normal(jax.random.key(0), (8, 3)) + 2, nnx.Rngs(0)
    plain = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x)
    noisy = bnjax.nnx.NoisyBatchNorm(3, rngs=rngs)
    first, second = noisy(x), noisy(x)
    assert jnp.abs(first - second).max() > 1e-2  # each call has a key of its own
    silent = {"unit_shift": 0.0, "unit_scale": 1.0, "sample_shift": 0.0, "sample_scale": 0.0}
    np.testing.assert_allclose(bnjax.nnx.NoisyBatchNorm(3, rngs=rngs, **silent)(x), plain, rtol=1e-5, atol=1e-6)
    l_2 = bnjax.nnx.LpBatchNorm(3, p=2, rngs=rngs)(x)
    np.testing.assert_allclose(l_2, (x - x.mean(0)[None]) / jnp.sqrt((x**2).mean(0) + 1e-5)[None], rtol=1e-5, atol=1e-6)
    renorm = bnjax.nnx.BatchRenorm(3, r_max=1.0, d_max=0.0, rngs=rngs)
    np.testing.assert_allclose(renorm(x), plain, rtol=1e-5, atol=1e-6)


def test_a_mask_common_to_all_examples_of_ghost_batches():
    x, params, stats = example((8, 5, 3), jnp.float32)
    mask = jnp.arange(5)[None, :, None] < 3
    options = {"training": True, "ghost_size": 4}
    found = ghost(x, params, stats, mask=mask, **options)
    expected = ghost(x, params, stats, mask=jnp.broadcast_to(mask, (8, 5, 1)), **options)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_ghost_batches_that_come_out_even_leave_no_rest():
    x, params, stats = example((8, 3), jnp.float32)
    call = lambda x: ghost_batch_norm(x, params, stats, training=True, ghost_size=4)
    jaxpr = jax.make_jaxpr(call)(x).jaxpr
    assert all(v.aval.size for o in operations(jaxpr) for v in o.outvars)


@pytest.mark.parametrize("number", [0, True, 2.0, -1])
def test_a_bad_number_of_kinds_is_a_clear_error(number):
    with pytest.raises((ValueError, TypeError), match="num_splits"):
        init_split_batch_norm(3, number)


def test_one_kind_is_batch_norm_and_a_traced_kind_out_of_range_is_the_nearest():
    x, params, stats = example((8, 3), jnp.float32)
    one = jax.tree.map(lambda v: v[None], stats)
    y, moved = split(x, params, one, split=0, training=True)
    expected, after = batch(x, params, stats, training=True)
    chex.assert_trees_all_close((y, {n: v[0] for n, v in moved.items()}), (expected, dict(after)), rtol=1e-6)
    assert init_split_batch_norm(3, 1)[1]["mean"].shape == (1, 3)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), stats)
    for given, nearest in ((7, 1), (-7, 0)):
        for shape in ((), (8,)):
            kinds, nearest_kinds = (jnp.full(shape, kind, jnp.int32) for kind in (given, nearest))
            found = split(x, params, two, split=kinds, training=True)
            chex.assert_trees_all_close(found, split(x, params, two, split=nearest_kinds, training=True), rtol=1e-6)


def test_a_mask_common_to_all_examples_of_a_kind_each():
    x, params, _ = example((8, 5, 3), jnp.float32)
    _, stats = init_split_batch_norm(3, 3)
    mask = jnp.arange(5)[None, :, None] < 3
    found, expected = (
        split(x, params, stats, training=True, split=KINDS, mask=m) for m in (mask, jnp.broadcast_to(mask, (8, 5, 1)))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_kinds_of_examples_need_an_axis_of_examples():
    params, stats = init_split_batch_norm(4, 2)
    with pytest.raises(ValueError, match="where axis 0 is the examples', got axis"):
        split_batch_norm(jnp.ones((4, 3)), params, stats, training=True, split=jnp.zeros(4, jnp.int32), axis=0)


def test_a_mask_of_examples_and_one_of_features_meet_kinds_of_examples():
    x = jax.random.normal(jax.random.key(0), (6, 3))
    kinds, c = jnp.array([0, 1, 0, 1, 0, 1]), jax.random.normal(jax.random.key(1), (6, 3))
    params, stats = init_split_batch_norm(3, 2)

    def loss(x, mask):
        y = split_batch_norm(x, params, stats, training=True, split=kinds, mask=mask)[0]
        return jnp.where(mask, y * c, 0).sum()

    of_examples = jnp.array([True, True, True, True, False, False])[:, None]
    bad = x.at[4:].set(jnp.nan)
    gradient = jax.grad(loss)(bad, of_examples)
    expected = jax.grad(
        lambda x: sum((batch_norm(x[k:4:2], *init_batch_norm(3), training=True)[0] * c[k:4:2]).sum() for k in (0, 1))
    )(x)
    np.testing.assert_allclose(gradient, expected.at[4:].set(0), rtol=1e-4, atol=1e-5)
    of_features = jnp.array([[True, True, False]])
    gradient = jax.grad(loss)(x.at[:, 2].set(jnp.nan), of_features)
    expected = jax.grad(loss)(x, jnp.broadcast_to(of_features, x.shape))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
