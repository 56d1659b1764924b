"""What the other libraries' own tests and issues are about: theirs (the extra `peers`) and ours, side by side.

Where a peer is wrong, its value is pinned too: the test then says when that peer has been mended.
"""

import functools
import os

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bnjax import batch_norm, convert, init_batch_norm
from bnjax.convert import BatchNormState
from bnjax.inference import reestimate_batch_stats
from bnjax.linen import BatchNorm
from bnjax.variants import batch_renorm, frozen_batch_norm, moving_batch_norm

STATIC = ("training", "axis", "axis_name", "axis_index_groups", "dtype", "bessel_correction")
norm = jax.jit(batch_norm, static_argnames=STATIC)
compiled = functools.cache(jax.jit)  # of the peers' functions
RNG = np.random.default_rng(0)
BATCHES = (RNG.standard_normal((4, 8, 3)) * 2 + np.arange(1, 5)[:, None, None]).astype(np.float32)
X = BATCHES[0]
COTANGENT = RNG.standard_normal((8, 3)).astype(np.float32)
SCALE, BIAS = RNG.standard_normal((2, 3)).astype(np.float32)
PARAMS = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
FAR = (np.random.default_rng(0).standard_normal((4096, 1)) + 1e4).astype(np.float32)


def exact(x, weights=None):
    """Mean and biased variance of each feature (the last axis) in float64."""
    x = np.asarray(x, np.float64)
    weights = np.ones(x.shape[:-1]) if weights is None else np.asarray(weights, np.float64)
    rows, w = x.reshape(-1, x.shape[-1]), weights.reshape(-1, 1)
    rows = np.where(w > 0, rows, 0)
    mean = (w * rows).sum(0) / w.sum()
    return mean, (w * (rows - mean) ** 2).sum(0) / w.sum()


def normalized(x, mean, var, epsilon=1e-5):
    return (np.asarray(x, np.float64) - mean) / np.sqrt(np.asarray(var) + epsilon)


def start(features=3):
    return init_batch_norm(features)[1]


def stats_of(mean, var):
    return {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}


def close(got, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, expected), rtol=rtol, atol=atol)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def equinox():
    return pytest.importorskip("equinox")


@pytest.fixture
def haiku():
    return pytest.importorskip("haiku")


def import_keras():
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras has begun with another backend than JAX")
    return keras


@pytest.fixture
def keras():
    with jax.numpy_rank_promotion("allow"):
        yield import_keras()


def equinox_layer(equinox, features=3, **options):
    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(features, "batch", **options)

    @functools.partial(jax.jit, static_argnums=2)
    def call(state, x, inference=False):
        one = lambda x, state: layer(x, state, inference=inference)
        return jax.vmap(one, (0, None), (0, None), axis_name="batch")(x, state)

    return layer, state, call


def keras_step(layer, x, **options):
    """Output of a training step, compiled, which moves the layer's variables."""
    if not layer.built:
        layer.build(x.shape)
    variables = ([v.value for v in part] for part in (layer.trainable_variables, layer.non_trainable_variables))
    y, moved = compiled(layer.stateless_call, static_argnames="training")(*variables, x, training=True, **options)
    for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
        variable.assign(value)
    return y


def keras_stats(layer):
    return {"mean": layer.moving_mean.value, "var": layer.moving_variance.value}


def haiku_norm(haiku, *, is_training=True, **options):
    options = {"create_scale": False, "create_offset": False, "decay_rate": 0.9, **options}
    return haiku.transform_with_state(lambda x: haiku.BatchNorm(**options)(x, is_training))


def haiku_step(f, x, state=None):
    """Output and new state of a training step, from the initial state if there is none yet."""
    state = compiled(f.init)(None, x)[1] if state is None else state
    return compiled(f.apply)({}, state, None, x)


def haiku_average(state):
    return {key: state[f"batch_norm/~/{key}_ema"]["average"].ravel() for key in ("mean", "var")}


# --- all of them ------------------------------------------------------------------------------------------------------


@jax.jit
def flax_trained(x):
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    return y, updates["batch_stats"]


@jax.jit
def nnx_trained(x):
    layer = nnx.BatchNorm(x.shape[-1], momentum=0.0, rngs=nnx.Rngs(0))
    return layer(x, use_running_average=False), {"mean": layer.mean[...], "var": layer.var[...]}


def haiku_trained(x):
    f = haiku_norm(pytest.importorskip("haiku"), decay_rate=0.0)
    y, state = haiku_step(f, x)
    return y, haiku_average(state)


def equinox_trained(x):
    equinox = pytest.importorskip("equinox")
    layer, state, call = equinox_layer(equinox, x.shape[-1], mode="ema")
    y, state = call(state, x)
    return y, dict(zip(("mean", "var"), state.get(layer.ema_state_index), strict=True))


def keras_trained(x):
    layer = import_keras().layers.BatchNormalization(momentum=0.0, epsilon=1e-5)
    with jax.numpy_rank_promotion("allow"):
        y = keras_step(layer, x)
    return y, keras_stats(layer)


def torch_trained(x):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(x.shape[-1], momentum=1.0)
    y = layer(torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, str(x.dtype))))
    bessel = (len(x) - 1) / len(x)
    return y.detach().float().numpy(), {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy() * bessel}


TRAINED = {
    "flax linen": flax_trained,
    "flax nnx": nnx_trained,
    "haiku": haiku_trained,
    "equinox": equinox_trained,
    "keras": keras_trained,
    "torch": torch_trained,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", TRAINED)
def test_variance_far_from_zero(peer):
    """x ~ N(1e4, 1): E[x²] − E[x]² in float32 comes in steps of 8 or so, and may be negative, which makes NaN."""
    mean, var = exact(FAR)
    y, stats = norm(FAR, {}, start(1), training=True, momentum=0.0)
    close(stats, {"mean": mean, "var": var}, rtol=1e-5)
    close(y, normalized(FAR, mean, var), rtol=1e-4, atol=2e-3)
    theirs_y, theirs = TRAINED[peer](FAR)
    if peer in ("flax linen", "flax nnx", "haiku"):
        assert np.abs(theirs["var"] - var) > 0.5  # Flax, which clips it, 0; Haiku −8
        assert not np.abs(np.asarray(theirs_y)).max() < 100  # Flax up to 1228; Haiku NaN
    else:
        np.testing.assert_allclose(theirs["var"], var, rtol=1e-3)
        np.testing.assert_allclose(theirs_y, y, rtol=1e-3, atol=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", TRAINED)
def test_bfloat16_input_has_float32_statistics(peer):
    x = jnp.asarray(FAR - 1e4 + 20, jnp.bfloat16)
    mean, var = exact(x)
    y, stats = norm(x, {}, start(1), training=True, momentum=0.0)
    chex.assert_type(list(stats.values()), jnp.float32)
    close(stats, {"mean": mean, "var": var}, rtol=1e-5)
    np.testing.assert_allclose(np.float32(y), normalized(x, mean, var), rtol=2**-8, atol=2e-6)
    if peer == "equinox":  # selects between float32 and bfloat16
        with pytest.raises(TypeError, match="same dtypes"):
            TRAINED[peer](x)
        return
    theirs_y, theirs = TRAINED[peer](x)
    if peer == "haiku":
        chex.assert_type(list(theirs.values()), jnp.bfloat16)
        assert np.abs(np.float32(theirs["var"]) - var) > 0.5  # 0 or 2, as bfloat16 has no other value there
    else:
        close(theirs, {"mean": mean, "var": var}, rtol=1e-4)
        np.testing.assert_allclose(np.float32(theirs_y), np.float32(y), rtol=2**-7, atol=1e-2)


# --- equinox ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_equinox_debiases_a_variance_that_starts_at_one_and_ours_has_the_closed_form(equinox, steps):
    layer, state, call = equinox_layer(equinox, mode="batch", momentum=0.99)
    mean, var = exact(X)
    ours, debiased = start(), start()
    rule = BatchNormState({}, start(), decay=0.99, update="debiased")
    for step in range(1, steps + 1):
        _, state = call(state, X)
        _, ours = norm(X, {}, ours, training=True, momentum=0.99)
        _, debiased = norm(X, {}, debiased, training=True, momentum=rule.momentum(step))
    left = 0.99**steps
    # Theirs is too large by ρᵗ / (1 − ρᵗ): 99 after one step, 9.5 after ten.
    expected = {"mean": mean, "var": var + left / (1 - left)}
    theirs = convert.batch_norm_from_equinox(layer, state).batch_stats
    close(theirs, expected, rtol=1e-4)
    shrunk = np.asarray(call(state, X, True)[0])
    np.testing.assert_allclose(shrunk.std(0), np.sqrt(var / expected["var"]), rtol=1e-3)  # 0.23 … 0.12 after one step
    close(ours, {"mean": (1 - left) * mean, "var": left + (1 - left) * var})
    close(debiased, {"mean": mean, "var": var})  # what the debiasing is for
    close(norm(X, {}, debiased, training=False)[0], normalized(X, mean, var), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_equinox_mode_ema_is_moving_batch_norm_that_begins_with_the_first_batch(equinox):
    layer, state, call = equinox_layer(equinox, mode="ema", momentum=0.8)
    moving = jax.jit(moving_batch_norm, static_argnames=STATIC)
    stats = start()
    rule = BatchNormState({}, start(), decay=0.8, update="first")
    running = exact(BATCHES[0])
    for step, x in enumerate(BATCHES, start=1):
        if step > 1:
            running = [0.8 * old + 0.2 * new for old, new in zip(running, exact(x), strict=True)]
        before = stats, state
        y, stats = moving(x, {}, stats, training=True, momentum=rule.momentum(step))
        theirs, state = call(state, x)
        close(y, normalized(x, *running), atol=1e-5)
        close(theirs, y, atol=1e-5)
        close(dict(zip(("mean", "var"), state.get(layer.ema_state_index), strict=True)), stats)
        close(stats, dict(zip(("mean", "var"), running, strict=True)))
    # The gradient goes through the batch's share of the running statistics alone, in both.
    ours = lambda x: (moving(x, {}, before[0], training=True, momentum=0.8)[0] * COTANGENT).sum()
    theirs = lambda x: (call(before[1], x)[0] * COTANGENT).sum()
    close(jax.grad(ours)(X), jax.grad(theirs)(jnp.asarray(X)), rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_inference_before_any_training_with_equinox(equinox, mode):
    _, state, call = equinox_layer(equinox, mode=mode)
    ours, same = norm(X, {}, start(), training=False)
    close(ours, X / np.sqrt(1 + 1e-5))
    close(same, start())
    # Mode 'ema' has a variance of zero then (what memory holds, as it says), and divides by sqrt(epsilon).
    theirs = np.asarray(call(state, X, True)[0])
    close(theirs, ours if mode == "batch" else X * np.sqrt(1e5), rtol=1e-4)


# --- haiku ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_haiku_starts_at_zero_and_its_average_is_of_the_batches_alone(haiku):
    f = haiku_norm(haiku)
    _, state = compiled(f.init)(None, X)
    mean_ema = state["batch_norm/~/mean_ema"]
    assert mean_ema["counter"] == 0
    np.testing.assert_array_equal(mean_ema["hidden"], np.zeros((1, 3)))
    rule, stats, plain = BatchNormState({}, start(), decay=0.9, update="debiased"), start(), start()
    for step, x in enumerate(BATCHES, start=1):
        y, state = haiku_step(f, x, state)
        ours, stats = norm(x, {}, stats, training=True, momentum=rule.momentum(step))
        _, plain = norm(x, {}, plain, training=True, momentum=0.9)
        close(ours, y, rtol=1e-4, atol=1e-4)
        # The closed form: batch i of t weighs (1 − ρ) ρ^(t − i) / (1 − ρᵗ).
        weights = 0.1 * 0.9 ** np.arange(step - 1, -1, -1.0)
        sums = {key: weights @ [exact(b)[i] for b in BATCHES[:step]] for i, key in enumerate(("mean", "var"))}
        close(stats, {key: value / weights.sum() for key, value in sums.items()})
        close(haiku_average(state), stats, rtol=1e-4)
        close(plain, {"mean": sums["mean"], "var": sums["var"] + 0.9**step})


@pytest.mark.filterwarnings("ignore")
def test_inference_before_any_training_with_haiku(haiku):
    ours, _ = norm(X, {}, start(), training=False)
    close(ours, X / np.sqrt(1 + 1e-5))
    infer = haiku_norm(haiku, is_training=False)
    with pytest.raises(ValueError, match="No value for 'average'"):
        compiled(infer.init)(None, X)
    # Initialized with a dummy batch, as is usual, its average variance is the dummy's, zero: 316 times the input.
    _, state = compiled(haiku_norm(haiku).init)(None, np.zeros((8, 3), np.float32))
    close(compiled(infer.apply)({}, state, None, X)[0], X * np.sqrt(1e5), rtol=1e-4)


GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]


@pytest.mark.filterwarnings("ignore")
def test_haiku_cross_replica_groups(haiku):
    x = np.random.default_rng(1).standard_normal((8, 4, 3)) + np.arange(8)[:, None, None]
    x = jnp.asarray(x, jnp.float32)
    options = {"cross_replica_axis": "i", "cross_replica_axis_index_groups": GROUPS}
    f = haiku_norm(haiku, **options)
    everyone = functools.partial(jax.pmap, axis_name="i")
    theirs, state = everyone(lambda x: f.apply({}, f.init(None, x)[1], None, x))(x)
    ours_of = lambda x: batch_norm(x, {}, start(), training=True, axis_name="i", axis_index_groups=GROUPS, momentum=0.0)
    ours, stats = everyone(ours_of)(x)
    by_vmap = jax.jit(jax.vmap(ours_of, axis_name="i"))(x)
    close((ours, stats), by_vmap)
    close(ours, theirs, rtol=1e-4, atol=1e-4)
    for group in GROUPS:
        rows = np.asarray(x)[group].reshape(-1, 3)
        mean, var = exact(rows)
        close(np.asarray(ours)[group].reshape(-1, 3), normalized(rows, mean, var), atol=1e-5)
        for member in group:
            close(jax.tree.map(lambda v: v[member], stats), {"mean": mean, "var": var})
            averages = {key: state[f"batch_norm/~/{key}_ema"]["average"][member, 0] for key in ("mean", "var")}
            close(averages, {"mean": mean, "var": var}, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="axis_index_groups not supported in vmap"):
        jax.vmap(lambda x: f.init(None, x), axis_name="i")(x)


@pytest.mark.filterwarnings("ignore")
def test_haiku_feature_axes(haiku):
    x = np.random.default_rng(2).standard_normal((6, 3, 5, 2)).astype(np.float32) * 2 + 1
    for axis, options in ((1, {"data_format": "NC..."}), ((1, 3), {"axis": [0, 2]})):
        y, stats = norm(x, {}, start((3,) if axis == 1 else (3, 2)), training=True, axis=axis, momentum=0.0)
        f = haiku_norm(haiku, decay_rate=0.0, **options)
        theirs, state = haiku_step(f, x)
        close(y, theirs, rtol=1e-4, atol=1e-4)
        close(jax.tree.map(jnp.ravel, stats), haiku_average(state), rtol=1e-4)


# --- keras ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_a_fully_masked_input_decays_keras_state_and_leaves_ours(keras, fill):
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
    keras_step(layer, X)
    stats = keras_stats(layer)
    x = X + np.float32(fill)
    theirs = keras_step(layer, x, mask=np.zeros(8, bool))
    # Keras takes a mean and a variance of zero for the batch's, moves towards them and divides by sqrt(epsilon).
    close(keras_stats(layer), jax.tree.map(lambda v: 0.9 * v, stats))
    np.testing.assert_allclose(theirs, x * np.sqrt(1e5), rtol=1e-4)

    def loss(x):
        y, new = norm(x, {}, stats, training=True, momentum=0.9, mask=np.zeros(8, bool))
        return y.sum() + new["var"].sum(), (y, new)

    gradient, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(x)
    chex.assert_trees_all_equal(new, stats)
    chex.assert_tree_all_finite((y, gradient))
    close(y, normalized(np.nan_to_num(x), stats["mean"], stats["var"]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 3, 4, 3)])
def test_keras_partial_masks(keras, shape):
    rng = np.random.default_rng(3)
    mask = rng.random(shape[:-1]) > 0.4
    x = np.where(mask[..., None], rng.standard_normal(shape) * 2 + 1, 1e3).astype(np.float32)
    mean, var = exact(x, mask)
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)
    theirs = keras_step(layer, x, mask=mask)
    y, stats = norm(x, {}, start(), training=True, momentum=0.9, epsilon=1e-3, mask=mask)
    close(y, normalized(x, mean, var, 1e-3), rtol=1e-4, atol=1e-5)
    close(stats, {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var})
    close(theirs, y, rtol=1e-4, atol=1e-5)
    close(keras_stats(layer), stats)
    # Of a single feature Keras drops all axes.
    with pytest.raises(IndexError):
        keras_step(keras.layers.BatchNormalization(), x[..., :1], mask=mask)
    one, _ = norm(x[..., :1], {}, start(1), training=True, epsilon=1e-3, mask=mask)
    close(one, y[..., :1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_keras_layer_that_is_not_trainable_is_frozen_batch_norm(keras):
    layer = keras.layers.BatchNormalization(epsilon=1e-5)
    layer.build(X.shape)
    mean, var = exact(BATCHES[1])
    for variable, value in ((layer.moving_mean, mean), (layer.moving_variance, var), (layer.gamma, SCALE)):
        variable.assign(value)
    layer.trainable = False
    theirs = keras_step(layer, X)
    close(keras_stats(layer), {"mean": mean, "var": var})
    frozen = jax.jit(frozen_batch_norm, static_argnames=STATIC)
    y, stats = frozen(X, {"scale": PARAMS["scale"]}, stats_of(mean, var), training=True)
    close(y, normalized(X, mean, var) * SCALE, rtol=1e-4, atol=1e-5)
    close(theirs, y, rtol=1e-4, atol=1e-5)
    close(stats, {"mean": mean, "var": var})


def keras_renorm(keras, clip, momentum=0.8):
    options = {"renorm": True, "renorm_momentum": momentum, "momentum": momentum, "epsilon": 1e-3}
    limits = {"rmax": 1.2, "rmin": 1 / 1.2, "dmax": 0.3} if clip else {}
    layer = keras.layers.BatchNormalization(renorm_clipping=limits, **options)
    layer.build((None, 3))
    layer.gamma.assign(SCALE)
    layer.beta.assign(BIAS)
    return layer


renorm = jax.jit(batch_renorm, static_argnames=STATIC)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [True, False])
def test_keras_renorm_of_the_same_running_statistics(keras, clip):
    layer = keras_renorm(keras, clip)
    mean, var = exact(BATCHES[1])
    layer.renorm_mean.assign(mean)
    layer.renorm_stddev.assign(np.sqrt(var + 1e-3))  # Keras keeps σ, with epsilon in it
    limits = {"r_max": 1.2, "d_max": 0.3} if clip else {"r_max": 1e6, "d_max": 1e6}

    def ours(x, params):
        return renorm(x, params, stats_of(mean, var), training=True, momentum=0.8, epsilon=1e-3, **limits)[0]

    batch_mean, batch_var = exact(X)
    r = np.sqrt((batch_var + 1e-3) / (var + 1e-3))
    d = (batch_mean - mean) / np.sqrt(var + 1e-3)
    if clip:
        r, d = np.clip(r, 1 / 1.2, 1.2), np.clip(d, -0.3, 0.3)

    def theirs(x, params):
        variables = [v.value for v in layer.non_trainable_variables]
        return layer.stateless_call([params["scale"], params["bias"]], variables, x, training=True)[0]

    def with_gradients(f, *primals):
        y, vjp = jax.vjp(f, *primals)
        return y, vjp(jnp.asarray(COTANGENT))

    y, gradients = jax.jit(functools.partial(with_gradients, ours))(X, PARAMS)
    close(y, (normalized(X, batch_mean, batch_var, 1e-3) * r + d) * SCALE + BIAS, rtol=1e-4, atol=1e-5)
    their_y, their_gradients = jax.jit(functools.partial(with_gradients, theirs))(X, PARAMS)
    close(their_y, y, rtol=1e-4, atol=1e-5)
    close(their_gradients, gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_keras_renorm_averages_deviations_and_ours_variances(keras):
    layer = keras_renorm(keras, clip=False)
    stats, deviation, mean, var = start(), np.ones(3), np.zeros(3), np.ones(3)
    for x in BATCHES:
        batch_mean, batch_var = exact(x)
        theirs = keras_step(layer, x)
        expected = (np.asarray(x, np.float64) - mean) / deviation  # unclipped: what inference gives
        close(theirs, expected * SCALE + BIAS, rtol=1e-4, atol=1e-5)
        y, stats = renorm(x, PARAMS, stats, training=True, momentum=0.8, epsilon=1e-3, r_max=1e6, d_max=1e6)
        close(y, normalized(x, mean, var, 1e-3) * SCALE + BIAS, rtol=1e-4, atol=1e-5)
        deviation = 0.8 * deviation + 0.2 * np.sqrt(batch_var + 1e-3)
        mean, var = 0.8 * mean + 0.2 * batch_mean, 0.8 * var + 0.2 * batch_var
    close(stats, {"mean": mean, "var": var})
    close(layer.moving_mean.value, mean)
    close(layer.renorm_stddev.value, deviation)
    close(layer.moving_variance.value, deviation**2 - 1e-3, rtol=1e-4)
    assert np.all(deviation**2 - 1e-3 < var)  # as a mean of square roots is


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_layer(torch, kind="BatchNorm1d", features=3, **options):
    layer = getattr(torch.nn, kind)(features, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(SCALE))
            layer.bias.copy_(torch.tensor(BIAS))
    return layer


def torch_stats(layer):
    return {"mean": layer.running_mean.numpy().copy(), "var": layer.running_var.numpy().copy()}


def test_one_value_per_channel_is_torchs_error_and_our_bias(torch):
    layer = torch_layer(torch)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.tensor(X[:1]))
    for bessel_correction in (False, True):

        def loss(x, params, bessel_correction=bessel_correction):
            y, new = norm(x, params, start(), training=True, bessel_correction=bessel_correction)
            return (y * COTANGENT[:1]).sum() + new["var"].sum(), (y, new)

        gradients, (y, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(X[:1], PARAMS)
        np.testing.assert_array_equal(y, BIAS[None])
        close(new, {"mean": 0.01 * X[0], "var": np.full(3, 0.99)})
        close(gradients, (np.zeros((1, 3)), {"scale": np.zeros(3), "bias": COTANGENT[0]}))
    # At inference one value is as good as many, in both.
    layer.eval()
    close(norm(X[:1], PARAMS, start(), training=False)[0], layer(torch.tensor(X[:1])).detach().numpy())


def test_torch_memory_formats_and_our_axes(torch):
    x = np.random.default_rng(4).standard_normal((4, 3, 5, 2)).astype(np.float32) * 2 + 1
    g = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    last = functools.partial(np.moveaxis, source=1, destination=-1)
    theirs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = torch_layer(torch, "BatchNorm2d")
        leaf = torch.tensor(x).to(memory_format=memory_format).requires_grad_()
        y = layer(leaf)
        assert y.is_contiguous(memory_format=memory_format)
        y.backward(torch.tensor(g))
        gradients = (leaf.grad.numpy(), {"scale": layer.weight.grad.numpy(), "bias": layer.bias.grad.numpy()})
        theirs.append((y.detach().numpy(), torch_stats(layer), gradients))
    close(theirs[0], theirs[1], rtol=1e-4, atol=1e-5)

    def ours(x, g, axis):
        def f(x, params):
            return batch_norm(x, params, start(), training=True, axis=axis, momentum=0.9, bessel_correction=True)

        y, vjp, stats = jax.vjp(f, x, PARAMS, has_aux=True)
        return y, stats, vjp(g)

    ours = jax.jit(ours, static_argnums=2)
    y, stats, (dx, dparams) = ours(x, g, 1)
    y_last, stats_last, (dx_last, dparams_last) = ours(last(x), last(g), -1)
    close((y_last, stats_last, dx_last, dparams_last), (last(y), stats, last(dx), dparams), rtol=1e-4)
    close((y, stats, (dx, dparams)), theirs[0], rtol=1e-3, atol=1e-5)
    mean, var = exact(last(x))
    count = x.size // 3
    close(stats, {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var * count / (count - 1)})


COUNTS = (3, 1, 0, 5)  # of the members' batches: one of a single example, one empty


@pytest.mark.parametrize("way", ["vmap", "shard_map"])
def test_unequal_ranks_are_torchs_concatenated_batch(torch, way):
    """What torch's SyncBatchNorm, which needs a GPU, is to equal."""
    rng = np.random.default_rng(6)
    mask = np.arange(5)[None] < np.array(COUNTS)[:, None]
    x, g = (rng.standard_normal((4, 5, 3)).astype(np.float32) * 2 + np.arange(4)[:, None, None] for _ in range(2))
    x, g = np.where(mask[..., None], x, np.nan).astype(np.float32), np.where(mask[..., None], g, 0).astype(np.float32)
    leaf = torch.tensor(x[mask]).requires_grad_()
    layer = torch_layer(torch)
    y = layer(leaf)
    y.backward(torch.tensor(g[mask]))
    expected = {"scale": layer.weight.grad.numpy(), "bias": layer.bias.grad.numpy()}

    def local(x, mask, params):
        options = {"momentum": 0.9, "bessel_correction": True, "axis_name": "batch"}
        return batch_norm(x, params, start(), training=True, mask=mask, **options)

    def joint(x, params):
        if way == "vmap":
            y, stats = jax.vmap(local, (0, 0, None), axis_name="batch")(x, mask, params)
            return y, jax.tree.map(lambda v: v[0], stats)
        mesh = jax.make_mesh((4,), ("batch",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
        specs = {"mesh": mesh, "in_specs": (P("batch"), P("batch"), P()), "out_specs": (P("batch"), P())}
        y, stats = jax.shard_map(local, **specs)(x.reshape(20, 3), mask.reshape(20), params)
        return y.reshape(4, 5, 3), stats

    @jax.jit
    def step(x, params):
        y, vjp, stats = jax.vjp(joint, x, params, has_aux=True)
        return y, stats, vjp(g)

    ours, stats, (dx, dparams) = step(x, PARAMS)
    close(np.asarray(ours)[mask], y.detach().numpy(), rtol=1e-4, atol=1e-5)
    close(np.asarray(dx)[mask], leaf.grad.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(dx)[~mask], 0)
    close(dparams, expected, rtol=1e-4, atol=1e-5)
    close(stats, torch_stats(layer))
    mean, var = exact(x[mask])
    close(stats, {"mean": 0.1 * mean, "var": 0.9 + 0.1 * var * 9 / 8})


def test_torch_momentum_none_weighs_batches_alike(torch):
    layer = torch_layer(torch, momentum=None, affine=False)
    stats, found = start(), []
    for step, x in enumerate((BATCHES[0], BATCHES[1][:5], BATCHES[2][:2])):
        layer(torch.tensor(x))
        _, stats = norm(x, {}, stats, training=True, momentum=1 - 1 / (step + 1), bessel_correction=True)
        mean, var = exact(x)
        found.append((mean, var * len(x) / (len(x) - 1)))
        close(stats, torch_stats(layer))
    mean, var = np.mean(found, axis=0)
    close(stats, {"mean": mean, "var": var})


def test_torch_without_running_statistics_or_parameters(torch):
    """track_running_stats=False: the batch's statistics in evaluation too, by us `training=True` without the state."""
    layer = torch_layer(torch, track_running_stats=False)
    plain = torch_layer(torch, affine=False)
    leaf = torch.tensor(X)
    mean, var = exact(X)
    y, _ = norm(X, PARAMS, start(), training=True)
    close(y, normalized(X, mean, var) * SCALE + BIAS, rtol=1e-4, atol=1e-5)
    for is_training in (True, False):
        close(layer.train(is_training)(leaf).detach().numpy(), y, rtol=1e-4, atol=1e-5)
    assert layer.running_mean is None
    close(plain(leaf).numpy(), norm(X, {}, start(), training=True)[0], rtol=1e-4, atol=1e-5)


def test_evaluation_keeps_the_state_and_is_affine_in_torch_and_here(torch):
    layer = torch_layer(torch)
    layer(torch.tensor(BATCHES[1]))
    before = torch_stats(layer)
    leaf = torch.tensor(X).requires_grad_()
    layer.eval()
    y = layer(leaf)
    layer.zero_grad()
    y.backward(torch.tensor(COTANGENT))
    stats = stats_of(**before)
    f = lambda x, params: norm(x, params, stats, training=False)[0]
    ours, vjp = jax.vjp(f, jnp.asarray(X), PARAMS)
    dx, dparams = vjp(jnp.asarray(COTANGENT))
    close(ours, y.detach().numpy(), rtol=1e-4, atol=1e-5)
    close(dx, leaf.grad.numpy())
    close(dx, COTANGENT * SCALE / np.sqrt(before["var"] + 1e-5))
    close(dparams, {"scale": layer.weight.grad.numpy(), "bias": layer.bias.grad.numpy()}, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(torch_stats(layer), before)


@pytest.mark.filterwarnings("ignore")
def test_second_derivatives_where_torchs_forward_mode_is_wrong(torch, x64):
    x, c = np.random.default_rng(8).standard_normal((2, 4, 2))
    x_t, c_t = torch.tensor(x), torch.tensor(c)
    rev, fwd = torch.func.jacrev, torch.func.jacfwd

    def by_hand(x):
        centered = x - x.mean(0)
        return (torch.sin(centered / torch.sqrt((centered**2).mean(0) + 1e-5)) * c_t).sum()

    def theirs(x):
        return (torch.sin(torch.nn.functional.batch_norm(x, None, None, training=True)) * c_t).sum()

    stats = init_batch_norm(2, dtype=jnp.float64)[1]
    ours = lambda x: (jnp.sin(batch_norm(x, {}, stats, training=True)[0]) * c).sum()
    expected = rev(rev(by_hand))(x_t).numpy()
    np.testing.assert_allclose(jax.jit(jax.jacrev(jax.jacfwd(ours)))(x), expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(rev(rev(theirs))(x_t).numpy(), expected, rtol=1e-9, atol=1e-10)
    wrong = rev(fwd(theirs))(x_t).numpy()
    assert np.abs(wrong - expected).max() > 0.1 * np.abs(expected).max()


# --- precise batch norm -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """dense – norm – ReLU – dense – norm – dense."""

    @nn.compact
    def __call__(self, x, training):
        x = nn.relu(BatchNorm(use_running_average=not training)(nn.Dense(4)(x)))
        x = BatchNorm(use_running_average=not training)(nn.Dense(3)(x))
        return nn.Dense(2)(x)


def torch_net(torch):
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear, torch.nn.BatchNorm1d
    return torch.nn.Sequential(linear(3, 4), norm(4), torch.nn.ReLU(), linear(4, 3), norm(3), linear(3, 2))


NAMES = {"Dense_0": "0", "BatchNorm_0": "1", "Dense_1": "3", "BatchNorm_1": "4", "Dense_2": "5"}


def test_update_bn_weighs_batches_alike_and_ours_by_their_examples(torch):
    data = BATCHES.reshape(-1, 3)
    net = torch_net(torch)
    like = jax.eval_shape(lambda: Net().init(jax.random.key(0), data, False))
    variables = convert.variables_from_torch(net, like, NAMES)

    def both(cuts, **options):
        parts = np.split(data, cuts)
        torch.optim.swa_utils.update_bn([torch.tensor(part) for part in parts], net)
        theirs = convert.variables_from_torch(net, like, NAMES)["batch_stats"]
        options = {"bessel_correction": True, "training": True, **options}
        return jax.device_get((theirs, reestimate_batch_stats(Net().apply, variables, parts, **options)))

    # One batch of all data: the same.
    theirs, whole = both([])
    close(theirs, whole, rtol=1e-4)
    dense = variables["params"]["Dense_0"]
    first = data.astype(np.float64) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    mean, var = exact(first)
    close(whole["BatchNorm_0"], {"mean": mean, "var": var * 32 / 31}, rtol=1e-4)
    # A last batch of two: torch gives it the weight of the fifteen of each of the others, and leaves out how much the
    # batches' means differ. Ours is of the data, however they are split, and so are the deeper layers' statistics.
    cuts, sizes = [15, 30], np.array([15, 15, 2])
    theirs, ours = both(cuts, exactly=True)
    parts = [exact(part) for part in np.split(first, cuts)]
    unbiased = [part[1] * n / (n - 1) for part, n in zip(parts, sizes, strict=True)]
    of_torch = {"mean": np.mean([part[0] for part in parts], axis=0), "var": np.mean(unbiased, axis=0)}
    close(theirs["BatchNorm_0"], of_torch, rtol=1e-4)
    assert np.abs(of_torch["mean"] - mean).max() > 0.1
    hidden = np.maximum(normalized(first, mean, var * 32 / 31), 0)
    dense = variables["params"]["Dense_1"]
    deep = exact(hidden @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]))
    close(ours["BatchNorm_0"], {"mean": mean, "var": var * 32 / 31}, rtol=1e-4)
    close(ours["BatchNorm_1"], {"mean": deep[0], "var": deep[1] * 32 / 31}, rtol=1e-4, atol=1e-5)
    # In one pass, as fvcore's precise batch norm: E[x] and E[x²] weighed by the examples. That is exact for the first
    # layer alone, as the others see what a batch's own statistics have normalized.
    _, one_pass = both(cuts)
    mean = sizes @ [part[0] for part in parts] / 32
    square = sizes @ [part[1] + part[0] ** 2 for part in parts] / 32
    close(one_pass["BatchNorm_0"], {"mean": mean, "var": (square - mean**2) * 32 / 31}, rtol=1e-4)
    assert np.abs(one_pass["BatchNorm_1"]["var"] / ours["BatchNorm_1"]["var"] - 1).max() > 0.01


# --- flax -------------------------------------------------------------------------------------------------------------


def test_a_fully_masked_batch_makes_flax_statistics_nan_and_leaves_ours():
    mask = np.zeros((8, 1), bool)
    stats = stats_of(*exact(BATCHES[1]))
    variables = {"params": PARAMS, "batch_stats": stats}

    @jax.jit
    def theirs(x):
        linen = nn.BatchNorm(use_running_average=False).apply(variables, x, mask=mask, mutable=["batch_stats"])
        layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        return linen, layer(x, use_running_average=False, mask=mask), layer.mean[...], layer.var[...]

    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(theirs(X)))
    y, new = norm(X, PARAMS, stats, training=True, mask=mask)
    chex.assert_trees_all_equal(new, stats)
    close(y, normalized(X, *exact(BATCHES[1])) * SCALE + BIAS, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(3, 1, 2, 5), COUNTS], ids=["unequal", "one empty"])
def test_flax_takes_the_mean_of_the_members_means_and_ours_of_their_examples(counts):
    mask = np.arange(5)[None] < np.array(counts)[:, None]
    x = (
        np.random.default_rng(7).standard_normal((4, 5, 3)).astype(np.float32)
        + np.arange(4, dtype=np.float32)[:, None, None]
    )

    def trained(layer):
        variables = {"batch_stats": start()}
        run = lambda x, mask: layer.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[1]["batch_stats"]
        return jax.tree.map(lambda v: v[0], jax.jit(jax.vmap(run, axis_name="batch"))(x, mask))

    options = {"use_running_average": False, "momentum": 0.0, "axis_name": "batch"}
    options |= {"use_scale": False, "use_bias": False}
    mean, var = exact(x[mask])
    close(trained(BatchNorm(**options)), {"mean": mean, "var": var})
    theirs = trained(nn.BatchNorm(**options))

    def run(x, mask):
        layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
        layer(x, mask=mask[:, None])
        return {"mean": layer.mean[...], "var": layer.var[...]}

    theirs_nnx = jax.tree.map(lambda v: v[0], jax.jit(jax.vmap(run, axis_name="batch"))(x, mask))
    close(theirs_nnx, theirs)
    if 0 in counts:
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(theirs))
        return
    members = [exact(x[i][mask[i]]) for i in range(4)]
    wrong = np.mean([m for m, _ in members], axis=0)
    close(theirs, {"mean": wrong, "var": np.mean([v + m**2 for m, v in members], axis=0) - wrong**2}, rtol=1e-4)
    assert np.all(np.abs(wrong - mean) > 0.1)
