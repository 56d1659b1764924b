"""A description of a model's batch norms, and of the usual mistakes with them."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from bnjax import _calls, _checks, _compat
from bnjax._functional import functional, name_of, own_argument
from bnjax._objective import PHASES, is_training
from bnjax.inference.reestimate import add_batch_moments, no_moments, traced

_DEAD, _EXPLODING = 1e-3, 1e3  # bounds of features' scales in units of the layer's median
_NEAR = 10.0  # the number of epsilons up to which a variance is near epsilon
_FAR_MEAN, _FAR_VAR = 3.0, 10.0  # bounds of medians: of the means' distance in running deviations, and of var's ratio
_LAG = 0.25  # the share of their start above which running statistics lag
_CLOSE = 0.1  # how closely they agree with that share then, and by how many deviations the batch's means are from 0
_SAME = 1e-3  # relative difference up to which numbers on several devices are the same
_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose, nnx.Linear, nnx.Conv, nnx.ConvTranspose)  # their features are the last
_APART = (
    "Devices have running statistics of their own: pass axis_name to the batch norms, or take the mean over devices "
    "(jax.lax.pmean) before evaluation."
)
_SHOWN = 5  # how many batch norms with the same mistake are shown

Spread = tuple[float, float, float]


class Mistake(NamedTuple):
    """A likely mistake in a model's use of batch norm.

    Attributes:
      text: description of the mistake, and of what to do.
      measured: the numbers that point to the mistake.
    """

    text: str
    measured: str = ""


class Description(NamedTuple):
    """The description of one batch norm.

    Attributes:
      path: path of its variables, joined by slashes; with the kind of batches where there are several: 'norm[1]'.
      features: number of features.
      multiplier: least, median and largest effective scale, |scale| / sqrt(var + epsilon).
      deviation: least, median and largest running deviation, sqrt(var).
      dead: features whose output hardly varies: |scale| · sqrt(var / (var + epsilon)) is below 1e-3 of its median.
      exploding: features whose effective scale is above 1e3 times its median.
      mistakes: the likely mistakes.
    """

    path: str
    features: int
    multiplier: Spread
    deviation: Spread
    dead: tuple[int, ...]
    exploding: tuple[int, ...]
    mistakes: tuple[Mistake, ...]


class _Settings(NamedTuple):
    """The settings of one batch norm, as far as they are known."""

    epsilon: float = 1e-5
    momentum: Any = None
    is_inference: bool = False
    is_comparable: bool = True
    mistakes: tuple[Mistake, ...] = ()


class _Norm(NamedTuple):
    """The arrays of one batch norm, and the mistakes that show in how they are stored."""

    arrays: dict[str, np.ndarray]
    mistakes: tuple[Mistake, ...]


def examine(variables: Any, model: Any = None, *args: Any, epsilon: float = 1e-5, **options: Any) -> list[Description]:
    """Describes each batch norm of a model; `describe` prints these descriptions.

    Args:
      variables: collections 'params' and 'batch_stats', or an nnx module.
      model: linen module, from which epsilon and momentum of each batch norm are taken; an nnx module has them itself.
      *args: arguments of the model's call: a batch, whose statistics are compared with the running ones. They follow an
        nnx module directly: `describe(module, x)`.
      epsilon: epsilon of the batch norms, where neither a model nor an nnx module is given.
      **options: options of the call, such as `training=False`.

    Returns:
      A description of each batch norm, in the order of the variables (of the calls, with a model).

    Raises:
      TypeError: for a linen module without a batch.
      ValueError: where there is no batch norm.

    >>> from bnjax.linen import BatchNorm
    >>> model = BatchNorm(use_running_average=True, momentum=0.1)
    >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
    >>> (one,) = examine(variables, model, jnp.ones((8, 3)))
    >>> [mistake.measured for mistake in one.mistakes]
    ['mean 0, variance 1', 'momentum 0.1', 'means 1 deviations away, variances 1e-05 times (medians)']
    """
    if isinstance(variables, nnx.Module):
        norms, settings = _of_nnx(variables)
        args = args if model is None else (model, *args)
        apply, variables = functional(variables, argument=own_argument(variables)) if args else (None, {})
        options = {"rngs": "own", **options}
    else:
        if model is not None and not args and not options:
            raise TypeError(
                "A model must come with what it is called with: describe(variables, model, batch, training=False)."
            )
        apply = None if model is None else model.apply
        norms = _of_variables(variables)
        settings = {path: _Settings(epsilon) for path in norms}
    batch_moments = {}
    if apply is not None:
        paths, settings = _settings(apply, variables, args, options)
        norms = {name: norms[name] for path in settings for name in norms if name.split("[")[0] == path}
        compared = [path for path, own in settings.items() if path in norms and own.is_comparable]
        start = {paths[name]: no_moments(norms[name].arrays["mean"]) for name in compared}
        of_batch = jax.jit(functools.partial(add_batch_moments, apply, True, options), static_argnums=3)
        batch_moments = of_batch(variables, start, *_calls.split_fixed(args))
        batch_moments = {name_of(path): jax.device_get(m) for path, m in batch_moments.items()}
    if not norms:
        raise ValueError(
            "variables must be an nnx module, or collections with a batch norm ('mean' and 'var' in 'batch_stats'), "
            f"got {type(variables).__name__} without one."
        )
    settings = {name: settings.get(name) or settings[name.split("[")[0]] for name in norms}
    norms = _with_merged_models(norms)
    return [_described(name, norm, settings[name], batch_moments.get(name)) for name, norm in norms.items()]


def describe(variables: Any, model: Any = None, *args: Any, epsilon: float = 1e-5, **options: Any) -> None:
    """Prints each batch norm's effective scale, running deviation, dead and exploding features, and likely mistakes.

    It warns of running statistics that have never moved, of variances near epsilon, below zero or not finite, of
    statistics in half precision, and of those that differ between copies of one model or are the same for several; with
    a model, of a momentum in PyTorch's convention, and of a call for inference that takes the batch's statistics; and
    with a batch, of running statistics that lag or are far from the batch's, of a batch of one element, and of features
    along a wrong axis.

    Args:
      variables: collections 'params' and 'batch_stats', or an nnx module.
      model: linen module, from which epsilon and momentum of each batch norm are taken; an nnx module has them itself.
      *args: arguments of the model's call: a batch, whose statistics are compared with the running ones. They follow an
        nnx module directly: `describe(module, x)`.
      epsilon: epsilon of the batch norms, where neither a model nor an nnx module is given.
      **options: options of the call, such as `training=False`.

    Raises:
      TypeError: for a linen module without a batch.
      ValueError: where there is no batch norm.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(3)
    >>> describe({'params': {'norm': params}, 'batch_stats': {'norm': batch_stats}})  # doctest: +ELLIPSIS
                            Batch norms...
    """
    from rich.console import Console
    from rich.table import Table

    descriptions = examine(variables, model, *args, epsilon=epsilon, **options)
    table = Table(title="Batch norms: least, median and largest of the features", title_justify="left")
    for name in ("batch norm", "features", "|scale| / √(var + ε)", "√var", "dead", "exploding"):
        table.add_column(name, justify="left" if name == "batch norm" else "right", no_wrap=True)
    mistakes: dict[str, list[str]] = {}
    for norm in descriptions:
        spreads = ("  ".join(f"{value:.3g}" for value in spread) for spread in (norm.multiplier, norm.deviation))
        table.add_row(norm.path, str(norm.features), *spreads, str(len(norm.dead)), str(len(norm.exploding)))
        for text, measured in norm.mistakes:
            mistakes.setdefault(text, []).append(f"  {norm.path}: {measured}")
    console = Console(markup=False, highlight=False)
    console.print(table)
    for text, places in mistakes.items():
        more = [f"  and {len(places) - _SHOWN} more"] * (len(places) > _SHOWN)
        console.print("\n".join([text, *places[:_SHOWN], *more]), soft_wrap=True)


def _of_variables(variables: Mapping[str, Any]) -> dict[str, _Norm]:
    """Returns the arrays of each batch norm, by path."""
    stats: Any = flatten_dict(nn.meta.unbox(dict(variables.get("batch_stats", {}))))
    params: Any = flatten_dict(nn.meta.unbox(dict(variables.get("params", {}))))
    paths = [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]
    norms = {}
    for path in sorted(paths, key=_natural):
        arrays = {name: stats[*path, name] for name in ("mean", "var")}
        arrays |= {name: params[*path, name] for name in ("scale", "bias") if (*path, name) in params}
        norms |= _by_kind("/".join(path), arrays)
    return norms


def _by_kind(path: str, arrays: Mapping[str, Any]) -> dict[str, _Norm]:
    """Returns the arrays of a batch norm by path, one entry for each kind of batches (`SplitBatchNorm`)."""
    wide = {name: np.asarray(v, complex if np.iscomplexobj(v) else float) for name, v in arrays.items()}
    kinds = len(wide["mean"]) if wide.get("scale", wide.get("bias", wide["mean"])).ndim < wide["mean"].ndim else None
    if kinds is None:
        return {path: _Norm(wide, (*_mistakes_of_storage(arrays), *_mistakes_of_copies(wide)))}
    own = {name: value for name, value in wide.items() if name not in ("mean", "var")}
    each = ({**own, "mean": wide["mean"][i], "var": wide["var"][i]} for i in range(kinds))
    return {f"{path}[{i}]": _Norm(kind, tuple(_mistakes_of_storage(arrays))) for i, kind in enumerate(each)}


def _natural(path: tuple[str, ...]) -> list[Any]:
    """Returns a key that sorts paths with the numbers in their names by value."""
    return [(int(part) if part.isdigit() else 0, part) for name in path for part in re.split(r"(\d+)", name)]


def _of_nnx(module: nnx.Module) -> tuple[dict[str, _Norm], dict[str, _Settings]]:
    """Returns arrays and settings of each batch norm of an nnx module, by path."""
    norms, settings = {}, {}
    for path, part in _compat.iter_modules(module):
        if _calls.is_norm(part):
            name = name_of(path)
            arrays = {n: getattr(part, n) for n in ("mean", "var", "scale", "bias")}
            kinds = _by_kind(name, {n: v[...] for n, v in arrays.items() if v is not None})
            norms |= kinds
            own = _Settings(part.epsilon, part.momentum, bool(part.use_running_average))
            settings |= dict.fromkeys(kinds, own)
    return norms, settings


def _settings(apply: Any, variables: Any, args: Any, options: Any) -> tuple[dict[str, Any], dict[str, _Settings]]:
    """Returns the path and the settings of each batch norm that a model calls, by name."""
    paths, settings, of_linear = {}, {}, {}
    told = [name for name in PHASES if isinstance(options.get(name), bool | np.bool_)]
    is_inference = told and not any(is_training(name, options[name]) for name in told)

    def note_linear(module, call, x, call_options):
        y = call(x, **call_options)
        of_linear[id(y)] = y  # kept, so that no other array gets its id
        return y

    def note(module, call, x, call_options):
        running = _calls.is_running(module, call_options)
        statistics = _calls.statistics_of(module)
        comparable = statistics is not None and statistics.is_variance and statistics.kinds is None
        mistakes = [*_mistakes_of_axis(module, x, id(x) in of_linear)]
        if is_inference and not running and statistics is not None and statistics.moves:
            text = "A call for inference takes the batch's statistics: pass use_running_average=not training, or how "
            mistakes.append(Mistake(text + "its option is named.", f"{told[0]}={options[told[0]]}"))
        paths[name := name_of(module.path)] = module.path
        settings[name] = _Settings(module.epsilon, module.momentum, running, comparable, tuple(mistakes))
        return call(x, **call_options)

    with _calls.intercept(lambda module: isinstance(module, _LINEAR), note_linear):
        traced(jax.eval_shape, apply, variables, args, options, note)
    return paths, settings


def _described(path: str, norm: _Norm, settings: _Settings, batch_moments: Any) -> Description:
    arrays = norm.arrays
    mean, var = arrays["mean"], arrays["var"]
    scale = np.abs(arrays.get("scale", np.ones(())))
    with np.errstate(invalid="ignore", divide="ignore"):
        multiplier = scale / np.sqrt(var + settings.epsilon)
        varies = multiplier * np.sqrt(var)
        dead = np.flatnonzero(varies <= _DEAD * np.median(varies))
        exploding = np.flatnonzero(multiplier > _EXPLODING * np.median(multiplier))
        deviation = np.sqrt(var)
    return Description(
        path,
        mean.shape[-1] if mean.ndim else 1,
        _spread(multiplier),
        _spread(deviation),
        tuple(dead.tolist()),
        tuple(exploding.tolist()),
        (*norm.mistakes, *_mistakes(mean, var, settings, batch_moments), *settings.mistakes),
    )


def _spread(values: np.ndarray) -> Spread:
    if np.isnan(values).all():
        return np.nan, np.nan, np.nan
    return float(np.nanmin(values)), float(np.nanmedian(values)), float(np.nanmax(values))


def _mistakes(mean: np.ndarray, var: np.ndarray, settings: _Settings, batch_moments: Any) -> Iterator[Mistake]:
    epsilon = settings.epsilon
    if broken := (~np.isfinite(mean) | ~np.isfinite(var)).sum():
        text = "Running statistics are not finite: a batch held NaN or infinity, or its variance was taken in one pass."
        yield Mistake(text, f"{broken} of {var.size} features")
    if negative := (var < 0).sum():
        text = "Running variances are negative: they were taken as E[x²] − E[x]² of large means."
        yield Mistake(text, f"{negative} of {var.size} features")
    if (mean == 0).all() and (var == 1).all():
        text = "Running statistics have never moved: put what training returns in 'batch_stats' back into the variables"
        here = ", as inference here does not normalize." if settings.is_inference else " before inference."
        yield Mistake(text + here, "mean 0, variance 1")
    if near := ((var >= 0) & (var < _NEAR * epsilon)).sum():
        text = f"Running variances are below {_NEAR:g} times epsilon, which decides the output then: the features are "
        text += "nearly constant, or need a smaller epsilon."
        yield Mistake(text, f"{near} of {var.size} features, epsilon {epsilon:g}")
    if isinstance(settings.momentum, int | float | np.number) and settings.momentum < 0.5:
        text = "momentum weighs the old value, as in Flax and Keras: where it comes from PyTorch, pass 1 minus it."
        yield Mistake(text, f"momentum {settings.momentum:g}")
    if batch_moments is not None and np.all(batch_moments.count <= 1) and not settings.is_inference:
        text = "The batch has at most one element for each feature: the output is the bias, whatever the input. Pass "
        text += "more examples, or use the running statistics."
        yield Mistake(text, f"{np.max(batch_moments.count):g} of each feature")
    if batch_moments is None or not var.size or not np.all(batch_moments.count > 1):
        return
    if left := _share_of_start(mean, var, batch_moments, epsilon):
        text = "Running statistics have moved for too few steps: train for longer, lower the momentum, or re-estimate "
        text += "them with bnjax.inference.reestimate_batch_stats."
        yield Mistake(text, f"{left:.2g} of their start is left" + _steps_of(left, settings.momentum))
        return
    with np.errstate(invalid="ignore"):
        distance = np.median(np.abs(batch_moments.mean - mean) / np.sqrt(np.maximum(var, 0) + epsilon))
        ratio = np.median((batch_moments.var + epsilon) / (np.maximum(var, 0) + epsilon))
    if distance > _FAR_MEAN or not 1 / _FAR_VAR < ratio < _FAR_VAR:
        text = "Running statistics are far from the batch's: train for longer, lower the momentum, or re-estimate "
        text += "them with bnjax.inference.reestimate_batch_stats."
        yield Mistake(text, f"means {distance:.3g} deviations away, variances {ratio:.3g} times (medians)")


def _share_of_start(mean: np.ndarray, var: np.ndarray, batch: Any, epsilon: float) -> float | None:
    """Returns the share of mean 0 and variance 1 in the running statistics, if the rest is the batch's; else None."""
    mean, batch_mean, deviation = (np.ravel(v) for v in (mean, batch.mean, np.sqrt(batch.var + epsilon)))
    with np.errstate(all="ignore"):
        running, of_batch = mean / deviation, batch_mean / deviation
        moved = np.vdot(of_batch, running).real / np.vdot(of_batch, of_batch).real
        expected = 1 + moved * (np.ravel(batch.var) - 1)
        size, apart = np.linalg.norm(of_batch), np.linalg.norm(running - moved * of_batch)
        is_mixture = apart < _CLOSE * min(moved, 1 - moved) * size
        is_mixture &= np.all(np.abs(np.ravel(var) / expected - 1) < _CLOSE)
        is_known = mean.size >= 4 and size > _CLOSE * np.sqrt(mean.size)
    return float(1 - moved) if is_known and is_mixture and 1 - moved > _LAG else None


def _steps_of(share: float, momentum: Any) -> str:
    """Returns after how many steps of a momentum such a share of the start is left, where the momentum is known."""
    is_known = isinstance(momentum, float | np.number) and 0 < momentum < 1
    steps = round(np.log(share) / np.log(momentum)) if is_known else 0
    return f", as after {steps} step{'s' * (steps > 1)} of momentum {momentum:g}" if steps else ""


def _mistakes_of_storage(arrays: Mapping[str, Any]) -> Iterator[Mistake]:
    stats = [arrays["mean"], arrays["var"]]
    if narrow := {str(v.dtype) for v in map(np.asarray, stats) if v.dtype.itemsize < 4}:
        text = "Running statistics are in half precision, which rounds away an average's small steps: keep them in "
        yield Mistake(text + "float32 (force_float32_reductions=True).", ", ".join(sorted(narrow)))
    if any(map(_differs_by_device, stats)):
        yield Mistake(_APART, "one array, with other numbers on other devices")


def _differs_by_device(value: Any) -> bool:
    """Returns whether an array of which each device has a copy has other numbers in some."""
    if not isinstance(value, jax.Array) or not value.is_fully_replicated:
        return False
    copies = [np.asarray(shard.data, complex) for shard in value.addressable_shards]
    return not np.allclose(copies[0], copies, rtol=_SAME, atol=0, equal_nan=True)


def _copies(arrays: Mapping[str, np.ndarray]) -> tuple[list[Any], list[Any]] | None:
    """Returns parameters and statistics that have a first axis over copies of a model; None without one."""
    params, stats = ([arrays[n] for n in names if n in arrays] for names in (("scale", "bias"), ("mean", "var")))
    return (params, stats) if params and stats[0].ndim > 1 and len(stats[0]) > 1 else None


def _mistakes_of_copies(arrays: Mapping[str, np.ndarray]) -> Iterator[Mistake]:
    params, stats = _copies(arrays) or ([], [])
    is_same_trained = any(np.ptp(v[0]) > 0 for v in params) and all((v == v[:1]).all() for v in params)
    if is_same_trained and not all(np.allclose(v, v[:1], rtol=_SAME, atol=0) for v in stats):
        yield Mistake(_APART, f"{len(stats[0])} copies with the same scale and bias")


def _with_merged_models(norms: dict[str, _Norm]) -> dict[str, _Norm]:
    """Adds that several models share their statistics, if all batch norms do: those of a common input may."""
    copied = {name: found for name, norm in norms.items() if (found := _copies(norm.arrays))}
    for values in copied.values():
        has_same_params, has_same_stats = (all((v == v[:1]).all() for v in part) for part in values)
        if has_same_params or not has_same_stats or not values[1][0].any():
            return norms
    text = "Several models have the same running statistics: their vmap binds the batch norms' axis_name, and so "
    text += "merges them. Give it another name."
    merged = {
        name: Mistake(text, f"{len(s[0])} models with other scales and biases") for name, (_, s) in copied.items()
    }
    return norms | {n: norms[n]._replace(mistakes=(*norms[n].mistakes, m)) for n, m in merged.items()}


def _mistakes_of_axis(module: Any, x: Any, is_of_linear: bool) -> Iterator[Mistake]:
    """Yields mistakes with the axis of features of a batch norm's input."""
    last, shape = np.ndim(x) - 1, np.shape(x)
    axes = _checks.feature_axes(module.axis, np.ndim(x))
    is_channels_first = axes == (3,) and shape[1] == 3 != shape[2] == shape[3]
    if is_channels_first or (is_of_linear and last > 1 and last not in axes):
        text = "Features are taken from a wrong axis: axis=-1 where they are the last, as Flax's layers have them, and "
        text += "axis=1 for arrays [batch, channels, height, width]."
        yield Mistake(text, f"axis {', '.join(map(str, axes))} of an input {list(shape)}")
