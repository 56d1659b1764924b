"""Models of linen and nnx side by side: training, micro-batches, checkpoints, inference, and random streams."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from versions import List

import bnjax.linen
import bnjax.nnx
from bnjax import convert, inference, training
from bnjax.analysis import losses
from bnjax.nnx import functional, update
from bnjax.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (3, 16, 3)).astype(np.float32)
Y = RNG.integers(0, 2, (3, 16))
WEIGHTS = (RNG.random((3, 16)) > 0.2).astype(np.float32)
NAMES = {"Dense_0": "layers.0", "BatchNorm_0": "layers.1", "Dense_1": "layers.2", "BatchNorm_1": "norm"}


class LinenModel(nn.Module):
    """Two batch norms, one of them at the end."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, training=False, mask=None):
        norm = functools.partial(bnjax.linen.BatchNorm, not training, axis_name=self.axis_name, momentum=0.9)
        x = nn.relu(norm()(nn.Dense(4)(x), mask=mask))
        return norm()(nn.Dense(2)(x), mask=mask)


class NnxModel(nnx.Module):
    """The same model."""

    def __init__(self, axis_name=None, *, rngs):
        norm = functools.partial(bnjax.nnx.BatchNorm, axis_name=axis_name, momentum=0.9, rngs=rngs)
        self.layers = List([nnx.Linear(3, 4, rngs=rngs), norm(4), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = norm(2)

    def __call__(self, x, mask=None):
        x = nnx.relu(self.layers[1](self.layers[0](x), mask=mask))
        return self.norm(self.layers[2](x), mask=mask)


def models(axis_name=None):
    """A model of nnx, and that of linen with its variables."""
    model, linen_model = NnxModel(axis_name, rngs=nnx.Rngs(0)), LinenModel(axis_name)
    like = jax.eval_shape(linen_model.init, jax.random.key(0), X[0])
    return model, linen_model, convert.variables_from_nnx(model, like, NAMES)


def states(axis_name=None):
    """States of both, before training."""
    model, linen_model, variables = models(axis_name)
    optimizer = optax.sgd(0.1, momentum=0.9)
    of_linen = training.create_train_state(linen_model, optimizer, jax.random.key(1), X[0]).replace(**variables)
    return training.create_train_state(model, optimizer), of_linen.replace(
        opt_state=optimizer.init(variables["params"])
    )


def assert_same(state, of_linen):
    """Asserts that the variables of a state of nnx are those of one of linen."""
    model = NnxModel(rngs=nnx.Rngs(7))
    update(model, jax.device_get({"params": state.params, "batch_stats": state.batch_stats}))
    got = convert.variables_from_nnx(model, {n: of_linen.variables[n] for n in ("params", "batch_stats")}, NAMES)
    expected = {name: of_linen.variables[name] for name in got}
    chex.assert_trees_all_close(got, jax.device_get(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("steps", [1, 2], ids=["whole", "micro"])
def test_an_nnx_model_trains_as_its_linen_twin(steps):
    state, of_linen = states()
    step = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy, accumulate_steps=steps))
    for x, y, weights in zip(X, Y, WEIGHTS, strict=True):
        (state, metrics), (of_linen, expected) = step(state, x, y, weights), step(of_linen, x, y, weights)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-5)
    assert_same(state, of_linen)
    got, expected = (training.evaluate_in_batches(s, X[0], Y[0], objective=training.cross_entropy, batch_size=6)
                     for s in (state, of_linen))  # fmt: skip
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    key = jax.random.key(3)
    epoch = functools.partial(training.train_epoch, batch_size=6, objective=training.cross_entropy)
    assert_same(epoch(state, key, X[0], Y[0])[0], epoch(of_linen, key, X[0], Y[0])[0])


@pytest.mark.by_default(1)
@pytest.mark.parametrize("way", training.PARALLEL)
@pytest.mark.parametrize("group_size", [None, 2], ids=["together", "groups"])
def test_an_nnx_model_trains_on_a_mesh_as_its_linen_twin(way, group_size):
    mesh = training.make_mesh(group_size, devices=jax.devices()[:4])
    if way == "pmap" and (group_size or jax.__version_info__ < (0, 8)):
        pytest.skip("pmap takes groups as axis_index_groups, and none with jax 0.7")
    got = states("batch")
    step = training.make_train_step(training.cross_entropy, mesh, parallel=way, accumulate_steps=2)
    for i in range(2):
        got = [s if group_size is None or s.stats_groups else training.split_batch_stats(s, 2) for s in got]
        got = [step(s, X[i], Y[i], WEIGHTS[i])[0] for s in got]
    assert_same(*map(training.merge_batch_stats, got))


def test_a_wrong_axis_name_of_an_nnx_model_is_told():
    mesh = training.make_mesh(devices=jax.devices()[:2])
    step = training.make_train_step(training.cross_entropy, mesh, parallel="shard_map")
    with pytest.raises(ValueError, match=r"the batch norm layers/1 must be made with axis_name='batch'"):
        step(states()[0], X[0], Y[0])


def test_the_model_itself_stays_and_gets_its_variables_back(tmp_path):
    model = NnxModel(rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    state = training.create_train_state(model, optax.sgd(0.1))
    state, _ = training.make_train_step(training.cross_entropy, training.make_mesh(devices=jax.devices()[:1]))(
        state, X[0], Y[0]
    )
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, state)
        _, restored = checkpoints.restore(training.create_train_state(model, optax.sgd(0.1)))
    update(model, restored.variables)
    chex.assert_trees_all_equal(functional(model)[1], state.variables)
    model.eval()
    expected = state.apply_fn(state.variables, X[1], training=False)
    np.testing.assert_allclose(model(X[1]), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="must be the model's own, got layers/9/kernel as well"):
        update(model, {"params": {"layers": {9: {"kernel": jnp.ones(1)}}}})


def test_equal_models_share_a_compiled_step():
    objective = chex.assert_max_traces(training.cross_entropy, n=1)
    chex.clear_trace_counter()
    step = jax.jit(functools.partial(training.train_step, objective=objective))
    for seed in range(2):
        step(training.create_train_state(NnxModel(rngs=nnx.Rngs(seed)), OPTIMIZER), X[0], Y[0])


OPTIMIZER = optax.sgd(0.1)


def test_create_train_state_says_what_each_library_needs():
    model, linen_model, _ = models()
    with pytest.raises(TypeError, match=r"pass create_train_state\(model, optimizer\)"):
        training.create_train_state(model, OPTIMIZER, jax.random.key(0), X[0])
    with pytest.raises(TypeError, match=r"pass create_train_state\(model, optimizer, key, x\)"):
        training.create_train_state(linen_model, OPTIMIZER)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("exactly", [False, True])
def test_reestimated_and_adapted_statistics_are_those_of_linen(exactly):
    model, linen_model, variables = models()
    apply, own = functional(model)
    got = inference.reestimate_batch_stats(apply, own, [*X], exactly=exactly, training=True)
    expected = inference.reestimate_batch_stats(linen_model.apply, variables, [*X], exactly=exactly, training=True)
    chex.assert_trees_all_close([got["layers"][1], got["norm"]], [expected["BatchNorm_0"], expected["BatchNorm_1"]])
    (y, stats), (expected_y, expected) = (
        inference.adapt_batch_stats(function, values, X[0], prior=8, training=False)
        for function, values in ((apply, own), (linen_model.apply, variables))
    )
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close([stats["layers"][1], stats["norm"]], [expected["BatchNorm_0"], expected["BatchNorm_1"]])
    update(model, {"batch_stats": got})
    np.testing.assert_array_equal(model.norm.mean[...], got["norm"]["mean"])


def test_an_nnx_model_is_folded():
    model, linen_model, variables = models()
    for module in (model.layers[1], model.norm):
        module.mean[...], module.var[...] = module.mean[...] + 0.5, module.var[...] * 3
    pairs = inference.foldable_pairs(model, X[0])
    assert pairs == [("layers/0", "layers/1"), ("layers/2", "norm")]
    assert len(inference.foldable_pairs(linen_model, variables, X[0])) == 2
    folded = inference.fold_model(model, jax.ShapeDtypeStruct(X[0].shape, X.dtype))
    model.eval()
    np.testing.assert_allclose(folded(X[0]), model(X[0]), rtol=1e-4, atol=1e-5)
    assert not nnx.to_flat_state(nnx.state(folded, nnx.BatchStat))
    one = inference.fold_model(model, X[0], pairs=pairs[1:])
    np.testing.assert_allclose(one(X[0]), model(X[0]), rtol=1e-4, atol=1e-5)
    assert len(nnx.to_flat_state(nnx.state(one, nnx.BatchStat))) == 2
    with pytest.raises(TypeError, match=r"fold_model\(model, variables, x\)"):
        inference.fold_model(linen_model, X[0])


class Unusual(nnx.Module):
    """Layers that are not folded: a product of its own, a batch norm with two names, and a padded one after it."""

    def __init__(self, *, rngs):
        twice = lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs)
        self.own = nnx.Linear(3, 3, dot_general=twice, rngs=rngs)
        self.first = bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.padded = nnx.Conv(3, 3, kernel_size=(3,), use_bias=False, rngs=rngs)
        self.norm = self.alias = bnjax.nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.alias(self.padded(self.first(self.own(x))))


def test_only_plain_layers_of_nnx_are_folded():
    model = Unusual(rngs=nnx.Rngs(0))
    for module in (model.first, model.norm):
        module.mean[...], module.var[...] = module.mean[...] + 0.5, module.var[...] * 3
    x = X[:, None, 0]
    assert [layer for layer, _ in inference.foldable_pairs(model, x)] == ["padded"]
    folded = inference.fold_model(model, x)
    model.eval()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert folded.norm is folded.alias


def test_an_nnx_model_is_described_beside_a_batch():
    model = NnxModel(rngs=nnx.Rngs(0))
    alone, compared = inference.examine(model), inference.examine(model, 100 + X[0])
    assert [norm.path for norm in alone] == [norm.path for norm in compared] == ["layers/1", "norm"]
    texts = [[mistake.text for mistake in norms[0].mistakes] for norms in (alone, compared)]
    assert not any("far from the batch's" in text for text in texts[0])
    assert any("far from the batch's" in text for text in texts[1])


# --- random streams ---------------------------------------------------------------------------------------------------


class Random(nnx.Module):
    """Two dropouts of ones, side by side."""

    def __init__(self, *, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.dropouts = List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return jnp.stack([dropout(x * self.scale[...]) for dropout in self.dropouts])


class LinenRandom(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, x, training=False):
        scale = self.param("scale", nn.initializers.ones, ())
        return jnp.stack([nn.Dropout(0.5, deterministic=not training)(x * scale) for _ in range(2)])


@pytest.mark.parametrize("rngs", [nnx.Rngs(0), nnx.Rngs(params=0, dropout=1)], ids=["default", "dropout"])
def test_each_stream_of_an_nnx_model_gets_a_key_of_its_own(rngs):
    apply, variables = functional(Random(rngs=rngs))
    x = jnp.ones((4, 8))
    draws = [apply(variables, x, training=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any(), "another key"
    assert (draws[0][0] != draws[0][1]).any(), "two layers"
    with pytest.raises(ValueError, match="rngs must have a key for the random stream 'dropout'"):
        apply(variables, x, training=True)
    np.testing.assert_array_equal(apply(variables, x, training=False), jnp.ones((2, 4, 8)))
    own = [apply(variables, x, training=True, rngs="own") for _ in range(2)]
    np.testing.assert_array_equal(*own)
    with pytest.raises(ValueError, match="or 'own' for the model's own streams"):
        apply(variables, x, training=True, rngs="mine")


def draws_of(outputs, labels):
    """An objective whose gradient by the scale says which elements were dropped: element i counts 2^-i."""
    outputs = jnp.moveaxis(outputs, 0, 1).reshape(outputs.shape[1], -1)
    return outputs @ (2.0 ** -jnp.arange(outputs.shape[1]))


@pytest.mark.by_default(1)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_devices_micro_batches_and_steps_draw_for_themselves(library):
    x, y = jnp.ones((4, 4)), jnp.zeros(4)
    if library == "nnx":
        state = training.create_train_state(Random(rngs=nnx.Rngs(0)), optax.sgd(1.0))
    else:
        state = training.create_train_state(LinenRandom(), optax.sgd(1.0), jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(5)}

    def kept(x, **options):
        """Which elements of the first example count, as a number."""
        weights = jnp.zeros(len(x)).at[options.pop("example", 0)].set(1)
        step = functools.partial(training.train_step, objective=draws_of, **options)
        return float(state.params["scale"] - step(state, x, y[: len(x)], weights, rngs=rngs)[0].params["scale"])

    def on_devices(device):
        weights = jnp.zeros((2, 2)).at[device, 0].set(1)
        step = functools.partial(training.train_step, objective=draws_of, axis_name="batch", rngs=rngs)
        new, _ = jax.vmap(step, (None, 0, 0, 0), axis_name="batch")(state, x.reshape(2, 2, 4), y.reshape(2, 2), weights)
        return float(state.params["scale"] - new.params["scale"][0])

    assert kept(x) == kept(x)
    assert on_devices(0) != on_devices(1)
    assert kept(x, accumulate_steps=2, example=0) != kept(x, accumulate_steps=2, example=1)
    losses = [
        float(training.train_epoch(state, jax.random.key(0), x, y, batch_size=4, objective=draws_of, rngs=keys)[1].loss)
        for keys in (rngs, {"dropout": jax.random.key(6)})
    ]
    assert losses[0] != losses[1]
    mesh = training.make_mesh(devices=jax.devices()[:2])
    for way in ("jit", "shard_map"):
        step = training.make_train_step(draws_of, mesh, parallel=way)
        copies = [jax.tree.map(jnp.copy, state) for _ in range(3)]
        metrics = [
            step(s, x, y, rngs={"dropout": jax.random.key(k)})[1] for s, k in zip(copies, (0, 0, 1), strict=True)
        ]
        assert metrics[0].loss == metrics[1].loss != metrics[2].loss


class Noisy(nnx.Module):
    """A noisy batch norm."""

    def __init__(self, axis_name="batch", *, rngs):
        self.norm = bnjax.nnx.NoisyBatchNorm(3, sample_shift=0.0, sample_scale=0.0, axis_name=axis_name, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


def test_the_noise_of_a_unit_is_common_to_all_devices():
    state = training.create_train_state(Noisy(rngs=nnx.Rngs(0)), optax.sgd(0.1))
    rngs, x = {"noise": jax.random.key(0)}, jnp.asarray(X[0])

    def sum_of_outputs(outputs, labels):
        return outputs.sum(1)

    def step(x, y, axis_name=None):
        return training.train_step(state, x, y, objective=sum_of_outputs, axis_name=axis_name, rngs=rngs)[1].loss

    alone = step_alone(Noisy, rngs, x)
    both = jax.vmap(functools.partial(step, axis_name="batch"), axis_name="batch")(jnp.stack([x] * 2), Y[:2])
    np.testing.assert_allclose(both, [alone] * 2, rtol=1e-4)
    assert abs(alone) > 1e-2, "the mean is the noise's"


def step_alone(model_class, rngs, x):
    """The mean of the outputs' sums without a mapped axis."""
    apply, variables = functional(model_class(rngs=nnx.Rngs(0)))
    outputs = jax.vmap(lambda x: apply(variables, x, training=True, rngs=rngs), axis_name="batch")(x[None])
    return outputs[0].sum(1).mean()


def test_groups_of_devices_have_noise_of_their_own():
    rngs, x = {"noise": jax.random.key(0)}, jnp.asarray(X[0])

    def sum_of_outputs(outputs, labels):
        return outputs.sum(1)

    losses = []
    for group_size in (None, 1):
        mesh = training.make_mesh(group_size, devices=jax.devices()[:2])
        state = training.create_train_state(Noisy("batch" if group_size is None else None, rngs=nnx.Rngs(0)), OPTIMIZER)
        if group_size:
            state = training.split_batch_stats(state, 2)
        step = training.make_train_step(sum_of_outputs, mesh, parallel="shard_map")
        losses.append(float(step(state, jnp.concatenate([x, x]), jnp.concatenate([Y[0], Y[0]]), rngs=rngs)[1].loss))
    assert abs(losses[0] - losses[1]) > 1e-2, "both devices have the same examples"


# --- calls of other kinds ---------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """Two inputs, and an argument that says the contrary of training."""

    @nn.compact
    def __call__(self, x, other, use_running_average):
        return nn.Dense(2)(bnjax.linen.BatchNorm(use_running_average)(x) + other)


class Train(nnx.Module):
    """Two inputs, and an argument of another name."""

    def __init__(self, *, rngs):
        self.norm, self.linear = bnjax.nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, other, *, train):
        return self.linear(self.norm(x, use_running_average=not train) + other)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_the_arguments_name_is_free_and_inputs_may_be_several_of_numpy(library):
    inputs = (X[0], X[1])
    if library == "nnx":
        state = training.create_train_state(Train(rngs=nnx.Rngs(0)), OPTIMIZER, argument="train")
    else:
        state = training.create_train_state(
            Inverted(), OPTIMIZER, jax.random.key(0), inputs, argument="use_running_average"
        )
    one = training.train_step(state, inputs, Y[0], objective=training.cross_entropy)[0]
    (stats,) = one.batch_stats.values()
    np.testing.assert_allclose(stats["mean"], 0.01 * X[0].mean(0), rtol=1e-5)
    mesh = training.make_mesh(devices=jax.devices()[:2])
    objective = training.cross_entropy
    before = training.evaluate(state, inputs, Y[0], objective=objective)
    totals = training.evaluate_in_batches(state, inputs, Y[0], objective=objective, batch_size=6, mesh=mesh)
    np.testing.assert_allclose(totals.loss, before.loss.mean(), rtol=1e-6)
    epoch, _ = training.train_epoch(state, jax.random.key(0), inputs, Y[0], batch_size=16, objective=objective)
    chex.assert_trees_all_close(epoch.params, one.params, rtol=1e-5, atol=1e-6)
    on_mesh, _ = training.make_train_step(objective, mesh)(jax.tree.map(jnp.copy, state), inputs, Y[0])
    chex.assert_trees_all_close(jax.device_get(on_mesh.params), jax.device_get(one.params), rtol=1e-5, atol=1e-6)


class Counter(nnx.Module):
    """A model that changes a variable of another kind."""

    def __init__(self):
        self.calls, self.scale = nnx.Variable(jnp.zeros(())), nnx.Param(jnp.ones(()))

    def __call__(self, x):
        self.calls[...] += 1
        return x * self.scale[...]


@pytest.mark.parametrize("steps", [1, 2])
def test_training_takes_along_what_else_the_model_changes(steps):
    state = training.create_train_state(Counter(), OPTIMIZER)
    step = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy, accumulate_steps=steps))
    for _ in range(3):
        state, _ = step(state, X[0], Y[0])
    assert state.others["others"]["calls"] == 3 * steps
    linen = training.create_train_state(Spectral(), OPTIMIZER, jax.random.key(0), X[0])
    new, _ = step(linen, X[0], Y[0])
    before, after = (np.asarray(jax.tree.leaves(s.batch_stats)[1]) for s in (linen, new))
    assert (before != after).any()


class Spectral(nn.Module):
    """A linen model whose 'batch_stats' belong to no batch norm."""

    @nn.compact
    def __call__(self, x, training=False):
        return nn.SpectralNorm(nn.Dense(2))(x, update_stats=training)


class Wrapper(nnx.Module):
    """A model that hands its options on, and has an array as an attribute."""

    def __init__(self, *, rngs):
        self.net, self.offset = Optional(rngs=rngs), jnp.ones(3)

    def __call__(self, x, **options):
        return self.net(x - self.offset[None], **options)


class Optional(nnx.Module):
    """A model that is told by an argument of its own whether it trains, or by its `train()`."""

    def __init__(self, *, rngs):
        self.norm, self.linear = bnjax.nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, training=False):
        return self.linear(self.norm(x, use_running_average=not training))


class OtherName(Optional):
    """The same, by another name."""

    def __call__(self, x, train=False):
        return super().__call__(x, training=train)


def test_a_model_learns_that_it_trains():
    state = training.create_train_state(Wrapper(rngs=nnx.Rngs(0)), OPTIMIZER)
    state, _ = training.train_step(state, X[0], Y[0], objective=training.cross_entropy)
    moved = state.batch_stats["net"]["norm"]["mean"]
    np.testing.assert_allclose(moved, 0.01 * (X[0].mean(0) - 1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"got 'training'. Pass argument='train'"):
        training.create_train_state(OtherName(rngs=nnx.Rngs(0)), OPTIMIZER)
    without = training.create_train_state(NnxModel(rngs=nnx.Rngs(0)), OPTIMIZER, argument=None)
    few, many = (training.evaluate(without, X[0, :n], Y[0, :n], objective=training.cross_entropy).loss for n in (2, 9))
    np.testing.assert_allclose(few, many[:2], rtol=1e-5)


class Blocks(nnx.Module):
    """Dropout within a compiled or checkpointed part of a model."""

    def __init__(self, wrap, *, rngs):
        self.block = type("Wrapped", (Dropped,), {"__call__": wrap(Dropped.__call__)})(rngs=rngs)

    def __call__(self, x):
        return self.block(x)


class Dropped(nnx.Module):
    """A layer, its batch norm without an axis name, and dropout before and after."""

    def __init__(self, *, rngs):
        self.before, self.after = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.linear, self.norm = nnx.Linear(3, 2, rngs=rngs), bnjax.nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.after(self.norm(self.linear(self.before(x))))


@pytest.mark.by_default(2)
@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit, lambda call: call], ids=["remat", "jit", "plain"])
def test_streams_within_parts_of_a_model(wrap):
    model = Blocks(wrap, rngs=nnx.Rngs(0))
    state = training.create_train_state(model, OPTIMIZER)
    training.evaluate(state, X[0], Y[0], objective=training.cross_entropy)
    inference.reestimate_batch_stats(state.apply_fn, state.variables, [X[0]], training=False)
    model.train()
    inference.examine(model, X[0])
    with pytest.raises(ValueError, match="rngs must have a key for the random stream 'dropout'"):
        training.train_step(state, X[0], Y[0], objective=training.cross_entropy)
    step = training.make_train_step(training.cross_entropy, training.make_mesh(devices=jax.devices()[:2]))
    _, metrics = step(state, X[0], Y[0], rngs={"dropout": jax.random.key(0)})
    assert np.isfinite(metrics.loss)


def test_keys_that_do_not_fit_are_told():
    state = training.create_train_state(Noisy(rngs=nnx.Rngs(0)), OPTIMIZER)
    with pytest.raises(TypeError, match="rngs must be random keys by name"):
        inspect.unwrap(training.train_step)(state, X[0], Y[0], objective=training.cross_entropy, rngs=nnx.Rngs(0))
    for rngs in ({}, {"default": jax.random.key(0)}):  # whose key each device folds, and noise is common to all
        with pytest.raises(ValueError, match="rngs must have a key for the random stream 'noise'"):
            state.apply_fn(state.variables, X[0], training=True, rngs=rngs)


def test_updated_variables_are_copies_of_the_right_shape():
    model = NnxModel(rngs=nnx.Rngs(0))
    step = training.make_train_step(training.cross_entropy, training.make_mesh(devices=jax.devices()[:1]))
    state, _ = step(training.create_train_state(model, OPTIMIZER), X[0], Y[0])
    update(model, state.variables)
    step(state, X[0], Y[0])  # which donates the state's arrays
    assert np.isfinite(model(X[0])).all()
    with pytest.raises(
        ValueError, match=r"must have the shapes of the model's, got norm/mean of shape \(7,\) for \(2,\)"
    ):
        update(model, {"batch_stats": {"norm": {"mean": jnp.ones(7)}}})


def test_layers_within_parts_of_a_model_are_folded():
    for wrap in (nnx.remat, nnx.jit):
        model = Blocks(wrap, rngs=nnx.Rngs(0))
        folded = inference.fold_model(model, X[0])
        assert not nnx.to_flat_state(nnx.state(folded, nnx.BatchStat))
        model.eval()
        np.testing.assert_allclose(folded(X[0]), model(X[0]), rtol=1e-4, atol=1e-5)


class Tied(nnx.Module):
    """Two layers of one kernel, and two batch norms of one set of statistics."""

    def __init__(self, *, rngs):
        self.a, self.b = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel
        self.first, self.second = (bnjax.nnx.BatchNorm(3, rngs=rngs) for _ in range(2))
        self.second.mean, self.second.var = self.first.mean, self.first.var

    def __call__(self, x):
        return self.second(self.b(self.first(self.a(x))))


def test_tied_variables_stay_as_they_are():
    model = Tied(rngs=nnx.Rngs(0))
    assert inference.foldable_pairs(model, X[0]) == []
    state = training.create_train_state(model, OPTIMIZER)
    with pytest.raises(ValueError, match=r"are shared with another one. Give each its own"):
        training.train_step(state, X[0], Y[0], objective=training.cross_entropy, accumulate_steps=2)


class Stacked(nnx.Module):
    """Layers that nnx scans over."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


class Block(nnx.Module):
    """A layer and its batch norm."""

    def __init__(self, *, rngs):
        self.linear, self.norm = nnx.Linear(3, 3, rngs=rngs), bnjax.nnx.BatchNorm(3, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return x + self.norm(self.linear(x))


def test_micro_batches_and_statistics_of_layers_that_nnx_scans():
    x = X[0, ::2]
    twice = np.concatenate([x, x])  # its micro-batches are equal, and so are their moments to those of the whole
    order = np.argsort(np.arange(16) % 8, kind="stable")
    state = training.create_train_state(Stacked(rngs=nnx.Rngs(0)), OPTIMIZER)
    step = functools.partial(training.train_step, objective=training.cross_entropy)
    whole, _ = step(state, x, Y[0, ::2])
    parts, _ = step(state, twice[order], np.concatenate([Y[0, ::2]] * 2)[order], accumulate_steps=2)
    chex.assert_trees_all_close(parts.variables, whole.variables, rtol=1e-5, atol=1e-6)
    apply, variables = functional(Stacked(rngs=nnx.Rngs(0)))
    got = inference.reestimate_batch_stats(apply, variables, [x], training=True)
    expected = apply(variables, x, training=True, mutable=["batch_stats"])[1]["batch_stats"]["blocks"]["norm"]["mean"]
    np.testing.assert_allclose(got["blocks"]["norm"]["mean"], expected / 0.01, rtol=1e-4, atol=1e-5)


class Told(nnx.Module):
    """A model that is told by its call whether it trains."""

    def __init__(self):
        self.dense, self.out = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(1))
        self.norm = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return self.out(jnp.tanh(self.norm(self.dense(x), use_running_average=not train)))


class ToldByAnUnusualName(Told):
    def __call__(self, x, is_train=False):
        return super().__call__(x, is_train)


def test_a_model_that_is_told_by_its_call_is_folded_and_described():
    model = Told()
    apply, variables = functional(model, argument="train")
    for args, options in (((X[0], False), {}), ((X[0], np.bool_(False)), {}), ((X[0],), {"train": False})):
        assert inference.foldable_pairs(model, *args, **options) == [("dense", "norm")]
        folded = inference.fold_model(model, *args, **options)
        np.testing.assert_allclose(folded(X[0], False), model(X[0], False), rtol=1e-5, atol=1e-6)
        assert [one.path for one in inference.examine(model, *args, **options)] == ["norm"]
        found = inference.reestimate_batch_stats(apply, variables, [args], exactly=True, **options)
        np.testing.assert_allclose(found["norm"]["mean"], model.dense(X[0]).mean(0), rtol=1e-5)


def test_an_unusual_name_for_the_phase_is_an_error_where_it_would_be_wrong():
    model, objective = ToldByAnUnusualName(), training.cross_entropy
    state = training.create_train_state(model, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"argument must be the name .*ToldByAnUnusualName.* norm with use_running"):
        training.train_step(state, X[0], Y[0], objective=objective)
    loss, params = losses.nnx_loss(model, objective)
    with pytest.raises(ValueError, match="argument must be the name"):
        loss(params, X[0], Y[0])
    told = training.create_train_state(model, optax.sgd(0.1), argument="is_train")
    moved = training.train_step(told, X[0], Y[0], objective=objective)[0].batch_stats["norm"]["mean"]
    assert jnp.abs(moved).min() > 0
    meant = training.create_train_state(model, optax.sgd(0.1), argument=None)
    assert not training.train_step(meant, X[0], Y[0], objective=objective)[0].batch_stats["norm"]["mean"].any()


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_gradients_of_a_model_that_draws(library):
    model, given = (LinenRandom(), (jax.random.key(0), X[0])) if library == "linen" else (Random(rngs=nnx.Rngs(0)), ())
    state = training.create_train_state(model, optax.sgd(1.0), *given)
    objective = lambda outputs, labels: jnp.square(outputs).sum((0, 2)) + labels
    rngs = {"dropout": jax.random.key(1)}
    found = training.gradients(state, X[0], Y[0], objective=objective, rngs=rngs)
    stepped = training.train_step(state, X[0], Y[0], objective=objective, rngs=rngs)[0].params
    chex.assert_trees_all_close(found, jax.tree.map(jnp.subtract, state.params, stepped), rtol=1e-4, atol=1e-6)
    assert abs(jax.tree.leaves(found)[0]) > 1
