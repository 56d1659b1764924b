"""Training one network over devices, processes and interruptions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import network_example
import numpy as np
import optax
import pytest
import tiny_sets
from versions import needs_jax_0_8

from bnjax import training
from bnjax.studies import ParallelOptions as Options
from bnjax.studies.engine.saving import Saving
from bnjax.training.checkpoint import CheckpointError

TESTS = Path(__file__).parent


class Silent:
    """A report that stops the training after some epochs, if asked to."""

    def __init__(self, stop_after=None):
        self.stop_after, self.told = stop_after, []

    def expect(self, count):
        pass

    def task(self, plan):
        def update(epoch, means):
            self.told.append((epoch, means))
            if self.stop_after is not None and epoch >= self.stop_after:
                raise KeyboardInterrupt

        return update

    def reading(self, text, fraction):
        pass


@pytest.fixture(scope="module")
def on_eight_devices():
    return network_example.train(Options(2), Silent()).curves


def test_a_network_learns_and_reports(on_eight_devices):
    curves = on_eight_devices
    assert set(curves) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    assert all(curve.shape == (2, 3) for curve in curves.values())
    assert (curves["test_accuracy"][:, -1] > 0.6).all()
    assert not np.array_equal(curves["test_loss"][0], curves["test_loss"][1])
    report = Silent()
    network_example.train(Options(1), report)
    assert [epoch for epoch, _ in report.told] == pytest.approx([2 / 3, 1, 5 / 3, 2, 8 / 3, 3])
    assert report.told[0][1].keys() == {"train_loss", "train_accuracy"}
    assert report.told[1][1].keys() == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("way", ["shard_map", pytest.param("pmap", marks=needs_jax_0_8)])
def test_all_ways_give_the_same_curves(way, on_eight_devices):
    curves = network_example.train(Options(1, parallel=way), Silent()).curves
    for name, curve in curves.items():
        np.testing.assert_allclose(curve[0], on_eight_devices[name][0], rtol=0.02, atol=0.02, err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("group_size", [None, 2])
def test_an_interrupted_training_continues_bit_identically(group_size, tmp_path):
    def options(resume, directory="checkpoints"):
        saving = Saving(tmp_path / directory, {"study": "network"}, 0.0, resume)
        return Options(2, group_size=group_size, saving=saving)

    expected = network_example.train(options(False, "other"), Silent()).curves
    for stop_after in (0.7, 1.7):  # in the first seed, and in the second
        with pytest.raises(KeyboardInterrupt):
            network_example.train(options(stop_after > 1), Silent(stop_after))
    report = Silent()
    curves = network_example.train(options(True), report).curves
    assert report.told[0][0] > 1.5  # where it was interrupted, not at the beginning
    for name, curve in curves.items():
        np.testing.assert_array_equal(curve, expected[name])
    with pytest.raises(CheckpointError, match=r"groups is \d+ there and 8 here"):
        network_example.train(Options(2, group_size=1, saving=options(True).saving), Silent())


def test_evaluation_counts_each_example_once():
    _, evaluation = network_example.data()
    network = network_example.Network()
    state = training.create_train_state(network, optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 4)))
    split = evaluation["test"]
    one = training.evaluate(
        state,
        network_example.prepare(jnp.asarray(split.x), None),
        jnp.asarray(split.y),
        objective=training.cross_entropy,
    )
    for devices, batch_size in ((8, 16), (3, 43), (1, 10)):
        mesh = training.make_mesh(devices=jax.devices()[:devices])
        got = training.evaluate_in_batches(
            training.place_state(state, mesh),
            *split,
            objective=training.cross_entropy,
            batch_size=batch_size,
            mesh=mesh,
            preprocess=network_example.prepare,
        )
        np.testing.assert_allclose(got, [one.loss.mean(), one.accuracy.mean()], rtol=1e-5)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*arguments):
    command = [sys.executable, str(TESTS / "two_processes.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("way", ["shard_map", pytest.param("jit", marks=pytest.mark.exhaustive)])
def test_two_processes_of_two_devices_give_the_result_of_one_of_four(way):
    port = free_port()
    processes = [start(0, 2, port, way), start(1, 2, port, way)]
    curves = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    assert curves[0] == curves[1]
    alone = json.loads(start(0, 1, 0, way).communicate(timeout=120)[0].splitlines()[-1])
    for name, curve in alone.items():
        np.testing.assert_allclose(curves[0][name], curve, rtol=1e-3, atol=1e-3)


def test_a_dead_process_ends_the_others_with_an_error_in_time():
    port = free_port()
    processes = [start(0, 2, port, "shard_map", 40), start(1, 2, port, "shard_map", 40)]
    processes[1].communicate(timeout=120)
    assert processes[1].returncode == 9
    died = time.monotonic()
    _, error = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, 9)
    assert time.monotonic() - died < training.HEARTBEAT_SECONDS
    assert "error" in error.lower()


def train_cifar(tmp_path, *arguments, **pipes):
    """Starts the command on two small steps an epoch of a tiny set."""
    if not (tmp_path / "data").exists():
        tiny_sets.prepare("cifar10", tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "bnjax",
        "run",
        "cifar",
        "--dataset",
        "cifar10",
        "--variants",
        "relu_bn",
        "--quiet",
    ]
    command += ["--steps-per-epoch", "2", "--batch-size", "10", "--data-dir", tmp_path / "data", *arguments]
    environment = {**os.environ, "BNJAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "statuses"), [(signal.SIGKILL, (2, 137)), (signal.SIGSTOP, (2, None)), (signal.SIGTERM, (143, 143))]
)
def test_a_process_that_dies_stops_or_is_told_to_end_the_command_on_the_others(tmp_path, number, statuses):
    command = ["--epochs", 100000, "--checkpoint-every", 0, "--out", tmp_path / "out", "--devices", 1]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process-id"]
    processes = [train_cifar(tmp_path, *command, i, stderr=subprocess.PIPE) for i in range(2)]
    while not any((tmp_path / "out" / "checkpoints").glob("*/[0-9]*")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.5)
    watched = [
        int(child) for child in Path(f"/proc/{processes[1].pid}/task/{processes[1].pid}/children").read_text().split()
    ]
    os.kill(processes[1].pid if number == signal.SIGTERM else watched[0], number)
    told = time.monotonic()
    _, error = processes[0].communicate(timeout=2 * training.HEARTBEAT_SECONDS)
    assert time.monotonic() - told < training.HEARTBEAT_SECONDS + 20
    assert processes[0].returncode == statuses[0]
    if statuses[1] is None:
        os.kill(watched[0], signal.SIGKILL)
    else:
        assert processes[1].wait() in statuses  # of the killed one
    processes[1].communicate()
    lines = [line for line in error.splitlines() if line.startswith("bnjax: ")]
    assert len(lines) == 1 and "Traceback" not in error and "@ 0x" not in error
    if number == signal.SIGTERM:
        assert lines[0].startswith("bnjax: stopped by SIGTERM; to go on: ") and lines[0].endswith(" --resume")


@pytest.mark.slow
def test_the_command_trains_cifar_on_two_processes_and_resumes_on_other_devices(tmp_path):
    def run(out, epochs, *arguments):
        return train_cifar(tmp_path, "--out", tmp_path / out, "--epochs", epochs, *arguments)

    def results(out):
        document = json.loads((tmp_path / out / "results.json").read_text())
        return document["variants"]["relu_bn"]["metrics"]

    assert run("one", 2, "--devices", 4).wait() == 0
    together = [
        "--devices",
        2,
        "--coordinator",
        f"127.0.0.1:{free_port()}",
        "--processes",
        2,
        "--parallel",
        "shard_map",
    ]
    processes = [run("two", 2, *together, "--process-id", i, "--checkpoint-every", 0) for i in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    first_losses = []  # later ones differ by what RMSprop makes of rounding in gradients that are zero
    for out in ("one", "two"):
        with np.load(tmp_path / out / "curves.npz") as curves:
            first_losses.append(curves["relu_bn/train_loss"][0, 0])
    np.testing.assert_allclose(*first_losses, rtol=0.02)
    before = results("two")
    (tmp_path / "two" / "results.json").unlink()
    assert (
        run("two", 2, "--devices", 3, "--resume").wait() == 0
    )  # what the two processes saved, on three devices of one
    assert results("two") == before
    (tmp_path / "two" / "results.json").unlink()
    assert run("two", 3, "--devices", 3, "--resume").wait() == 2  # another configuration
