"""Checkpoints of a training: saved asynchronously and atomically by Orbax, and verified when they are restored.

Orbax is handed all leaves as one array, because each array costs it time. Compared to that, Orbax's own tree of the
same arrays (`StandardSave` from the host, with a digest of each) took these times on two busy cores: for 100 leaves of
0.8 MB in all, 2.2 times as long to save and 7 times as long to restore; for 10 small leaves, twice as long; for 100
leaves of 27 MB, about as long; for 428 leaves of 205 MB, 1.0 to 1.3 times as long to save with half the wait of the
caller, and 0.8 times as long to restore. Orbax also refuses empty arrays and empty trees, which are held here.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bnjax.training.host import check_checkpoint_path

_INTEGERS = (bool, int)
_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)
_SAVING = threading.Lock()  # Orbax numbers the saves of a process by a global, which concurrent saves mix up


class CheckpointError(Exception):
    """The error for a checkpoint that can't be written or can't be continued; the message says what to do."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one training, in a directory of their own; for a `with` statement.

    The process may be killed at any moment: a checkpoint appears under its name only when it is complete. Each carries
    its configuration, and a digest by which damage is detected. Several processes (`jax.distributed`) all make the same
    calls, on a directory that all of them see; several threads may each have a directory of their own.

    Args:
      directory: directory of the checkpoints; made where it is missing.
      configuration: values as in JSON that must agree for a checkpoint to be continued, such as study and batch size.
      keep: number of checkpoints that remain, the newest ones.
      every: least seconds from the beginning of a save to the next.
      report: function called with a message on each damaged checkpoint that is passed over; by default it prints to
        stderr.

    Raises:
      CheckpointError: for a directory that can't be used.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory, {"study": "circles"}) as checkpoints:
    ...     checkpoints.save(10, {"mean": jnp.arange(3.)})
    ...     checkpoints.restore({"mean": jnp.zeros(3)})
    True
    (10, {'mean': Array([0., 1., 2.], dtype=float32)})
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        configuration: Mapping[str, Any],
        *,
        keep: int = 3,
        every: float = 30.0,
        report: Callable[[str], Any] = lambda text: print(text, file=sys.stderr),
    ):
        self._directory = Path(directory).absolute()
        self._configuration = json.loads(json.dumps(configuration))
        self._every = every
        self._report = report if jax.process_index() == 0 else lambda text: None
        self._keep, self._last_save, self._damaged = keep, -math.inf, []
        self._unverified: int | None = None
        self._has_verified = False
        try:
            check_checkpoint_path(self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = self._open()
        except ValueError as error:
            raise CheckpointError(f"{error} Give another.") from None
        except OSError as error:
            raise CheckpointError(f"{directory} can't hold checkpoints ({_reason(error)}); give another.") from error
        logging.getLogger("absl").addFilter(self._is_news)

    def __exit__(self, *exception) -> None:
        self.close()

    def save(self, step: int, tree: Any, *, force: bool = False) -> bool:
        """Begins to save a state, once no save is running; the arrays may be donated as soon as this returns.

        The copies to the host and their digest keep the caller waiting, about 0.5 s for 100 MB; writing does not.

        Args:
          step: number of the state's step, greater than that of any checkpoint in the directory.
          tree: pytree of JAX and NumPy arrays, random keys and Python integers; over several processes, replicated.
          force: whether to save even if the last save began less than `every` seconds ago.

        Returns:
          Whether a save was begun; none is if there is a checkpoint of that step.

        Raises:
          CheckpointError: if this save or the one before it failed, as on a full disk; earlier ones are intact.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()  # raises now if the last save failed, whether or not the next one is due
        due = time.monotonic() - self._last_save >= self._every
        if not (force or self._every <= 0 or _everywhere(due)):
            return False
        self.wait()
        latest = max(set(self._manager.all_steps()) - set(self._damaged), default=-1)
        if step < latest:
            raise CheckpointError(
                f"{self._directory} has a later step, {latest}: restore it, or remove it with clear()."
            )
        if step == latest:
            return False
        leaves = _named_leaves(tree)
        parts = jax.device_get({name: _local(name, leaf) for name, leaf in leaves.items()})
        parts = {name: np.ascontiguousarray(part).reshape(-1).view(np.uint8) for name, part in parts.items()}
        # One byte more keeps the array from being empty, which Orbax refuses.
        data = np.concatenate([*parts.values(), np.zeros(1, np.uint8)])
        metadata = {
            "configuration": self._configuration,
            "leaves": _types(leaves),
            "bytes": {name: part.size for name, part in parts.items()},
        }
        metadata["digest"] = _digest(metadata, data)
        items = ocp.args.Composite(state=ocp.args.StandardSave({"data": data}), metadata=ocp.args.JsonSave(metadata))
        with self._writing(), _SAVING:
            self._delete(self._damaged)
            self._manager.save(step, args=items, force=True)
        self._last_save = time.monotonic()
        if not self._has_verified and jax.process_count() == 1:
            self._unverified = step
        return True

    def restore(self, like: Any, *, partially: bool = False) -> tuple[int, Any] | None:
        """Restores the newest intact checkpoint as its step and state; returns None where there is no checkpoint.

        Args:
          like: a state of the same structure, shapes and dtypes. Each leaf is restored as the kind of value that `like`
            has there: a JAX array of its sharding (`jax.ShapeDtypeStruct` will do), a NumPy array, a key or an integer.
          partially: whether `like` may be a part of the state, in a training of another configuration, such as
            `{"params": state.params, "batch_stats": state.batch_stats}` for a state with another optimizer.

        Raises:
          CheckpointError: if that checkpoint is of another configuration or state, which the message compares; or if
            all checkpoints are damaged.
        """
        self.wait()
        wanted, damaged = _named_leaves(like), {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            metadata, data, reason = self._read(step)
            if _everywhere(not reason):
                break
            damaged[step] = reason or "another process can't read it"
        else:
            if not damaged:
                return None
            raise CheckpointError(
                f"all checkpoints in {self._directory} are damaged ({damaged}); start afresh instead."
            )
        compared = [("state", metadata["leaves"], _types(wanted))]
        if partially:
            compared = [(what, {n: t for n, t in there.items() if n in here}, here) for what, there, here in compared]
        else:
            compared.insert(0, ("configuration", metadata["configuration"], self._configuration))
        for subject, there, here in compared:
            if differences := _differences(there, here):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self._directory} is of another {subject}: {differences}; "
                    "resume what saved it, give another directory, or start afresh."
                )
        for bad, reason in damaged.items():
            self._report(f"checkpoint {self._directory / str(bad)} is damaged ({reason}); using that of step {step}.")
        self._damaged = list(damaged)  # the next save deletes these
        sizes = metadata["bytes"]
        parts = dict(zip(sizes, np.split(data, np.cumsum(list(sizes.values()), dtype=int)), strict=False))
        leaves = [_from_bytes(parts[name].copy(), leaf) for name, leaf in wanted.items()]
        return step, jax.tree.unflatten(jax.tree.structure(like), leaves)

    def clear(self) -> None:
        """Removes all checkpoints of the directory, for a training that starts afresh."""
        self.wait()
        with self._writing():
            self._delete(self._manager.all_steps())
        self._last_save = -math.inf

    def wait(self) -> None:
        """Waits until no save is running; raises CheckpointError if the last one failed.

        The first save is also read back, so that a file system that loses what it takes is noticed at once.
        """
        with self._writing():
            self._manager.wait_until_finished()
        step, self._unverified = self._unverified, None
        if step is not None and (reason := self._read(step)[2]):
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} can't be read back ({reason}). Give another."
            )
        self._has_verified |= step is not None

    def close(self) -> None:
        """Waits for a running save and releases Orbax's manager; raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._is_news)

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:  # Orbax would do so in a thread, which fails if the program ends early
            for partial in self._directory.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}"):
                shutil.rmtree(partial, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
            lightweight_initialize=True,
            num_deletion_threads=1,  # several take 0.1 s to delete anything
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def _read(self, step: int) -> tuple[Any, Any, str]:
        """Returns metadata and data of a checkpoint, and what is wrong with it ('' for nothing)."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), metadata=ocp.args.JsonRestore())
        try:
            checkpoint: Any = self._manager.restore(step, args=items)
            metadata, data = checkpoint.metadata, checkpoint.state["data"]
            intact = metadata.pop("digest", None) == _digest(metadata, data)
        except MemoryError:
            raise
        except Exception as error:
            return None, None, _reason(error)
        return metadata, data, "" if intact else "it does not match its digest"

    def _delete(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._manager.delete(step)
        self._damaged = []

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failure to write into a CheckpointError, and ends and removes what is half written."""
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:  # several processes would have to do so together
                with contextlib.suppress(Exception):
                    self._manager.close()
                with contextlib.suppress(Exception):
                    self._manager = self._open()
            latest = self._manager.latest_step()
            last = "there is none yet" if latest is None else f"the last good one is of step {latest}"
            raise CheckpointError(
                f"no checkpoint can be written to {self._directory} ({_reason(error)}); {last}. Mend that, then resume."
            ) from error

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Returns False for the many tracebacks that Orbax logs of a failure that it also raises, else True."""
        return not (record.exc_info and "orbax" in record.pathname)


def _everywhere(value: bool) -> bool:
    """Returns whether a value is true in all processes, which must save, skip and pass over checkpoints together."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(value)).all())


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same path; rename one.")
    for name, leaf in named.items():
        if type(leaf) not in _INTEGERS and not isinstance(leaf, _ARRAYS):
            raise TypeError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays, random keys and integers.")
    return named


def _types(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns the dtype and shape of each leaf; a Python integer has those that it gets in JAX."""
    arrays = {name: jax.typeof(leaf) if type(leaf) in _INTEGERS else leaf for name, leaf in leaves.items()}
    return {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in arrays.items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _local(name: str, leaf: Any) -> Any:
    """Returns the whole of a leaf, as an array that this process has."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf, jax.typeof(leaf).dtype) if type(leaf) in _INTEGERS else leaf
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if not (leaf.is_fully_replicated or leaf.is_fully_addressable):
        raise CheckpointError(f"{name} is divided among processes; replicate it before it is saved.")
    return leaf.addressable_data(0) if leaf.is_fully_replicated else leaf


def _from_bytes(data: np.ndarray, like: Any) -> Any:
    """Restores a leaf of the same kind as `like` from its bytes."""
    if type(like) in _INTEGERS:
        return type(like)(data.view(jax.typeof(like).dtype)[0])
    if isinstance(like, np.ndarray | np.generic):
        value = data.view(like.dtype).reshape(like.shape)
        return value if isinstance(like, np.ndarray) else value[()]
    sharding = like.sharding if getattr(like, "committed", True) else None
    if _is_key(like):
        value = data.view(np.uint32).reshape(*like.shape, -1)
        build = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    else:
        value = data.view(like.dtype).reshape(like.shape)
        if not like.weak_type:
            return jax.device_put(value, sharding)
        build = jnp.full(like.shape, np.zeros((), like.dtype).item()).at[...].set
    return jax.jit(build, out_shardings=sharding)(value)


def _digest(metadata: Mapping[str, Any], data: np.ndarray) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    digest.update(data.data)
    return digest.hexdigest()


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describes how a checkpoint differs from this program, in words."""
    texts = [{key: json.dumps(value, sort_keys=True) for key, value in side.items()} for side in (there, here)]
    pairs = [(key, *(text.get(key, "nothing") for text in texts)) for key in texts[0] | texts[1]]
    differences = [f"{key} is {old} there and {new} here" for key, old, new in pairs if old != new]
    return ", ".join(differences[:10]) + (f" and {len(differences) - 10} more" if len(differences) > 10 else "")


def _reason(error: Exception) -> str:
    """Describes an error on one line, in the system's words if TensorStore hands on the system's error."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else (str(error).strip().splitlines() or [repr(error)])[0][:200]
