import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from versions import List

import bnjax.nnx
from bnjax import batch_norm, init_batch_norm, models, training
from bnjax.inference import describe, examine
from bnjax.linen import BatchNorm, SplitBatchNorm

KEY = jax.random.key(0)


def variables_of(scale=None, **stats):
    params, start = init_batch_norm(4)
    params = params if scale is None else {**params, "scale": jnp.asarray(scale)}
    return {"params": {"norm": params}, "batch_stats": {"norm": {**start, **jax.tree.map(jnp.asarray, stats)}}}


def mistakes(found):
    return [(mistake.text.split(":")[0], mistake.measured) for one in found for mistake in one.mistakes]


def test_effective_scale_and_deviation():
    (one,) = examine(
        variables_of([1.0, -2.0, 0.0, 9.0], mean=[1.0, 2.0, 3.0, 4.0], var=[4.0, 1.0, 1.0, 9.0]), epsilon=0
    )
    assert (one.path, one.features) == ("norm", 4)
    np.testing.assert_allclose(one.multiplier, [0, 1.25, 3])
    np.testing.assert_allclose(one.deviation, [1, 1.5, 3])
    assert (one.dead, one.exploding, one.mistakes) == ((2,), (), ())


def test_dead_and_exploding_features():
    (one,) = examine(variables_of([1.0, 1e-5, 1.0, 1.0], mean=[1.0] * 4, var=[1.0, 1.0, 1e-8, 2.0]), epsilon=1e-12)
    assert (one.dead, one.exploding) == ((1,), (2,))


def test_every_mistake_is_found_from_the_variables():
    assert mistakes(examine(variables_of())) == [("Running statistics have never moved", "mean 0, variance 1")]
    moved = {"mean": [1.0, 2.0, 3.0, 4.0]}
    near = examine(variables_of(**moved, var=[1.0, 1e-6, 0.0, 1.0]))
    assert mistakes(near)[0][1] == "2 of 4 features, epsilon 1e-05"
    negative = examine(variables_of(**moved, var=[1.0, -8.0, 1.0, 1.0]))
    assert mistakes(negative) == [("Running variances are negative", "1 of 4 features")]
    broken = examine(variables_of(mean=[1.0, np.nan, 3.0, 4.0], var=[1.0, np.inf, 1.0, 1.0]))
    assert mistakes(broken) == [("Running statistics are not finite", "1 of 4 features")]


def test_mistakes_that_a_model_and_a_batch_show():
    x = 5 * jax.random.normal(KEY, (64, 3)) + 20
    model = models.Perceptron((8,), 2, lambda **options: BatchNorm(**{**options, "momentum": 0.1}), "before")
    variables = model.init(KEY, x, training=False)
    texts = [text for text, _ in mistakes(examine(variables, model, x, training=False))]
    assert texts == [
        "Running statistics have never moved",
        "momentum weighs the old value, as in Flax and Keras",
        "Running statistics are far from the batch's",
    ]
    for _ in range(5):
        _, updates = model.apply(variables, x, training=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    assert [text.split()[0] for text, _ in mistakes(examine(variables, model, x, training=False))] == ["momentum"]


def test_a_healthy_network_has_no_mistakes():
    x = jax.random.normal(KEY, (64, 5))
    model = models.Perceptron((8, 8), 2, BatchNorm, "before")
    variables = model.init(KEY, x, training=False)

    @jax.jit
    def step(stats):
        return model.apply({**variables, "batch_stats": stats}, x, training=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]

    stats = variables["batch_stats"]
    for _ in range(300):
        stats = step(stats)
    found = examine({**variables, "batch_stats": stats}, model, x, training=False)
    assert [one.path for one in found] == ["BatchNorm_0", "BatchNorm_1"]
    assert mistakes(found) == []


def test_nnx_modules():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norms = List([nnx.BatchNorm(3, momentum=m, rngs=rngs) for m in (0.9, 0.1)])

    found = examine(Net(nnx.Rngs(0)))
    assert [one.path for one in found] == ["norms/0", "norms/1"]
    assert [len(one.mistakes) for one in found] == [1, 2]


def test_what_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    model = nn.Sequential([BatchNorm(use_running_average=True, momentum=0.1) for _ in range(12)])
    variables = model.init(KEY, jnp.ones((4, 3)))
    describe(variables)
    out = capsys.readouterr().out
    assert out.index("layers_2 ") < out.index("layers_10 ")  # numbers are sorted as such
    assert out.count("mean 0, variance 1") == 5
    assert "and 7 more" in out
    describe(variables, model, jnp.ones((4, 3)))
    assert "layers_0: momentum 0.1" in capsys.readouterr().out


def test_no_batch_norm_is_a_clear_error():
    with pytest.raises(
        ValueError, match=r"must be an nnx module, or collections with a batch norm .* got dict without"
    ):
        describe({"params": {}})
    with pytest.raises(ValueError, match="got State without one"):
        describe(nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))


def test_kinds_of_batches_are_described_apart_and_complex_means_whole():
    x = jnp.ones((4, 3)) * jnp.arange(1.0, 4)[None]
    layer = SplitBatchNorm(num_splits=2, use_running_average=False)
    variables = layer.init(KEY, x, split=0)
    _, updates = layer.apply(variables, x, split=0, mutable=["batch_stats"])
    for model in (None, layer):
        call = () if model is None else (model, x)
        found = examine({**variables, **updates}, *call, **({"split": 0} if model else {}))
        assert [(one.path, one.features, len(one.mistakes)) for one in found] == [("[0]", 3, 0), ("[1]", 3, 1)]
    stats = {"mean": jnp.array([1j, 0]), "var": jnp.ones(2)}
    (one,) = examine({"batch_stats": {"norm": stats}})
    assert one.mistakes == ()


# --- mistakes that the state shows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_in_half_precision(dtype):
    stats = {"mean": jnp.ones(4, dtype), "var": jnp.full(4, 2, dtype)}
    text = "Running statistics are in half precision, which rounds away an average's small steps"
    assert mistakes(examine(variables_of(**stats))) == [(text, jnp.dtype(dtype).name)]
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    layer.mean, layer.var = nnx.BatchStat(stats["mean"]), nnx.BatchStat(stats["var"])
    assert mistakes(examine(layer)) == [(text, jnp.dtype(dtype).name)]


APART = "Devices have running statistics of their own"


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_statistics_of_devices_that_are_not_synchronized(axis_name):
    mesh = training.make_mesh()
    params, stats = init_batch_norm(4)
    x = jnp.arange(64.0)[:, None] + jax.random.normal(KEY, (64, 4))
    trained = functools.partial(batch_norm, training=True, axis_name=axis_name)
    step = jax.shard_map(
        lambda x: trained(x, params, stats)[1], mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=False
    )
    found = mistakes(examine({"params": {"norm": params}, "batch_stats": {"norm": jax.jit(step)(x)}}))
    expected = [(APART, "one array, with other numbers on other devices")]
    assert found == (expected if axis_name is None else [])


def stacked(scale, mean):
    """A state with a first axis over two models, or over two devices."""
    stats = {"mean": jnp.asarray(mean), "var": jnp.full((2, 3), 2.0)}
    params = {"scale": jnp.asarray(scale), "bias": jnp.zeros((2, 3))}
    return {"params": {"norm": params}, "batch_stats": {"norm": stats}}


def test_copies_of_one_model_and_several_models_in_one_state():
    one, two, ones = [1.0, 2.0, 3.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]
    merged = "Several models have the same running statistics"
    assert mistakes(examine(stacked([one, one], [one, two]))) == [(APART, "2 copies with the same scale and bias")]
    found = mistakes(examine(stacked([one, two], [one, one])))
    assert found == [(merged, "2 models with other scales and biases")]
    # Models apart, devices together, models before their first step, and models of which only statistics have moved.
    for scale, mean in (([one, two], [one, two]), ([one, one], [one, one]), ([ones, ones], [one, two])):
        assert mistakes(examine(stacked(scale, mean))) == []
    fresh = stacked([one, two], np.zeros((2, 3)))
    assert mistakes(examine(fresh)) == []
    # Batch norms of an input that models share have the same statistics by right; those behind them do not.
    of_input, deeper = stacked([one, two], [one, one]), stacked([one, two], [one, two])
    both = {k: {"input": of_input[k]["norm"], "deeper": deeper[k]["norm"]} for k in of_input}
    assert mistakes(examine(both)) == []


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_models_of_a_vmap_that_merges_their_statistics(axis_name):
    model = nn.Sequential([nn.Dense(4), BatchNorm(use_running_average=False, axis_name=axis_name)])
    x = jax.random.normal(KEY, (16, 3))

    @functools.partial(jax.vmap, axis_name="batch")
    def train(key):
        params, stats = (model.init(key, x)[name] for name in ("params", "batch_stats"))
        params["layers_1"]["scale"] = 1 + jax.random.normal(key, (4,)) / 10  # as trained
        updates = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])[1]
        return {"params": params, **updates}

    found = mistakes(examine(train(jax.random.split(KEY, 2))))
    assert len(found) == (axis_name is not None)


# --- mistakes that a call shows --------------------------------------------------------------------------------------


class Network(nn.Module):
    axis: int = -1
    is_running: bool | None = None
    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, *, training):
        is_running = not training if self.is_running is None else self.is_running
        for _ in range(2):
            x = nn.Conv(4, (1, 1), use_bias=False)(x)
            x = nn.relu(self.norm(axis=self.axis, use_running_average=is_running)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class NnxNetwork(nnx.Module):
    def __init__(self, axis=-1, is_running=None, norm=bnjax.nnx.BatchNorm):
        self.conv = nnx.Conv(3, 4, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
        self.norm = norm(4, axis=axis, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
        self.is_running = is_running

    def __call__(self, x, *, training):
        is_running = not training if self.is_running is None else self.is_running
        return self.out(nnx.relu(self.norm(self.conv(x), use_running_average=is_running)).mean((1, 2)))


IMAGES = 5 + jax.random.normal(KEY, (16, 4, 6, 3)) * jnp.array([1.0, 2, 3])[None, None, None]
PHASE = "A call for inference takes the batch's statistics"
AXIS = "Features are taken from a wrong axis"


def texts_of(model, x=IMAGES, **options):
    call = (model.init(KEY, x, **options), model) if isinstance(model, nn.Module) else (model,)
    return [text for text, _ in mistakes(examine(*call, x, **options))]


@pytest.mark.parametrize("kind", [Network, NnxNetwork])
def test_a_call_for_inference_that_takes_the_statistics_of_the_batch(kind):
    assert PHASE in texts_of(kind(is_running=False), training=False)
    assert PHASE not in texts_of(kind(), training=False)
    assert PHASE not in texts_of(kind(is_running=False), training=True)
    library = bnjax.linen if kind is Network else bnjax.nnx
    assert PHASE not in texts_of(kind(is_running=False, norm=library.FrozenBatchNorm), training=False)


def test_a_network_in_training_whose_other_options_are_those_of_inference():
    class Dropped(Network):
        @nn.compact
        def __call__(self, x, *, training, deterministic):
            return super().__call__(nn.Dropout(0.5, deterministic=deterministic)(x), training=training)

    assert PHASE not in texts_of(Dropped(), training=True, deterministic=True)
    assert PHASE in texts_of(Dropped(is_running=False), training=False, deterministic=True)


@pytest.mark.parametrize("kind", [Network, NnxNetwork])
def test_features_along_a_wrong_axis(kind):
    assert texts_of(kind(axis=1), training=False).count(AXIS) == (2 if kind is Network else 1)
    assert AXIS not in texts_of(kind(), training=False)


def test_images_with_their_channels_first():
    norm = BatchNorm(use_running_average=True)
    assert AXIS in texts_of(norm, jnp.ones((2, 3, 8, 8)))
    for x in (jnp.ones((2, 8, 8, 3)), jnp.ones((2, 3, 3, 3)), jnp.ones((2, 8, 8, 8)), jnp.ones((2, 3, 8, 4))):
        assert AXIS not in texts_of(norm, x)
    assert AXIS not in texts_of(BatchNorm(use_running_average=True, axis=1), jnp.ones((2, 3, 8, 8)))


def test_a_batch_of_one():
    one = "The batch has at most one element for each feature"
    x = jnp.ones((1, 3))
    assert one in texts_of(BatchNorm(use_running_average=False), x)
    assert one in texts_of(bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), x)  # an nnx module begins in its train()
    assert one in texts_of(BatchNorm(use_running_average=False), jnp.ones((4, 3)), mask=jnp.arange(4) < 1)
    assert one not in texts_of(BatchNorm(use_running_average=True), x)
    assert one not in texts_of(bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)), x)
    assert one not in texts_of(BatchNorm(use_running_average=False), jnp.ones((1, 2, 3)))


LAG = "Running statistics have moved for too few steps"


@pytest.mark.parametrize("steps", [1, 130, 145])
def test_statistics_that_still_hold_their_start(steps):
    model = BatchNorm(use_running_average=False)
    x = 1 + jax.random.normal(KEY, (256, 6)) * jnp.arange(1.0, 7)[None]
    variables = model.init(KEY, x)
    step = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    for _ in range(steps):
        variables |= step(variables, x)[1]
    found = [measured for text, measured in mistakes(examine(variables, model, x)) if text == LAG]
    left = f"{0.99**steps:.2g} of their start is left, as after {steps} step{'s' * (steps > 1)} of momentum 0.99"
    assert found == ([left] if steps < 138 else [])
    moved = bnjax.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    bnjax.nnx.update(moved, {"batch_stats": variables["batch_stats"]})
    assert [m for text, m in mistakes(examine(moved, x)) if text == LAG] == found


def test_statistics_of_other_data_do_not_lag():
    model = BatchNorm(use_running_average=False)
    x = 1 + jax.random.normal(KEY, (256, 6)) * jnp.arange(1.0, 7)[None]
    variables = model.init(KEY, x)
    batch = {"mean": x.mean(0), "var": x.var(0)}
    for factor in (0.3, 0.5, 0.7, 2.0):  # as of weights that have grown since, or of inputs in another unit
        scaled = {"mean": factor * batch["mean"], "var": factor**2 * batch["var"]}
        assert LAG not in [text for text, _ in mistakes(examine({**variables, "batch_stats": scaled}, model, x))]
    shifted = {"mean": batch["mean"] - 0.5, "var": batch["var"]}
    assert mistakes(examine({**variables, "batch_stats": shifted}, model, x)) == []


# --- healthy networks ------------------------------------------------------------------------------------------------


class Healthy(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        for init in (nn.initializers.ones, nn.initializers.zeros):  # the last of a residual branch begins at zero
            y = nn.Conv(4, (3, 3), use_bias=False)(x)
            y = BatchNorm(use_running_average=not training, momentum=0.9, scale_init=init)(y)
            x = nn.relu(y) if init is nn.initializers.ones else nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class NnxHealthy(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = List([nnx.Conv(n, 4, (3, 3), use_bias=False, rngs=rngs) for n in (3, 4)])
        self.norms = List(
            [
                bnjax.nnx.BatchNorm(4, momentum=0.9, scale_init=init, rngs=rngs)
                for init in (nn.initializers.ones, nn.initializers.zeros)
            ]
        )
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.convs[0](x)))
        x = nnx.relu(x + self.norms[1](self.convs[1](x)))
        return self.out(x.mean((1, 2)))


@pytest.mark.by_default(1)
@pytest.mark.parametrize("kind", [Healthy, NnxHealthy])
def test_healthy_networks_raise_no_alarm(kind):
    model, y = kind(), jnp.arange(16) % 3
    rest = () if kind is NnxHealthy else (KEY, IMAGES)
    state = training.create_train_state(model, optax.adam(1e-3), *rest)
    never = "Running statistics have never moved"

    def texts(**options):
        if kind is NnxHealthy:
            bnjax.nnx.update(model, state.variables)
            model.train() if options.get("training") else model.eval()
            alone, compared = examine(model), examine(model, IMAGES, **options)
        else:
            alone, compared = examine(state.variables), examine(state.variables, model, IMAGES, **options)
        return [text for text, _ in (*mistakes(alone), *mistakes(compared))]

    fresh = texts(training=False)
    assert fresh.count(never) == 4
    assert set(fresh) <= {never, "Running statistics are far from the batch's"}  # of statistics that never moved
    step = jax.jit(functools.partial(training.train_step, objective=training.cross_entropy))
    for _ in range(60):
        state, _ = step(state, IMAGES, y)
    assert texts(training=False) == texts(training=True) == []
