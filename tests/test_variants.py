import functools
import inspect
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from scipy import stats as scipy_stats

from bnjax import batch_norm, init_batch_norm, variants
from bnjax.linen import BatchNorm, BatchRenorm, GhostBatchNorm, LpBatchNorm, NoisyBatchNorm
from bnjax.training import TrainState, cross_entropy, train_step
from bnjax.variants import lp_batch_norm, noisy_batch_norm

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
SILENT = {"unit_shift": 0.0, "unit_scale": 1.0, "sample_shift": 0.0, "sample_scale": 0.0}
NORMS = [1, 2, math.inf]
GROUPS = ((0, 3, 5, 6), (1, 2, 4, 7))
STATIC = ("training", "axis", "axis_name", "axis_index_groups", "dtype", "bessel_correction")
# Compiled, for speed; strengths of the noise and momenta are then traced.
batch = jax.jit(batch_norm, static_argnames=STATIC)
noisy = jax.jit(noisy_batch_norm, static_argnames=STATIC)
lp = jax.jit(lp_batch_norm, static_argnames=("p", *STATIC[:-1]))
CALLS = {"noisy": functools.partial(noisy, key=KEY), **{f"l_{p}": functools.partial(lp, p=p) for p in NORMS}}


def example(shape=(7, 3), dtype=jnp.float64):
    """Input, parameters and statistics away from their initial values."""
    rng, features = np.random.default_rng(0), shape[-1:]
    params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
    stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.5, 1.5, features)}
    as_arrays = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, dtype))
    return as_arrays((rng.normal(1, 2, shape), params, stats))


def mapped_by_shard_map(f, in_specs, out_specs):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True))


# --- noise: values ----------------------------------------------------------------------------------------------------


def noise(shape, unit_shift=0.5, unit_scale=1.25, sample_shift=0.1, sample_scale=0.1):
    """m and s of Algorithm 1: the output where the activation is 0, and by how much that at 1 exceeds it."""
    strengths = {"unit_shift": unit_shift, "unit_scale": unit_scale}
    strengths |= {"sample_shift": sample_shift, "sample_scale": sample_scale}
    features = shape[-1:]
    zeros, (_, stats) = {"scale": jnp.zeros(features), "bias": jnp.zeros(features)}, init_batch_norm(features)
    ones = {**zeros, "bias": jnp.ones(features)}
    f = functools.partial(noisy, jnp.zeros(shape), batch_stats=stats, training=True, key=KEY, **strengths)
    shift, shift_and_scale = (np.asarray(f(params=params)[0], np.float64) for params in (zeros, ones))
    return shift, shift_and_scale - shift


def assert_distributed(values, distribution):
    """The statistic of Kolmogorov and Smirnov is below its 1 % point."""
    result = scipy_stats.ks_1samp(np.ravel(values), distribution.cdf, method="asymp")
    assert result.statistic < 1.63 / math.sqrt(np.size(values))


def test_units_draw_from_uniform_distributions():
    shift, scale = noise((2, 20_000), sample_shift=0.0, sample_scale=0.0)
    np.testing.assert_array_equal(shift[0], shift[1])
    np.testing.assert_array_equal(scale[0], scale[1])
    assert_distributed(shift[0], scipy_stats.uniform(-0.5, 1))
    assert_distributed(scale[0], scipy_stats.uniform(1, 0.25))
    assert abs(np.corrcoef(shift[0], scale[0])[0, 1]) < 4 / math.sqrt(20_000)


def test_samples_draw_about_their_unit():
    shape = (2000, 50)
    shift, scale = noise(shape)
    unit_shift, unit_scale = noise(shape, sample_shift=0.0, sample_scale=0.0)
    shift, scale = shift - unit_shift, scale - unit_scale
    assert_distributed(shift, scipy_stats.uniform(-0.1, 0.2))
    assert_distributed(scale, scipy_stats.norm(0, 0.1))  # the deviation is 0.1, not the variance
    np.testing.assert_allclose([shift.std(), scale.std()], [0.1 / math.sqrt(3), 0.1], rtol=0.01)
    for a, b in ((shift, scale), *((v, np.roll(v, 1, axis)) for v in (shift, scale) for axis in range(2))):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(shift.size)


def test_strengths_scale_the_draws():
    strengths = {"unit_shift": 2.0, "unit_scale": 3.0, "sample_shift": 0.5, "sample_scale": 0.25}
    for name, value in strengths.items():
        weak, strong = (noise((6, 4), **{**SILENT, name: v}) for v in (value, 2 * value - (name == "unit_scale")))
        center = np.array([0.0, 1.0])[:, None, None]
        chex.assert_trees_all_close(np.stack(strong) - center, 2 * (np.stack(weak) - center), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_noise_it_is_batch_norm_exactly(dtype, training):
    x, params, stats = example(dtype=dtype)
    options = {"training": training, "momentum": 0.9, "epsilon": 1e-3, "mask": jnp.arange(7) % 3 > 0}
    options |= {"bessel_correction": True}
    silent = SILENT if training else {}  # and no key
    got = noisy(x, params, stats, key=KEY if training else None, **silent, **options)
    chex.assert_trees_all_equal(got, batch(x, params, stats, **options))


def test_noise_does_not_reach_the_statistics():
    x, params, stats = example(dtype=jnp.float32)
    for _ in range(2):
        y, new = noisy(x, params, stats, training=True, key=KEY)
        expected, stats = batch(x, params, stats, training=True)
        chex.assert_trees_all_equal(new, stats)
        assert jnp.abs(y - expected).max() > 0.1


def test_one_key_draws_the_same_and_another_something_else():
    x, params, stats = example(dtype=jnp.float32)

    def f(key):
        return noisy(x, params, stats, training=True, key=key)[0]

    keys = jax.random.split(KEY, 3)
    chex.assert_trees_all_close(jax.vmap(f)(keys), jnp.stack([f(key) for key in keys]), rtol=1e-6, atol=1e-6)
    assert all(jnp.abs(f(keys[0]) - f(key)).max() > 0.1 for key in keys[1:])
    chex.assert_trees_all_equal(f(jax.random.PRNGKey(0)), f(jax.random.key(0)))  # raw keys too


def test_several_feature_axes_and_a_leading_one():
    x = jax.random.normal(KEY, (4, 5, 3, 2))
    params, stats = init_batch_norm((4, 3))
    options = {"training": True, "axis": (0, 2), "key": KEY, "sample_shift": 0, "sample_scale": 0}
    y, _ = noisy(x, params, stats, **options)
    a, _ = batch(x, params, stats, training=True, axis=(0, 2))
    scale = jnp.std(y, (1, 3)) / jnp.std(a, (1, 3))  # of one unit the same for all samples
    shift = jnp.mean(y, (1, 3))
    assert len(np.unique(shift)) == len(np.unique(scale)) == 12
    chex.assert_trees_all_close(a * scale[:, None, :, None] + shift[:, None, :, None], y, rtol=1e-4, atol=1e-5)


def test_noise_is_added_before_rounding():
    x, params, stats = example(dtype=jnp.bfloat16)
    y, exact = (noisy(x, params, stats, training=True, key=KEY, dtype=d)[0] for d in (None, jnp.float32))
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))


# --- noise: derivatives, masks, mapped axes ---------------------------------------------------------------------------


def derivatives(f):
    """Gradient and Hessian in one compilation."""
    return jax.jit(lambda *args: (jax.grad(f, (0, 1))(*args), jax.hessian(f, (0, 1))(*args)))


def test_derivatives_are_those_of_a_scaled_batch_norm(x64):
    x, params, stats = example()
    mask = jnp.array([1, 1, 0, 1, 1, 0.5, 1])
    x = x.at[2].set(jnp.nan)  # masked: must not reach any derivative
    constant = {"scale": jnp.zeros(3), "bias": jnp.zeros(3)}
    draws = functools.partial(noisy, jnp.zeros_like(x), batch_stats=stats, training=True, key=KEY)
    shift = draws(constant)[0]
    scale = draws({**constant, "bias": jnp.ones(3)})[0] - shift

    def loss(y, new):
        return jnp.sum(jnp.where(mask[:, None] > 0, jnp.sin(y), 0)) + jnp.sum(new["var"] ** 2)

    def ours(x, params):
        return loss(*noisy_batch_norm(x, params, stats, training=True, key=KEY, mask=mask))

    def reference(x, params):
        a, new = batch_norm(x, params, stats, training=True, mask=mask)
        return loss(scale * a + shift, new)

    got, expected = (derivatives(f)(x, params) for f in (ours, reference))
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_output_is_linear_in_the_strengths(x64):
    x, params, stats = example()
    strengths = {"unit_shift": 0.5, "unit_scale": 1.25, "sample_shift": 0.1, "sample_scale": 0.1}
    f = jax.jit(lambda strengths: noisy_batch_norm(x, params, stats, training=True, key=KEY, **strengths)[0])
    stronger = {name: value + 1 for name, value in strengths.items()}
    y, derivative = jax.jvp(f, (strengths,), (dict.fromkeys(strengths, 1.0),))
    chex.assert_trees_all_close(f(stronger), y + derivative, rtol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_without_weight_keeps_the_state_and_is_finite(name):
    _, params, stats = example(dtype=jnp.float32)
    call = functools.partial(CALLS[name], training=True, **(SILENT if name == "noisy" else {}))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(x, params):
        y, new = call(x, params, stats, mask=jnp.zeros(4))
        return y.sum() + new["var"].sum(), (y, new)

    for fill in (2.0, np.nan, np.inf):
        x = jnp.full((4, 3), fill)
        got, (y, new) = gradients(x, params)
        chex.assert_trees_all_equal(new, stats)
        chex.assert_tree_all_finite((y, got))
        if fill == 2:
            chex.assert_trees_all_close(y, batch(x, params, stats, training=False)[0], rtol=1e-6)
    y, new = call(jnp.zeros((0, 3)), params, stats)
    assert y.shape == (0, 3)
    chex.assert_trees_all_equal(new, stats)


@pytest.mark.parametrize("name", CALLS)
def test_state_keeps_structure_and_dtypes(name):
    x, params, stats = example(dtype=jnp.float16)
    before = after = FrozenDict(mean=stats["mean"].astype(jnp.bfloat16), var=stats["var"].astype(jnp.float32), t=4)
    before = after = jax.tree.map(jnp.asarray, before)
    for _ in range(2):
        y, after = CALLS[name](x, params, after, training=True)
        assert y.dtype == jnp.float16
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert type(after) is FrozenDict
    inference = {"training": False, "dtype": jnp.float32}
    got, expected = (f(x, params, after, **inference) for f in (CALLS[name], batch))
    chex.assert_trees_all_equal(got, expected)
    assert got[0].dtype == jnp.float32


def test_inference_returns_the_state_as_it_was_given_and_needs_no_key():
    x, params, stats = example(dtype=jnp.float32)
    assert noisy_batch_norm(x, params, stats, training=False)[1] is stats
    assert lp_batch_norm(x, params, stats, p=1, training=False)[1] is stats


def test_on_devices_units_draw_together_and_samples_apart(x64):
    x, params, stats = example((16, 3))
    f = functools.partial(noisy_batch_norm, training=True)

    def local(x, params, key, sample=0):
        return f(x, params, stats, key=key, axis_name="batch", sample_shift=sample, sample_scale=sample)

    def loss(f, x, params):
        y, new = f(x, params, KEY)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["var"] ** 2), (y, new)

    def joint(x, params, key):
        return f(x, params, stats, key=key, sample_shift=0, sample_scale=0)

    mapped = mapped_by_shard_map(local, (P("batch"), P(), P()), (P("batch"), P()))
    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1), has_aux=True))(x, params) for f in (mapped, joint)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-13)

    sampled = functools.partial(local, params=jax.tree.map(jnp.zeros_like, params), key=KEY, sample=0.1)
    whole = mapped_by_shard_map(lambda x: sampled(x)[0], P("batch"), P("batch"))(x)
    assert len(np.unique(whole)) == whole.size
    vmapped = jax.jit(jax.vmap(lambda x: sampled(x)[0], axis_name="batch"))(x.reshape((8, 2, 3)))
    chex.assert_trees_all_close(vmapped.reshape((16, 3)), whole, rtol=1e-12)


# --- l_p norms: values ------------------------------------------------------------------------------------------------


def power_mean(x, p, axes, weights=None):
    """Mean and l_p norm by their definitions, features with the reduced axes of size one."""
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    mean, _, n = oracle.moments(x, axes, weights)
    w = jnp.ones(x.shape) if weights is None else jnp.broadcast_to(weights * 1.0, x.shape)
    magnitude = jnp.abs(jnp.where(w > 0, x, 0))
    if p == math.inf:
        return mean, magnitude.max(reduced, keepdims=True)
    return mean, ((w * magnitude**p).sum(reduced, keepdims=True) / n) ** (1 / p)


def definition(x, params, p, axes=(1,), epsilon=1e-5, weights=None):
    mean, norm = power_mean(x, p, axes, weights)
    y = oracle.batch_norm(x, params, axes, epsilon, statistics=(mean, norm**2))[0]
    reduced = tuple(a for a in range(x.ndim) if a not in axes)
    return y, {"mean": mean.squeeze(reduced), "var": norm.squeeze(reduced) ** 2}


compiled_definition = jax.jit(definition, static_argnums=(2, 3))
CASES = {
    "images, weights of examples": ((4, 3, 5, 2), (3,), (4, 1, 1, 1)),
    "channels first, mask of pixels": ((4, 3, 5, 2), (1,), (4, 1, 5, 2)),
    "two feature axes": ((4, 3, 5), (0, 2), (1, 3, 1)),
    "mask that differs between features": ((9, 3), (1,), (9, 3)),
    "many elements": ((5000, 2), (1,), (5000, 1)),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, p, x64):
    shape, axes, weights_shape = CASES[case]
    rng = np.random.default_rng(1)
    x, features = jnp.asarray(rng.standard_normal(shape) + 0.5), tuple(shape[a] for a in axes)
    params = {name: jnp.asarray(rng.standard_normal(features)) for name in ("scale", "bias")}
    _, stats = init_batch_norm(features, dtype=jnp.float64)
    mask = None
    if weights_shape:
        weights = rng.random(weights_shape) * (rng.random(weights_shape) < 0.7)
        weights[0] = 0.5
        mask = jnp.asarray(weights > 0 if "mask" in case else weights)
        x = jnp.asarray(np.where(weights > 0, x, 100 * x))  # no norm may see these
    y, new = lp(x, params, stats, p=p, training=True, axis=axes, momentum=0.0, epsilon=1e-3, mask=mask)
    expected, moved = compiled_definition(x, params, p, axes, 1e-3, mask)
    chex.assert_trees_all_close(y, expected, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(new, moved, rtol=1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_several_steps_then_inference_have_a_closed_form(p, x64):
    x, params, _ = example()
    _, stats = init_batch_norm(3, dtype=jnp.float64)
    rho, steps = 0.8, 5
    for _ in range(steps):
        _, stats = lp(x, params, stats, p=p, training=True, momentum=rho)
    norm = np.linalg.norm(x, p, axis=0) / (1 if p == math.inf else len(x) ** (1 / p))
    mean, var = (1 - rho**steps) * x.mean(0), rho**steps + (1 - rho**steps) * norm**2
    chex.assert_trees_all_close(stats, {"mean": mean, "var": var}, rtol=1e-12)
    got, expected = (f(x, params, stats, training=False, epsilon=1e-3) for f in (functools.partial(lp, p=p), batch))
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("p", NORMS)
def test_of_another_scale_the_same_but_not_of_another_mean(p, x64):
    x, params, stats = example()
    f = functools.partial(lp, params=params, batch_stats=stats, p=p, training=True, epsilon=0.0)
    chex.assert_trees_all_close(f(3.7 * x)[0], f(x)[0], rtol=1e-12)
    assert jnp.abs(f(x + 10)[0] - f(x)[0]).max() > 0.1


@pytest.mark.parametrize("p", NORMS)
def test_half_precision_does_not_overflow(p):
    x = jnp.array([[6e4, 1.0], [-6e4, 3.0], [3e4, 2.0], [0.0, 2.0]], jnp.float16)
    y, new = lp(x, {}, init_batch_norm(2)[1], p=p, training=True, momentum=0.0)
    expected, moved = compiled_definition(jnp.asarray(x, jnp.float32), {}, p)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2e-3)
    chex.assert_trees_all_close(new, moved, rtol=1e-5)
    large = jnp.array([[1e15], [-3e15]], jnp.bfloat16)
    y, _ = lp(large, {}, init_batch_norm(1)[1], p=p, training=True)
    np.testing.assert_allclose(np.ravel(y), np.array([1, -1]) * {1: 1, 2: 0.894, math.inf: 0.667}[p], rtol=1e-2)


# --- l_p norms: derivatives -------------------------------------------------------------------------------------------

WEIGHTS = {"no mask": None, "weights": np.array([0.5, 2, 0, 1, 1, 0, 3.0])}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("masking", WEIGHTS)
def test_derivatives_are_those_of_the_definition(masking, p, x64):
    x, params, stats = example()
    mask = WEIGHTS[masking]
    valid = jnp.ones((7, 1), bool) if mask is None else (mask > 0)[:, None]
    x = jnp.where(valid, x, jnp.nan)  # what is masked must not reach any derivative

    def loss(y, new):
        return jnp.sum(jnp.where(valid, jnp.sin(y), 0)) + jnp.sum(jnp.sin(new["var"]) + new["mean"] ** 2)

    def ours(x, params):
        return loss(*lp_batch_norm(x, params, stats, p=p, training=True, momentum=0.0, mask=mask))

    def reference(x, params):
        weights = None if mask is None else mask[:, None]
        return loss(*definition(jnp.where(valid, x, 0), params, p, weights=weights))

    got, expected = (derivatives(f)(x, params) for f in (ours, reference))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", [1, math.inf])
def test_derivatives_agree_with_finite_differences(p, x64):
    x, params, stats = example()

    def f(x, scale, weights):
        y, new = lp_batch_norm(x, {**params, "scale": scale}, stats, p=p, training=True, mask=weights)
        return jnp.sin(y), new

    check_grads(jax.jit(f), (x, params["scale"], jnp.linspace(0.5, 2, 7)), 1, rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_weights_are_differentiable_at_zero_too(p, x64):
    x, params, stats = example()
    weights = jnp.array([1, 0, 2, 0, 1, 1, 0.5])

    def ours(weights):
        y, new = lp_batch_norm(x, params, stats, p=p, training=True, momentum=0.0, mask=weights)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["var"])

    def reference(w):
        w, n = w[:, None], w.sum()
        mean, norm = (w * x).sum(0) / n, ((w * jnp.abs(x) ** p).sum(0) / n) ** (1 / p)
        y = oracle.batch_norm(x, params, (1,), statistics=(mean[None], norm[None] ** 2))[0]
        return jnp.sum(jnp.sin(y)) + jnp.sum(norm**2)

    chex.assert_trees_all_close(jax.jit(jax.grad(ours))(weights), jax.jit(jax.grad(reference))(weights), rtol=1e-10)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("p", NORMS)
def test_derivatives_at_zeros(p, x64):
    x, params, stats = example()
    x = x.at[:, 0].set(0).at[1, 1].set(0)  # a feature of zeros, and one with a zero
    call = functools.partial(lp_batch_norm, params=params, batch_stats=stats, p=p, training=True, momentum=0.0)

    def squared_norm(x):
        return call(x)[1]["var"].sum()

    def loss(x):
        return jnp.sum(jnp.sin(call(x, epsilon=0.1)[0]))

    of_norm, gradient, third = jax.jit(
        lambda x: (
            jax.jvp(jax.grad(squared_norm), (x,), (jnp.ones_like(x),)),
            jax.grad(loss)(x),
            jax.jvp(jax.hessian(loss), (x,), (jnp.ones_like(x),)),
        )
    )(x)
    chex.assert_tree_all_finite((of_norm, gradient, third))
    assert np.sum(np.abs(of_norm[0]) > 1e-15) == (2 if p == math.inf else 13)  # all but the zeros
    second = {1: 0, 2: 2 / 7, math.inf: 0}[p]  # of the squared norm at 0
    np.testing.assert_allclose(of_norm[1][:, 0], second, rtol=1e-12)
    sine = params["scale"][0] ** 2 * jnp.sin(params["bias"][0]) / 0.1
    expected = -sine * (jnp.eye(7) - 1 / 7)  # of centring alone: y and mean are 0, where the norm has no influence
    chex.assert_trees_all_close(third[0][:, 0, :, 0], expected, rtol=1e-12, atol=1e-12)


def test_the_largest_share_the_derivative(x64):
    x = jnp.array([[2.0], [-2.0], [1.0], [2.0]])
    _, stats = init_batch_norm(1, dtype=jnp.float64)

    def squared_norm(x, **options):
        return lp(x, {}, stats, p=math.inf, training=True, momentum=0.0, **options)[1]["var"].sum()

    chex.assert_trees_all_close(jax.grad(squared_norm)(x), 4 * jnp.array([[1], [-1], [0], [1]]) / 3, rtol=1e-12)
    weights = jnp.array([0.1, 3, 1, 0])
    got = jax.grad(lambda x: squared_norm(x, mask=weights))(x)
    chex.assert_trees_all_close(got, 4 * jnp.array([[1], [-1], [0], [0]]) / 2, rtol=1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_only_x_is_kept_for_the_backward_pass(p):
    x = jax.random.normal(KEY, (64, 32), jnp.bfloat16)
    params, stats = init_batch_norm(32)
    f = jax.jit(lambda x, p_: jax.vjp(lambda x, q: lp_batch_norm(x, q, stats, p=p, training=True)[0], x, p_)[1])
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(f(x, params))}
    (large,) = [leaf for leaf in kept.values() if leaf.size >= x.size]
    chex.assert_trees_all_equal(large, x)
    assert sum(leaf.nbytes for leaf in kept.values()) < 1.5 * x.nbytes


@pytest.mark.parametrize("p", NORMS)
def test_vmapped_over_parameters_statistics_and_masks(p):
    x, params, stats = example((16, 3), jnp.float32)
    masks = np.random.default_rng(1).uniform(size=(2, 16)) > 0.3
    many = jax.tree.map(lambda v: np.stack([v, 2 * v]), (params, stats))
    f = jax.jit(lambda params, stats, mask: lp_batch_norm(x, params, stats, p=p, training=True, mask=mask))
    got = jax.jit(jax.vmap(f))(*many, masks)
    for i in range(2):
        expected = f(*jax.tree.map(lambda v: v[i], many), masks[i])
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[i], got), expected, rtol=1e-5, atol=1e-6)


# --- l_p norms: mapped axes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "unequal masks"])
@pytest.mark.parametrize("p", NORMS)
def test_under_shard_map_it_is_that_of_the_whole_batch(p, masked, x64):
    x, params, stats = example((40, 3))
    x = x.at[:, 0].set(jnp.round(x[:, 0]))  # zeros, and several largest on several devices
    valid = (np.arange(40) % 3 > 0) & (np.arange(40) // 5 != 2)  # one device has nothing

    def call(x, valid, params, axis_name=None):
        mask = valid if masked else None
        y, new = lp_batch_norm(x, params, stats, p=p, training=True, momentum=0.5, mask=mask, axis_name=axis_name)
        return jnp.where(valid[:, None], y, 0), new

    def loss(f, x, params):
        y, new = f(x, valid, params)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new["var"] ** 2), (y, new)

    specs = (P("batch"), P("batch"), P())
    mapped = mapped_by_shard_map(functools.partial(call, axis_name="batch"), specs, (P("batch"), P()))
    x = jnp.where(valid[:, None], x, jnp.nan) if masked else x
    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1), has_aux=True))(x, params) for f in (mapped, call)
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)
    chex.assert_tree_all_finite(got)


@pytest.mark.parametrize(("mapping", "p"), [(jax.vmap, 1), (jax.vmap, math.inf), (jax.pmap, math.inf)])
def test_groups_normalize_separately(mapping, p, x64):
    x, params, stats = example((8, 5, 3))

    def local(x):
        options = {"training": True, "axis_name": "batch", "axis_index_groups": GROUPS}
        return lp_batch_norm(x, params, stats, p=p, **options)

    mapped = mapping(local, axis_name="batch")
    y, new = (jax.jit(mapped) if mapping is jax.vmap else mapped)(x)
    for group in GROUPS:
        joint, joint_stats = lp(x[jnp.array(group)].reshape((-1, 3)), params, stats, p=p, training=True)
        chex.assert_trees_all_close(y[jnp.array(group)].reshape((-1, 3)), joint, rtol=1e-10, atol=1e-12)
        for row in group:
            chex.assert_trees_all_close(jax.tree.map(lambda v: v[row], new), joint_stats, rtol=1e-12)


@pytest.mark.parametrize("p", [1, math.inf])
def test_second_derivatives_through_a_synchronization(p, x64):
    x = jax.random.normal(KEY, (4, 3, 2), jnp.float64)
    _, stats = init_batch_norm(2, dtype=jnp.float64)

    def call(x, **options):
        return jnp.sin(lp_batch_norm(x, {}, stats, p=p, training=True, **options)[0])

    def synchronized(x):
        return jax.vmap(functools.partial(call, axis_name="batch"), axis_name="batch")(x).sum()

    joint = jax.jit(jax.hessian(lambda x: call(x.reshape((-1, 2))).sum()))(x)
    chex.assert_trees_all_close(jax.jit(jax.hessian(synchronized))(x), joint, rtol=1e-9, atol=1e-11)


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = {"x": jnp.ones((4, 3)), "params": {}, "batch_stats": init_batch_norm(3)[1], "training": True}
BAD_NOISE = {
    "no key": ({"key": None}, TypeError, r"key must be a single random key in training, got None.*jax.random.key"),
    "several keys": ({"key": jax.random.split(KEY, 2)}, TypeError, r"key must be a single.*got key<fry>\[2\]"),
    "key of floats": ({"key": jnp.ones(2)}, TypeError, r"key must be a single.*got float32\[2\]"),
    "negative shift": ({"unit_shift": -0.5}, ValueError, r"unit_shift must be.*at least 0, got -0.5. Pass 0"),
    "small scale": ({"unit_scale": jnp.float32(0.5)}, ValueError, r"unit_scale must be.*at least 1, got 0.5. Pass 1"),
    "range": ({"sample_shift": (0, 1)}, TypeError, r"sample_shift must be a real scalar.*got \(0, 1\)"),
    "array": ({"sample_scale": jnp.ones(3)}, TypeError, r"sample_scale must be a real scalar.*got float32\[3\]"),
    "NaN": ({"sample_scale": math.nan}, ValueError, r"sample_scale must be.*at least 0, got nan"),
    "integer result": ({"dtype": jnp.int32}, TypeError, r"dtype must be a real floating-point dtype, got int32"),
    "as batch_norm": ({"axis": 2}, ValueError, r"axis must lie in \[-2, 2\).*got 2"),
}
BAD_NORM = {
    "another norm": ({"p": 3}, ValueError, r"p must be 1, 2 or infinity.*got 3.*math.inf"),
    "text": ({"p": "inf"}, ValueError, r"p must be 1, 2 or infinity.*got 'inf'"),
    "NaN": ({"p": math.nan}, ValueError, r"p must be 1, 2 or infinity.*got nan"),
    "as batch_norm": ({"momentum": 2}, ValueError, r"momentum.*\[0, 1\].*got 2"),
    "unbound axis name": ({"axis_name": "devices"}, NameError, r"axis_name.*unbound 'devices'"),
}


@pytest.mark.parametrize("case", BAD_NOISE)
def test_bad_noise_is_a_clear_error_at_trace_time(case):
    change, kind, message = BAD_NOISE[case]
    with pytest.raises(kind, match=message):
        jax.eval_shape(functools.partial(inspect.unwrap(noisy_batch_norm), **{**GOOD, "key": KEY, **change}))


@pytest.mark.parametrize("case", BAD_NORM)
def test_a_bad_norm_is_a_clear_error_at_trace_time(case):
    change, kind, message = BAD_NORM[case]
    with pytest.raises(kind, match=message):
        jax.eval_shape(functools.partial(inspect.unwrap(lp_batch_norm), **{**GOOD, "p": 1, **change}))


def test_a_traced_norm_is_an_error():
    with pytest.raises(ValueError, match=r"p must be 1, 2 or infinity, a static number"):
        jax.jit(lambda p: inspect.unwrap(lp_batch_norm)(p=p, **GOOD)[0])(1.0)


# --- layers -----------------------------------------------------------------------------------------------------------

LAYERS = {"noisy": NoisyBatchNorm, **{f"l_{p}": functools.partial(LpBatchNorm, p=p) for p in (1, math.inf)}}


class Network(nn.Module):
    norm: object = BatchNorm

    @nn.compact
    def __call__(self, x, *, training, mask=None):
        norm = self.norm(use_running_average=not training, momentum=0.9, name="norm")
        return nn.Dense(2)(nn.relu(norm(nn.Dense(8)(x), mask=mask)))


@functools.partial(jax.jit, static_argnums=0)
def initial(model, x):
    return model.init(KEY, x, training=True)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_replace_batch_norm_in_a_model(name):
    x = jax.random.normal(KEY, (16, 3))
    variables, model = initial(Network(), x), Network(LAYERS[name])
    chex.assert_trees_all_equal(initial(model, x), variables)
    call = {"training": True, "mutable": ["batch_stats"], "rngs": {"noise": KEY}, "mask": jnp.arange(16)[:, None] > 2}

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(model):
        y, updates = model.apply(variables, x, **call)
        return y, updates, model.apply({**variables, **updates}, x, training=False)  # which needs no key

    (y, updates, _), (expected, _, _) = outputs(model), outputs(Network())
    assert jnp.abs(y - expected).max() > 1e-2
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_functions(name):
    x = jax.random.normal(KEY, (4, 5, 3), jnp.bfloat16)
    options = {"axis": 1, "momentum": 0.5, "epsilon": 1e-2}
    layer = LAYERS[name](use_running_average=False, dtype=jnp.float32, **options)
    rngs = {"noise": KEY}
    variables = jax.jit(layer.init)(KEY, x)
    y, updates = jax.jit(lambda: layer.apply(variables, x, mutable=["batch_stats"], rngs=rngs))()
    if name == "noisy":
        key = layer.apply(variables, method=lambda layer: layer.make_rng("noise"), rngs=rngs)
        f = functools.partial(noisy, key=key)
    else:
        f = functools.partial(lp, p=layer.p)
    expected = f(x, variables["params"], variables["batch_stats"], training=True, dtype=jnp.float32, **options)
    chex.assert_trees_all_close((y, updates["batch_stats"]), expected, rtol=1e-4, atol=1e-6)


def test_silent_layer_is_batch_norm():
    x = jax.random.normal(KEY, (16, 3))
    variables = initial(Network(), x)
    silent = functools.partial(NoisyBatchNorm, bessel_correction=True, **SILENT)
    call = {"training": True, "mutable": ["batch_stats"], "rngs": {"noise": KEY}}
    outputs = [
        jax.jit(lambda variables, x: Network(norm).apply(variables, x, **call))(variables, x)
        for norm in (silent, functools.partial(BatchNorm, bessel_correction=True))
    ]
    chex.assert_trees_all_equal(*outputs)


def test_layers_of_one_model_draw_apart():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [NoisyBatchNorm(use_running_average=False)(x) for _ in range(2)]

    x = jax.random.normal(KEY, (8, 3))

    @jax.jit
    def outputs():
        variables = Pair().init(KEY, x)
        return Pair().apply(variables, x, rngs={"noise": KEY}, mutable=["batch_stats"])[0]

    a, b = outputs()
    assert jnp.abs(a - b).max() > 0.1


def test_missing_noise_key_is_a_clear_error():
    x = jnp.ones((16, 3))
    variables = initial(Network(), x)
    apply = functools.partial(Network(NoisyBatchNorm).apply, training=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"'noise' where norm uses.*Pass rngs=\{'noise': key\}"):
        jax.eval_shape(apply, variables, x)


def test_arguments_of_other_layers_are_errors():
    with pytest.raises(TypeError, match="bessel_correction"):
        LpBatchNorm(p=1, bessel_correction=True)
    with pytest.raises(TypeError, match="'p'"):
        LpBatchNorm()


@pytest.mark.parametrize("name", LAYERS)
def test_accumulating_micro_batches_is_an_error(name):
    x, y = jnp.ones((16, 3)), jnp.zeros(16, int)
    model = Network(LAYERS[name])
    variables = initial(Network(), x)
    apply_fn = functools.partial(model.apply, rngs={"noise": KEY})
    state = TrainState.create(apply_fn=apply_fn, tx=optax.sgd(0.1), **variables)
    step = functools.partial(train_step, state, x, y, objective=cross_entropy)
    jax.eval_shape(step)
    with pytest.raises(ValueError, match=r"accumulate_steps.*norm \((Noisy|Lp)BatchNorm\).*Use bnjax.linen.BatchNorm"):
        jax.eval_shape(functools.partial(step, accumulate_steps=2))


@pytest.mark.parametrize("name", ["batch_renorm", "lp_batch_norm", "noisy_batch_norm", "ghost_batch_norm"])
def test_complex_input_is_refused_where_only_real_numbers_have_a_meaning(name):
    own = {"lp_batch_norm": {"p": 1}, "noisy_batch_norm": {"key": KEY}, "ghost_batch_norm": {"ghost_size": 2}}
    x, (params, stats) = jnp.ones((4, 3), jnp.complex64), init_batch_norm(3, dtype=jnp.complex64)
    with pytest.raises((TypeError, ValueError), match="x must have a real floating-point dtype, got complex64"):
        inspect.unwrap(getattr(variants, name))(x, params, stats, training=True, **own.get(name, {}))


@pytest.mark.parametrize("layer", [BatchRenorm, LpBatchNorm, NoisyBatchNorm, GhostBatchNorm])
def test_layers_refuse_complex_input_as_their_functions_do(layer):
    own = {GhostBatchNorm: {"ghost_size": 2}, LpBatchNorm: {"p": 1}}
    keys = {"params": KEY, "noise": KEY}
    with pytest.raises((TypeError, ValueError), match="x must have a real floating-point dtype, got complex64"):
        layer(use_running_average=False, **own.get(layer, {})).init(keys, jnp.ones((4, 3), jnp.complex64))


def test_gradients_of_the_largest_magnitude_are_finite_where_nothing_has_weight():
    params, stats = init_batch_norm(2)
    x, mask = jnp.arange(1.0, 9).reshape((4, 2)), jnp.zeros((4, 1))

    def loss(x):
        return jnp.sin(lp_batch_norm(x, params, stats, training=True, p=math.inf, mask=mask)[0]).sum()

    expected = jax.grad(lambda x: jnp.sin(batch_norm(x, params, stats, training=False)[0]).sum())(x)
    chex.assert_trees_all_close(jax.grad(loss)(x), expected, rtol=1e-5)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("largest", [1.0, -1.0, 0.7])
def test_the_largest_magnitude_has_the_derivative_of_its_element(largest):
    x, c = jnp.array([[largest], [0.5], [-0.25]]), jnp.array([[1.0], [-2.0], [5.0]])

    def ours(x, mask=None):
        stats = init_batch_norm(1)[1]
        y = lp_batch_norm(x, {}, stats, p=math.inf, training=True, epsilon=0.1, mask=mask)[0]
        return (y[:3] * c).sum()

    def plain(x):
        return ((x - x.mean()) / jnp.sqrt(jnp.square(jnp.abs(x).max()) + 0.1) * c).sum()

    value, expected = jax.value_and_grad(plain)(x)
    hidden, mask = jnp.concatenate([x, jnp.full((1, 1), 9.0)]), jnp.array([True, True, True, False])
    for found, gradient in (jax.value_and_grad(ours)(x), jax.value_and_grad(ours)(hidden, mask)):
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(gradient[:3], expected, rtol=1e-5, atol=1e-6)
