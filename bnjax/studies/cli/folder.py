"""The directory that a run saves to: looked at, tried and locked before the first step, so that no work is lost."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnjax._extras import needs
from bnjax.studies.evidence.record import RecordError
from bnjax.studies.evidence.results import Results
from bnjax.training.host import check_checkpoint_path

with needs("studies"):
    import filelock

_LOCK, _CHECKPOINTS = ".lock", "checkpoints"


class FolderError(Exception):
    """A directory that can't be saved to, or that holds what would be lost.

    Attributes:
      ways: what can be done instead, and which arguments to add to the command for that.
    """

    def __init__(self, problem: str, **ways: tuple[str, ...]):
        super().__init__(problem)
        self.ways = {what.replace("_", " "): words for what, words in ways.items()}


@contextlib.contextmanager
def reserved(
    out: Path, study: str, options: Mapping[str, Any], *, resume: bool, force: bool
) -> Iterator[Results | None]:
    """Makes a directory for a run of a study, and keeps all other runs out of it meanwhile.

    Args:
      out: the directory.
      study: name of the study.
      options: options of the run, as `bnjax.studies.Options.to_json` gives them.
      resume: whether the run continues one that was interrupted, which it may do in the directory of that.
      force: whether what the directory holds is to be replaced.

    Yields:
      The results that a run to be continued has already ended with; None where there is something to do.

    Raises:
      FolderError: if it can't be written to, is in use, or holds another study's or finished results, an unfinished run
        or a record that can't be read, and these are not to be replaced.
    """
    instead = ("--out", _free(out))
    try:
        check_checkpoint_path(out)
        if out.exists() and not out.is_dir():
            raise FolderError(f"--out must be a directory, but {out} is a file", give_another=instead)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        lock = filelock.FileLock(out / _LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderError(f"another run is saving to {out}", give_another=instead) from None
    except OSError as error:
        problem = f"{out} can't be written to ({error.strerror or error})"
        raise FolderError(problem, give_another=("--out", "DIRECTORY")) from error
    except ValueError as error:
        another = Path("runs") / study
        try:
            check_checkpoint_path(another)
        except ValueError:  # the working directory is what does not fit
            another = Path.home() / another
        raise FolderError(str(error).rstrip("."), give_another=("--out", _free(another))) from None
    try:
        if problem := _in_the_way(out):
            raise FolderError(f"{out} holds {problem}", give_another=instead)
        finished, lost = _found(out, study, options)
        if lost and not force and not (resume and finished):
            raise FolderError(f"{out} holds {lost}", replace_it=("--force",), keep_it=instead)
        if not (force or resume) and is_unfinished(out):
            raise FolderError(f"{out} holds an unfinished run", continue_it=("--resume",), begin_anew=("--force",))
        if force and not resume:
            shutil.rmtree(out / _CHECKPOINTS, ignore_errors=True)
        yield None if force else finished
    finally:
        with contextlib.suppress(OSError):
            (out / _LOCK).unlink()  # whoever waits for the lock then makes it anew
        lock.release()


def _in_the_way(out: Path) -> str:
    """Says what stands where files of a run have to be; nothing where nothing does."""
    if os.path.lexists(out / _CHECKPOINTS) and not (out / _CHECKPOINTS).is_dir():
        return f"a file called {_CHECKPOINTS}, where checkpoints have to be"
    endings = (".json", ".npz", ".md", ".png", ".html")
    folders = (entry.name for entry in os.scandir(out) if entry.is_dir() and entry.name.endswith(endings))
    return next((f"a directory called {name}, where a file may have to be" for name in sorted(folders)), "")


def _found(out: Path, study: str, options: Mapping[str, Any]) -> tuple[Results | None, str]:
    """Returns results of these options, and says what a run would replace; nothing where there is nothing."""
    try:
        saved = Results.load(out)
    except RecordError as error:
        return None, f"a record that can't be read ({str(error).rstrip('.')})"
    if saved is None:
        return None, ""
    if saved.study != study:
        return None, f"results of another study, {saved.study}"
    return saved if dict(saved.options) == dict(options) else None, f"finished results of `{saved.command}`"


def is_unfinished(out: Path) -> bool:
    """Returns whether a directory holds checkpoints that are newer than its results, or has no results beside them."""
    finished = max((path.stat().st_mtime for path in out.glob("results.json")), default=0.0)
    return any(path.stat().st_mtime > finished for path in (out / _CHECKPOINTS).glob("*/*/"))


def _free(out: Path) -> str:
    """Returns the name of a directory that is not there yet."""
    return next(name for i in range(2, 1000) if not os.path.lexists(name := f"{os.fspath(out)}-{i}"))
