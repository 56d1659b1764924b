"""Statistics of a data set, or of the batch at hand, in place of running averages."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _checks
from bnjax._moments import moments
from bnjax._sync import Moments, merge_moments
from bnjax.inference import _calls
from bnjax.linen import statistics_of
from bnjax.norm import update_batch_stats

_SEEN = "moments of the data"
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
    """The collection 'batch_stats' with the moments of a data set in place of the running averages.

    The batches' moments are merged by their counts, so that each batch norm gets the mean and the variance of all that
    it was shown. What it is shown depends on how the batch norms before it normalize:

    - by their batch's statistics, in one pass over the data: what training sees. The first layer's statistics are the
      data's, the deeper ones' depend on the batches' size;
    - with `exactly`, by the data's: what inference sees. It takes as many passes as there are batch norms in a row, on
      the longest way: each pass settles those whose predecessors are settled. The result does not depend on how the
      data are cut into batches.

    Use it after weights have been averaged (SWA, EMA), whose running averages are of other weights; where running
    averages lag behind or are of too small batches; and to move a model to other data.

    Args:
      apply_fn: such as `model.apply`, of a linen model with batch norms of Flax or of `bnjax.linen`.
      variables: its collections.
      batches: inputs of the model, each an array or a tuple of arguments; a list, or a function that returns an
        iterator, which is called for each pass and once before. They may be sharded over a mesh.
      exactly: whether to normalize by the data's statistics, in a pass for each depth of batch norms.
      bessel_correction: whether to store the variance times n / (n − 1), as PyTorch's `update_bn` does.
      **options: of each call, such as `training=True` where that is how the model's training phase is chosen.

    Returns:
      New statistics in the structure and dtypes of `variables['batch_stats']`.

    Raises:
      ValueError: if there is no batch or no batch norm; for a batch norm that is shown nothing, or of another norm
        (`LpBatchNorm`); and if the data's statistics are not finite.
      TypeError: for an iterator, which can't be read twice.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2, lines 8 to 12; Wu & Johnson 2021 (arXiv 2105.07576),
      section 3 ("precise" batch norm); Izmailov et al. 2018 (arXiv 1803.05407), section 3.2.
    """
    given, variables = variables, dict(nn.meta.unbox(variables))
    means, first = _means(variables), _first(batches)
    fixed = _that_never_move(apply_fn, variables, first, options)
    means = {path: mean for path, mean in means.items() if path not in fixed}
    passes = 1 + _depth(apply_fn, variables, first, options) if exactly else 1
    moments_of = jax.jit(functools.partial(moments_seen, apply_fn, exactly, options))
    for _ in range(passes):
        found = {path: none_seen(mean) for path, mean in means.items()}
        for batch in _read(batches):
            found = moments_of(variables, found, batch)
        variables["batch_stats"] = _replaced(variables["batch_stats"], found, bessel_correction)
    return nn.meta.replace_boxed(given["batch_stats"], variables["batch_stats"])


def _that_never_move(apply_fn: Apply, variables: Any, batch: Any, options: Any) -> set[tuple[str, ...]]:
    """Paths of the batch norms whose statistics never move."""
    paths = set()

    def note(module, call, x, given):
        statistics = statistics_of(module)
        if statistics is not None and not statistics.moves:
            paths.add(module.path)
        return call(x, **given)

    def run(variables, *arguments):
        with _calls.intercept(_calls.is_norm, note):
            return apply_fn(variables, *arguments, **options, mutable=("batch_stats",))

    jax.eval_shape(run, variables, *_arguments(batch))
    return paths


def _means(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Running mean of each batch norm, by path."""
    flat: Any = flatten_dict(dict(variables.get("batch_stats", {})))
    found = {path[:-1]: flat[*path[:-1], "mean"] for path in flat if path[-1] == "var"}
    if not found:
        raise ValueError(
            "variables must hold the collection 'batch_stats' of batch norms, with 'mean' and 'var', got the "
            f"collections {list(variables)}."
        )
    return found


def none_seen(mean: Any) -> Moments:
    """Moments of nothing, of the shape of a batch norm's mean."""
    zeros = jnp.zeros(jnp.shape(mean), float)
    return Moments(zeros.astype(jnp.result_type(zeros, mean)), zeros, zeros)


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


def _arguments(batch: Any) -> tuple:
    return batch if isinstance(batch, tuple) else (batch,)


def _depth(apply_fn: Apply, variables: Any, batch: Any, options: Any) -> int:
    """The largest number of batch norms before another."""

    def run(variables, *arguments):
        with _calls.intercept(_calls.is_norm, _calls.marked):
            return apply_fn(variables, *arguments, **options, mutable=("batch_stats",))

    return _calls.depth(jax.make_jaxpr(run)(variables, *_arguments(batch)).jaxpr)


def moments_seen(apply_fn: Apply, exactly: bool, options: Any, variables: Any, found: Any, batch: Any) -> Any:
    """Moments of what batch norms have been shown so far (by path), merged with those of a batch.

    They are a variable of each batch norm in 'batch_stats', so that Flax's transforms treat them as its statistics.
    """

    def look(module, call, x, options):
        if module.has_variable("batch_stats", _SEEN):
            so_far, new = module.get_variable("batch_stats", _SEEN), _seen_by(module, x, options)
            module.put_variable("batch_stats", _SEEN, merge_moments(so_far, new))
        return _called(module, call, x, options, exactly)

    flat: Any = flatten_dict(dict(variables["batch_stats"]))
    places = unflatten_dict(flat | {(*path, _SEEN): m for path, m in found.items()})
    with _calls.intercept(_calls.is_norm, look):
        given = {**variables, "batch_stats": places}
        _, updates = apply_fn(given, *_arguments(batch), **options, mutable=("batch_stats",))
    flat = flatten_dict(dict(updates["batch_stats"]))
    return {path: flat[*path, _SEEN] for path in found}


def _called(module: Any, call: _calls.Call, x: Any, options: Mapping[str, Any], is_running: bool) -> Any:
    """A batch norm's output by running statistics, or by the batch's."""
    options = {name: value for name, value in options.items() if name != "use_running_average"}
    object.__setattr__(module, "use_running_average", is_running)  # this call's own copy of the module
    return call(x, **options)


def _seen_by(module: Any, x: Any, options: Mapping[str, Any]) -> Moments:
    """Moments of what a batch norm is shown; with a leading axis of kinds where it has several."""
    statistics = statistics_of(module)
    assert statistics is not None
    if not statistics.is_variance:
        raise ValueError(
            f"The model must have batch norms whose 'var' is a variance, got {type(module).__name__} at "
            f"{'/'.join(module.path)}."
        )
    x = jnp.asarray(x)
    m = moments(
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32),
        axis=module.axis,
        mask=_checks.flax_mask(options.get("mask"), x.shape),
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
    )
    m = m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))
    if statistics.kinds is None:
        return m
    return jax.tree.map(lambda v: jnp.zeros((statistics.kinds, *v.shape), v.dtype).at[options["split"]].set(v), m)


def _replaced(batch_stats: Any, found: Mapping[tuple[str, ...], Moments], bessel_correction: bool) -> Any:
    flat: Any = flatten_dict(dict(batch_stats))
    if missed := ["/".join(path) for path, m in found.items() if not jnp.any(m.count > 0)]:
        raise ValueError(
            "apply_fn must show examples to every batch norm of the variables; it showed none to "
            f"{', '.join(missed)}. Pass model.apply, and the option that asks for training, if the model has one."
        )
    for path, m in found.items():
        if not (jnp.isfinite(m.mean).all() and jnp.isfinite(m.var).all()):
            raise ValueError(f"batches must give finite statistics, got NaN or infinity at {'/'.join(path)}.")
        old = {name: flat[*path, name] for name in ("mean", "var")}
        new = update_batch_stats(old, m, momentum=0.0, bessel_correction=bessel_correction)
        flat |= {(*path, name): value for name, value in new.items()}
    new = unflatten_dict(flat)
    return freeze(new) if isinstance(batch_stats, FrozenDict) else new


def adapt_batch_stats(
    apply_fn: Apply, variables: Mapping[str, Any], batch: Any, *, prior: Any, **options: Any
) -> tuple[Any, Any]:
    """Outputs for a batch whose distribution has shifted, and the statistics that were used for it.

    Every batch norm mixes its running statistics, as if they were of N examples, with those of the n examples of the
    batch, normalized so by those before it:

        mean = (N · running mean + n · batch mean) / (N + n)        var likewise

    Args:
      apply_fn: such as `model.apply`, of a linen model with batch norms of Flax or of `bnjax.linen`.
      variables: its collections.
      batch: input of the model, an array or a tuple of arguments, with the examples along the first axis of the first.
      prior: N, non-negative: infinite for inference as it is, 0 for the batch's statistics alone; may be traced.
      **options: of the call, such as `training=False`.

    Returns:
      `(outputs, batch_stats)`.

    References:
      Schneider et al. 2020 (arXiv 2006.16971), section 2, eq. (3); Nado et al. 2020 (arXiv 2006.10963) for N = 0.
    """
    _checks.check_in_range("prior", prior, 0, float("inf"), "Pass 16, say: as if of 16 examples.")
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables must hold the collection 'batch_stats' of batch norms, got the collections {list(variables)}."
        )
    count = jnp.shape(jax.tree.leaves(batch)[0])[0]
    prior = jnp.asarray(prior, jnp.float32)
    momentum = jnp.where(jnp.isinf(prior), 1.0, prior / (prior + count))

    def mixed(module, call, x, options):
        if not statistics_of(module).moves:  # pyright: ignore[reportOptionalMemberAccess]
            return _called(module, call, x, options, True)
        old = {name: module.get_variable("batch_stats", name) for name in ("mean", "var")}
        for name, value in update_batch_stats(old, _seen_by(module, x, options), momentum=momentum).items():
            module.put_variable("batch_stats", name, value)
        return _called(module, call, x, options, True)

    with _calls.intercept(_calls.is_norm, mixed):
        outputs, updates = apply_fn(variables, *_arguments(batch), **options, mutable=("batch_stats",))
    return outputs, updates["batch_stats"]
