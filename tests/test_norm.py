import collections
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from versions import needs_jax_0_8

import bnjax
from bnjax import Moments, batch_norm, init_batch_norm, merge_moments, moments, update_batch_stats

pytestmark = pytest.mark.core


def example(shape=(7, 3), dtype=jnp.float64, seed=0):
    """Input, parameters and statistics away from their initial values."""
    keys = jax.random.split(jax.random.key(seed), 5)
    features = shape[-1:]
    x = jax.random.normal(keys[0], shape, dtype) * 2 + 1
    params = {"scale": jax.random.normal(keys[1], features, dtype), "bias": jax.random.normal(keys[2], features, dtype)}
    stats = {
        "mean": jax.random.normal(keys[3], features, dtype),
        "var": jax.random.uniform(keys[4], features, dtype) + 0.5,
    }
    return x, params, stats


# --- values -----------------------------------------------------------------------------------------------------------


def test_initial_values_and_dtypes():
    params, stats = init_batch_norm(3)
    chex.assert_trees_all_equal(params, {"scale": jnp.ones(3), "bias": jnp.zeros(3)})
    chex.assert_trees_all_equal(stats, {"mean": jnp.zeros(3), "var": jnp.ones(3)})
    params, stats = init_batch_norm((2, 4), use_bias=False, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, {"scale": jnp.ones((2, 4), jnp.bfloat16)})
    chex.assert_type(jax.tree.leaves(stats), jnp.float32)
    assert init_batch_norm((0, 3))[0]["scale"].shape == (0, 3)
    assert init_batch_norm(())[1]["mean"].shape == ()
    with pytest.raises(ValueError, match="num_features"):
        init_batch_norm(-1)
    with pytest.raises(ValueError, match="num_features"):
        init_batch_norm(True)
    with pytest.raises(TypeError, match="dtype"):
        init_batch_norm(1, dtype=jnp.int32)


def test_several_steps_then_inference_have_a_closed_form(x64):
    x, params, _ = example()
    _, stats = init_batch_norm(3, dtype=jnp.float64)
    rho, steps = 0.8, 5
    for _ in range(steps):
        _, stats = batch_norm(x, params, stats, training=True, momentum=rho)
    mean, var = (1 - rho**steps) * x.mean(0), rho**steps + (1 - rho**steps) * x.var(0)
    chex.assert_trees_all_close(stats, {"mean": mean, "var": var}, rtol=1e-12)
    y, _ = batch_norm(x, params, stats, training=False, epsilon=1e-3)
    expected = (x - mean[None]) / jnp.sqrt(var[None] + 1e-3) * params["scale"][None] + params["bias"][None]
    chex.assert_trees_all_close(y, expected, rtol=1e-12)


def test_scale_and_bias_of_the_batch_give_the_identity(x64):
    x, _, stats = example()
    params = {"scale": jnp.sqrt(x.var(0) + 1e-5), "bias": x.mean(0)}
    chex.assert_trees_all_close(batch_norm(x, params, stats, training=True)[0], x, rtol=1e-12)


def test_invariant_to_the_scale_of_the_weights_before_it(x64):
    u, params, stats = example((9, 4))
    kernel = jax.random.normal(jax.random.key(9), (4, 4), jnp.float64)

    def loss(kernel):
        return jnp.sum(jnp.sin(batch_norm(u @ kernel, params, stats, training=True, epsilon=0.0)[0]))

    gradient = jax.grad(loss)(kernel)
    assert jnp.allclose(loss(3.7 * kernel), loss(kernel), rtol=1e-12)
    chex.assert_trees_all_close(jax.grad(loss)(3.7 * kernel), gradient / 3.7, rtol=1e-10)
    chex.assert_trees_all_close((kernel * gradient).sum(0), jnp.zeros(4, jnp.float64), atol=1e-12)


def test_theorem_4_1_of_santurkar_et_al_holds_as_an_equality(x64):
    x, params, stats = example((11, 3))
    g = jax.random.normal(jax.random.key(5), x.shape, jnp.float64)
    for epsilon in (0.0, 0.1):
        _, vjp = jax.vjp(lambda x, e=epsilon: batch_norm(x, params, stats, training=True, epsilon=e)[0], x)
        (dx,) = vjp(g)
        var = x.var(0)
        sigma = jnp.sqrt(var + epsilon)
        normalized = (x - x.mean(0)[None]) / sigma[None]
        chex.assert_trees_all_close(dx.sum(0), jnp.zeros(3, jnp.float64), atol=1e-13)
        expected = params["scale"] / sigma * (g * normalized).sum(0) * epsilon / (var + epsilon)
        chex.assert_trees_all_close((dx * normalized).sum(0), expected, atol=1e-12)
        if epsilon == 0:
            norms = (g**2).sum(0) - g.sum(0) ** 2 / 11 - (g * normalized).sum(0) ** 2 / 11
            chex.assert_trees_all_close((dx**2).sum(0), (params["scale"] / sigma) ** 2 * norms, rtol=1e-12)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_traced_momentum_gives_the_cumulative_average():
    batches = jax.random.normal(jax.random.key(0), (6, 8, 2))
    step = jax.jit(lambda x, stats, t: batch_norm(x, {}, stats, training=True, momentum=1 - 1 / (t + 1))[1])
    _, stats = init_batch_norm(2)
    for t, x in enumerate(batches):
        stats = step(x, stats, jnp.float32(t))
    expected = {"mean": batches.mean((0, 1)), "var": batches.var(1).mean(0)}
    chex.assert_trees_all_close(stats, expected, rtol=1e-5, atol=1e-6)


def test_bessel_correction():
    x = jax.random.normal(jax.random.key(0), (5, 2))
    _, stats = init_batch_norm(2)
    _, new = batch_norm(x, {}, stats, training=True, momentum=0.9, bessel_correction=True)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(new["mean"], 0.1 * x.mean(0), rtol=1e-6)


def test_bessel_correction_of_weights():
    x = jax.random.normal(jax.random.key(0), (6, 2))
    _, stats = init_batch_norm(2)
    for total, factor in ((0.1, 1), (1.5, 3), (3, 1.5)):
        options = {"momentum": 0.0, "bessel_correction": True, "mask": jnp.full(6, total / 6)}
        _, new = batch_norm(x, {}, stats, training=True, **options)
        np.testing.assert_allclose(new["var"], factor * x.var(0), rtol=1e-5)


def test_bessel_correction_of_a_weight_of_one_has_a_derivative():
    x = jax.random.normal(jax.random.key(0), (6, 2))

    def var(weights, bessel_correction):
        options = {"momentum": 0.0, "bessel_correction": bessel_correction, "mask": weights}
        return batch_norm(x, {}, init_batch_norm(2)[1], training=True, **options)[1]["var"].sum()

    weights = jnp.array([0.5, 0.25, 0.25, 0, 0, 0])
    of_one, plain = (jax.grad(var)(weights, bessel_correction) for bessel_correction in (True, False))
    chex.assert_trees_all_close(of_one, plain)


@pytest.mark.parametrize("bessel_correction", [False, True])
def test_a_batch_of_one_is_finite(bessel_correction):
    params, stats = init_batch_norm(2)
    y, new = batch_norm(jnp.array([[3.0, -1.0]]), params, stats, training=True, bessel_correction=bessel_correction)
    np.testing.assert_array_equal(y, [[0, 0]])
    np.testing.assert_allclose(new["var"], 0.99, rtol=1e-6)


@pytest.mark.parametrize("mask", [np.zeros(4, bool), np.zeros(4, np.float32)], ids=["bool", "weights"])
@pytest.mark.parametrize("fill", [2.0, np.nan, np.inf])
def test_a_batch_without_weight_keeps_the_state_and_is_finite(mask, fill):
    _, params, stats = example(dtype=jnp.float32)

    def f(x, params):
        y, new = batch_norm(x, params, stats, training=True, mask=mask)
        return y.sum() + new["mean"].sum(), (y, new)

    gradients, (y, new) = jax.grad(f, argnums=(0, 1), has_aux=True)(jnp.full((4, 3), fill), params)
    chex.assert_trees_all_equal(new, stats)
    chex.assert_tree_all_finite((y, gradients))
    if np.isfinite(fill):
        chex.assert_trees_all_close(y, batch_norm(jnp.full((4, 3), fill), params, stats, training=False)[0])


def test_no_examples():
    params, stats = init_batch_norm(2)
    y, new = batch_norm(jnp.zeros((0, 2)), params, stats, training=True)
    assert y.shape == (0, 2)
    chex.assert_trees_all_equal(new, stats)


@pytest.mark.parametrize("kind", [dict, FrozenDict])
@pytest.mark.parametrize("stats_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_state_keeps_structure_and_dtypes(dtype, stats_dtype, kind):
    x, params, stats = example(dtype=dtype)
    before = after = kind({key: value.astype(stats_dtype) for key, value in stats.items()})
    for _ in range(3):
        y, after = batch_norm(x, params, after, training=True)
        assert y.dtype == dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert type(after) is kind
    assert batch_norm(x, params, after, training=False, dtype=jnp.float32)[0].dtype == jnp.float32


def test_bfloat16_is_normalized_by_float32_statistics():
    x = (jax.random.normal(jax.random.key(0), (4096, 2)) + 20).astype(jnp.bfloat16)
    y, _ = batch_norm(x, {}, init_batch_norm(2)[1], training=True)
    exact = oracle.batch_norm(np.asarray(x, np.float32), {}, (1,))[0]
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float4_e2m1fn"])
def test_narrow_formats_are_normalized_by_float32_statistics(dtype):
    x = (jax.random.normal(jax.random.key(0), (64, 2)) * 2 + 1).astype(dtype)
    y, stats = batch_norm(x, {}, init_batch_norm(2)[1], training=True, momentum=0.0)
    exact, mean, var = oracle.batch_norm(np.asarray(x, np.float32), {}, (1,))
    assert (y.dtype, stats["mean"].dtype) == (jnp.dtype(dtype), jnp.float32)
    chex.assert_trees_all_close(stats, {"mean": mean, "var": var}, rtol=1e-5)
    np.testing.assert_array_equal(np.float32(y), np.float32(exact.astype(dtype)))
    wide, _ = batch_norm(x, {}, init_batch_norm(2)[1], training=True, dtype=jnp.float32)
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-6)


def test_complex_input_with_two_feature_axes(x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(2 * (rng.normal(size=(6, 4, 3)) + 1j * rng.normal(size=(6, 4, 3))) + 3 - 1j)
    m = bnjax.moments(x, axis=(1, 2))
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(m.var, (jnp.abs(x - x.mean(0)[None]) ** 2).mean(0), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_complex_input(masked, x64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape))
    x, params = 2 * draw(6, 4, 3) + 3 - 1j, {"scale": draw(3), "bias": draw(3)}
    _, stats = init_batch_norm(3, dtype=jnp.complex128)
    weights = jnp.asarray(rng.uniform(size=(6, 4)) * (rng.uniform(size=(6, 4)) > 0.3)) if masked else None
    w = jnp.ones((6, 4, 1)) if weights is None else weights[..., None]

    def definition(x, params):
        mean = (w * x).sum((0, 1)) / w.sum()
        var = (w * jnp.abs(x - mean[None, None]) ** 2).sum((0, 1)) / w.sum()
        y = (x - mean[None, None]) / jnp.sqrt(var + 1e-5)[None, None]
        return y * params["scale"][None, None] + params["bias"][None, None], mean, var

    expected, mean, var = definition(x, params)
    y, new = batch_norm(x, params, stats, training=True, momentum=0.9, mask=weights)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    chex.assert_trees_all_close(new, {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var}, rtol=1e-12)
    chex.assert_trees_all_equal_dtypes(new, stats)
    y, _ = batch_norm(x, params, new, training=False)
    running = (x - new["mean"][None, None]) / jnp.sqrt(new["var"] + 1e-5)[None, None]
    np.testing.assert_allclose(y, running * params["scale"][None, None] + params["bias"][None, None], rtol=1e-12)
    loss = lambda f: jax.jit(jax.grad(lambda *args: (jnp.abs(f(*args)) ** 3).sum() + f(*args)[0, 0, 0].imag, (0, 1)))
    ours = lambda x, params: batch_norm(x, params, stats, training=True, mask=weights)[0]
    theirs = lambda x, params: definition(x, params)[0]
    chex.assert_trees_all_close(loss(ours)(x, params), loss(theirs)(x, params), rtol=1e-9, atol=1e-9)
    halves = jax.vmap(lambda x, w: moments(x, mask=w[..., 0], axis_name="i"), axis_name="i")(
        x.reshape((2, 3, 4, 3)), w.reshape((2, 3, 4, 1))
    )
    chex.assert_trees_all_close((halves.mean[0], halves.var[0]), (mean, var), rtol=1e-12)
    parts = [moments(x[a], mask=w[a]) for a in (slice(0, 2), slice(2, 6))]
    chex.assert_trees_all_close(merge_moments(*parts)[:2], (mean, var), rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -1e25])
def test_a_feature_that_overflows_keeps_its_running_statistics(value):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32).at[:3, 1].set(value)
    params, stats = init_batch_norm(3)
    _, new = batch_norm(x, params, stats, training=True)
    chex.assert_tree_all_finite(new)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda v: v[1], s) for s in (new, stats)))
    _, expected = batch_norm(x[:, ::2], *init_batch_norm(2), training=True)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[::2], new), expected, rtol=1e-6)


def test_statistics_of_numpy_float64_and_in_a_defaultdict():
    stats = collections.defaultdict(None, mean=np.zeros(2), var=np.ones(2))
    x = jax.random.normal(jax.random.key(0), (8, 2))
    _, new = inspect.unwrap(batch_norm)(x, {}, stats, training=True)
    assert type(new) is collections.defaultdict
    chex.assert_trees_all_close(dict(new), batch_norm(x, {}, init_batch_norm(2)[1], training=True)[1])


def test_other_statistics_are_carried_along():
    stats = {**init_batch_norm(2)[1], "steps": jnp.int32(4)}
    broken = {"mean": jnp.full(2, jnp.nan), "var": jnp.full(2, jnp.inf)}
    ones = Moments(jnp.ones(2), jnp.ones(2), jnp.ones(()))
    chex.assert_trees_all_equal(update_batch_stats(broken, ones, momentum=0), {"mean": ones.mean, "var": ones.var})
    new = update_batch_stats(stats, Moments(jnp.ones(2), jnp.ones(2), jnp.ones(())))
    assert new["steps"] == 4


# --- derivatives ------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "no mask": None,
    "mask": np.array([1, 1, 0, 1, 1, 0, 1], bool),
    "weights": np.array([0.5, 2, 0, 1, 1, 0, 3.0]),
}
TRANSFORMS = {
    "grad": lambda f: jax.grad(f, (0, 1)),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "jacrev": lambda f: jax.jacrev(f, (0, 1)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1)),
    "grad of jvp": lambda f: jax.grad(lambda x, p: jax.jvp(f, (x, p), (jnp.cos(x), p))[1], (0, 1)),
    "jvp of grad": lambda f: lambda x, p: jax.jvp(jax.grad(f, (0, 1)), (x, p), (jnp.cos(x), p))[1],
    "grad of remat": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
    "vmap of grad": lambda f: lambda x, p: jax.vmap(jax.grad(f), in_axes=(0, None))(jnp.stack([x, x * 2, x - 1]), p),
    "grad of vmap": lambda f: jax.grad(lambda x, p: jax.vmap(f, in_axes=(0, None))(jnp.stack([x, x * 2]), p).sum()),
    "hessian of scan": lambda f: jax.hessian(
        lambda x, p: jax.lax.scan(lambda c, t: (c + f(x * t, p), c), 0.0, jnp.arange(1.0, 3))[0]
    ),
}


@pytest.mark.parametrize("masking", WEIGHTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_are_those_of_the_definition(transform, masking, x64):
    x, params, stats = example()
    target = jax.random.normal(jax.random.key(7), x.shape, jnp.float64)
    mask = WEIGHTS[masking]
    valid = jnp.ones((7, 1), bool) if mask is None else jnp.asarray(mask > 0)[:, None]
    if mask is not None:
        x = jnp.where(valid, x, jnp.nan)  # what is masked must not reach any derivative

    def loss(y, mean, var):
        return jnp.sum(jnp.where(valid, jnp.sin(y) * target, 0)) + jnp.sum(mean**2 + jnp.sin(var))

    def ours(x, params):
        y, new = batch_norm(x, params, stats, training=True, momentum=0.0, mask=mask)
        return loss(y, new["mean"], new["var"])

    def reference(x, params):
        weights = None if mask is None else jnp.asarray(mask)[:, None]
        y, mean, var = oracle.batch_norm(jnp.where(valid, x, 0), params, (1,), weights=weights)
        return loss(y, mean, var)

    got, expected = (jax.jit(TRANSFORMS[transform](f))(x, params) for f in (ours, reference))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev of jacrev"])
def test_derivatives_at_inference(transform, x64):
    x, params, stats = example()
    running = tuple(stats[key][None] for key in ("mean", "var"))

    def ours(x, params):
        return jnp.sum(jnp.sin(batch_norm(x, params, stats, training=False)[0]))

    def reference(x, params):
        return jnp.sum(jnp.sin(oracle.batch_norm(x, params, (1,), statistics=running)[0]))

    got, expected = (jax.jit(TRANSFORMS[transform](f))(x, params) for f in (ours, reference))
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-12)


def test_sample_weights_are_differentiable(x64):
    x, params, stats = example()
    weights = jnp.array([0.5, 2, 0.1, 1, 1, 0.7, 3.0])

    def ours(weights):
        y, new = batch_norm(x, params, stats, training=True, momentum=0.0, mask=weights)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["mean"] * new["var"])

    def reference(weights):
        y, mean, var = oracle.batch_norm(x, params, (1,), weights=weights[:, None])
        return jnp.sum(jnp.sin(y)) + jnp.sum(mean * var)

    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        got, expected = (jax.jit(transform(f))(weights) for f in (ours, reference))
        chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fill", [np.nan, np.inf, -np.inf, 1e20, 3e38])
def test_no_masked_value_reaches_a_gradient(fill, training):
    x, params, stats = example(dtype=jnp.float32)
    mask = jnp.array([1, 1, 0, 1, 1, 0, 1], bool)

    def loss(x, params):
        y, new = batch_norm(x, params, stats, training=training, mask=mask)
        return jnp.sum(jnp.where(mask[:, None], jnp.exp(jnp.sin(y)), 0)) + jnp.sum(new["mean"] * new["var"])

    def tangent(x):
        return jax.jvp(lambda x: loss(x, params), (x,), (jnp.ones_like(x),))[1]

    filled = jnp.where(mask[:, None], x, fill)
    for transform in (jax.grad(loss, (0, 1)), lambda x, p: tangent(x)):
        got, expected = (transform(v, params) for v in (filled, x))
        chex.assert_tree_all_finite(got)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_derivatives_under_a_mask_that_differs_between_features(x64):
    x, params, stats = example()
    mask = jax.random.uniform(jax.random.key(1), x.shape) > 0.3

    def ours(x):
        y, new = batch_norm(x, params, stats, training=True, momentum=0.0, mask=mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0)) + jnp.sum(new["var"])

    def reference(x):
        y, _, var = oracle.batch_norm(x, params, (1,), weights=mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0)) + jnp.sum(var)

    for transform in (jax.grad, jax.hessian):
        got, expected = (jax.jit(transform(f))(x) for f in (ours, reference))
        chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_derivatives_of_momentum_epsilon_and_statistics(x64):
    x, params, stats = example()

    def ours(momentum, epsilon, stats):
        y, new = batch_norm(x, params, stats, training=True, momentum=momentum, epsilon=epsilon)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["mean"] * new["var"])

    def reference(momentum, epsilon, stats):
        y, mean, var = oracle.batch_norm(x, params, (1,), epsilon=epsilon)
        new = [momentum * stats[key] + (1 - momentum) * value for key, value in (("mean", mean), ("var", var))]
        return jnp.sum(jnp.sin(y)) + jnp.sum(new[0] * new[1])

    got, expected = (jax.jit(jax.hessian(f, (0, 1, 2)))(0.9, 0.1, stats) for f in (ours, reference))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_vmap_over_parameters_statistics_momentum_and_mask():
    x, params, stats = example((16, 3), jnp.float32)
    masks = jax.random.uniform(jax.random.key(4), (2, 16)) > 0.3
    many = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), (params, stats))
    momenta = jnp.array([0.5, 0.9])

    def f(params, stats, momentum, mask):
        return batch_norm(x, params, stats, training=True, momentum=momentum, mask=mask)

    got = jax.vmap(f)(*many, momenta, masks)
    for i in range(2):
        expected = f(*jax.tree.map(lambda v: v[i], many), momenta[i], masks[i])
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[i], got), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masking", ["no mask", "mask"])
def test_only_x_is_kept_for_the_backward_pass(masking):
    x = jax.random.normal(jax.random.key(0), (64, 32), jnp.bfloat16)
    params, stats = init_batch_norm(32)
    mask = None if masking == "no mask" else jnp.ones(64, bool)
    forward = jax.jit(lambda x, p: jax.vjp(lambda x, p: batch_norm(x, p, stats, training=True, mask=mask)[0], x, p)[1])
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(forward(x, params))}
    (large,) = [leaf for leaf in kept.values() if leaf.size >= x.size]
    chex.assert_trees_all_equal(large, x)
    assert sum(leaf.nbytes for leaf in kept.values()) < 1.5 * x.nbytes


# --- synchronization --------------------------------------------------------------------------------------------------

GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]
MAPS = {
    "vmap": lambda f: jax.vmap(f, axis_name="batch"),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f), axis_name="batch"),
    "pmap": lambda f: jax.pmap(f, axis_name="batch"),
}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "unequal masks"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["all", "groups"])
@pytest.mark.parametrize("mapping", MAPS)
def test_synchronized_over_devices_equals_the_joint_batch(mapping, groups, masked, x64):
    x = jax.random.normal(jax.random.key(0), (8, 5, 3), jnp.float64) + jnp.arange(8.0)[:, None, None]
    _, params, stats = example()
    valid = jnp.ones((8, 5), bool)
    if masked:
        valid = (jax.random.uniform(jax.random.key(3), (8, 5)) > 0.4).at[2].set(False)  # one device has nothing

    def local(x, valid, params):
        mask = valid if masked else None
        y, new = batch_norm(x, params, stats, training=True, mask=mask, axis_name="batch", axis_index_groups=groups)
        return jnp.where(valid[:, None], y, 0), new

    def loss(x, params):
        y, new = MAPS[mapping](lambda x, valid: local(x, valid, params))(x, valid)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["var"] ** 2), (y, new)

    def joint_loss(x, params):
        total, parts = 0.0, []
        for group in groups or [list(range(8))]:
            rows = jnp.array(group)
            flat, mask = x[rows].reshape((-1, 3)), valid[rows].reshape(-1)
            y, new = batch_norm(flat, params, stats, training=True, mask=mask if masked else None)
            y = jnp.where(mask[:, None], y, 0)
            total += jnp.sum(jnp.sin(y)) + len(group) * jnp.sum(new["var"] ** 2)
            parts.append((rows, y.reshape((len(group), 5, 3)), new))
        return total, parts

    gradient, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    expected, parts = jax.grad(joint_loss, (0, 1), has_aux=True)(x, params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-9, atol=1e-10)
    for rows, group_y, group_stats in parts:
        chex.assert_trees_all_close(y[rows], group_y, rtol=1e-10, atol=1e-12)
        for row in rows:
            chex.assert_trees_all_close(jax.tree.map(lambda v: v[row], new), group_stats, rtol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_under_shard_map_the_state_leaves_replicated(masked, check_vma, x64):
    x = jax.random.normal(jax.random.key(0), (16, 3), jnp.float64)
    _, params, stats = example()
    valid = jnp.arange(16) % 5 > 0 if masked else jnp.ones(16, bool)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def local(x, valid, params):
        return batch_norm(x, params, stats, training=True, mask=valid if masked else None, axis_name="batch")

    specs = {"mesh": mesh, "in_specs": (P("batch"), P("batch"), P()), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(local, out_specs=(P("batch"), P()), **specs))

    def loss(f, x, params):
        y, new = f(x, valid, params)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["var"] ** 2), (y, new)

    def joint(x, valid, params):
        return batch_norm(x, params, stats, training=True, mask=valid if masked else None)

    got, expected = (jax.grad(loss, (1, 2), has_aux=True)(f, x, params) for f in (mapped, joint))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_groups_under_checked_shard_map_are_a_clear_error():
    params, stats = init_batch_norm(3)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def local(x):
        options = {"training": True, "axis_name": "batch", "axis_index_groups": GROUPS}
        return jax.grad(lambda x: batch_norm(x, params, stats, **options)[0].sum())(x)

    with pytest.raises(NotImplementedError, match=r"axis_index_groups does not work.*check_vma=True.*two axes"):
        jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("batch"), out_specs=P("batch")))(jnp.ones((16, 3)))


@pytest.mark.parametrize("outer", ["vmap", "pmap"])
def test_over_two_axes_at_once(outer, x64):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 3), jnp.float64)
    _, params, stats = example()
    inner = jax.vmap(lambda x: batch_norm(x, params, stats, training=True, axis_name=("a", "b")), axis_name="b")
    y, new = {"vmap": jax.vmap, "pmap": jax.pmap}[outer](inner, axis_name="a")(x)
    expected, joint = batch_norm(x.reshape((-1, 3)), params, stats, training=True)
    chex.assert_trees_all_close(y.reshape((-1, 3)), expected, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[1, 2], new), joint, rtol=1e-12)


def test_groups_of_a_vmapped_axis_whose_name_a_mesh_has_too():
    x = jax.random.normal(jax.random.key(0), (8, 5, 3))
    params, stats = init_batch_norm(3)

    def local(x):
        return batch_norm(x, params, stats, training=True, axis_name="batch", axis_index_groups=GROUPS)[0]

    expected = jax.vmap(local, axis_name="batch")(x)
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))):
        chex.assert_trees_all_close(jax.vmap(local, axis_name="batch")(x), expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_through_a_synchronization(x64):
    x = jax.random.normal(jax.random.key(0), (4, 3, 2), jnp.float64)
    _, stats = init_batch_norm(2, dtype=jnp.float64)

    def synchronized(x):
        f = jax.vmap(lambda x: batch_norm(x, {}, stats, training=True, axis_name="batch")[0], axis_name="batch")
        return jnp.sum(jnp.sin(f(x)))

    def joint(x):
        return jnp.sum(jnp.sin(oracle.batch_norm(x.reshape((-1, 2)), {}, (1,))[0]))

    got, expected = (jax.jit(jax.hessian(f))(x) for f in (synchronized, joint))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


STAGED = {
    "jit": jax.jit,
    "scan": lambda f: lambda x: jax.lax.scan(lambda carry, x: (carry, f(x)), 0, x[None])[1][0],
    "remat": jax.checkpoint,
}


@pytest.mark.parametrize("staged", STAGED)
@pytest.mark.parametrize("mapping", ["vmap", "vmap in groups", "shard_map"])
def test_differentiated_after_it_was_staged(mapping, staged, x64):
    x, params, stats = example((8, 2, 3))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(8, 2)) > 0.3)
    groups = GROUPS if mapping == "vmap in groups" else None

    def one(x, mask):
        return batch_norm(x, params, stats, training=True, mask=mask, axis_name="i", axis_index_groups=groups)[0]

    def mapped(x):
        if mapping != "shard_map":
            return jax.vmap(one, axis_name="i")(x, mask)
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        return jax.shard_map(one, mesh=mesh, in_specs=(P("i"), P("i")), out_specs=P("i"))(x, mask)

    loss = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.sin(f(x)).sum()))
    chex.assert_trees_all_close(loss(STAGED[staged](mapped))(x), loss(mapped)(x), rtol=1e-10, atol=1e-12)


@needs_jax_0_8
def test_one_collective_forward_and_one_backward():
    params, stats = init_batch_norm(3)

    def step(x):
        return jax.grad(lambda x: jnp.sum(batch_norm(x, params, stats, training=True, axis_name="batch")[0] ** 3))(x)

    text = jax.pmap(step, axis_name="batch").lower(jnp.ones((8, 4, 3))).compile().as_text()
    collectives = [line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert len(collectives) == 2


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = {"x": jnp.ones((4, 3)), "params": init_batch_norm(3)[0], "batch_stats": init_batch_norm(3)[1], "training": True}
BAD = {
    "integer x": ({"x": jnp.ones((4, 3), jnp.int32)}, TypeError, r"x must .*floating.*got int32.*astype"),
    "complex x": (
        {"x": jnp.ones((4, 3), jnp.complex64)},
        TypeError,
        r"batch_stats\['mean'\] must be complex.*complex64.*init_batch_norm\(…, dtype=jnp.complex64\)",
    ),
    "complex mean": (
        {"batch_stats": init_batch_norm(3, dtype=jnp.complex64)[1]},
        TypeError,
        r"batch_stats\['mean'\] must be real, as x is, float32",
    ),
    "complex variance": (
        {"batch_stats": {"mean": jnp.ones(3), "var": jnp.ones(3, jnp.complex64)}},
        TypeError,
        r"batch_stats\['var'\] must have a real floating-point dtype, got complex64",
    ),
    "complex result": ({"dtype": jnp.complex64}, TypeError, r"dtype must be real, as x is"),
    "misshapen scale": ({"params": {"scale": jnp.ones(4)}}, ValueError, r"params\['scale'\].*\(3,\).*got \(4,\)"),
    "unknown parameter": ({"params": {"gamma": jnp.ones(3)}}, ValueError, r"params.*'scale' and 'bias'.*gamma"),
    "no scale": ({"params": {"scale": None}}, ValueError, r"params\['scale'\] must be an array.*NoneType"),
    "no parameters": ({"params": None}, ValueError, r"params must be a mapping.*NoneType.*\{\}"),
    "missing state": ({"batch_stats": {"mean": jnp.ones(3)}}, ValueError, r"batch_stats.*'var'.*init_batch_norm"),
    "no state": ({"batch_stats": None}, ValueError, r"batch_stats must be a mapping.*NoneType"),
    "misshapen state": (
        {"batch_stats": {"mean": jnp.ones(3), "var": jnp.ones((1, 3))}},
        ValueError,
        r"batch_stats\['var'\].*\(3,\).*got \(1, 3\)",
    ),
    "axis out of range": ({"axis": 2}, ValueError, r"axis must lie in \[-2, 2\).*got 2"),
    "axis twice": ({"axis": (1, -1)}, ValueError, r"axis must not name an axis twice.*\(1, -1\)"),
    "no axis": ({"axis": ()}, ValueError, r"axis must be one feature axis or a non-empty"),
    "misshapen mask": (
        {"mask": jnp.ones(5, bool)},
        ValueError,
        r"mask must broadcast.*\(4, 3\).*\(4, 1\).*got shape \(5,\)",
    ),
    "mask of too many axes": ({"mask": jnp.ones((1, 4, 1), bool)}, ValueError, r"mask must broadcast.*\(1, 4, 1\)"),
    "integer mask": ({"mask": jnp.ones(4, jnp.int32)}, TypeError, r"mask must be boolean.*int32.*astype\(bool\)"),
    "unbound axis name": ({"axis_name": "devices"}, NameError, r"axis_name.*unbound 'devices'.*axis_name=None"),
    "groups without a name": ({"axis_index_groups": [[0]]}, ValueError, r"axis_index_groups needs axis_name"),
    "negative epsilon": ({"epsilon": -1e-5}, ValueError, r"epsilon.*at least 0.*-1e-05"),
    "vector epsilon": ({"epsilon": np.ones(3)}, TypeError, r"epsilon must be a real scalar"),
    "concrete negative epsilon": ({"epsilon": jnp.float32(-1)}, ValueError, r"epsilon.*at least 0.*-1.0"),
    "infinite epsilon": (
        {"epsilon": np.inf},
        ValueError,
        r"epsilon must be a real scalar finite and of at least 0.*inf",
    ),
    "statistics as params": ({"params": {"mean": jnp.ones(3), "var": jnp.ones(3)}}, ValueError, r"running statistics"),
    "variables as params": ({"params": {"params": {}}}, ValueError, r"collections: pass variables\['params'\]"),
    "concrete momentum": ({"momentum": jnp.float32(1.5)}, ValueError, r"momentum.*\[0, 1\].*1.5"),
    "no momentum": ({"momentum": None}, TypeError, r"momentum must be a real scalar.*None"),
    "momentum at inference": ({"momentum": 7, "training": False}, ValueError, r"momentum.*\[0, 1\].*7"),
    "text": ({"x": "a"}, TypeError, r"x must be an array, got str"),
    "axis of a float": ({"axis": 1.0}, ValueError, r"axis must be one feature axis.*1.0"),
    "integer scale": ({"params": {"scale": jnp.ones(3, int)}}, TypeError, r"params\['scale'\].*floating.*int32"),
    "integer result": ({"dtype": jnp.int32}, TypeError, r"dtype must be a floating-point dtype, got int32"),
    "mixed keys": ({"params": {"gamma": 1, 3: 4}}, ValueError, r"params must hold no other keys.*3, 'gamma'"),
    "no axis names": ({"axis_name": ()}, TypeError, r"axis_name must be .* got \(\)"),
    "momentum above 1": ({"momentum": 1.5}, ValueError, r"momentum.*\[0, 1\].*1.5.*PyTorch"),
    "negative momentum": ({"momentum": -0.1}, ValueError, r"momentum.*\[0, 1\].*-0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error_at_trace_time(case):
    change, kind, message = BAD[case]
    arguments = {**GOOD, **change}
    f = functools.partial(inspect.unwrap(batch_norm), **arguments)  # else the tests' type checker objects first
    with pytest.raises(kind, match=message):
        f() if case == "text" else jax.eval_shape(f)


def test_calls_of_one_shape_are_compiled_once():
    """Whatever the momentum, the epsilon and the values; outside of any program too."""
    x = jnp.arange(77.0).reshape(11, 7)
    params, stats = init_batch_norm(7)
    before = bnjax.norm._shared_program._cache_size()
    for step in range(1, 5):
        _, stats = batch_norm(x + step, params, stats, training=True, momentum=1 - 1 / (step + 1), epsilon=0.1 / step)
    assert bnjax.norm._shared_program._cache_size() == before + 1


def test_traced_training_is_an_error():
    arguments = {**GOOD}
    x, _ = arguments.pop("x"), arguments.pop("training")
    with pytest.raises(TypeError, match=r"training must be a Python bool.*static"):
        jax.jit(lambda x, training: inspect.unwrap(batch_norm)(x, training=training, **arguments))(x, True)


def test_groups_that_do_not_split_the_axis_are_an_error():
    arguments = {**GOOD}
    x = jnp.stack([arguments.pop("x")] * 4)
    for groups in ([[0, 1], [2]], [[0, 1]], [[0, 1], [1, 2]]):
        with pytest.raises(ValueError, match=r"axis_index_groups must split the 4 indices.*\[\[0, 1\], \[2, 3\]\]"):
            jax.vmap(
                lambda x, g=groups: batch_norm(x, axis_name="i", axis_index_groups=g, **arguments)[0], axis_name="i"
            )(x)


def test_moments_and_updates_check_their_input_too():
    with pytest.raises(TypeError, match="x must"):
        moments(jnp.ones((2, 2), int))
    with pytest.raises(ValueError, match=r"batch_stats\['mean'\]"):
        update_batch_stats(init_batch_norm(3)[1], moments(jnp.ones((4, 2))))
    for momentum in (-0.5, 1.5):
        with pytest.raises(ValueError, match=r"momentum.*\[0, 1\]"):
            update_batch_stats(init_batch_norm(2)[1], moments(jnp.ones((4, 2))), momentum=momentum)


@pytest.mark.parametrize("scale", [1e-16, 1e15, 3e18])
def test_the_gradient_is_right_wherever_float32_can_hold_the_variance(x64, scale):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.uniform(-1, 1, (640, 2)).astype(np.float32) for _ in range(2))
    x = x * np.float32(scale)
    params, batch_stats = init_batch_norm(2)

    def loss(x):
        return jnp.vdot(batch_norm(x, params, batch_stats, training=True, epsilon=0.0)[0], cotangent)

    got = jax.grad(loss)(jnp.asarray(x))
    wide = jnp.asarray(x, jnp.float64)
    expected = jax.grad(lambda x: jnp.vdot(oracle.batch_norm(x, {}, (1,), epsilon=0.0)[0], cotangent))(wide)
    np.testing.assert_allclose(got * scale, expected * scale, rtol=1e-4, atol=1e-5)
