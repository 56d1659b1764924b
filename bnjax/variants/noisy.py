"""Noisy batch norm: batch norm, then noise that shifts the distribution of each unit at every call."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Shaped, UInt32

from bnjax import _checks, _dtypes
from bnjax._sync import AxisName
from bnjax.norm import BatchStats, Call, Options, Params, Result, batch_norm_of, check_call


def noisy_batch_norm(
    x: Shaped[ArrayLike, "..."],
    params: Params,
    batch_stats: BatchStats,
    *,
    training: bool,
    key: Key[Array, ""] | UInt32[Array, " words"] | None = None,
    unit_shift: Any = 0.5,
    unit_scale: Any = 1.25,
    sample_shift: Any = 0.1,
    sample_scale: Any = 0.1,
    **options: Unpack[Options],
) -> tuple[Float[Array, "..."], BatchStats]:
    """Normalizes, then in training adds noise of non-zero mean and non-unit variance, newly distributed at every call.

    With a the output of `batch_norm`, for each unit (feature) j, and then for each sample i of it:

        μ_j ~ U(−unit_shift, unit_shift)                        σ_j ~ U(1, unit_scale)
        m_ij ~ U(μ_j − sample_shift, μ_j + sample_shift)        s_ij ~ N(σ_j, sample_scale)
        y_ij = s_ij · a_ij + m_ij

    Height and width count as samples: m and s are drawn for each element. Inference adds no noise. The paper does not
    state whether the 0.1 of N(σ, 0.1) is a variance or a standard deviation; here `sample_scale` is the deviation.

    Args:
      x: real floating-point array of any shape, empty included.
      params: 'scale' and 'bias' of the shape of the feature axes; either may be absent.
      batch_stats: running 'mean' and 'var' of the shape of the feature axes, which the noise does not reach.
      training: whether to use the batch's statistics, to move the running ones and to add noise; static.
      key: random key, needed in training only: a new key for each layer and step. All members of a mapped axis pass
        the same key; the draws of units are then common to all, and those of samples differ by the index along
        `axis_name`.
      unit_shift: n_μ of the paper, at least 0; may be traced, as may the next three.
      unit_scale: n_σ of the paper, at least 1.
      sample_shift: r_μ of the paper, at least 0.
      sample_scale: r_σ of the paper, at least 0. Strengths of 0, 1, 0 and 0 give `batch_norm`.
      **options: `Options` of `batch_norm`: axis, momentum, epsilon, mask, axis_name, axis_index_groups, dtype and
        bessel_correction. The draws of units are common to all groups of axis_index_groups, and noise is drawn and
        added in float32 at least.

    Returns:
      `(y, batch_stats)`: an array of the shape of `x`, and running statistics of the structure and dtypes of the old.

    Raises:
      TypeError, ValueError, NameError: at trace time, as `batch_norm` does; in training also for a `key` that is
        missing or not a single key; and for strengths that are not real scalars, or are too small (where known).

    References:
      Santurkar et al. 2018 (arXiv 1805.11604), Algorithm 1.

    >>> import bnjax
    >>> params, batch_stats = bnjax.init_batch_norm(1)
    >>> options = {'training': True, 'sample_shift': 0, 'sample_scale': 0}
    >>> y, _ = noisy_batch_norm(jnp.array([[1.], [3.]]), params, batch_stats, key=jax.random.key(0), **options)
    >>> shift, scale = y.mean(), (y[1, 0] - y[0, 0]) / 2
    >>> print(-0.5 <= shift <= 0.5, 1 <= scale <= 1.25)
    True True
    """
    call = check_call(x, params, batch_stats, training, **options, or_complex=False)
    return noisy_batch_norm_of(call, key, unit_shift, unit_scale, sample_shift, sample_scale)[:2]


def noisy_batch_norm_of(
    call: Call, key: Any, unit_shift: Any, unit_scale: Any, sample_shift: Any, sample_scale: Any
) -> Result:
    """Computes `noisy_batch_norm` of a checked call."""
    dtype = call.x.dtype if call.dtype is None else call.dtype
    strengths = {"unit_shift": unit_shift, "unit_scale": unit_scale}
    strengths |= {"sample_shift": sample_shift, "sample_scale": sample_scale}
    for name, value in strengths.items():
        least = 1 if name == "unit_scale" else 0
        _checks.check_in_range(name, value, least, float("inf"), f"Pass {least} for none of this noise.")
    if not call.training:
        return call.inference()
    _check_key(key)
    wide = dataclasses.replace(call, dtype=_dtypes.wide(call.x.dtype, dtype))
    activation, batch_stats, m = batch_norm_of(wide)
    shift, scale = _draw_noise(key, activation, call.axes, call.axis_name, strengths)
    return (scale * activation + shift).astype(dtype), batch_stats, m


def _draw_noise(
    key: Any, activation: Array, axes: tuple[int, ...], axis_name: AxisName | None, strengths: Mapping[str, Any]
) -> tuple[Array, Array]:
    """Draws m and s of Algorithm 1 for each element of the activation."""
    shape, dtype = activation.shape, activation.dtype
    units = tuple(size if a in axes else 1 for a, size in enumerate(shape))
    unit_keys, sample_keys = jax.random.split(key, (2, 2))
    if axis_name is not None:
        sample_keys = jax.vmap(jax.random.fold_in, (0, None))(sample_keys, lax.axis_index(axis_name))
    strength = {name: jnp.asarray(value, dtype) for name, value in strengths.items()}
    shift = strength["unit_shift"] * jax.random.uniform(unit_keys[0], units, dtype, -1)
    scale = 1 + (strength["unit_scale"] - 1) * jax.random.uniform(unit_keys[1], units, dtype)
    shift += strength["sample_shift"] * jax.random.uniform(sample_keys[0], shape, dtype, -1)
    scale += strength["sample_scale"] * jax.random.normal(sample_keys[1], shape, dtype)
    return shift, scale


def _check_key(key: Any) -> None:
    """Raises `TypeError` unless `key` is a single random key, new-style or raw."""
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        key.ndim == 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.ndim == 1 and key.dtype == jnp.uint32
    )
    if not is_key:
        got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(
            f"key must be a single random key in training, got {got}. "
            "Pass jax.random.key(seed), folded with the step by jax.random.fold_in."
        )
