"""The recurrent and the accelerating study at a small size, and what the CIFAR study measures beside its curves."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_studies
from scipy import stats

from bnjax import models, training
from bnjax.linen import BatchNorm
from bnjax.studies import accelerating, cifar, data, papers, recurrent
from bnjax.studies.data import augmentation


def images(shape, count=40, classes=10):
    random = np.random.default_rng(0)
    split = lambda: data.Split(
        random.integers(0, 256, (count, *shape), np.uint8), (np.arange(count) % classes).astype(np.int32)
    )
    return data.Dataset("small", split(), split(), classes)


@pytest.mark.exhaustive
def test_recurrent_study(monkeypatch):
    monkeypatch.setattr(data, "images", lambda *arguments: images((4, 3, 1)))
    kept = {name: one for name, one in recurrent.VARIANTS.items() if "epsilon" not in name}
    monkeypatch.setattr(recurrent, "VARIANTS", kept)
    results, figures = recurrent.run(recurrent.Options(2, steps=20, histograms=True), small_studies.Silent())
    assert list(results.variants) == ["none", "per_step", "shared"]
    for name in results.variants:
        assert results.metric(name, "test_accuracy").shape == (2,)
        assert results.arrays[f"{name}/train_loss"].shape == (2, 20)
        assert results.arrays[f"{name}/histograms/gradient/Dense_0/kernel/counts"].sum() == 10 * 64 * 10
    assert results.parameters["per_step"]["batch_stats"]["cell/BatchNorm_0/mean"] == [4, 64]
    assert results.parameters["shared"]["batch_stats"]["cell/BatchNorm_0/mean"] == [64]
    assert [judgment.reason for judgment in results.claims] == ["needs steps of at least 1,000"] * 4
    small_studies.check_figures(figures)
    assert list(figures) == ["test_accuracy.png"]
    same = (results.metric("none", name) for name in ("test_accuracy", "population_accuracy"))
    np.testing.assert_array_equal(*same)


def test_population_statistics(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (9, 3, 2))
    model = models.RecurrentNetwork(2, 4, BatchNorm)
    counting = model.clone(norm=functools.partial(BatchNorm, momentum=0.0))
    state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(1), x)
    monkeypatch.setattr(recurrent, "POPULATION_BATCH", 4)
    outputs, seen = [], []
    for batch in (x[:4], x[4:8]):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        y, updates = counting.apply(variables, batch, training=True, mutable=["batch_stats"])
        outputs.append(y)
        seen.append(updates["batch_stats"])
    found = recurrent.with_population_statistics(model, x, state)
    chex.assert_trees_all_close(found.batch_stats, jax.tree.map(lambda a, b: (a + b) / 2, *seen), rtol=1e-6)
    found = recurrent.with_population_statistics(model, x[:4], state)  # its training set is one batch
    inference = model.apply({"params": found.params, "batch_stats": found.batch_stats}, x[:4], training=False)
    np.testing.assert_allclose(inference, outputs[0], rtol=1e-4, atol=1e-5)
    shared = recurrent.with_population_statistics(model.clone(is_shared=True), x, state)
    mean_over_time = jax.tree.map(lambda a, b: (a + b).mean(0) / 2, *seen)
    chex.assert_trees_all_close(shared.batch_stats, mean_over_time, rtol=1e-6)
    plain = models.RecurrentNetwork(2, 4)
    assert recurrent.with_population_statistics(plain, x, state) is state


@pytest.mark.exhaustive
def test_accelerating_study(monkeypatch):
    monkeypatch.setattr(data, "images", lambda *arguments: images((32, 32, 3)))
    monkeypatch.setattr(accelerating, "BATCH_SIZE", 8)
    chosen = {"both": (*accelerating.VARIANTS["bn_lrn"][:3], True)}
    monkeypatch.setattr(accelerating, "VARIANTS", chosen)
    results, figures = accelerating.run(accelerating.Options(2, steps=10, width=2), small_studies.Silent())
    assert list(results.variants) == list(chosen)
    for name in chosen:
        assert results.metric(name, "test_accuracy").shape == (2,)
        assert np.isfinite(results.arrays[f"{name}/train_loss"]).all()
    assert {judgment.claim.id for judgment in results.claims} == {"A.5", "A.7"}
    assert list(figures) == ["training.png"]


def test_distortions_change_contrast_and_brightness_of_each_image():
    x = jax.random.normal(jax.random.key(0), (200, 4, 4, 3))
    found = np.asarray(augmentation.distorted(x, jax.random.key(1), 0.5)).reshape((200, -1))
    flat = np.asarray(x).reshape((200, -1))
    fits = np.array([np.polyfit(a, b, 1, full=False) for a, b in zip(flat, found, strict=True)])
    scale, shift = fits.T
    np.testing.assert_allclose(flat * scale[:, None] + shift[:, None], found, atol=1e-5)
    assert scale.min() > 0.5 and scale.max() < 1.5 and scale.std() > 0.2
    assert shift.min() > -0.5 and shift.max() < 0.5 and shift.std() > 0.2
    assert abs(np.corrcoef(scale, shift)[0, 1]) < 0.3


@pytest.fixture(scope="module")
def cifar_run():
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "images", lambda *arguments: images((16, 16, 3), classes=2))
    chosen = {"epochs": 4, "steps_per_epoch": 2, "width": 3, "batch_size": 8}
    options = cifar.Options(2, variants=("sigmoid_none", "sigmoid_bn"), **chosen)
    yield cifar.run(options, small_studies.Silent())
    patch.undo()


@pytest.mark.exhaustive
def test_cifar_study(cifar_run):
    results, figures = cifar_run
    small_studies.check_figures(figures)
    assert results.settings["filters"] == [3, 3, 3, 3, 5]
    by_id = {judgment.claim.id: judgment for judgment in results.claims}
    assert by_id["S5.0"].verdict == "wrong in the source"
    assert by_id["S5.1"].reason == "needs epochs of at least 20, steps per epoch of at least 400, width of at least 16"
    assert by_id["S5.6"].verdict == "reproduced"
    np.testing.assert_allclose(results.metric("sigmoid_bn", "deviation_by_variance"), 0.5, atol=0.01)
    curve = results.arrays["sigmoid_bn/test_accuracy"]
    np.testing.assert_allclose(results.metric("sigmoid_bn", "best_over_chance"), 2 * curve.max(1))
    gain = curve.max(1) - curve[:, :3].max(1)
    np.testing.assert_allclose(results.metric("sigmoid_bn", "late_gain"), gain)
    ratios = {name: results.metric(name, "log10_first_to_last_gradient") for name in results.variants}
    assert (ratios["sigmoid_none"] < -3).all() and (ratios["sigmoid_bn"] > -2).all()
    assert by_id["S5.5"].outcomes[1].met is not False
    plain, loss = (results.arrays[f"sigmoid_{name}/test_loss"] for name in ("none", "bn"))
    for seed in range(2):
        since = next((i for i in range(4) if loss[seed, : i + 1].min() <= plain[seed].min()), 4)
        share = np.log10((since + 1) / (plain[seed].argmin() + 1))
        np.testing.assert_allclose(results.metric("sigmoid_bn", "log10_share_of_epochs")[seed], share)
    counts = [results.metric(f"sigmoid_{name}", "step_operations")[0] for name in ("bn", "none")]
    assert 1 < counts[0] / counts[1] < 1.5
    expected = results.metric("sigmoid_bn", "log10_share_of_epochs") + np.log10(counts[0] / counts[1])
    np.testing.assert_allclose(results.metric("sigmoid_bn", "log10_share_of_work"), expected)
    rises = np.maximum(np.diff(loss, axis=1), 0).mean(1)
    np.testing.assert_allclose(results.metric("sigmoid_bn", "rises_of_loss"), rises, rtol=1e-6)


def test_a_plain_network_that_diverges_keeps_its_earlier_best():
    results = cifar.Results("cifar", {}, range(2))
    for name, loss in (("relu_none", [[5.0, 4, np.nan, np.nan]] * 2), ("relu_bn", [[6.0, 3.9, 7, 3], [9.0, 9, 9, 9]])):
        results.variants[name] = (name, {}, {"step_operations": np.ones(2)})
        results.arrays[f"{name}/test_loss"] = np.array(loss)
    cifar._compare(results)
    np.testing.assert_allclose(results.metric("relu_bn", "log10_share_of_epochs"), np.log10([2 / 2, 5 / 2]))


@pytest.mark.exhaustive
def test_cifar_gradient_ratio_is_that_of_the_training_loss(cifar_run):
    small = images((16, 16, 3), classes=2)
    network = cifar.networks(cifar.Options(2, width=3, batch_size=8), small)["relu_none"]
    network = dataclasses.replace(network, preprocess=functools.partial(cifar.prepare, mean=0.0))
    of_start = cifar._of_start(network, small.train, [0])
    ratio = 10 ** of_start["log10_first_to_last_gradient"][0]
    assert of_start["step_operations"][0] > 1e4
    assert 0.01 < of_start["gaussian_distance"][0] < of_start["gaussian_distance_of_activations"][0] < 0.6
    x, y = (part[:8] for part in small.train)
    x = jnp.asarray(x, jnp.float32)
    model = models.CifarNetwork(2, None, filters=3, last_filters=5)
    params = model.init(jax.random.fold_in(jax.random.key(0), 0), x[:1], training=False)["params"]

    def loss(params):
        logits = model.apply({"params": params}, x, training=True)
        return -jax.nn.log_softmax(logits)[np.arange(8), y].mean()

    gradient = jax.jit(jax.grad(loss))(params)
    norms = [
        np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient[name]))) for name in ("Conv_0", "Dense_0")
    ]
    np.testing.assert_allclose(ratio, norms[0] / norms[1], rtol=1e-4)


def test_the_distance_from_the_normal_distribution_is_that_of_kolmogorov_and_smirnov():
    values = np.random.default_rng(0).exponential(size=(500, 2)) * [1, 30]
    found = cifar._gaussian_distance(jnp.asarray(values))
    standardized = (values - values.mean(0)) / values.std(0)
    expected = [stats.kstest(column, "norm").statistic for column in standardized.T]
    np.testing.assert_allclose(found, expected, atol=1 / 500)  # levels are taken between the steps


@pytest.mark.exhaustive
def test_papers_study(monkeypatch):
    monkeypatch.setattr(data, "images", lambda *arguments: images((32, 32, 3), 300))
    chosen = ("none_0.1", "bn_0.1", "small", "small_ghost", "small_decay", "large", "large_ghost")
    monkeypatch.setattr(papers, "CASES", {name: papers.CASES[name] for name in chosen})
    monkeypatch.setattr(papers, "RATES", (0.1,))
    monkeypatch.setattr(papers, "POPULATION_EXAMPLES", 50)
    monkeypatch.setattr(papers, "DEPTH", 24)
    results, figures = papers.run(papers.Options(2, steps=16, width=1), small_studies.Silent())
    for judgment in results.claims:
        assert all(results.values(name, c.metric) is not None for c in judgment.claim.conditions for name in c.signs)
        assert set(judgment.claim.figures) <= set(figures)
    assert results.arrays["large/train_loss"].shape[1] == 4 and results.arrays["small/train_loss"].shape[1] == 32


@pytest.mark.exhaustive
def test_a_step_from_given_norms_is_that_of_the_decayed_network():
    """Kernels that a batch norm follows matter by their direction and the effective rate alone."""
    small = images((32, 32, 3), 64)
    of_name = papers.networks(papers.Options(1, width=1), small)
    decayed, plain = of_name["small_decay"], of_name["small"]
    x, y = (jnp.asarray(part) for part in small.train)
    key = jax.random.key(3)
    state = decayed.create({"key": jax.random.key(0)})
    after, metrics = decayed.step(state, x, y, key)
    is_kernel = lambda path: "Conv" in path[0].key and path[-1].key == "kernel"
    twice = jax.tree.map_with_path(lambda path, w: 2 * w if is_kernel(path) else w, state.params)
    other = plain.create({"key": jax.random.key(0)}).replace(params=twice)
    norms = papers._measured(state)["norms"]
    matched, same = papers._matched_step(plain)(other, x, y, key, norms)
    np.testing.assert_allclose(same.loss, metrics.loss, rtol=1e-5)
    for name in ("Conv_0", "Conv_7"):
        a, b, before = (of.params[name]["kernel"] for of in (after, matched, state))
        np.testing.assert_allclose(a - (1 - papers.RATE * papers.DECAY) * before, b - before, atol=1e-5)
        assert not np.allclose(a, b, atol=1e-6)


@pytest.mark.exhaustive
def test_gradients_grow_with_depth_as_theory_says(monkeypatch):
    monkeypatch.setattr(papers, "DEPTH", 24)
    monkeypatch.setattr(papers, "SIZE", 256)
    monkeypatch.setattr(papers, "DEEP", {name: papers.DEEP[name] for name in ("deep_relu", "deep_none")})
    found = papers.at_the_start(range(2))
    assert abs(found["deep_relu"]["gradient_growth"].mean() - (np.pi / (np.pi - 1)) ** 0.5) < 0.08
    assert abs(found["deep_none"]["gradient_growth"].mean() - 1) < 0.1
