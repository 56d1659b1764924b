"""How the moments of parts are merged, on meshes that are larger than the tests' own, which need no devices."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.variants
from bnjax import Moments, _sync, moments

pytestmark = pytest.mark.core

AUTO, EXPLICIT, MANUAL = AxisType.Auto, AxisType.Explicit, AxisType.Manual


def on_mesh(function, shape, sizes, types, *spec):
    """What a function tells of an array while it is traced on a mesh of some sizes and types of axes."""
    mesh, found = AbstractMesh(sizes, tuple("abc"[: len(sizes)]), axis_types=types), []
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
        jax.eval_shape(lambda x: found.append(function(x)), x)
    return found[0]


@pytest.mark.parametrize(
    ("shape", "sizes", "types", "spec", "parts"),
    [
        ((6, 4, 3), (2,), (AUTO,), (), {0: 2, 1: 2}),
        ((16, 4, 3), (8,), (AUTO,), (), {0: 8, 1: 4}),
        ((5, 7, 3), (8,), (AUTO,), (), {}),
        ((0, 4, 3), (8,), (AUTO,), (), {1: 4}),
        ((16, 4, 3), (4, 2), (AUTO, AUTO), (), {0: 8, 1: 4}),
        ((16, 4, 3), (4, 2), (EXPLICIT, AUTO), ("a",), {0: 8, 1: 2}),
        ((4, 4, 3), (4, 2), (EXPLICIT, AUTO), ("a",), {0: 4, 1: 2}),
        ((8, 8, 3), (2, 2, 2), (EXPLICIT,) * 3, (("a", "b"), "c"), {0: 4, 1: 2}),
        ((16, 4, 3), (4, 2), (AUTO, MANUAL), (), {0: 4, 1: 4}),
        ((256, 4, 3), (128,), (AUTO,), (), {0: 128, 1: 4}),
        ((16, 24, 56, 3), (8,), (AUTO,), (), {0: 8, 1: 8, 2: 8}),
        # Beyond the first axis there are at most 64 parts, of which the last axes take what is left.
        ((2, 8, 8, 8, 3), (8,), (AUTO,), (), {0: 2, 1: 8, 2: 8}),
        ((16, 16, 16, 3), (16,), (AUTO,), (), {0: 16, 1: 16, 2: 4}),
        ((3, 128, 2, 3), (128,), (AUTO,), (), {1: 128, 2: 2}),
        ((128, 128, 2, 3), (128,), (AUTO,), (), {0: 128, 1: 64}),
        ((8, 128, 8, 3), (128, 8), (EXPLICIT, AUTO), (None, "a"), {0: 8, 1: 128}),
    ],
)
def test_the_parts_of_an_array(shape, sizes, types, spec, parts):
    assert on_mesh(lambda x: _sync.shards_of(x, range(len(shape) - 1)), shape, sizes, types, *spec) == parts


@pytest.mark.parametrize(("size", "summed"), [(2, "2,3"), (256, "256,3"), (257, "3")])
def test_among_many_devices_a_second_sum_takes_the_place_of_a_list(size, summed):
    def f(x):
        return moments(x, axis_name="a")[:2]

    mesh = AbstractMesh((size,), ("a",), axis_types=(AUTO,))
    over_devices = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P(), check_vma=False)
    text = str(jax.make_jaxpr(over_devices)(jax.ShapeDtypeStruct((2 * size, 3), jnp.float32)))
    assert re.findall(r"f32\[([\d,]*)\] = psum", text) == [summed] * 2


@pytest.mark.parametrize("size", [256, 257])
def test_among_many_shards_a_second_sum_takes_the_place_of_a_list(size):
    def merge(mean, var):
        return _sync.merge_over_shards(Moments(mean, var, jnp.float32(2)), 1, counts_differ=False)

    mean, var = jax.random.normal(jax.random.key(0), (2, size, 3))
    var = jnp.square(var)
    merged = merge(mean, var)
    expected = np.asarray(mean).mean(0), (np.asarray(var) + (mean - np.asarray(mean).mean(0)[None]) ** 2).mean(0)
    chex.assert_trees_all_close((merged.mean, merged.var), expected, rtol=1e-5, atol=1e-6)
    sizes = [math.prod(v.aval.shape) for e in jax.make_jaxpr(merge)(mean, var).eqns for v in e.outvars]
    assert (max(sizes) == size * size * 3) is (size <= 256)


COMMON = [(12, None, -1), (12, (8, 4, 0, 1), 1), (12, (1, 1, 1, 3), -1), (16, (1, 1, 0, 1), -1), (16, (1, 1, 1, 3), 1)]
WEIGHTS = [None, (8, 1, 1, 1), (8, 4, 0, 1), (1, 1, 0, 1), (1, 1, 1, 3), (8, 4, 0, 3)]
GRID = [(width, weights, axis) for width in (12, 16) for weights in WEIGHTS for axis in (1, -1)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in COMMON else pytest.mark.exhaustive) for case in GRID]
)
def test_parts_of_the_last_reduced_axis(case):
    width, weights, axis = case
    keys, mesh = jax.random.split(jax.random.key(0)), jax.make_mesh((2,), ("a",), axis_types=(AUTO,))
    noise = np.asarray(jax.random.normal(keys[0], (8, 4, width, 3)))
    x = jnp.asarray(
        3 + noise * np.arange(1.0, 4) + np.linspace(0, 50, width)[:, None], jnp.float32
    )  # parts differ much
    w = None
    if weights is not None:
        w = jax.random.uniform(keys[1], [size or width for size in weights])
        w = w if w.size < width else jnp.where(w < 0.3, 0, w)
    whole = np.ones(x.shape) if w is None else np.broadcast_to(np.asarray(w, float), x.shape)
    exact = np.asarray(x, float)
    count = whole.sum((0, 1, 2))
    mean = (whole * exact).sum((0, 1, 2)) / count
    var = (whole * np.square(exact - mean)).sum((0, 1, 2)) / count
    if axis == 1:
        x, w = jnp.moveaxis(x, -1, 1), None if w is None else jnp.moveaxis(w, -1, 1)
    with jax.set_mesh(mesh):
        x, w = jax.device_put((x, w), NamedSharding(mesh, P()))
        text = str(jax.make_jaxpr(lambda x: moments(x, axis=axis, mask=w))(x))
        m = jax.jit(lambda x, w: moments(x, axis=axis, mask=w))(x, w)
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\] = reshape", text)]
    divided = 2 + (width == 16)  # along the batch, the height, and the width in parts of 8 rows, but not of 6
    assert sizes.count(x.size) == (divided if w is None or w.size < x.size else 2 * divided)
    chex.assert_trees_all_close((m.mean, m.var), (mean, var), rtol=2e-5)
    expected = count if weights is not None and weights[-1] == 3 else count[0]
    assert m.count.shape == expected.shape
    np.testing.assert_allclose(m.count, expected, rtol=1e-5)


def test_weights_of_less_than_one_in_each_part():
    x = jax.random.normal(jax.random.key(0), (4, 5, 3)) + jnp.arange(4.0)[:, None, None]
    weights = jax.random.uniform(jax.random.key(1), (4, 5)) / 30
    whole = moments(x.reshape(20, 3), mask=weights.reshape(20))
    of_members = jax.vmap(lambda x, w: moments(x, mask=w, axis_name="i"), axis_name="i")(x, weights)
    for m in (whole, of_members):
        assert m.count.max() < 1
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], of_members), whole, rtol=1e-5)


@pytest.mark.parametrize("groups", [((0, 1, 2, 3),), ((0, 3), (2, 1)), ((0,), (1,), (2,), (3,))])
def test_groups_of_a_vmapped_axis(groups):
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    found = jax.vmap(lambda x: moments(x, axis_name="i", axis_index_groups=groups), axis_name="i")(x)
    for group in groups:
        expected = moments(x[np.array(group)].reshape(-1, 3))
        for member in group:
            chex.assert_trees_all_close(jax.tree.map(lambda v: v[member], found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [bnjax.batch_norm, bnjax.variants.moving_batch_norm])
def test_cotangents_of_mean_and_variance_meet_in_one_sum(normalize):
    """One sum forward, one for what the moments pass back, and one for what mean and variance get: none for each."""
    (params, stats), mesh = bnjax.init_batch_norm(3), jax.make_mesh((2,), ("a",), axis_types=(AUTO,))
    over_devices = jax.shard_map(
        lambda x: normalize(x, params, stats, training=True, axis_name="a")[0],
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
    )
    text = str(jax.make_jaxpr(jax.grad(lambda x: (over_devices(x) ** 3).sum()))(jnp.ones((8, 3))))
    assert 2 <= len(re.findall(r"= psum\w*\[", text)) <= 3
