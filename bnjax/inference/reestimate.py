"""Statistics of a data set, or of the batch at hand, in place of running averages."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import _checks, linen
from bnjax.inference import _calls
from bnjax.moments import Moments, merge_moments, moments
from bnjax.norm import update_batch_stats

_COLLECTION = "moments of the data"
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
    it was shown. What it is shown depends on how the batch norms before it normalise:

    - by their batch's statistics, in one pass over the data: what training sees. The first layer's statistics are the
      data's, the deeper ones' depend on the batches' size;
    - with `exactly`, by the data's: what inference sees, in a pass for all batch norms with as many before them on the
      longest way. The result does not depend on how the data are cut into batches.

    Use it after weights have been averaged (SWA, EMA), whose running averages are of other weights; where running
    averages lag behind or are of too small batches; and to move a model to other data.

    Args:
      apply_fn: such as `model.apply`, of a linen model with batch norms of Flax or of `bnjax.linen`.
      variables: its collections.
      batches: inputs of the model, each an array or a tuple of arguments; a list, or a function that returns an
        iterator, which is called for each pass and once before. They may be sharded over a mesh.
      exactly: whether to take a pass for each depth of batch norms.
      bessel_correction: whether to store the variance times n / (n − 1), as PyTorch's `update_bn` does.
      **options: of each call, such as `training=True` where that is how the model's training phase is chosen.

    Returns:
      New statistics in the structure and dtypes of `variables['batch_stats']`.

    Raises:
      ValueError: if there is no batch or no batch norm; for batch norms inside Flax's scan or vmap or inside several
        alike modules of its jit, or of another norm (`LpBatchNorm`); and if the data's statistics are not finite.
      TypeError: for an iterator, which can't be read twice.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2, lines 8 to 12; Wu & Johnson 2021 (arXiv 2105.07576),
      section 3 ("precise" batch norm); Izmailov et al. 2018 (arXiv 1803.05407), section 3.2.
    """
    variables = dict(variables)
    for batch_norms in _in_order(apply_fn, variables, _first(batches), options, exactly):
        moments_of = jax.jit(functools.partial(moments_seen, apply_fn, frozenset(batch_norms), exactly, options))
        found: Any = None
        for batch in _read(batches):
            new = moments_of(variables, batch)
            _check_seen(set(batch_norms) - {"/".join(path) for path in new})
            found = new if found is None else _merged(found, new)
        variables["batch_stats"] = _replaced(variables["batch_stats"], found, bessel_correction)
    return variables["batch_stats"]


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


def _in_order(apply_fn: Apply, variables: Any, batch: Any, options: Any, exactly: bool) -> list[list[str]]:
    """Paths of the model's batch norms, all together or by the number of those before them."""

    def run(variables, *arguments):
        with _calls.intercept((nn.BatchNorm,), _calls.marked):
            return apply_fn(variables, *arguments, **options, mutable=["batch_stats"])

    found, _ = _calls.depths(jax.make_jaxpr(run)(variables, *_arguments(batch)).jaxpr)
    if not found:
        raise ValueError(
            "apply_fn must call batch norms, whose statistics are to be re-estimated; it calls none. Pass model.apply "
            "itself, not a compiled function, and the option that asks for training, if the model has one."
        )
    stats: Any = flatten_dict(dict(variables["batch_stats"]))
    _check_seen({"/".join(path[:-1]) for path in stats if path[-1] == "var"} - found.keys())
    passes = sorted(set(found.values())) if exactly else [None]
    return [[path for path, depth in found.items() if number in (None, depth)] for number in passes]


def moments_seen(
    apply_fn: Apply, batch_norms: Set[str], exactly: bool, options: Any, variables: Any, batch: Any
) -> Any:
    """Moments of what some batch norms are shown, all normalising by running statistics if `exactly`, by path."""

    def look(module, call, x, options):
        if "/".join(module.path) in batch_norms:
            module.sow(_COLLECTION, "seen", _seen_by(module, x, options))
        return _called(module, call, x, options, exactly)

    with _calls.intercept((nn.BatchNorm,), look):
        _, updates = apply_fn(variables, *_arguments(batch), **options, mutable=["batch_stats", _COLLECTION])
    is_leaf = lambda _, value: not isinstance(value, Mapping)  # noqa: E731
    flat: Any = flatten_dict(updates.get(_COLLECTION, {}), is_leaf=is_leaf)
    return {path[:-1]: functools.reduce(merge_moments, seen) for path, seen in flat.items()}


@jax.jit
def _merged(found: Any, new: Any) -> Any:
    """Moments of two parts of the data together, of each batch norm."""
    return {path: merge_moments(found[path], new[path]) for path in new}


def _check_seen(missed: Set[str]) -> None:
    if missed:
        raise ValueError(
            "apply_fn must call all batch norms of the variables, none of them inside Flax's scan or vmap, or inside "
            f"one of several alike modules of Flax's jit; what {', '.join(sorted(missed))} is shown can't be seen."
        )


def _called(module: nn.BatchNorm, call: _calls.Call, x: Any, options: Mapping[str, Any], is_running: bool) -> Any:
    """A batch norm's output by running statistics, or by the batch's."""
    options = {name: value for name, value in options.items() if name != "use_running_average"}
    object.__setattr__(module, "use_running_average", is_running)  # this call's own copy of the module
    return call(x, **options)


def _seen_by(module: nn.BatchNorm, x: Any, options: Mapping[str, Any]) -> Moments:
    """Moments of what a batch norm is shown; with a leading axis of kinds where it has several."""
    if isinstance(module, linen.LpBatchNorm):
        raise ValueError(
            f"The model must have batch norms whose 'var' is a variance, got LpBatchNorm at {'/'.join(module.path)}."
        )
    x = jnp.asarray(x)
    m = moments(
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32),
        axis=module.axis,
        mask=_checks.flax_mask(options.get("mask"), x.shape),
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
    )
    if not isinstance(module, linen.SplitBatchNorm):
        return m
    m = m._replace(count=jnp.broadcast_to(m.count, m.mean.shape))
    return jax.tree.map(lambda v: jnp.zeros((module.num_splits, *v.shape), v.dtype).at[options["split"]].set(v), m)


def _replaced(batch_stats: Any, found: Mapping[tuple[str, ...], Moments], bessel_correction: bool) -> Any:
    flat: Any = flatten_dict(batch_stats)
    for path, m in found.items():
        if not (jnp.isfinite(m.mean).all() and jnp.isfinite(m.var).all()):
            raise ValueError(f"batches must give finite statistics, got NaN or infinity at {'/'.join(path)}.")
        old = {name: flat[*path, name] for name in ("mean", "var")}
        new = update_batch_stats(old, m, momentum=0.0, bessel_correction=bessel_correction)
        flat |= {(*path, name): value for name, value in new.items()}
    return unflatten_dict(flat)


def adapt_batch_stats(
    apply_fn: Apply, variables: Mapping[str, Any], batch: Any, *, prior: Any, **options: Any
) -> tuple[Any, Any]:
    """Outputs for a batch whose distribution has shifted, and the statistics that were used for it.

    Every batch norm mixes its running statistics, as if they were of N examples, with those of the n examples of the
    batch, normalised so by those before it:

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
    count = jnp.shape(jax.tree.leaves(batch)[0])[0]
    prior = jnp.asarray(prior, jnp.float32)
    momentum = jnp.where(jnp.isinf(prior), 1.0, prior / (prior + count))

    def mixed(module, call, x, options):
        old = {name: module.get_variable("batch_stats", name) for name in ("mean", "var")}
        for name, value in update_batch_stats(old, _seen_by(module, x, options), momentum=momentum).items():
            module.put_variable("batch_stats", name, value)
        return _called(module, call, x, options, True)

    with _calls.intercept((nn.BatchNorm,), mixed):
        outputs, updates = apply_fn(variables, *_arguments(batch), **options, mutable=["batch_stats"])
    return outputs, updates["batch_stats"]
