"""What the compiled programs of the key functions hold: a guard against losing speed that needs no timer.

Counted in the programs that XLA makes for the CPU: arrays of the input's size that are written, collectives, temporary
memory, traces and transfers. What TPU's compiler makes, where it is installed, tests/test_ahead_of_time.py counts.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import operations

from bnjax import batch_norm, init_batch_norm, models, moments, save_batch_norm_inputs, training
from bnjax._compat import as_varying
from bnjax.linen import BatchNorm
from bnjax.training import _hlo
from bnjax.training.ahead_of_time import collectives

pytestmark = pytest.mark.core

SHAPE = (64, 8, 8, 32)
SIZE = int(np.prod(SHAPE))
X = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
PARAMS, STATS = jax.eval_shape(functools.partial(init_batch_norm, SHAPE[-1]))
MASK = jax.ShapeDtypeStruct((SHAPE[0], 1, 1), bool)


def forward(x, params, stats, mask=None, **options):
    return batch_norm(x, params, stats, training=True, mask=mask, **options)


def forward_and_backward(x, params, stats, g, mask=None, **options):
    f = lambda x, params: forward(x, params, stats, mask, **options)
    y, vjp, stats = jax.vjp(f, x, params, has_aux=True)
    return y, stats, vjp(g)


def written(compiled) -> int:
    """Arrays of the input's size that a program writes, those within loops and branches too."""
    program = _hlo.parse(compiled.as_text())
    inside_fusions = {name for c in program.computations.values() for i in c.values() for name in i.called("calls")}
    arrays = 0
    for name, computation in program.computations.items():
        if name not in inside_fusions:
            for one in computation.values():
                if one.opcode not in ("parameter", "bitcast", "tuple", "get-tuple-element"):
                    arrays += sum(np.prod(shape.dims, dtype=int) >= SIZE for shape in one.outputs)
    return arrays


@pytest.mark.parametrize(("f", "arrays"), [(forward, 1), (forward_and_backward, 2)])
def test_nothing_of_the_inputs_size_is_written_but_the_results(f, arrays):
    compiled = jax.jit(f).lower(X, PARAMS, STATS, *(X,) * (arrays - 1)).compile()
    assert written(compiled) == arrays
    assert compiled.memory_analysis().temp_size_in_bytes < SIZE


@pytest.mark.parametrize(("f", "arrays"), [(forward, 1), (forward_and_backward, 2)])
def test_what_is_written_under_a_mask(f, arrays):
    """XLA's sums on CPU read arrays only: what a mask selects is written for each, and once more in a branch."""
    compiled = jax.jit(f).lower(X, PARAMS, STATS, *(X,) * (arrays - 1), MASK).compile()
    assert written(compiled) <= arrays + 4 + (arrays == 2)
    assert compiled.memory_analysis().temp_size_in_bytes <= 4.1 * SIZE


def test_inference_is_one_pass_without_any_sum():
    compiled = jax.jit(lambda *args: batch_norm(*args, training=False)[0]).lower(X, PARAMS, STATS).compile()
    assert written(compiled) == 1
    assert not re.search(r"\breduce\(", compiled.as_text())


def gradient(x, params, stats, g, **options):
    """With the parameters' gradients of each device by themselves, which a step sums with all others."""
    varying = jax.tree.map(lambda v: as_varying(v, ("batch",)), params)
    y, stats, (dx, dparams) = forward_and_backward(x, varying, stats, g, **options)
    return (y, dx, jax.tree.map(lambda v: v[None], dparams)), stats


@pytest.mark.parametrize(("f", "sums"), [(forward, 1), (gradient, 2)])
def test_one_collective_in_each_direction(f, sums):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    split, whole = P("batch"), P()
    specs = (split, whole, whole) + (split,) * (f is gradient)
    mapped = functools.partial(f, axis_name="batch")
    mapped = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=(split, whole)))
    found = collectives(mapped.lower(X, PARAMS, STATS, *(X,) * (f is gradient)).compile().as_text())
    assert len(found) == sums
    assert {c.kind for c in found} == {"all-reduce"}


def test_a_training_step_is_traced_once_and_moves_nothing_between_host_and_device():
    model = models.Perceptron((8, 8), 3, BatchNorm, "before")
    state = training.create_train_state(model, optax.adam(1e-2), jax.random.key(0), jnp.ones((1, 4)))

    def one_step(state, x, y):
        return training.train_step(state, x, y, objective=training.cross_entropy)

    step = jax.jit(chex.assert_max_traces(one_step, n=1))
    x, y = jax.random.normal(jax.random.key(1), (16, 4)), jnp.arange(16) % 3
    state, _ = step(state, x, y)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = step(state, x, y)
    assert np.isfinite(metrics.loss).all()


# --- what is kept for the backward pass -------------------------------------------------------------------------------


def kept(f, *args) -> dict[bytes, tuple[tuple[int, ...], str]]:
    """Large arrays that the backward pass takes from the forward pass: shapes and dtypes, by content."""
    forward = jax.jit(lambda *args: jax.vjp(f, *args)[1])
    large = [leaf for leaf in jax.tree.leaves(forward(*args)) if leaf.size >= SIZE // 2]
    return {np.asarray(leaf).tobytes(): (leaf.shape, str(leaf.dtype)) for leaf in large}


class Network(nn.Module):
    norm: type[nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Dense(32, use_bias=False, dtype=x.dtype)(x)
            x = nn.relu(self.norm(use_running_average=False, dtype=x.dtype)(x))
        return x


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_the_policy_keeps_the_inputs_of_batch_norms_and_nothing_else(dtype):
    x = jax.random.normal(jax.random.key(0), (SIZE // 32, 32)).astype(dtype)
    network = Network()
    variables = network.init(jax.random.key(1), x)

    def apply(params, x):
        return network.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    args = (variables["params"], x)
    by_policy = jax.checkpoint(apply, policy=save_batch_norm_inputs)
    found = kept(by_policy, *args)
    assert [*found.values()] == [(x.shape, dtype)] * 4  # the network's input, and those of its batch norms
    assert np.asarray(x).tobytes() in found
    handed_on = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(by_policy, *args)[1], *args))
    assert sum(leaf.size >= SIZE // 2 for leaf in handed_on) == 4  # each once, also for nested checkpoints
    assert len(kept(apply, *args)) > 4
    gradient = lambda f: jax.grad(lambda *args: jnp.square(f(*args).astype(jnp.float32)).sum())(*args)
    chex.assert_trees_all_close(gradient(by_policy), gradient(apply), rtol=1e-3, atol=1e-2 * SIZE**0.5)


# --- the provisional mean ---------------------------------------------------------------------------------------------


def program(shape, axis, mask=None):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32)] + ([] if mask is None else [mask])
    traced = jax.make_jaxpr(lambda x, mask=None: moments(x, axis=axis, mask=mask))(*arguments)
    return list(operations(traced.jaxpr))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((600, 3), -1),
        ((5000, 3), -1),
        ((64, 28, 28, 3), -1),
        ((3, 100_000), 0),
        ((2, 2, 2000, 3), -1),
        ((513, 2, 3), -1),
    ],
)
def test_the_provisional_mean_is_that_of_some_hundred_elements(shape, axis):
    sampled = [e for e in program(shape, axis) if e.primitive.name in ("slice", "gather")]
    assert sampled, "all of the input is sampled"
    count = min(e.outvars[0].aval.size for e in sampled) // 3
    assert 256 <= count < 3 * 256


@pytest.mark.parametrize(
    ("shape", "axis", "of_mask"),
    [
        ((5000, 3), -1, (5000,)),
        ((64, 28, 28, 3), -1, (64,)),
        ((64, 28, 28, 3), -1, (1, 28, 28, 1)),
        ((64, 28, 3, 28), 2, (64, 28, 1, 28)),
        ((3, 100_000), 0, (1, 100_000)),
        ((70_000, 2, 3), -1, (70_000, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [bool, jnp.float32])
def test_under_a_mask_some_hundred_elements_are_picked_and_nothing_depends_on_a_condition(shape, axis, of_mask, dtype):
    found = program(shape, axis, jax.ShapeDtypeStruct(of_mask, dtype))
    assert not any(e.primitive.name == "cond" for e in found)
    assert any(e.primitive.name == "gather" and e.outvars[0].aval.size == 3 * 256 for e in found)


def test_no_derivative_is_computed_by_what_is_held_fixed():
    params, stats = init_batch_norm(3)
    x = jnp.ones((8, 3))

    def products(f, *arguments):
        found = operations(jax.make_jaxpr(f)(*arguments).jaxpr)
        return sum(o.primitive.name == "mul" and o.outvars[0].aval.shape == x.shape for o in found)

    def by_bias(bias):
        return batch_norm(x, {**params, "bias": bias}, stats, training=True)[0]

    def derivative(bias, tangent):
        return jax.jvp(by_bias, (bias,), (tangent,))[1]

    assert products(derivative, params["bias"], params["bias"]) == products(by_bias, params["bias"]) > 0
