"""Statistics of a data set, or of a shifted batch, in place of running averages."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _calls, _checks
from bnjax._calls import statistics_of
from bnjax._functional import name_of
from bnjax._moments import moments
from bnjax._objective import inputs_of
from bnjax._sync import Moments, merge_moments, with_counts_of_features
from bnjax.norm import update_batch_stats
from bnjax.variants.split import moments_of_kinds

_DATA_MOMENTS = "moments of the data"
Apply = Callable[..., Any]


def reestimate_batch_stats(
    apply_fn: Apply,
    variables: Mapping[str, Any],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    exactly: bool = False,
    bessel_correction: bool = False,
    **options: Any,
) -> Any:
    """Returns the collection 'batch_stats' with the moments of a data set in place of the running averages.

    The batches' moments are merged by their counts, so that each batch norm gets the mean and the variance of all its
    inputs. These inputs depend on how the batch norms before it normalize:

    - By default they normalize by their batch's statistics, as in training, in one pass over the data. The statistics
      of the first layer are the data's; those of deeper layers depend on the batches' size.
    - With `exactly` they normalize by the data's statistics, as at inference. This takes as many passes as there are
      batch norms in a row, on the longest way: each pass settles those whose predecessors are settled. The result does
      not depend on how the data are cut into batches.

    Use it after weights have been averaged (SWA, EMA), where running averages belong to other weights; where running
    averages lag behind or come from too small batches; and to move a model to other data.

    Args:
      apply_fn: function such as `model.apply`, of a linen model with batch norms of Flax or ours; of an nnx model the
        function that `bnjax.nnx.functional(model)` returns with the variables.
      variables: collections of the model.
      batches: inputs of the model, each an array or a tuple of arguments; a list, or a function that returns an
        iterator, which is called for each pass and once before. They may be sharded over a mesh.
      exactly: whether to normalize by the data's statistics, in a pass for each depth of batch norms.
      bessel_correction: whether to store the variance times n / (n − 1), as PyTorch's `update_bn` does.
      **options: options of each call, such as `training=True` where this chooses the model's training phase.

    Returns:
      New statistics in the structure and dtypes of `variables['batch_stats']`.

    Raises:
      ValueError: if there is no batch or no batch norm; for a batch norm that gets no examples, or of another norm
        (`LpBatchNorm`); and if the data's statistics are not finite.
      TypeError: for an iterator, which can't be read twice.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2, lines 8 to 12; Wu & Johnson 2021 (arXiv 2105.07576),
      section 3 ("precise" batch norm); Izmailov et al. 2018 (arXiv 1803.05407), section 3.2.
    """
    boxed_variables, variables = variables, dict(nn.meta.unbox(variables))
    means, first = _means(variables), _first(batches)
    fixed = _that_never_move(apply_fn, variables, first, options)
    means = {path: mean for path, mean in means.items() if path not in fixed}
    passes = 1 + _depth(apply_fn, variables, first, options) if exactly else 1
    moments_of = jax.jit(functools.partial(add_batch_moments, apply_fn, exactly, options), static_argnums=3)
    for _ in range(passes):
        moments_by_path = {path: no_moments(mean) for path, mean in means.items()}
        for batch in _read(batches):
            moments_by_path = moments_of(variables, moments_by_path, *_calls.split_fixed(inputs_of(batch)))
        variables["batch_stats"] = _replaced(variables["batch_stats"], moments_by_path, bessel_correction)
    return nn.meta.replace_boxed(boxed_variables["batch_stats"], variables["batch_stats"])


def _that_never_move(apply_fn: Apply, variables: Any, batch: Any, options: Any) -> set[tuple[Any, ...]]:
    """Returns paths of the batch norms whose statistics never move."""
    paths = set()

    def note(module, call, x, call_options):
        statistics = statistics_of(module)
        if statistics is not None and not statistics.moves:
            paths.add(module.path)
        return call(x, **call_options)

    traced(jax.eval_shape, apply_fn, variables, batch, options, note)
    return paths


def _means(variables: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """Returns the running mean of each batch norm, by path."""
    flat: Any = flatten_dict(dict(variables.get("batch_stats", {})))
    means = {path[:-1]: flat[*path[:-1], "mean"] for path in flat if path[-1] == "var"}
    if not means:
        raise ValueError(
            "variables must hold the collection 'batch_stats' of batch norms, with 'mean' and 'var', got the "
            f"collections {list(variables)}."
        )
    return means


def no_moments(mean: Any) -> Moments:
    """Returns moments of no elements, of the shape of a batch norm's mean."""
    zeros = jnp.zeros(jnp.shape(mean), float)
    return Moments(zeros.astype(jnp.result_type(zeros, mean)), zeros, zeros, zeros)


def _first(batches: Any) -> Any:
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches must be a list, or a function that returns an iterator, to be read more than once; got an "
            "iterator. Pass list(batches)."
        )
    first = next(iter(_read(batches)), None)
    if first is None:
        raise ValueError("batches must hold one at least, got none.")
    return first


def _read(batches: Any) -> Any:
    return batches() if callable(batches) else batches


def _depth(apply_fn: Apply, variables: Any, batch: Any, options: Any) -> int:
    """Returns the largest number of batch norms in a row before another."""

    def jaxpr_of(run, *arguments):
        return jax.make_jaxpr(run)(*arguments).jaxpr

    return _calls.depth(traced(jaxpr_of, apply_fn, variables, batch, options, _calls.marked))


def traced(trace: Any, apply_fn: Apply, variables: Any, batch: Any, options: Any, replace: Any) -> Any:
    """Traces a call of a model whose batch norms' calls are replaced."""
    arrays, fixed = _calls.split_fixed(inputs_of(batch))

    def run(variables, arrays):
        with _calls.intercept(_calls.is_norm, replace):
            return apply_fn(variables, *fixed.filled(arrays), **options, mutable=("batch_stats",))

    return trace(run, variables, arrays)


def add_batch_moments(
    apply_fn: Apply,
    exactly: bool,
    options: Any,
    variables: Any,
    moments_by_path: Any,
    arrays: list[Any],
    fixed: _calls.Fixed,
) -> Any:
    """Merges moments of the batch norms' inputs so far (by path) with those of a batch, as `split_fixed` splits it.

    The moments are a variable of each batch norm in 'batch_stats', so that Flax's transforms treat them as statistics.
    """

    def look(module, call, x, options):
        if module.has_variable("batch_stats", _DATA_MOMENTS):
            so_far, new = module.get_variable("batch_stats", _DATA_MOMENTS), _moments_of_input(module, x, options)
            module.put_variable("batch_stats", _DATA_MOMENTS, merge_moments(so_far, new))
        return _called(module, call, x, options, exactly)

    flat: Any = flatten_dict(dict(variables["batch_stats"]))
    places = unflatten_dict(flat | {(*path, _DATA_MOMENTS): m for path, m in moments_by_path.items()})
    with _calls.intercept(_calls.is_norm, look):
        with_moments = {**variables, "batch_stats": places}
        _, updates = apply_fn(with_moments, *fixed.filled(arrays), **options, mutable=("batch_stats",))
    flat = flatten_dict(dict(updates["batch_stats"]))
    return {path: flat[*path, _DATA_MOMENTS] for path in moments_by_path}


def _called(module: Any, call: _calls.Call, x: Any, options: Mapping[str, Any], is_running: bool) -> Any:
    """Calls a batch norm so that it normalizes by running statistics, or by the batch's."""
    options = {name: value for name, value in options.items() if name != "use_running_average"}
    _calls.set_attribute(module, "use_running_average", is_running)
    return call(x, **options)


def _moments_of_input(module: Any, x: Any, options: Mapping[str, Any]) -> Moments:
    """Computes the moments of a batch norm's input, with a leading axis of kinds where it has several."""
    statistics = statistics_of(module)
    assert statistics is not None
    if not statistics.is_variance:
        raise ValueError(
            f"The model must have batch norms whose 'var' is a variance, got {type(module).__name__} at "
            f"{name_of(module.path)}."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    axes = _checks.feature_axes(module.axis, x.ndim)
    weights = _checks.sample_weights(_checks.flax_mask(options.get("mask"), x.shape, module.axis), x.shape, axes)

    def moments_of(weights: Any) -> Moments:
        groups = module.axis_index_groups
        return moments(x, axis=axes, mask=weights, axis_name=module.axis_name, axis_index_groups=groups)

    if statistics.kinds is None:
        return with_counts_of_features(moments_of(weights))
    return moments_of_kinds(moments_of, weights, options["split"], statistics.kinds, x.shape)


def _replaced(batch_stats: Any, moments_by_path: Mapping[tuple[Any, ...], Moments], bessel_correction: bool) -> Any:
    flat: Any = flatten_dict(dict(batch_stats))
    if missed := [name_of(path) for path, m in moments_by_path.items() if not jnp.any(m.count > 0)]:
        raise ValueError(
            "apply_fn must show examples to every batch norm of the variables; it showed none to "
            f"{', '.join(missed)}. Pass model.apply, and the option that asks for training, if the model has one."
        )
    for path, m in moments_by_path.items():
        if not (jnp.isfinite(m.mean).all() and jnp.isfinite(m.var).all()):
            raise ValueError(f"batches must give finite statistics, got NaN or infinity at {name_of(path)}.")
        old = {name: flat[*path, name] for name in ("mean", "var")}
        new = update_batch_stats(old, m, momentum=0.0, bessel_correction=bessel_correction)
        flat |= {(*path, name): value for name, value in new.items()}
    new = unflatten_dict(flat)
    return freeze(new) if isinstance(batch_stats, FrozenDict) else new


def adapt_batch_stats(
    apply_fn: Apply, variables: Mapping[str, Any], batch: Any, *, prior: Any, **options: Any
) -> tuple[Any, Any]:
    """Computes outputs for a batch whose distribution has shifted, and the statistics that were used for it.

    Every batch norm mixes its running statistics, as if they were of N examples, with those of the n examples of the
    batch (by weight, over all members of a mapped axis), which the batch norms before it have normalized in the same
    way:

        mean = (N · running mean + n · batch mean) / (N + n)        var likewise

    A batch norm that is called twice mixes twice.

    Args:
      apply_fn: function such as `model.apply`, of a linen model with batch norms of Flax or ours; of an nnx model the
        function that `bnjax.nnx.functional(model)` returns with the variables.
      variables: collections of the model.
      batch: input of the model, an array or a tuple of arguments, with the examples along the first axis of the first.
      prior: N, non-negative: infinite for inference by the running statistics, 0 for the batch's statistics alone; may
        be traced.
      **options: options of the call, such as `training=False`.

    Returns:
      `(outputs, batch_stats)`: the model's outputs, and the mixed statistics.

    References:
      Schneider et al. 2020 (arXiv 2006.16971), section 2, eq. (3); Nado et al. 2020 (arXiv 2006.10963) for N = 0.
    """
    _checks.check_in_range("prior", prior, 0, float("inf"), "Pass 16, say: as if of 16 examples.")
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables must hold the collection 'batch_stats' of batch norms, got the collections {list(variables)}."
        )

    def mixed(module, call, x, options):
        if not statistics_of(module).moves:  # pyright: ignore[reportOptionalMemberAccess]
            return _called(module, call, x, options, True)
        m = _moments_of_input(module, x, options)
        elements = math.prod(s for a, s in enumerate(x.shape) if a not in _checks.feature_axes(module.axis, x.ndim))
        n = m.count * (x.shape[0] / max(1, elements))  # in examples
        share = n / jnp.maximum(prior + n, jnp.finfo(n.dtype).tiny)
        for name, batch in (("mean", m.mean), ("var", m.var)):
            old = module.get_variable("batch_stats", name)
            new = (jnp.where(share < 1, (1 - share) * old, 0) + share * batch).astype(old.dtype)
            module.put_variable("batch_stats", name, jnp.where(jnp.isfinite(new), new, old))
        return _called(module, call, x, options, True)

    with _calls.intercept(_calls.is_norm, mixed):
        outputs, updates = apply_fn(variables, *inputs_of(batch), **options, mutable=("batch_stats",))
    return outputs, updates["batch_stats"]
