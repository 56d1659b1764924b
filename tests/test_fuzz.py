"""Generated cases: any shape, axes, dtype, mask, weights and constants, under transforms, against NumPy in float64.

A few in the test suite; many thousands by `pytest tests/test_fuzz.py --hypothesis-profile=fuzz --dist load`. What is
compiled comes from a fixed list of programs, so that most cases only run.
"""

import functools
import itertools
import random
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import event, given, settings

from bnjax import batch_norm, init_batch_norm, merge_moments, moments, variants
from bnjax._compat import enable_x64

MANY = settings.default.max_examples > 1000
DTYPES = ("float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


class Program(NamedTuple):
    """What is compiled for."""

    shape: tuple[int, ...]
    axis: tuple[int, ...]
    dtype: str
    mask: str | None = None  # 'bool', 'weights', or 'features': weights that differ between these
    params: tuple[str, ...] = ("scale", "bias")
    stats_dtype: str = "float32"
    bessel_correction: bool = False


class Case(NamedTuple):
    """A program and what it is run with."""

    program: Program
    seed: int = 0
    location: float = 0.0
    spread: float = 1.0
    momentum: float = 0.9
    epsilon: float = 1e-5
    kept: float = 0.7  # of the elements, by a mask


def programs(count, dtypes=DTYPES):
    """As many of all programs, always the same."""
    draw = random.Random(0)
    found = []
    while len(found) < count:
        ndim = draw.randint(1, 4)
        shape = tuple(draw.choice((0, 1, 1, 2, 3, 5, 8)) for _ in range(ndim))
        if draw.random() < 0.2:
            shape = (draw.choice((257, 600)), *shape[1:2])  # more than the sample of the provisional mean
        axis = tuple(sorted(draw.sample(range(len(shape)), draw.randint(1, len(shape)))))
        found.append(
            Program(
                shape,
                axis,
                draw.choice(dtypes),
                draw.choice((None, "bool", "weights", "features")),
                draw.choice(((), ("scale",), ("bias",), ("scale", "bias"))),
                draw.choice(("float32", "float32", "bfloat16", "float16")),
                draw.random() < 0.3,
            )
        )
    return found


PROGRAMS = programs(300 if MANY else 10)


def cases(listed=PROGRAMS):
    return st.builds(
        Case,
        st.sampled_from(listed),
        st.integers(0, 2**32 - 1),
        st.sampled_from((0.0, 1.0, -3.0, 100.0, -1e4)),
        st.sampled_from((0.0, 1e-6, 1e-3, 1.0, 30.0, 1e4)),
        st.one_of(st.sampled_from((0.0, 0.9, 0.99, 1.0)), st.floats(0, 1)),
        st.sampled_from((1e-12, 1e-5, 1e-3, 1.0)),
        st.sampled_from((0.0, 0.2, 0.7, 1.0)),
    )


def arrays(case):
    """Input, parameters, running statistics, weights and cotangent, in NumPy."""
    p, rng = case.program, np.random.default_rng(case.seed)
    largest = float(jnp.finfo(p.dtype).max) / 4
    x = np.clip(case.location + case.spread * rng.normal(size=p.shape), -largest, largest).astype(p.dtype)
    features = tuple(p.shape[a] for a in p.axis)
    params = {name: rng.normal(size=features).astype(np.float32) for name in p.params}
    stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.1, 2, features)}
    stats = {name: value.astype(p.stats_dtype) for name, value in stats.items()}
    weights = None
    if p.mask is not None:
        one = p.shape if p.mask == "features" else tuple(1 if a in p.axis else s for a, s in enumerate(p.shape))
        weights = rng.uniform(size=one) < case.kept
        if p.mask != "bool":
            weights = (weights * rng.uniform(0.1, 3, one)).astype(np.float32)
    return x, params, stats, weights, rng.normal(size=p.shape).astype(np.float32)


@functools.cache
def compiled(program):
    """Training, its derivatives, and inference."""
    options = {"axis": program.axis, "bessel_correction": program.bessel_correction}

    @jax.jit
    def run(x, params, stats, weights, g, momentum, epsilon):
        def train(x, params):
            y, new = batch_norm(
                x,
                params,
                stats,
                training=True,
                momentum=momentum,
                epsilon=epsilon,
                mask=weights,
                dtype=jnp.promote_types(jnp.float32, "float64" if program.dtype == "float64" else "float32"),
                **options,
            )
            return (g.astype(y.dtype) * y).sum(), (y, new)

        (dx, dparams), (y, new) = jax.grad(train, (0, 1), has_aux=True)(x, params)
        narrow, _ = batch_norm(
            x, params, stats, training=True, momentum=momentum, epsilon=epsilon, mask=weights, **options
        )
        inference, same = batch_norm(x, params, new, training=False, epsilon=epsilon, mask=weights, **options)
        return y, new, dx, dparams, narrow, inference, same

    return run


def expanded(features, program):
    return np.expand_dims(features, tuple(a for a in range(len(program.shape)) if a not in program.axis))


def expected_of(case, x, params, stats, weights, g):
    """All that `compiled` gives, from the definitions, and how far rounding may move them, in float64."""
    p = case.program
    reduced = tuple(a for a in range(x.ndim) if a not in p.axis)
    total = lambda v: v.sum(reduced, keepdims=True)
    x, g = np.float64(x), np.float64(g)
    w = np.ones(x.shape) if weights is None else np.broadcast_to(np.float64(weights), x.shape)
    n = total(w)
    some = np.where(n > 0, n, 1)
    old_mean, old_var = (expanded(np.float64(stats[name]), p) for name in ("mean", "var"))
    mean = np.where(n > 0, total(w * x) / some, old_mean)
    var = np.where(n > 0, total(w * (x - mean) ** 2) / some, old_var)
    scale = expanded(np.float64(params.get("scale", np.ones([p.shape[a] for a in p.axis]))), p)
    bias = expanded(np.float64(params.get("bias", np.zeros([p.shape[a] for a in p.axis]))), p)
    r = 1 / np.sqrt(var + case.epsilon)
    hat = (x - mean) * r
    y = scale * hat + bias
    # y depends on the statistics for all elements, these on the elements with weight.
    dmean, dvar = -scale * r * total(g), -0.5 * scale * r**2 * total(g * hat)
    share = np.where(n > 0, w / some, 0)
    through_statistics = share * (dmean + 2 * (x - mean) * dvar)
    dx = scale * r * g + through_statistics
    dparams = {"scale": total(g * hat).squeeze(reduced), "bias": total(g).squeeze(reduced)}
    unbiased = var * np.where(n > 1, n / np.where(n > 1, n - 1, 1), 1) if p.bessel_correction else var
    rho = np.where(n > 0, case.momentum, 1.0)
    new = {"mean": rho * old_mean + (1 - rho) * mean, "var": rho * old_var + (1 - rho) * unbiased}
    # Rounding: of the mean, relative to it; of the rest, relative to the value; more of both with more elements.
    eps = 300 * float(jnp.finfo("float64" if p.dtype == "float64" else "float32").eps)
    lost = eps * (1 + (np.abs(mean) + np.abs(x).max(initial=0) * 1e-2) * r)
    bound = {
        "y": np.abs(scale) * lost * (1 + np.abs(hat)) + eps * np.abs(bias) + eps,
        "dx": np.abs(scale) * r * lost * (1 + hat**2) * (np.abs(g) + share * total(np.abs(g) * (1 + np.abs(hat)))),
        "scale": (lost * total(np.abs(g) * (1 + np.abs(hat)))).squeeze(reduced),
        "bias": (eps * total(np.abs(g))).squeeze(reduced),
        "mean": (eps * (np.abs(mean) + np.sqrt(var) + 1)).squeeze(reduced),
        "var": (
            eps
            * (var + np.sqrt(var) * np.abs(mean) + eps * mean**2 + 1e-30)
            * (unbiased / np.where(var > 0, var, 1) + 1)
        ).squeeze(reduced),
    }
    bound["parts of dx"] = np.abs(scale * r * g) + np.abs(through_statistics)  # each rounded to the input's dtype
    bound["dx"] += 2 * float(jnp.finfo(p.dtype).eps) * bound["parts of dx"]
    for name, value in dparams.items():
        bound[name] += float(jnp.finfo("float32").eps) * np.abs(value)
    new = {name: value.squeeze(reduced) for name, value in new.items()}
    return y, new, dx, dparams, bound


def assert_within(got, expected, bound, what):
    excess = np.abs(np.float64(got) - expected) - bound
    assert not np.any(excess > 0), (
        f"{what}: {np.float64(got).ravel()[excess.argmax()]} for {expected.ravel()[excess.argmax()]}"
    )
    assert np.isfinite(np.float64(got)).all(), what


@given(cases())
def test_values_derivatives_and_state(case):
    p = case.program
    event(f"{p.dtype}, {p.mask}")
    with enable_x64(p.dtype == "float64"), np.errstate(over="ignore"):
        x, params, stats, weights, g = arrays(case)
        got = compiled(p)(x, params, stats, weights, g, case.momentum, case.epsilon)
        y, new, dx, dparams, narrow, inference, same = jax.device_get(got)
        expected_y, expected_new, expected_dx, expected_dparams, bound = expected_of(case, x, params, stats, weights, g)
    assert_within(y, expected_y, bound["y"], "output")
    kept = jnp.finfo(p.stats_dtype)
    fits = np.all([np.abs(value) < float(kept.max) for value in expected_new.values()], axis=0)
    for name, value in expected_new.items():
        assert new[name].dtype == stats[name].dtype
        value = np.where(fits, value, np.float64(stats[name]))  # what does not fit does not move them
        rounding = 4 * float(kept.eps) * (np.abs(value) + np.abs(np.float64(stats[name]))) + float(
            kept.smallest_subnormal
        )
        assert_within(new[name], value, np.where(fits, bound[name] + rounding, 0), name)
        np.testing.assert_array_equal(new[name], same[name])
    for name, value in dparams.items():
        assert_within(value, expected_dparams[name], bound[name], f"derivative of the {name}")
    assert narrow.dtype == inference.dtype == x.dtype
    finest = jnp.finfo(p.dtype)
    if float(finest.eps) < 0.1 and bound["parts of dx"].max(initial=0) < float(finest.max):
        rounding = float(finest.eps) * np.abs(expected_dx) + float(finest.smallest_subnormal)
        assert_within(dx, expected_dx, bound["dx"] + rounding, "derivative of the input")
    if np.abs(expected_y).max(initial=0) < float(finest.max) / 2:
        rounding = float(finest.eps) * np.abs(expected_y) + float(finest.smallest_subnormal)
        assert_within(narrow, expected_y, bound["y"] + rounding, "output in the input's dtype")


COMPLEX = [program._replace(stats_dtype="float32") for program in PROGRAMS[: 100 if MANY else 5]]


@functools.cache
def compiled_complex(program):
    """Training, its derivative by the input, and inference, of a complex input."""
    options = {"axis": program.axis, "bessel_correction": program.bessel_correction}

    @jax.jit
    def run(x, params, stats, weights, g, momentum, epsilon):
        def train(x):
            y, new = batch_norm(
                x, params, stats, training=True, momentum=momentum, epsilon=epsilon, mask=weights, **options
            )
            return (g * y).real.sum(), (y, new)

        dx, (y, new) = jax.grad(train, has_aux=True)(x)
        return y, new, dx, batch_norm(x, params, new, training=False, epsilon=epsilon, **options)[0]

    return run


@given(cases(COMPLEX))
def test_complex_input(case):
    """As real input with both parts as elements of their own would be, but for the counts and the two means."""
    p, rng = case.program, np.random.default_rng(case.seed)
    reduced = tuple(a for a in range(len(p.shape)) if a not in p.axis)
    with enable_x64():
        _, params, stats, weights, _ = arrays(case._replace(program=p._replace(dtype="float32")))
        draw = lambda: rng.normal(size=p.shape) + 1j * rng.normal(size=p.shape)
        x, g = case.location * (1 - 0.5j) + case.spread * draw(), draw()
        stats = {"mean": np.complex128(stats["mean"]) * (1 + 1j), "var": np.float64(stats["var"])}
        got = compiled_complex(p)(x, params, stats, weights, g, case.momentum, case.epsilon)
        y, new, dx, inference = jax.device_get(got)
    total = lambda v: v.sum(reduced, keepdims=True)
    w = np.ones(x.shape) if weights is None else np.broadcast_to(np.float64(weights), x.shape)
    n = total(w)
    some = np.where(n > 0, n, 1)
    mean = np.where(n > 0, total(w * x) / some, expanded(stats["mean"], p))
    var = np.where(n > 0, total(w * np.abs(x - mean) ** 2) / some, expanded(stats["var"], p))
    scale, bias = (
        expanded(np.float64(params[name]), p) if name in params else default
        for name, default in (("scale", 1.0), ("bias", 0.0))
    )
    r = 1 / np.sqrt(var + case.epsilon)
    size = 1e-11 * (1 + (np.abs(mean) + np.abs(x).max(initial=0)) * r) * np.abs(scale)
    expected = scale * (x - mean) * r + bias
    assert_near(y, expected, size * (1 + np.abs(expected)) + 1e-13, "output")
    rho = np.where(n > 0, case.momentum, 1.0)
    unbiased = var * np.where(n > 1, n / np.where(n > 1, n - 1, 1), 1) if p.bessel_correction else var
    for name, value in (("mean", mean), ("var", unbiased)):
        value = rho * expanded(stats[name], p) + (1 - rho) * value
        assert new[name].dtype == stats[name].dtype
        assert_near(expanded(new[name], p), value, 1e-9 * (np.abs(value) + np.abs(mean) ** 2 * 1e-3 + 1e-3), name)
    # In JAX's convention the derivative of a real function holds ∂/∂Re − i ∂/∂Im.
    hat = (x - mean) * r
    along = total((g * hat).real)
    share = np.where(n > 0, w / some, 0)
    expected = scale * r * (g - share * total(g) - share * along * hat.conj())
    bound = size * r * (1 + np.abs(hat) ** 2) * (np.abs(g) + share * total(np.abs(g) * (1 + np.abs(hat)))) + 1e-13
    assert_near(dx, expected, bound, "derivative of the input")
    running = scale * (x - expanded(new["mean"], p)) / np.sqrt(expanded(new["var"], p) + case.epsilon) + bias
    np.testing.assert_allclose(inference, running, rtol=1e-7, atol=1e-7 * (1 + np.abs(running).max(initial=0)))


def assert_near(got, expected, bound, what):
    assert np.isfinite(got).all(), what
    assert (np.abs(got - expected) <= bound).all(), what


SPECIAL = (0.0, -0.0, 1e-45, -1e-38, 1.0, 65504.0, 1e15, -1e18, 1e19, -1e30, 3.4e38, -3.4e38)


@functools.cache
def stepped(shape, masked):
    def step(x, weights, momentum):
        _, stats = init_batch_norm(shape[-1])
        for function in (
            batch_norm,
            functools.partial(variants.ghost_batch_norm, ghost_size=2),
            variants.moving_batch_norm,
            variants.frozen_batch_norm,
            variants.batch_renorm,
            functools.partial(variants.lp_batch_norm, p=1),
            functools.partial(variants.lp_batch_norm, p=2),
            functools.partial(variants.lp_batch_norm, p=float("inf")),
        ):
            _, stats = function(x, {}, stats, training=True, momentum=momentum, mask=weights if masked else None)
        return stats

    return jax.jit(step)


@given(st.data(), st.sampled_from(((2, 1), (5, 2), (3, 2, 2))), st.booleans(), st.sampled_from((0.0, 0.5, 1.0)))
def test_no_finite_data_makes_a_state_that_is_not(data, shape, masked, momentum):
    size = int(np.prod(shape))
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))
    x = np.float32(data.draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    weights = np.float32(
        data.draw(st.lists(st.sampled_from((0.0, 1e-30, 0.5, 1.0, 1e30)), min_size=shape[0], max_size=shape[0]))
    )
    stats = stepped(shape, masked)(x, weights.reshape((-1,) + (1,) * (len(shape) - 1)), momentum)
    assert all(np.isfinite(value).all() for value in stats.values()), stats
    assert (stats["var"] >= 0).all()


# --- parts and transforms ---------------------------------------------------------------------------------------------

GROUPS = {2: None, 4: ((0, 2), (1, 3)), 6: ((0, 1, 5), (2, 3, 4))}


@functools.cache
def in_parts(members, size, transform):
    """A batch in parts under a transform, and whole."""
    groups = GROUPS[members]

    def one(x, params, stats, weights):
        return batch_norm(
            x, params, stats, training=True, momentum=0.5, mask=weights, axis_name="i", axis_index_groups=groups
        )

    mapped = jax.vmap(one, (0, None, None, 0), axis_name="i")
    if transform == "remat":
        mapped = jax.checkpoint(mapped)
    if transform == "vmap":  # of seeds
        mapped = lambda *args, f=mapped: jax.tree.map(
            lambda v: v[1], jax.vmap(f)(*jax.tree.map(lambda v: jnp.stack([2 * v, v]), args))
        )
    if transform == "scan":
        mapped = lambda *args, f=mapped: jax.tree.map(
            lambda v: v[0], jax.lax.scan(lambda c, a: (c, f(*a)), 0, jax.tree.map(lambda v: v[None], args))[1]
        )

    @jax.jit
    def run(x, params, stats, weights, g):
        return mapped(x, params, stats, weights), jax.grad(lambda x: (g * mapped(x, params, stats, weights)[0]).sum())(
            x
        )

    @jax.jit
    def whole(x, params, stats, weights, g):
        f = functools.partial(batch_norm, batch_stats=stats, training=True, momentum=0.5, mask=weights)
        return f(x, params), jax.grad(lambda x: (g * f(x, params)[0]).sum())(x)

    return run, whole


@given(
    st.sampled_from(
        list(itertools.product(GROUPS, (1, 3), ("jit", "remat", "vmap", "scan")))
        if MANY
        else [(4, 3, "scan"), (6, 1, "vmap")]
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from((0.0, 100.0, -1e4)),
    st.sampled_from((0.0, 0.3, 1.0)),
)
def test_parts_are_the_whole(program, seed, location, kept):
    members, size, _ = program
    rng = np.random.default_rng(seed)
    with enable_x64():
        x = location + rng.normal(size=(members, size, 3))
        params = {"scale": rng.normal(size=3), "bias": rng.normal(size=3)}
        stats = {"mean": rng.normal(size=3), "var": rng.uniform(0.1, 2, 3)}
        weights, g = (
            rng.uniform(size=(members, size)) * (rng.uniform(size=(members, size)) < kept),
            rng.normal(size=x.shape),
        )
        run, whole = in_parts(*program)
        (y, new), dx = jax.device_get(run(x, params, stats, weights, g))
        for group in GROUPS[members] or (tuple(range(members)),):
            joint = [v[list(group)].reshape((-1, *v.shape[2:])) for v in (x, weights, g)]
            (expected_y, expected_new), expected_dx = whole(joint[0], params, stats, joint[1], joint[2])
            np.testing.assert_allclose(y[list(group)].reshape(joint[0].shape), expected_y, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(dx[list(group)].reshape(joint[0].shape), expected_dx, rtol=1e-5, atol=1e-5)
            for name, value in new.items():
                np.testing.assert_allclose(value[group[0]], expected_new[name], rtol=1e-8, atol=1e-10)


@functools.cache
def merged(sizes, shape, is_complex):
    def run(x, weights):
        ends = np.cumsum((0, *sizes))
        parts = [moments(x[a:b], mask=weights[a:b]) for a, b in itertools.pairwise(ends)]
        return functools.reduce(merge_moments, parts), moments(x, mask=weights)

    return jax.jit(run)


@given(
    st.sampled_from([(1, 4), (0, 3, 2), (5,), (2, 0, 0, 3)][: 4 if MANY else 2]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from((0.0, 1e3, -1e6)),
    st.sampled_from((0.0, 0.5, 1.0)),
)
def test_merged_moments_are_those_of_the_whole(sizes, is_complex, seed, location, kept):
    rng = np.random.default_rng(seed)
    shape = (sum(sizes), 3)
    with enable_x64():
        x = location + rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)
        weights = rng.uniform(size=shape[:1]) * (rng.uniform(size=shape[:1]) < kept)
        got, whole = jax.device_get(merged(sizes, shape, is_complex)(x, weights))
    n = weights.sum()
    mean = (weights[:, None] * x).sum(0) / (n or 1)
    var = (weights[:, None] * np.abs(x - mean) ** 2).sum(0) / (n or 1)
    for m in (got, whole):
        np.testing.assert_allclose(m.count, n, rtol=1e-12)
        np.testing.assert_allclose(m.mean, mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(m.var, var, rtol=1e-7, atol=1e-15 * location**2 + 1e-12)
    assert got.mean.dtype == (np.complex128 if is_complex else np.float64)


# --- variants ---------------------------------------------------------------------------------------------------------


def averaged(parts, stats, momentum):
    """Running statistics after the moments of ghost batches, averaged by their counts."""
    count = sum(m.count for m in parts)
    share = [m.count / jnp.where(count > 0, count, 1) for m in parts]
    batch = {part: sum(s * getattr(m, part) for s, m in zip(share, parts, strict=True)) for part in ("mean", "var")}
    moved = {part: momentum * stats[part] + (1 - momentum) * value for part, value in batch.items()}
    return {part: jnp.where(count > 0, value, stats[part]) for part, value in moved.items()}


@functools.cache
def variant(name, axis, ghost_size):
    function = {
        "ghost": functools.partial(variants.ghost_batch_norm, ghost_size=ghost_size),
        "renorm": functools.partial(variants.batch_renorm, r_max=1.0, d_max=0.0),
        "moving": variants.moving_batch_norm,
        "frozen": variants.frozen_batch_norm,
        "split": batch_norm,
    }[name]
    f = lambda f, *args, **options: f(*args, training=True, axis=axis, **options)

    def run(x, params, stats, weights, momentum):
        ours = f(function, x, params, stats, mask=weights, momentum=momentum)
        plain = f(batch_norm, x, params, stats, mask=weights, momentum=momentum)
        if name == "frozen":
            plain = batch_norm(x, params, stats, training=False, axis=axis)
        if name == "moving":
            plain = batch_norm(x, params, plain[1], training=False, axis=axis)
        if name == "ghost":
            first = next(a for a in range(x.ndim) if a not in axis)
            cut = lambda v, i: (
                v
                if v.shape[first] == 1
                else jax.lax.slice_in_dim(v, i, min(i + ghost_size, x.shape[first]), axis=first)
            )
            cuts = [(cut(x, i), cut(weights, i)) for i in range(0, x.shape[first], ghost_size)]
            parts = [f(batch_norm, x, params, stats, mask=w, momentum=momentum)[0] for x, w in cuts]
            plain = (
                jnp.concatenate(parts, first),
                averaged([moments(x, axis=axis, mask=w) for x, w in cuts], stats, momentum),
            )
        if name == "split":  # of the second kind of two
            apart = {part: jnp.stack([value + 1, value]) for part, value in stats.items()}
            y, new = f(variants.split_batch_norm, x, params, apart, split=jnp.int8(1), mask=weights, momentum=momentum)
            ours = (
                y,
                {part: jnp.where((value[0] == apart[part][0]).all(), value[1], jnp.nan) for part, value in new.items()},
            )
        return ours, plain

    return jax.jit(run)


VARIANTS = list(itertools.product(("ghost", "renorm", "moving", "frozen", "split"), ((1,), (0,), (0, 2)), (1, 2, 4)))


@given(
    st.sampled_from(VARIANTS if MANY else VARIANTS[::7]),
    st.integers(0, 2**32 - 1),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.floats(0, 1),
)
def test_variants_are_what_they_say(program, seed, kept, momentum):
    _, axis, _ = program
    rng = np.random.default_rng(seed)
    shape = (4, 5, 3)
    features = tuple(shape[a] for a in axis)
    with enable_x64():
        x = rng.normal(1, 2, shape)
        params = {"scale": rng.normal(size=features), "bias": rng.normal(size=features)}
        stats = {"mean": rng.normal(size=features), "var": rng.uniform(0.1, 2, features)}
        weights = rng.uniform(size=tuple(1 if a in axis else s for a, s in enumerate(shape)))
        weights *= rng.uniform(size=weights.shape) < kept
        (y, new), (expected, expected_new) = variant(*program)(x, params, stats, weights, momentum)
        np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8)
        for part in ("mean", "var"):
            np.testing.assert_allclose(new[part], expected_new[part], rtol=1e-9, atol=1e-12)
