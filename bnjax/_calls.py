"""Calls of a model's layers, of linen or nnx: intercepted, or marked in the traced program to see which feed which."""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bnjax import linen, nnx
from bnjax._functional import INTERCEPTORS, is_of_library, name_of, split_arguments, taking_products
from bnjax._layers import Statistics
from bnjax._moments import moments

Call = Callable[..., Any]
_IN, _OUT = "bnjax: into ", "bnjax: out of "
# Compiled parts of a model (Flax's jit) keep their first trace. Within a context of its own each call is traced anew,
# so that no intercepted call stays behind in them, and no trace that they kept is taken for an intercepted call.
_own_trace = jax.make_user_context()
_number = itertools.count(1)
_ALIASES = (
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "pvary",
    "sharding_constraint",
    "reshard",
    "stop_gradient",
)
_INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What is no array among the arguments of a model's call, such as False, on which it may branch in Python."""

    structure: Any
    values: tuple[tuple[int, Any], ...]

    def filled(self, arrays: list[Any]) -> Any:
        """Returns the arguments, with these arrays among them."""
        values, rest = dict(self.values), iter(arrays)
        return self.structure.unflatten(
            values[i] if i in values else next(rest) for i in range(self.structure.num_leaves)
        )


def split_fixed(arguments: Any) -> tuple[list[Any], Fixed]:
    """Splits the arguments of a model's call into arrays (or their shapes), which may be traced, and all else."""
    leaves, structure = jax.tree.flatten(arguments)
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.bool_) for leaf in leaves]
    fixed = tuple((i, leaf) for i, leaf in enumerate(leaves) if not is_array[i])
    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], Fixed(structure, fixed)


@contextlib.contextmanager
def intercept(is_wanted: Callable[[Any], bool], replace: Callable[[Any, Call, Any, dict[str, Any]], Any]):
    """Makes `replace(module, call, x, options)` stand for the calls of wanted modules, within a `with` statement.

    This holds for the calls of linen models, and of nnx models in their functional form. Of a user's subclass of a
    layer it is the layer's call within the subclass's own. The module is a copy of this call's own, and has a `path`,
    `has_variable`, `get_variable` and `put_variable`, in nnx as in linen.
    """

    def interceptor(next_function, arguments, options, context):
        with _own_trace(next(_number)):
            is_layers = context.method_name == "__call__" and is_of_library(context.orig_method.func)
            if not is_layers or not is_wanted(context.module):
                return next_function(*arguments, **options)
            x, options = split_arguments(context.orig_method, arguments, options)
            return replace(context.module, lambda x, **options: next_function(x, **options), x, options)

    token = INTERCEPTORS.set((*INTERCEPTORS.get(), (is_wanted, replace)))
    try:
        with _own_trace(next(_number)), nn.intercept_methods(interceptor):
            yield
    finally:
        INTERCEPTORS.reset(token)


def set_attribute(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module that is a copy of this call's own."""
    if isinstance(module, nn.Module):
        object.__setattr__(module, name, value)  # modules of linen are frozen
    else:
        setattr(module, name, value)


def statistics_of(module: Any) -> Statistics | None:
    """Returns the kind of running statistics of a batch norm, ours or Flax's; None for other modules."""
    return linen.statistics_of(module) if isinstance(module, nn.Module) else nnx.statistics_of(module)


def is_norm(module: Any) -> bool:
    """Returns whether a module is a batch norm, ours or Flax's."""
    return statistics_of(module) is not None


def is_running(module: Any, options: Mapping[str, Any]) -> bool:
    """Returns whether a batch norm's call uses the running statistics, by its option or else its attribute."""
    use_running_average = options.get("use_running_average")
    return bool(module.use_running_average if use_running_average is None else use_running_average)


def moving_norms(call: Callable[[], Any]) -> frozenset[str]:
    """Returns the names of the batch norms that use the batch's statistics in a model's call, which is only traced."""
    names = set()

    @taking_products
    def note(module: Any, call_norm: Call, x: Any, options: dict[str, Any]) -> Any:
        if not is_running(module, options):
            names.add(name_of(module.path))
        return call_norm(x, **options)

    with intercept(is_norm, note):
        jax.eval_shape(call)
    return frozenset(names)


def taking_batch_statistics(module: Any, call: Call, x: Any, options: dict[str, Any]) -> Any:
    """Calls a batch norm so that it puts the batch's statistics in place of the running ones, without noise.

    Derivatives go through the statistics.
    """
    set_attribute(module, "use_running_average", None)
    options = {**options, "use_running_average": False}
    if hasattr(module, "takes_batch_statistics"):
        set_attribute(module, "takes_batch_statistics", True)
        return call(x, **options)
    if isinstance(module, nn.Module):
        set_attribute(module, "momentum", 0.0)
        for name in ("mean", "var"):  # zero times what is not finite would not be zero
            module.put_variable("batch_stats", name, jnp.zeros_like(module.get_variable("batch_stats", name)))
        return call(x, **options)
    y, mask = call(x, **options), options.get("mask")
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = mask.reshape((1,) * (jnp.ndim(x) - mask.ndim) + mask.shape)  # as Flax reads it
    # No derivative goes through what Flax's own nnx layers assign.
    m = moments(x, axis=module.axis, mask=mask, axis_name=module.axis_name, axis_index_groups=module.axis_index_groups)
    for name, value in (("mean", m.mean), ("var", m.var)):
        module.put_variable("batch_stats", name, value.astype(module.get_variable("batch_stats", name).dtype))
    return y


def marked(module: Any, call: Call, x: Any, options: dict[str, Any]) -> Any:
    """Calls a module with marks at its input and at its output."""
    name = name_of(module.path)
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
            for inner in inner_programs(eqn):
                yield from followers(inner)


def uses(jaxpr: Any, of_outputs: list[int] | None = None) -> list[int]:
    """Counts how often each input of a program is used, given how often each of its outputs is (by default once)."""
    counts = Counter()
    for variable, count in zip(jaxpr.outvars, of_outputs or [1] * len(jaxpr.outvars), strict=True):
        counts[id(variable)] += count
    for eqn in reversed(jaxpr.eqns):
        inner = list(inner_programs(eqn)) if eqn.primitive.name in _INLINED else []
        each = uses(inner[0], [counts[id(v)] for v in eqn.outvars]) if len(inner) == 1 else [1] * len(eqn.invars)
        for variable, count in zip(eqn.invars, each, strict=True):
            counts[id(variable)] += count
    return [counts[id(variable)] for variable in jaxpr.invars]


def first_uses(jaxpr: Any) -> list[tuple[tuple[int, ...], int] | None]:
    """Returns where each input of a program is first used, as numbers that sort, with its rank there; None for unused.

    In a loop, of which an input gets a part at each turn, it is that part's rank.
    """
    inputs = {id(variable): i for i, variable in enumerate(jaxpr.invars)}
    found: list[tuple[tuple[int, ...], int] | None] = [None] * len(inputs)
    for number, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name in _ALIASES and id(eqn.invars[0]) in inputs:
            inputs[id(eqn.outvars[0])] = inputs[id(eqn.invars[0])]
            continue
        inner = [first_uses(program) for program in inner_programs(eqn)]
        before = 1 if eqn.primitive.name == "cond" else 0  # which branch
        matches = inner and all(len(uses) == len(eqn.invars) - before for uses in inner)
        for place, variable in enumerate(eqn.invars):
            if (i := inputs.get(id(variable))) is None or found[i] is not None:
                continue
            uses = (
                [uses[place - before] for uses in inner] if matches and place >= before else [((), variable.aval.ndim)]
            )
            if uses := [use for use in uses if use is not None]:
                found[i] = (number, *min(uses)[0]), min(uses)[1]
    return found


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
        for inner in inner_programs(eqn):
            for _ in range(eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1):
                below, after = _depths(inner, here)
                largest, here, before = max(largest, below), max(here, after), here
                if here == before:
                    break
        known |= {id(v): here for v in eqn.outvars}
    return largest, max([start, *(known.get(id(v), 0) for v in jaxpr.outvars)])


def inner_programs(eqn: Any) -> Iterator[Any]:
    """Yields the programs within an operation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
