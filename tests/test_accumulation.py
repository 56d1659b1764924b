"""Micro-batches move the statistics once, as the whole batch does, however the layers are composed by Flax."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import training
from bnjax.linen import BatchNorm, SplitBatchNorm

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(2, 3, (12, 4)).astype(np.float32)
Y = np.arange(12) % 3


class Block(nn.Module):
    training: bool
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, _=None):
        norm = BatchNorm(use_running_average=not self.training, momentum=self.momentum, bessel_correction=True)
        return jnp.tanh(norm(nn.Dense(4)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return nn.Dense(3)(layers(training)(x, None)[0])


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.vmap(Block, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return nn.Dense(3)(layers(training)(x)[0].mean(0))


class OfScans(nn.Module):
    """A scan of two layers, mapped three times."""

    @nn.compact
    def __call__(self, x, *, training):
        axes = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2, in_axes=nn.broadcast)
        mapped = nn.vmap(scanned, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return nn.Dense(3)(mapped(training)(x, None)[0].mean(0))


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        return nn.Dense(3)(nn.remat(Block)(training)(x)[0])


class Compiled(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        return nn.Dense(3)(nn.jit(Block)(training)(x)[0])


class Twice(nn.Module):
    """A layer that is called twice, and so moves twice."""

    @nn.compact
    def __call__(self, x, *, training):
        norm = BatchNorm(use_running_average=not training, momentum=0.9)
        return nn.Dense(3)(jnp.tanh(norm(x)) + norm(2 * x + 1))


class Computed(nn.Module):
    """A momentum that the module computes in its call, from the statistics of its input."""

    @nn.compact
    def __call__(self, x, *, training):
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        norm = BatchNorm(use_running_average=not training, momentum=count.value / (count.value + 1))
        return nn.Dense(3)(norm(x))


class Kinds(nn.Module):
    @nn.compact
    def __call__(self, x, *, training):
        norm = SplitBatchNorm(num_splits=2, use_running_average=not training, momentum=0.9)
        return nn.Dense(3)(norm(x, split=1))


MODELS = [Scanned, OfScans, Compiled, Twice, Computed, Kinds]
MODELS += [pytest.param(model, marks=pytest.mark.exhaustive) for model in (Vmapped, Rematerialized)]


@pytest.mark.by_default(1)
@pytest.mark.parametrize("model", MODELS)
def test_statistics_are_those_of_the_batch_in_one(model):
    """Layers that see the whole batch's input see it in micro-batches too; those behind see it normalized otherwise."""
    state = training.create_train_state(model(), optax.sgd(0.1), KEY, X)
    taken = {}
    for steps in (1, 3):
        step = jax.jit(
            lambda state, steps=steps: training.train_step(
                state, X, Y, objective=training.cross_entropy, accumulate_steps=steps
            )
        )
        taken[steps] = step(state)[0]
    one, three = (dict(taken[steps].batch_stats) for steps in (1, 3))
    chex.assert_trees_all_equal_structs(one, three)
    if model is Twice or model is Kinds or model is Computed:
        chex.assert_trees_all_close(one, three, rtol=1e-5, atol=1e-6)
        return
    first = lambda stats: jax.tree.map(lambda v: v.reshape((-1, 4))[0], stats)  # of the first layer in a row
    chex.assert_trees_all_close(first(one), first(three), rtol=1e-5, atol=1e-6)


class LastAxis(nn.Module):
    """A scan of as many layers as there are features, along the last axis of the statistics."""

    @nn.compact
    def __call__(self, x, *, training):
        axes = {"params": 0, "batch_stats": -1}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=4)
        return nn.Dense(3)(layers(training)(x, None)[0])


class MiddleAxis(nn.Module):
    """Mapped layers, along the second axis of the statistics of a scan."""

    @nn.compact
    def __call__(self, x, *, training):
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
            in_axes=nn.broadcast,
        )
        axes = {"params": 0, "batch_stats": 1}
        mapped = nn.vmap(scanned, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return nn.Dense(3)(mapped(training)(x, None)[0].mean(0))


class OfFour(nn.Module):
    """A scan of as many layers as there are features."""

    @nn.compact
    def __call__(self, x, *, training):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=4)
        return nn.Dense(3)(layers(training)(x, None)[0])


@pytest.mark.by_default(1)
@pytest.mark.parametrize(("model", "same", "axis"), [(LastAxis, OfFour, -1), (MiddleAxis, OfScans, 1)])
def test_statistics_may_lie_along_any_axis_of_a_transform(model, same, axis):
    state, other = (training.create_train_state(kind(), optax.sgd(0.1), KEY, X) for kind in (model, same))
    other = other.replace(params=jax.tree.unflatten(jax.tree.structure(other.params), jax.tree.leaves(state.params)))
    take = lambda state: training.train_step(state, X, Y, objective=training.cross_entropy, accumulate_steps=3)[0]
    found, expected = (jax.tree.leaves(take(s).batch_stats) for s in (state, other))
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(jnp.moveaxis(one, axis, 0), two, rtol=1e-5, atol=1e-6)


class Carried(nn.Module):
    """A layer whose statistics a scan carries."""

    @nn.compact
    def __call__(self, x, *, training):
        norm = BatchNorm(use_running_average=not training)
        if self.is_initializing():
            norm(x)
        shared = {"variable_broadcast": "params", "variable_carry": "batch_stats", "split_rngs": {"params": False}}
        scanned = nn.scan(lambda norm, x, _: (norm(x), None), length=2, **shared)
        return nn.Dense(3)(scanned(norm, x, None)[0])


def test_statistics_that_a_loop_carries_are_a_clear_error():
    state = training.create_train_state(Carried(), optax.sgd(0.1), KEY, X)
    training.train_step(state, X, Y, objective=training.cross_entropy)
    with pytest.raises(ValueError, match=r"accumulate_steps keeps the moments .* where a loop carries"):
        training.train_step(state, X, Y, objective=training.cross_entropy, accumulate_steps=3)


@pytest.mark.exhaustive
def test_nothing_leaks():
    state = training.create_train_state(Computed(), optax.sgd(0.1), KEY, X)
    with jax.checking_leaks():
        jax.eval_shape(
            lambda state: training.train_step(state, X, Y, objective=training.cross_entropy, accumulate_steps=3), state
        )


def test_every_scanned_layer_moves_by_the_merged_moments_of_its_own_input():
    """As the same layers without the scan, in micro-batches."""

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x, *, training):
            for i in range(3):
                x, _ = Block(training, name=f"b{i}")(x)
            return nn.Dense(3)(x)

    scanned = training.create_train_state(Scanned(), optax.sgd(0.1), KEY, X)
    parts = {
        name: {f"b{i}": jax.tree.map(lambda v, i=i: v[i], tree["ScanBlock_0"]) for i in range(3)}
        for name, tree in (("params", scanned.params), ("batch_stats", scanned.batch_stats))
    }
    parts["params"]["Dense_0"] = scanned.params["Dense_0"]
    unrolled = training.TrainState.create(apply_fn=Unrolled().apply, tx=optax.sgd(0.1), **parts)
    got, expected = (
        training.train_step(state, X, Y, objective=training.cross_entropy, accumulate_steps=3)[0]
        for state in (scanned, unrolled)
    )
    for i in range(3):
        of = jax.tree.map(lambda v, i=i: v[i], (got.params["ScanBlock_0"], got.batch_stats["ScanBlock_0"]))
        wanted = expected.params[f"b{i}"], expected.batch_stats[f"b{i}"]
        chex.assert_trees_all_close(of, wanted, rtol=1e-4, atol=1e-6)
