"""Calls of a model's layers, marked in the traced program to see which layers feed which."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bnjax.linen import statistics_of

Call = Callable[..., Any]
_IN, _OUT = "bnjax: into ", "bnjax: out of "
# Compiled parts of a model (Flax's jit) keep their first trace. Within a context of its own each call is traced anew,
# so that no intercepted call stays behind in them, and no trace that they kept is taken for an intercepted call.
_own_trace = jax.make_user_context()
_number = itertools.count(1)
_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@contextlib.contextmanager
def intercept(is_wanted: Callable[[nn.Module], bool], replace: Callable[[Any, Call, Any, dict[str, Any]], Any]):
    """Makes `replace(module, call, x, options)` stand for the calls of wanted modules, within a `with` statement."""

    def interceptor(next_function, arguments, options, context):
        with _own_trace(next(_number)):
            return intercepted(next_function, arguments, options, context)

    def intercepted(next_function, arguments, options, context):
        if context.method_name != "__call__" or not is_wanted(context.module):
            return next_function(*arguments, **options)
        call_options = dict(zip(("x", "use_running_average"), arguments, strict=False)) | options
        name = "inputs" if "inputs" in call_options else "x"
        x = call_options.pop(name)
        return replace(context.module, lambda x, **options: next_function(x, **options), x, call_options)

    with _own_trace(next(_number)), nn.intercept_methods(interceptor):
        yield


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a batch norm, of `bnjax.linen` or of Flax."""
    return statistics_of(module) is not None


def marked(module: nn.Module, call: Call, x: Any, options: dict[str, Any]) -> Any:
    """Calls a module with marks at its input and at its output."""
    name = "/".join(module.path)
    return checkpoint_name(call(checkpoint_name(x, _IN + name), **options), _OUT + name)


def followers(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yields pairs of marked calls' names of which the second takes the first's output, unchanged and alone."""
    uses = Counter(id(v) for eqn in jaxpr.eqns for v in eqn.invars) + Counter(map(id, jaxpr.outvars))
    made = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            name, (variable,) = eqn.params["name"], eqn.invars
            if name.startswith(_OUT):
                made[id(eqn.outvars[0])] = name.removeprefix(_OUT)
            elif name.startswith(_IN) and id(variable) in made and uses[id(variable)] == 1:
                yield made[id(variable)], name.removeprefix(_IN)
        elif eqn.primitive.name in _INLINED:
            for inner in _inner(eqn):
                yield from followers(inner)


def uses(jaxpr: Any) -> list[int]:
    """Counts how often each input of a program is used in it."""
    counts = Counter(map(id, jaxpr.outvars))
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn)) if eqn.primitive.name in _INLINED else []
        each = uses(inner[0]) if len(inner) == 1 else [1] * len(eqn.invars)
        for variable, count in zip(eqn.invars, each, strict=True):
            counts[id(variable)] += count
    return [counts[id(variable)] for variable in jaxpr.invars]


def depth(jaxpr: Any) -> int:
    """Returns the largest number of marked calls on the longest way to the input of another marked call."""
    return _depths(jaxpr, 0)[0]


def _depths(jaxpr: Any, start: int) -> tuple[int, int]:
    """Returns `depth` of a program whose inputs come after `start` marked calls, and the number before its outputs."""
    largest, known = 0, {}
    for eqn in jaxpr.eqns:
        here = max([start, *(known.get(id(v), 0) for v in eqn.invars)])
        name = eqn.params["name"] if eqn.primitive.name == "name" else ""
        if name.startswith(_IN):
            largest = max(largest, here)
        here += name.startswith(_OUT)
        for inner in _inner(eqn):
            for _ in range(eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1):
                below, after = _depths(inner, here)
                largest, here, before = max(largest, below), max(here, after), here
                if here == before:
                    break
        known |= {id(v): here for v in eqn.outvars}
    return largest, max([start, *(known.get(id(v), 0) for v in jaxpr.outvars)])


def _inner(eqn: Any) -> Iterator[Any]:
    """Yields the programs within an operation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
