"""A study that is killed at any moment and resumed ends with the numbers of an uninterrupted run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

# Imports once and forks for each attempt, before a backend is started: an attempt takes seconds less.
ZYGOTE = """
import os, sys
import jax
import bnjax.training.checkpoint, bnjax.studies.circles, bnjax.studies.cli.console
from bnjax.studies.cli.main import main
jax.config.update("jax_platforms", "cpu")
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os._exit(main(line.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def attempt():
    zygote = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*arguments, until=None):
        """The exit code of a command, killed when a function says so, which is asked again and again."""
        zygote.stdin.write(" ".join(map(str, arguments)) + "\n")
        zygote.stdin.flush()
        child = int(zygote.stdout.readline())
        if until is not None:
            with contextlib.suppress(ProcessLookupError):  # it had ended
                while not until():
                    os.kill(child, 0)
                    time.sleep(0.002)
                os.kill(child, signal.SIGKILL)
        return int(zygote.stdout.readline())

    yield run
    zygote.stdin.close()
    zygote.wait()
    zygote.stdout.close()


def numbers(out):
    results = json.loads((out / "results.json").read_text())
    return {key: results[key] for key in ("settings", "seeds", "variants", "claims")}


def moment(folder, random_):
    """Tells a moment to kill: within a second of the start, or some milliseconds after up to ten more checkpoints."""
    if random_.random() < 0.3:
        end = time.monotonic() + random_.uniform(0, 1)
        return lambda: time.monotonic() >= end
    known = set(folder.glob("*/*"))
    enough = len(known) + random_.randrange(11)

    def has_come():
        known.update(folder.glob("*/*"))
        if len(known) < enough:
            return False
        time.sleep(random_.uniform(0, 0.02))
        return True

    return has_come


@pytest.mark.slow
def test_circles_killed_twenty_times(attempt, tmp_path):
    command = ["run", "circles", "--seeds", 2, "--epochs", 40, "--quiet", "--checkpoint-every", 0, "--out"]
    assert attempt(*command, tmp_path / "whole") == 0
    random_ = random.Random(0)
    folder, codes, begun = tmp_path / "killed" / "checkpoints", [], []
    for _ in range(20):
        begun.append(len(list(folder.glob("*/*"))))
        resume = ["--resume"] if folder.exists() else []
        codes.append(attempt(*command, tmp_path / "killed", *resume, until=moment(folder, random_)))
    assert codes == [-signal.SIGKILL] * 20
    assert len(set(begun)) > 2  # there were checkpoints to continue from, more and more
    assert attempt(*command, tmp_path / "killed", "--resume") == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
