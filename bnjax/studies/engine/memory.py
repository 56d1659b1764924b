"""The memory that trainings of many seeds need: what fits runs at once, and what never will is refused at the start."""

import contextlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bnjax import _calls
from bnjax.studies.engine.plan import Plan, Setting

FEW = 64
"""Settings that are trained at once in any case."""
AT_ONCE = 2**31
"""Bytes that the settings of one program may need, by `needed`. It is the same on every machine, and so are the parts
into which settings are cut, as rounding depends on how many are computed together."""


def settings_at_once(plan: Plan, settings: Setting, examples: Any, trainings: int = 1) -> int:
    """Returns how many settings one program trains, in a run of so many trainings whose results are held to its end.

    Raises:
      ValueError: if the results of all settings do not fit into the memory that is free.
    """
    if (count := len(settings["key"])) <= FEW:
        return count
    training, results = needed(plan, jax.tree.map(lambda v: v[0], settings), examples)
    free = free_memory()
    each = (trainings + 2) * results  # those of the training that ends are held thrice: as they come, and by seed
    if count * each > free:
        most = f"at most {int(free / each):,} fit" if free > each else "fewer steps need less"
        raise ValueError(
            f"the results of {count:,} seeds of {trainings} trainings such as {plan.label} need "
            f"{count * each / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of memory are free: {most}."
        )
    return min(count, max(1, AT_ONCE // training))


def needed(plan: Plan, setting: Setting, examples: Any) -> tuple[int, int]:
    """Estimates the bytes that one setting needs while it is trained, and those of its results, without running it.

    The first is an upper bound, as compilers fuse operations, whose arrays then take no memory.
    """

    def step(state, setting, examples):
        inputs = plan.draw(setting.get("examples", examples), setting, 0)
        looked = plan.look(state, setting.get("examples", examples))
        return plan.step(state, *inputs), looked, () if plan.measure is None else plan.measure(state, *inputs)

    state = jax.eval_shape(plan.create, setting)
    program = jax.make_jaxpr(step)(state, setting, examples)
    (_, metrics), looked, measured = jax.eval_shape(step, state, setting, examples)
    own = _total((state, setting))
    series = plan.steps * _total(metrics) + plan.parts * _total(looked) + plan.steps // plan.every * _total(measured)
    return own + _peak(program.jaxpr) + series, _total(state) + series


def _peak(jaxpr: Any) -> int:
    """Returns the most bytes that a program's arrays, beside its inputs, take at a time."""
    last = {id(variable): i for i, eqn in enumerate(jaxpr.eqns) for variable in eqn.invars}
    last |= {id(variable): len(jaxpr.eqns) for variable in jaxpr.outvars}
    held, now, peak = {}, 0, 0
    for i, eqn in enumerate(jaxpr.eqns):
        now += sum(_bytes(variable.aval) for variable in eqn.outvars)
        peak = max(peak, now + max(map(_peak, _calls.inner_programs(eqn)), default=0))
        for variable in eqn.outvars:
            held.setdefault(last.get(id(variable), i), []).append(_bytes(variable.aval))
        now -= sum(held.pop(i, ()))
    return peak


def _total(tree: Any) -> int:
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(array: Any) -> int:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return math.prod(array.shape) * (8 if is_key else array.dtype.itemsize)


def free_memory() -> float:
    """Returns the bytes of memory that are free, as far as the system says, also to a group of processes."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = Path("/sys/fs/cgroup") / own.removeprefix("0::/")
        free.append(float(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())))
    return min(free)
