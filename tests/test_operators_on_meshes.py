"""Curvature of a network that is split over a mesh: the numbers of one device, with vectors split as the parameters."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_network as network
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax import analysis

MESH = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])


def put(value, spec):
    return jax.device_put(value, NamedSharding(MESH, spec))


SHARDED = {name: put(value, network.SPECS[name]) for name, value in network.PARAMS.items()}
BATCH = tuple(put(v, P("data")) for v in (network.X, network.Y))


def loader(on_mesh):
    parts = [tuple(v[part] for v in (network.X, network.Y)) for part in network.PARTS]
    return [tuple(put(v, P("data")) for v in part) for part in parts] if on_mesh else parts


@functools.cache
def expected(of_data_set):
    """What one device measures."""
    if of_data_set:
        return network.measured(network.PARAMS, {"batches": loader(on_mesh=False)}, few=True)
    return jax.jit(lambda p, *batch: network.measured(p, {"of": batch}))(network.PARAMS, network.X, network.Y)


def check(found, of_data_set):
    for name, value in expected(of_data_set).items():
        if name not in found:
            continue
        if name == "vectors":
            parts = jax.tree.map(lambda a, b: np.einsum("kij,kij->k", a, b), found[name], value)
            np.testing.assert_allclose(np.abs(sum(parts.values())), 1, rtol=1e-3)
        else:
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-4, err_msg=name)


def check_sharding(vectors):
    for name, value in vectors.items():
        assert value.sharding.is_equivalent_to(NamedSharding(MESH, P(None, *network.SPECS[name])), 3), name


def test_the_numbers_are_those_of_the_dense_matrix():
    w, unravel = ravel_pytree(network.PARAMS)
    dense = jax.hessian(lambda w: network.loss(unravel(w), network.X, network.Y))(w)
    values = np.linalg.eigvalsh(np.asarray(dense, np.float64))
    np.testing.assert_allclose(expected(of_data_set=False)["values"], [values[-1], values[0], values[-2]], rtol=1e-3)


@pytest.mark.exhaustive
def test_in_jit():
    found = jax.jit(lambda p, *batch: network.measured(p, {"of": batch}))(SHARDED, *BATCH)
    check(found, of_data_set=False)
    check_sharding(found["vectors"])


@pytest.mark.exhaustive
def test_of_a_data_set_on_the_host():
    found = network.measured(SHARDED, {"batches": loader(on_mesh=True)}, few=True)
    check(found, of_data_set=True)
    check_sharding(found["vectors"])


@pytest.mark.exhaustive
def test_the_basis_is_split_too():
    """By the compiled program's memory on each device, and by the state of a program on the host."""

    def memory(mesh):
        params = {"in": np.zeros((64, 1024), np.float32), "out": np.zeros((1024, 3), np.float32)}
        x, y = np.zeros((8, 64), np.float32), np.zeros(8, np.int32)
        if mesh:
            params = {name: put(value, network.SPECS[name]) for name, value in params.items()}
            x, y = (put(v, P("data")) for v in (x, y))

        @jax.jit
        def run(params, x, y):
            return analysis.hessian_eigenpairs(network.loss, params, 5, x, y, key=jax.random.key(0)).values

        return run.lower(params, x, y).compile().memory_analysis().temp_size_in_bytes

    assert memory(mesh=True) < 0.6 * memory(mesh=False)  # two devices share the model, and each vector
    operator = analysis.hessian_operator(network.loss, SHARDED, batches=loader(on_mesh=True))
    pairs = analysis.eigenpairs(operator, 1, key=jax.random.key(0), return_state=True, num_steps=3)
    check_sharding(pairs.state.basis)


@pytest.mark.exhaustive
def test_inside_shard_map():
    """Each device has a part of the batch, and batch norm's statistics are those of all."""

    def outputs(params, x):
        z = jnp.tanh(x @ params["in"])
        mean = jax.lax.pmean(z.mean(0, keepdims=True), "data")
        var = jax.lax.pmean(jnp.square(z - mean).mean(0, keepdims=True), "data")
        return (z - mean) / jnp.sqrt(var + 1e-5) @ params["out"]

    def loss(params, x, y):
        z = outputs(params, x)
        return jax.lax.pmean((jax.nn.logsumexp(z, -1) - (z * jax.nn.one_hot(y, 3)).sum(-1)).mean(), "data")

    def body(params, x, y):
        hessian = analysis.hessian_operator(loss, params, x, y)
        key = jax.random.key(network.KEY)
        pairs = analysis.eigenpairs(hessian, 3, key=key, which="both", tolerance=1e-4)
        trace = analysis.trace(hessian, key=key, num_samples=12, method="xtrace")
        return {"values": pairs.values, "vectors": pairs.vectors, "trace": trace.estimate}

    run = jax.shard_map(body, mesh=MESH, in_specs=(P(), P("data"), P("data")), out_specs=P())
    found = jax.jit(run)(network.PARAMS, network.X, network.Y)
    check(found, of_data_set=False)


@pytest.mark.exhaustive
def test_in_two_processes():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    script = str(Path(__file__).with_name("curvature_of_processes.py"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    runs = [
        subprocess.Popen([sys.executable, script, str(i), "2", port], stdout=subprocess.PIPE, env=environment)
        for i in (0, 1)
    ]
    results = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    found = [json.loads(result.decode().strip().splitlines()[-1]) for result in results]
    chex.assert_trees_all_equal(*found)
    assert found[0].pop("shards") == {"in": [[3, 5, 4]], "out": [[3, 4, 3]]}
    for name, value in found[0].items():
        np.testing.assert_allclose(value, expected(of_data_set=True)[name], rtol=2e-3, atol=1e-4, err_msg=name)
