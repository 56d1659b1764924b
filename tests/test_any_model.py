"""Measurements of any model: parts by patterns, adapters, Equinox, several inputs, tokens, and large vocabularies."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree

from bnjax import analysis, training
from bnjax.analysis import losses

KEY = jax.random.key(0)


def dense(operator):
    """All columns of an operator."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, operator.like))
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(operator(unravel(v)))[0]))(jnp.eye(flat.size))
    return np.asarray(columns).T


def dense_hessian(loss, params):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(flat))


PARTS = {
    "block_0": {"query": {"kernel": jnp.array([1.0, 2.0])}, "out": {"kernel": jnp.array([3.0])}},
    "block_1": {"query": {"kernel": jnp.array([4.0])}, "query_norm": {"scale": jnp.array([5.0])}},
}


class TestPatterns:
    @staticmethod
    def loss(params):
        return sum((leaf**3).sum() for leaf in jax.tree.leaves(params)) / 3

    @pytest.mark.parametrize(
        ("pattern", "paths"),
        [
            ("*/query", ["block_0/query/kernel", "block_1/query/kernel"]),
            ("*query*", ["block_0/query/kernel", "block_1/query/kernel", "block_1/query_norm/scale"]),
            ("block_?", ["block_0/out/kernel", "block_0/query/kernel", "block_1/query/kernel"]),
            ("block_[0]/*/kernel", ["block_0/out/kernel", "block_0/query/kernel"]),
            ("*/block_1/query", ["block_1/query/kernel"]),
            ("block_1", ["block_1/query/kernel", "block_1/query_norm/scale"]),
        ],
    )
    def test_parts(self, pattern, paths):
        _, parts = analysis.restrict(self.loss, PARTS, [pattern])
        assert sorted(parts) == sorted({*paths, *(["block_1/query_norm/scale"] if pattern == "block_?" else [])})
        operator = analysis.hessian_operator(self.loss, PARTS).restrict([pattern])
        chex.assert_trees_all_close(operator(jax.tree.map(jnp.ones_like, parts)), jax.tree.map(lambda p: 2 * p, parts))
        norms = analysis.gradient_norms(self.loss, PARTS, layers=[pattern])
        np.testing.assert_allclose(norms[pattern], np.linalg.norm(np.concatenate(jax.tree.leaves(parts)) ** 2))

    def test_patterns_that_overlap_or_name_nothing(self):
        with pytest.raises(ValueError, match=r"nothing is at '\*/key'"):
            analysis.restrict(self.loss, PARTS, ["*/key"])
        with pytest.raises(ValueError, match="block_1/query/kernel is in two"):
            analysis.restrict(self.loss, PARTS, ["*/query", "block_1"])


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
        self.outer = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


@pytest.mark.exhaustive
def test_adapters_of_low_rank_alone(x64):
    model = Adapted(nnx.Rngs(0))
    loss, params = losses.nnx_loss(model, training.cross_entropy)
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape, jnp.float64), params)
    x, y = jax.random.normal(KEY, (8, 3), jnp.float64), jnp.arange(8) % 2
    of_adapter, adapter = analysis.restrict(loss, params, ["*/lora_?"])
    assert {path: leaf.shape for path, leaf in adapter.items()} == {
        "inner/lora/lora_a": (3, 2),
        "inner/lora/lora_b": (2, 4),
    }
    expected = dense_hessian(lambda p: of_adapter(p, x, y), adapter)
    np.testing.assert_allclose(dense(analysis.hessian_operator(of_adapter, adapter, x, y)), expected, atol=1e-12)
    found = jax.jit(lambda p: analysis.hessian_eigenpairs(of_adapter, p, 2, x, y, key=KEY, which="both").values)(
        adapter
    )
    np.testing.assert_allclose(found, np.linalg.eigvalsh(expected)[[-1, 0]], rtol=1e-6)


def test_equinox_modules(x64):
    eqx = pytest.importorskip("equinox", reason="needs the extra 'peers'")
    model = eqx.nn.MLP(3, 2, 5, 1, activation=jnp.tanh, key=KEY, dtype=jnp.float64)
    x, y = jax.random.normal(KEY, (8, 3)), jnp.arange(8) % 2

    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(arrays)
    expected = jax.hessian(lambda w: loss(eqx.combine(unravel(w), rest), x, y))(flat)
    found = analysis.hessian_eigenpairs(loss, model, 2, x, y, key=KEY)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(expected)[-2:][::-1], rtol=1e-6)
    norms = analysis.gradient_norms(loss, model, x, y, layers=["layers/0", "layers/1/bias"])
    gradient = eqx.filter_grad(loss)(model, x, y).layers
    np.testing.assert_allclose(norms["layers/0"], np.linalg.norm(ravel_pytree(gradient[0])[0]), rtol=1e-12)
    np.testing.assert_allclose(norms["layers/1/bias"], np.linalg.norm(gradient[1].bias), rtol=1e-12)
    probe = analysis.gradient_probe(loss, model, jnp.array([0.1]), x, y)
    there = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, eqx.filter_grad(loss)(model, x, y)))
    np.testing.assert_allclose(probe.loss[0], loss(there, x, y), rtol=1e-12)
    direction = analysis.random_direction(KEY, model)
    assert direction.activation is None or not jax.tree.leaves(direction.activation)
    surface = analysis.loss_surface(loss, model, (direction,), jnp.zeros(2), x, y)
    np.testing.assert_allclose(surface, loss(model, x, y), rtol=1e-12)
    np.testing.assert_array_equal(analysis.loss_surface(loss, model, direction, jnp.zeros(2), x, y), surface)
    assert list(analysis.gradient_norms(loss, model, x, y)) == ["layers"]  # and not the activation function


class Transformer(nn.Module):
    """A small one with layer norm, of two inputs: tokens and their kinds."""

    vocabulary: int = 11
    with_head: bool = True

    @nn.compact
    def __call__(self, tokens, kinds):
        x = nn.Embed(self.vocabulary, 8)(tokens) + nn.Embed(2, 8)(kinds)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y, mask=nn.make_causal_mask(tokens))
        x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))))
        return nn.Dense(self.vocabulary, name="head")(x) if self.with_head else x


TOKENS, KINDS = jnp.arange(24).reshape((4, 6)) * 7 % 11, jnp.arange(24).reshape((4, 6)) % 2
LABELS = (TOKENS + 3) % 11


@pytest.mark.exhaustive
def test_losses_over_tokens_of_a_transformer_with_several_inputs():
    model = Transformer()
    variables = model.init(KEY, TOKENS, KINDS)
    params = variables["params"]
    loss = losses.linen_loss(model, variables, training.cross_entropy, argument=None)
    batch = (TOKENS, KINDS), LABELS
    logits = model.apply(variables, TOKENS, KINDS)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    np.testing.assert_allclose(loss(params, *batch), expected, rtol=1e-6)
    weights = jnp.arange(24.0).reshape((4, 6)) % 3
    of_tokens = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    np.testing.assert_allclose(loss(params, *batch, weights), (weights * of_tokens).sum() / weights.sum(), rtol=1e-5)
    probe = jax.jit(functools.partial(analysis.gradient_probe, loss))(params, jnp.array([0.1]), *batch)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, *batch))
    np.testing.assert_allclose(probe.loss[0], loss(moved, *batch), rtol=1e-5)
    layers = losses.layers_in_order(model, variables, (TOKENS, KINDS), argument=None)
    assert layers[-1] == ("head",) and layers[0][0].startswith("Embed")
    attention = "MultiHeadDotProductAttention_0"
    invariance = analysis.scale_invariance(
        loss, params, *batch, layers=[f"{attention}/{n}/kernel" for n in ("key", "out")]
    )
    assert (invariance.weight_norm > 0).all() and (invariance.cosine <= 1).all()


@pytest.mark.by_default(2)
@pytest.mark.parametrize("chunk_size", [1, 5, 24, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunked_cross_entropy_and_its_derivatives(x64, chunk_size, has_bias):
    rng = np.random.default_rng(0)
    tree = {"h": rng.normal(size=(4, 6, 3)), "kernel": rng.normal(size=(3, 11))}
    tree |= {"bias": rng.normal(size=11)} if has_bias else {}
    tree, vector = (jax.tree.map(jnp.asarray, t) for t in (tree, jax.tree.map(np.cos, tree)))
    weights = jnp.asarray(rng.uniform(size=(4, 6)))

    def chunked(tree):
        found = analysis.chunked_cross_entropy(
            tree["h"], tree["kernel"], LABELS, bias=tree.get("bias"), chunk_size=chunk_size
        )
        chex.assert_shape(found, (4, 6))
        return (weights * found).sum()

    def plain(tree):
        logits = tree["h"] @ tree["kernel"] + tree.get("bias", jnp.zeros(11))[None, None]
        return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)).sum()

    for of in (
        lambda f: f(tree),
        lambda f: jax.grad(f)(tree),
        lambda f: jax.jvp(jax.grad(f), (tree,), (vector,))[1],
        lambda f: jax.grad(lambda t: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, jax.grad(f)(t), vector)))(tree),
    ):
        chex.assert_trees_all_close(jax.jit(lambda of=of: of(chunked))(), of(plain), rtol=1e-10, atol=1e-13)


def test_unknown_labels_are_nan_and_half_precision_sums_in_float32():
    h, kernel = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((2, 2000), jnp.bfloat16)
    found = analysis.chunked_cross_entropy(h, kernel, jnp.array([0, -100, 2000]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], np.log(2000), rtol=1e-6)
    assert np.isnan(found[1:]).all()
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        analysis.chunked_cross_entropy(h, kernel, jnp.array([0, 1, 2]), chunk_size=0)


def features(params, tokens, kinds):
    return Transformer(with_head=False).apply(
        {"params": {k: v for k, v in params.items() if k != "head"}}, tokens, kinds
    )


def head(params, features):
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("chunk_size", [1, 7, 24, 100])
@pytest.mark.parametrize("distribution", ["categorical", "normal"])
def test_fisher_matrices_with_a_head_in_chunks(x64, distribution, chunk_size):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), Transformer().init(KEY, TOKENS, KINDS)["params"])
    weights = lambda tokens, kinds: jnp.arange(24.0).reshape((4, 6)) % 3
    options = {"distribution": distribution, "weights": weights}
    whole = analysis.fisher_operator(
        lambda p, tokens, kinds: Transformer().apply({"params": p}, tokens, kinds), params, TOKENS, KINDS, **options
    )
    chunked = analysis.fisher_operator(features, params, TOKENS, KINDS, head=head, chunk_size=chunk_size, **options)
    vector = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    chex.assert_trees_all_close(jax.jit(chunked)(vector), jax.jit(whole)(vector), rtol=1e-9, atol=1e-12)


def test_a_head_that_normalizes_is_not_given_zeros():
    def normalized(params, h):
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True) @ params["head"]["kernel"]

    params = {"w": jnp.eye(3), "head": {"kernel": jnp.eye(3, 4)}}
    x = 1 + jnp.arange(15.0).reshape((5, 3))
    chunked = analysis.fisher_operator(lambda p: x @ p["w"], params, head=normalized, chunk_size=2)
    whole = analysis.fisher_operator(lambda p: normalized(p, x @ p["w"]), params)
    np.testing.assert_allclose(dense(chunked), dense(whole), atol=1e-6)


def test_sampled_fisher_matrices_with_a_head_have_the_exact_one_as_their_mean():
    params = {"w": jnp.array([[1.0, -1.0, 0.5]]), "head": {"kernel": jnp.eye(3, 4), "bias": jnp.zeros(4)}}
    x = jnp.linspace(-1, 1, 5)[:, None]
    make = functools.partial(
        analysis.fisher_operator, lambda p, x: jnp.tanh(x @ p["w"]), params, x, head=head, chunk_size=2
    )
    exact = dense(make())
    sampled = dense(make(samples=20_000, key=KEY))
    np.testing.assert_allclose(sampled, exact, atol=4 * np.abs(exact).max() / np.sqrt(20_000))


@pytest.mark.exhaustive
def test_no_array_of_tokens_times_vocabulary_is_kept():
    """By the memory of the compiled programs of a gradient, a Hessian product and a Fisher product."""
    tokens, size, vocabulary = 1024, 16, 4096
    h, labels = jnp.ones((tokens, size)), jnp.arange(tokens)
    params = {"w": jnp.eye(size), "head": {"kernel": jnp.ones((size, vocabulary)), "bias": jnp.zeros(vocabulary)}}

    def loss(params):
        head = params["head"]
        return analysis.chunked_cross_entropy(h @ params["w"], head["kernel"], labels, bias=head["bias"]).mean()

    fisher = analysis.fisher_operator(lambda p: h @ p["w"], params, head=head)
    plain = analysis.fisher_operator(lambda p: head(p, h @ p["w"]), params)
    memory = {}
    for name, function in {
        "gradient": lambda v: jax.grad(loss)(v),
        "Hessian": analysis.hessian_operator(loss, params),
        "Fisher": fisher,
        "plain": plain,
    }.items():
        memory[name] = jax.jit(function).lower(params).compile().memory_analysis().temp_size_in_bytes
    array = 4 * tokens * vocabulary
    assert memory.pop("plain") > array
    assert max(memory.values()) < 0.6 * array, memory
