"""Folding of the batch norms of a whole Flax model into its linear layers."""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _calls, _checks, _compat
from bnjax._functional import at, functional, is_of_library, name_of, own_argument
from bnjax.inference.folding import fold, fold_before
from bnjax.models import layers

Path = tuple[Any, ...]

_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose, layers.Conv, nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# What a layer may be given without its product becoming another one, as by `dot_general`.
_PLAIN = (
    *("features", "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count"),
    *("use_bias", "mask", "dtype", "param_dtype", "precision", "kernel_init", "bias_init", "transpose_kernel"),
    *("parent", "name", "in_features", "out_features", "rngs"),
)


class _Norm(NamedTuple):
    """A batch norm at inference, of input and output of one dtype."""

    path: Path
    epsilon: Any
    dtype: Any


class _Linear(NamedTuple):
    """A linear layer: its kernel's dimensions and axis of outputs, its groups, and whether constants stay constants."""

    path: Path
    ndim: int
    axis: int
    groups: int
    passes_constants: bool


class Folded(nnx.Module):
    """What is left of a batch norm of an nnx model that was folded into another layer: it returns its input."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns `x`."""
        return x


def foldable_pairs(model: Any, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
    """Returns paths of linear layers and batch norms that `fold_model` folds: ('block/Conv_0', 'block/BatchNorm_0'), ….

    Args:
      model: linen module, whose variables follow; or nnx module.
      *args: arguments of the model's call; shapes suffice (`jax.ShapeDtypeStruct`).
      **kwargs: options of the model's call, such as `training=False`.
    """
    return [*_foldable(*_functional_form(model, args), kwargs)]


def fold_model(model: Any, *args: Any, pairs: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
    """Folds the batch norms that follow (or precede) a linear layer into it, for a model at inference.

    The model is run abstractly to find them: batch norms over the last axis whose input is the output of a `Dense`
    (`nnx.Linear`), `Conv` or `ConvTranspose` that nothing else uses, and those whose output, used by nothing else, is
    the input of a `Dense` or of a `Conv` that pads nothing. Layers inside Flax's scan and vmap, those that are called
    several times, those whose variables are used elsewhere too, or transformed first (tied weights, WeightNorm), those
    with a product (`dot_general`) or, in subclasses, a call of their own, and those whose dtypes differ stay as they
    are.

    Args:
      model: linen module, whose variables follow; or nnx module.
      *args: arguments of the model's call; shapes suffice (`jax.ShapeDtypeStruct`).
      pairs: the pairs of `foldable_pairs` to fold; all of them by default.
      **kwargs: options of the model's call, such as `training=False`, which an nnx module may do without, as it is
        looked at in its `eval()`.

    Returns:
      For a linen module `(apply, variables)`: a function like `model.apply`, for inference, and variables for it, which
      leave out the folded batch norms and have a bias for each layer that these were folded into. Partitioning metadata
      is left out. For an nnx module another one, in its `eval()`, without these batch norms.

    Raises:
      ValueError: for a pair that can't be folded; the message lists the pairs that can.

    >>> from bnjax.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(4), BatchNorm(use_running_average=True), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> apply, folded = fold_model(model, variables, jnp.ones((8, 3)))
    >>> list(folded['params']), list(folded)
    (['layers_0'], ['params'])
    """
    function, variables, args = _functional_form(model, args)
    foldable = _foldable(function, variables, args, kwargs)
    pairs = [*foldable] if pairs is None else [(layer, norm) for layer, norm in pairs]
    if wrong := [pair for pair in pairs if pair not in foldable]:
        raise ValueError(f"pairs must be of those that can be folded, {list(foldable)}, got {wrong}.")
    flat: Any = flatten_dict(dict(variables))
    for layer, norm, is_before in (foldable[pair] for pair in pairs):
        params, batch_stats = (_pop_variables(flat, collection, norm.path) for collection in ("params", "batch_stats"))
        kernel, bias = (flat.get(("params", *layer.path, name)) for name in ("kernel", "bias"))
        if is_before:
            folded = fold_before(kernel, bias, params, batch_stats, epsilon=norm.epsilon, groups=layer.groups)
        else:
            folded = fold(kernel, bias, params, batch_stats, epsilon=norm.epsilon, axis=layer.axis)
        flat |= {("params", *layer.path, name): value for name, value in zip(("kernel", "bias"), folded, strict=True)}
    changed = [foldable[pair][:2] for pair in pairs]
    return _folded_nnx(model, changed, flat) if isinstance(model, nnx.Module) else _folded_linen(model, changed, flat)


def _functional_form(model: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """Returns a model at inference as a function, its variables, and the arguments of its call."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        return (*functional(model, argument=own_argument(model)), args)
    if not args or not isinstance(args[0], Mapping):
        raise TypeError("a linen model must be followed by its variables: fold_model(model, variables, x).")
    return model.apply, nn.meta.unbox(args[0]), args[1:]


def _folded_linen(model: nn.Module, changed: list[Any], flat: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns a linen model without its folded batch norms as a function, and its variables."""
    folded_layers, folded_norms = ({name_of(pair[i].path) for pair in changed} for i in (0, 1))

    def without_folded(module, call, x, options):
        name = name_of(module.path)
        if name in folded_norms:
            return x
        y = call(x, **options)
        if name in folded_layers and not module.use_bias:
            bias = module.get_variable("params", "bias").astype(y.dtype)
            y += bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        with _calls.intercept(_is_norm_or_linear, without_folded):
            return model.apply(variables, *args, **kwargs)

    return apply, unflatten_dict(flat)


def _folded_nnx(model: nnx.Module, changed: list[Any], flat: Any) -> nnx.Module:
    """Returns a copy of an nnx model without its folded batch norms."""
    model = nnx.clone(model)
    model.eval()
    for layer, norm in changed:
        linear, folded = at(model, layer.path), at(model, norm.path)
        _compat.set_value(linear.kernel, flat["params", *layer.path, "kernel"])
        linear.bias = nnx.Param(flat["params", *layer.path, "bias"])
        linear.use_bias = True
        for name in [name for name, value in vars(folded).items() if isinstance(value, nnx.Variable)]:
            delattr(folded, name)
        folded.__class__ = Folded  # wherever the model refers to it
    return model


def _pop_variables(flat: Any, collection: str, path: Path) -> dict[str, Any]:
    """Removes a module's variables of a collection and returns them."""
    return {key[-1]: flat.pop(key) for key in list(flat) if key[:-1] == (collection, *path)}


def _foldable(
    apply: Callable[..., Any], variables: Any, args: Any, kwargs: Any
) -> dict[tuple[str, str], tuple[_Linear, _Norm, bool]]:
    """Returns, by their names, the layers and the batch norms to fold into them, and whether these come before."""
    modules: dict[str, _Linear | _Norm | None] = {}
    calls: Counter[str] = Counter()

    def note(module, call, x, options):
        name = name_of(module.path)
        calls[name] += 1
        y = _calls.marked(module, call, x, options)
        modules[name] = _norm(module, x, y, options) if _calls.is_norm(module) else _linear(module)
        return y

    arrays, fixed = _calls.split_fixed(args)

    def run(variables, arrays):
        with _calls.intercept(_is_norm_or_linear, note):
            return apply(variables, *fixed.filled(arrays), **kwargs, mutable=["batch_stats"])[0]

    flat: Any = flatten_dict(dict(variables))
    jaxpr = jax.make_jaxpr(run)(variables, arrays).jaxpr
    reused = set(_used_again(variables, jaxpr))
    foldable, taken = {}, set()
    for before, after in _calls.followers(jaxpr):
        first, second = modules[before], modules[after]
        if {calls[before], calls[after]} != {1} or {before, after} & (taken | reused):
            continue
        if not _fit(first, second, flat):
            continue
        if isinstance(first, _Linear) and isinstance(second, _Norm):
            foldable[before, after] = first, second, False
            taken.add(after)  # another batch norm before the layer can be folded as well
        elif isinstance(first, _Norm) and isinstance(second, _Linear) and second.passes_constants:
            foldable[after, before] = second, first, True
            taken.add(before)
    return foldable


def _fit(first: Any, second: Any, flat: Any) -> bool:
    """Returns whether they are a batch norm of one set of statistics and a linear layer of a kernel no narrower."""
    norm, linear = (first, second) if isinstance(first, _Norm) else (second, first)
    if not isinstance(norm, _Norm) or not isinstance(linear, _Linear):
        return False
    kernel, mean = flat.get(("params", *linear.path, "kernel")), flat.get(("batch_stats", *norm.path, "mean"))
    if kernel is None or mean is None or ("batch_stats", *norm.path, "var") not in flat:
        return False  # in nnx they may be another module's variables
    is_single = np.ndim(mean) == 1 and np.ndim(kernel) == linear.ndim  # Flax's vmap would have given them several sets
    return is_single and jnp.promote_types(kernel.dtype, norm.dtype) == kernel.dtype


def _used_again(variables: Any, jaxpr: Any) -> Iterator[str]:
    """Yields paths of modules with variables that are used elsewhere too, or transformed first, as by WeightNorm."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    for path, count in zip(paths, _calls.uses(jaxpr), strict=False):  # the variables are the first inputs
        if count > 1 and path[0].key in ("params", "batch_stats"):
            yield name_of(tuple(entry.key for entry in path[1:-1]))


def _norm(module: Any, x: Any, y: Any, options: Mapping[str, Any]) -> _Norm | None:
    is_running = _calls.is_running(module, options)
    is_last = _checks.feature_axes(module.axis, np.ndim(x)) == (np.ndim(x) - 1,)
    one_each = np.shape(module.get_variable("batch_stats", "mean")) == np.shape(x)[-1:]
    own = next(base for base in _class_of(module).__mro__ if "__call__" in vars(base))
    is_plain = is_of_library(own)  # a subclass with a call of its own may do more in it
    is_foldable = is_plain and is_running and is_last and one_each and x.dtype == y.dtype
    return _Norm(module.path, module.epsilon, y.dtype) if is_foldable else None


def _is_norm_or_linear(module: Any) -> bool:
    return _calls.is_norm(module) or isinstance(module, _LINEAR)


def _class_of(module: Any) -> Any:
    """Returns the class that an intercepted module has in its model."""
    return type(module) if isinstance(module, nn.Module) else type(module).__mro__[1]


def _linear(module: Any) -> _Linear | None:
    options, kind = vars(module), _class_of(module)
    if isinstance(module, nn.Module):
        defaults = {field.name: field.default for field in dataclasses.fields(module)}
    else:
        defaults = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    is_plain = all(options.get(n, value) == value for n, value in defaults.items() if n not in _PLAIN)
    if kind not in _LINEAR or not is_plain:  # a subclass may use its kernel otherwise
        return None
    window = options.get("kernel_size") or ()
    sizes = (window,) if isinstance(window, int) else tuple(window)
    padding = options.get("padding", "VALID")
    pads = np.any(padding) if not isinstance(padding, str) else padding != "VALID" and any(size > 1 for size in sizes)
    return _Linear(
        module.path,
        2 + len(sizes),
        -2 if options.get("transpose_kernel") else -1,
        options.get("feature_group_count", 1),
        not pads
        and options.get("mask") is None
        and bool(np.all(np.equal(options.get("input_dilation") or 1, 1)))
        and not isinstance(module, nn.ConvTranspose | nnx.ConvTranspose),
    )
