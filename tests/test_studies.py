import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
import small_studies
from scipy import stats

from bnjax import training
from bnjax.studies import COMPILABLE, STUDIES, Options, blobs, circles, data, mnist
from bnjax.studies.engine import steps
from bnjax.studies.engine.plan import Examples, Variant, compiler_options, seed_keys
from bnjax.studies.engine.training import Job, train, train_all
from bnjax.studies.evidence import results
from bnjax.studies.evidence.statistics import Interval, interval, prediction_interval, within


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


def test_an_interval_lies_in_a_range_or_not_or_that_is_undecided():
    assert within(Interval(1.0, 0.1, 5), 0.8, 1.2) is True
    assert within(Interval(1.0, 0.1, 5), 0.95, 1.2) is None
    assert within(Interval(1.0, 0.1, 5), 1.2, 2) is False
    assert within(Interval(1.0, np.nan, 1), 0, 2) is None


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
    np.testing.assert_array_equal(trained.epochs_to("test_accuracy", 0.8), [2, 5])
    np.testing.assert_allclose(trained.final("test_accuracy", 2), [0.8, 0.5])


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
    ours = ["none", "after", "before", "no_scale_bias", "no_momentum", "input"]
    assert list(measured.variants) == [*ours, "renorm", "layer", "group", "weight"]
    for name, (_, _, metrics) in measured.variants.items():
        assert all(values.shape == (2,) for values in metrics.values())
        assert [epoch for epoch, _ in report.told[name]] == list(range(1, 7))
    curves = {"learning_curves.png", "extensions.png", "normalizers.png"}
    assert set(figures) == {*curves, "decision_boundaries.png", "histograms.png"}
    counts = measured.arrays["after/histograms/gradient/Dense_0/kernel/counts"]
    assert counts.shape == (6, 40)
    assert (counts.sum(1) == 100).all()
    assert [judgment.claim.id for judgment in measured.claims] == [
        *("S1.1", "S1.2", "S1.3", "S1.4", "S1.5", "S1.10", "S1.11")
    ]
    assert {judgment.measured for judgment in measured.claims} == {"needs epochs 100"}
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
    assert document["schema"] == 2
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


def test_blobs_prints_the_stored_numbers_beside_the_calculation():
    measured, _ = blobs.run(blobs.Options(seeds=2, epochs=2), small_studies.Silent(by="name"))
    for part in measured.notes["inside"].values():
        h, gamma, beta, mean, var = (np.array(part[key]) for key in ("h", "gamma", "beta", "mean", "var"))
        np.testing.assert_allclose(part["r"], gamma * (h - mean) / np.sqrt(var + 1e-3) + beta, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(part["r"], part["manual"], rtol=1e-4, atol=1e-5)
        assert not np.allclose(mean, 0)
    assert measured.claims[0].verdict == "reproduced"
    assert [title for title, _ in measured.texts] == [
        "(c) inside batch norm, 2 features, first seed",
        "(c) inside batch norm, 3 features, first seed",
    ]


@pytest.mark.exhaustive
def test_mnist_sweeps_batch_sizes(monkeypatch):
    found = small_studies.images((28, 28, 1), (500, 100), name="mnist")
    monkeypatch.setattr(data, "images", lambda *arguments: found)
    monkeypatch.setattr(mnist, "NORMALIZERS", mnist.NORMALIZERS[:1])
    measured, figures = mnist.run(mnist.Options(2, epochs=2, batch_sizes=(64, 100)), small_studies.Silent(by="name"))
    assert list(measured.variants) == [
        *("none_64", "before_64", "none_100", "before_100"),
        *(f"{name}_64" for name in mnist.NORMALIZERS),
    ]
    assert measured.metric("before_64", "train_accuracy_during_epoch").shape == (2,)
    assert set(figures) == {"learning_curves.png", "normalizers.png", "batch_sizes.png", "histograms.png"}
    assert {judgment.verdict for judgment in measured.claims} == {"undecided"}  # they are about ten epochs
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
