"""Trainings that are measured on the way, and the two studies made of them, at a small size."""

import copy
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_studies
from flax import linen as nn

from bnjax import analysis, models, training
from bnjax.linen import BatchNorm, NoisyBatchNorm
from bnjax.models.layers import Conv
from bnjax.studies import Options, activations, data, deep_linear, landscape, smoothness, vgg
from bnjax.studies.engine.histograms import count_values, empty_histograms, watched
from bnjax.studies.engine.plan import Plan, random_batch
from bnjax.studies.engine.saving import Saving
from bnjax.studies.engine.training import ONE_BY_ONE, TOGETHER, train
from bnjax.studies.evidence.results import Results
from bnjax.training.checkpoint import CheckpointError

MODEL = models.Perceptron((4,), 1, BatchNorm, "after")
EXAMPLES = tuple(data.circles().train)
SETTINGS = {"key": jax.vmap(jax.random.key)(jnp.arange(2)), "rate": jnp.array([0.1, 0.3])}


def plan(count=None):
    def create(setting):
        optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=setting["rate"])
        return training.create_train_state(MODEL, optimizer, setting["key"], jnp.ones((1, 2)))

    def step(state, x, y, key):
        return training.train_step(state, x, y, objective=training.binary_cross_entropy)

    def measure(state, x, y, key):
        if count is not None:
            jax.debug.callback(count)
        return {"step": state.step, "mean": x.mean()}

    look = lambda state, examples: state.params
    return Plan("a", "a", create, random_batch(16), step, 12, measure=measure, every=3, look=look)


def test_settings_together_and_one_after_the_other():
    seen = [train(plan(), SETTINGS, EXAMPLES, mapped=mapped) for mapped in (TOGETHER, ONE_BY_ONE)]
    for a, b in zip(
        *(jax.tree.leaves((s.metrics, s.measurements, s.state.params, s.looked)) for s in seen), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    one = seen[0]
    assert one.metrics.loss.shape == (2, 12)
    assert one.measurements["step"].tolist() == [[0, 3, 6, 9]] * 2
    assert one.measured_at.tolist() == [0, 3, 6, 9]
    kept = one.looked["Dense_0"]["kernel"]
    assert kept.shape == (2, 4, 2, 4)
    np.testing.assert_array_equal(kept[:, -1], one.state.params["Dense_0"]["kernel"])


@pytest.mark.exhaustive
def test_an_interrupted_training_continues(tmp_path):
    class Stop(Exception):
        pass

    class Stopping(small_studies.Silent):
        def expect(self, count):
            pass

        def task(self, plan):
            def update(steps, means):
                if steps >= 6:
                    raise Stop

            return update

    def options(resume):
        return Options(saving=Saving(tmp_path, {"study": "test"}, 0.0, resume))

    with pytest.raises(Stop):
        train(plan(), SETTINGS, EXAMPLES, report=Stopping(), options=options(False), histograms=True)
    others = {**SETTINGS, "rate": 2 * SETTINGS["rate"]}
    with pytest.raises(CheckpointError, match="settings"):
        train(plan(), others, EXAMPLES, options=options(True), histograms=True)
    report = small_studies.Silent()
    continued = train(plan(), SETTINGS, EXAMPLES, report=report, options=options(True), histograms=True)
    told = [steps for steps, _ in report.told["a"]]
    assert told[0] > 3 and told[-1] == 12
    whole = train(plan(), SETTINGS, EXAMPLES, histograms=True)
    trees = [(s.metrics, s.measurements, s.state.params, s.histograms) for s in (continued, whole)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(a, b)


def test_measurements_divide_the_steps():
    with pytest.raises(ValueError, match="multiple of those between measurements, 3, got 10"):
        train(Plan("a", "a", *[len] * 3, 10, measure=len, every=3), SETTINGS, EXAMPLES)


images = functools.partial(small_studies.images, counts=(256, 1000))


def test_multiples_of_what_is_tolerated():
    def of(largest, breaks_at, trains):
        return analysis.LearningRateRange(None, None, np.array(trains), np.array(largest), np.array(breaks_at))

    plain = of([2.0, 1.0, np.nan, 50.0], [5.0, 2.0, np.nan, np.inf], [])
    tried = activations._multiples(plain)
    assert tried == (1.0, 2.0, 5.0, 10.0, 30.0, 50.0, 60.0, 250.0, 1500.0)
    results = Results("activations", {}, range(4))
    for name, offset in (("bn", 0.1), ("none", 0.0), ("bn_x5", -0.1), ("bn_x30", 0.1)):
        results.variants[name] = (name, {}, {})
        results.arrays[f"{name}/test_accuracy"] = np.linspace(0.1, 1.1, 21)[None] + offset + np.zeros((4, 1))
        results.notes.setdefault("grid", {})[name] = [{"test_accuracy": [0.5 + offset] * 4}] * 2
    losses = np.full((4, len(tried), 20), 9.0)
    losses[0, tried.index(10), -2:] = losses[1, tried.index(30), -2:] = 1  # 5 times the first's, 30 times the second's
    losses[1, tried.index(5), 3] = np.nan
    activations._add_pairs(results, {"none": plain, "bn": of([], [], [])._replace(loss=losses)})
    np.testing.assert_allclose(results.metric("bn", "loss_at_5_times"), [1, activations.DIVERGED, np.nan, np.nan])
    np.testing.assert_allclose(results.metric("bn", "loss_at_30_times"), [9, 1, np.nan, np.nan])
    for i in range(1, 11):
        np.testing.assert_allclose(results.metric("bn", f"gain_in_tenth_{i}"), 0.1)
    np.testing.assert_allclose(results.metric("bn", "gain_in_cell_2"), 0.1)
    # The plain network ends, as the mean of its last five, at 1.0, which batch norm has at its 16th measurement of 20.
    np.testing.assert_allclose(results.metric("bn", "log10_times_fewer_steps"), np.log10(20 / 16))
    np.testing.assert_allclose(results.metric("bn_x5", "log10_times_fewer_steps"), np.log10(20 / 20))


@pytest.mark.slow
def test_activations(monkeypatch):
    monkeypatch.setattr(data, "images", lambda *arguments: images((28, 28, 1)))
    monkeypatch.setattr(activations, "RATE_STEPS", 20)
    report = small_studies.Silent()
    results, figures = activations.run(activations.Options(2, steps=40), report)
    small_studies.check_figures(figures)
    assert list(results.variants) == list(activations.NETWORKS)
    assert (
        results.metric("bn", "largest_scale_cosine").max() < 0.05 < results.metric("none", "largest_scale_cosine").min()
    )
    reasons = {judgment.claim.id: judgment.reason for judgment in results.claims}
    assert reasons["S3.1"] == "needs steps of at least 50,000" and not reasons["S3.3"]
    verdicts = {judgment.claim.id: judgment.verdict for judgment in results.claims}
    assert [verdicts[name] for name in ("S3.8", "S3.9", "S3.12")] == ["reproduced"] * 3
    for claim in results.claims:
        assert all(results.values(name, c.metric) is not None for c in claim.claim.conditions for name in c.signs)
        assert set(claim.claim.figures) <= set(figures)
    assert set(figures) == {
        "test_error.png",
        "percentiles.png",
        "saturation.png",
        "gradient_norms.png",
        "learning_rates.png",
    }
    assert results.arrays["bn/test_accuracy"].shape == (2, 41)  # 40 on the way and one at the end
    assert report.told["batch norm"][-1][0] == 40
    assert len(results.notes["grid"]["bn"]) == 16


class Tiny(nn.Module):
    """A small network in the place of VGG, which takes long to compile."""

    classes: int
    norm: object

    @nn.compact
    def __call__(self, x, *, training, mask=None, keys=None):
        x = Conv(3, (3, 3), strides=4)(x)
        if self.norm is not None:
            x = self.norm(use_running_average=not training)(x)
        return nn.Dense(self.classes)(nn.relu(x).reshape((x.shape[0], -1)))


@pytest.fixture(scope="module")
def smooth():
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "images", lambda *arguments: images((16, 16, 3)))
    patch.setattr(vgg, "VGG", lambda classes, norm, depth, width, weight_norm: Tiny(classes, norm))
    patch.setattr(vgg, "RATES", (0.01, 0.1))
    for name, value in (("EIGENPAIRS", 1), ("LANCZOS_STEPS", 5), ("GRID", np.linspace(-1, 1, 3)), ("PATH_POINTS", 3)):
        patch.setattr(landscape, name, value)
    report = small_studies.Silent()
    options = smoothness.Options(2, steps=10, variants=("none", "bn", "noisy"), histograms=True)
    yield *smoothness.run(options, report), report
    patch.undo()


@pytest.mark.exhaustive
def test_smoothness(smooth):
    results, figures, report = smooth
    small_studies.check_figures(figures)
    nets = [f"vgg_{v}" for v in ("none", "bn", "noisy")]
    assert list(results.variants) == nets
    further = {"renorm", "layer", "group", "weight"}  # which the deep linear network is tried without
    assert set(smoothness.LABELS) == set(vgg.NORMS) == set(deep_linear.NORMALIZERS) | further
    assert results.parameters["vgg_bn"]["batch_stats"] == {f"BatchNorm_0/{name}": [3] for name in ("mean", "var")}
    for kind in ("weight", "gradient"):
        counts = results.arrays[f"vgg_none/histograms/{kind}/Dense_0/kernel/counts"]
        assert counts.shape == (10, 40) and (counts.sum(1) == 3 * 4 * 4 * 10).all()
    for name in nets:
        assert results.arrays[f"{name}/smoothness"].shape == (2, 10)
        assert (results.arrays[f"{name}/shift_distance"][:, :, 0] == 0).all()
        assert (results.arrays[f"{name}/loss_max"] >= results.arrays[f"{name}/loss_min"]).all()
    assert {"top_eigenvalue", "hessian_trace", "test_accuracy", "noise_scale"} <= set(results.variants["vgg_bn"][2])
    assert results.metric("vgg_bn", "scale_cosine").max() < 1e-3 < results.metric("vgg_none", "scale_cosine").min()
    for judgment in results.claims:
        missing = [c for c in judgment.claim.conditions if c.values(results) is None]
        assert not missing or judgment.claim.id == "S6.7"  # of the l_p variants
        assert set(judgment.claim.figures) <= set(figures)
    assert {"training.png", "landscape.png", "surfaces.png", "trajectories.png", "curvature.png"} <= set(figures)
    assert report.told["VGG, batch norm"][-1][0] == 10


@pytest.fixture(scope="module")
def linear():
    patch = pytest.MonkeyPatch()
    patch.setattr(deep_linear, "DEPTH", 3)
    patch.setattr(deep_linear, "LABELS", {name: deep_linear.LABELS[name] for name in ("none", "bn", "noisy")})
    yield deep_linear.run(deep_linear.Options(2, steps=20, histograms=True), small_studies.Silent())
    patch.undo()


@pytest.mark.exhaustive
def test_deep_linear(linear):
    results, figures = linear
    small_studies.check_figures(figures)
    assert list(results.variants) == ["linear_none", "linear_bn", "linear_noisy"]
    assert results.parameters["linear_bn"] == {}
    for kind in ("weight", "gradient"):
        last = f"Dense_{deep_linear.DEPTH - 1}"
        assert results.arrays[f"linear_bn/histograms/{kind}/{last}/kernel/counts"].sum() == 20 * 100
    for judgment in results.claims:
        assert all(condition.values(results) is not None for condition in judgment.claim.conditions)
        assert set(judgment.claim.figures) <= set(figures)


def test_shares_are_of_the_steps_that_both_networks_were_measured_at():
    results = Results("smoothness", {}, range(2))
    for name, at, level in (("a", np.arange(0, 30, 10), 1.0), ("plain", np.arange(0, 60, 5), 2.0)):
        results.variants[name] = (name, {}, {})
        results.arrays[f"{name}/measured_at"] = at
        for key in ("loss_min", "loss_max", "distance_max", "smoothness"):
            results.arrays[f"{name}/{key}"] = np.full((2, len(at)), 0.0 if key == "loss_min" else level)
    results.arrays["plain/smoothness"][1, 2] = 0.5  # at step 10
    results.arrays["plain/smoothness"][1, 3] = 0.5  # at step 15, at which only one was measured
    results.arrays["a/smoothness"][0, 2] = np.nan
    landscape.add_shares(results, "a", "plain")
    np.testing.assert_allclose(results.metric("a", "share_with_smaller_beta"), [2 / 3, 2 / 3])
    np.testing.assert_allclose(results.metric("a", "share_with_smaller_loss_range"), [1, 1])


@pytest.mark.exhaustive
def test_accuracies_are_judged_at_full_length_only(smooth):
    results = copy.deepcopy(smooth[0])
    claim = smoothness.CLAIMS[0]
    assert "needs" in claim.judge(results).reason
    results.settings = {**results.settings, "full_length": True, "dataset": "cifar10", "augmented": False}
    results.set_metric("vgg_bn", "test_accuracy", np.array([0.829, 0.831]))
    results.set_metric("vgg_none", "test_accuracy", np.array([0.799, 0.801]))
    assert claim.judge(results).verdict == "reproduced"


def changed(results, losses, curve):
    """The results with other final losses of VGG, and curves of one number everywhere by variant."""
    other = copy.deepcopy(results)
    for name, (_, _, metrics) in other.variants.items():
        variant = name.split("_")[1]
        metrics["final_loss"] = np.array(losses[variant])
        metrics["shift_cosine"] = np.full(2, curve[variant])
        metrics["log10_relative_shift"] = np.full(2, -curve[variant])
        for key in ("loss_min", "loss_max", "distance_max", "smoothness"):
            other.arrays[f"{name}/{key}"] = np.full((2, 10), 0.0 if key == "loss_min" else curve[variant])
    smoothness._add_comparisons(other, ("none", "bn", "noisy"), float(np.log(10)))
    long = {"steps": 3000, "other_steps": 500, "width": 16}
    other.settings = {**other.settings, **long, "dataset": "cifar10"}
    other.judge(smoothness.CLAIMS)
    return {judgment.claim.id: judgment.verdict for judgment in other.claims}


@pytest.mark.exhaustive
def test_verdicts_on_made_up_numbers(smooth):
    results = smooth[0]
    nan, bad = float("nan"), ("not reproduced", "undecided")
    good = changed(
        results, {"none": [2.0, 2.1], "bn": [1.0, 1.1], "noisy": [1.0, 1.1]}, {"none": 2.0, "bn": 1.0, "noisy": 1.0}
    )
    assert [good[c] for c in ("S6.2", "S6.3", "S6.4", "S6.5", "S6.6")] == ["reproduced"] * 5
    unknown = changed(
        results,
        {"none": [nan, nan], "bn": [nan, nan], "noisy": [nan, nan]},
        dict.fromkeys(("none", "bn", "noisy"), nan),
    )
    assert all(unknown[c] in bad for c in ("S6.2", "S6.3", "S6.4", "S6.5", "S6.6"))
    harmful = changed(
        results, {"none": [1.0, 1.1], "bn": [1.2, 1.3], "noisy": [2.0, 2.1]}, {"none": 1.0, "bn": 2.0, "noisy": 1.0}
    )
    assert all(harmful[c] in bad for c in ("S6.2", "S6.3", "S6.4", "S6.5", "S6.6"))
    diverged = changed(
        results, {"none": [nan, nan], "bn": [1.0, 1.1], "noisy": [1.0, nan]}, {"none": nan, "bn": 1.0, "noisy": 1.0}
    )
    assert diverged["S6.2"] == "reproduced" and diverged["S6.6"] in bad


@pytest.mark.exhaustive
def test_what_is_measured_is_the_training_loss_of_the_next_step():
    (variant,) = vgg.variants(images((32, 32, 3)), 2, {"noisy": "noisy"}).values()
    network = dataclasses.replace(variant, model=Tiny(10, NoisyBatchNorm))
    state = network.create({"key": jax.random.key(0)})
    x, y = (jnp.asarray(v[:16]) for v in images((32, 32, 3)).train)
    key = jax.random.key(3)
    _, metrics = vgg.plan_of(network, 10, 1).step(state, x, y, key)
    loss, other = (network.loss(state.batch_stats, rngs={"noise": k}) for k in (key, jax.random.key(4)))
    np.testing.assert_allclose(loss(state.params, x, y), metrics.loss, rtol=1e-6)
    assert abs(other(state.params, x, y) - metrics.loss) > 1e-3


@pytest.mark.parametrize("variant", [pytest.param("weight", marks=pytest.mark.exhaustive), "group"])
def test_every_normalizer_has_its_place_in_vgg(variant, monkeypatch):
    monkeypatch.setattr(vgg, "VGG", models.VGG)
    (network,) = vgg.variants(images((32, 32, 3)), 4, {variant: variant}).values()
    state = jax.eval_shape(network.create, {"key": jax.random.key(0)})
    of = state.params["WeightNorm_0" if variant == "weight" else "GroupNorm_0"]
    assert {leaf.shape for leaf in jax.tree.leaves(of)} == {(4,)}
    assert not state.batch_stats and len(network.layers) == 11
    examples, setting = tuple(map(jnp.asarray, images((32, 32, 3)).train)), {"key": jax.random.key(1)}
    x, y, _ = vgg.plan_of(network, 10, 1, augmented=True).draw(examples, setting, 0)
    plain, labels, _ = random_batch(vgg.BATCH_SIZE)(examples, setting, 0)
    assert x.dtype == plain.dtype and (y == labels).all() and 0.005 < (x == plain).mean() < 0.5


def test_the_gradient_of_a_step_that_is_not_taken():
    x, y = (jnp.asarray(v[:16]) for v in EXAMPLES)
    state = training.create_train_state(MODEL, optax.adam(0.1), jax.random.key(0), x)
    how = {"objective": training.binary_cross_entropy}
    step, taken = jax.jit(functools.partial(training.train_step, **how)), []

    def observed(*arguments):
        taken.append(step(*arguments))
        return taken[-1]

    params, gradient = watched(observed, state, x, y)
    expected = jax.jit(functools.partial(training.gradients, **how))(state, x, y)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-6)
    chex.assert_trees_all_equal(params, state.params)
    chex.assert_trees_all_equal(taken[0][0].params, state.params)


def test_histograms_count_what_is_finite():
    leaves = {"weight": {"a": np.array([0.0, 1.0, np.nan])}, "gradient": {"a": np.array([2.0, 2.0, np.inf])}}
    found = empty_histograms({"a": leaves["weight"]["a"]}, 2)
    count_values(found, 1, leaves)
    assert found["weight/a"][0].sum(1).tolist() == [0, 2] and found["weight/a"][1][1].tolist() == [0, 1]
    assert found["gradient/a"][0][1].sum() == 2


def test_bad_options():
    with pytest.raises(
        ValueError, match="--variants must be among none, bn, noisy, l1, l2, linf, renorm, layer, group, weight, got bm"
    ):
        smoothness.run(smoothness.Options(1, steps=10, variants=("bm",)), small_studies.Silent())
    with pytest.raises(ValueError, match=r"--other-steps must have a common divisor of at least 4, .* 601 and 500"):
        smoothness.run(smoothness.Options(1, steps=601), small_studies.Silent())


def test_deep_linear_network_is_the_product_of_its_matrices(monkeypatch):
    monkeypatch.setattr(deep_linear, "DEPTH", 3)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    seen = train(deep_linear.plan_of("none", "plain", 4, 2), {"key": keys})
    layers, (x, target) = seen.state
    product = layers[0]["kernel"] @ layers[1]["kernel"] @ layers[2]["kernel"]
    found = np.square(x @ product - target).sum((1, 2))
    assert (found < seen.metrics.loss[:, -1]).all() and (found > 0.9 * seen.metrics.loss[:, -1]).all()
    assert isinstance(seen.measurements["probe"], analysis.GradientProbe)
