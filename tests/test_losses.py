"""Losses of Flax models: each mode is the function that it says, and running statistics never move."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import bnjax.linen
import bnjax.nnx
from bnjax import analysis, models, training
from bnjax.analysis import losses

X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (8, 3)), jnp.float32)
OTHER = jnp.asarray(np.random.default_rng(1).normal(-1, 1, (8, 3)), jnp.float32)
Y = jnp.arange(8, dtype=jnp.int32) % 2


class Net(nn.Module):
    norm: type = bnjax.linen.BatchNorm
    bessel: bool = False

    @nn.compact
    def __call__(self, x, *, training, mask=None):
        options = {"bessel_correction": True} if self.bessel else {}
        x = self.norm(use_running_average=not training, **options)(
            nn.Dense(4)(x), mask=None if mask is None else mask.reshape((-1, 1))
        )
        return nn.Dense(2)(nn.tanh(x))


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), norm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, mask=None):
        masked = {} if mask is None else {"mask": mask.reshape((-1, 1))}
        return self.last(nnx.tanh(self.norm(self.first(x), **masked)))


def make(norm, bessel=False):
    model = Net(norm, bessel)
    variables = model.init(jax.random.key(0), X, training=False)
    stats = {"BatchNorm_0": {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 2.0)}}
    return model, {"params": variables["params"], "batch_stats": stats}


def expected(params, mean, var, x=X, y=Y, weights=None):
    """The loss with given statistics, written out."""
    h = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    h = (h - np.asarray(mean)[None]) / np.sqrt(np.asarray(var)[None] + 1e-5)
    h = h * params["BatchNorm_0"]["scale"][None] + params["BatchNorm_0"]["bias"][None]
    z = np.tanh(h) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
    each = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y]
    return np.average(each, weights=weights)


def statistics(params, x):
    h = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    return h.mean(0), h.var(0)


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_modes_of_linen_models(norm):
    model, variables = make(norm)
    params = variables["params"]
    moved = jax.tree.map(lambda p: p + 0.5, params)
    stats = variables["batch_stats"]["BatchNorm_0"]
    by_mode = {
        "batch": statistics(moved, X),
        "running": (stats["mean"], stats["var"]),
        "frozen": statistics(params, OTHER),
        "reestimated": statistics(moved, OTHER),
    }
    for mode, (mean, var) in by_mode.items():
        loss = losses.linen_loss(model, variables, training.cross_entropy, mode=mode, at=OTHER)
        np.testing.assert_allclose(jax.jit(loss)(moved, X, Y), expected(moved, mean, var), rtol=2e-5, err_msg=mode)
    assert stats["mean"].tolist() == pytest.approx([0.3] * 4) and stats["var"].tolist() == [2] * 4


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
def test_modes_of_nnx_models(norm):
    model = NnxNet(norm, nnx.Rngs(0))
    model.norm.mean[...], model.norm.var[...] = jnp.full(4, 0.3), jnp.full(4, 2.0)
    for mode in ("batch", "running", "frozen", "reestimated"):
        loss, params = losses.nnx_loss(model, training.cross_entropy, mode=mode, at=OTHER)
        moved = jax.tree.map(lambda p: p + 0.5, params)
        renamed = lambda p: {"Dense_0": p["first"], "BatchNorm_0": p["norm"], "Dense_1": p["last"]}
        mean, var = {
            "batch": statistics(renamed(moved), X),
            "running": (np.full(4, 0.3), np.full(4, 2.0)),
            "frozen": statistics(renamed(params), OTHER),
            "reestimated": statistics(renamed(moved), OTHER),
        }[mode]
        found = jax.jit(loss)(moved, X, Y)
        np.testing.assert_allclose(found, expected(renamed(moved), mean, var), rtol=2e-5, err_msg=mode)
        gradient = jax.grad(loss)(moved, X, Y)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert model.norm.mean[...].tolist() == pytest.approx([0.3] * 4) and model.norm.var[...].tolist() == [2] * 4
    assert not model.norm.use_running_average


def test_modes_have_different_curvature():
    model, variables = make(bnjax.linen.BatchNorm)
    vector = jax.tree.map(jnp.ones_like, variables["params"])
    found = []
    for mode in ("batch", "running", "frozen"):
        loss = losses.linen_loss(model, variables, training.cross_entropy, mode=mode, at=X)
        product = jax.jit(functools.partial(analysis.hessian_product, loss))(variables["params"], vector, X, Y)
        found.append(product["Dense_0"]["kernel"])
    batch, running, frozen = found
    assert abs(batch - frozen).max() > 1e-3 and abs(frozen - running).max() > 1e-3


def test_weights():
    model, variables = make(bnjax.linen.BatchNorm)
    params, weights = variables["params"], jnp.array([1.0, 2, 0, 1, 0, 1, 3, 1])
    loss = losses.linen_loss(model, variables, training.cross_entropy, mode="running")
    stats = variables["batch_stats"]["BatchNorm_0"]
    found = loss(params, X, Y, weights)
    np.testing.assert_allclose(found, expected(params, stats["mean"], stats["var"], weights=weights), rtol=1e-5)
    spoilt = jnp.where(weights[:, None] > 0, X, jnp.nan)
    masked = losses.linen_loss(model, variables, training.cross_entropy)
    kept = weights > 0
    np.testing.assert_allclose(masked(params, spoilt, Y, kept), masked(params, X[kept], Y[kept]), rtol=1e-5)


def test_statistics_of_a_batch_are_biased_and_exact():
    for norm, bessel in ((bnjax.linen.BatchNorm, True), (nn.BatchNorm, False)):
        model, variables = make(norm, bessel)
        stats = losses.linen_batch_stats(model, variables, X)["BatchNorm_0"]
        mean, var = statistics(variables["params"], X)
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    masked = losses.linen_batch_stats(*make(bnjax.linen.BatchNorm), X, weights=jnp.arange(8) < 4)["BatchNorm_0"]
    np.testing.assert_allclose(masked["mean"], statistics(variables["params"], X[:4])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argument", ["train", "use_running_average"])
def test_other_arguments(argument):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, **options):
            average = options["use_running_average"] if argument != "train" else not options["train"]
            return nn.Dense(2)(bnjax.linen.BatchNorm(use_running_average=average)(x))

    variables = Model().init(jax.random.key(0), X, **{argument: argument != "train"})
    found = [
        losses.linen_loss(Model(), variables, training.cross_entropy, mode=mode, argument=argument)(
            variables["params"], X, Y
        )
        for mode in ("batch", "running")
    ]
    normalized = (X - X.mean(0)[None]) / np.sqrt(X.var(0) + 1e-5)[None]
    kernel = variables["params"]["Dense_0"]["kernel"]
    for value, x in zip(found, (normalized, X / np.sqrt(1 + 1e-5)), strict=True):
        z = x @ kernel
        np.testing.assert_allclose(value, (np.log(np.exp(z).sum(1)) - z[np.arange(8), Y]).mean(), rtol=1e-5)


def test_dropout_is_one_function():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, training):
            return nn.Dropout(0.5, deterministic=not training)(nn.Dense(2)(x))

    variables = Model().init(jax.random.key(0), X, training=False)
    rngs = {"dropout": jax.random.key(1)}
    loss = losses.linen_loss(Model(), variables, lambda z, y: (z**2).sum(-1), rngs=rngs)
    assert loss(variables["params"], X, Y) == loss(variables["params"], X, Y)


class DropoutBefore(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, *, training):
        x = nn.Dropout(self.rate, deterministic=not training)(nn.Dense(4)(x))
        x = bnjax.linen.BatchNorm(use_running_average=not training)(x)
        return nn.BatchNorm(use_running_average=True)(x)  # which no phase moves


class NnxDropoutBefore(nnx.Module):
    def __init__(self, rate, rngs):
        self.dense, self.dropout = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(rate, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dropout(self.dense(x)))


@pytest.mark.parametrize("mode", ["frozen", "reestimated"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_statistics_are_taken_without_dropout_and_without_its_keys(api, mode):
    options = {"mode": mode, "at": X}
    if api == "linen":
        variables = DropoutBefore(0.0).init(jax.random.key(0), X, training=False)
        of = [(DropoutBefore(rate), variables, training.cross_entropy) for rate in (0.5, 0.0)]
        noisy, (without, batch) = (
            losses.linen_loss(*of[0], **options),
            (losses.linen_loss(*of[1], **how) for how in (options, {})),
        )
        params = variables["params"]
        rngs = {"dropout": jax.random.key(1)}
        stats = [losses.linen_batch_stats(DropoutBefore(0.5), variables, X, rngs=keys) for keys in (None, rngs)]
        trained = DropoutBefore(0.5).apply(variables, X, training=True, rngs=rngs, mutable=["batch_stats"])[1]
        of_training = trained["batch_stats"]["BatchNorm_0"]["mean"] / 0.01
        np.testing.assert_allclose(stats[1]["BatchNorm_0"]["mean"], of_training, rtol=1e-4, atol=1e-6)
        assert not np.allclose(stats[0]["BatchNorm_0"]["mean"], of_training)
        np.testing.assert_array_equal(stats[1]["BatchNorm_1"]["mean"], np.zeros(4))
    else:
        models = [NnxDropoutBefore(rate, nnx.Rngs(0)) for rate in (0.5, 0.0)]
        noisy, params = losses.nnx_loss(models[0], training.cross_entropy, **options)
        without, batch = (losses.nnx_loss(models[1], training.cross_entropy, **how)[0] for how in (options, {}))
        assert not np.allclose(
            losses.nnx_batch_stats(models[0], X, rngs="own")["norm"]["mean"],
            losses.nnx_batch_stats(models[0], X)["norm"]["mean"],
        )
    np.testing.assert_array_equal(noisy(params, X, Y), without(params, X, Y))
    np.testing.assert_allclose(noisy(params, X, Y), batch(params, X, Y), rtol=1e-5)


def test_layers_in_order():
    variables_of = lambda model, x: jax.eval_shape(lambda: model.init(jax.random.key(0), x, training=False))
    x = jnp.ones((1, 32, 32, 3))
    network = models.VGG(10, bnjax.linen.BatchNorm, 11, 2)
    layers = losses.layers_in_order(network, variables_of(network, x), x)
    assert layers == [(f"Conv_{i}", f"BatchNorm_{i}") for i in range(8)] + [(f"Dense_{i}",) for i in range(3)]
    residual = models.ResNet(10, bnjax.linen.BatchNorm, (1, 1), stem="cifar", width=2)
    layers = losses.layers_in_order(residual, variables_of(residual, x), x)
    assert layers[0] == ("Conv_0", "BatchNorm_0") and layers[-1] == ("Dense_0",) and len(layers) == 7


def test_layers_with_parameters_of_their_own_and_other_methods():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x @ self.param("kernel", nn.initializers.ones, (3, 3)))

    class Encoder(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", nn.initializers.ones, (3, 3))

        def encode(self, x):
            return x @ self.kernel

    class Model(nn.Module):
        def setup(self):
            self.encoder, self.block = Encoder(), Block()
            self.shift = self.param("shift", nn.initializers.ones, (3,))

        def __call__(self, x):
            return self.block(self.encoder.encode(x)) + self.shift[None]

    variables = Model().init(jax.random.key(0), X)
    layers = losses.layers_in_order(Model(), variables, X, argument=None)
    assert layers == [("encoder",), ("block/kernel",), ("block/Dense_0", "shift")]
    loss = losses.linen_loss(Model(), variables, lambda z, y: (z**2).sum(-1), argument=None)
    shift = analysis.covariate_shift(loss, variables["params"], variables["params"], X, Y, layers=layers)
    assert shift.layers == ("encoder", "block/kernel", "block/Dense_0")
    with pytest.raises(ValueError, match=r"must all be used by the model's call, for their order, got unused too"):
        losses.layers_in_order(Model(), {"params": {**variables["params"], "unused": jnp.ones(3)}}, X, argument=None)
    with pytest.raises(ValueError, match=r"must end with a module that is called, got encoder, block/kernel, shift"):
        losses.layer_outputs(Model(), variables, X, argument=None)


def test_layers_within_loops_and_compiled_parts_are_where_these_are():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return bnjax.linen.BatchNorm(use_running_average=True)(nn.Dense(3)(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(nn.Dense)(3, name="z")(x)
            repeated = nn.scan(
                Block, variable_axes={True: 0}, split_rngs={"params": True}, length=2, in_axes=nn.broadcast
            )
            x, _ = repeated(name="y")(x, None)
            return nn.cond(x.sum() > 0, lambda model, x: model(x), lambda model, x: -model(x), nn.Dense(2, name="a"), x)

    variables = Model().init(jax.random.key(0), X)
    layers = losses.layers_in_order(Model(), variables, X, argument=None)
    assert layers == [("z",), ("y/Dense_0", "y/BatchNorm_0"), ("a",)]  # the scale within a turn is no matrix


class OwnKernel(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.arange(16.0).reshape((4, 4)))

    def __call__(self, h, sign, *, twice=False):
        return sign * (1 + twice) * h @ self.kernel[...]


class Deeper(nnx.Module):
    """The names do not tell the order, and a layer is the user's, with further arguments by place."""

    def __init__(self, rngs):
        self.z, self.norm, self.b = nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs), OwnKernel()
        self.last = nnx.Sequential(nnx.Linear(4, 2, rngs=rngs))

    def __call__(self, x, *, mask=None):
        return self.last(self.b(self.norm(self.z(x), mask=mask), -1, twice=True))


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_layers_of_nnx_models(mode):
    model = Deeper(nnx.Rngs(0))
    model.norm.mean[...] = jnp.arange(4.0)
    apply, variables = bnjax.nnx.functional(model)
    layers = losses.layers_in_order(apply, variables, X)
    assert layers == [("z", "norm"), ("b",), ("last/layers/0",)]
    loss, params = losses.nnx_loss(model, training.cross_entropy)
    assert analysis.covariate_shift(loss, params, params, X, Y, layers=layers).layers == ("z", "b", "last/layers/0")
    found = losses.layer_outputs(apply, variables, X, mode=mode)
    assert list(found) == ["z", "b", "last/layers/0"]
    h = np.asarray(model.z(X), np.float64)
    mean, var = (h.mean(0), h.var(0)) if mode == "batch" else (np.arange(4), np.ones(4))
    h = (h - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(found["z"], h, atol=1e-4)
    np.testing.assert_allclose(found["b"], -2 * h @ np.arange(16).reshape((4, 4)), atol=1e-2)
    np.testing.assert_array_equal(model.norm.mean[...], np.arange(4))


def test_statistics_of_a_batch_of_nnx_models():
    model, weights = Deeper(nnx.Rngs(0)), np.arange(8) % 3
    h = np.asarray(model.z(X), np.float64)
    found = losses.nnx_batch_stats(model, X, weights=weights)["norm"]
    mean = np.average(h, 0, weights)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(found["var"], np.average((h - mean) ** 2, 0, weights), rtol=1e-5)
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(4))


def test_statistics_of_a_batch_do_not_reach_what_nn_jit_remembers():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            return bnjax.linen.BatchNorm(use_running_average=not training)(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, training):
            return nn.jit(Inner, static_argnums=2)(name="inner")(x, training)

    variables = Model().init(jax.random.key(0), X, training=False)
    for _ in range(2):
        stats = losses.linen_batch_stats(Model(), variables, X)["inner"]["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], X.mean(0), rtol=1e-5)
        _, updates = Model().apply(variables, X, training=True, mutable=["batch_stats"])
        np.testing.assert_allclose(updates["batch_stats"]["inner"]["BatchNorm_0"]["mean"], 0.01 * X.mean(0), rtol=1e-4)


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_layer_outputs(mode):
    model, variables = make(bnjax.linen.BatchNorm)
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    found = jax.jit(functools.partial(losses.layer_outputs, model, mode=mode))(variables, X)
    assert list(found) == ["Dense_0", "Dense_1"]
    h = X @ params["Dense_0"]["kernel"]
    mean, var = (h.mean(0), h.var(0)) if mode == "batch" else (stats["mean"], stats["var"])
    h = (h - np.asarray(mean)[None]) / np.sqrt(np.asarray(var)[None] + 1e-5)
    np.testing.assert_allclose(found["Dense_0"], h, atol=1e-5)
    np.testing.assert_allclose(found["Dense_1"], np.tanh(h) @ params["Dense_1"]["kernel"], atol=1e-5)


def test_errors():
    model, variables = make(bnjax.linen.BatchNorm)
    with pytest.raises(ValueError, match=r"mode must be one of batch, running, frozen, reestimated, got 'eval'"):
        losses.linen_loss(model, variables, training.cross_entropy, mode="eval")
    with pytest.raises(ValueError, match=r"mode 'frozen' needs .* give at=x"):
        losses.linen_loss(model, variables, training.cross_entropy, mode="frozen")


class TestOnAMesh:
    """Eight devices give the numbers of one, with global statistics or with each device's."""

    mesh = training.make_mesh(devices=jax.devices()[:8])
    numbers = np.random.default_rng(0).normal(size=(32, 3)) * np.arange(1, 33)[:, None]
    steps = np.array([0.1, 0.5])

    def measured(self, loss, params, x, y):
        """A probe, an eigenvalue and a trace as one program."""

        def all_of_it(params, x, y):
            keys = jax.random.split(jax.random.key(0))
            pairs = analysis.hessian_eigenpairs(loss, params, 1, x, y, key=keys[0], num_steps=8)
            probe = analysis.gradient_probe(loss, params, self.steps, x, y)
            return probe, pairs.values, analysis.hessian_trace(loss, params, x, y, key=keys[1], num_samples=2).estimate

        return jax.jit(all_of_it)(params, x, y)

    def close(self, found, expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)

    @pytest.fixture
    def model(self, x64):
        def of(axis_name):
            norm = functools.partial(bnjax.linen.BatchNorm, axis_name=axis_name)
            return models.Perceptron((4,), 2, norm, "before", nn.tanh)

        variables = of(None).init(jax.random.key(0), jnp.ones((1, 3)), training=False)
        return of, jax.tree.map(lambda v: v.astype(jnp.float64), variables)

    @pytest.mark.exhaustive
    def test_global_statistics(self, model):
        of, variables = model
        x, y = jnp.asarray(self.numbers), jnp.arange(32) % 2
        params = variables["params"]
        alone = losses.linen_loss(of(None), variables, training.cross_entropy)
        expected = self.measured(alone, params, x, y)
        placed = training.shard_batch((x, y), self.mesh)
        self.close(self.measured(alone, training.replicate(params, self.mesh), *placed), expected)
        synced = losses.linen_loss(of("batch"), variables, training.cross_entropy)
        self.close(self.measured(analysis.shard_loss(synced, self.mesh), params, *placed), expected)

    @pytest.mark.exhaustive
    def test_statistics_of_each_device(self, model):
        of, variables = model
        x, y = jnp.asarray(self.numbers), jnp.arange(32) % 2
        params = variables["params"]
        alone = losses.linen_loss(of(None), variables, training.cross_entropy)

        def in_groups(params, x, y):
            return jax.vmap(alone, (None, 0, 0))(params, x.reshape((8, 4, 3)), y.reshape((8, 4))).mean()

        sharded = analysis.shard_loss(alone, self.mesh)
        self.close(self.measured(sharded, params, x, y), self.measured(in_groups, params, x, y))
        assert abs(sharded(params, x, y) - alone(params, x, y)) > 1e-3

    def test_weights_that_differ(self, model):
        of, variables = model
        x, y = jnp.asarray(self.numbers), jnp.arange(32) % 2
        weights = jnp.arange(32.0) * (jnp.arange(32) > 5)
        alone = losses.linen_loss(of(None), variables, training.cross_entropy)
        synced = losses.linen_loss(of("batch"), variables, training.cross_entropy, axis_name="batch")
        found, expected = (
            jax.jit(jax.value_and_grad(loss))(variables["params"], x, y, weights)
            for loss in (analysis.shard_loss(synced, self.mesh), alone)
        )
        self.close(found, expected)

    def test_batches_that_do_not_divide(self):
        loss = analysis.shard_loss(lambda w, x: (w * x).mean(), self.mesh)
        with pytest.raises(ValueError, match=r"8 devices divide, got shape \(6,\)"):
            loss(1.0, jnp.ones(6))

    def test_inside_shard_map(self):
        """Measurements run inside a mapped program too, on a loss that is a mean over the axis."""

        def body(w, x):
            loss = lambda w, x: jax.lax.pmean((w * x).mean() ** 2, "batch")
            return analysis.gradient_probe(loss, w, self.steps, x).loss

        x = jnp.arange(8.0)
        found = jax.shard_map(body, mesh=self.mesh, in_specs=(P(), P("batch")), out_specs=P())(jnp.array(1.0), x)
        g = 2 * (x**2).mean()
        np.testing.assert_allclose(found, (1 - self.steps * g) ** 2 * (x**2).mean(), rtol=1e-5)


# --- every layer in every mode, against what the layer itself computes ------------------------------------------------

LAYERS = {
    "BatchNorm": {},
    "NoisyBatchNorm": {},
    "LpBatchNorm": {"p": 1},
    "BatchRenorm": {"r_max": 1.2, "d_max": 0.3},  # so that both are clipped
    "GhostBatchNorm": {"ghost_size": 2},
    "MovingBatchNorm": {"momentum": 0.7},
    "FrozenBatchNorm": {},
    "SplitBatchNorm": {"num_splits": 2},
}
START = {"mean": np.asarray([0.5, -1.0, 0.0, 2.0]), "var": np.asarray([4.0, 0.5, 1.0, 9.0])}


class Deep(nn.Module):
    """Two batch norms, so that the second one's statistics depend on how the first normalizes."""

    kind: str

    @nn.compact
    def __call__(self, x, *, training, mask=None):
        further = {"split": 1} if self.kind == "SplitBatchNorm" else {}
        for i in (0, 1):
            layer = getattr(bnjax.linen, self.kind)
            norm = layer(use_running_average=not training, name=f"norm_{i}", **LAYERS[self.kind])
            x = norm(nn.Dense(4, name=f"dense_{i}")(x), mask=mask, **further)
        return x


class NnxDeep(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind = kind
        layer = functools.partial(getattr(bnjax.nnx, kind), 4, rngs=rngs, **LAYERS[kind])
        self.dense_0, self.norm_0 = nnx.Linear(3, 4, rngs=rngs), layer()
        self.dense_1, self.norm_1 = nnx.Linear(4, 4, rngs=rngs), layer()

    def __call__(self, x, mask=None):
        further = {"split": 1} if self.kind == "SplitBatchNorm" else {}
        x = self.norm_0(self.dense_0(x), mask=mask, **further)
        return self.norm_1(self.dense_1(x), mask=mask, **further)


def without_noise(kind):
    """The kind of layer by which statistics are taken."""
    return "BatchNorm" if kind in ("NoisyBatchNorm", "BatchRenorm", "MovingBatchNorm") else kind


def own_statistics(kind, h):
    """The statistics of a batch that a layer is shown, in float64."""
    h = np.asarray(h, np.float64)
    if kind == "FrozenBatchNorm":
        return START["mean"], START["var"]
    if kind == "LpBatchNorm":
        return h.mean(0), np.square(np.abs(h).mean(0))
    if kind == "GhostBatchNorm":
        return h.mean(0), h.reshape((-1, 2, 4)).var(1).mean(0)
    return h.mean(0), h.var(0)


def inference(params, statistics_of_layers, x):
    """The mean loss of two layers that are normalized by given statistics, in float64."""
    x = np.asarray(x, np.float64)
    for i, (mean, var) in enumerate(statistics_of_layers):
        dense, norm = (jax.tree.map(lambda v: np.asarray(v, np.float64), params[f"{n}_{i}"]) for n in ("dense", "norm"))
        x = x @ dense["kernel"] + dense["bias"]
        x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), Y])


def check_modes(kind, params, shifted, loss_of, shown, own_loss):
    """Compares the four modes with the layer's own computations.

    Args:
      kind: of layer.
      params: W₀.
      shifted: the parameters at which the loss is taken.
      loss_of: mode to loss function.
      shown: `(params, x)` to what the two layers are shown in a training call.
      own_loss: the loss of the model's own training call at the shifted parameters.
    """
    at_start, at_shifted = ([own_statistics(kind, h) for h in shown(weights, OTHER)] for weights in (params, shifted))
    running = [(START["mean"], START["var"])] * 2
    expected = {
        "batch": own_loss,
        "running": inference(shifted, running, X),
        "frozen": inference(shifted, at_start, X),
        "reestimated": inference(shifted, at_shifted, X),
    }
    for mode, value in expected.items():
        np.testing.assert_allclose(jax.jit(loss_of(mode))(shifted, X, Y), value, rtol=2e-5, err_msg=mode)
    if kind == "FrozenBatchNorm":
        assert expected["running"] == expected["frozen"] == expected["reestimated"]
    else:
        assert len({round(float(value), 3) for value in expected.values()}) == 4


def shift(params):
    return jax.tree.map(lambda p: p + 0.25 * jnp.sin(jnp.arange(p.size, dtype=p.dtype) + 1).reshape(p.shape), params)


def test_an_argument_that_the_models_call_does_not_take_is_told():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return bnjax.linen.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))

    x, y, model = jnp.ones((4, 3)), jnp.zeros(4, int), Plain()
    variables = model.init(jax.random.key(0), x)
    message = r"Plain's call takes \(self, x, train\) and no 'training'.*argument="
    loss = losses.linen_loss(model, variables, training.cross_entropy)
    with pytest.raises(TypeError, match=message):
        loss(variables["params"], x, y)
    with pytest.raises(TypeError, match=message):
        losses.linen_batch_stats(model, variables, x)
    with pytest.raises(TypeError, match=message):
        training.create_train_state(model, optax.sgd(0.1), jax.random.key(0), x)
    loss = losses.linen_loss(model, variables, training.cross_entropy, argument="train")
    assert np.isfinite(loss(variables["params"], x, y))


@pytest.mark.by_default(2)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_linen_layer_in_every_mode(kind):
    model, rngs = Deep(kind), {"noise": jax.random.key(7)}
    variables = dict(model.init(jax.random.key(3), X, training=False))
    start = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), START)
    if kind == "SplitBatchNorm":
        start = jax.tree.map(lambda v: jnp.stack([jnp.full_like(v, jnp.nan), v]), start)
    variables["batch_stats"] = {"norm_0": start, "norm_1": start}
    params = variables["params"]

    def train(params, x, model=model):
        options = {"rngs": rngs, "mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}
        return model.apply({**variables, "params": params}, x, training=True, **options)

    def shown(params, x):
        seen = train(params, x, Deep(without_noise(kind)))[1]["intermediates"]
        return [seen[f"dense_{i}"]["__call__"][0] for i in (0, 1)]

    own = training.cross_entropy(train(shift(params), X)[0], Y)[0].mean()
    loss_of = lambda mode: losses.linen_loss(model, variables, training.cross_entropy, mode=mode, at=OTHER, rngs=rngs)
    check_modes(kind, params, shift(params), loss_of, shown, own)


@pytest.mark.by_default(2)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_nnx_layer_in_every_mode(kind):
    model = NnxDeep(kind, nnx.Rngs(3))
    for norm in (model.norm_0, model.norm_1):
        for name, value in START.items():
            value = jnp.asarray(value, jnp.float32)
            value = jnp.stack([jnp.full_like(value, jnp.nan), value]) if kind == "SplitBatchNorm" else value
            getattr(norm, name)[...] = value
    params = losses.nnx_loss(model, training.cross_entropy)[1]

    def copy_with(params):
        copy = nnx.clone(model)
        state = nnx.state(copy, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(copy, state)
        copy.train()
        return copy

    def shown(params, x):
        copy, further = copy_with(params), {"split": 1} if kind == "SplitBatchNorm" else {}
        copy.norm_0.__class__ = getattr(bnjax.nnx, without_noise(kind))
        first = copy.dense_0(x)
        return [first, copy.dense_1(copy.norm_0(first, **further))]

    own = training.cross_entropy(copy_with(shift(params))(X), Y)[0].mean()
    loss_of = lambda mode: losses.nnx_loss(model, training.cross_entropy, mode=mode, at=OTHER)[0]
    check_modes(kind, params, shift(params), loss_of, shown, own)
    np.testing.assert_array_equal(np.ravel(model.norm_0.mean[...])[-4:], START["mean"])
    assert not model.norm_0.takes_batch_statistics


def test_objectives_with_and_without_correctness():
    model, variables = make(bnjax.linen.BatchNorm)
    only_losses = lambda outputs, labels: training.cross_entropy(outputs, labels)[0]
    values = [
        losses.linen_loss(model, variables, objective)(variables["params"], X, Y)
        for objective in (training.cross_entropy, only_losses)
    ]
    assert values[0] == values[1]
    state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(0), X)
    for take in (training.train_step, lambda *args, **options: (state, training.evaluate(*args, **options))):
        (after, metrics), (same, without) = (
            take(state, X, Y, objective=objective) for objective in (training.cross_entropy, only_losses)
        )
        chex.assert_trees_all_equal(after.params, same.params)
        np.testing.assert_array_equal(metrics.loss, without.loss)
        assert np.isnan(without.accuracy).all() and np.isfinite(metrics.accuracy).all()


@pytest.mark.parametrize("layer", [bnjax.nnx.BatchNorm, nnx.BatchNorm], ids=["bnjax", "flax"])
def test_the_gradient_of_an_nnx_loss_goes_through_reestimated_statistics(layer):
    model = nnx.Sequential(nnx.Linear(X.shape[1], 2, rngs=nnx.Rngs(0)), layer(2, rngs=nnx.Rngs(0)))
    loss, params = losses.nnx_loss(model, training.cross_entropy, mode="reestimated", at=X)
    batch, _ = losses.nnx_loss(model, training.cross_entropy, mode="batch")
    # Statistics of the batch that is measured: the same function, up to how the layer computes the variance.
    got, expected = (jax.grad(f)(params, X, Y) for f in (loss, batch))
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-5)
    frozen, _ = losses.nnx_loss(model, training.cross_entropy, mode="frozen", at=X)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, jax.grad(frozen)(params, X, Y))
    assert max(jax.tree.leaves(difference)) > 1e-2
