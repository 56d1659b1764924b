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

    def run(*arguments, kill_after=None):
        """The exit code of a command, killed after some seconds if it runs that long."""
        zygote.stdin.write(" ".join(map(str, arguments)) + "\n")
        zygote.stdin.flush()
        child = int(zygote.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it had ended
                os.kill(child, signal.SIGKILL)
        return int(zygote.stdout.readline())

    yield run
    zygote.stdin.close()
    zygote.wait()
    zygote.stdout.close()


def numbers(out):
    results = json.loads((out / "results.json").read_text())
    return {key: results[key] for key in ("settings", "seeds", "variants", "claims")}


@pytest.mark.slow
def test_circles_killed_twenty_times(attempt, tmp_path):
    command = ["run", "circles", "--seeds", 2, "--epochs", 40, "--quiet", "--checkpoint-every", 0, "--out"]
    start = time.monotonic()
    assert attempt(*command, tmp_path / "whole") == 0
    seconds = time.monotonic() - start
    moments, killed, begun = random.Random(0), 0, []
    for i in range(20):
        begun.append(len(list((tmp_path / "killed").glob("checkpoints/*/*"))))
        resume = ["--resume"] if i else []
        code = attempt(*command, tmp_path / "killed", *resume, kill_after=moments.uniform(0.1, 0.5) * seconds)
        killed += code == -signal.SIGKILL
    assert attempt(*command, tmp_path / "killed", "--resume") == 0
    assert killed >= 10
    assert len(set(begun)) > 2  # there were checkpoints to continue from, more and more
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
