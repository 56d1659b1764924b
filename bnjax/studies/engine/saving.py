"""Checkpoints of a study's trainings: none for short runs, and none of Orbax's imports either."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax


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


class Saved:
    """The checkpoints of one training, opened when the first is due; none without a `Saving`."""

    def __init__(self, saving: Saving | None, name: str, configuration: Mapping[str, Any]):
        self._saving, self._started, self._checkpoints = saving, time.monotonic(), None
        if saving:
            self._directory = saving.directory / name
            self._configuration = {**saving.configuration, "training": name, **configuration}
            if not saving.resume and jax.process_index() == 0:
                shutil.rmtree(self._directory, ignore_errors=True)

    def restore(self, like: Callable[[], Any]) -> tuple[int, Any] | None:
        """Reads step and state of the newest checkpoint; None to start afresh."""
        if not (self._saving and self._saving.resume and self._directory.is_dir()):
            return None
        return self._open(self._saving).restore(like())

    def save(self, step: int, state: Callable[[], Any]) -> None:
        """Saves a state where a checkpoint is due."""
        if not self._saving:
            return
        is_due = time.monotonic() - self._started >= self._saving.every
        if self._checkpoints is not None or is_due or jax.process_count() > 1:
            self._open(self._saving).save(step, state())

    def close(self) -> None:
        """Waits for the last checkpoint to be written."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _open(self, saving: Saving):
        if self._checkpoints is None:
            from bnjax.training.checkpoint import Checkpoints

            how = {"every": saving.every, "report": saving.report}
            self._checkpoints = Checkpoints(self._directory, self._configuration, **how)
        return self._checkpoints
