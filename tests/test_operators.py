"""Symmetric operators: against dense matrices, of batches and of data sets on the host and on the device."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from bnjax import analysis
from bnjax.training.checkpoint import Checkpoints

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 3)), RNG.integers(0, 4, 24)
WEIGHTS = RNG.uniform(0.5, 2, 24) * (np.arange(24) % 5 > 0)
PARAMS = {"first": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)}, "second": RNG.normal(size=(4, 4))}
SIZE = 32
PARTS = [slice(0, 10), slice(10, 14), slice(14, 24)]  # unequal batches


@pytest.fixture(autouse=True)
def in_float64(x64):
    """Everything here is in float64."""


def outputs(params, x, *_):
    return jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None]) @ params["second"]


def cross_entropies(z, y):
    return optax.softmax_cross_entropy_with_integer_labels(z, y)


def losses(params, x, y, *_):
    return cross_entropies(outputs(params, x), y)


def loss(params, x, y, weights=None):
    of_examples = losses(params, x, y)
    return of_examples.mean() if weights is None else (weights * of_examples).sum() / weights.sum()


def output_loss(z, x, y, weights=None):
    of_examples = cross_entropies(z, y)
    return of_examples.mean() if weights is None else (weights * of_examples).sum() / weights.sum()


def weights_of(x, y, weights=None):
    return jnp.ones(len(x)) if weights is None else weights


def dense_jacobian(function, *batch):
    w, unravel = ravel_pytree(PARAMS)
    return np.asarray(jax.jacobian(lambda w: function(unravel(w), *batch))(w))


def dense_hessian(*batch):
    w, unravel = ravel_pytree(PARAMS)
    return np.asarray(jax.hessian(lambda w: loss(unravel(w), *batch))(w))


def dense_fisher(weights):
    z, jacobian = np.asarray(outputs(PARAMS, X)), dense_jacobian(outputs, X)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    inner = np.eye(4) * p[:, None] - p[:, :, None] * p[:, None]
    return np.einsum("nij,nik,nkl,n->jl", jacobian, inner, jacobian, weights / weights.sum())


def dense_covariance(centered, weights):
    gradients, shares = dense_jacobian(losses, X, Y), weights / weights.sum()
    if centered:
        gradients = gradients - shares @ gradients
    return (gradients.T * shares) @ gradients


def dense(operator):
    """All columns of an operator, by products one by one."""
    unravel = ravel_pytree(PARAMS)[1]
    run = operator if operator.on_host else jax.jit(operator)
    return np.stack([ravel_pytree(run(unravel(v)))[0] for v in np.eye(SIZE)], 1)


MAKERS = {
    "Hessian": functools.partial(analysis.hessian_operator, loss, PARAMS),
    "Gauss-Newton": functools.partial(analysis.gauss_newton_operator, outputs, output_loss, PARAMS),
    "Fisher": functools.partial(analysis.fisher_operator, outputs, PARAMS),
    "covariance": functools.partial(analysis.gradient_covariance_operator, losses, PARAMS),
    "centered": functools.partial(analysis.gradient_covariance_operator, losses, PARAMS, centered=True),
}


def expected(kind, is_weighted):
    weights = WEIGHTS if is_weighted else np.ones(24)
    return {
        "Hessian": lambda: dense_hessian(X, Y, weights),
        "Gauss-Newton": lambda: dense_fisher(weights),
        "Fisher": lambda: dense_fisher(weights),
        "covariance": lambda: dense_covariance(False, weights),
        "centered": lambda: dense_covariance(True, weights),
    }[kind]()


@pytest.mark.by_default(1)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_operators_against_dense_matrices(kind, is_weighted):
    arrays = (X, Y, WEIGHTS) if is_weighted else (X, Y)
    options = {"weights": weights_of} if is_weighted else {}
    of_batch = {} if kind in ("Hessian", "Gauss-Newton") else options
    on_device = tuple(v.reshape((4, 6, *v.shape[1:])) for v in arrays)
    on_host = [tuple(v[part] for v in arrays) for part in PARTS]
    matrix = expected(kind, is_weighted)
    operators = {
        "one batch": MAKERS[kind](*arrays, **of_batch),
        "arrays": MAKERS[kind](batches=on_device, **options),
        "host": MAKERS[kind](batches=on_host, **options),
    }
    for name, operator in operators.items():
        assert operator.size == SIZE and operator.on_host is (name == "host")
        np.testing.assert_allclose(dense(operator), matrix, rtol=1e-9, atol=1e-12, err_msg=name)
        vectors = jax.vmap(ravel_pytree(PARAMS)[1])(jnp.eye(SIZE)[:3])
        several = jax.vmap(lambda tree: ravel_pytree(tree)[0])(operator.of_several(vectors))
        np.testing.assert_allclose(several, matrix[:3], rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_normal_distributions_fisher_matrix_is_that_of_half_squares():
    def half_squares(z, x):
        return 0.5 * jnp.square(z).sum(-1).mean()

    fisher = analysis.fisher_operator(outputs, PARAMS, X, distribution="normal")
    gauss_newton = analysis.gauss_newton_operator(outputs, half_squares, PARAMS, X)
    np.testing.assert_allclose(dense(fisher), dense(gauss_newton), rtol=1e-10, atol=1e-13)


@pytest.mark.exhaustive
@pytest.mark.parametrize("distribution", ["categorical", "normal"])
def test_a_sampled_fisher_matrix_has_the_exact_one_as_its_mean(distribution):
    make = functools.partial(analysis.fisher_operator, outputs, PARAMS, distribution=distribution)
    exact = dense(make(X))
    sampled = make(X, samples=4000, key=jax.random.key(0))
    found = dense(sampled)
    np.testing.assert_allclose(found, found.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, exact, atol=0.05 * abs(exact).max())
    few = [dense(make(X, samples=1, key=jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(few[0], few[1])
    assert abs(few[0] - few[2]).max() > 1e-3
    batches = [(X[part],) for part in PARTS]
    by_batch = dense(make(batches=batches, samples=4000, key=jax.random.key(0)))
    np.testing.assert_allclose(by_batch, exact, atol=0.05 * abs(exact).max())


@pytest.mark.parametrize(
    ("method", "tolerance"), [("forward over reverse", 1e-10), ("linearized", 1e-10), ("finite differences", 1e-3)]
)
def test_methods_of_hessian_products(method, tolerance):
    found = dense(analysis.hessian_operator(loss, PARAMS, X, Y, method=method))
    matrix = dense_hessian(X, Y)
    np.testing.assert_allclose(found, matrix, atol=tolerance * abs(matrix).max())


def test_finite_differences_need_no_second_derivative():
    @jax.custom_vjp
    def cube(w):
        return w**3

    cube.defvjp(lambda w: (cube(w), w), lambda w, g: (3 * jax.lax.stop_gradient(w) ** 2 * g,))
    find = functools.partial(analysis.hessian_operator, lambda w: cube(w).sum(), jnp.array([1.0, 2.0]))
    with pytest.raises(TypeError, match="custom_vjp"):
        find()(jnp.ones(2))
    np.testing.assert_allclose(find(method="finite differences")(jnp.ones(2)), [6, 12], rtol=1e-6)


def test_sums_shifts_blocks_and_inverses():
    hessian, fisher = MAKERS["Hessian"](X, Y), MAKERS["Fisher"](batches=[(X[p],) for p in PARTS])
    a, b = dense_hessian(X, Y), dense_fisher(np.ones(24))
    combined = 2 * hessian - (fisher * 0.5 + fisher).shifted(0.3)
    assert combined.on_host
    np.testing.assert_allclose(dense(combined), 2 * a - 1.5 * b - 0.3 * np.eye(SIZE), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dense(-hessian), -a, rtol=1e-9, atol=1e-12)
    block = fisher.restrict(["second", "first/bias"])
    assert block.on_host and set(block.like) == {"second", "first/bias"} and block.size == 20
    unravel = ravel_pytree(block.like)[1]
    found = np.stack([ravel_pytree(block(unravel(v)))[0] for v in np.eye(20)], 1)
    order = [*range(4), *range(16, 32)]  # the bias, and the second kernel
    np.testing.assert_allclose(found, b[np.ix_(order, order)], rtol=1e-9, atol=1e-12)
    vector = ravel_pytree(PARAMS)[1](RNG.normal(size=SIZE))
    for operator in (MAKERS["Fisher"](X), fisher):
        solved = ravel_pytree(operator.inverse(0.1, tolerance=1e-12)(vector))[0]
        np.testing.assert_allclose(solved, np.linalg.solve(b + 0.1 * np.eye(SIZE), ravel_pytree(vector)[0]), rtol=1e-8)


def test_what_is_not_solved_is_nan():
    indefinite = analysis.SymmetricOperator(lambda v: jnp.array([1.0, -1.0]) * v, jnp.zeros(2))
    assert jnp.isnan(indefinite.inverse()(jnp.ones(2))).all()
    many = analysis.SymmetricOperator(lambda v: jnp.linspace(1e-3, 1, 50) * v, jnp.zeros(50))
    assert jnp.isnan(many.inverse(max_products=5)(jnp.ones(50))).all()
    np.testing.assert_allclose(many.inverse()(jnp.ones(50)), 1 / np.linspace(1e-3, 1, 50), rtol=1e-3)
    assert (many.inverse()(jnp.zeros(50)) == 0).all()
    assert (many.inverse()(jnp.full(50, 1e300)) > 0.99e300).all()


@pytest.mark.parametrize("on_host", [False, True])
def test_scipys_operators(on_host):
    given = {"batches": [(X[p], Y[p]) for p in PARTS]} if on_host else {}
    operator = MAKERS["Hessian"](*(() if on_host else (X, Y)), **given).to_scipy()
    matrix, block = dense_hessian(X, Y), RNG.normal(size=(SIZE, 3))
    assert operator.shape == (SIZE, SIZE) and operator.dtype == np.float64
    np.testing.assert_allclose(operator @ block, matrix @ block, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(operator.T @ block[:, 0], matrix @ block[:, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(eigsh(operator, 2, which="LA")[0], np.linalg.eigvalsh(matrix)[-2:], rtol=1e-9)


class Reader:
    """A data set on the host that counts how often each batch is read."""

    def __init__(self, batches, most=None):
        self.batches, self.read, self.most = batches, 0, most

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.most:
                raise KeyboardInterrupt
            self.read += 1
            yield batch


@pytest.mark.exhaustive
def test_what_a_data_set_is_read_for():
    data, texts = Reader([(X[part], Y[part]) for part in PARTS]), []
    operator = MAKERS["Hessian"](batches=data, progress=texts.append)
    assert data.read == 0
    key = jax.random.key(0)
    found = analysis.trace(operator, key=key, num_samples=20)
    assert data.read == 3  # all probes at once
    assert texts == [f"pass 1 over the data: batch {i + 1}" for i in range(3)]
    np.testing.assert_allclose(
        found.samples, analysis.hessian_trace(loss, PARAMS, X, Y, key=key, num_samples=20).samples
    )
    few = analysis.trace(operator, key=key, num_samples=20, batch_size=8)
    assert data.read == 12 and texts[-1] == "pass 4 over the data: batch 3 of 3"
    np.testing.assert_allclose(few.samples, found.samples)
    pairs = analysis.eigenpairs(operator, 2, key=key)
    assert data.read == 12 + 3 * pairs.products
    data.read = 0
    density = analysis.spectral_density(operator, key=key, num_probes=3, num_steps=8)
    assert data.read == 24  # a step of all probes at once
    of_batch = analysis.spectral_density(loss, PARAMS, X, Y, key=key, num_probes=3, num_steps=8)
    np.testing.assert_allclose(density.nodes, of_batch.nodes, rtol=1e-7, atol=1e-9)
    diagonal = analysis.diagonal(operator, key=key, num_samples=2).estimate
    chex.assert_trees_all_close(
        diagonal, analysis.hessian_diagonal(loss, PARAMS, X, Y, key=key, num_samples=2), rtol=1e-9, atol=1e-12
    )


RESUMABLE = {
    "eigenpairs": lambda operator, **kept: analysis.eigenpairs(operator, 3, tolerance=1e-9, **kept),
    "density": lambda operator, **kept: analysis.spectral_density(operator, num_probes=2, num_steps=12, **kept),
    "trace": lambda operator, **kept: analysis.trace(operator, num_samples=11, batch_size=1, **kept),
    "norm": lambda operator, **kept: analysis.frobenius_norm(operator, num_samples=11, batch_size=1, **kept),
    "diagonal": lambda operator, **kept: analysis.diagonal(operator, num_samples=11, batch_size=1, **kept),
    "Hutch++": lambda operator, **kept: analysis.trace(operator, num_samples=10, method="hutch++", **kept),
    "XTrace": lambda operator, **kept: analysis.trace(operator, num_samples=10, method="xtrace", **kept),
    "XDiag": lambda operator, **kept: analysis.diagonal(operator, num_samples=10, method="xdiag", **kept),
}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("what", RESUMABLE)
def test_an_interrupted_measurement_goes_on(tmp_path, what):
    def run(data, resumed=True):
        operator = MAKERS["Hessian"](batches=data)
        with Checkpoints(tmp_path, {"what": what}, every=0) as checkpoints:
            return RESUMABLE[what](operator, key=jax.random.key(0), checkpoints=checkpoints if resumed else None)

    batches = [(X[part], Y[part]) for part in PARTS]
    counted = Reader(batches)
    expected = run(counted, resumed=False)
    before = 1 if counted.read == 6 else 6  # whole passes before the interruption
    with pytest.raises(KeyboardInterrupt):
        run(Reader(batches, most=3 * before + 2))
    rest = Reader(batches)
    found = run(rest)
    assert rest.read == counted.read - 3 * before
    chex.assert_trees_all_equal(found, expected)
    done = Reader(batches)
    chex.assert_trees_all_equal(run(done), expected)
    assert done.read == 0


def test_an_interrupted_inverse_goes_on_and_refuses_another_vector(tmp_path):
    batches = [(X[part], Y[part]) for part in PARTS]
    ones = jax.tree.map(jnp.ones_like, PARAMS)

    def solve(data, vector, checkpoints=None):
        return MAKERS["Fisher"](batches=data).inverse(0.1, tolerance=1e-9, checkpoints=checkpoints)(vector)

    counted = Reader(batches)
    expected = solve(counted, ones)
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, {}, every=0) as checkpoints:
        solve(Reader(batches, most=3 * 4 + 1), ones, checkpoints)
    rest = Reader(batches)
    with Checkpoints(tmp_path, {}, every=0) as checkpoints:
        chex.assert_trees_all_equal(solve(rest, ones, checkpoints), expected)
        assert rest.read == counted.read - 3 * 4
        with pytest.raises(ValueError, match="checkpoints must be of the same measurement"):
            solve(batches, jax.tree.map(lambda v: 2 * v, ones), checkpoints)
        with pytest.raises(ValueError, match="checkpoints are for operators that read batches on the host"):
            MAKERS["Fisher"](X, Y).inverse(0.1, checkpoints=checkpoints)(ones)


@pytest.mark.parametrize("change", ["batch_size", "key", "measurement"])
def test_the_state_of_another_measurement_is_refused(tmp_path, change):
    def run(measure=analysis.trace, seed=0, **options):
        data = Reader([(X[part], Y[part]) for part in PARTS], most=4 if not options and seed == 0 else None)
        with Checkpoints(tmp_path, {}, every=0) as checkpoints:
            operator = MAKERS["Hessian"](batches=data)
            how = {"num_samples": 20, "batch_size": 5, "key": jax.random.key(seed), **options}
            return measure(operator, checkpoints=checkpoints, **how)

    with pytest.raises(KeyboardInterrupt):
        run()
    other = {"batch_size": {"batch_size": 10}, "key": {"seed": 1}, "measurement": {"measure": analysis.frobenius_norm}}
    with pytest.raises(ValueError, match="checkpoints must be of the same measurement"):
        run(**other[change])


@pytest.mark.exhaustive
def test_a_tighter_tolerance_goes_on_from_a_checkpoint(tmp_path):
    values = jnp.asarray(RNG.normal(size=100))
    operator = analysis.SymmetricOperator(lambda v: values * v, jnp.zeros(100), on_host=True)
    find = functools.partial(analysis.eigenpairs, operator, 1, key=jax.random.key(0))
    for options in ({"tolerance": 1e-1}, {"tolerance": 1e-8, "max_products": 12}, {"tolerance": 1e-8}):
        with Checkpoints(tmp_path, {}, every=0) as checkpoints:
            found = find(checkpoints=checkpoints, **options)
    at_once = find(tolerance=1e-8)
    assert found.products == at_once.products
    np.testing.assert_array_equal(found.values, at_once.values)


def test_blocks_of_an_operator_read_the_data_once_for_several_vectors():
    data = Reader([(X[part], Y[part]) for part in PARTS])
    block = MAKERS["Hessian"](batches=data).restrict(["first"])
    found = analysis.trace(block, key=jax.random.key(0), num_samples=9)
    assert data.read == 3
    of_block = analysis.trace(MAKERS["Hessian"](X, Y).restrict(["first"]), key=jax.random.key(0), num_samples=9)
    np.testing.assert_allclose(found.samples, of_block.samples)


def test_checkpoints_are_for_the_host(tmp_path):
    operator = MAKERS["Hessian"](X, Y)
    with Checkpoints(tmp_path, {}, every=0) as checkpoints:
        for run in RESUMABLE.values():
            with pytest.raises(ValueError, match="checkpoints are for operators that read batches on the host"):
                run(operator, key=jax.random.key(0), checkpoints=checkpoints)


def test_memory_does_not_grow_with_the_number_of_batches():
    def memory(count, batches):
        x, y = jnp.zeros((count, 64, 3)), jnp.zeros((count, 64), int)

        def product(vector, *arrays):
            given = {"batches": arrays} if batches else {}
            flat = [v.reshape((-1, *v.shape[2:])) for v in arrays]
            return MAKERS["Hessian"](*([] if batches else flat), **given)(vector)

        return jax.jit(product).lower(PARAMS, x, y).compile().memory_analysis().temp_size_in_bytes

    assert memory(64, True) < 1.1 * memory(4, True)
    assert memory(64, False) > 8 * memory(4, False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("k", [5, 10, 20])
@pytest.mark.parametrize("which", ["largest", "magnitude", "both", "smallest"])
@pytest.mark.parametrize("kind", ["clusters", "geometric", "indefinite", "outliers", "network", "trained network"])
def test_no_more_products_than_arpack(kind, which, k, tolerance):
    """From the same first vector: ARPACK forgets more when it restarts, and looks only then whether it is done."""
    rng, size = np.random.default_rng(1), 400
    if kind.endswith("network"):
        values = of_network(steps=300 if kind == "trained network" else 0)
        size = len(values)
    else:
        values = spectrum(kind, rng, size)
    start, count = rng.normal(size=size), 0

    def product(v):
        nonlocal count
        count += 1
        return values * v.ravel()

    name = {"largest": "LA", "smallest": "SA", "both": "BE", "magnitude": "LM"}[which]
    arpack, _ = eigsh(LinearOperator((size, size), product, dtype=float), k, which=name, tol=tolerance, v0=start)
    operator = analysis.SymmetricOperator(lambda v: jnp.asarray(values) * v, jnp.zeros(size))
    found = find(operator, k, which, tolerance, start)
    assert found.products <= count
    found = jax.device_get(found)
    residuals = np.linalg.norm(values * found.vectors - found.vectors * found.values[:, None], axis=1)
    np.testing.assert_allclose(residuals, found.residuals, rtol=1e-3, atol=1e-12)
    assert (residuals <= tolerance * abs(found.values)).all()
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(k), atol=1e-11)
    if tolerance == 1e-6:
        np.testing.assert_allclose(np.sort(found.values), np.sort(arpack), rtol=1e-9)


def spectrum(kind, rng, size):
    return {
        "clusters": np.concatenate(
            [np.repeat([10, 9.5, 9, -8.5], 5) + 1e-2 * rng.normal(size=20), rng.uniform(-1, 1, size - 20)]
        ),
        "geometric": 0.8 ** np.arange(size) - 0.5 * 0.8 ** np.arange(size)[::-1],
        "indefinite": rng.normal(size=size),
        "outliers": np.concatenate([[30, 20, 15, 10, 9, 8, -7, -5], 0.1 * rng.standard_t(3, size - 8)]),
    }[kind]


@functools.cache
def of_network(steps):
    """Eigenvalues of the Hessian of a network with batch norm, at its start or after gradient descent."""
    rng = np.random.default_rng(2)
    x, y = jnp.asarray(rng.normal(size=(64, 10))), jnp.asarray(rng.integers(0, 8, 64))
    w, unravel = ravel_pytree({"a": rng.normal(size=(10, 20)), "b": rng.normal(size=(20, 8)) / 4, "bias": np.zeros(28)})

    def of_vector(w):
        w = unravel(w)
        z = x @ w["a"]
        z = jax.nn.relu((z - z.mean(0)[None]) / jnp.sqrt(z.var(0) + 1e-5)[None] + w["bias"][None, :20])
        return cross_entropies(z @ w["b"] + w["bias"][None, 20:], y).mean()

    descend = jax.jit(lambda w: jax.lax.fori_loop(0, steps, lambda _, w: w - 0.1 * jax.grad(of_vector)(w), w))
    return np.linalg.eigvalsh(jax.jit(jax.hessian(of_vector))(descend(w)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def find(operator, k, which, tolerance, start):
    options = {"key": jax.random.key(0), "which": which, "tolerance": tolerance}
    return analysis.eigenpairs(operator, k, start=start[None], **options)


@pytest.mark.exhaustive
def test_a_result_can_be_gone_on_from():
    values = jnp.asarray(RNG.normal(size=300))
    operator = analysis.SymmetricOperator(lambda v: values * v, jnp.zeros(300))
    run = functools.partial(analysis.eigenpairs, operator, 4, key=jax.random.key(0))
    coarse = run(tolerance=1e-2, return_state=True)
    assert run().state is None
    fine, at_once = run(tolerance=1e-8, state=coarse.state), run(tolerance=1e-8)
    np.testing.assert_array_equal(fine.values, at_once.values)
    assert coarse.products < fine.products == at_once.products
    warm = run(tolerance=1e-6, start=coarse.vectors)
    assert warm.products < run(tolerance=1e-6).products
    np.testing.assert_allclose(warm.values, at_once.values, rtol=1e-9)
    stopped = run(tolerance=1e-8, max_products=25)
    assert stopped.products == 25 and (stopped.residuals[-1] > 1e-4)


@pytest.mark.exhaustive
def test_which_ends():
    operator = analysis.SymmetricOperator(lambda v: jnp.arange(-3.0, 60.0) * v, jnp.zeros(63))
    find = functools.partial(analysis.eigenpairs, operator, 5, key=jax.random.key(0), tolerance=1e-9)
    for which, values in {
        "largest": [59, 58, 57, 56, 55],
        "smallest": [-3, -2, -1, 0, 1],
        "both": [59, -3, 58, -2, 57],
        "magnitude": [59, 58, 57, 56, 55],
    }.items():
        np.testing.assert_allclose(find(which=which).values, values, atol=1e-9)


def test_parameters_may_hold_what_is_no_number():
    """As modules of Equinox do, which hold their activation functions."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        weight: object
        function: object
        count: object

    module = Module(jnp.array([1.0, 2.0]), jnp.tanh, 3)
    product = analysis.hessian_operator(lambda m: (m.weight**m.count).sum(), module)
    vector = Module(jnp.ones(2), None, None)
    np.testing.assert_allclose(product(vector).weight, [6, 12])
    assert product.size == 2


def test_bfloat16_parameters_have_products_in_float32():
    params = jnp.ones(64, jnp.bfloat16)
    scale = jnp.linspace(1, 2, 64, dtype=jnp.float32)
    operator = analysis.hessian_operator(lambda w: (0.5 * scale * w.astype(jnp.float32) ** 2).sum(), params)
    pairs = analysis.eigenpairs(operator, 1, key=jax.random.key(0), which="largest", tolerance=0.05)
    assert pairs.values.dtype == pairs.vectors.dtype == jnp.float32
    np.testing.assert_allclose(pairs.values, 2, rtol=2e-2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MAKERS["Hessian"](batches=iter([(X, Y)])), TypeError, "again and again"),
        (lambda: MAKERS["Hessian"](X, Y, batches=[(X, Y)]), TypeError, "not both"),
        (lambda: MAKERS["Hessian"](batches=[])(PARAMS), ValueError, "at least one batch"),
        (lambda: MAKERS["Hessian"](X, Y, method="exact"), ValueError, "method must be one of"),
        (lambda: MAKERS["Hessian"](batches=[(X, Y)], method="linearized"), ValueError, "not for data sets"),
        (lambda: MAKERS["Hessian"](batches=(X, Y[:3]))(PARAMS), ValueError, "same number of batches"),
        (lambda: MAKERS["Hessian"](X, Y)({"first": 1.0}), ValueError, "vector must have the structure"),
        (lambda: MAKERS["Fisher"](X, distribution="poisson"), ValueError, "'categorical' or 'normal'"),
        (lambda: MAKERS["Fisher"](X, samples=3), ValueError, "samples and key"),
        (lambda: MAKERS["Fisher"](X, samples=0, key=jax.random.key(0)), ValueError, "at least 1"),
        (lambda: MAKERS["Fisher"](X).inverse(tolerance=0.0), ValueError, "must be positive"),
        (lambda: analysis.gradient_covariance_operator(loss, PARAMS, X, Y)(PARAMS), TypeError, "array of the examples"),
        (
            lambda: analysis.hessian_operator(lambda w, x: w * x, 1.0, batches=[2.0])(1.0),
            ValueError,
            "array of examples",
        ),
        (lambda: MAKERS["Hessian"](X, Y) + analysis.SymmetricOperator(abs, 1.0), ValueError, "structure"),
        (lambda: find_with(subspace=3), ValueError, "subspace must be"),
        (lambda: find_with(tolerance=1.0), ValueError, "tolerance must be"),
        (lambda: find_with(max_products=2), ValueError, "max_products must be"),
        (lambda: find_with(block_size=30), ValueError, "block_size must be"),
        (lambda: find_with(start=jnp.ones(32)), ValueError, "start must have"),
        (lambda: find_with(checkpoints=Checkpoints), ValueError, "checkpoints are for operators"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def find_with(**options):
    return analysis.eigenpairs(MAKERS["Hessian"](X, Y), 3, key=jax.random.key(0), **options)
