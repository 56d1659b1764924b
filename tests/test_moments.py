import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from versions import JAX

import bnjax
from bnjax import Moments, _exact, merge_moments, moments

pytestmark = pytest.mark.core

SIZES = (2, 3, 17, 255, 256, 257, 1000, 65_537, 1_000_000)
jitted = jax.jit(moments, static_argnames=("axis",))


@pytest.mark.parametrize("outlier", [False, True], ids=["normal", "outlier first"])
@pytest.mark.parametrize("n", SIZES)
def test_variance_is_accurate_for_any_mean_and_batch_size(n, outlier):
    rng = np.random.default_rng(n)
    for ratio in (0, 1, 10, 100, 1e3, 1e4, 1e5):
        x = rng.standard_normal((n, 3))
        if outlier:
            x[0] += 1e3
        x = (x + ratio).astype(np.float32)
        mean, var = oracle.exact_moments(x)
        got = jitted(x)
        error = np.abs(np.asarray(got.var, np.float64) - var) / var
        assert error.max() < (1e-4 if ratio <= 100 else 1e-3), (ratio, error)
        np.testing.assert_allclose(got.mean, mean.astype(np.float64), rtol=1e-5, atol=1e-5 * np.sqrt(var.max()))
        assert got.count == n


@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 9, 11, 5), -1), ((5, 2000), 0), ((7, 3, 400), 1), ((4, 3, 5, 6), (1, 3))]
)
def test_variance_is_accurate_for_any_layout(shape, axis):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 3 + 3e4).astype(np.float32)
    axes = tuple(np.atleast_1d(axis) % len(shape))
    reduced = tuple(a for a in range(len(shape)) if a not in axes)
    _, var = oracle.exact_moments(x, reduced)
    got = jitted(x, axis=axis)
    assert got.mean.shape == tuple(shape[a] for a in axes)
    np.testing.assert_allclose(got.var, var.astype(np.float64), rtol=1e-3)


def test_constant_input_has_exactly_no_variance():
    got = moments(jnp.full((1000, 2), 12345.678))
    assert (got.var == 0).all()
    np.testing.assert_allclose(got.mean, np.float32(12345.678), rtol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_input_has_float32_moments(dtype):
    x = jax.random.normal(jax.random.key(0), (5000, 2)).astype(dtype) + jnp.asarray(7, dtype)
    got = moments(x)
    chex.assert_type(got, jnp.float32)
    _, var = oracle.exact_moments(np.asarray(x, np.float64))
    np.testing.assert_allclose(got.var, var.astype(np.float64), rtol=1e-5)


def test_float64_is_kept(x64):
    x = np.random.default_rng(0).standard_normal((1000, 2)) + 1e8
    got = moments(x)
    chex.assert_type(got, jnp.float64)
    _, var = oracle.exact_moments(x)
    np.testing.assert_allclose(got.var, var.astype(np.float64), rtol=1e-9)


def test_masked_values_have_no_influence():
    x = np.random.default_rng(0).standard_normal((700, 4)).astype(np.float32)
    mask = np.random.default_rng(1).random(700) < 0.6
    expected = moments(x[mask])
    for bad in (0.0, np.nan, np.inf, -np.inf, 3e38):
        filled = np.where(mask[:, None], x, np.float32(bad))
        got = jax.jit(lambda x: moments(x, mask=mask))(filled)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 777, 4095])
def test_a_single_valid_element_that_no_sample_hits(position):
    x = np.full((4096, 2), np.nan, np.float32)
    x[position] = (1e5, -3)
    got = jitted(x, mask=np.arange(4096) == position)
    np.testing.assert_array_equal(got.mean, x[position])
    assert (got.var == 0).all()
    assert got.count == 1


def test_sparse_mask_is_as_accurate_as_the_whole():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((100_000, 2)) + 1e4).astype(np.float32)
    mask = np.zeros(100_000, bool)
    mask[rng.choice(100_000, 50, replace=False)] = True
    _, var = oracle.exact_moments(x[mask])
    np.testing.assert_allclose(jitted(x, mask=mask).var, var.astype(np.float64), rtol=1e-4)


@pytest.mark.parametrize("ratio", [0, 10, 100, 1e5])
def test_mask_that_leaves_only_the_outlier_in_the_sample(ratio):
    n = 65_537
    x = (np.random.default_rng(0).standard_normal((n, 1)) + ratio).astype(np.float32)
    x[0] += 1e3
    mask = np.arange(n) % 2 == 1
    mask[0] = True
    _, var = oracle.exact_moments(x[mask])
    np.testing.assert_allclose(jitted(x, mask=mask).var, var.astype(np.float64), rtol=1e-4 if ratio <= 100 else 1e-3)


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-12])
def test_weights_that_hide_the_sample(small, offset):
    rare = np.arange(1024) % 4 == 1  # just those that are sampled
    x = np.where(rare, 0, offset + np.random.default_rng(0).standard_normal(1024)).astype(np.float32)[:, None]
    weights = np.where(rare, small, 1).astype(np.float32)
    w, exact = weights.astype(np.float64)[:, None] / weights.sum(dtype=np.float64), x.astype(np.float64)
    var = (w * (exact - (w * exact).sum(0)) ** 2).sum(0)
    np.testing.assert_allclose(jitted(x, mask=weights).var, var, rtol=1e-3 if offset > 100 else 1e-4)


def test_negative_weights_are_an_error_or_count_as_zero():
    x, weights = jnp.arange(4.0)[:, None], jnp.array([1.0, 1, -1, 1])
    with pytest.raises(ValueError, match=r"mask must hold non-negative sample weights.*-1"):
        moments(x, mask=weights)
    chex.assert_trees_all_close(jitted(x, mask=weights), moments(x, mask=weights > 0))


def test_weights_are_repetitions():
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    weights = np.array([0, 1, 3, 2, 0, 1], np.float32)
    repeated = np.repeat(x, weights.astype(int), axis=0)
    chex.assert_trees_all_close(moments(x, mask=weights), moments(repeated), rtol=1e-5)


def test_mask_shapes_that_mean_the_same():
    x = jax.random.normal(jax.random.key(0), (4, 3, 5, 2))
    rows = jnp.array([True, False, True, True])
    shapes = (rows[:, None, None], rows[:, None, None, None], jnp.broadcast_to(rows[:, None, None], (4, 3, 5)))
    results = [moments(x, mask=mask) for mask in shapes]
    chex.assert_trees_all_close(*results)
    chex.assert_trees_all_close(results[0], moments(x[rows]), rtol=1e-6)
    assert results[0].count == 45


def test_mask_that_differs_between_features_counts_each():
    x = jnp.array([[1.0, 10.0], [3.0, 20.0], [5.0, 60.0]])
    got = moments(x, mask=jnp.array([[True, True], [True, False], [False, True]]))
    np.testing.assert_allclose(got.mean, [2, 35])
    np.testing.assert_allclose(got.var, [1, 625])
    np.testing.assert_allclose(got.count, [2, 2])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_an_empty_batch_has_zero_moments(shape):
    chex.assert_trees_all_equal(moments(jnp.zeros(shape)), Moments(jnp.zeros(3), jnp.zeros(3), jnp.zeros(())))


def test_no_reduced_axis():
    got = moments(jnp.array([1.0, 2.0]), axis=0)
    chex.assert_trees_all_equal(got, Moments(jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.ones(())))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=5), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1e4]))
def test_merging_any_split_gives_the_whole(cuts, seed, offset):
    x = (np.random.default_rng(seed).standard_normal((30, 2)) + offset).astype(np.float32)
    parts = [moments(part) for part in np.split(x, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_moments(merged, part)
    mean, var = oracle.exact_moments(x)
    np.testing.assert_allclose(merged.mean, mean.astype(np.float64), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.var, var.astype(np.float64), rtol=2e-3 if offset else 1e-5)
    assert merged.count == 30


def test_merging_with_an_empty_batch_changes_nothing():
    a, empty = moments(jnp.array([[1e5], [2e5]])), moments(jnp.zeros((0, 1)))
    chex.assert_trees_all_equal(merge_moments(a, empty), a)
    chex.assert_trees_all_equal(merge_moments(empty, a), a)
    chex.assert_trees_all_equal(merge_moments(empty, empty), empty)


def test_merging_different_features_is_an_error():
    with pytest.raises(ValueError, match=r"b must hold moments of the same features.*\(2,\).*\(3,\)"):
        merge_moments(moments(jnp.ones((4, 2))), moments(jnp.ones((4, 3))))


def test_jitted_once_for_any_values():
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(bnjax.moments, n=1))
    for seed in range(3):
        traced(jax.random.normal(jax.random.key(seed), (8, 2)))


def test_a_mask_that_hides_the_sampled_elements_of_huge_values():
    """About a provisional mean of zero the squares overflow, although the variance does not."""
    x = (1e20 + 1e17 * np.random.default_rng(0).normal(size=(1024, 1))).astype(np.float32)
    mask = np.arange(1024) % 4 != 1
    m = bnjax.moments(x, mask=mask)
    kept = x[mask].astype(np.float64)
    np.testing.assert_allclose(m.mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(m.var, kept.var(0), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_counts_beyond_the_integers_of_float32(masked):
    large = Moments(jnp.zeros(1), jnp.ones(1), jnp.float32(2**24))
    one = moments(jnp.full((1, 1), 5.0), mask=jnp.ones((1, 1)) if masked else None)
    m = jax.lax.fori_loop(0, 1001, lambda _, m: merge_moments(m, one), large)
    assert int(m.count) + int(m.remainder) == 2**24 + 1001
    assert m.count == np.float32(2**24 + 1001)
    np.testing.assert_allclose(m.mean, 5005 / (2**24 + 1001), rtol=1e-5)
    both = merge_moments(m, m)
    assert int(both.count) + int(both.remainder) == 2 * (2**24 + 1001)


@pytest.mark.exhaustive
def test_a_count_of_many_elements_is_exact():
    count = 2**24 + 3
    x = jnp.zeros((count, 1), jnp.float16)
    mask = jnp.abs(jnp.arange(count) - 6) != 1  # two are hidden, so that what is left has no float32
    for m, expected in ((moments(x), count), (moments(x, mask=mask), count - 2)):
        assert m.count == np.float32(expected)
        assert int(m.count) + int(m.remainder) == expected
    halves = moments(x, mask=jnp.full((count, 1), 0.5))
    assert halves.count == 0.5 * np.float32(count) and halves.remainder == 0  # weights have no count of their own
    members = jax.eval_shape(jax.vmap(lambda x: moments(x, axis_name="i"), axis_name="i"), x.reshape((1, -1, 1)))
    assert members.remainder.shape == members.count.shape


@pytest.mark.parametrize("spikes", [1, 900])
@pytest.mark.parametrize("value", [1e18, 2.5e19, 1e20])
def test_no_square_overflows_in_compiled_programs(value, spikes):
    """XLA knows the counts, and would take them out of products before these are taken."""
    x = np.zeros((5000, 1), np.float32)
    x[3 : 3 + 5 * spikes : 5] = value / spikes**0.5  # and few of them are sampled
    expected = x.astype(np.float64).var(0)
    ways = {
        "whole": lambda x: moments(x),
        "weights": lambda x: moments(x, mask=np.ones(5000, np.float32)),
        "mask": lambda x: moments(x, mask=np.ones(5000, bool)),
        "pair": lambda x: merge_moments(moments(x[:2000]), moments(x[2000:])),
        "members": lambda x: jax.vmap(lambda part: moments(part, axis_name="i"), axis_name="i")(x.reshape(5, -1, 1)),
    }
    for name, way in ways.items():
        found = jax.jit(way)(x).var.reshape(-1)[:1]
        # A sum of so many equal squares, one after the other, is off by so many roundings at most.
        np.testing.assert_allclose(found, expected, rtol=3e-5 + spikes * 2.0**-24, err_msg=name)
    y, _ = jax.jit(lambda x: bnjax.batch_norm(x, *bnjax.init_batch_norm(1), training=True))(x)
    np.testing.assert_allclose(y.std(), 1, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e15, 3e18, 1.5e19])
def test_the_variance_is_right_wherever_float32_can_hold_it(scale):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 2)) * scale
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(moments(x).var, wide.var(0), rtol=1e-5)
    np.testing.assert_allclose(moments(x, mask=np.ones(1000)).var, wide.var(0), rtol=1e-5)
    merged = merge_moments(moments(x[:1]), moments(x[1:]))
    np.testing.assert_allclose(merged.var, wide.var(0), rtol=1e-5)
    of_members = jax.vmap(lambda part: moments(part, axis_name="i"), axis_name="i")(x.reshape(10, 100, 2))
    np.testing.assert_allclose(of_members.var[0], wide.var(0), rtol=1e-5)


@pytest.mark.parametrize(("mean", "noise"), [(1e-10, 1e-17), (0.0, 0.1)], ids=["about a small mean", "an outlier"])
def test_the_variance_where_what_is_sampled_lies_close_together(mean, noise):
    count = 2**20
    x = (mean + noise * np.random.default_rng(0).uniform(-1, 1, (count, 1))).astype(np.float32)
    if noise == 0.1:
        x[12345] = 3e19  # its square has no float32, and it is not sampled
    np.testing.assert_allclose(moments(x).var, x.astype(np.float64).var(0), rtol=1e-4)


def test_weights_near_the_smallest_number_are_weights():
    x, weights = np.array([[1e-3], [3e-3], [8e-3]], np.float32), np.array([1e-37, 1e-37, 2e-37], np.float32)
    expected = moments(x, mask=np.array([1.0, 1.0, 2.0]))
    found = moments(x, mask=weights)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_weight_of_zero_has_the_derivative_of_zero_where_a_value_is_extreme(value):
    x = np.array([[1.0], [value], [4.0]], np.float32)

    def sums(weights, x):
        m = moments(x, mask=weights)
        return m.mean.sum() + 3 * m.var.sum()

    weights = jnp.array([1.0, 0.0, 1.0])
    found, expected = (jax.grad(sums)(weights, jnp.asarray(of)) for of in (x, np.where(np.abs(x) < 5, x, 0)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_moments_of_a_symbolic_number_of_elements():
    size = jax.export.symbolic_shape("n, 3")
    exported = jax.export.export(jax.jit(lambda x: moments(x)))(jax.ShapeDtypeStruct(size, jnp.float32))
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    m = exported.call(x)
    assert float(m.count) == 7 and float(m.remainder) == 0
    np.testing.assert_allclose(m.var, x.var(0), rtol=1e-5)


@pytest.mark.parametrize("hidden", [slice(None), slice(2, None), slice(0, 0)], ids=["sample", "most", "none"])
def test_the_variance_of_small_values_where_a_mask_hides_the_sample(hidden):
    count = 2**18
    x = ((5 + np.random.default_rng(0).uniform(-1, 1, (count, 2))) * 1e-16).astype(np.float32)
    mask = np.arange(count) % 3 > 0
    mask[np.arange(511, count, 1024)[hidden]] = False
    np.testing.assert_allclose(moments(x, mask=mask).var, x[mask].astype(np.float64).var(0), rtol=1e-5)


def test_no_variance_is_below_zero():
    # The sampled elements weigh next to nothing, and all others are the same: what is left of the variance is rounding.
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    x = np.broadcast_to(values, (3000, 4096)).copy()
    hidden = np.arange(3000) % 11 == (2999 % 11) // 2
    x[hidden] += 1
    var = np.asarray(moments(x, mask=np.where(hidden, 1e-30, 1).astype(np.float32)).var)
    assert (var >= 0).all()
    eps = np.finfo(np.float32).eps
    # Squares of rounded differences, and what a sum of 3000 of them loses; how much is left depends on XLA's sums.
    assert var.max() < (1e-20 if JAX >= (0, 10) else 3000 * eps * (eps * np.abs(x).max()) ** 2)


def test_the_variance_of_a_spike_between_the_sampled_elements():
    x = np.zeros((5000, 1), np.float32)
    x[3] = 2.5e19
    np.testing.assert_allclose(moments(x).var, np.var(x.astype(float)), rtol=1e-5)


@pytest.mark.parametrize(
    "size", [5, 2**24, 2**24 + 1, 2**31 - 1001, 2**31 - 300, 2**31 - 256, 2**31 - 100, 2**31 + 100, 2**31 + 1001]
)
def test_counts_are_exact_as_far_as_32_bits_count(size):
    count = jnp.float32(size)
    found, remainder = bnjax._moments._exact_count(count, None, (size, 3), (1,), None, None)
    assert found == count
    is_exact = 2**24 < size < 2**31 - 2**8
    assert remainder == (size - int(np.float32(size)) if is_exact else 0)


# --- picked samples, under a mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1e5], ids=["no mean", "large mean"])
@pytest.mark.parametrize("kind", ["one row", "last two percent", "weights", "pixels", "outlier", "every 256th"])
def test_the_provisional_mean_serves_every_mask(kind, ratio):
    rng = np.random.default_rng(0)
    shape = (64, 16, 16, 3) if kind in ("one row", "pixels") else (2**18, 3)
    x = (rng.standard_normal(shape) + ratio).astype(np.float32)
    if kind == "outlier":
        x[7] += 1e4
    mask = {
        "one row": (np.arange(64) == 41)[:, None, None, None],
        "last two percent": np.arange(2**18) > 0.98 * 2**18,
        "weights": rng.exponential(size=2**18).astype(np.float32) ** 4,
        "pixels": rng.random((64, 16, 16, 1)) < 0.01,
        "outlier": rng.random(2**18) < 0.3,
        "every 256th": np.arange(2**18) % 256 == 13,
    }[kind]
    w = np.asarray(mask, np.float64).reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    w = np.broadcast_to(w, shape).reshape(-1, 3)
    exact = x.astype(np.float64).reshape(-1, 3)
    mean = (w * exact).sum(0) / w.sum(0)
    var = (w * (exact - mean) ** 2).sum(0) / w.sum(0)
    found = jitted(x, mask=mask)
    np.testing.assert_allclose(found.var, var, rtol=3e-5 if kind == "outlier" else 2e-6)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6 * var.max() ** 0.5)


# --- exact sums of bfloat16 -------------------------------------------------------------------------------------------


@pytest.fixture
def exactly(monkeypatch):
    """Takes the exact sums on CPU too, where programs choose others."""
    monkeypatch.setattr(bnjax._moments, "EXACT_ON", ("tpu", "cpu"))


def of_bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


BLOCKS = [(16, 16, 16, 4), (2, 128, 128, 2), (48, 7, 7, 8), (3, 200, 112, 2), (16384, 4), (20_000, 4), (32, 4, 8, 5)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(BLOCKS),
    ratio=st.floats(0, 1e5),
    scale=st.integers(-20, 20),
    kind=st.sampled_from(["normal", "rectified", "sparse", "outlier", "in one binade", "one near zero"]),
    share=st.sampled_from([None, 0.9, 0.1, 0.002]),
    seed=st.integers(0, 99),
)
def test_sums_of_bfloat16_are_exact(shape, ratio, scale, kind, share, seed):
    """In one binade to the last bits; else about as the mean square demands."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "in one binade":
        x = 1 + rng.random(shape) * 2.0 ** -rng.integers(1, 8)
    elif kind == "one near zero":
        x = np.ones(shape)
        x[0] *= 1.5 * 2.0 ** -rng.integers(1, 14)
    else:
        x = np.abs(x) if kind == "rectified" else x * (rng.random(shape) < 0.01) if kind == "sparse" else x
        x[0] *= 1e3 if kind == "outlier" else 1
        x = x + ratio
    x = of_bfloat16(x * 2.0**scale)
    mask = None if share is None else rng.random((*shape[:-1], 1)) < share
    seen = np.ones(shape) if mask is None else np.broadcast_to(mask, shape)
    filled = np.where(seen, x, rng.choice([np.nan, np.inf, 1e30, 0], shape))
    axes = (len(shape) - 1,)
    m = _exact.exact_moments(jnp.asarray(filled, jnp.bfloat16), None if mask is None else jnp.asarray(mask), axes)
    reduced = tuple(range(len(shape) - 1))
    n = seen.sum(reduced)
    assert np.all(np.asarray(m.count) == n)
    mean = np.where(seen, x, 0).sum(reduced) / np.maximum(n, 1)
    var = (np.where(seen, x - mean, 0) ** 2).sum(reduced) / np.maximum(n, 1)
    binades = np.where(seen.astype(bool) & (x != 0), np.frexp(x)[1], np.nan)
    bounds = np.where(
        np.nanmax(binades, reduced, initial=-999) == np.nanmin(binades, reduced, initial=999), 0, 2.0**-21
    )
    error = np.abs(np.asarray(m.var, np.float64) - var)
    assert (error <= 1e-6 * var + bounds * (var + mean**2)).all(), (error / var).max()
    np.testing.assert_allclose(m.mean, mean, rtol=5e-7, atol=5e-7 * var.max() ** 0.5)


@pytest.mark.parametrize(("odd", "share"), [(2.0**-10 * 1.5, 1e-3), (0.0, 1e-6), (1.5, 1e-6), (2.0**-4, 1e-4)])
def test_the_worst_of_exact_sums_is_one_element_near_zero(odd, share):
    x = np.ones((4, 128, 128, 1))
    x[0, 0, 0] = odd
    m = _exact.exact_moments(jnp.asarray(x, jnp.bfloat16), None, (3,))
    np.testing.assert_allclose(m.var, x.var((0, 1, 2)), rtol=share)


@pytest.mark.parametrize(
    ("shape", "axes", "found"),
    [
        ((8, 56, 56, 64), (3,), ((2, 1), 0, 4)),
        ((8, 7, 7, 64), (3,), ((2, 1, 0), None, 1)),
        ((8, 64, 7, 7), (1,), ((3, 2, 0), None, 1)),
        ((8, 224, 224, 3), (3,), ((2,), 1, 56)),
        ((16_384, 3), (1,), ((0,), None, 1)),
        ((65_536, 3), (1,), ((), 0, 16_384)),
        ((3, 2 * 10_007), (0,), ((), 1, 10_007)),
        ((16_411, 3), (1,), None),  # a prime number of elements
        ((2, 16_411, 3), (2,), None),
        ((1, 1, 3), (2,), None),
        ((0, 4, 3), (2,), None),
    ],
)
def test_the_blocks_of_exact_sums(shape, axes, found):
    assert _exact._block(shape, axes) == found


def test_what_has_exact_sums():
    x = jnp.ones((8, 4, 4, 3), jnp.bfloat16)
    assert _exact.can_sum(x, None, (3,)) and _exact.can_sum(x, jnp.ones((8, 1, 1, 1), bool), (3,))
    assert not _exact.can_sum(x.astype(jnp.float16), None, (3,))
    assert not _exact.can_sum(x, jnp.ones((8, 1, 1, 1)), (3,))


@pytest.mark.by_default(1)
@pytest.mark.parametrize("mask", [None, "examples", "pixels", "features"])
def test_exact_sums_in_training_on_many_devices(exactly, mask):
    """Values, running statistics and gradients are those of float32, on every way to split the batch."""
    rng = np.random.default_rng(0)
    x = of_bfloat16(rng.standard_normal((32, 8, 8, 4)) * 3 + 100).astype(np.float32)
    of_mask = {"examples": (32,), "pixels": (32, 8, 8), "features": (32, 1, 1, 4), None: ()}[mask]
    mask = None if mask is None else rng.random(of_mask) < 0.7
    params, stats = bnjax.init_batch_norm(4)

    def loss(x, params, mask, **options):
        y, new = bnjax.batch_norm(x, params, stats, training=True, mask=mask, dtype=jnp.float32, **options)
        weights = jnp.arange(y[0].size).reshape(y[0].shape) % 5 - 2.0
        keep = 1 if mask is None else mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        return (y**2 * weights[None] * keep).sum(), new

    wanted, of_params = jax.value_and_grad(loss, (0, 1), has_aux=True)(jnp.asarray(x), params, mask)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    low = jnp.asarray(x, jnp.bfloat16)
    assert "reduce_precision" in str(jax.make_jaxpr(loss)(low, params, mask))
    for spec in (None, jax.P(("a", "b")), jax.P("a", "b"), jax.P(None, None, "a", "b")):
        placed = low if spec is None else jax.device_put(low, jax.NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            found, of_these = step(placed, params, mask)
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), rtol=2e-4, atol=2e-3)
        chex.assert_trees_all_close(
            jax.device_get(jax.tree.map(lambda v: v.astype(jnp.float32), of_these)),
            jax.device_get(of_params), rtol=2e-2, atol=2e-2,
        )  # fmt: skip
