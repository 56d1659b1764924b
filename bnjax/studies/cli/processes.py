"""One of several processes of a run: what it has in common with the others, and how it ends when one of them does."""

import ctypes
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

WORKER = "BNJAX_WORKER"
"""The environment variable that tells the process that trains from the one that watches it."""
_OF_JAX = re.compile(r"[IW]\d{4} \d\d:\d\d:\d\d.*(coordination|distributed|preemption|gloo)", re.IGNORECASE)
# What follows such a line is more of the same, and a stack.
_FATAL = re.compile(r"F\d{4} \d\d:|E\d{4} \d\d:.*(coordination|distributed|heartbeat)|Fatal Python error", re.I)
_OF_ANOTHER = re.compile("coordination|distributed|heartbeat", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def watch(arguments: Sequence[str]) -> int:
    """Runs the command in a process of its own, and returns its exit status.

    Where JAX aborts that process, since another of the run has died or gives no sign of life, one line says so in place
    of a stack, and the status is 2.
    """
    command = [sys.executable, "-m", "bnjax", *arguments]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, WORKER: "1"},
        start_new_session=True,
        text=True,
        errors="replace",
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    said, kept = False, []  # whether the process has said what is wrong, and what it said of JAX's own
    with child:
        for line in child.stderr or ():
            if _FATAL.match(line) or kept:
                kept.append(line)
            elif not _OF_JAX.match(line):
                said |= line.startswith("bnjax: ")
                print(line, end="", file=sys.stderr, flush=True)
    status = child.wait()
    if status == 0 or said or -status in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        return status if status >= 0 else 128 - status
    is_of_another = any(_OF_ANOTHER.search(line) for line in kept)
    first = " ".join(kept[0].split()) if kept else f"status {status}"
    problem = (
        "another process of this run has died, or gives no sign of life" if is_of_another else f"JAX ended: {first}"
    )
    print(f"bnjax: error: {problem}", file=sys.stderr, flush=True)
    return 2


def end_with_watcher() -> None:
    """Makes this process end when the one that watches it is killed, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def check_equal(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in all processes, where they were started with different settings, of the same names."""
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(repr(item).encode()).digest()[:4], np.uint32) for item in settings.items()]
    )
    of_all = np.zeros((64, 1), np.uint32)
    of_all[: len(digests)] = digests
    everywhere = np.asarray(multihost_utils.process_allgather(of_all))
    differ = (everywhere != everywhere[:1]).any((0, 2))[: len(digests)]
    if differ.any():
        names = ", ".join(name for name, different in zip(settings, differ, strict=True) if different)
        raise ValueError(f"all processes of a run must be started alike, but they differ in {names}.")
