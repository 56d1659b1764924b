"""Public code with our layers in place of its own: what it computes and what it keeps stay the same.

`pip install sbx-rl==0.28.0 transformers==4.57.6 && pytest -m public_code`, in an environment with the tests' packages.
"""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import bnjax.linen

pytestmark = [pytest.mark.public_code, pytest.mark.filterwarnings("default")]


def random_variables(variables, seed=0):
    """Variables of the same structure, away from their initial values."""
    rng, flat = np.random.default_rng(seed), flatten_dict(variables)
    for path, value in flat.items():
        if path[-1] in ("steps", "r_max", "d_max"):
            continue
        noise = rng.normal(0, 0.1, np.shape(value)).astype(np.float32)
        flat[path] = jnp.abs(value + noise) if path[-1] == "var" else value + noise
    return unflatten_dict(flat)


NETWORKS = {
    "ResNet, basic": ("ResNet", {"layer_type": "basic"}),
    "ResNet, bottleneck": ("ResNet", {"layer_type": "bottleneck"}),
    "RegNet": ("RegNet", {"layer_type": "y", "groups_width": 8}),
}


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):  # which the tests else forbid
        yield


@pytest.mark.parametrize("network", NETWORKS)
def test_transformers_networks(network, monkeypatch):
    transformers = pytest.importorskip("transformers")
    family, options = NETWORKS[network]
    if not hasattr(transformers, f"Flax{family}Model"):
        pytest.skip("transformers has no Flax models from version 5 on")
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], **options}
    config = getattr(transformers, f"{family}Config")(**options)
    images = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)

    def run(variables=None):
        model = getattr(transformers, f"Flax{family}Model")(config, input_shape=(1, 32, 32, 3), seed=0)
        variables = random_variables(model.params) if variables is None else variables

        def loss(params, train):
            out = model(images, {**variables, "params": params}, train=train)
            outputs, updates = out if train else (out, None)
            return jnp.square(outputs.pooler_output - 0.3).sum(), (outputs.last_hidden_state, updates)

        results = {train: jax.grad(loss, has_aux=True)(variables["params"], train) for train in (False, True)}
        return jax.tree.map(jnp.shape, model.params), variables, results

    theirs, variables, expected = run()
    monkeypatch.setattr(nn, "BatchNorm", bnjax.linen.BatchNorm)
    ours, _, got = run(variables)
    assert ours == theirs
    scale = {path: np.abs(value).max() for path, value in flatten_dict(expected[True][0]).items()}
    chex.assert_trees_all_close(got[False], expected[False], rtol=1e-3, atol=1e-3 * max(scale.values()))
    chex.assert_trees_all_close(got[True], expected[True], rtol=1e-3, atol=1e-3 * max(scale.values()))


class BatchRenorm(bnjax.linen.BatchRenorm):
    """Ours with the defaults of the codes of reinforcement learning."""

    epsilon: float = 1e-3
    warmup_steps: int = 100_000


def test_sbx_trains_crossq_with_it(monkeypatch):
    pytest.importorskip("sbx")
    policies = importlib.import_module("sbx.crossq.policies")
    from sbx import CrossQ

    def trained():
        model = CrossQ(
            "MlpPolicy", "Pendulum-v1", seed=0, learning_starts=20, batch_size=16, policy_kwargs={"net_arch": [16, 16]}
        )
        start = jax.tree.map(jnp.copy, (model.policy.qf_state.params, model.policy.qf_state.batch_stats))
        model.learn(26)
        return start, (model.policy.qf_state.params, model.policy.qf_state.batch_stats)

    start, expected = trained()
    monkeypatch.setattr(policies, "BatchRenorm", BatchRenorm)
    our_start, got = trained()
    chex.assert_trees_all_close(our_start, start, rtol=1e-6)
    chex.assert_trees_all_close(got, expected, rtol=2e-2, atol=2e-3)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, got)
    assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("steps", [0, 99_999, 100_000])
def test_a_layer_of_sbx_and_its_checkpoint(steps):
    jax_layers = pytest.importorskip("sbx.common.jax_layers")
    x = np.random.default_rng(0).normal(1, 2, (64, 5)).astype(np.float32)
    theirs, ours = jax_layers.BatchRenorm(use_running_average=False), BatchRenorm(use_running_average=False)
    variables = random_variables(theirs.init(jax.random.key(0), x))
    variables["batch_stats"]["steps"] = steps
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(variables)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(layer, variables):
        return layer.apply(variables, x, mutable=["batch_stats"])

    (y, updates), (expected_y, expected) = apply(ours, variables), apply(theirs, variables)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    # After the warm-up theirs adds epsilon, 1e-3, to a variance that it has divided by r².
    np.testing.assert_allclose(
        y, expected_y, rtol=1e-5 if steps < 100_000 else 2e-3, atol=1e-5 if steps < 100_000 else 1e-3
    )
