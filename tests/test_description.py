import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import List

from bnjax import init_batch_norm, models
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
