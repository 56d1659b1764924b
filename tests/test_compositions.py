"""Every function and layer in everything that JAX does with functions: each cell is right."""

import functools
import os
import re
import subprocess
import sys
from collections import Counter

import compositions
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compositions import COLUMNS, FLAX, OTHER, ROWS, SPLITS, P, X, mesh_of
from jax.sharding import AxisType, NamedSharding
from jaxprs import operations

import bnjax
from bnjax import variants
from bnjax.linen import (
    BatchNorm,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    LpBatchNorm,
    MovingBatchNorm,
    NoisyBatchNorm,
)

DEFAULT = (  # where a size that is a symbol is cut, and where statistics are split otherwise than moments
    ("ghost_batch_norm, weights", "export, training"),
    ("moving_batch_norm, weights", "explicit, features"),
)


def cells():
    """All cells; the default run has every third column of one row, and one or two columns of each other row."""
    made = []
    for i, row in enumerate(ROWS):
        for j, column in enumerate(COLUMNS):
            is_default = j % 3 == 0 if row == "linen.BatchNorm" else j == i * 5 % len(COLUMNS)
            is_default |= (row, column) in DEFAULT
            is_default &= column != "leak checking"  # which compiles all anew
            if (ROWS[row].normalizes or column != "export, inference") and (row, column) not in OTHER:
                made.append(pytest.param(row, column, marks=() if is_default else pytest.mark.exhaustive))
    return made


@pytest.mark.parametrize(("row", "column"), cells())
def test_a_cell_is_right(row, column):
    compositions.check(ROWS[row], column)


@pytest.mark.parametrize("row", FLAX)
def test_a_wrong_definition_would_be_seen(row):
    """The harness finds a layer of another momentum wrong."""
    wrong = compositions.Row(FLAX[row].call, compositions.moving, compositions.STATS)
    with pytest.raises(AssertionError):
        compositions.check(wrong, "jit")


# --- devices ----------------------------------------------------------------------------------------------------------

COLLECTIVES = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
PARTIALLY_MANUAL = """
import os
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
import numpy as np
from compositions import P, mesh_of
from jax.sharding import AxisType, NamedSharding
import bnjax
params, stats = bnjax.init_batch_norm(4)
rng = np.random.default_rng(0)
mesh = mesh_of(AxisType.Auto)

def check(x, mask, spec, axis_name):
    def normalize(x, mask):
        return bnjax.batch_norm(x, params, stats, training=True, axis_name=axis_name, mask=mask)[0]
    specs = (P("data"), None if mask is None else P("data"))
    mapped = jax.shard_map(normalize, mesh=mesh, in_specs=specs, out_specs=P("data"), axis_names={"data"})
    y = jax.device_get(jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, spec)), mask))
    members = np.split(np.arange(len(x)), 1 if axis_name else mesh.shape["data"])
    for member in members:
        wide = x[member].astype(np.float64)
        seen = np.broadcast_to(True if mask is None else mask[member], wide.shape)
        kept = wide[seen].reshape((-1, 4))
        expected = (wide - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
        np.testing.assert_allclose(y[member][seen], expected[seen], rtol=1e-3, atol=1e-3)

for shape in ((8, 4, 4, 4), (16, 16, 16, 4)):
    x = rng.normal(size=shape).astype(np.float32)
    x[: shape[0] // 4] += 1000  # one member of the manual axis: mean over deviation is 1000, while the others' is 0
    # A mask that hides, from that member alone, all sampled elements of a large batch: it alone must read twice.
    mask = np.ones((*shape[:3], 1), bool)
    mask[: shape[0] // 4, 1:] = False
    for axis_name in ("data", None):
        for given in (None, mask):
            check(x, given, eval(sys.argv[2]), axis_name)
print("done")
"""


@pytest.mark.by_default(1)
@pytest.mark.parametrize("spec", ["P('data', None, None, 'model')", "P(('data', 'model'))", "P('data', 'model')"])
def test_nothing_waits_forever_where_members_of_a_manual_axis_differ(spec):
    variables = {**os.environ, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", PARTIALLY_MANUAL, os.path.dirname(__file__), spec],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.strip() == "done", run.stderr[-2000:]


def programs(layer, spec, manual=False, masked=False, kind=AxisType.Auto, x=X):
    """The compiled forward pass, and that with the gradient, of a layer on a mesh."""
    mesh = mesh_of(kind)
    variables = layer.init(jax.random.key(0), x)
    masks = np.arange(len(x))[:, None, None, None] % 3 > 0 if masked else None
    masks = jax.device_put(masks, NamedSharding(mesh, P(*spec[:1])))
    x = jax.device_put(x, NamedSharding(mesh, spec))

    def forward(variables, x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    if manual:
        specs = (P(), P("data"), P("data") if masked else None)
        forward = jax.shard_map(forward, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()), axis_names={"data"})

    def loss(variables, x, mask):
        y, updates = forward(variables, x, mask)
        return (y**3).sum(), updates

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with jax.set_mesh(mesh):
        return [jax.jit(f).lower(variables, x, masks).compile().as_text() for f in (forward, both)]


@pytest.mark.parametrize(
    ("name", "manual", "masked"),
    [
        *((name, False, False) for name in SPLITS),
        ("batch and features", False, True),
        *(
            pytest.param(name, manual, masked, marks=pytest.mark.exhaustive)
            for name in SPLITS
            for manual, masked in ((False, True), (True, False), (True, True))
            if not manual or name.startswith("batch and")
        ),
    ],
)
def test_no_more_collectives_than_flax_and_none_under_a_condition(name, manual, masked):
    options = {"use_running_average": False, "axis_name": "data" if manual else None}
    ours, flax = (programs(layer(**options), SPLITS[name], manual, masked) for layer in (BatchNorm, nn.BatchNorm))
    for a, b in zip(ours, flax, strict=True):
        assert " while(" not in a and " conditional(" not in a
        counts = [Counter(re.findall(COLLECTIVES, text)) for text in (a, b)]
        assert counts[0] <= counts[1], counts


@pytest.mark.parametrize(
    ("shape", "spec", "kind"),
    [
        ((16, 8, 8, 4), P(None, None, "data"), AxisType.Explicit),
        ((8, 8, 64, 4), P(None, None, "data"), AxisType.Auto),  # whose parts are whole tiles
        ((8, 8, 24, 4), P(None, None, ("data", "model")), AxisType.Auto),  # whose parts are none
        ((2, 3, 8, 8, 4), P(None, None, "data", "model"), AxisType.Auto),
    ],
)
def test_no_more_collectives_than_flax_however_a_width_is_split(shape, spec, kind):
    x = np.ones(shape, np.float32)
    ours = programs(BatchNorm(use_running_average=False), spec, kind=kind, x=x)
    flax = programs(nn.BatchNorm(use_running_average=False), spec, x=x)
    for a, b in zip(ours, flax, strict=True):
        counts = [Counter(re.findall(COLLECTIVES, text)) for text in (a, b)]
        assert counts[0] <= counts[1], counts


@pytest.mark.parametrize("column", ["manual, two axes", "automatic, batch and space", "partially manual, features"])
def test_many_parts_are_merged_by_two_sums(column, monkeypatch):
    monkeypatch.setattr(bnjax._sync, "_MOST_EXCHANGED", 1)
    compositions.check(ROWS["batch_norm"], column)


# --- inference --------------------------------------------------------------------------------------------------------


def test_inference_holds_no_primitive_that_flaxs_does_not():
    def of(layer):
        module = layer(use_running_average=True)
        variables = module.init(jax.random.key(0), X)
        jaxpr = jax.make_jaxpr(lambda x: module.apply(variables, x))(X).jaxpr
        return {operation.primitive.name for operation in operations(jaxpr)}

    for layer in (
        BatchNorm,
        BatchRenorm,
        functools.partial(BatchRenorm, warmup_steps=3),
        functools.partial(LpBatchNorm, p=1),
        functools.partial(GhostBatchNorm, ghost_size=2),
        MovingBatchNorm,
        NoisyBatchNorm,
    ):
        assert of(layer) <= of(nn.BatchNorm), layer
    assert of(FrozenBatchNorm) <= of(nn.BatchNorm) | {"stop_gradient"}  # no derivative goes to its parameters, ever


# --- masks and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3), (4, 4), (4, 4, 3), (4, 4, 4), (4, 4, 4, 4)])
def test_the_dimensions_of_a_mask_are_the_first_of_the_input_whatever_the_sizes(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for ndim in range(1, len(shape)):
        mask = np.random.default_rng(1).uniform(size=shape[:ndim]) > 0.4
        whole = mask.reshape(mask.shape + (1,) * (len(shape) - ndim))
        np.testing.assert_array_equal(bnjax.moments(x, mask=mask).mean, bnjax.moments(x, mask=whole).mean)
        values = x[np.broadcast_to(whole, shape)].reshape((-1, shape[-1]))
        np.testing.assert_allclose(bnjax.moments(x, mask=mask).mean, values.mean(0), rtol=1e-5, atol=1e-6)


def test_the_features_of_a_mask_are_left_out_wherever_they_are():
    x = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).astype(np.float32)
    mask = np.arange(16).reshape((4, 4)) % 3 > 0  # [batch, height]
    got = bnjax.moments(x, axis=1, mask=mask)
    expected = bnjax.moments(x, axis=1, mask=mask[:, None, :, None])
    np.testing.assert_array_equal(got.mean, expected.mean)
    assert got.count == mask.sum() * 4


def mean_of(layer, x, mask):
    module = layer(use_running_average=False, momentum=0.0)
    variables = module.init(jax.random.key(0), x)
    return module.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"]


def test_a_layers_mask_of_one_dimension_is_a_weight_for_each_example():
    x = np.arange(16.0, dtype=np.float32).reshape((4, 4))  # as many examples as features
    np.testing.assert_allclose(mean_of(BatchNorm, x, np.arange(4) < 2), x[:2].mean(0))
    images = np.arange(4 * 4 * 4 * 3.0, dtype=np.float32).reshape((4, 4, 4, 3))  # as many examples as columns
    np.testing.assert_allclose(mean_of(BatchNorm, images, np.arange(4) < 2), images[:2].mean((0, 1, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"weight for each example has the shape \(4,\)"):
        mean_of(BatchNorm, images, np.ones(3, bool))


def test_a_layers_mask_that_only_flax_reads_is_read_as_there():
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    mask = (np.arange(5) < 2)[:, None]  # [time, 1]
    np.testing.assert_allclose(mean_of(BatchNorm, x, mask), mean_of(nn.BatchNorm, x, mask), rtol=1e-5)


def test_a_layers_mask_with_two_meanings_is_an_error_that_says_how_to_write_it():
    x = np.zeros((3, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"Reshape it to \(3, 3, 1\) or to \(1, 3, 3\)"):
        mean_of(BatchNorm, x, np.ones((3, 3), bool))
    assert mean_of(BatchNorm, x, np.ones((3, 3, 1), bool)).shape == (3,)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e35])
def test_weights_of_any_size(size):
    rng = np.random.default_rng(0)
    x = rng.normal(1e4, 1, (64, 3)).astype(np.float32)
    weights = (rng.uniform(0.5, 2, 64) * size).astype(np.float32)
    w, x64 = weights.astype(np.float64)[:, None], x.astype(np.float64)
    mean = (w * x64).sum(0) / w.sum()
    m = bnjax.moments(x, mask=weights)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(m.var, (w * (x64 - mean) ** 2).sum(0) / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(m.count, w.sum(), rtol=1e-6)
    gradient = jax.grad(lambda x: bnjax.moments(x, mask=jnp.asarray(weights)).mean.sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.broadcast_to(w / w.sum(), x.shape), rtol=1e-5)
    params, stats = bnjax.init_batch_norm(3)
    options = {"training": True, "momentum": 0.0, "ghost_size": 16}
    averaged = variants.ghost_batch_norm(x, params, stats, mask=weights, **options)[1]
    np.testing.assert_allclose(averaged["mean"], mean, rtol=1e-6)
    over_members = jax.vmap(
        lambda x, w: variants.ghost_batch_norm(x, params, stats, mask=w, axis_name="i", **options)[1], axis_name="i"
    )(x.reshape((2, 32, 3)), weights.reshape((2, 32)))
    np.testing.assert_allclose(over_members["mean"][0], mean, rtol=1e-6)
    np.testing.assert_allclose(over_members["var"][0], averaged["var"], rtol=1e-5)


LOUD = {
    "plain": bnjax.batch_norm,
    "renorm": variants.batch_renorm,
    "moving": variants.moving_batch_norm,
    "lp": functools.partial(variants.lp_batch_norm, p=1),
    "ghost": functools.partial(variants.ghost_batch_norm, ghost_size=4),
    "noisy": functools.partial(variants.noisy_batch_norm, key=jax.random.key(0)),
}


@pytest.mark.by_default(2)
@pytest.mark.parametrize("name", LOUD)
def test_a_weight_that_is_not_a_number_is_loud(name):
    params, stats = bnjax.init_batch_norm(3)
    normalize = jax.jit(lambda x, mask: LOUD[name](x, params, stats, training=True, mask=mask))
    y, moved = normalize(np.ones((4, 3), np.float32), np.array([1, np.nan, 1, 1], np.float32))
    assert np.isnan(y).all()
    np.testing.assert_array_equal(moved["mean"], stats["mean"])
