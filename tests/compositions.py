"""The matrix of what JAX does with every function and layer: its rows, its columns and one cell.

A row is a function of parameters, statistics and input with a definition in plain float64 beside it. A column composes
the function with something of JAX, and returns what that gave and what the definition gives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export, lax
from jax.experimental.jet import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import variants
from bnjax._compat import enable_x64

EPSILON, MOMENTUM, GHOST, KINDS = 1e-5, 0.9, 2, 3
R_MAX, D_MAX = 1.3, 0.5
SHAPE, REDUCED = (8, 4, 4, 4), (0, 1, 2)
SILENT = {"unit_shift": 0.0, "unit_scale": 1.0, "sample_shift": 0.0, "sample_scale": 0.0}
_DRAWN = np.random.default_rng(0)
X = (3 + _DRAWN.normal(size=SHAPE) * np.array([1.0, 2.0, 0.5, 3.0])).astype(np.float32)
DIRECTION, WEIGHTS = (_DRAWN.normal(size=SHAPE).astype(np.float32) for _ in range(2))
PARAMS = {name: _DRAWN.normal(1, 0.5, 4).astype(np.float32) for name in ("scale", "bias")}
STATS = {"mean": _DRAWN.normal(3, 0.3, 4).astype(np.float32), "var": _DRAWN.uniform(1, 4, 4).astype(np.float32)}

# --- definitions ------------------------------------------------------------------------------------------------------


def _shares(weights):
    total = weights.sum(REDUCED)
    return weights / jnp.where(total > 0, total, 1)


def _moments(x, weights=None):
    if weights is None:
        weights = jnp.ones_like(x)
    weights = _shares(weights)
    mean = (weights * x).sum(REDUCED)
    return mean, (weights * (x - mean) ** 2).sum(REDUCED)


def _normalized(params, mean, var, x):
    return params["scale"] * (x - mean) / jnp.sqrt(var + EPSILON) + params["bias"]


def _moved(stats, mean, var):
    return {
        "mean": MOMENTUM * stats["mean"] + (1 - MOMENTUM) * mean,
        "var": MOMENTUM * stats["var"] + (1 - MOMENTUM) * var,
    }


def batch_norm(params, stats, x, weights=None):
    """Algorithm 1 of Ioffe & Szegedy 2015."""
    mean, var = _moments(x, weights)
    return _normalized(params, mean, var, x), _moved(stats, mean, var)


def lp(p):
    def normalize(params, stats, x, weights=None):
        weights = jnp.ones_like(x) if weights is None else weights
        weights, seen = _shares(weights), weights > 0
        mean = (weights * x).sum(REDUCED)
        size = jnp.where(seen, jnp.abs(x), 0)
        norm = size.max(REDUCED) if p == np.inf else (weights * size**p).sum(REDUCED) ** (1 / p)
        return _normalized(params, mean, norm**2, x), _moved(stats, mean, norm**2)

    return normalize


def renorm(params, stats, x, weights=None):
    mean, var = _moments(x, weights)
    sigma, running = jnp.sqrt(var + EPSILON), jnp.sqrt(stats["var"] + EPSILON)
    r = lax.stop_gradient(jnp.clip(sigma / running, 1 / R_MAX, R_MAX))
    d = lax.stop_gradient(jnp.clip((mean - stats["mean"]) / running, -D_MAX, D_MAX))
    return params["scale"] * ((x - mean) / sigma * r + d) + params["bias"], _moved(stats, mean, var)


def ghost(params, stats, x, weights=None):
    weights = jnp.ones_like(x) if weights is None else weights
    parts, of_parts = (v.reshape((-1, GHOST, *x.shape[1:])) for v in (x, weights))
    y, _ = jax.vmap(batch_norm, (None, None, 0, 0))(params, stats, parts, of_parts)
    mean, var = jax.vmap(_moments)(parts, of_parts)
    shares = of_parts.sum((1, 2, 3, 4))[:, None] / of_parts.sum()
    return y.reshape(x.shape), _moved(stats, (shares * mean).sum(0), (shares * var).sum(0))


def moving(params, stats, x, weights=None):
    moved = _moved(stats, *_moments(x, weights))
    return _normalized(params, moved["mean"], moved["var"], x), moved


def frozen(params, stats, x, weights=None):
    params, held = lax.stop_gradient((params, stats))
    return _normalized(params, held["mean"], held["var"], x), stats


def split(params, stats, x, weights=None):
    kind = {name: values[1] for name, values in stats.items()}
    y, moved = batch_norm(params, kind, x, weights)
    return y, {name: values.at[1].set(moved[name]) for name, values in stats.items()}


def kinds_of(x):
    """A kind for each example, by its largest value: 0, 1 or 2."""
    largest = lax.stop_gradient(x).max((1, 2, 3))
    return sum((largest > limit).astype(int) for limit in (9.05, 9.7))


def mask_of(x):
    """A mask of some elements, by their values, so that it lies on the devices as they do."""
    return lax.stop_gradient(x).max(-1, keepdims=True) > 4.5


def weights_of(x):
    """A weight for each element, of which some are zero."""
    return jnp.where(mask_of(x), abs(lax.stop_gradient(x)).mean(-1, keepdims=True), 0)


def split_of_examples(params, stats, x, weights=None):
    y, moved, kinds = jnp.zeros_like(x), stats, kinds_of(x)
    for kind in range(KINDS):
        own = (kinds == kind)[:, None, None, None]
        of_kind = jnp.where(own, jnp.ones_like(x) if weights is None else weights, 0)
        out, new = batch_norm(params, {name: values[kind] for name, values in stats.items()}, x, of_kind)
        y = jnp.where(own, out, y)
        moved = {n: v.at[kind].set(jnp.where(own.any(), new[n], v[kind])) for n, v in moved.items()}
    return y, moved


def only_moments(params, stats, x, weights=None):
    return jnp.stack(_moments(x, weights)), stats


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A function or a layer.

    Attributes:
      call: `(params, stats, x, training, **options) → (y, stats)`, where `axis_name` is among the options.
      definition: what it is in training, `(params, stats, x) → (y, stats)`.
      stats: running statistics.
      normalizes: whether y is x, normalized, which inference gives too; else it is moments.
    """

    call: Callable[..., Any]
    definition: Callable[..., Any]
    stats: Any
    normalizes: bool = True


def _function(function, **options):
    return lambda params, stats, x, training=True, **more: function(
        x, params, stats, training=training, momentum=MOMENTUM, epsilon=EPSILON, **options, **more
    )


def _moments_row(params, stats, x, training=True, **options):
    m = bnjax.moments(x, **options)
    return jnp.stack([m.mean, m.var]), stats


def _given(options, more):
    """Takes out of a layer's options what its call takes."""
    given = {"mask": more.pop("mask")} if "mask" in more else {}
    return given | ({"split": 1} if "num_splits" in options else {})


def _linen(layer, **options):
    def call(params, stats, x, training=True, **more):
        given = _given(options, more)
        module = layer(use_running_average=not training, momentum=MOMENTUM, epsilon=EPSILON, **options, **more)
        y, updates = module.apply(
            {"params": params, "batch_stats": stats}, x, **given, mutable=["batch_stats"], rngs={"noise": _key()}
        )
        return y, updates["batch_stats"]

    return call


def _nnx(layer, **options):
    def call(params, stats, x, training=True, **more):
        given = _given(options, more)
        module = layer(4, momentum=MOMENTUM, epsilon=EPSILON, rngs=nnx.Rngs(_key()), **options, **more)
        graph, _, rest = nnx.split(module, (nnx.Param, nnx.BatchStat), ...)
        held = {name: nnx.Param(value) for name, value in params.items()}
        held |= {name: nnx.BatchStat(value) for name, value in stats.items()}
        module = nnx.merge(graph, nnx.State(held), rest)
        y = module(x, use_running_average=not training, **given)
        return y, {name: getattr(module, name)[...] for name in stats}

    return call


def _of_examples(params, stats, x, training=True, **more):
    kinds = kinds_of(x) if training else 1
    return _function(variants.split_batch_norm, split=kinds)(params, stats, x, training, **more)


def _key():
    return jax.random.key(0)


_OF_KINDS = {name: np.stack([value, value + 1, value + 2]) for name, value in STATS.items()}
ROWS = {
    "batch_norm": Row(_function(bnjax.batch_norm), batch_norm, STATS),
    "moments": Row(_moments_row, only_moments, STATS, False),
    "noisy_batch_norm": Row(
        lambda *a, **k: _function(variants.noisy_batch_norm, key=_key(), **SILENT)(*a, **k), batch_norm, STATS
    ),
    **{f"lp_batch_norm, p={p}": Row(_function(variants.lp_batch_norm, p=p), lp(p), STATS) for p in (1, 2, np.inf)},
    "batch_renorm": Row(_function(variants.batch_renorm, r_max=R_MAX, d_max=D_MAX), renorm, STATS),
    "ghost_batch_norm": Row(_function(variants.ghost_batch_norm, ghost_size=GHOST), ghost, STATS),
    "moving_batch_norm": Row(_function(variants.moving_batch_norm), moving, STATS),
    "frozen_batch_norm": Row(_function(variants.frozen_batch_norm), frozen, STATS),
    "split_batch_norm": Row(_function(variants.split_batch_norm, split=1), split, _OF_KINDS),
    "split_batch_norm, a kind for each example": Row(_of_examples, split_of_examples, _OF_KINDS),
}
_FUNCTIONS = tuple(ROWS)
_LAYERS = {
    "BatchNorm": ({}, batch_norm, STATS),
    "NoisyBatchNorm": (SILENT, batch_norm, STATS),
    "LpBatchNorm": ({"p": 1}, lp(1), STATS),
    "BatchRenorm": ({"r_max": R_MAX, "d_max": D_MAX}, renorm, STATS),
    "GhostBatchNorm": ({"ghost_size": GHOST}, ghost, STATS),
    "MovingBatchNorm": ({}, moving, STATS),
    "FrozenBatchNorm": ({}, frozen, STATS),
    "SplitBatchNorm": ({"num_splits": KINDS}, split, _OF_KINDS),
}


def _apart(definition):
    """The definition of an nnx layer, whose running statistics are variables through which no derivative goes."""

    def without_derivative(params, stats, x, weights=None):
        y, moved = definition(params, stats, x, weights)
        return y, lax.stop_gradient(moved)

    return without_derivative


ROWS |= {
    f"{module.__name__.removeprefix('bnjax.')}.{name}": Row(
        of(getattr(module, name), **options),
        _apart(definition) if of is _nnx and name != "FrozenBatchNorm" else definition,  # which assigns nothing
        stats,
    )
    for module, of in ((bnjax.linen, _linen), (bnjax.nnx, _nnx))
    for name, (options, definition, stats) in _LAYERS.items()
}


def _weighted(row, of, option="mask"):
    """The row with an option that the input says: a mask, weights or the kinds of examples."""

    def call(params, stats, x, training=True, **more):
        return row.call(params, stats, x, training, **{option: of(x)}, **more)

    def definition(params, stats, x):
        return row.definition(params, stats, x, of(x).astype(x.dtype) * jnp.ones_like(x))

    return dataclasses.replace(row, call=call, definition=definition)


FLAX = {
    "flax.linen.BatchNorm": Row(_linen(nn.BatchNorm), batch_norm, STATS),
    "flax.nnx.BatchNorm": Row(_nnx(nnx.BatchNorm), _apart(batch_norm), STATS),
}
ROWS |= {f"{name}, weights": _weighted(ROWS[name], weights_of) for name in _FUNCTIONS if name != "frozen_batch_norm"}
ROWS |= {f"{name}, mask": _weighted(ROWS[name], mask_of) for name in ("batch_norm", "linen.BatchNorm", "nnx.BatchNorm")}
FLAX |= {f"{name}, mask": _weighted(row, mask_of) for name, row in FLAX.items()}

# --- columns ----------------------------------------------------------------------------------------------------------


def _exact(function, *arguments):
    """Returns what a function gives in float64."""
    with enable_x64(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return jax.device_get(function(*jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), arguments)))


def _loss(call):
    """Makes a scalar of outputs and statistics, smooth and without symmetries."""

    def loss(params, stats, x):
        y, moved = call(params, stats, x)
        weights = jnp.asarray(WEIGHTS, y.dtype) if y.shape == SHAPE else jnp.ones_like(y)
        return (jnp.sin(y) * weights).sum() + sum((v**2).sum() for v in moved.values())

    return loss


def _value(row, transform=lambda f: f):
    arguments = PARAMS, row.stats, X
    return transform(row.call)(*map(_arrays, arguments)), _exact(row.definition, *arguments)


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def _gradient(row, transform=lambda f: f):
    arguments = PARAMS, row.stats, X
    got = jax.jit(jax.grad(transform(_loss(row.call)), (0, 2)))(*map(_arrays, arguments))
    return got, _exact(jax.grad(_loss(row.definition), (0, 2)), *arguments)


def _along(function, stats):
    """A loss as a function of a number, along a curve of inputs."""
    return lambda params, x, d, t: function(params, stats, x + t * d + t**2 * jnp.sin(x))


def _second(row, of):
    def second(function, params, stats, x, d):
        along = functools.partial(_along(_loss(function), stats), params, x, d)
        return of(along)(jnp.zeros((), x.dtype))

    got = jax.jit(functools.partial(second, row.call))(*_arrays((PARAMS, row.stats, X, DIRECTION)))
    return got, _exact(functools.partial(second, row.definition), PARAMS, row.stats, X, DIRECTION)


def _jvp(row):
    tangents = jax.tree.map(np.cos, (PARAMS, row.stats, X))

    def along(function, *arguments):
        return jax.jvp(_loss(function), *arguments)

    return along(row.call, _arrays((PARAMS, row.stats, X)), _arrays(tangents)), _exact(
        functools.partial(along, row.definition), (PARAMS, row.stats, X), tangents
    )


def _vmap(params_axis, x_axis, transform=lambda f: f):
    def column(row):
        axes = params_axis, params_axis, x_axis
        several = lambda tree: jax.tree.map(lambda v: np.stack([v, v * 1.1, v * 1.2]), tree)
        arguments = [several(a) if axis == 0 else a for a, axis in zip((PARAMS, row.stats, X), axes, strict=True)]
        got = jax.jit(jax.vmap(transform(row.call), axes))(*map(_arrays, arguments))
        return got, _exact(jax.vmap(transform(row.definition), axes), *arguments)

    return column


def _scan(row):
    several = np.stack([X, X * 1.1, X + 1])

    def steps(function, params, stats, xs):
        def step(carry, x):
            total, stats = carry
            y, stats = function(params, stats, x)
            return (total + jnp.sin(y).sum(), stats), y

        return lax.scan(step, (jnp.zeros((), xs.dtype), stats), xs)

    def gradient(function, params, stats, xs):
        return jax.grad(lambda params: steps(function, params, stats, xs)[0][0])(params)

    got = [jax.jit(functools.partial(f, row.call))(*_arrays((PARAMS, row.stats, several))) for f in (steps, gradient)]
    return got, [_exact(functools.partial(f, row.definition), PARAMS, row.stats, several) for f in (steps, gradient)]


def _export(row, what):
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 4", constraints=["mod(b, 2) == 0"]), jnp.float32)
    small = X[:6, :3]

    def gradient(function):
        def loss(params, stats, x):
            y, moved = function(params, stats, x)
            return jnp.sin(y).sum() + sum((v**2).sum() for v in moved.values())

        return jax.grad(loss, (0, 2))

    call = {"training": row.call, "gradient": gradient(row.call)}.get(what, functools.partial(row.call, training=False))
    definition = {"training": row.definition, "gradient": gradient(row.definition)}.get(what, _inference(row))
    kinds = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (PARAMS, row.stats))
    exported = export.export(jax.jit(call))(*kinds, shape)
    return exported.call(*_arrays((PARAMS, row.stats, small))), _exact(definition, PARAMS, row.stats, small)


def _inference(row):
    def inference(params, stats, x):
        kind = {name: values[1] if values.ndim == 2 else values for name, values in stats.items()}
        return _normalized(params, kind["mean"], kind["var"], x), stats

    return inference


def _jet(row):
    def taylor(function, params, stats, x, d):
        along = functools.partial(_along(_loss(function), stats), params, x, d)
        zero = jnp.zeros((), x.dtype)
        return jet(along, (zero,), ((jnp.ones((), x.dtype), zero),))[1]

    def nested(function, params, stats, x, d):
        along = functools.partial(_along(_loss(function), stats), params, x, d)
        slope = lambda t: jax.jvp(along, (t,), (jnp.ones_like(t),))[1]
        zero = jnp.zeros((), x.dtype)
        return [slope(zero), jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]]

    arguments = PARAMS, row.stats, X, DIRECTION
    return taylor(row.call, *_arrays(arguments)), _exact(functools.partial(nested, row.definition), *arguments)


def _within(context, *columns):
    def column(row):
        with context():
            made = [column(row) for column in columns]
        return [got for got, _ in made], [expected for _, expected in made]

    return column


def _x64(row):
    with enable_x64():
        arguments = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (PARAMS, row.stats, X))
        got = jax.device_get(_both(row.call)(*arguments))
    assert all(v.dtype == np.float64 for v in jax.tree.leaves(got))
    return got, _exact(_both(row.definition), *arguments)


def _both(function):
    """Value and gradient in one function, as trees of arrays."""
    return lambda *arguments: (function(*arguments), jax.grad(_loss(function), (0, 2))(*arguments))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


SPLITS = {
    "batch": P("data"),
    "features": P(None, None, None, "model"),
    "space": P(None, "data"),
    "batch and features": P("data", None, None, "model"),
    "batch and space": P("data", "model"),
    "two axes": P(("data", "model")),
    "width": P(None, None, "data"),
    "batch and width": P("data", None, "model"),
    "space and width": P(None, "data", "model"),
}


def _partitioned(kind, spec, of_parameters=None):
    def column(row):
        mesh = mesh_of(kind)
        put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
        params, stats = (
            jax.tree.map(lambda v: put(v, P(*[None] * (v.ndim - 1), of_parameters)), tree)
            for tree in (PARAMS, row.stats)
        )
        arguments = params, stats, put(X, spec)
        with jax.set_mesh(mesh):
            got = jax.device_get(jax.jit(_both(row.call))(*arguments))
        return got, _exact(_both(row.definition), PARAMS, row.stats, X)

    return column


def _manual(names, axis_name, spec, rest=None, kind=AxisType.Auto):
    """In shard_map over some axes, the others left to XLA or explicit; derivatives are taken outside."""

    def column(row):
        mesh = mesh_of(kind)
        over = {"axis_names": set(names)} if set(names) != {"data", "model"} else {}
        out = (spec if row.normalizes else P(), P())
        mapped = jax.shard_map(
            functools.partial(row.call, axis_name=axis_name),
            mesh=mesh,
            in_specs=(P(), P(), spec),
            out_specs=out,
            **over,
        )
        x = jax.device_put(X, NamedSharding(mesh, rest or spec))
        with jax.set_mesh(mesh):
            got = jax.device_get(jax.jit(_both(mapped))(*_arrays((PARAMS, row.stats)), x))
        return got, _exact(_both(row.definition), PARAMS, row.stats, X)

    return column


def _pmap(row):
    def whole(params, stats, x):
        parts = x.reshape((4, 2, *SHAPE[1:]))
        y, stats = mapped(params, stats, parts)
        return (y.reshape(SHAPE) if row.normalizes else y[0]), stats

    mapped = jax.pmap(functools.partial(row.call, axis_name="i"), "i", in_axes=(None, None, 0), out_axes=(0, None))
    return _both(whole)(*_arrays((PARAMS, row.stats, X))), _exact(_both(row.definition), PARAMS, row.stats, X)


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch dimensions": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots offloaded": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "names": jax.checkpoint_policies.save_only_these_names("batch_norm_input"),
    "all but names": jax.checkpoint_policies.save_anything_except_these_names("batch_norm_input"),
    "other names": jax.checkpoint_policies.save_any_names_but_these("other"),
    "names offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["batch_norm_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "both": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, bnjax.save_batch_norm_inputs
    ),
    "batch norms' inputs": bnjax.save_batch_norm_inputs,
}
COLUMNS = {
    "jit": functools.partial(_value, transform=jax.jit),
    "grad": _gradient,
    "jvp": _jvp,
    "forward over reverse": functools.partial(
        _second, of=lambda f: lambda t: jax.jvp(jax.grad(f), (t,), (jnp.ones_like(t),))
    ),
    "reverse over reverse": functools.partial(_second, of=lambda f: jax.grad(jax.grad(f))),
    "hessian": functools.partial(_second, of=jax.hessian),
    "vmap of inputs": _vmap(None, 0),
    "vmap of parameters": _vmap(0, None),
    "vmap of both": _vmap(0, 0),
    "vmap of gradients": _vmap(0, 0, lambda f: jax.grad(_loss(f), (0, 2))),
    "scan": _scan,
    **{
        f"remat, {name}": functools.partial(_gradient, transform=functools.partial(jax.checkpoint, policy=policy))
        for name, policy in POLICIES.items()
    },
    **{f"export, {what}": functools.partial(_export, what=what) for what in ("training", "gradient", "inference")},
    "jet": _jet,
    "strict promotion": _within(lambda: jax.numpy_dtype_promotion("strict"), _value, _gradient),
    "rank promotion raised": _within(lambda: jax.numpy_rank_promotion("raise"), _value, _gradient),
    "debug_nans": _within(lambda: jax.debug_nans(True), _value, _gradient),
    "leak checking": _within(jax.checking_leaks, functools.partial(_value, transform=jax.jit), _gradient),
    "disable_jit": _within(jax.disable_jit, _value, _gradient),
    "x64": _x64,
    **{f"automatic, {name}": _partitioned(AxisType.Auto, spec) for name, spec in SPLITS.items()},
    **{f"explicit, {name}": _partitioned(AxisType.Explicit, spec) for name, spec in SPLITS.items()},
    "automatic, parameters": _partitioned(AxisType.Auto, SPLITS["features"], "model"),
    "explicit, parameters": _partitioned(AxisType.Explicit, SPLITS["features"], "model"),
    "explicit, parameters and batch": _partitioned(AxisType.Explicit, SPLITS["batch and features"], "model"),
    "manual, batch": _manual(("data", "model"), "data", P("data")),
    "manual, two axes": _manual(("data", "model"), ("data", "model"), P(("data", "model"))),
    "manual, space": _manual(("data", "model"), "data", P(None, "data")),
    "manual, batch and space": _manual(("data", "model"), ("data", "model"), P("data", "model")),
    "partially manual, features": _manual(("data",), "data", P("data"), P("data", None, None, "model")),
    "partially manual, batch": _manual(("data",), "data", P("data"), P(("data", "model"))),
    "partially manual, space": _manual(("data",), "data", P("data"), P("data", "model")),
    **{
        f"partially manual, explicit {name}": _manual(("data",), "data", P("data"), spec, AxisType.Explicit)
        for name, spec in {
            "features": P("data", None, None, "model"),
            "batch": P(("data", "model")),
            "space": P("data", "model"),
        }.items()
    },
    "pmap": _pmap,
}

# Cells that mean something else there than the definition of the row, and why.
OTHER = {
    (row, column): "a ghost batch does not span devices, and there each of them has a part of each, or a single example"
    for row in ROWS
    if "ghost" in row.lower()
    for column in ("manual, two axes", "manual, space", "manual, batch and space")
} | {
    (row, column): "the kinds are made of whole images here, and a device has a part of each"
    for row in ROWS
    if "each example" in row
    for column in ("manual, space", "manual, batch and space")
}


def check(row, column):
    """Raises AssertionError where a cell is not right."""
    got, expected = COLUMNS[column](row)
    got, expected = jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    tolerance = 1e-9 if column == "x64" else 2e-4
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * scale)
