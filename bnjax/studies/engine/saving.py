"""Checkpoints of a study's trainings: none for short runs, and none of Orbax's imports either.

A signal that ends a run (SIGINT, SIGTERM) does so after the compiled call that its trainings are in, with a checkpoint.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

_training: set[int] = set()  # the trainings that stop by themselves once they are asked to
_asked: list[int] = []  # signals that ask them to
_calls = itertools.count()


class Stopped(KeyboardInterrupt):
    """The end of a run by a signal, whose number is `signal`."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise `Stopped`, once trainings have saved their state; a second one ends the process.

    Of several processes, which only save together, SIGTERM to one stops all, as JAX tells them; SIGINT one, at once.
    """

    def stop(number: int, frame: Any) -> None:
        _asked.append(number)
        if len(_asked) > 1:
            os._exit(128 + number)  # an exception would wait for the threads that train
        if not _training or jax.process_count() > 1:
            raise Stopped(number)
        print("bnjax: saving a checkpoint, then stopping; once more to stop at once", file=sys.stderr, flush=True)

    taken = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    before = {number: signal.signal(number, stop) for number in taken}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def completing() -> Iterator[None]:
    """Makes a first signal wait for what is done within, such as the writing of results, which then end the run."""
    _training.add(0)
    try:
        yield
    finally:
        _training.discard(0)


@dataclasses.dataclass(frozen=True)
class Saving:
    """The directory in which each training of a study has its own, and the seconds from one checkpoint to the next.

    A checkpoint must agree with `configuration`, settings of the whole study such as its name and data set. What is
    there is continued with `resume`, and else removed; `report` is told of damaged checkpoints.
    """

    directory: Path
    configuration: Mapping[str, Any]
    every: float = 60.0
    resume: bool = False
    report: Callable[[str], Any] = print
    started: float = dataclasses.field(default_factory=time.monotonic)


class Saved(contextlib.AbstractContextManager):
    """The checkpoints of one training, for a `with` statement; the first due one opens them, if there is a `Saving`."""

    def __init__(self, saving: Saving | None, name: str, configuration: Mapping[str, Any]):
        self._saving, self._checkpoints = saving, None
        if saving:
            self._directory = saving.directory / name
            self._configuration = {**saving.configuration, "training": name, **configuration}
            if not saving.resume and jax.process_index() == 0:
                shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "Saved":
        if self._saving:
            _training.add(id(self))
        return self

    def __exit__(self, *exception) -> None:
        _training.discard(id(self))
        if self._checkpoints is not None:
            self._checkpoints.close()

    def restore(self, like: Callable[[], Any], steps: int) -> tuple[int, Any] | None:
        """Reads step and state of the newest checkpoint of a training of so many steps; None to start afresh."""
        if not (self._saving and self._saving.resume and self._directory.is_dir()):
            return None
        restored = self._open(self._saving).restore(like())
        if restored and not 0 < restored[0] <= steps:
            from bnjax.training.checkpoint import CheckpointError

            raise CheckpointError(
                f"the checkpoint of step {restored[0]} in {self._directory} can't be one of {steps} steps; remove it."
            )
        return restored

    def save(self, step: int, state: Callable[[], Any], is_last: bool) -> None:
        """Saves a state where a checkpoint is due, or where the run is asked to stop, and then raises `Stopped`.

        The first of a training is due once the run has lasted for the time between two, and then its last state too.
        """
        if not self._saving:
            return
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_calls)):
            _asked.append(signal.SIGTERM)
        stops = bool(_asked) and id(self) in _training
        is_due = time.monotonic() - self._saving.started >= self._saving.every
        if self._checkpoints is not None or is_due or stops or jax.process_count() > 1:
            self._open(self._saving).save(step, state(), force=stops or is_last)
        if stops:
            raise Stopped(_asked[0])

    def _open(self, saving: Saving):
        if self._checkpoints is None:
            from bnjax.training.checkpoint import Checkpoints

            how = {"every": saving.every, "report": saving.report}
            self._checkpoints = Checkpoints(self._directory, self._configuration, **how)
        return self._checkpoints
