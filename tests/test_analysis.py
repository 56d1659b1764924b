"""Measurements against closed forms on quadratics, dense Hessians, their definitions written out, and the theorems."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import linen as nn

import bnjax
from bnjax import analysis


@pytest.fixture
def quadratic(x64):
    """½ WᵀAW of two leaves, and A."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(7, 7))
    a = a + a.T
    params = {"a": jnp.asarray(rng.normal(size=(2, 2))), "b": jnp.asarray(rng.normal(size=3))}

    def loss(params):
        w = jnp.concatenate([params["a"].ravel(), params["b"]])
        return 0.5 * w @ jnp.asarray(a) @ w

    return loss, params, a


@pytest.fixture
def network(x64):
    """A small network with batch norm in the mode 'batch', smooth, with its parameters and batch."""
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.integers(0, 2, 16))
    params = [
        {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
        {"kernel": jnp.asarray(rng.normal(size=(4, 3)))},
        {"kernel": jnp.asarray(rng.normal(size=(3, 2)))},
    ]
    return jax.jit(network_loss), params, (x, y)


def network_outputs(params, x, y=None):
    first, second, third = params
    fresh = {name: jnp.zeros_like(first["norm"]["bias"]) for name in ("mean", "var")}
    x = jnp.tanh(bnjax.batch_norm(x @ first["kernel"], first["norm"], fresh, training=True)[0])
    return jnp.tanh(x @ second["kernel"]) @ third["kernel"]


def network_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network_outputs(params, x), y).mean()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def dense_hessian(loss, params, *args):
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), *args)))(vector))


class TestGradientProbe:
    steps = np.array([-0.3, 0.1, 0.5])

    @pytest.mark.parametrize(
        ("dtype", "steps"), [(jnp.float32, [1e-9, 1e-7, 3e-7, 1e-3]), (jnp.bfloat16, [1e-4, 1e-2, 3e-2, 0.7])]
    )
    @pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["jit", "eager"])
    def test_smoothness_is_over_the_distance_that_was_moved(self, dtype, steps, run):
        """2 ‖w‖², whose gradient 4 w is exact, has β = 4 at any step, however coarsely it is rounded."""
        w = jnp.linspace(0.9, 3.0, 301).astype(dtype)
        probe = run(functools.partial(analysis.gradient_probe, lambda w: 2 * jnp.square(w.astype(jnp.float32)).sum()))(
            w, jnp.asarray(steps)
        )
        assert np.isnan(probe.smoothness[0]) and probe.distance_moved[0] == 0  # below half the spacing
        np.testing.assert_allclose(probe.smoothness[1:], 4, rtol=1e-6)
        np.testing.assert_allclose(probe.max_smoothness, 4, rtol=1e-6)
        there = (np.asarray(w, np.float32) - np.float32(steps[1]) * 4 * np.asarray(w, np.float32)).astype(dtype)
        moved = np.linalg.norm(np.asarray(there, np.float64) - np.asarray(w, np.float64))
        np.testing.assert_allclose(probe.distance_moved[1], moved, rtol=1e-4)
        assert abs(moved / (steps[1] * float(probe.direction_norm)) - 1) > 1e-3  # which is not the nominal distance

    def test_closed_form_along_the_gradient(self, quadratic):
        loss, params, a = quadratic
        probe = analysis.gradient_probe(loss, params, self.steps)
        w = flat(params)
        g = a @ w
        points = w[None] - self.steps[:, None] * g[None]
        np.testing.assert_allclose(probe.loss, 0.5 * np.einsum("ki,ij,kj->k", points, a, points), rtol=1e-12)
        np.testing.assert_allclose(probe.gradient_distance, abs(self.steps) * np.linalg.norm(a @ g), rtol=1e-12)
        np.testing.assert_allclose(probe.smoothness, np.linalg.norm(a @ g) / np.linalg.norm(g), rtol=1e-12)
        there = points @ a
        cosine = there @ g / np.linalg.norm(there, axis=1) / np.linalg.norm(g)
        np.testing.assert_allclose(probe.gradient_cosine, cosine, rtol=1e-12)
        np.testing.assert_allclose(probe.base_loss, 0.5 * w @ a @ w, rtol=1e-12)
        np.testing.assert_allclose(probe.gradient_norm, np.linalg.norm(g), rtol=1e-12)
        assert probe.loss_min == probe.loss.min() and probe.loss_max == probe.loss.max()
        assert probe.distance_min == probe.gradient_distance.min()
        assert probe.distance_max == probe.gradient_distance.max()
        assert (probe.cosine_min, probe.cosine_max) == (cosine.min(), cosine.max()) or np.allclose(
            (probe.cosine_min, probe.cosine_max), (cosine.min(), cosine.max())
        )
        np.testing.assert_allclose(probe.max_smoothness, probe.smoothness.max())

    @pytest.mark.parametrize("kind", ["given", "random", "filter-normalized"])
    def test_other_directions(self, quadratic, kind):
        loss, params, a = quadratic
        key = jax.random.key(0)
        direction = {
            "given": {"a": jnp.ones((2, 2)), "b": -jnp.ones(3)},
            "random": analysis.random_direction(key, params, filter_normalized=False),
            "filter-normalized": analysis.random_direction(key, params),
        }[kind]
        probe = analysis.gradient_probe(loss, params, self.steps, direction=direction)
        d = flat(direction)
        np.testing.assert_allclose(probe.smoothness, np.linalg.norm(a @ d) / np.linalg.norm(d), rtol=1e-12)
        np.testing.assert_allclose(probe.direction_norm, np.linalg.norm(d), rtol=1e-12)
        w = flat(params)[None] - self.steps[:, None] * d[None]
        np.testing.assert_allclose(probe.loss, 0.5 * np.einsum("ki,ij,kj->k", w, a, w), rtol=1e-12)

    @pytest.mark.exhaustive
    def test_chunks_jit_and_vmap_agree(self, network):
        loss, params, batch = network
        steps = jnp.linspace(0.1, 0.8, 5)
        one = jax.jit(functools.partial(analysis.gradient_probe, loss))(params, steps, *batch)
        for size in (2, 5):
            chunked = jax.jit(functools.partial(analysis.gradient_probe, loss, batch_size=size))(params, steps, *batch)
            chex.assert_trees_all_close(chunked, one, rtol=1e-11)
        many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        mapped = jax.jit(jax.vmap(lambda p: analysis.gradient_probe(loss, p, steps, *batch)))(many)
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], mapped), one, rtol=1e-11)
        np.testing.assert_allclose(mapped.max_smoothness, mapped.smoothness.max(1))

    def test_costs_one_gradient_a_point_and_one_more(self):
        calls = []

        def loss(w, x):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.sum((w * x) ** 2)

        jax.block_until_ready(jax.jit(functools.partial(analysis.gradient_probe, loss))(1.0, jnp.arange(1.0, 6), 2.0))
        jax.effects_barrier()
        assert len(calls) == 6

    def test_traced_once_for_all_points(self):
        traced = chex.assert_max_traces(n=2)(lambda w: (w**2).sum())  # the base and the mapped point
        analysis.gradient_probe(traced, jnp.ones(3), jnp.linspace(0.1, 1, 7))

    def test_zero_gradient_and_zero_step(self):
        probe = analysis.gradient_probe(lambda w: (w**2).sum(), jnp.zeros(2), jnp.array([0.1, 0.2]))
        np.testing.assert_array_equal(probe.gradient_distance, 0)
        assert np.isnan(probe.smoothness).all() and np.isnan(probe.gradient_cosine).all()
        assert np.isnan(probe.max_smoothness) and probe.loss_max == 0
        probe = analysis.gradient_probe(lambda w: (w**2).sum(), jnp.ones(2), jnp.array([0.0, 0.2]))
        assert np.isnan(probe.smoothness[0])
        np.testing.assert_allclose(probe.max_smoothness, 2, rtol=1e-6)

    def test_nan_loss_stays_where_it_is(self):
        probe = analysis.gradient_probe(lambda w: jnp.log(w).sum(), jnp.array([1.0]), jnp.array([0.5, 2.0]))
        assert np.isfinite(probe.loss[0]) and np.isnan(probe.loss[1])
        assert np.isfinite(probe.smoothness[0]) and np.isnan(probe.max_smoothness)

    def test_one_step_size(self):
        probe = analysis.gradient_probe(lambda w: (w**2).sum(), jnp.ones(2), 0.5)
        assert probe.loss.shape == (1,) and probe.loss[0] == 0

    def test_leaves_that_are_not_floating_point_are_constants(self):
        params = {"w": jnp.ones(3), "count": jnp.array([2, 3, 4]), "flag": True, "key": jax.random.key(0)}
        loss = lambda p: (p["count"] * p["w"] ** 2).sum() + jax.random.uniform(p["key"])
        probe = analysis.gradient_probe(loss, params, jnp.array([0.1]))
        np.testing.assert_allclose(probe.gradient_norm, np.linalg.norm([4, 6, 8]))
        blocks = analysis.layer_eigenpairs(loss, params, 1, key=jax.random.key(0))
        assert list(blocks) == ["w"]
        np.testing.assert_allclose(blocks["w"].values, [8], rtol=1e-5)
        product = analysis.hessian_product(loss, params, params)
        np.testing.assert_allclose(product["w"], [4, 6, 8])
        assert product["count"].dtype == params["count"].dtype and not product["count"].any()

    def test_frozen_parameters(self, network):
        loss, params, batch = network
        inside = lambda p, *batch: loss([jax.lax.stop_gradient(p[0]), *p[1:]], *batch)
        outside, chosen = analysis.restrict(loss, params, ["1", "2"])
        assert list(chosen) == ["1/kernel", "2/kernel"]
        steps = jnp.array([0.1, 0.3])
        found = [
            jax.jit(functools.partial(analysis.gradient_probe, f))(p, steps, *batch)
            for f, p in ((inside, params), (outside, chosen))
        ]
        chex.assert_trees_all_close(*found, rtol=1e-10)
        shift = analysis.covariate_shift(inside, params, params, *batch)
        assert shift.gradient_norm[0] == 0 and np.isnan(shift.cosine[0]) and np.isfinite(shift.cosine[1:]).all()

    def test_gradients_of_the_smoothness_with_a_zero_step(self):
        def smoothness(w):
            return analysis.gradient_probe(lambda w: (w**4).sum(), w, jnp.array([0.0, 0.01])).max_smoothness

        w, e = jnp.array([1.0, 2.0]), jnp.array([0.0, 1e-2])
        numeric = (smoothness(w + e) - smoothness(w - e)) / 2e-2
        np.testing.assert_allclose(jax.grad(smoothness)(w)[1], numeric, rtol=1e-2)

    def test_low_precision_parameters_are_measured_in_float32(self):
        probe = analysis.gradient_probe(lambda w: (w**2).sum(), jnp.ones(4, jnp.bfloat16), 0.5)
        assert probe.gradient_norm.dtype == jnp.float32 and probe.gradient_norm == 4


ABSOLUTE = analysis.SymmetricOperator(jnp.abs, jnp.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: analysis.gradient_probe(lambda w: 0.0, {}, 0.1), ValueError, "params must hold at least one array"),
        (lambda: analysis.gradient_probe(lambda w: w, jnp.arange(3), 0.1), TypeError, "floating-point arrays"),
        (
            lambda: analysis.gradient_norms(lambda p: p["a"]["b"] + p["a/b"], {"a/b": 1.0, "a": {"b": 2.0}}),
            ValueError,
            "'a/b' twice",
        ),
        (
            lambda: analysis.layer_eigenpairs(jnp.sum, [jnp.ones(2)], 1, key=jax.random.key(0), layers=["0", "0"]),
            ValueError,
            "two of them",
        ),
        (lambda: analysis.measured_scan(max, 0, [1.0, [2.0]], measure=max, every=1), ValueError, "same number"),
        (lambda: analysis.gradient_probe(lambda w: w.real, 1j, 0.1), TypeError, "params must be real"),
        (lambda: analysis.gradient_probe(lambda w: w, jnp.ones(3), 0.1), TypeError, "scalar.*float32.3.*mean"),
        (lambda: analysis.gradient_probe(lambda w: (w, 1), 1.0, 0.1), TypeError, "auxiliary"),
        (lambda: analysis.gradient_probe(lambda w: jnp.array(1), 1.0, 0.1), TypeError, "real floating-point scalar"),
        (lambda: analysis.gradient_probe(lambda w: w, 1.0, jnp.zeros(0)), ValueError, "step_sizes must be a vector"),
        (lambda: analysis.gradient_probe(lambda w: w, 1.0, jnp.ones((2, 2))), ValueError, "step_sizes must be"),
        (lambda: analysis.gradient_probe(lambda w: w, 1.0, 0.1, batch_size=0), ValueError, "batch_size"),
        (lambda: analysis.gradient_probe(lambda w: w, 1.0, 0.1, direction={}), ValueError, "direction must have"),
        (lambda: analysis.gradient_probe(jnp.sum, jnp.ones(2), 0.1, direction=jnp.ones(3)), ValueError, "shapes"),
        (lambda: analysis.covariate_shift(jnp.sum, *[{"a": 1.0, "b": 2.0}] * 2), ValueError, "order"),
        (lambda: analysis.gradient_norms(lambda w: w["a"], {"a": 1.0}, layers=["c"]), ValueError, "nothing is at 'c'"),
        (lambda: analysis.gradient_norms(lambda w: w["a"], {"a": 1.0}, layers=["a", "a"]), ValueError, "two of them"),
        (lambda: analysis.hessian_eigenpairs(jnp.sum, jnp.ones(2), 3, key=jax.random.key(0)), ValueError, "k must be"),
        (lambda: analysis.eigenpairs(ABSOLUTE, 1, key=jax.random.key(0), which="top"), ValueError, "which"),
        (lambda: analysis.eigenpairs(ABSOLUTE, 1, key=jax.random.key(0), num_steps=9), ValueError, "num_steps"),
        (lambda: analysis.hessian_trace(jnp.sum, 1.0, key=jax.random.key(0), num_samples=0), ValueError, "num_samples"),
        (lambda: analysis.loss_surface(jnp.sum, jnp.ones(2), (), ()), ValueError, "one or two"),
        (lambda: analysis.loss_surface(jnp.sum, jnp.ones(2), jnp.ones(2), jnp.ones((2, 2))), ValueError, "vectors"),
        (lambda: analysis.trajectory_plane(jnp.ones((1, 3))), ValueError, "at least 2 points"),
        (lambda: analysis.trajectory_plane(jnp.ones((3, 3)), 3), ValueError, "num_directions"),
        (lambda: analysis.gradient_noise_scale(jnp.sum, 1.0, jnp.ones(5), num_batches=2), ValueError, "divide the 5"),
        (lambda: analysis.gradient_confusion(jnp.sum, 1.0, num_batches=2), ValueError, "args must be arrays"),
        (lambda: analysis.sam_sharpness(jnp.sum, 1.0, num_steps=0), ValueError, "num_steps"),
        (lambda: analysis.sam_sharpness(jnp.sum, 1.0, radius=-0.1), ValueError, "radius must not be"),
        (lambda: analysis.linear_path(jnp.sum, 1.0, 2.0, coordinates=jnp.array([0.5, 1])), ValueError, "from 0 to 1"),
        (lambda: analysis.linear_path(jnp.sum, 1.0, 2.0, coordinates=np.array([0, 0.7, 0.3, 1])), ValueError, "0 to 1"),
        (lambda: analysis.linear_path(jnp.sum, 1.0, 2.0, coordinates=jnp.zeros(1)), ValueError, "at least 2 numbers"),
        (lambda: analysis.trajectory_plane(jnp.ones((3, 3)), center="first"), ValueError, "'mean' or 'last'"),
        (
            lambda: analysis.filter_normalize(jnp.ones((3, 3)), jnp.ones((3, 3)), filter_axis=2),
            ValueError,
            "filter_axis must be axes of the kernel",
        ),
        (lambda: analysis.scale_invariance(jnp.sum, jnp.ones(3)), ValueError, "kernels"),
        (lambda: analysis.activation_statistics({"a": jnp.ones(3)}, jnp.tanh), ValueError, "preactivations.*for a"),
        (lambda: analysis.measured_scan(max, 0, jnp.ones(5), measure=max, every=2), ValueError, "divide the 5 steps"),
        (lambda: analysis.learning_rate_range(jnp.sum, 1.0, jnp.zeros(0), ()), ValueError, "learning_rates"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


class TestTheorems:
    """Santurkar et al. 2018, section 4, for one unit of one batch norm over a batch of m, epsilon = 0."""

    m, scale, bias = 12, 1.7, 0.3

    def layer(self, y):
        params = {"scale": jnp.array([self.scale]), "bias": jnp.array([self.bias])}
        _, stats = bnjax.init_batch_norm(1)
        return bnjax.batch_norm(y[:, None], params, stats, training=True, epsilon=0.0)[0][:, 0]

    def setup_numbers(self):
        rng = np.random.default_rng(3)
        y, root = jnp.asarray(rng.normal(size=self.m)), rng.normal(size=(self.m, self.m))
        hessian, shift = jnp.asarray(root @ root.T), jnp.asarray(rng.normal(size=self.m))
        return y, hessian, lambda z: 0.5 * z @ hessian @ z + shift @ z

    def test_4_1_gradient_as_an_equality(self, x64):
        y, _, loss = self.setup_numbers()
        z = self.layer(y)
        normalized, sigma = (z - self.bias) / self.scale, y.std()
        g = jax.grad(loss)(z)
        expected = (self.scale / sigma) ** 2 * (g @ g - g.sum() ** 2 / self.m - (g @ normalized) ** 2 / self.m)
        found = jax.grad(lambda y: loss(self.layer(y)))(y)
        np.testing.assert_allclose(found @ found, expected, rtol=1e-12)

    def test_4_2_curvature_as_an_equality(self, x64):
        y, hessian, loss = self.setup_numbers()
        z = self.layer(y)
        normalized, sigma = (z - self.bias) / self.scale, y.std()
        through = lambda y: loss(self.layer(y))
        u, g = jax.grad(through)(y), jax.grad(loss)(z)
        expected = (self.scale / sigma) ** 2 * u @ hessian @ u
        expected -= self.scale / (self.m * sigma**2) * (g @ normalized) * (u @ u)
        np.testing.assert_allclose(u @ analysis.hessian_product(through, y, u), expected, rtol=1e-12)

    def test_jacobian(self, x64):
        y, _, _ = self.setup_numbers()
        normalized, sigma = (self.layer(y) - self.bias) / self.scale, y.std()
        expected = (np.eye(self.m) - 1 / self.m - np.outer(normalized, normalized) / self.m) / sigma
        np.testing.assert_allclose(jax.jacobian(self.layer)(y) / self.scale, expected, atol=1e-13)


class TestCurvature:
    def test_products_against_dense_matrices(self, network):
        loss, params, batch = network
        vector = analysis.random_direction(jax.random.key(3), params, filter_normalized=False)
        dense = dense_hessian(loss, params, *batch)
        product = jax.jit(functools.partial(analysis.hessian_product, loss))(params, vector, *batch)
        np.testing.assert_allclose(flat(product), dense @ flat(vector), rtol=1e-9, atol=1e-12)
        w, unravel = jax.flatten_util.ravel_pytree(params)
        jacobian = np.asarray(jax.jit(jax.jacobian(lambda w: network_outputs(unravel(w), *batch).ravel()))(w))

        def output_loss(z, *batch):
            return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()

        z = network_outputs(params, *batch)
        inner = np.asarray(jax.hessian(lambda z: output_loss(z.reshape((-1, 2)), *batch))(z.ravel()))
        gauss_newton = functools.partial(analysis.gauss_newton_product, network_outputs, output_loss)
        product = jax.jit(gauss_newton)(params, vector, *batch)
        np.testing.assert_allclose(flat(product), jacobian.T @ inner @ jacobian @ flat(vector), rtol=1e-9, atol=1e-12)

    @pytest.mark.by_default(1)
    @pytest.mark.parametrize("which", ["largest", "magnitude", "smallest"])
    def test_eigenpairs_against_dense_hessian(self, network, which):
        loss, params, batch = network
        dense = dense_hessian(loss, params, *batch)
        values, vectors = np.linalg.eigh(dense)
        order = {"largest": -values, "magnitude": -abs(values), "smallest": values}[which].argsort()[:4]
        options = {"key": jax.random.key(0), "num_steps": 38, "which": which}
        found = jax.jit(lambda p: analysis.hessian_eigenpairs(loss, p, 4, *batch, **options))(params)
        np.testing.assert_allclose(found.values, values[order], rtol=1e-9)
        for i, j in enumerate(order):
            vector = flat(jax.tree.map(lambda v, i=i: v[i], found.vectors))
            np.testing.assert_allclose(abs(vector @ vectors[:, j]), 1, rtol=1e-7)
        assert (found.residuals < 1e-7).all()

    @pytest.mark.exhaustive
    def test_layers_blocks(self, network):
        loss, params, batch = network
        dense = dense_hessian(loss, params, *batch)
        blocks = {"0": slice(0, 20), "1": slice(20, 32), "2": slice(32, 38)}
        for layers in (None, ["2", "0"]):
            options = {"key": jax.random.key(1), "layers": layers}
            found = jax.jit(lambda p, o=options: analysis.layer_eigenpairs(loss, p, 2, *batch, **o))(params)
            assert set(found) == set(layers or blocks)
            for name, pairs in found.items():
                block = dense[blocks[name], blocks[name]]
                np.testing.assert_allclose(pairs.values, np.linalg.eigvalsh(block)[::-1][:2], rtol=1e-8)

    @pytest.mark.by_default(1)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("kind", ["identity", "zero", "rank 3"])
    def test_krylov_spaces_that_close_early(self, x64, dtype, kind):
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.normal(size=(60, 3)))[0]
        matrix = {"identity": np.eye(60), "zero": np.zeros((60, 60)), "rank 3": (basis * [9.0, 3.0, -4.0]) @ basis.T}
        a = jnp.asarray(matrix[kind], dtype)
        found = analysis.eigenpairs(
            analysis.SymmetricOperator(lambda v: a @ v, jnp.zeros(60, dtype)), 5, key=jax.random.key(2)
        )
        expected = np.sort(np.linalg.eigvalsh(matrix[kind]))[::-1][:5]
        np.testing.assert_allclose(found.values, expected, atol=100 * np.finfo(dtype).eps)
        gram = found.vectors @ found.vectors.T
        np.testing.assert_allclose(gram, np.eye(5), atol=1e-4 if dtype == np.float32 else 1e-12)
        assert (np.linalg.norm(a @ found.vectors.T - found.vectors.T * found.values[None], axis=0) < 1e-4).all()

    @pytest.mark.by_default(1)
    @pytest.mark.parametrize(
        ("num_steps", "block_size"), [(12, 1), (60, 3), pytest.param(160, 8, marks=pytest.mark.exhaustive)]
    )
    def test_residuals_bound_the_error(self, x64, num_steps, block_size):
        values = jnp.linspace(0, 1, 3000)
        run = functools.partial(
            analysis.eigenpairs, analysis.SymmetricOperator(lambda v: values * v, jnp.zeros(3000)), 3
        )
        found = jax.jit(lambda key: run(key=key, num_steps=num_steps, block_size=block_size))(jax.random.key(1))
        true = np.linalg.norm(values[None] * found.vectors - found.values[:, None] * found.vectors, axis=1)
        np.testing.assert_allclose(found.residuals, true, rtol=1e-6)
        assert true[0] > 1e-3
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(3), atol=1e-12)
        distance = abs(np.asarray(values)[:, None] - found.values[None]).min(0)
        assert (distance <= true).all()

    @pytest.mark.by_default(1)
    @pytest.mark.parametrize(("size", "num_steps", "block_size"), [(300, 120, 6), (160, 160, 1)])
    def test_blocks_find_clusters(self, x64, size, num_steps, block_size):
        rng = np.random.default_rng(0)
        values = np.concatenate([[9.0] * 4, [5.0, 4.0], rng.uniform(-1, 1, size - 6)])
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        a = jnp.asarray((basis * values) @ basis.T)
        operator = analysis.SymmetricOperator(lambda v: a @ v, jnp.zeros(size))
        run = functools.partial(analysis.eigenpairs, operator, 6, num_steps=num_steps, block_size=block_size)
        found = jax.jit(lambda key: run(key=key))(jax.random.key(0))
        np.testing.assert_allclose(found.values, values[:6], rtol=1e-9)  # all four of one value
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(6), atol=1e-12)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("kind", ["outliers", "even", "geometric"])
    def test_all_pairs_of_blocks_in_float32(self, kind):
        outliers = jnp.concatenate([jnp.linspace(100, 10, 20), jnp.linspace(0.1, 0, 180)])
        even = jnp.linspace(1, 0, 200)
        values = {"even": even, "outliers": outliers, "geometric": 10.0 ** (-8 * (1 - even))}[kind]
        run = functools.partial(
            analysis.eigenpairs, analysis.SymmetricOperator(lambda v: values * v, jnp.zeros(200)), 200
        )
        found = jax.jit(lambda key: run(key=key))(jax.random.key(0))
        np.testing.assert_allclose(found.values, values, atol=2e-6 * values.max())
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(200), atol=2e-5)

    def test_trace_and_diagonal(self, network):
        loss, params, batch = network
        dense = dense_hessian(loss, params, *batch)
        estimate = functools.partial(analysis.hessian_trace, loss, params, *batch, key=jax.random.key(0))
        found = jax.jit(functools.partial(estimate, num_samples=400))()
        assert abs(found.estimate - np.trace(dense)) < 4 * found.standard_error
        # The variance of a probe of signs is twice the sum of the squares off the diagonal.
        deviation = np.sqrt(2 * (np.square(dense).sum() - np.square(np.diag(dense)).sum()))
        np.testing.assert_allclose(found.standard_error, deviation / 20, rtol=0.25)
        np.testing.assert_allclose(estimate(num_samples=6, batch_size=3).samples, estimate(num_samples=6).samples)
        assert np.isnan(estimate(num_samples=1).standard_error)
        options = {"key": jax.random.key(0), "num_samples": 400}
        diagonal = jax.jit(lambda p: analysis.hessian_diagonal(loss, p, *batch, **options))(params)
        error = np.sqrt(np.square(dense).sum(1) - np.square(np.diag(dense))) / 20
        assert (abs(flat(diagonal) - np.diag(dense)) < 5 * error + 1e-12).all()

    @pytest.mark.exhaustive
    def test_spectral_density(self, network):
        loss, params, batch = network
        dense = dense_hessian(loss, params, *batch)
        size = len(dense)
        options = {"key": jax.random.key(0), "num_probes": 30, "num_steps": 30, "num_points": 2000}
        found = jax.jit(lambda p: analysis.spectral_density(loss, p, *batch, **options))(params)
        np.testing.assert_allclose(np.trapezoid(found.density, found.grid), 1, rtol=1e-5)
        np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
        for power in (1, 2):  # quadrature is exact for these: only the probes are random
            moments = (found.weights * found.nodes**power).sum(1)
            exact = np.trace(np.linalg.matrix_power(dense, power)) / size
            assert abs(moments.mean() - exact) < 4 * moments.std(ddof=1) / np.sqrt(30)
        values = np.linalg.eigvalsh(dense)
        np.testing.assert_allclose([found.nodes.min(), found.nodes.max()], values[[0, -1]], rtol=1e-3)
        assert (found.standard_error >= 0).all()
        np.testing.assert_allclose(found.bandwidth, 0.01 * np.ptp(found.nodes))
        one = analysis.spectral_density(jnp.sum, jnp.ones(4), key=jax.random.key(0), num_probes=1, num_steps=2)
        assert np.isfinite(one.density).all() and np.isnan(one.standard_error).all()


class TestCovariateShift:
    def test_definition(self, network):
        loss, params, batch = network
        gradient = jax.grad(loss)(params, *batch)
        following = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        found = jax.jit(functools.partial(analysis.covariate_shift, loss))(params, following, *batch)
        assert found.layers == ("0", "1", "2")
        for i in range(3):
            ahead = [*following[:i], *params[i:]]
            expected, before = flat(jax.grad(loss)(ahead, *batch)[i]), flat(gradient[i])
            np.testing.assert_allclose(found.distance[i], np.linalg.norm(expected - before), rtol=1e-9, atol=1e-14)
            cosine = expected @ before / np.linalg.norm(expected) / np.linalg.norm(before)
            np.testing.assert_allclose(found.cosine[i], cosine, rtol=1e-9)
            np.testing.assert_allclose(found.gradient_norm[i], np.linalg.norm(before), rtol=1e-9)
        assert found.distance[0] == 0 and (found.distance[1:] > 0).all()

    def test_no_step_no_shift(self, network):
        loss, params, batch = network
        found = analysis.covariate_shift(loss, params, params, *batch)
        np.testing.assert_allclose(found.distance, 0, atol=1e-15)
        np.testing.assert_allclose(found.cosine, 1, rtol=1e-12)

    def test_layers_of_several_subtrees_in_a_given_order(self, x64):
        loss = lambda p, x: (p["z"] * jnp.tanh(p["scale"] * p["a"] * x)) ** 2 + p["free"] * x
        params = dict.fromkeys(["z", "scale", "a", "free"], jnp.array(0.7))
        following = {name: p + 0.1 for name, p in params.items()}
        found = analysis.covariate_shift(loss, params, following, 1.3, layers=[("a", "scale"), "z"])
        ahead = {**params, "a": following["a"], "scale": following["scale"]}
        assert found.layers == ("a", "z")
        expected = jax.grad(loss)(ahead, 1.3)["z"] - jax.grad(loss)(params, 1.3)["z"]
        np.testing.assert_allclose(found.distance, [0, abs(expected)], rtol=1e-12)

    def test_names_that_count_are_in_order(self):
        params = {f"Dense_{i}": jnp.array(1.0 + i) for i in range(11)}
        found = analysis.covariate_shift(lambda p: sum(p.values()) ** 2, params, params)
        assert found.layers == tuple(f"Dense_{i}" for i in range(11))

    def test_it_takes_one_gradient_and_one_for_each_layer(self):
        calls = []

        def loss(params):
            jax.debug.callback(lambda: calls.append(0))
            return sum(p**2 for p in params)

        params = [jnp.array(1.0 + i) for i in range(5)]
        jax.block_until_ready(analysis.covariate_shift(loss, params, params))
        jax.effects_barrier()
        before = len(calls)
        jax.block_until_ready(jax.jit(functools.partial(analysis.gradient_probe, loss))(params, jnp.ones(7)))
        jax.effects_barrier()
        assert before <= 1 + 5 and len(calls) - before == 1 + 7

    def test_one_layer(self):
        found = analysis.covariate_shift(lambda p: p[0] ** 2, [1.0], [2.0])
        assert found.distance.tolist() == [0] and found.cosine.tolist() == [1]


class TestSurface:
    def test_half_precision_filters_do_not_overflow(self):
        w = jnp.full((4, 2), 300.0, jnp.float16)
        found = analysis.filter_normalize(jnp.ones((4, 2), jnp.float16), w)
        np.testing.assert_array_equal(found, w)

    def test_line_plane_and_chunks(self, quadratic):
        loss, params, a = quadratic
        first = analysis.random_direction(jax.random.key(0), params)
        second = analysis.random_direction(jax.random.key(1), params, filter_normalized=False)
        s, t = jnp.linspace(-1, 1, 3), jnp.linspace(0, 1, 4)
        w, d, e = flat(params), flat(first), flat(second)
        points = w + np.asarray(s)[:, None, None] * d + np.asarray(t)[None, :, None] * e
        expected = 0.5 * np.einsum("abi,ij,abj->ab", points, a, points)
        for size in (None, 5):
            found = analysis.loss_surface(loss, params, (first, second), (s, t), batch_size=size)
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        for directions, coordinates in ((first, s), ((first,), s), ((first,), (s,))):
            found = analysis.loss_surface(loss, params, directions, coordinates)
            np.testing.assert_allclose(found, expected[:, 0], rtol=1e-12)

    def test_filter_normalization(self):
        rng = np.random.default_rng(0)
        params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32), "bias": jnp.ones(4)}
        params["kernel"] = params["kernel"].at[..., 0].set(0)
        found = analysis.random_direction(jax.random.key(0), params)
        norms = [np.linalg.norm(np.reshape(v, (-1, 4)), axis=0) for v in (found["kernel"], params["kernel"])]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert not found["bias"].any()
        rows = analysis.filter_normalize(params, jax.tree.map(lambda p: 2 * p, params), filter_axis=0)
        np.testing.assert_allclose(rows["kernel"], 2 * params["kernel"], rtol=1e-6)
        assert np.isfinite(analysis.filter_normalize(jax.tree.map(jnp.zeros_like, params), params)["kernel"]).all()

    @pytest.mark.exhaustive
    def test_filters_of_attention(self):
        """Against the plain matrices that the kernels stand for, whose columns are the filters."""
        model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=6)
        x = jnp.ones((1, 3, 5))
        params = model.init(jax.random.key(0), x, x)["params"]
        params = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(p.size), p.shape), params)
        found = analysis.random_direction(jax.random.key(1), params)
        for name in ("query", "key", "value"):
            assert params[name]["kernel"].shape == (5, 2, 4) and not found[name]["bias"].any()
            columns = [np.linalg.norm(tree[name]["kernel"].reshape((5, 8)), axis=0) for tree in (found, params)]
            np.testing.assert_allclose(*columns, rtol=1e-5)
        columns = [np.linalg.norm(tree["out"]["kernel"].reshape((8, 6)), axis=0) for tree in (found, params)]
        np.testing.assert_allclose(*columns, rtol=1e-5)
        ones = {**params, "query": {**params["query"], "kernel": jnp.ones((5, 2, 4))}}
        for axis in (-1, {"*/query/kernel": -1}):  # what is said counts: a filter over all heads
            over_heads = analysis.filter_normalize(ones, params, filter_axis=axis)["query"]["kernel"]
            np.testing.assert_allclose(over_heads, over_heads[:1, :1] + jnp.zeros((5, 2, 4)), rtol=1e-6)
        with pytest.raises(ValueError, match="nothing is at 'typo'"):
            analysis.filter_normalize(params, params, filter_axis={"typo": 0})
        gradient = analysis.scale_invariance(
            lambda p: sum(p[n]["kernel"][:, 0].sum() for n in ("query", "out")), params
        )
        assert gradient.layers == ("key/kernel", "out/kernel", "query/kernel", "value/kernel")

    @pytest.mark.parametrize(
        ("filter_axis", "inputs"),
        [((0, 2), (1,)), ({"a/*": (0, 2)}, (1,)), ({"*/a": 0}, (1, 2)), (None, (0, 1)), (0, (1, 2))],
    )
    def test_filters_along_several_axes_and_by_patterns(self, filter_axis, inputs):
        w = jax.random.normal(jax.random.key(0), (3, 4, 5))
        found = analysis.filter_normalize({"a": {"w": jnp.ones_like(w)}}, {"a": {"w": w}}, filter_axis=filter_axis)
        norms = [np.linalg.norm(v, axis=inputs) if len(inputs) < 3 else 0 for v in (found["a"]["w"], w)]
        np.testing.assert_allclose(*norms, rtol=1e-5)

    def test_trajectory_plane_is_that_of_scikit_learn(self, x64):
        decomposition = pytest.importorskip("sklearn.decomposition")
        points = np.random.default_rng(1).normal(size=(7, 9)) * np.arange(1, 10)
        pca = decomposition.PCA(3).fit(points - points[-1])  # what the cited authors' program does
        plane = analysis.trajectory_plane({"w": jnp.asarray(points).reshape((7, 3, 3))}, 3)
        np.testing.assert_allclose(plane.explained_variance, pca.explained_variance_ratio_, rtol=1e-10)
        rows = np.stack([flat(d) for d in plane.directions])
        np.testing.assert_allclose(abs((rows * pca.components_).sum(1)), 1, rtol=1e-10)
        np.testing.assert_allclose(plane.coordinates, (points - points[-1]) @ rows.T, atol=1e-10)

    def test_small_components_of_long_trajectories_in_float32(self):
        """1,000 points whose second component has a ten-thousandth of the first one's variance."""
        t = np.linspace(0, 1, 1000)
        points = np.zeros((1000, 50), np.float32)
        points[:, 3], points[:, 7] = 100 * t, np.cos(20 * t)
        plane = analysis.trajectory_plane(jnp.asarray(points), 3)
        exact = np.linalg.svd(points.astype(float) - points.mean(0, dtype=float), compute_uv=False) ** 2
        np.testing.assert_allclose(plane.explained_variance, exact[:3] / exact.sum(), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(abs(plane.directions[1][7]), 1, rtol=1e-4)
        assert not plane.directions[2].any()

    @pytest.mark.by_default(1)
    @pytest.mark.parametrize("center", ["mean", "last"])
    def test_trajectory_plane_against_svd(self, x64, center):
        rng = np.random.default_rng(0)
        path = [
            {"a": jnp.asarray(rng.normal(size=(2, 3))), "n": 3, "b": jnp.asarray(rng.normal(size=5))} for _ in range(6)
        ]
        stacked = jax.tree.map(lambda *p: jnp.stack(jnp.asarray(p)), *path)
        plane = analysis.trajectory_plane(stacked, 3, center=center)
        points = np.stack([np.concatenate([np.ravel(p["a"]), p["b"]]) for p in path])
        offsets = points - points[-1]
        _, sizes, rows = np.linalg.svd(points - (points.mean(0) if center == "mean" else points[-1]))
        np.testing.assert_allclose(plane.explained_variance, (sizes**2 / (sizes**2).sum())[:3], rtol=1e-10)
        for i, direction in enumerate(plane.directions):
            vector = np.concatenate([np.ravel(direction["a"]), direction["b"]])
            assert direction["n"] == 0
            np.testing.assert_allclose(abs(vector @ rows[i]), 1, rtol=1e-10)
            np.testing.assert_allclose(plane.coordinates[:, i], offsets @ vector, atol=1e-10)
        assert plane.coordinates[-1].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
        stacked = {k: jnp.stack([jnp.asarray(p[k]) for p in path]) for k in ("a", "b")}
        again = jax.jit(functools.partial(analysis.trajectory_plane, center=center))(stacked)
        np.testing.assert_allclose(again.coordinates, plane.coordinates[:, :2], atol=1e-10)

    def test_trajectories_of_lists_and_on_a_line(self):
        layers = [jnp.ones((5, 3, 3)), jnp.arange(10.0).reshape(5, 2)]
        plane = analysis.trajectory_plane(layers)
        assert plane.coordinates.shape == (5, 2) and [d.shape for d in plane.directions[0]] == [(3, 3), (2,)]
        np.testing.assert_allclose(np.linalg.norm(flat(plane.directions[0])), 1, rtol=1e-5)
        np.testing.assert_allclose(plane.explained_variance, [1, 0], rtol=1e-6)
        assert not flat(plane.directions[1]).any() and not plane.coordinates[:, 1].any()

    def test_linear_path(self, x64):
        loss = lambda w: jnp.cos(w["a"]) + w["b"]
        a, b = {"a": jnp.array(-np.pi), "b": jnp.array(0.0)}, {"a": jnp.array(np.pi), "b": jnp.array(1.0)}
        path = analysis.linear_path(loss, a, b, coordinates=jnp.linspace(0, 1, 101))
        np.testing.assert_allclose(path.loss, np.cos(np.linspace(-np.pi, np.pi, 101)) + path.coordinates, atol=1e-12)
        np.testing.assert_allclose(path.excess, 2, rtol=1e-12)
        np.testing.assert_allclose(path.barrier, path.loss.max() - (path.loss[0] + path.loss[-1]) / 2, rtol=1e-12)
        along = analysis.linear_path(lambda w: 3 * w, jnp.array(0.0), jnp.array(2.0))
        np.testing.assert_allclose([along.barrier, along.excess], [3, 0], atol=1e-12)
        traced = jax.jit(lambda t: analysis.linear_path(lambda w: 3 * w, 0.0, 2.0, coordinates=t))
        np.testing.assert_allclose(traced(jnp.array([0.0, 0.5, 1.0])).barrier, 3)
        w, v = (jnp.asarray(v, jnp.bfloat16) for v in (1.0, 2.0**-9))
        half = analysis.linear_path(lambda w: 1.0 * w.astype(jnp.float32), w, v)
        assert (half.loss[0], half.loss[-1]) == (1, 2.0**-9)
        assert np.isnan(traced(jnp.array([0.5, 1.0])).barrier) and np.isnan(traced(jnp.array([0.0, 0.5])).excess)


class TestGradients:
    def test_norms(self, network):
        loss, params, batch = network
        gradient = jax.grad(loss)(params, *batch)
        found = analysis.gradient_norms(loss, params, *batch)
        np.testing.assert_allclose(list(found.values()), [np.linalg.norm(flat(g)) for g in gradient], rtol=1e-12)
        found = analysis.gradient_norms(loss, params, *batch, layers=["0/kernel", ("0/norm", "2")])
        expected = np.linalg.norm(np.concatenate([flat(gradient[0]["norm"]), flat(gradient[2])]))
        np.testing.assert_allclose(found["0/norm"], expected, rtol=1e-12)

    def test_noise_scale(self, x64):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(64, 5)) + [1, 0, 0, 0, 0]
        loss = lambda w, x: (x @ w).mean()  # whose gradients are means of x
        found = analysis.gradient_noise_scale(loss, jnp.zeros(5), jnp.asarray(x), num_batches=64)
        trace = x.var(0, ddof=1).sum()
        np.testing.assert_allclose(found.trace, trace, rtol=1e-12)
        np.testing.assert_allclose(found.squared_norm, np.square(x.mean(0)).sum() - trace / 64, rtol=1e-12)
        np.testing.assert_allclose(found.scale, found.trace / found.squared_norm)
        parts = x.reshape((8, 8, 5)).mean(1)
        found = analysis.gradient_noise_scale(loss, jnp.zeros(5), jnp.asarray(x), num_batches=8)
        np.testing.assert_allclose(found.trace, 8 * parts.var(0, ddof=1).sum(), rtol=1e-12)

    @pytest.mark.parametrize(("num_batches", "size"), [(5, 1), (10, 2), (23, 1)])
    def test_noise_scale_interval_against_the_jackknife(self, x64, num_batches, size):
        """Written down from all inner products, with scipy's quantile and roots of the polynomial."""
        x = np.random.default_rng(0).normal(size=(num_batches * size, 4)) + [6, 0, 0, 0]
        loss = lambda w, x: (x @ w).mean()
        found = analysis.gradient_noise_scale(loss, jnp.zeros(4), jnp.asarray(x), num_batches=num_batches)
        gram = (lambda g: g @ g.T)(x.reshape((num_batches, size, 4)).mean(1))

        def estimates(kept):
            square, n = gram[np.ix_(kept, kept)], kept.sum()
            between = (square.sum() - np.trace(square)) / (n * (n - 1))
            return np.array([size * (np.trace(square) / n - between), between])

        groups = min(num_batches, 10)
        group_of = np.arange(num_batches) * groups // num_batches
        whole, h = estimates(np.full(num_batches, True)), num_batches / np.bincount(group_of)
        pseudo = np.stack([h[j] * whole - (h[j] - 1) * estimates(group_of != j) for j in range(groups)])
        offset = (pseudo - pseudo.mean(0)) / np.sqrt(h - 1)[:, None]
        (aa, ab), (_, bb) = offset.T @ offset / groups
        square = scipy.stats.t.ppf(0.975, groups - 1) ** 2
        a, b = whole
        ends = np.roots([b * b - square * bb, -2 * (a * b - square * ab), a * a - square * aa])
        np.testing.assert_allclose([found.low, found.high], np.maximum(np.sort(ends), 0), rtol=1e-8)
        np.testing.assert_allclose([found.trace, found.squared_norm, found.scale], [a, b, a / b], rtol=1e-10)

    @pytest.mark.parametrize("scale", [1.0, 0.2, 0.01])
    @pytest.mark.parametrize("num_batches", [8, 32])
    def test_noise_scale_interval_covers(self, num_batches, scale):
        """In 1,000 simulated batches the interval holds the true scale as often as promised, 90 to 99 %, or more."""
        deviations = jnp.sqrt(0.8 ** jnp.arange(20.0))
        signal = jnp.sqrt((deviations**2).sum() / scale / num_batches)

        @jax.vmap
        def interval(key):
            x = deviations[None] * jax.random.normal(key, (num_batches, 20))
            noise = analysis.gradient_noise_scale(
                lambda w, x: (x @ w).mean(), jnp.zeros(20), x.at[:, 3].add(signal), num_batches=num_batches
            )
            return noise.low, noise.high

        low, high = jax.jit(interval)(jax.random.split(jax.random.key(0), 1000))
        truth = scale * num_batches
        assert 0.9 <= np.mean((low <= truth) & (truth <= high)) <= (1 if scale == 1 else 0.99)
        assert np.isfinite(high).all() if scale == 0.01 else True

    def test_noise_scale_of_two_parts_has_no_interval_and_of_no_noise_no_width(self):
        loss = lambda w, x: (x * w).mean()
        two = analysis.gradient_noise_scale(loss, 1.0, jnp.array([1.0, 3.0]), num_batches=2)
        assert np.isnan([two.low, two.high]).all() and two.scale == pytest.approx(2 / 3)
        alike = analysis.gradient_noise_scale(loss, 1.0, jnp.full(6, 2.0), num_batches=6)
        assert (alike.scale, alike.low, alike.high, alike.squared_norm) == (0, 0, 0, 4)

    def test_noise_scale_where_the_mean_gradient_is_zero_or_a_gradient_is_nan(self):
        """‖G‖² is then estimated to be negative: nothing bounds the scale from above."""
        loss = lambda w, x: (x * w).mean()
        zero = analysis.gradient_noise_scale(loss, 1.0, jnp.tile(jnp.array([1.0, -1.0]), 4), num_batches=8)
        assert zero.squared_norm < 0 and (zero.low, zero.high) == (0, np.inf)
        unknown = analysis.gradient_noise_scale(loss, 1.0, jnp.array([1.0, jnp.nan, 2.0, 3.0]), num_batches=4)
        assert np.isnan([unknown.scale, unknown.low, unknown.high]).all()

    def test_noise_scale_in_bfloat16(self):
        x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(4096, 3)) + 2, jnp.bfloat16), np.float64)
        found = analysis.gradient_noise_scale(
            lambda w, x: (x @ w).mean(), jnp.zeros(3, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16), num_batches=4096
        )
        trace = x.var(0, ddof=1).sum()
        np.testing.assert_allclose(found.scale, trace / (np.square(x.mean(0)).sum() - trace / 4096), rtol=1e-4)

    def test_confusion(self, network):
        loss, params, (x, y) = network
        found = jax.jit(functools.partial(analysis.gradient_confusion, loss, num_batches=4))(params, x, y)
        g = np.stack([flat(jax.grad(loss)(params, x[i : i + 4], y[i : i + 4])) for i in range(0, 16, 4)])
        products = g @ g.T
        above = np.triu_indices(4, 1)
        np.testing.assert_allclose(found.products, products, rtol=1e-10)
        np.testing.assert_allclose(found.confusion, max(0, -products[above].min()), rtol=1e-10)
        cosines = (products / np.sqrt(np.outer(np.diag(products), np.diag(products))))[above]
        np.testing.assert_allclose([found.min_cosine, found.mean_cosine], [cosines.min(), cosines.mean()], rtol=1e-9)

    def test_sam_sharpness(self, x64):
        values = jnp.array([1.0, 4.0])
        loss = lambda w: 0.5 * (values * w**2).sum()
        w = np.array([0.3, 0.2])
        g = np.asarray(values) * w
        there = w + 0.1 * g / np.linalg.norm(g)
        expected = loss(there) - loss(w)
        np.testing.assert_allclose(analysis.sam_sharpness(loss, jnp.asarray(w), radius=0.1), expected, rtol=1e-12)
        angles = np.linspace(0, 2 * np.pi, 20001)
        ball = w + 0.1 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        worst = (0.5 * np.square(ball) @ np.asarray(values)).max() - loss(w)
        many = analysis.sam_sharpness(loss, jnp.asarray(w), radius=0.1, num_steps=200)
        assert expected < many <= worst
        np.testing.assert_allclose(many, worst, rtol=1e-3)
        assert analysis.sam_sharpness(loss, jnp.zeros(2), radius=0.1) == 0
        assert np.isnan(jax.jit(lambda r: analysis.sam_sharpness(loss, jnp.asarray(w), radius=r))(-1.0))

    def test_sam_sharpness_is_that_of_the_worst_point_seen(self, x64):
        """On a ripple, whose ascent from 0 passes a crest and ends lower."""
        loss = lambda w: jnp.sin(20 * w) - w
        points, offset = [], 0.0
        for _ in range(4):
            points.append(offset)
            slope = 20 * np.cos(20 * offset) - 1
            offset = float(np.clip(offset + 0.12 / 4 * 2 * np.sign(slope), -0.12, 0.12))
        points = np.array([*points, offset])
        values = np.sin(20 * points) - points
        assert values.max() > values[-1] + 0.1
        found = analysis.sam_sharpness(loss, jnp.array(0.0), radius=0.12, num_steps=4)
        np.testing.assert_allclose(found, values.max() - values[0], rtol=1e-10)
        assert analysis.sam_sharpness(lambda w: jnp.sin(20 * w), jnp.array(0.07), radius=0.3) == 0  # below W, so W

    def test_scale_invariance_of_an_empty_kernel_and_of_half_precision(self):
        found = analysis.scale_invariance(lambda p: sum(w.sum() for w in p), [jnp.zeros((3, 0)), jnp.ones((2, 2))])
        assert np.isnan(found.cosine[0]) and found.cosine[1] == 1
        tiny = analysis.scale_invariance(lambda w: 1e-15 * w.sum(), jnp.full((4, 2), 1e-12))
        np.testing.assert_allclose(tiny.cosine, 1, rtol=1e-5)
        half = analysis.scale_invariance(lambda w: (3 * w).sum(), jnp.full((4, 2), 200.0, jnp.float16))
        np.testing.assert_allclose(half.weight_norm, 200 * np.sqrt(8), rtol=1e-6)

    def test_scale_invariance_with_batch_norm(self, network):
        loss, params, batch = network
        found = analysis.scale_invariance(loss, params, *batch, learning_rate=0.1)
        assert found.layers == ("0/kernel", "1/kernel", "2/kernel")
        assert found.cosine[0] < 1e-4 and (found.cosine[1:] > 1e-2).all()  # up to epsilon, 1e-5
        kernels = [layer["kernel"] for layer in params]
        np.testing.assert_allclose(found.weight_norm, [np.linalg.norm(k) for k in kernels], rtol=1e-12)
        np.testing.assert_allclose(found.effective_learning_rate, 0.1 / found.weight_norm**2, rtol=1e-12)
        gradient = jax.grad(loss)(params, *batch)[2]["kernel"]
        cosines = abs((kernels[2] * gradient).sum(0)) / np.linalg.norm(kernels[2], axis=0)
        expected = (cosines / np.linalg.norm(gradient, axis=0)).max()
        np.testing.assert_allclose(found.cosine[2], expected, rtol=1e-10)
        assert np.isnan(analysis.scale_invariance(loss, params, *batch).effective_learning_rate).all()


def test_activation_statistics(x64):
    h = np.random.default_rng(0).normal(size=(5, 4, 4, 3)) * 4
    h[..., 2] = 30
    found = analysis.activation_statistics({"a": jnp.asarray(h)}, jax.nn.sigmoid)["a"]
    rows = h.reshape((-1, 3))
    np.testing.assert_allclose(found.percentiles, np.percentile(rows, [15, 50, 85], axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean, rows.mean(0))
    np.testing.assert_allclose(found.deviation, rows.std(0), atol=1e-12)
    slope = 1 / (1 + np.exp(-rows)) * (1 - 1 / (1 + np.exp(-rows)))
    np.testing.assert_allclose(found.saturated, (slope < 0.05).mean())
    np.testing.assert_allclose(found.dead, 1 / 3)


class TestLoop:
    def test_measures_before_every_nth_step_and_nothing_else(self):
        counts = {"step": 0, "measure": 0}

        def count(name):
            jax.debug.callback(lambda: counts.__setitem__(name, counts[name] + 1))

        def step(w, x):
            count("step")
            return w + x, w

        def measure(w, x):
            count("measure")
            return {"w": w, "x": x}

        run = jax.jit(functools.partial(analysis.measured_scan, step, measure=measure, every=3))
        last, outputs, measured = run(jnp.array(0.0), jnp.arange(12.0))
        jax.effects_barrier()
        assert counts == {"step": 12, "measure": 4}
        before = np.cumsum(np.arange(12)) - np.arange(12)
        np.testing.assert_array_equal(outputs, before)
        np.testing.assert_array_equal(measured["w"], before[::3])
        np.testing.assert_array_equal(measured["x"], [0, 3, 6, 9])
        assert last == 66

    def test_vmapped_over_seeds_and_learning_rates(self, network):
        loss, params, batch = network

        def run(scale, rate):
            def step(params, _):
                value, gradient = jax.value_and_grad(loss)(params, *batch)
                return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

            def measure(params, _):
                return analysis.gradient_probe(loss, params, rate * jnp.array([0.5, 2.0]), *batch)

            start = jax.tree.map(lambda p: scale * p, params)
            return analysis.measured_scan(step, start, jnp.arange(4), measure=measure, every=2)

        scales, rates = jnp.array([0.5, 1.0]), jnp.array([0.1, 0.2, 0.4])
        mapped = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(scales, rates)
        assert mapped[2].loss.shape == (2, 3, 2, 2) and mapped[2].max_smoothness.shape == (2, 3, 2)
        one = jax.jit(run)(scales[1], rates[2])
        chex.assert_trees_all_close(jax.tree.map(lambda v: v[1, 2], mapped), one, rtol=1e-9)

    def test_learning_rate_range_of_a_quadratic(self, x64):
        loss = lambda w, x: 0.5 * (jnp.array([1.0, 4.0]) * w**2).sum() + 0 * x
        rates = jnp.array([0.01, 0.1, 0.4, 0.49, 0.51, 0.6])  # which breaks at 2 / 4
        for size in (None, 6):
            found = analysis.learning_rate_range(loss, jnp.ones(2), rates, (jnp.zeros(200),), batch_size=size)
            assert found.trains.tolist() == [True] * 4 + [False] * 2
            assert (found.largest, found.breaks_at) == (0.49, 0.51)
        np.testing.assert_allclose(
            found.loss[:, :2], np.stack([np.full(6, 2.5), 0.5 * ((1 - rates) ** 2 + 4 * (1 - 4 * rates) ** 2)], 1)
        )
        found = analysis.learning_rate_range(loss, jnp.ones(2), rates, (jnp.zeros(20),), target=0.0)
        assert not found.trains.any() and np.isnan(found.largest) and np.isnan(found.breaks_at)

    def test_learning_rate_range_with_optax(self, x64):
        loss = lambda w, x: ((w - x) ** 2).sum()
        found = analysis.learning_rate_range(loss, jnp.zeros(2), jnp.array([0.1]), (jnp.ones(3),), optimizer=optax.adam)
        params, optimizer, losses = jnp.zeros(2), optax.adam(0.1), []
        memory = optimizer.init(params)
        for _ in range(3):
            value, gradient = jax.value_and_grad(loss)(params, 1.0)
            updates, memory = optimizer.update(gradient, memory)
            params = optax.apply_updates(params, updates)
            losses.append(value)
        np.testing.assert_allclose(found.loss[0], losses, rtol=1e-12)
        assert found.breaks_at == np.inf


@pytest.mark.by_default(1)
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e20])
def test_measurements_hold_over_the_range_of_float32(scale):
    values = jnp.asarray([5.0, 3, 1, 0.5, 0.2] + [0.01] * 45)
    zeros, key = jnp.zeros(50), jax.random.key(0)

    def loss(w, shift=0.0):
        return 0.5 * (values * scale * (w - shift) ** 2).sum()

    pairs = analysis.hessian_eigenpairs(loss, zeros, 2, key=key)
    np.testing.assert_allclose(pairs.values / scale, [5, 3], rtol=1e-5)
    assert (pairs.residuals / scale < 1e-4).all()
    density = analysis.spectral_density(loss, zeros, key=key, num_probes=2, num_steps=10)
    np.testing.assert_allclose(density.nodes.max() / scale, 5, rtol=1e-5)
    mass = np.trapezoid(np.asarray(density.density, float) * scale, np.asarray(density.grid, float) / scale)
    np.testing.assert_allclose(mass, 1, rtol=1e-3)
    ones = jnp.ones(50)
    size = np.linalg.norm(np.asarray(values, float))
    norms = analysis.gradient_norms(lambda w: loss(w["w"]), {"w": ones})
    np.testing.assert_allclose(norms["w"] / scale, size, rtol=1e-5)
    step = 1e-3 / scale
    probe = analysis.gradient_probe(loss, ones, jnp.asarray([step]))
    there = np.asarray(values, float) * (1 - 1e-3 * np.asarray(values, float))
    np.testing.assert_allclose(
        probe.gradient_distance / scale, 1e-3 * np.linalg.norm(np.asarray(values) ** 2), rtol=1e-3
    )
    cosine = there @ np.asarray(values, float) / (np.linalg.norm(there) * size)
    np.testing.assert_allclose(probe.gradient_cosine, cosine, rtol=1e-5)
    shifts = jnp.asarray([1.0, -0.5])
    confusion = analysis.gradient_confusion(lambda w, s: loss(w, s.mean()), zeros, shifts, num_batches=2)
    np.testing.assert_allclose(confusion.min_cosine, -1, rtol=1e-5)
    normalized = analysis.filter_normalize(jnp.ones((3, 2)), jnp.full((3, 2), scale))
    np.testing.assert_allclose(normalized / scale, 1, rtol=1e-5)
    noise = analysis.gradient_noise_scale(
        lambda w, s: loss(w, s.mean()), ones, jnp.asarray([0.5, 1.5, 3.0]), num_batches=3
    )
    usual = analysis.gradient_noise_scale(
        lambda w, s: loss(w, s.mean()) / scale, ones, jnp.asarray([0.5, 1.5, 3.0]), num_batches=3
    )
    np.testing.assert_allclose([noise.scale, noise.low], [usual.scale, usual.low], rtol=1e-4)
    plane = analysis.trajectory_plane(scale * jnp.asarray([[4.0, 0.0], [2.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(np.abs(plane.coordinates) / scale, [[4, 0], [2, 1], [0, 0]], atol=1e-5)
    rise = analysis.sam_sharpness(lambda w: loss(w), ones, radius=1e-2)
    there = np.asarray(ones, float) + 1e-2 * np.asarray(values, float) / size
    np.testing.assert_allclose(rise / scale, 0.5 * (np.asarray(values) * (there**2 - 1)).sum(), rtol=1e-3)
    invariance = analysis.scale_invariance(lambda w: scale * w.sum(), jnp.full((4, 2), scale))
    np.testing.assert_allclose(invariance.cosine, 1, rtol=1e-5)
