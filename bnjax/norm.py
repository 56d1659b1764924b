"""Batch normalization as a pure function, and its running statistics."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, DTypeLike, Inexact, Shaped

from bnjax import _affine, _checks, _dtypes, _moments
from bnjax._checks import Axes
from bnjax._compat import is_in_jet
from bnjax._moments import checked_moments
from bnjax._product import Product
from bnjax._remat import named_input
from bnjax._sums import expand
from bnjax._sync import AxisName, Groups, Moments, match_explicit_sharding, select, vary_like

Params = Mapping[str, Any]  # arrays of the shape of the feature axes
BatchStats = Mapping[str, Any]
Result = tuple[Array, BatchStats, Moments | None]  # output, new statistics, moments that moved them (None for none)


class Options(TypedDict, total=False):
    """The options that `batch_norm`, which describes them, shares with its variants; the defaults are its own."""

    axis: Axes
    momentum: Any
    epsilon: Any
    mask: Any
    axis_name: AxisName | None
    axis_index_groups: object
    dtype: DTypeLike | None
    bessel_correction: bool


def init_batch_norm(
    num_features: int | tuple[int, ...],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[dict[str, Inexact[Array, "*features"]], dict[str, Inexact[Array, "*features"]]]:
    """Returns initial parameters and running statistics of a batch norm: scale 1, bias 0, mean 0, variance 1.

    Args:
      num_features: size of the feature axis; a tuple for several, in the order of the input's axes.
      use_scale: whether `params` holds 'scale' (γ).
      use_bias: whether `params` holds 'bias' (β).
      dtype: dtype of the parameters. The statistics are float32, or float64 where `dtype` is; where it is complex, so
        is the mean.

    Returns:
      `params`, a dict with 'scale' and 'bias', and `batch_stats`, a dict with 'mean' and 'var'.

    Raises:
      TypeError, ValueError: if `num_features` is not made of non-negative ints, or `dtype` is not floating.

    References:
      The names and initial values of Flax's `params` and `batch_stats` collections.

    >>> params, batch_stats = init_batch_norm(2)
    >>> print(params['scale'], params['bias'], batch_stats['mean'], batch_stats['var'])
    [1. 1.] [0. 0.] [0. 0.] [1. 1.]
    """
    shape = num_features if isinstance(num_features, tuple) else (num_features,)
    if not all(type(size) is int or isinstance(size, np.integer) for size in shape) or min(shape, default=0) < 0:
        raise ValueError(
            f"num_features must be a non-negative int or a tuple of them, got {num_features!r}. Pass x.shape[-1]."
        )
    _checks.check_dtype(dtype, or_complex=True)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, dtype)
    stats_dtype = _dtypes.wide(dtype)
    return params, {"mean": jnp.zeros(shape, stats_dtype), "var": jnp.ones(shape, _dtypes.real(stats_dtype))}


def batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    axis: Axes = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    mask: Shaped[ArrayLike, "..."] | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: object = None,
    dtype: DTypeLike | None = None,
    bessel_correction: bool = False,
) -> tuple[Inexact[Array, "..."], BatchStats]:
    """Normalizes each feature by the moments of the batch (training) or by running statistics (inference).

        y = scale · (x − mean) / sqrt(var + epsilon) + bias

    Training takes the mean and the biased variance of the batch over all but the feature axes, differentiates through
    them, and moves the running statistics: `running ← momentum · running + (1 − momentum) · batch`. Inference uses the
    running statistics and returns `batch_stats` as it was given. The derivative of training keeps nothing of the
    activation's size but `x` and a mask; every order and mode is supported (grad, jvp, jacfwd, jacrev, hessian, vmap,
    scan, remat).

    Args:
      x: floating-point array of any shape, empty included. Where it is complex, the variance is the mean of
        |x − mean|², and the running 'mean' is complex.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes.
      training: whether to use the batch's statistics and to move the running ones; static.
      axis: feature axis or axes, static; the others are reduced.
      momentum: weight of the old running value, in [0, 1], Flax's convention (1 minus PyTorch's); may be traced, so a
        schedule works, and so does the cumulative average `1 − 1 / (t + 1)` at step t = 0, 1, ….
      epsilon: non-negative number added to the variance; may be traced.
      mask: boolean, or non-negative sample weights, of as many dimensions as `x`, to which they broadcast, or of the
        first of its dimensions without the feature axes: `[batch]` is a weight for each example, `[batch, time]` one
        for each step. The values of `x` where the mask is zero, even NaN, change neither outputs elsewhere nor
        statistics, nor derivatives of these, but for those by the mask itself. With a total weight of zero the running
        statistics normalize and stay. They also stay where the batch's are not finite; a NaN weight makes outputs NaN.
      axis_name: mapped axis (of vmap, pmap or shard_map) over which the moments are merged by their counts.
      axis_index_groups: groups of indices of that axis that are normalized separately, all of one size; not with
        shard_map's replication checking, where a mesh of two axes does the same.
      dtype: dtype of `y`; by default the dtype of `x`. Statistics are float32, or float64 for float64 input.
      bessel_correction: whether the running variance takes the batch's times n / (n − 1), as PyTorch's does.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError: at trace time, for a non-floating `x`, an invalid `axis`, missing or misshapen parameters
        or statistics, a mask that does not broadcast, momentum outside [0, 1] or negative epsilon (where known).
      NameError: if `axis_name` is not bound.

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2.

    >>> params, batch_stats = init_batch_norm(1)
    >>> y, batch_stats = batch_norm(jnp.array([[1.], [3.]]), params, batch_stats, training=True, momentum=0.5)
    >>> print(y.ravel().round(3), batch_stats['mean'], batch_stats['var'])
    [-1.  1.] [1.] [1.]
    """
    call = check_call(
        x,
        params,
        batch_stats,
        training,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        bessel_correction=bessel_correction,
    )
    return batch_norm_of(call)[:2]


def batch_norm_of(call: "Call") -> Result:
    """Computes `batch_norm` of a checked call; its variants each have a function in its place."""
    return trained(call, _train) if call.training else call.inference()


def _train(call: "Call") -> tuple[Array, BatchStats, Moments]:
    m = call.moments()
    return call.output(*call.batch_statistics(m)), call.moved(m), m


def trained(call: "Call", compute: Callable[["Call"], tuple[Array, BatchStats, Moments]]) -> Result:
    """Computes a call in training by a program that all layers of the same shapes and options share.

    So JAX traces and lowers it once, and calls outside of any program are compiled as a whole. `jet` looks into no such
    program for what it has rules for.

    Args:
      call: the checked call.
      compute: what computes it, a function of the module's level.
    """
    x = call.x.inputs if isinstance(call.x, Product) else call.x
    if is_in_jet(x):
        return compute(call)
    forgets = isinstance(call.momentum, int | float) and call.momentum == 0  # a rule of its own, not a number
    dtype = None if call.dtype is None else jnp.dtype(call.dtype)
    fixed = (call.axes, call.groups, call.axis_name, dtype, call.bessel_correction, forgets, _moments.EXACT_ON)
    numbers = () if forgets else (call.momentum,), call.epsilon
    params = {name: jnp.asarray(value) for name, value in call.params.items()}
    y, moved, m = _shared_program(compute, fixed, call.x, call.weights, params, call.running(), numbers)
    return y, _with_statistics(call.batch_stats, moved), m


@functools.partial(jax.jit, static_argnums=(0, 1))
def _shared_program(compute, fixed, x, weights, params, running, numbers):
    axes, groups, axis_name, dtype, bessel_correction, forgets, _ = fixed
    momentum, epsilon = 0 if forgets else numbers[0][0], numbers[1]
    batch_stats: BatchStats = dict(zip(("mean", "var"), running, strict=True))
    return compute(
        Call(
            x, params, batch_stats, True, axes, weights, groups,
            momentum, epsilon, axis_name, dtype, bessel_correction,
        )
    )  # fmt: skip


def check_call(
    x: Any,
    params: Any,
    batch_stats: Any,
    training: Any,
    *,
    axis: Any = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-5,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: Any = None,
    bessel_correction: bool = False,
    or_complex: bool = True,
    **unknown: Any,
) -> "Call":
    """Checks the arguments of `batch_norm`, names its input and returns them; `or_complex` allows a complex `x`."""
    if unknown:
        raise TypeError(f"the options are {', '.join(Options.__annotations__)}, got {', '.join(unknown)}. Rename it.")
    x = x if isinstance(x, Product) else _checks.check_input(x, or_complex=or_complex)
    axes = _checks.feature_axes(axis, x.ndim)
    features = tuple(x.shape[a] for a in axes)
    weights = _checks.sample_weights(mask, x.shape, axes)
    _checks.check_params(params, features, axes)
    _checks.check_batch_stats(batch_stats, features, axes)
    _checks.check_training(training)
    _checks.check_in_range("epsilon", epsilon, 0, _checks.FINITE)
    _checks.check_in_range("momentum", momentum, 0, 1)
    if dtype is not None:
        _checks.check_dtype(dtype, or_complex=or_complex)
    _checks.check_complex(x, params, batch_stats, dtype)
    groups = _checks.check_axis_name(axis_name, axis_index_groups) if training else None
    x = named_input(x) if training and not isinstance(x, Product) else x
    return Call(
        x, params, batch_stats, bool(training), axes, weights, groups,
        momentum, epsilon, axis_name, dtype, bessel_correction,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `batch_norm` or of a variant, its arguments checked by `check_call`."""

    x: Any  # array, or a `Product` in its place
    params: Params
    batch_stats: BatchStats
    training: bool
    axes: tuple[int, ...]  # the feature axes, non-negative and ascending
    weights: Array | None  # the mask, with as many axes as `x`
    groups: Groups | None  # groups of indices of `axis_name`
    momentum: Any
    epsilon: Any
    axis_name: AxisName | None
    dtype: DTypeLike | None
    bessel_correction: bool

    def moments(self) -> Moments:
        """Computes the moments of the batch, merged over the members of the mapped axis."""
        return checked_moments(self.x, self.weights, self.axes, self.axis_name, self.groups)

    def running(self) -> tuple[Array, Array]:
        """Returns the running mean and variance."""
        return jnp.asarray(self.batch_stats["mean"]), jnp.asarray(self.batch_stats["var"])

    def batch_statistics(self, m: Moments) -> tuple[Array, Array]:
        """Returns the mean and variance that training normalizes by, typed as each member's.

        They are the batch's, and the running ones for features on which the batch has no weight; NaN is a weight.
        """
        mean, var = (
            select(m.count != 0, batch, running.astype(batch.dtype))
            for batch, running in zip((m.mean, m.var), self.running(), strict=True)
        )
        return self.of_each_member(mean, var)

    def of_each_member(self, mean: Array, var: Array) -> tuple[Array, Array]:
        """Types mean and variance as varying over the mapped axis, for shard_map's replication checking.

        Their cotangents are then each member's own, and meet in one sum over the members. Under vmap nothing changes.
        """
        if self.axis_name is None:
            return mean, var
        # One array, so that one sum serves both; of a complex input they differ in dtype.
        of_member = self.x.inputs if isinstance(self.x, Product) else self.x
        mean, var = vary_like((mean, var) if jnp.iscomplexobj(self.x) else jnp.stack([mean, var]), of_member)
        return mean, var

    def moved(self, m: Moments) -> BatchStats:
        """Returns the running statistics moved towards moments."""
        return update_batch_stats(self.batch_stats, m, momentum=self.momentum, bessel_correction=self.bessel_correction)

    def output(self, mean: Array, var: Array, params: Params | None = None) -> Array:
        """Computes `scale · (x − mean) / sqrt(var + epsilon) + bias`, by `params` where given, else by the call's."""
        params = self.params if params is None else params
        dtype = self.x.dtype if self.dtype is None else self.dtype
        compute = _dtypes.wide(self.x.dtype, dtype)
        real = _dtypes.real(compute)
        multiplier, bias = self.multiplier_and_bias(var.astype(real), params, compute)
        per_feature = [expand(v, self.x.ndim, self.axes) for v in (mean.astype(compute), multiplier, bias)]
        scale_and_shift: Any = _affine.scale_and_shift if self._has_rules() else _affine.plain_scale_and_shift
        # The weights weigh nothing here: masked NaN and extremes become zero, which keeps them out of derivatives.
        return scale_and_shift(self.x, self.weights, *per_feature, dtype)

    def multiplier_and_bias(self, var: Array, params: Params, dtype: Any) -> tuple[Array, Array]:
        """Returns `scale / sqrt(var + epsilon)` in the dtype of `var`, or complex, and the bias in `dtype`."""
        inverse_root: Any = _affine.inverse_root if self._has_rules() else lax.rsqrt
        multiplier = inverse_root(var + jnp.asarray(self.epsilon, var.dtype))
        if "scale" in params:
            multiplier *= params["scale"].astype(dtype if jnp.iscomplexobj(params["scale"]) else var.dtype)
        return multiplier, params["bias"].astype(dtype) if "bias" in params else jnp.zeros_like(multiplier)

    def _has_rules(self) -> bool:
        """Returns whether derivatives are taken by rules of our own: in training, except by `jet`."""
        return self.training and not is_in_jet(self.x)

    def inference(self) -> Result:
        """Returns the result of inference: the input normalized by the running statistics, which stay as they are."""
        return self.output(*self.running()), self.batch_stats, None


def update_batch_stats(
    batch_stats: BatchStats, m: Moments, *, momentum: Any = 0.99, bessel_correction: bool = False
) -> BatchStats:
    """Moves running statistics towards the moments of a batch: `running ← momentum · running + (1 − momentum) · batch`.

    Args:
      batch_stats: running 'mean' and 'var'.
      m: moments of the batch; a count of zero leaves the running statistics as they are, and so does, feature by
        feature, a result that is not finite in their dtype, as from NaN or from values whose squares overflow.
      momentum: weight of the old running value, in [0, 1]; may be traced.
      bessel_correction: whether to take `n / (n − 1)` times the batch's variance, n being its count, as PyTorch does;
        where n ≤ 1 the variance itself is taken.

    Returns:
      New statistics in the structure and dtypes of `batch_stats`; other keys are carried along.

    Raises:
      TypeError, ValueError: for missing or misshapen statistics, or a momentum outside [0, 1] (where known).

    References:
      Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.1; the update rule of Flax.

    >>> import bnjax
    >>> _, batch_stats = init_batch_norm(1)
    >>> batch_stats = update_batch_stats(batch_stats, bnjax.moments(jnp.array([[1.], [3.]])), momentum=0.9)
    >>> print(batch_stats['mean'].round(3), batch_stats['var'])
    [0.2] [1.]
    """
    _checks.check_batch_stats(batch_stats, jnp.shape(m.mean))
    _checks.check_in_range("momentum", momentum, 0, 1)
    if jnp.shape(m.var) != jnp.shape(m.mean):
        raise ValueError(
            f"m must hold a var of the shape of its mean, {jnp.shape(m.mean)}, got {jnp.shape(m.var)}. "
            "Make it with bnjax.moments."
        )
    return moved_batch_stats(batch_stats, m._replace(var=unbiased_var(m)) if bessel_correction else m, momentum)


def moved_batch_stats(batch_stats: BatchStats, m: Moments, momentum: Any) -> BatchStats:
    """Moves running statistics of checked shapes; the momentum may have their shape."""

    def move(running, batch):
        if isinstance(momentum, int | float) and momentum == 0:  # the old value is forgotten, even if not finite
            return batch.astype(running.dtype)
        dtype = _dtypes.wide(running.dtype, batch.dtype)
        rho = jnp.asarray(momentum, dtype)
        return (rho * running.astype(dtype) + (1 - rho) * batch.astype(dtype)).astype(running.dtype)

    running = {name: jnp.asarray(batch_stats[name]) for name in ("mean", "var")}
    moved = {n: move(running[n], match_explicit_sharding(getattr(m, n), running[n])) for n in running}
    usable = (m.count > 0) & jnp.isfinite(moved["mean"]) & jnp.isfinite(moved["var"])
    return _with_statistics(batch_stats, {n: select(usable, value, running[n]) for n, value in moved.items()})


def _with_statistics(batch_stats: BatchStats, moved: Mapping[str, Array]) -> BatchStats:
    """Returns running statistics with others in their place, in a mapping of the same kind."""
    if isinstance(batch_stats, MutableMapping):
        new = copy.copy(batch_stats)
        new.update(moved)
        return new
    return type(batch_stats)({**batch_stats, **moved})  # pyright: ignore[reportCallIssue]


def unbiased_var(m: Moments) -> Array:
    """Returns the variance with Bessel's correction, `n / (n − 1) · var`, or the variance itself where n ≤ 1."""
    return m.var * jnp.where(m.count > 1, m.count / jnp.where(m.count > 1, m.count - 1, 1), 1)
