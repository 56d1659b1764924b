import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_studies

from bnjax.studies import data, perceptrons, sensitivity


@pytest.fixture
def small_images(monkeypatch):
    found = small_studies.images((28, 28, 1), (300, 100), name="mnist")
    monkeypatch.setattr(data, "images", lambda *arguments: found)


def test_all_networks_give_ten_logits():
    x = jnp.ones((16, 784))
    for _, model in perceptrons.NETWORKS.values():
        outputs = jax.eval_shape(lambda model=model: model.init_with_output(jax.random.key(0), x, training=False))
        assert outputs[0].shape == (16, 10)


def test_cases_have_names_of_their_own():
    names = [name for case in perceptrons.CASES for name in case.settings]
    assert len(names) == len(set(names))
    assert {case.network for case in perceptrons.CASES} == set(perceptrons.NETWORKS)
    assert perceptrons.Case("bn", {"l2": (0.0, 1e-3)}, 8, True).settings == {
        "bn, batch 8, small set": perceptrons.DEFAULTS,
        "bn, batch 8, small set, l2 0.001": {**perceptrons.DEFAULTS, "l2": 1e-3},
    }


def test_optimizer_is_adam_with_decay_and_l2():
    params = {"w": jnp.array([1.0, -2.0])}
    ours = perceptrons.optimizer(10, {"learning_rate": 0.1, "l2": 0.5, "decay": 2.0})
    plain = optax.adam(lambda step: 0.1 * jnp.exp(-2.0 * step / 10), eps=1e-7)
    state, expected = ours.init(params), plain.init(params)
    for step in range(3):
        grads = {"w": jnp.array([1.0, 3.0]) * (step + 1)}
        updates, state = ours.update(grads, state, params)
        with_l2 = {"w": grads["w"] + 0.5 * params["w"]}
        wanted, expected = plain.update(with_l2, expected, params)
        np.testing.assert_allclose(updates["w"], wanted["w"], rtol=1e-5)


def test_fixed_batches_stay_together():
    x = jnp.arange(10)
    draw = jax.jit(perceptrons.fixed_batch(3))
    drawn = {tuple(np.asarray(draw((x, x), {"key": jax.random.key(i)}, 0)[0]).tolist()) for i in range(50)}
    assert drawn == {(0, 1, 2), (3, 4, 5), (6, 7, 8)}


@pytest.mark.exhaustive
def test_a_cell_is_trained_at_its_settings(monkeypatch, small_images):
    networks = {"none", "bn", *(f"{name}_{scheme}" for name in ("none", "bn") for scheme in perceptrons.SCHEMES)}
    kept = [c for c in perceptrons.CASES if c.network in networks and c.batch_size in (2, 32)]
    kept += [c for c in perceptrons.CASES if c.network == "bn_dropout_0.5"]
    monkeypatch.setattr(sensitivity, "CASES", kept)
    monkeypatch.setattr(sensitivity, "_figures", lambda results, networks, title: {})
    monkeypatch.setattr(sensitivity, "SMALL_SET", 64)
    report = small_studies.Silent(by="name")
    results, _ = sensitivity.run(sensitivity.Options(2, steps=12), report)
    assert set(results.variants) == {name for case in kept for name in case.settings}
    accuracy = {name: results.metric(name, "test_accuracy") for name in results.variants}
    assert all(values.shape == (2,) for values in accuracy.values())
    assert (accuracy["bn, learning_rate 0.01"] > accuracy["bn, learning_rate 1e-05"]).all()
    assert results.arrays["bn/test_accuracy"].shape == (2, 7)
    np.testing.assert_allclose(
        results.metric("bn", "range_over_learning_rate"),
        np.ptp([accuracy["bn"]] + [accuracy[f"bn, learning_rate {v:g}"] for v in (1e-5, 1e-4, 1e-2, 1e-1)], axis=0),
    )
    assert np.isfinite(results.metric("none", "log10_first_to_last_gradient")).all()
    dropped = "bn_dropout_0.5, small set"
    assert (results.metric(dropped, "noise_by_dropout") > 0).all()
    assert (results.metric("bn, small set", "noise_by_dropout") == 0).all()
    for judgment in results.claims:
        for condition in judgment.claim.conditions:
            assert set(condition.signs) - set(results.variants) or condition.values(results) is not None
    assert report.told["bn, batch 2"][-1][0] == 192
    reasons = {judgment.reason for judgment in results.claims if judgment.claim.id not in ("S2.8", "S2.9")}
    assert reasons == {"needs examples of at least 480,000"}  # the others are about the start of training
    growth = (results.metric(name, "log10_gradient_growth") for name in ("none", "bn"))
    assert np.greater(*growth).all()
