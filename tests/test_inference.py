import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax import batch_norm, linen, models
from bnjax import nnx as bnjax_nnx
from bnjax.inference import adapt_batch_stats, fold, fold_before, fold_model, foldable_pairs, reestimate_batch_stats
from bnjax.linen import BatchNorm, LpBatchNorm, NoisyBatchNorm, SplitBatchNorm

KEY = jax.random.key(0)


def away_from_start(variables, seed=0):
    """Parameters and statistics moved away from their initial values."""
    rng = np.random.default_rng(seed)

    def moved(path, value):
        name = path[-1].key
        if name == "var":
            return jnp.asarray(rng.uniform(0.3, 2, value.shape), value.dtype)
        if name == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, value.shape) * rng.choice([-1, 1], value.shape), value.dtype)
        return value if name == "kernel" else jnp.asarray(rng.normal(0, 0.3, value.shape), value.dtype)

    return jax.tree_util.tree_map_with_path(moved, variables)


def norm_of(features, dtype=jnp.float64):
    rng = np.random.default_rng(1)
    params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
    stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.3, 2, features)}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), (params, stats))


# --- one layer --------------------------------------------------------------------------------------------------------

LINEAR = {
    "dense": (nn.Dense(6, param_dtype=jnp.float64), (4, 5), {}),
    "convolution": (nn.Conv(6, (3, 3), strides=2, param_dtype=jnp.float64), (2, 7, 7, 4), {}),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID", param_dtype=jnp.float64), (2, 7, 7, 4), {}),
    "depthwise": (
        nn.Conv(8, (3, 3), feature_group_count=4, padding="VALID", param_dtype=jnp.float64),
        (2, 5, 5, 4),
        {},
    ),
    "one-dimensional": (nn.Conv(6, (3,), use_bias=False, padding="VALID", param_dtype=jnp.float64), (2, 7, 4), {}),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2), param_dtype=jnp.float64), (2, 5, 5, 4), {}),
    "transposed kernel": (
        nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True, param_dtype=jnp.float64),
        (2, 5, 5, 4),
        {"axis": -2},
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_folding_after_a_layer_is_exact(case, x64):
    layer, shape, options = LINEAR[case]
    x = jax.random.normal(KEY, shape, jnp.float64)
    params = away_from_start(layer.init(KEY, x)["params"])
    y = layer.apply({"params": params}, x)
    norm = norm_of(y.shape[-1])
    expected, _ = batch_norm(y, *norm, training=False, epsilon=1e-3)
    kernel, bias = fold(params["kernel"], params.get("bias"), *norm, epsilon=1e-3, **options)
    assert (kernel.shape, bias.shape) == (params["kernel"].shape, (y.shape[-1],))
    folded = layer.clone(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(folded, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["dense", "grouped", "depthwise", "one-dimensional"])
def test_folding_before_a_layer_is_exact(case, x64):
    layer, shape, _ = LINEAR[case]
    x = jax.random.normal(KEY, shape, jnp.float64)
    params = away_from_start(layer.init(KEY, x)["params"])
    norm = norm_of(shape[-1])
    expected = layer.apply({"params": params}, batch_norm(x, *norm, training=False, epsilon=1e-3)[0])
    groups = getattr(layer, "feature_group_count", 1)
    kernel, bias = fold_before(params["kernel"], params.get("bias"), *norm, epsilon=1e-3, groups=groups)
    folded = layer.clone(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(folded, expected, rtol=1e-12, atol=1e-12)


def test_folding_keeps_the_kernels_dtype_and_needs_neither_scale_nor_bias():
    stats = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 1.0])}
    kernel, bias = fold(jnp.ones((3, 2), jnp.bfloat16), None, {}, stats, epsilon=0.0)
    assert kernel.dtype == bias.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(kernel[0]), [0.5, 1.0])
    np.testing.assert_array_equal(np.float32(bias), [-0.5, -2.0])


def test_folding_arrays_that_do_not_fit_is_a_clear_error():
    params, stats = norm_of(3, jnp.float32)
    with pytest.raises(ValueError, match=r"params\['\w+'\] must have the shape \(4,\)"):
        fold(jnp.ones((5, 4)), None, params, stats)
    with pytest.raises(ValueError, match=r"params\['\w+'\] must have the shape \(5,\)"):
        fold_before(jnp.ones((5, 4)), None, params, stats)
    with pytest.raises(ValueError, match="axis must lie in"):
        fold(jnp.ones((5, 3)), None, params, stats, axis=2)


# --- a whole model ----------------------------------------------------------------------------------------------------

MODELS = {
    "ResNet": (functools.partial(models.resnet18, 10, BatchNorm, stem="cifar", width=16), (2, 16, 16, 3)),
    "perceptron, batch norm before": (lambda: models.Perceptron((8, 8), 3, BatchNorm, "before"), (4, 5)),
    "perceptron, batch norm after": (lambda: models.Perceptron((8, 8), 3, BatchNorm, "after"), (4, 5)),
    "Flax's layers": (lambda: models.Perceptron((8, 8), 3, nn.BatchNorm, "before"), (4, 5)),
}


@pytest.mark.parametrize("name", [pytest.param("ResNet", marks=pytest.mark.exhaustive), *list(MODELS)[1:]])
def test_a_model_without_its_batch_norms_predicts_the_same_by_fewer_operations(name):
    make, shape = MODELS[name]
    model, x = make(), jax.random.normal(KEY, shape)
    variables = away_from_start(jax.jit(functools.partial(model.init, training=False))(KEY, x))
    apply, folded = fold_model(model, variables, x, training=False)
    assert "batch_stats" not in folded
    assert (
        len(foldable_pairs(model, variables, x, training=False)) == len(jax.tree.leaves(variables["batch_stats"])) / 2
    )

    def compiled(apply, variables):
        program = jax.jit(lambda v, x: apply(v, x, training=False)).lower(variables, x).compile()
        return program(variables, x), program

    expected, before = compiled(model.apply, variables)
    y, after = compiled(apply, folded)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert " rsqrt(" in before.as_text()
    assert " rsqrt(" not in after.as_text()
    assert after.cost_analysis()["flops"] < before.cost_analysis()["flops"]


class Branching(nn.Module):
    """Batch norms that can't be folded, beside one that can."""

    running: bool = True

    @nn.compact
    def __call__(self, x, training=False):
        norm = functools.partial(BatchNorm, use_running_average=self.running and not training)
        y = nn.Dense(4, name="used_twice")(x)
        y = norm(name="of_used_twice")(y) + y
        y = nn.relu(nn.Dense(4, name="apart")(y))
        y = norm(name="after_relu")(y)[:, None]
        y = norm(axis=1, name="another_axis")(nn.Dense(4, name="turned")(y))
        y = nn.Conv(4, (3,), name="pads")(norm(name="before_padding")(nn.relu(y)))
        shared = nn.Dense(4, name="shared")
        y = norm(name="of_shared")(shared(nn.relu(shared(nn.relu(y)))))
        y = SplitBatchNorm(num_splits=2, use_running_average=True, name="kinds")(nn.Dense(4, name="split")(y), split=1)
        y = norm(name="foldable")(nn.Dense(4, name="linear")(nn.relu(y)))
        return norm(name="twice")(y).sum(1)


def test_only_what_is_exact_is_folded():
    x, model = jax.random.normal(KEY, (3, 5)), Branching()
    variables = away_from_start(model.init(KEY, x))
    assert foldable_pairs(model, variables, x) == [("split", "of_shared"), ("linear", "foldable")]
    assert foldable_pairs(model, variables, x, training=True) == []
    apply, folded = fold_model(model, variables, x)
    assert set(variables["params"]) - set(folded["params"]) == {"foldable", "of_shared"}
    np.testing.assert_allclose(jax.jit(apply)(folded, x), jax.jit(model.apply)(variables, x), rtol=1e-5, atol=1e-5)


def test_pairs_may_be_chosen():
    x, model = jax.random.normal(KEY, (4, 5)), models.Perceptron((8, 8), 3, BatchNorm, "before")
    variables = away_from_start(model.init(KEY, x, training=False))
    pairs = foldable_pairs(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype), training=False)
    apply, folded = fold_model(model, variables, x, pairs=pairs[1:], training=False)
    assert list(folded["batch_stats"]) == [pairs[0][1]]
    y, expected = (inference_by(f)(v, x) for f, v in ((apply, folded), (model.apply, variables)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"pairs must be of those that can be folded, \[.*got \[\('a', 'b'\)\]"):
        fold_model(model, variables, x, pairs=[("a", "b")], training=False)


def test_layers_of_flax_vmap_stay_and_those_of_remat_and_jit_go():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Pair(nn.Module):
                @nn.compact
                def __call__(self, x):
                    return BatchNorm(use_running_average=True)(nn.Dense(3)(x))

            x = nn.jit(nn.remat(Pair))(name="pair")(x)
            axes = {"params": 0, "batch_stats": 0}
            return nn.vmap(Pair, variable_axes=axes, split_rngs={"params": True})(name="pairs")(x)

    x = jax.random.normal(KEY, (4, 3))
    variables = away_from_start(Net().init(KEY, x))
    assert foldable_pairs(Net(), variables, x) == [("pair/Dense_0", "pair/BatchNorm_0")]
    apply, folded = fold_model(Net(), variables, x)
    np.testing.assert_allclose(jax.jit(apply)(folded, x), jax.jit(Net().apply)(variables, x), rtol=1e-5, atol=1e-5)


# --- re-estimation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep():
    """A perceptron, its variables and data whose statistics are not the running ones."""
    x = jax.random.normal(KEY, (60, 5)) * 3 + 1
    model = models.Perceptron((8, 8, 8), 3, BatchNorm, "before")
    return model, away_from_start(model.init(KEY, x, training=False)), x


def inference_by(apply):
    return jax.jit(functools.partial(apply, training=False))


def close(a, b, rtol=1e-5):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=1e-6)


def test_exact_statistics_do_not_depend_on_the_batches(deep):
    model, variables, x = deep
    cuts = [[x], [x[:20], x[20:]], lambda: (x[i : i + 15] for i in range(0, 60, 15))]
    whole, *others = [
        reestimate_batch_stats(model.apply, variables, batches, exactly=True, training=True) for batches in cuts
    ]
    for other in others:
        close(other, whole)
    # They are what inference normalizes by: each layer's output has the mean and variance of scale and bias.
    _, seen = model.apply(
        {**variables, "batch_stats": whole}, x, training=False, capture_intermediates=True, mutable=["intermediates"]
    )
    for name, params in variables["params"].items():
        if name.startswith("BatchNorm"):
            (y,) = seen["intermediates"][name]["__call__"]
            np.testing.assert_allclose(y.mean(0), params["bias"], atol=1e-5)
            var = whole[name]["var"]
            np.testing.assert_allclose(y.var(0), params["scale"] ** 2 * var / (var + 1e-5), rtol=1e-4)


def test_one_pass_merges_what_training_sees(deep):
    model, variables, x = deep
    batches = [x[:40], x[40:]]
    found = reestimate_batch_stats(model.apply, variables, batches, training=True)
    means = []
    for batch in batches:  # momentum 0: the batch's own statistics, of Flax's update
        model_0 = models.Perceptron((8, 8, 8), 3, functools.partial(BatchNorm, momentum=0.0), "before")
        means.append(model_0.apply(variables, batch, training=True, mutable=["batch_stats"])[1]["batch_stats"])
    first = jax.tree.map(lambda a, b: (2 * a + b) / 3, *means)
    for name, stats in found.items():
        (m_1, m_2), merged = (one[name]["mean"] for one in means), first[name]
        np.testing.assert_allclose(stats["mean"], merged["mean"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], merged["var"] + 2 / 9 * (m_1 - m_2) ** 2, rtol=1e-4)
    corrected = reestimate_batch_stats(model.apply, variables, batches, training=True, bessel_correction=True)
    close(jax.tree.map(lambda v: v * 60 / 59, found["BatchNorm_0"]["var"]), corrected["BatchNorm_0"]["var"])


def test_passes_are_as_many_as_batch_norms_in_a_row():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training=True):
            norm = functools.partial(BatchNorm, use_running_average=not training)
            left = norm(name="b")(nn.relu(norm(name="a")(nn.Dense(3)(x))))
            right = norm(name="c")(nn.Dense(3)(x))
            return norm(name="d")(left + right)

    x, passes = jax.random.normal(KEY, (12, 3)), []
    variables = Net().init(KEY, x)
    found = reestimate_batch_stats(Net().apply, variables, lambda: passes.append(1) or [x[:4], x[4:]], exactly=True)
    assert len(passes) == 1 + 3
    close(found, reestimate_batch_stats(Net().apply, variables, [x], exactly=True))
    (y, _) = Net().apply({**variables, "batch_stats": found}, x, training=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean(0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(y.std(0), np.ones(3), rtol=1e-4)


def test_on_a_mesh_and_in_shard_map(deep):
    model, variables, x = deep
    expected = reestimate_batch_stats(model.apply, variables, [x[:24], x[24:56]], exactly=True, training=True)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = [jax.device_put(part, NamedSharding(mesh, P("batch"))) for part in (x[:24], x[24:56])]
    replicated = jax.device_put(variables, NamedSharding(mesh, P()))
    close(reestimate_batch_stats(model.apply, replicated, sharded, exactly=True, training=True), expected)


def test_after_weights_were_averaged(deep):
    model, variables, x = deep
    other = away_from_start(variables, seed=1)
    average = optax.incremental_update(other["params"], variables["params"], 0.5)
    stale = {"params": average, "batch_stats": variables["batch_stats"]}
    fresh = {**stale, "batch_stats": reestimate_batch_stats(model.apply, stale, [x], exactly=True, training=True)}
    by_batch, _ = model.apply(stale, x, training=True, mutable=["batch_stats"])
    np.testing.assert_allclose(model.apply(fresh, x, training=False), by_batch, rtol=1e-4, atol=1e-4)
    assert np.abs(model.apply(stale, x, training=False) - by_batch).max() > 0.1


def test_masks_flax_layers_and_several_arguments():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask, training):
            return nn.BatchNorm(use_running_average=not training)(x, mask=mask)

    x, mask = jax.random.normal(KEY, (12, 3)), (jnp.arange(12) % 3 > 0)[:, None]
    variables = Net().init(KEY, x, mask, True)
    found = reestimate_batch_stats(Net().apply, variables, [(x[:5], mask[:5]), (x[5:], mask[5:])], training=True)
    kept = np.asarray(x)[np.asarray(mask)[:, 0]]
    close(found["BatchNorm_0"], {"mean": kept.mean(0), "var": kept.var(0)})


def test_errors_of_reestimation(deep):
    model, variables, x = deep
    f = functools.partial(reestimate_batch_stats, model.apply, variables, training=True)
    with pytest.raises(TypeError, match=r"more than once; got an iterator. Pass list\(batches\)"):
        f(iter([x]))
    with pytest.raises(ValueError, match="batches must hold one at least"):
        f([])
    with pytest.raises(ValueError, match=r"it showed none to BatchNorm_0, BatchNorm_1, BatchNorm_2\. Pass model"):
        f([x[:0], x[:0]])
    plain = models.Perceptron((8,), 3)
    variables = plain.init(KEY, x, training=False)
    for find in (
        functools.partial(reestimate_batch_stats, batches=[x]),
        lambda *a: adapt_batch_stats(*a, x, prior=1.0),
    ):
        with pytest.raises(ValueError, match="variables must hold the collection 'batch_stats'"):
            find(plain.apply, variables)


# --- adaptation -------------------------------------------------------------------------------------------------------


def test_adaptation_is_between_inference_and_training(deep):
    model, variables, x = deep
    by_value = functools.partial(adapt_batch_stats, model.apply, variables, training=False)
    adapt, infer = jax.jit(by_value), inference_by(model.apply)
    y, stats = adapt(x, prior=float("inf"))
    close((y, stats), (infer(variables, x), variables["batch_stats"]))
    y, stats = adapt(x, prior=0.0)
    close(y, model.apply(variables, x, training=True, mutable=["batch_stats"])[0], rtol=1e-4)
    y, stats = adapt(x, prior=20.0)
    close(y, infer({**variables, "batch_stats": stats}, x), rtol=1e-4)
    dense = variables["params"]["Dense_0"]
    inputs = x @ dense["kernel"] + dense["bias"][None]
    old = variables["batch_stats"]["BatchNorm_0"]
    mixed = {"mean": (20 * old["mean"] + 60 * inputs.mean(0)) / 80, "var": (20 * old["var"] + 60 * inputs.var(0)) / 80}
    close(stats["BatchNorm_0"], mixed)
    with pytest.raises(ValueError, match="prior must be a real scalar"):
        by_value(x, prior=-1.0)


def test_the_model_itself_is_not_touched(deep):
    model = nn.Sequential([nn.Dense(4, use_bias=False), NoisyBatchNorm(use_running_average=True), nn.relu])
    x = jax.random.normal(KEY, (6, 3))
    variables = model.init(KEY, x)
    fold_model(model, variables, x)
    reestimate_batch_stats(model.apply, variables, [x], exactly=True)
    adapt_batch_stats(model.apply, variables, x, prior=1.0)
    assert (model.layers[0].use_bias, model.layers[1].use_running_average) == (False, True)


# --- what can't be folded or seen, and compiled parts -----------------------------------------------------------------


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.relu(BatchNorm(use_running_average=not training, momentum=0.9)(nn.Dense(3, use_bias=False)(x)))


Compiled = nn.jit(Pair, static_argnums=2)


class Twice(nn.Module):
    part: object = Compiled

    @nn.compact
    def __call__(self, x, training=False):
        return self.part(name="b")(self.part(name="a")(x, training), training)


@pytest.mark.exhaustive
def test_compiled_parts_are_traced_anew_and_nothing_stays_behind_in_them():
    x = 3 + 2 * jax.random.normal(KEY, (12, 3))
    variables = away_from_start(Twice().init(KEY, x))
    train = lambda part: Twice(part).apply(variables, x, True, mutable=["batch_stats"])
    plain, expected = Twice(Pair), train(Compiled)
    for _ in range(2):
        assert ("a/Dense_0", "a/BatchNorm_0") in foldable_pairs(Twice(), variables, x)
        apply, folded = fold_model(Twice(), variables, x)
        np.testing.assert_allclose(apply(folded, x), plain.apply(variables, x), rtol=1e-5, atol=1e-5)
        found = [reestimate_batch_stats(m.apply, variables, [x], exactly=True, training=True) for m in (Twice(), plain)]
        close(*found)
        close(*(adapt_batch_stats(model.apply, variables, x, prior=0.0) for model in (Twice(), plain)))
        chex.assert_trees_all_equal(train(Compiled), expected)


class Standardized(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return inputs @ ((kernel - kernel.mean(0)[None]) / kernel.std(0)[None]) + bias[None]


class Unfoldable(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3)
        if self.kind == "weight norm":
            y = nn.WeightNorm(dense)(x)
        elif self.kind == "spectral norm":
            y = nn.SpectralNorm(dense)(x, update_stats=False)
        elif self.kind == "subclass":
            y = Standardized(3)(x)
        elif self.kind == "tied":
            y = dense(x)
            x = x @ dense.variables["params"]["kernel"]
        else:
            x = BatchNorm(use_running_average=True)(x[..., None])
            return nn.Conv(3, (2,), padding=0, input_dilation=2)(x)
        return BatchNorm(use_running_average=True)(y) + x


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "subclass", "tied", "dilated"])
def test_a_kernel_that_is_not_used_as_it_is_stays(kind):
    x, model = jax.random.normal(KEY, (4, 3)), Unfoldable(kind)
    assert foldable_pairs(model, model.init(KEY, x), x) == []


class Stacked(nn.Module):
    """Pairs of a layer and a batch norm in a row, by Flax's scan."""

    length: int

    @nn.compact
    def __call__(self, x, training=False):
        axes = {"params": 0, "batch_stats": 0}
        call = lambda pair, x, _: (pair(x, training), None)
        in_a_row = nn.scan(call, variable_axes=axes, split_rngs={"params": True}, length=self.length)
        return in_a_row(nn.remat(Pair, static_argnums=2)(name="pairs"), x, None)[0]


class InARow(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x, training=False):
        for i in range(self.length):
            x = Pair(name=str(i))(x, training)
        return x


@pytest.mark.by_default(1)
@pytest.mark.parametrize("exactly", [False, True])
def test_batch_norms_inside_scan(exactly):
    x = 1 + jax.random.normal(KEY, (40, 3))
    scanned, plain = Stacked(3), InARow(3)
    variables = scanned.init(KEY, x)
    by_layer = {
        c: {str(i): jax.tree.map(lambda v, i=i: v[i], variables[c]["pairs"]) for i in range(3)} for c in variables
    }
    find = functools.partial(reestimate_batch_stats, batches=[x[:10], x[10:]], exactly=exactly, training=True)
    expected = find(plain.apply, by_layer)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *(expected[str(i)] for i in range(3)))
    close(find(scanned.apply, variables), {"pairs": stacked})


def test_batch_norms_inside_vmap_and_compiled_models():
    x = jax.random.normal(KEY, (2, 6, 3)) * jnp.array([1.0, 3.0])[:, None, None]
    axes = {"params": 0, "batch_stats": 0}
    layer = nn.vmap(BatchNorm, variable_axes=axes, split_rngs={"params": True})(use_running_average=False)
    variables = layer.init(KEY, x)
    apply = jax.jit(layer.apply, static_argnames="mutable")
    apply(variables, x, mutable=("batch_stats",))  # what is compiled by now must not stand for what is looked at
    for found in (reestimate_batch_stats(f, variables, [x[:, :2], x[:, 2:]]) for f in (layer.apply, apply)):
        close(found, {"mean": x.mean(1), "var": x.var(1)})


def test_boxed_and_frozen_variables_stay_so(deep):
    model, variables, x = deep
    expected = reestimate_batch_stats(model.apply, variables, [x], training=True)
    box = lambda v: nn.Partitioned(v, (None,) * v.ndim)
    boxed = {**variables, "batch_stats": jax.tree.map(box, variables["batch_stats"])}
    for given, same in ((boxed, jax.tree.map(box, expected)), (freeze(variables), freeze(expected))):
        found = reestimate_batch_stats(model.apply, given, [x], training=True)
        chex.assert_trees_all_equal_structs(found, same)
        close(found, same)


@pytest.mark.exhaustive
def test_a_model_inside_shard_map(deep):
    model, variables, x = deep
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    synced = models.Perceptron((8, 8, 8), 3, functools.partial(BatchNorm, axis_name="batch"), "before")

    def apply(variables, x, mutable):
        local = lambda variables, x: synced.apply(variables, x, training=True, mutable=mutable)
        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("batch")), out_specs=(P("batch"), P()))(variables, x)

    expected = reestimate_batch_stats(model.apply, variables, [x[:24], x[24:56]], exactly=True, training=True)
    close(reestimate_batch_stats(apply, variables, [x[:24], x[24:56]], exactly=True), expected)


def test_batch_norms_that_cannot_be_seen_are_errors():
    x = jax.random.normal(KEY, (4, 3))
    layer = LpBatchNorm(p=1, use_running_average=False)
    with pytest.raises(ValueError, match="whose 'var' is a variance, got LpBatchNorm"):
        adapt_batch_stats(layer.apply, layer.init(KEY, x), x, prior=1.0)


def test_statistics_that_never_move_stay():
    model = nn.Sequential(
        [linen.FrozenBatchNorm(use_running_average=False), nn.Dense(2), BatchNorm(use_running_average=False)]
    )
    x = 3 + jax.random.normal(KEY, (12, 3))
    variables = model.init(KEY, x)
    frozen = variables["batch_stats"]["layers_0"]
    outputs = (x / np.sqrt(1 + 1e-5)) @ variables["params"]["layers_1"]["kernel"]
    for exactly in (False, True):
        found = reestimate_batch_stats(model.apply, variables, [x[:5], x[5:]], exactly=exactly)
        close(found, {"layers_0": frozen, "layers_2": {"mean": outputs.mean(0), "var": outputs.var(0)}})
    _, adapted = jax.jit(functools.partial(adapt_batch_stats, model.apply, prior=0.0))(variables, x)
    close(adapted, {"layers_0": frozen, "layers_2": {"mean": outputs.mean(0), "var": outputs.var(0)}})


def test_each_kind_of_batches_is_reestimated_and_adapted_by_itself():
    x, layer = jax.random.normal(KEY, (12, 3)), SplitBatchNorm(num_splits=3, use_running_average=False)
    variables = layer.init(KEY, x, split=0)
    apply = lambda variables, x, split, **options: layer.apply(variables, x, split=split, **options)
    batches = [(x[:5], 2), (10 * x, 0), (x[5:], 2)]
    for exactly in (False, True):
        found = reestimate_batch_stats(apply, variables, batches, exactly=exactly)
        mean, var = x.mean(0), x.var(0)
        close(found, {"mean": jnp.stack([10 * mean, 0 * mean, mean]), "var": jnp.stack([100 * var, 0 * var + 1, var])})
    y, stats = adapt_batch_stats(apply, {**variables, "batch_stats": found}, (x + 1, 2), prior=12.0)
    close(stats["mean"], found["mean"].at[2].add(0.5))
    running = {"mean": stats["mean"][2], "var": stats["var"][2]}
    close(y, batch_norm(x + 1, variables["params"], running, training=False)[0])


def test_data_that_is_not_finite_is_an_error(deep):
    model, variables, x = deep
    with pytest.raises(ValueError, match="batches must give finite statistics, got NaN or infinity at BatchNorm_0"):
        reestimate_batch_stats(model.apply, variables, [x.at[0, 0].set(jnp.nan)], training=True)


@pytest.mark.parametrize(
    ("dense", "norm", "folds"),
    [
        ({}, {}, True),
        ({"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16}, True),
        ({"dtype": jnp.bfloat16}, {"dtype": jnp.float32}, False),
        ({"dtype": jnp.float16}, {}, False),
        ({"param_dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}, False),
    ],
)
def test_dtypes_that_differ_are_not_folded(dense, norm, folds):
    x = jax.random.normal(KEY, (4, 3))
    model = nn.Sequential([nn.Dense(3, **dense), BatchNorm(use_running_average=True, **norm)])
    variables = model.init(KEY, x)
    assert len(foldable_pairs(model, variables, x)) == folds
    apply, folded = fold_model(model, variables, x)
    expected = model.apply(variables, x)
    assert apply(folded, x).dtype == expected.dtype
    tolerance = 3e-2 if jnp.bfloat16 in dense.values() else 1e-5
    np.testing.assert_allclose(*(np.float32(y) for y in (apply(folded, x), expected)), rtol=tolerance, atol=tolerance)


def test_arrays_that_can_not_be_folded_are_clear_errors():
    params, stats = norm_of(4, jnp.float32)
    with pytest.raises(ValueError, match="kernel must be floating point"):
        inspect.unwrap(fold)(jnp.ones((5, 4), int), None, params, stats)
    for f in (fold, fold_before):
        with pytest.raises(ValueError, match=r"bias must have the shape \(4,\), of the kernel's outputs, got \(1,\)"):
            f(jnp.ones((4, 4)), jnp.ones(1), params, stats)
    with pytest.raises(ValueError, match="groups must divide the 4 output features"):
        fold_before(jnp.ones((3, 2, 4)), None, params, stats, groups=3)


def test_adaptation_counts_examples_by_their_weights():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None):
            return BatchNorm(use_running_average=True)(x, mask=mask)

    x = np.arange(3 * 4.0, dtype=np.float32).reshape((3, 2, 2, 1)) + 10  # three images of four pixels
    variables = Net().init(jax.random.key(0), x)
    padded = np.concatenate([x, np.full((5, 2, 2, 1), np.nan, np.float32)])
    outputs, expected = adapt_batch_stats(Net().apply, variables, x, prior=16.0)
    got = adapt_batch_stats(Net().apply, variables, padded, prior=16.0, mask=np.arange(8) < 3)
    chex.assert_trees_all_close((got[0][:3], got[1]), (outputs, expected), rtol=1e-5)
    np.testing.assert_allclose(expected["BatchNorm_0"]["mean"], 3 * x.mean() / (16 + 3), rtol=1e-5)
    np.testing.assert_allclose(expected["BatchNorm_0"]["var"], (16 + 3 * x.var()) / (16 + 3), rtol=1e-5)


def test_adaptation_counts_the_examples_of_all_members():
    layer = BatchNorm(use_running_average=True, axis_name="i")
    x = np.random.default_rng(0).normal(5, 2, (4, 3, 2)).astype(np.float32)
    variables = BatchNorm(use_running_average=True).init(jax.random.key(0), x[0])

    def adapt(x):
        return adapt_batch_stats(layer.apply, variables, x, prior=6.0)[1]

    got = jax.vmap(adapt, axis_name="i")(x)
    np.testing.assert_allclose(got["mean"][0], 12 * x.reshape((12, 2)).mean(0) / 18, rtol=1e-5)


def rounded(*arguments, **options):
    return jnp.round(jax.lax.dot_general(*arguments, **options) * 4) / 4


def rounded_convolution(*arguments, **options):
    return jnp.round(jax.lax.conv_general_dilated(*arguments, **options) * 4) / 4


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(6, dot_general=rounded),
        nn.Dense(6, dot_general_cls=lambda: rounded),
        nn.Conv(6, (3,), conv_general_dilated=rounded_convolution),
        nn.Dense(6, promote_dtype=lambda x, kernel, bias, **options: (jnp.round(x, 1), kernel, bias)),
    ],
    ids=["dot_general", "dot_general_cls", "conv_general_dilated", "promote_dtype"],
)
def test_a_layer_with_a_product_of_its_own_is_not_folded(layer):
    model = nn.Sequential([layer, BatchNorm(use_running_average=True)])
    x = jax.random.normal(KEY, (4, 5, 3))
    assert foldable_pairs(model, model.init(KEY, x), x) == []
    plain = nn.Sequential([nn.Dense(6), BatchNorm(use_running_average=True)])
    assert foldable_pairs(plain, plain.init(KEY, x), x) == [("layers_0", "layers_1")]


def test_arguments_of_the_call_by_position():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    x = jax.random.normal(KEY, (4, 5))
    variables = Net().init(KEY, x, True)
    variables = {**variables, "batch_stats": jax.tree.map(lambda v: 0.3 * v + 0.2, variables["batch_stats"])}
    apply, folded = fold_model(Net(), variables, x, False)
    assert list(folded["params"]) == ["Dense_0"]
    np.testing.assert_allclose(apply(folded, x, False), Net().apply(variables, x, False), rtol=1e-5, atol=1e-6)


def of_its_own(layer):
    """A subclass that does more than its layer's call."""

    class Activated(layer):
        def __call__(self, x, *args, **options):
            return jax.nn.relu(super().__call__(2 * x, *args, **options))

    return Activated


@pytest.mark.by_default(1)
@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_subclass_with_a_call_of_its_own(library, ours):
    x = jax.random.normal(KEY, (6, 5))
    if library == "linen":
        layer = of_its_own(BatchNorm if ours else nn.BatchNorm)
        model = nn.Sequential([nn.Dense(6), layer(use_running_average=True), nn.Dense(2)])
        args, apply, variables = (model, model.init(KEY, x)), model.apply, model.init(KEY, x)
        kernel = variables["params"]["layers_0"]["kernel"]
        predict, found = (
            (lambda: model.apply(variables, x)),
            lambda: fold_model(*args, x)[0](fold_model(*args, x)[1], x),
        )
    else:
        layer = of_its_own(bnjax_nnx.BatchNorm if ours else nnx.BatchNorm)
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), layer(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs))
        model.eval()
        args, (apply, variables), kernel = (model,), bnjax_nnx.functional(model), model.layers[0].kernel[...]
        predict, found = (lambda: model(x)), lambda: fold_model(model, x)(x)
    assert foldable_pairs(*args, x) == []
    np.testing.assert_array_equal(found(), predict())
    h = np.asarray(2 * x @ kernel, np.float64)  # what the layer within the subclass gets
    of_norm = lambda stats: next(v for v in jax.tree.leaves(stats, is_leaf=lambda v: "mean" in v))
    exact = of_norm(reestimate_batch_stats(apply, variables, [x], bessel_correction=True))
    np.testing.assert_allclose(exact["mean"], h.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exact["var"], h.var(0, ddof=1), rtol=1e-4)
    mixed = of_norm(adapt_batch_stats(apply, variables, x, prior=12)[1])
    np.testing.assert_allclose(mixed["mean"], h.mean(0) * 6 / 18, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed["var"], (12 + 6 * h.var(0)) / 18, rtol=1e-4)
