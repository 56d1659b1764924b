"""Folding of the batch norms of a whole Flax model into its linear layers."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _checks, linen
from bnjax.inference import _calls
from bnjax.inference.folding import fold, fold_before
from bnjax.models import layers

Path = tuple[str, ...]

_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose, layers.Conv)
# What a layer may be given without its product becoming another one, as by `dot_general`.
_PLAIN = (
    *("features", "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count"),
    *("use_bias", "mask", "dtype", "param_dtype", "precision", "kernel_init", "bias_init", "transpose_kernel"),
    *("parent", "name"),
)


class _Norm(NamedTuple):
    """A batch norm at inference, of input and output of one dtype."""

    path: Path
    epsilon: Any
    dtype: Any


class _Linear(NamedTuple):
    """A linear layer: the axis of its kernel's outputs, its groups, and whether it takes constants to constants."""

    path: Path
    axis: int
    groups: int
    passes_constants: bool


def foldable_pairs(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
    """Returns paths of linear layers and batch norms that `fold_model` folds: ('block/Conv_0', 'block/BatchNorm_0'), ….

    Args:
      model: linen module.
      variables: collections of the model.
      *args: arguments of the model's call; shapes suffice (`jax.ShapeDtypeStruct`).
      **kwargs: options of the model's call, such as `training=False`.
    """
    return [("/".join(layer.path), "/".join(norm.path)) for layer, norm, _ in _pairs(model, variables, args, kwargs)]


def fold_model(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, pairs: Sequence[tuple[str, str]] | None = None, **kwargs
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Folds the batch norms that follow (or precede) a linear layer into it, for a model at inference.

    The model is run abstractly to find them: batch norms over the last axis whose input is the output of a `Dense`,
    `Conv` or `ConvTranspose` that nothing else uses, and those whose output, used by nothing else, is the input of a
    `Dense` or of a `Conv` that pads nothing. Layers inside Flax's scan and vmap, those that are called several times,
    those whose variables are used elsewhere too, or transformed first (tied weights, WeightNorm), those with a product
    of their own (`dot_general`), and those whose dtypes differ stay as they are.

    Args:
      model: linen module.
      variables: collections of the model.
      *args: arguments of the model's call; shapes suffice (`jax.ShapeDtypeStruct`).
      pairs: the pairs of `foldable_pairs` to fold; all of them by default.
      **kwargs: options of the model's call, such as `training=False`.

    Returns:
      `(apply, variables)`: a function like `model.apply`, for inference, and variables for it, which leave out the
      folded batch norms and have a bias for each layer that these were folded into. Partitioning metadata is left out.

    Raises:
      ValueError: for a pair that can't be folded; the message lists the pairs that can.

    >>> from bnjax.linen import BatchNorm
    >>> model = nn.Sequential([nn.Dense(4), BatchNorm(use_running_average=True), nn.relu])
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> apply, folded = fold_model(model, variables, jnp.ones((8, 3)))
    >>> list(folded['params']), list(folded)
    (['layers_0'], ['params'])
    """
    variables = nn.meta.unbox(variables)
    foldable = {
        ("/".join(layer.path), "/".join(norm.path)): (layer, norm, is_before)
        for layer, norm, is_before in _pairs(model, variables, args, kwargs)
    }
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
    folded_layers, folded_norms = ({pair[i] for pair in pairs} for i in (0, 1))

    def without_folded(module, call, x, options):
        name = "/".join(module.path)
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


def _pop_variables(flat: Any, collection: str, path: Path) -> dict[str, Any]:
    """Removes a module's variables of a collection and returns them."""
    return {key[-1]: flat.pop(key) for key in list(flat) if key[:-1] == (collection, *path)}


def _pairs(model: nn.Module, variables: Any, args: Any, kwargs: Any) -> list[tuple[_Linear, _Norm, bool]]:
    """Returns the layers and the batch norms to fold into them, and whether these come before their layer."""
    modules: dict[str, _Linear | _Norm | None] = {}
    calls: Counter[str] = Counter()

    def note(module, call, x, options):
        name = "/".join(module.path)
        calls[name] += 1
        y = _calls.marked(module, call, x, options)
        modules[name] = _norm(module, x, y, options) if _calls.is_norm(module) else _linear(module)
        return y

    leaves, structure = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}  # others, such as False, are static

    def run(variables, arrays):
        of_call = structure.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))
        with _calls.intercept(_is_norm_or_linear, note):
            return model.apply(variables, *of_call, **kwargs, mutable=["batch_stats"])

    flat: Any = flatten_dict(dict(variables))
    jaxpr = jax.make_jaxpr(run)(variables, arrays).jaxpr
    reused = set(_used_again(variables, jaxpr))
    pairs, taken = [], set()
    for before, after in _calls.followers(jaxpr):
        first, second = modules[before], modules[after]
        if {calls[before], calls[after]} != {1} or {before, after} & (taken | reused):
            continue
        if not _fit(first, second, flat):
            continue
        if isinstance(first, _Linear) and isinstance(second, _Norm):
            pairs.append((first, second, False))
            taken.add(after)  # another batch norm before the layer can be folded as well
        elif isinstance(first, _Norm) and isinstance(second, _Linear) and second.passes_constants:
            pairs.append((second, first, True))
            taken.add(before)
    return pairs


def _fit(first: Any, second: Any, flat: Any) -> bool:
    """Returns whether they are a batch norm of one set of statistics and a linear layer of a kernel no narrower."""
    norm, linear = (first, second) if isinstance(first, _Norm) else (second, first)
    if not isinstance(norm, _Norm) or not isinstance(linear, _Linear):
        return False
    kernel = flat["params", *linear.path, "kernel"].dtype
    is_single = np.ndim(flat["batch_stats", *norm.path, "mean"]) == 1  # Flax's vmap would have given it several sets
    return is_single and jnp.promote_types(kernel, norm.dtype) == kernel


def _used_again(variables: Any, jaxpr: Any) -> Iterator[str]:
    """Yields paths of modules with variables that are used elsewhere too, or transformed first, as by WeightNorm."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    for path, count in zip(paths, _calls.uses(jaxpr), strict=False):  # the variables are the first inputs
        if count > 1 and path[0].key == "params":
            yield "/".join(entry.key for entry in path[1:-1])


def _norm(module: Any, x: Any, y: Any, options: Mapping[str, Any]) -> _Norm | None:
    is_running = linen.is_running(module, (x,), options)
    is_last = _checks.feature_axes(module.axis, np.ndim(x)) == (np.ndim(x) - 1,)
    one_each = np.shape(module.variables["batch_stats"]["mean"]) == np.shape(x)[-1:]
    is_foldable = is_running and is_last and one_each and x.dtype == y.dtype
    return _Norm(module.path, module.epsilon, y.dtype) if is_foldable else None


def _is_norm_or_linear(module: nn.Module) -> bool:
    return _calls.is_norm(module) or isinstance(module, _LINEAR)


def _linear(module: nn.Module) -> _Linear | None:
    options = vars(module)
    others = (field for field in dataclasses.fields(module) if field.name not in _PLAIN)
    is_plain = all(options.get(field.name, field.default) == field.default for field in others)
    if type(module) not in _LINEAR or not is_plain:  # a subclass may use its kernel otherwise
        return None
    window = options.get("kernel_size") or ()
    sizes = (window,) if isinstance(window, int) else tuple(window)
    padding = options.get("padding", "VALID")
    pads = np.any(padding) if not isinstance(padding, str) else padding != "VALID" and any(size > 1 for size in sizes)
    return _Linear(
        module.path,
        -2 if options.get("transpose_kernel") else -1,
        options.get("feature_group_count", 1),
        not pads
        and options.get("mask") is None
        and bool(np.all(np.equal(options.get("input_dilation") or 1, 1)))
        and not isinstance(module, nn.ConvTranspose),
    )
