"""The common functions of the benchmarks: taking turns, spreads, naming the machine and JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

KNOWN_MEAN = "a known mean"  # what the forward pass takes without its sample
PEERS = (
    "flax linen",
    "flax linen, two-pass",
    "flax nnx",
    "haiku",
    "equinox",
    "keras",
    "torch",
    "torch, channels last",
)
"""Whose batch norms the operation's benchmark measures."""
LIBRARIES = ("jax", "flax", "dm-haiku", "equinox", "keras", "torch", "optax")
LIBRARIES += ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "matfree")


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2, pause: float = 0.0
) -> dict[str, list[float]]:
    """Times each call in `rounds` rounds in which each has its turn; a call returns when its result is there.

    Args:
      calls: contestants by name.
      rounds: timed calls of each.
      warm_up: calls of each before, not timed.
      pause: seconds before each timed call. PyTorch's threads spin for a while after their work, which would slow the
        next one.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # no call always follows the same other
            time.sleep(pause)
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int = 2) -> str:
    """Returns the median and the quartiles as text, with few values the extremes, and a single one alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4)
    if len(values) < 5:
        low, high = min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def torch_place() -> tuple[str, Callable[[], Any]]:
    """Returns PyTorch's accelerator, or the processor, and a function that waits for it."""
    import torch

    return ("cuda", torch.cuda.synchronize) if torch.cuda.is_available() else ("cpu", lambda: None)


def device() -> dict[str, Any]:
    """Returns the processor or accelerator, and the versions of libraries."""
    import jax

    kind = jax.devices()[0].device_kind
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"kind": kind, "machine": platform.machine(), "python": platform.python_version(), "versions": versions}


def save(path: str | None, result: Any) -> None:
    """Saves a result as JSON, where a path is given."""
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
