"""Checkpoints: bit-identical continuation after kill -9, damage found, no directory spoilt by a full disk."""

import contextlib
import functools
import json
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.training.checkpoint import CheckpointError, Checkpoints

CONFIGURATION = {"study": "circles", "batch_size": 32, "sizes": (8, 8)}
STEPS, KILLS = 80, 20


def mesh(devices):
    return jax.make_mesh((devices,), ("batch",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])


def state(step=0, offset=0.0):
    """Leaves of all kinds; no two steps share one."""
    key = jax.random.fold_in(jax.random.key(5), step)
    return {
        "params": {"w": jax.random.normal(key, (40, 5)) + offset, "half": jnp.full(3, step, jnp.bfloat16)},
        "moments": optax.adam(0.1).init({"w": jnp.full(4, step + 0.5)}),
        "host": np.arange(6.0).reshape(2, 3).T + step,
        "scalar": np.float64(step + 0.1),
        "weak": jnp.full(2, float(step)),
        "keys": (key, jax.random.split(jax.random.key(step, impl="rbg"), 3)),
        "flags": np.array([True, False, step % 2 == 0]),
        "empty": jnp.zeros((0, 3)),
        "step": step,
        "nothing": None,
    }


def raw(tree):
    """The bytes of all leaves."""

    def host(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return [host(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def as_script(function, *arguments, **options):
    command = [sys.executable, __file__, function, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def outputs(*processes, timeout=60):
    """What they print, and to stderr; none remains, whatever goes wrong."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        told = [process.communicate(timeout=timeout) for process in processes]
    for process, (_, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, err
    return told


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path):
    sharded = {
        n: jax.device_put(jnp.arange(16.0), NamedSharding(mesh(8), s)) for n, s in (("r", P()), ("s", P("batch")))
    }
    saved = state(7) | {"sharded": sharded}
    with Checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        assert checkpoints.restore(saved) is None
        assert checkpoints.save(7, saved)
    like = state(0) | {"sharded": jax.tree.map(jnp.zeros_like, sharded)}
    with Checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        step, restored = checkpoints.restore(like)
    assert step == 7
    assert raw(restored) == raw(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for old, new in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
        assert type(new) is type(old)
        for attribute in ("dtype", "sharding", "committed", "weak_type"):
            assert getattr(new, attribute, None) == getattr(old, attribute, None)


def test_a_state_is_restored_by_shapes_alone(tmp_path):
    saved = {k: v for k, v in state(3).items() if k not in ("host", "scalar", "flags")}
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(3, saved)
        _, restored = checkpoints.restore(jax.eval_shape(lambda: saved))
    assert raw(restored["keys"]) == raw(saved["keys"])
    chex.assert_trees_all_equal(restored["params"], saved["params"])
    assert restored["step"] == 3


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    device, host = jnp.zeros(1000), np.zeros(1000)
    with Checkpoints(tmp_path, {}, every=0, keep=20) as checkpoints:
        for i in range(1, 6):
            device, host[:] = step(device), i
            checkpoints.save(i, {"device": device, "host": host})
            device, host[:] = step(device) - 1, -1
            checkpoints.wait()
            _, restored = checkpoints.restore({"device": device, "host": host})
            chex.assert_trees_all_equal(
                restored, {"device": np.full(1000, i, np.float32), "host": np.full(1000, float(i))}
            )


def test_saves_are_apart_in_time_and_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, {}, every=1000, keep=2) as checkpoints:
        assert checkpoints.save(1, state(1))
        assert not checkpoints.save(2, state(2))
        assert all(checkpoints.save(i, state(i), force=True) for i in (3, 4, 5))
        assert not checkpoints.save(5, state(5), force=True)
        with pytest.raises(CheckpointError, match=r"later step, 5.*clear\(\)"):
            checkpoints.save(4, state(4), force=True)
    assert sorted(os.listdir(tmp_path)) == ["4", "5"]
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.restore(state())[0] == 5
        checkpoints.clear()
        assert checkpoints.restore(state()) is None
        assert checkpoints.save(1, state(1))
    assert os.listdir(tmp_path) == ["1"]


def test_saving_goes_on_beside_the_caller(tmp_path):
    big = {"w": jax.random.normal(jax.random.key(0), (3000, 1000))}
    with Checkpoints(tmp_path, {}, every=0) as checkpoints:
        checkpoints.save(1, big)
        assert not (tmp_path / "1").exists()
        checkpoints.wait()
        assert (tmp_path / "1").exists()


def test_restored_on_more_and_fewer_devices(tmp_path):
    values = {"replicated": np.arange(16.0, dtype=np.float32), "sharded": np.arange(32.0, dtype=np.float32)}
    specs = {"replicated": P(), "sharded": P("batch")}

    def place(devices):
        return jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh(devices), s)), values, specs)

    current = place(8)
    for step, devices in enumerate((2, 1, 4, 8), 1):
        with Checkpoints(tmp_path, {}) as checkpoints:
            checkpoints.save(step, current)
            like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding), place(devices))
            _, current = checkpoints.restore(like)
        chex.assert_trees_all_equal(current, values)
        assert current["sharded"].sharding == NamedSharding(mesh(devices), P("batch"))
        assert len(current["replicated"].sharding.device_set) == devices


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    with Checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        checkpoints.save(1, state())
    other = {"study": "mnist", "sizes": [8, 8], "batch_size": 64, "seed": 1}
    with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(state())
    text = str(error.value)
    assert 'study is "circles" there and "mnist" here' in text
    assert "batch_size is 32 there and 64 here" in text
    assert "seed is nothing there and 1 here" in text
    assert "sizes" not in text
    with Checkpoints(tmp_path, CONFIGURATION) as checkpoints:
        assert checkpoints.restore(state())[0] == 1


def test_a_checkpoint_of_another_state_is_refused(tmp_path):
    other = state() | {"new": jnp.zeros(2), "host": np.zeros((3, 2), np.float32), "flags": np.zeros(4, bool)}
    del other["keys"]
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, state())
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(other)
        for part in (
            'flags is "bool[3]" there and "bool[4]" here',
            'host is "float64[3,2]" there and "float32[3,2]" here',
            'keys/0 is "key<fry>[]" there and nothing here',
            'new is nothing there and "float32[2]" here',
        ):
            assert part in str(error.value)
        many = {f"w{i}": np.zeros(1) for i in range(30)}
        with pytest.raises(CheckpointError, match=r"and \d\d more; resume"):
            checkpoints.restore(many)


def test_parameters_and_statistics_go_into_another_optimizer(tmp_path):
    x, y = jax.random.normal(jax.random.key(2), (8, 2)), jnp.arange(8) % 2
    model = Perceptron((4,), 2, BatchNorm, "before")
    first, second = (
        training.create_train_state(model, optimizer, jax.random.key(seed), x)
        for seed, optimizer in enumerate((optax.adam(0.1), optax.sgd(0.1, momentum=0.9)))
    )
    first, _ = training.train_step(first, x, y, objective=training.cross_entropy)
    with Checkpoints(tmp_path, {"optimizer": "adam"}) as checkpoints:
        checkpoints.save(1, first)
    part = {"params": second.params, "batch_stats": second.batch_stats}
    with Checkpoints(tmp_path, {"optimizer": "sgd"}) as checkpoints:
        step, variables = checkpoints.restore(part, partially=True)
        with pytest.raises(CheckpointError, match="configuration"):
            checkpoints.restore(first)
        with pytest.raises(CheckpointError, match=r"params/more is nothing there"):
            checkpoints.restore({"params": {**second.params, "more": jnp.ones(1)}}, partially=True)
    assert step == 1
    chex.assert_trees_all_equal(variables, {"params": first.params, "batch_stats": first.batch_stats})
    later, _ = training.train_step(second.replace(**variables), x, y, objective=training.cross_entropy)
    expected, _ = training.train_step(
        second.replace(params=first.params, batch_stats=first.batch_stats), x, y, objective=training.cross_entropy
    )
    chex.assert_trees_all_equal(later, expected)


@pytest.mark.parametrize("leaf", ["text", 0.5, object()])
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path, leaf):
    with Checkpoints(tmp_path, {}) as checkpoints, pytest.raises(TypeError, match=r"a/1 is a .*holds arrays"):
        checkpoints.save(1, {"a": [1, leaf]})


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # one bit flipped
        if content:
            content[int(how * len(content))] ^= 16
        path.write_bytes(content)


def test_damage_to_any_file_is_reported_or_harmless(tmp_path, caplog):
    good, bad = tmp_path / "good", tmp_path / "bad"
    states = {step: {"w": np.random.default_rng(step).normal(size=5000), "step": step} for step in (1, 2, 3)}
    with Checkpoints(good, CONFIGURATION, every=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, states[step])
    files = [path.relative_to(good) for path in (good / "2").rglob("*") if path.is_file()]
    values = max((good / "2/state").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    vital = {values.relative_to(good), Path("2/metadata/metadata")}
    assert vital < set(files)
    for file in files:
        for how in ("removed", "truncated", "emptied", 0.1, 0.5, 0.9):
            shutil.copytree(good, bad)
            spoil(bad / file, how)
            reports = []
            with Checkpoints(bad, CONFIGURATION, every=0, report=reports.append) as checkpoints:
                step, restored = checkpoints.restore(states[3])
                assert raw(restored) == raw(states[step]), (file, how)
                assert len(reports) == (step == 1), (file, how)
                assert step == 1 or file not in vital, (file, how)
                if how == "removed":  # the training goes on, over what was damaged
                    checkpoints.save(step + 1, states[step + 1])
                    assert raw(checkpoints.restore(states[3])[1]) == raw(states[step + 1])
                    assert len(reports) == (step == 1)
            for text in reports:
                assert "bad/2 is damaged (" in text
                assert text.endswith("using that of step 1.")
                assert "\n" not in text
            shutil.rmtree(bad)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("missing", [".", "state", "metadata"])
def test_a_checkpoint_without_one_of_its_directories_is_passed_over(tmp_path, missing):
    reports = []
    with Checkpoints(tmp_path, {}, every=0, report=reports.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "2" / missing)
        (tmp_path / "2").mkdir(exist_ok=True)
        step, restored = checkpoints.restore(state())
        assert step == len(reports) == 1
        assert raw(restored) == raw(state(1))
        assert checkpoints.save(2, state(2))
        assert raw(checkpoints.restore(state())[1]) == raw(state(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_an_empty_state_is_saved(tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, {})
        assert checkpoints.restore({}) == (1, {})


def test_where_all_checkpoints_are_damaged_it_is_said(tmp_path):
    with Checkpoints(tmp_path, {}, every=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
    for step in (1, 2):
        spoil(tmp_path / f"{step}/metadata/metadata", "truncated")
    with Checkpoints(tmp_path, {}) as checkpoints:
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged \(.*start afresh"):
            checkpoints.restore(state())
        checkpoints.clear()
        assert checkpoints.save(1, state(1))
    assert os.listdir(tmp_path) == ["1"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, state(1))
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.restore(state())[0] == 1
        checkpoints.save(2, state(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_an_unusable_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/directory"):
        with pytest.raises(CheckpointError, match=r"file.* can't hold checkpoints \(.*; give another"):
            Checkpoints(path, {})


@pytest.mark.exhaustive
def test_trainings_in_several_threads(tmp_path):
    def work(thread):
        with Checkpoints(tmp_path / str(thread), {"thread": thread}, every=0) as checkpoints:
            for step in range(1, 16):
                checkpoints.save(step, state(step, thread))
            step, restored = checkpoints.restore(state())
            assert step == 15
            return raw(restored) == raw(state(15, thread))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_logging_is_left_as_it_was(tmp_path):
    filters = list(logging.getLogger("absl").filters)
    with Checkpoints(tmp_path, {}), Checkpoints(tmp_path / "other", {}):
        assert len(logging.getLogger("absl").filters) == len(filters) + 2
    assert logging.getLogger("absl").filters == filters


def test_a_full_disk_is_told_and_leaves_the_last_good_checkpoint(tmp_path):
    out, err = outputs(as_script("with_a_full_disk", tmp_path))[0]
    assert "Traceback" not in err
    assert "ERROR" not in err
    told = json.loads(out)
    assert len(told) == 3
    for text in told:
        assert str(tmp_path) in text
        assert "File too large" in text
        assert "the last good one is of step 1" in text
    assert os.listdir(tmp_path) == ["1"]  # what was half written is gone
    with Checkpoints(tmp_path, {}) as checkpoints:
        step, restored = checkpoints.restore({"w": np.zeros(1)})
    assert step == 1
    np.testing.assert_array_equal(restored["w"], [1.0])


def with_a_full_disk(directory):
    """Saves what there is no room for: this process may not write large files. It can't be told by another means."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = np.random.default_rng(0).normal(size=100_000)
    small, told = {"w": np.ones(1)}, []

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    with Checkpoints(directory, {}, every=0) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        limit(100_000)
        for step, then in ((2, lambda: checkpoints.save(3, small)), (4, checkpoints.wait)):
            checkpoints.save(step, {"w": big})
            try:
                then()
            except CheckpointError as error:
                told.append(str(error))
            assert checkpoints.restore(small)[0] == 1
    try:
        with Checkpoints(directory, {}, every=0) as checkpoints:
            checkpoints.save(5, {"w": big})
    except CheckpointError as error:
        told.append(str(error))
    print(json.dumps(told))


@pytest.mark.exhaustive
def test_two_processes_save_restore_and_pass_over_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [out for out, _ in outputs(*(as_script("one_of_two", port, i, tmp_path) for i in range(2)))]
    assert "checkpoint" in told[0]
    assert "is damaged" in told[0]
    assert "is damaged" not in told[1]
    like = jax.device_put({"w": jnp.zeros(8), "b": jnp.zeros(2)}, NamedSharding(mesh(8), P()))
    with Checkpoints(tmp_path, {}) as checkpoints:
        step, restored = checkpoints.restore(like | {"key": jax.random.key(0), "n": 0})
    assert step == 4
    chex.assert_trees_all_equal(restored["w"], np.arange(8, dtype=np.float32) + 4)


def one_of_two(port, index, directory):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    everywhere = NamedSharding(jax.make_mesh((4,), ("batch",), (jax.sharding.AxisType.Auto,)), P())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def make(step):
        return {"w": jnp.arange(8.0) + step, "key": jax.random.key(step)}

    def whole(step):
        return make(step) | {"b": jnp.full(2, step, jnp.float32), "n": step}

    with Checkpoints(directory, {}, every=0) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, whole(step))
        step, restored = checkpoints.restore(whole(0))
        assert step == restored["n"] == 3
        assert restored["w"].sharding == everywhere
        assert raw(jax.tree.map(local, restored)) == raw(jax.tree.map(local, whole(3)))
        parts = jax.make_array_from_process_local_data(NamedSharding(everywhere.mesh, P("batch")), np.ones(2))
        with contextlib.suppress(CheckpointError):
            checkpoints.save(4, {"parts": parts})
            raise AssertionError("an array of which each process has a part was saved")
    if index == "0":
        spoil(Path(directory, "3/metadata/metadata"), "truncated")
    with Checkpoints(directory, {}, every=1000, report=print) as checkpoints:
        step, restored = checkpoints.restore(whole(0))
        assert step == 2
        assert raw(jax.tree.map(local, restored)) == raw(jax.tree.map(local, whole(2)))
        checkpoints._last_save = time.monotonic() - (2000 if index == "0" else 0)
        assert not checkpoints.save(4, whole(4))  # due in one of them only
        assert checkpoints.save(4, whole(4), force=True)


def local(leaf):
    return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf


@pytest.mark.exhaustive
def test_continues_bit_identically_after_being_killed_at_any_moment(tmp_path):
    out, _ = outputs(as_script("kill_and_resume", tmp_path), timeout=240)[0]
    told = json.loads(out)
    kills = told["kills"]
    assert len(kills) == KILLS
    assert told["identical"]
    assert sum(kill["steps"] > 0 for kill in kills) >= KILLS // 4  # it had trained
    assert sum(kill["resumed"] > 0 for kill in kills) >= KILLS // 4  # and gone on from a checkpoint
    assert sum(kill["saving"] for kill in kills) >= 2  # and was in a save
    assert any(kill["resumed"] < 0 for kill in kills)  # or had not restored yet


class Run(NamedTuple):
    state: Any
    history: jax.Array
    key: jax.Array
    padding: jax.Array  # makes saves take their time


QUICKLY: Any = {"compiler_options": {"xla_backend_optimization_level": 1}}


@functools.partial(jax.jit, **QUICKLY)
def new_run():
    model = Perceptron((16,), 3, BatchNorm, "before")
    made = training.create_train_state(model, optax.adam(0.01), jax.random.key(0), jnp.zeros((1, 8)))
    return Run(made, jnp.full(STEPS, jnp.nan), jax.random.key(1), jnp.linspace(0, 1, 2**20))


@functools.partial(jax.jit, donate_argnums=0, **QUICKLY)
def advance(run):
    key, data = jax.random.split(run.key)
    x = jax.random.uniform(data, (32, 8))
    state, metrics = training.train_step(run.state, x, x[:, :3].argmax(-1), objective=training.cross_entropy)
    history = run.history.at[run.state.step].set(metrics.loss)
    return Run(state, history, key, jnp.sin(run.padding + metrics.loss))


def train_with_checkpoints(directory, progress):
    """`progress` is told the step resumed from (−1 before) and how many have been done since."""
    with Checkpoints(directory, CONFIGURATION, every=0) as checkpoints:
        step, run = checkpoints.restore(jax.eval_shape(new_run)) or (0, None)
        progress[0] = step
        run = run or new_run()
        while step < STEPS:
            run, step = advance(run), step + 1
            progress[1] += 1
            if step % 2 == 0:
                checkpoints.save(step, run)
    Path(directory, "result").write_bytes(b"".join(raw(run)))


def kill_and_resume(directory, seed=0):
    """Forks a training after the imports, over and over: before a backend is there, that is safe, and fast."""
    moments = random.Random(int(seed))
    progress = np.frombuffer(mmap.mmap(-1, 16), np.int64)  # shared with the children
    whole, killed = Path(directory, "whole"), Path(directory, "killed")

    def start(where):
        progress[:] = -1, 0
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            train_with_checkpoints(where, progress)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def finish(child):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def time_until(happened):
        begun = time.monotonic()
        child = start(whole)
        while not happened():
            time.sleep(0.001)
        took = time.monotonic() - begun
        finish(child)
        return took, time.monotonic() - begun

    starting, total = time_until(lambda: progress[1] > 0)
    restoring, _ = time_until(lambda: progress[0] == STEPS)
    kills = []
    while len(kills) < KILLS:
        child = start(killed)
        if len(kills) % 4 == 1:
            time.sleep(moments.uniform(0, restoring))
        elif len(kills) % 4 == 3:  # while it compiles, or takes its first steps
            time.sleep(moments.uniform(restoring, 1.2 * starting))
        else:  # while it trains, every other time in a save
            steps, in_save = moments.randrange(1, 12), len(kills) % 4 == 2
            while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if progress[1] >= steps and (not in_save or list(killed.glob("*tmp*"))):
                    break
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.01 if in_save else 2 * (total - starting) / STEPS))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            saving = bool(list(killed.glob("*tmp*")))
            kills.append({"resumed": int(progress[0]), "steps": int(progress[1]), "saving": saving})
        else:  # it had come to its end: another one
            assert (killed / "result").read_bytes() == (whole / "result").read_bytes()
            shutil.rmtree(killed)
    finish(start(killed))
    identical = (killed / "result").read_bytes() == (whole / "result").read_bytes()
    print(json.dumps({"kills": kills, "identical": identical, "starting": starting, "restoring": restoring}))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
