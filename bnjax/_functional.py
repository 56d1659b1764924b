"""The functional form of nnx models, in which training, inference and losses take models of linen and nnx alike."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import rnglib
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _compat
from bnjax._objective import PHASES, call_of, is_training

NOISE = "noise"
"""The random stream of `NoisyBatchNorm`, whose draws for a unit are common to the whole batch."""
COLLECTIONS = ("params", "batch_stats", "random", "others")
_TYPES = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
Path = tuple[Any, ...]
Replace = Callable[[Any, Callable[..., Any], Any, dict[str, Any]], Any]
INTERCEPTORS: ContextVar[tuple[tuple[Callable[[Any], bool], Replace], ...]] = ContextVar("interceptors", default=())
"""What stands for the calls of which modules, in every call of a functional model; `bnjax._calls.intercept` sets it."""


def taking_products(replace: Any) -> Any:
    """Marks what stands for calls of batch norms as one to which an input may be a `bnjax._product.Product`."""
    replace.takes_products = True
    return replace


def functional(model: nnx.Module, *, argument: str | None = "training") -> tuple["Apply", dict[str, Any]]:
    """Returns an nnx model as a pure function and its variables, as linen has them.

    `apply(variables, x, training=True, mutable=['batch_stats'], rngs={'dropout': key})` is called like the `apply` of a
    linen model, so that what takes such a function takes nnx models too: `reestimate_batch_stats(*functional(model),
    batches)`. The model itself stays as it is; `update` puts variables back into it. (Parameters that the call itself
    changes are returned where 'params' is mutable, and by no training, which moves them by their gradients.)

    Args:
      model: nnx module.
      argument: name of the option of `apply` that says whether the model trains, or the contrary
        ('use_running_average', …). It chooses the model's `train()` or `eval()`, and is given to the model's call where
        this takes an argument of that name, or any. With None the option is `training`, and the call does not get it.
        Where `apply` is called without the option, the model is called as its modules are set.

    Returns:
      `(apply, variables)`: 'params' (`nnx.Param`), 'batch_stats' (`nnx.BatchStat`), 'random' (keys and counts of random
      streams) and 'others', each a nested dict of arrays. Two functions of equal models are equal, so that JAX compiles
      them once.

    Raises:
      ValueError: for a model whose call has no argument of that name but another that says whether it trains. If this
        has an unusual name, `apply` raises where a batch norm is told the contrary.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm
    >>> model = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> apply, variables = functional(model)
    >>> y, updates = apply(variables, jnp.ones((3, 2)), training=True, mutable=['batch_stats'])
    >>> y.shape, list(updates)
    ((3, 4), ['batch_stats'])
    """
    graph, *states = nnx.split(model, *_TYPES)
    variables: dict[str, Any] = {n: nnx.to_pure_dict(state) for n, state in zip(COLLECTIONS, states, strict=True)}
    passes = argument is not None and _passes(type(model), argument)
    paths = frozenset(_flat(variables))
    return Apply(graph, type(model), argument or "training", passes, argument is None, paths), variables


def own_argument(model: nnx.Module) -> str:
    """Returns the name by which a model's call is told whether it trains, of those in use; else 'training'."""
    return next(_phases(type(model)), "training")


def _phases(model_class: type) -> Iterator[str]:
    """Yields the arguments of a model's call that say whether it trains, by their names."""
    return (name for name in call_of(model_class)[0] if name in PHASES)


def _passes(model_class: type, argument: str) -> bool:
    """Returns whether the call of a model gets an option that says whether it trains."""
    parameters, takes_any = call_of(model_class)
    if argument in parameters:
        return True
    if other := next(_phases(model_class), None):
        raise ValueError(
            f"argument must be the name by which the call of {model_class.__name__} is told whether it trains, got "
            f"{argument!r}. Pass argument={other!r}, or None where its own default is meant."
        )
    return takes_any and not issubclass(model_class, nnx.Sequential)  # which gives all options to its first layer


def update(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Assigns variables to an nnx model, such as those of a training, or re-estimated statistics.

    Args:
      model: nnx module.
      variables: some or all of the collections that `functional` returns, with arrays for all or some of the variables.

    The arrays are copied, and cast to the dtypes of the model's.

    Raises:
      ValueError: for a variable that the model does not have, or has in another shape, before anything is assigned.

    >>> from flax import nnx
    >>> from bnjax.nnx import BatchNorm
    >>> layer = BatchNorm(2, rngs=nnx.Rngs(0))
    >>> update(layer, {'batch_stats': {'mean': jnp.ones(2)}})
    >>> print(layer.mean[...])
    [1. 1.]
    """
    own = dict(nnx.to_flat_state(nnx.state(model)))
    values = _flat(variables)
    if unknown := [name_of(path) for path in values if path not in own]:
        raise ValueError(f"variables must be the model's own, got {', '.join(unknown)} as well.")
    wrong = [
        f"{name_of(path)} of shape {jnp.shape(value)} for {jnp.shape(_value(own[path]))}"
        for path, value in values.items()
        if jnp.shape(value) != jnp.shape(_value(own[path]))
    ]
    if wrong:
        raise ValueError(f"variables must have the shapes of the model's, got {', '.join(wrong)}.")
    for path, value in values.items():
        new = jnp.array(value, dtype=_value(own[path]).dtype)  # a copy, as the next step may donate the array
        if isinstance(own[path], nnx.Variable):
            _compat.set_value(own[path], new)
        else:
            setattr(at(model, path[:-1]), path[-1], new)


def _value(leaf: Any) -> Any:
    """Returns the value of a leaf of a model's state, which is a variable, or an array that is an attribute."""
    return _compat.get_value(leaf) if isinstance(leaf, nnx.Variable) else leaf


def name_of(path: Path) -> str:
    """Returns a path as one name, joined by slashes."""
    return "/".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class Apply:
    """The function that `functional` returns.

    Attributes:
      graph: the model's graph definition.
      model_class: the model's class.
      argument: name of the option that says whether the model trains.
      passes: whether the model's call gets that option.
      chooses: whether the call's own choices for its batch norms stand.
      paths: paths of the model's variables.
    """

    graph: Any
    model_class: type
    argument: str
    passes: bool
    chooses: bool
    paths: frozenset[Path]

    def __repr__(self) -> str:
        return f"functional({self.model_class.__name__})[0]"

    def __call__(
        self,
        variables: Mapping[str, Any],
        *inputs: Any,
        mutable: Any = False,
        rngs: Mapping[str, jax.Array] | str | None = None,
        **options: Any,
    ) -> Any:
        """Calls the model.

        Args:
          variables: collections of arrays.
          *inputs: positional arguments of the model's call.
          mutable: names of the collections to return, True for all, or False; 'intermediates' is what was sown.
          rngs: random keys by name, from which each stream of the model gets its own: by the stream's name, by that of
            its module's `rng_collection`, or by 'default'. With `'own'` the streams are as the variables have them, and
            draw the same at each call.
          **options: options of the model's call, and `argument`.

        Returns:
          The outputs; where there are `mutable` collections, `(outputs, collections)`.

        Raises:
          ValueError: for a stream that draws but has no key among `rngs`; where the call does not get the option that
            says whether the model trains, and tells a batch norm the contrary.
        """
        flat = _flat(variables)
        model = nnx.merge(self.graph, nnx.State(unflatten_dict({p: v for p, v in flat.items() if p in self.paths})))
        for path in flat.keys() - self.paths:
            setattr(at(model, path[:-1]), path[-1], nnx.BatchStat(flat[path]))
        if isinstance(rngs, str) and rngs != "own":
            raise ValueError(f"rngs must be random keys by name, or 'own' for the model's own streams, got {rngs!r}.")
        interceptors = INTERCEPTORS.get()
        if self.argument in options:
            trains = is_training(self.argument, options[self.argument])
            model.train() if trains else model.eval()
            if not self.passes:
                del options[self.argument]
            if not self.passes and not self.chooses:
                interceptors = (*interceptors, (_has_phase, functools.partial(self._check_phase, trains)))
        if not isinstance(rngs, str):
            _seed(model, rngs or {})
        token = INTERCEPTORS.set(interceptors)
        try:
            _intercept(model)
            outputs = model(*inputs, **options)
        finally:
            INTERCEPTORS.reset(token)
        if mutable is False:
            return outputs
        wanted = COLLECTIONS if mutable is True else mutable
        states = dict(zip(COLLECTIONS, nnx.split(model, *_TYPES)[1:], strict=True))
        collections = {name: nnx.to_pure_dict(states[name]) for name in COLLECTIONS if name in wanted}
        if mutable is not True and "intermediates" in mutable:
            collections["intermediates"] = nnx.to_pure_dict(nnx.state(model, nnx.Intermediate))
        if "others" in collections:  # without what was sown
            others = flatten_dict(collections["others"])
            collections["others"] = unflatten_dict({path: v for path, v in others.items() if path in self.paths})
        return outputs, collections

    @taking_products
    def _check_phase(self, trains: bool, module: Any, call: Callable[..., Any], x: Any, options: dict[str, Any]) -> Any:
        """Calls a batch norm, unless the model's call says that it is in another phase than the model."""
        is_running = options.get("use_running_average")
        if isinstance(is_running, bool) and is_running == trains:
            raise ValueError(
                f"argument must be the name by which the call of {self.model_class.__name__} is told whether it "
                f"trains, got {self.argument!r}, which it does not take: with {self.argument}={trains} it calls "
                f"{name_of(module.path)} with use_running_average={is_running}. Pass its name for that, or "
                "argument=None if this is meant."
            )
        return call(x, **options)


def _has_phase(module: Any) -> bool:
    return hasattr(module, "use_running_average")


def _flat(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """Returns the arrays of all collections by their paths in the model."""
    return {path: value for values in variables.values() for path, value in flatten_dict(dict(values or {})).items()}


def at(model: Any, path: Path) -> Any:
    """Returns the part of a model at a path."""
    for key in path:
        model = getattr(model, key) if isinstance(key, str) and hasattr(model, key) else model[key]
    return model


def _seed(model: nnx.Module, rngs: Mapping[str, jax.Array]) -> None:
    """Gives each random stream a key of its own; those without any are made to raise where they are drawn from."""
    nodes = dict(nnx.iter_graph(model))
    streams = [(path, node) for path, node in nodes.items() if isinstance(node, rnglib.RngStream)]
    for number, (path, stream) in enumerate(sorted(streams, key=lambda item: [*map(str, item[0])])):
        collection = getattr(nodes.get(path[:-1]), "rng_collection", None)
        name = collection if stream.tag == "default" and collection else stream.tag
        # Noise that is common to a batch has a key that is common to its parts, which that of other streams is not.
        key = rngs.get(name, None if name == NOISE else rngs.get("default"))
        if key is None:
            stream.__class__ = _Keyless
            stream.wanted = name  # pyright: ignore[reportAttributeAccessIssue]
        else:
            shape = _compat.get_value(stream.key).shape  # of several keys where the model's parts are stacked
            key = jax.random.fold_in(key, number)
            _compat.set_value(stream.key, jax.random.split(key, shape) if shape else key)


class _Keyless(rnglib.RngStream):
    """A random stream for which no key was given."""

    wanted: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"rngs must have a key for the random stream {self.wanted!r}, which the model draws from.")


def _intercept(model: nnx.Module) -> None:
    """Makes the calls of a model's modules go through the interceptors, the last of them first."""
    interceptors = INTERCEPTORS.get()
    for path, module in list(_compat.iter_modules(model)) if interceptors else ():
        if any(is_wanted(module) for is_wanted, _ in interceptors):
            module.__class__ = _intercepted(type(module))
            module.path = path


def is_of_library(definition: Any) -> bool:
    """Returns whether a class or a function is defined by Flax or by this package."""
    return (definition.__module__ or "").partition(".")[0] in ("flax", "bnjax")


@functools.cache  # JAX never forgets the class of a tree
def _intercepted(kind: Any) -> type:
    """Returns a subclass whose calls may be replaced, and that gives its variables as a linen module does.

    A user's subclass of a layer may do more in a call of its own; what is replaced is the layer's call within it.
    """
    layer: Any = next((b for b in kind.__mro__ if is_of_library(b) and inspect.isfunction(_call_of(b))), kind)

    class Intercepted(layer):
        path: Path = ()

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            call: Any = functools.partial(layer.__call__, self)
            x, options = split_arguments(call, arguments, options)
            for is_wanted, replace in INTERCEPTORS.get():
                if is_wanted(self):
                    call = functools.partial(_replaced, replace, self, call)
            return call(x, **options)

        def has_variable(self, collection: str, name: str) -> bool:
            return isinstance(getattr(self, name, None), nnx.Variable)

        def get_variable(self, collection: str, name: str) -> Any:
            return _compat.get_value(getattr(self, name))

        def put_variable(self, collection: str, name: str, value: Any) -> None:
            _compat.set_value(getattr(self, name), value)

    intercepted = Intercepted if kind is layer else type(kind)(kind.__name__, (kind, Intercepted), {})
    intercepted.__name__ = kind.__name__
    return intercepted


def _replaced(replace: Replace, module: Any, call: Callable[..., Any], x: Any, **options: Any) -> Any:
    return replace(module, call, x, options)


def _call_of(kind: Any) -> Any:
    return getattr(kind, "__call__", None)  # noqa: B004 (of a class without one it is that of classes, no function)


def split_arguments(call: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Splits the arguments of a layer's call into its input, which is the first, and its options by name."""
    signature = inspect.signature(call)
    named = signature.bind(*arguments, **options).arguments
    more = named.pop(next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), ""), {})
    return named.pop(next(iter(named))), {**named, **more}
