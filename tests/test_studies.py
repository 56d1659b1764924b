import dataclasses
import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_studies
from scipy import stats

from bnjax import linen, training
from bnjax.models import Perceptron
from bnjax.studies import COMPILABLE, STUDIES, Options, blobs, circles, data, mnist
from bnjax.studies.engine import at_inference, steps, with_population_statistics
from bnjax.studies.engine.plan import Examples, Variant, compiler_options, seed_keys
from bnjax.studies.engine.training import Job, train, train_all
from bnjax.studies.evidence import results
from bnjax.studies.evidence.statistics import interval, prediction_interval


def small_variant(name="after"):
    import optax

    from bnjax.linen import BatchNorm
    from bnjax.models import Perceptron

    model = Perceptron((8,), 1, BatchNorm, "after")
    return Variant(name, name, model, optax.sgd(0.1), (2,), 32, training.binary_cross_entropy)


def train_circles(seeds, plan=None):
    d = data.circles()
    plan = plan or small_variant().epochs(4, len(d.train.y))
    return train(plan, {"key": seed_keys(seeds)}, Examples.of(d.train, {"test": d.test}))


@pytest.fixture(scope="module")
def circles_run():
    report = small_studies.Silent(by="name")
    return *circles.run(circles.Options(seeds=2, epochs=6), report), report


def test_intervals_are_students():
    values = np.array([1.0, 4.0, 2.0, np.nan, 5.0])
    expected = stats.t.interval(0.95, 3, loc=3, scale=stats.sem(values, nan_policy="omit"))
    np.testing.assert_allclose([interval(values).low, interval(values).high], expected)
    one_more = stats.t.interval(0.95, 3, loc=3, scale=np.nanstd(values, ddof=1) * np.sqrt(1 + 1 / 4))
    np.testing.assert_allclose([prediction_interval(values).low, prediction_interval(values).high], one_more)
    assert interval(np.array([np.nan])).text() == "–"
    assert interval(np.array([2.0])).text(1) == "2.0"


def test_a_seed_gives_the_same_in_any_company():
    both, alone = train_circles([3, 8]), train_circles([8])
    for name, curve in both.curves.items():
        assert curve.shape == (2, 4)
        np.testing.assert_allclose(curve[1], alone.curves[name][0], rtol=1e-4, atol=1e-5)


def test_a_plan_carried_out_again_compiles_nothing():
    traces = []

    def objective(logits, labels):
        traces.append(None)
        return training.binary_cross_entropy(logits, labels)

    plan = dataclasses.replace(small_variant(), objective=objective).epochs(2, 500)
    first = train_circles([3, 8], plan)
    count = len(traces)
    again = train_circles([8, 3], plan)
    assert len(traces) == count > 0
    for name, curve in first.curves.items():
        np.testing.assert_allclose(again.curves[name][::-1], curve, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 10**6])
def test_xla_knows_the_compiler_options_and_its_flags_win(monkeypatch, steps):
    monkeypatch.delenv("XLA_FLAGS")
    options = compiler_options(steps)
    assert options["xla_backend_optimization_level"] == 1
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert set(options) - set(compiler_options(steps)) == {"xla_backend_optimization_level"}


def test_seeds_may_have_data_of_their_own():
    sets, plan = [data.blobs(seed) for seed in (0, 1)], small_variant().epochs(4, 750)
    joined = data.Split(*(np.stack(parts) for parts in zip(*(s.train for s in sets), strict=True)))
    test = data.Split(*(np.stack(parts) for parts in zip(*(s.test for s in sets), strict=True)))
    joint = train(plan, {"key": seed_keys([0, 1]), "examples": Examples.of(joined, {"test": test}, axis=1)})
    for seed, one in enumerate(sets):
        alone = train(plan, {"key": seed_keys([seed])}, Examples.of(one.train, {"test": one.test}))
        np.testing.assert_allclose(joint.curves["test_loss"][seed], alone.curves["test_loss"][0], rtol=1e-4)


def test_epochs_to_a_threshold_count_from_one():
    trained = train_circles([0])
    trained.curves["test_accuracy"] = np.array([[0.5, 0.8, 0.7, 0.9], [0.5, 0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(trained.epochs_to("test_accuracy", 0.8), [4, 5])  # from then on, or one too many
    np.testing.assert_array_equal(trained.epochs_to("test_accuracy", 0.5), [1, 1])
    np.testing.assert_allclose(trained.final("test_accuracy", 2), [0.8, 0.5])


def test_unsteadiness_is_that_of_the_changes():
    trained = train_circles([0, 1, 2])
    trained.curves["loss"] = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 3.0, 1.0], [1.0, np.nan, 3.0, 1.0]])
    np.testing.assert_allclose(trained.unsteadiness("loss"), [0, np.std([2, 0, -2]), np.inf])


def test_population_statistics_are_those_that_inference_normalizes_by():
    d, network = data.circles(), small_variant("before")
    trained = train(network.epochs(2, 500), {"key": seed_keys([0, 1])}, Examples.of(d.train, {"test": d.test}))
    states = with_population_statistics(network, trained.state, d.train.x)
    x = jnp.asarray(d.train.x)
    population = [jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), states) for i in range(2)]
    for state in population:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        expected, _ = network.model.apply(variables, x, training=True, mutable=["batch_stats"])
        np.testing.assert_allclose(network.model.apply(variables, x, training=False), expected, rtol=1e-4, atol=1e-5)
    metrics = at_inference(network, trained.state, d.train, d.test)
    for prefix, of in (("", trained.states), ("population_", population)):
        for split, examples in (("train", d.train), ("test", d.test)):
            on = tuple(map(jnp.asarray, examples))
            found = [training.evaluate(state, *on, objective=network.objective).loss.mean() for state in of]
            np.testing.assert_allclose(metrics[f"{prefix}{split}_loss"], found, rtol=1e-5)
        gap = metrics[f"{prefix}test_loss"] - metrics[f"{prefix}train_loss"]
        np.testing.assert_array_equal(metrics[f"{prefix}loss_gap"], gap)
    own = [np.stack([part, part[::-1]]) for part in (d.train.x, d.train.y)]  # the second seed's in another order
    of_own = at_inference(network, trained.state, data.Split(*own), data.Split(*own), has_own=True)
    np.testing.assert_allclose(of_own["population_train_loss"], metrics["population_train_loss"], rtol=1e-4)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("kind", ["BatchNorm", "BatchRenorm", "GhostBatchNorm", "MovingBatchNorm"])
def test_population_statistics_of_other_norms_are_those_of_inference_too(kind):
    import optax

    norm = functools.partial(getattr(linen, kind), **({"ghost_size": 4} if kind == "GhostBatchNorm" else {}))
    model = Perceptron((8, 8), 1, norm, "before")
    network = Variant(kind, kind, model, optax.sgd(0.1), (2,), 32, training.binary_cross_entropy)
    x = 3 * jax.random.normal(jax.random.key(0), (60, 2)) + 1
    states = jax.vmap(network.create)({"key": seed_keys([0, 1])})  # whose running statistics are far off
    found = with_population_statistics(network, states, x)
    state = jax.tree.map(lambda v: v[1], found)
    _, seen = model.apply(
        {"params": state.params, "batch_stats": state.batch_stats}, x, training=False, capture_intermediates=True
    )
    for i in (0, 1):
        h = seen["intermediates"][f"Dense_{i}"]["__call__"][0]
        stats = state.batch_stats[f"{kind}_{i}"]
        np.testing.assert_allclose(stats["mean"], h.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(stats["var"], h.var(0), rtol=1e-3)


def test_a_failure_stops_all_trainings():
    d = data.circles()

    class Failing(small_studies.Silent):
        def expect(self, count):
            pass

        def task(self, plan):
            if plan.name == "bad":
                raise RuntimeError("this one fails")
            return super().task(plan)

    examples, keys = Examples.of(d.train, {"test": d.test}), {"key": seed_keys([0])}
    jobs = [Job(small_variant(name).epochs(4, 500), keys, examples) for name in ("good", "bad", "good")]
    with pytest.raises(RuntimeError, match="this one fails"):
        train_all(jobs, Failing(by="name"), Options())
    assert threading.active_count() < 10


def test_circles_trains_all_variants(circles_run):
    measured, figures, report = circles_run
    ours = ["none", "after", "before", "no_scale_bias", "no_momentum", "input", "moving"]
    assert list(measured.variants) == [*ours, "renorm", "layer", "group", "weight"]
    for name, (_, _, metrics) in measured.variants.items():
        assert all(values.shape == (2,) for values in metrics.values())
        assert [epoch for epoch, _ in report.told[name]] == list(range(1, 7))
    small_studies.check_figures(figures)
    curves = {"learning_curves.png", "extensions.png", "normalizers.png"}
    assert set(figures) == {*curves, "decision_boundaries.png", "histograms.png"}
    counts = measured.arrays["after/histograms/gradient/Dense_0/kernel/counts"]
    assert counts.shape == (6, 40)
    assert (counts.sum(1) == 100).all()
    assert {judgment.measured for judgment in measured.claims} == {"needs epochs 100"}
    for judgment in measured.claims:  # with as many epochs, nothing would be missing
        assert all(condition.values(measured) is not None for condition in judgment.claim.conditions)
        assert set(judgment.claim.figures) <= set(figures)
    # momentum moves only the running statistics, so training itself is the same
    np.testing.assert_allclose(
        measured.arrays["after/train_loss"], measured.arrays["no_momentum/train_loss"], rtol=1e-4, atol=1e-5
    )


def test_versions_are_of_what_is_installed(circles_run, monkeypatch):
    import datetime
    import importlib.metadata

    version = importlib.metadata.version

    def without(package):
        if package in ("chex", "scikit-learn", "tensorflow-datasets"):  # what only some extras install
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    document = circles_run[0].to_json(1.0, datetime.datetime.now(datetime.UTC))
    assert set(document["versions"]) == {"bnjax", "jax", "jaxlib", "flax", "optax", "numpy"}


def test_results_follow_their_schema(circles_run, tmp_path):
    import datetime

    measured, figures, _ = circles_run
    results.save(measured, figures, tmp_path, 1.5, datetime.datetime.now(datetime.UTC))
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["schema"] == 3
    assert document["seeds"] == [0, 1]
    assert document["settings"]["epochs"] == 6
    assert document["versions"]["jax"]
    for name, variant in document["variants"].items():
        for metric, entry in variant["metrics"].items():
            assert len(entry["values"]) == 2
            values = np.array([np.nan if v is None else v for v in entry["values"]])
            expected = interval(measured.metric(name, metric))
            np.testing.assert_allclose(interval(values), expected)
            assert entry["n"] == expected.n
    assert {claim["verdict"] for claim in document["claims"]} <= {"reproduced", "not reproduced", "undecided"}
    with np.load(tmp_path / "curves.npz") as arrays:
        assert arrays["before/test_accuracy"].shape == (2, 6)
    for name in figures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| after activation |" in (tmp_path / "summary.md").read_text()


@pytest.mark.exhaustive
def test_blobs_prints_the_stored_numbers_beside_the_calculation():
    measured, figures = blobs.run(blobs.Options(seeds=2, epochs=2), small_studies.Silent(by="name"))
    for part in measured.notes["inside"].values():
        h, gamma, beta, mean, var = (np.array(part[key]) for key in ("h", "gamma", "beta", "mean", "var"))
        np.testing.assert_allclose(part["r"], gamma * (h - mean) / np.sqrt(var + 1e-3) + beta, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(part["r"], part["manual"], rtol=1e-4, atol=1e-5)
        assert not np.allclose(mean, 0)
    small_studies.check_figures(figures)
    verdicts = {judgment.claim.id: judgment.verdict for judgment in measured.claims}
    assert verdicts["S4.1"] == verdicts["S4.6"] == "reproduced"
    for judgment in measured.claims:
        assert all(condition.values(measured) is not None for condition in judgment.claim.conditions)
        assert set(judgment.claim.figures) <= set(figures)
    start = measured.metric("shallow_zero", "test_loss") - measured.metric("shallow_before", "test_loss")
    assert (np.abs(start) > 0.01).all()  # two epochs of momentum 0.99 keep most of the start
    losses = (measured.metric("shallow_zero", f"{of}test_loss") for of in ("", "population_"))
    assert np.not_equal(*losses).all()
    assert [title for title, _ in measured.texts] == [
        "(c) inside batch norm, 2 features, first seed",
        "(c) inside batch norm, 3 features, first seed",
    ]


@pytest.mark.exhaustive
def test_mnist_sweeps_batch_sizes(monkeypatch):
    found = small_studies.images((28, 28, 1), (500, 100), name="mnist")
    monkeypatch.setattr(data, "images", lambda *arguments: found)
    monkeypatch.setattr(mnist, "NORMALIZERS", mnist.NORMALIZERS[:1])
    measured, figures = mnist.run(mnist.Options(2, epochs=2, batch_sizes=(32, 100)), small_studies.Silent(by="name"))
    assert list(measured.variants) == [
        *("none_32", "before_32", "none_100", "before_100"),
        *(f"{name}_32" for name in mnist.NORMALIZERS),
        mnist.SPLIT_TWICE,
    ]
    assert measured.metric("before_32", "train_accuracy_during_epoch").shape == (2,)
    for judgment in measured.claims:
        sweep = judgment.claim.id.startswith("S2.3 (")
        assert sweep or all(condition.values(measured) is not None for condition in judgment.claim.conditions)
    small_studies.check_figures(figures)
    assert (measured.metric("before_32", "kept_bytes") > measured.metric("none_32", "kept_bytes")).all()
    assert (measured.metric("before_32", "changed_by_order") < 1e-5).all()
    names = ("lost_by_contrast", "lost_by_contrast_adapted", "regained_by_contrast")
    lost, adapted, regained = (measured.metric("before_32", name) for name in names)
    np.testing.assert_array_equal(regained, lost - adapted)
    assert set(figures) == {"learning_curves.png", "normalizers.png", "batch_sizes.png", "histograms.png"}
    of_ten_epochs = [judgment for judgment in measured.claims if judgment.claim.needs.get("epochs")]
    assert {judgment.verdict for judgment in of_ten_epochs} == {"undecided"}
    with pytest.raises(ValueError, match="400 training examples, got 401"):
        mnist.run(mnist.Options(2, epochs=2, batch_sizes=(401,)), small_studies.Silent(by="name"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_what_its_declaration_says(name):
    study, module = STUDIES[name], STUDIES[name].load()
    assert callable(module.run) and module.CLAIMS
    assert (module.STUDY.name, module.STUDY.options) == (name, module.Options)
    ours = {field: (of.type, of.default, of.metadata) for field, of in module.STUDY.fields.items()}
    assert ours == {field: (of.type, of.default, of.metadata) for field, of in study.fields.items()}
    assert module.Options(**(study.fast or {})).to_json() == study.options(**(study.fast or {})).to_json()
    assert study.length and study.fields["seeds"].default >= 3


@pytest.mark.by_default(4)
@pytest.mark.parametrize("name", COMPILABLE)
def test_every_step_is_that_of_a_network_with_synchronized_batch_norms(name):
    network = steps.network_of(name)
    assert network.model.norm is not None
    assert name not in STUDIES or network.name in (STUDIES[name].compiled, f"vgg_{STUDIES[name].compiled}")
    _, (state, batch, key) = steps.abstract_step(network, training.make_mesh(), parallel_by="jit", batch_size=2)
    assert jax.tree.leaves(state.batch_stats) and batch.x.shape == (16, *network.input_shape)
    assert (key is None) == (batch.x.dtype != np.uint8)


def test_unknown_steps_are_named():
    with pytest.raises(ValueError, match=r"the step must be one of circles, .*resnet50, got 'squares'"):
        steps.network_of("squares")
