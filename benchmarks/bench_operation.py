"""A benchmark of batch norm in training, forward (+ backward), against Flax, Haiku, Equinox, Keras and PyTorch.

All contestants take turns in one process, each with the input in the layout it asks for, and give the output, the
moved running statistics and, with backward, the gradients of input, scale and bias. Beside each time stands the error
against float64, for the input that is timed and for one whose mean is 1000 deviations from zero. The limit is the time
that the same arrays take to be summed and copied as often as batch norm must read and write them:

    forward      2 reads, 1 write  = sum(x) + copy(x)
    backward     4 reads, 1 write  = sum(x) + 2 sum(x) + copy(x)

Forward, "a known mean" is what bnjax must do at least: its two sums, about a provisional mean that is handed to it.

    python benchmarks/bench_operation.py --json operation.json [--keep-memory]
"""

import argparse
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import KNOWN_MEAN, PEERS, device, save, take_turns, torch_place

SHAPES = ("64x56x56x64", "128x28x28x128", "32x112x112x64", "256x7x7x2048", "4096x1024", "65536x256")
EPSILON = 1e-5


def reference(x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes output and gradient of the input in float64, with scale 1 and bias 0."""
    x, g = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (x, g))
    x = x - x.mean(0)
    rsigma = 1 / np.sqrt((x**2).mean(0) + EPSILON)
    x *= rsigma
    return x, rsigma * (g - g.mean(0) - x * (g * x).mean(0))


def jax_contestants(features: int, ndim: int, peers: Sequence[str]) -> dict[str, tuple[Callable, bool]]:
    """Returns functions `(x, params) -> (y, state)` of bnjax and its peers, and whether their features come second."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx

    import bnjax

    _, stats = bnjax.init_batch_norm(features)

    def linen(x, params, **options):
        layer = nn.BatchNorm(use_running_average=False, dtype=x.dtype, **options)
        return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    def of_nnx(x, params):
        layer = nnx.BatchNorm(features, dtype=x.dtype, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = params["scale"], params["bias"]
        return layer(x), (layer.mean[...], layer.var[...])

    def of_haiku():
        import haiku as hk

        def call(x, params):
            f = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.99)(x, is_training=True))
            _, state = f.init(None, jnp.zeros((1,) * (ndim - 1) + (features,)))
            shape = (1,) * (ndim - 1) + (features,)
            scale, offset = (params[name].astype(x.dtype).reshape(shape) for name in ("scale", "bias"))
            return f.apply({"batch_norm": {"scale": scale, "offset": offset}}, state, None, x)

        return call

    def of_equinox():
        import equinox as eqx

        def call(x, params):
            layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(features, "batch", mode="batch")
            layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (params["scale"], params["bias"]))
            y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
            return y.astype(x.dtype), jax.tree.leaves(state)

        return call

    def of_keras():
        import keras

        layer = keras.layers.BatchNormalization(epsilon=EPSILON)
        layer.build((1,) * (ndim - 1) + (features,))

        def call(x, params):
            moving = [v.value for v in layer.non_trainable_variables]
            y, moving = layer.stateless_call([params["scale"], params["bias"]], moving, x, training=True)
            return y.astype(x.dtype), moving

        return call

    makers: dict[str, tuple[Callable, bool]] = {
        "bnjax": (lambda: lambda x, params: bnjax.batch_norm(x, params, stats, training=True), False),
        "flax linen": (lambda: linen, False),
        "flax linen, two-pass": (lambda: functools.partial(linen, use_fast_variance=False), False),
        "flax nnx": (lambda: of_nnx, False),
        "haiku": (of_haiku, False),
        "equinox": (of_equinox, True),
        "keras": (of_keras, False),
    }
    return {name: (make(), second) for name, (make, second) in makers.items() if name in ("bnjax", *peers)}


def of_jax(f: Callable, x: np.ndarray, g: np.ndarray, dtype: str, backward: bool, second: bool) -> Callable:
    """Returns a call of a JAX function, which gives `(y, dx)` or `(y,)` with features last when asked for `result`."""
    import jax
    import jax.numpy as jnp

    params = {"scale": jnp.ones(x.shape[-1]), "bias": jnp.zeros(x.shape[-1])}
    x, g = (jnp.asarray(np.moveaxis(v, -1, 1) if second else v).astype(dtype) for v in (x, g))

    def run(x, params, g):
        if not backward:
            return f(x, params)
        y, vjp, state = jax.vjp(f, x, params, has_aux=True)
        return y, state, vjp(g)

    compiled = jax.jit(run).lower(x, params, g).compile()

    def call(result: bool = False):
        out = jax.block_until_ready(compiled(x, params, g))
        if result:
            arrays = [out[0], *([out[2][0]] if backward else [])]
            return [np.moveaxis(np.asarray(v, np.float32), 1 if second else -1, -1) for v in arrays]

    return call


def of_torch(x: np.ndarray, g: np.ndarray, dtype: str, backward: bool, channels_last: bool) -> Callable:
    """Returns a call as `of_jax` does, of PyTorch's own batch norm, on its accelerator where it has one."""
    import torch

    place, wait = torch_place()
    layout = torch.channels_last if channels_last and x.ndim == 4 else torch.contiguous_format
    x, g = (
        torch.from_numpy(np.moveaxis(v, -1, 1).copy()).to(place, getattr(torch, dtype)).contiguous(memory_format=layout)
        for v in (x, g)
    )
    weight, bias, var = torch.ones(x.shape[1]), torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    weight, bias, mean, var = (v.to(place) for v in (weight, bias, torch.zeros(x.shape[1]), var))
    inputs = [x, weight, bias]
    for v in inputs:
        v.requires_grad_(backward)

    def call(result: bool = False):
        y = torch.nn.functional.batch_norm(*(x, mean, var, weight, bias), training=True, momentum=0.01, eps=EPSILON)
        grads = torch.autograd.grad(y, inputs, g) if backward else []
        wait()
        if result:
            arrays = [y.detach(), *grads[:1]]
            return [np.moveaxis(v.float().cpu().numpy(), 1, -1) for v in arrays]

    return call


def limits(x: np.ndarray, dtype: str, peers: Sequence[str]) -> dict[str, Callable]:
    """Returns calls that sum and copy an array, by XLA and where it is among the peers by PyTorch."""
    import jax
    import jax.numpy as jnp

    of_jax = jnp.asarray(x).astype(dtype)
    total, twice = jax.jit(lambda x: x.sum(dtype=jnp.float32)), jax.jit(lambda x: x * 2)
    calls = {
        "sum, XLA": lambda: total(of_jax).block_until_ready(),
        "copy, XLA": lambda: twice(of_jax).block_until_ready(),
    }
    if "torch" not in peers:
        return calls
    import torch

    place, wait = torch_place()
    of_torch = torch.from_numpy(x).to(place, getattr(torch, dtype))
    return calls | {
        "sum, PyTorch": lambda: (of_torch.sum(dtype=torch.float32), wait()),
        "copy, PyTorch": lambda: (of_torch * 2, wait()),
    }


def known_mean(x: np.ndarray, dtype: str) -> Callable:
    """Returns a call of the forward pass with bnjax's sums about a mean that is known before, and nothing else."""
    import jax
    import jax.numpy as jnp

    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]

    @jax.jit
    def run(x, shift):
        wide = x.astype(jnp.float32)
        offset = (wide - shift).sum(axes) / count
        # XLA would else write out the difference, which both sums share.
        square = jnp.square(wide - (shift + 0 * shift)).sum(axes) / count
        mean, var = shift + offset[None], square - offset**2
        y = (wide - mean.reshape(shift.shape)) * jax.lax.rsqrt(var + EPSILON).reshape(shift.shape)
        return y.astype(x.dtype), mean, var

    arguments = jnp.asarray(x).astype(dtype), jnp.asarray(x.mean(axes, keepdims=True))
    return lambda: jax.block_until_ready(run(*arguments))


def measure(
    shape: tuple[int, ...], dtype: str, backward: bool, rounds: int, peers: Sequence[str] = PEERS
) -> dict[str, Any]:
    """Measures times and errors of all contestants at one shape."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, shape).astype(np.float32)
    g = rng.normal(size=shape).astype(np.float32)
    if dtype != "float32":
        import ml_dtypes

        x, g = (v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in (x, g))
    shifted = x + 2000

    def contestants(x):
        jax_functions = jax_contestants(shape[-1], len(shape), peers)
        calls = {name: of_jax(f, x, g, dtype, backward, second) for name, (f, second) in jax_functions.items()}
        for name in ("torch", "torch, channels last"):
            if name in peers and (name == "torch" or len(shape) == 4):
                calls[name] = of_torch(x, g, dtype, backward, name != "torch")
        return calls

    def errors(calls, x):
        """Computes the largest error of the output and of the input's gradient, over the largest value of each."""
        exact = reference(x, g)
        largest_errors = {}
        for name, call in calls.items():
            pairs = zip(call(result=True), exact, strict=False)
            largest_errors[name] = [float(np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max()) for a, b in pairs]
        return largest_errors

    result = {"shape": shape, "dtype": dtype, "backward": backward}
    if dtype == "float32":
        result["hard errors"] = errors(contestants(shifted), shifted)
    calls = contestants(x)
    result["errors"] = errors(calls, x)
    calls |= limits(x, dtype, peers) | ({} if backward else {KNOWN_MEAN: known_mean(x, dtype)})
    result["seconds"] = take_turns(calls, rounds)
    medians = {name: statistics.median(times) for name, times in result["seconds"].items()}
    total, copy = (min(v for name, v in medians.items() if name.startswith(kind)) for kind in ("sum", "copy"))
    result["limit"] = 4 * total + 2 * copy if backward else total + copy
    return result


def main() -> None:
    """Prints the tables; with --json it saves them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="shapes (default %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="dtypes (default %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help=f"of {PEERS}; all")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contestant (default %(default)s)")
    parser.add_argument("--keep-memory", action="store_true", help="see bnjax.training.host.keep_freed_memory")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's threads must not keep the others' processors busy
    if options.keep_memory:
        from bnjax.training.host import keep_freed_memory

        keep_freed_memory()
    import tables

    measured = []
    for dtype in options.dtypes.split(","):
        for shape in options.shapes.split(","):
            for backward in (False, True):
                measurement = measure(tuple(map(int, shape.split("x"))), dtype, backward, options.rounds, options.peers)
                measured.append(measurement)
                print(f"{dtype}, {shape}, {'forward + backward' if backward else 'forward'}: measured", flush=True)
    result = {"device": device(), "keeps memory": options.keep_memory, "measured": measured}
    for dtype in options.dtypes.split(","):
        of_dtype = [measurement for measurement in measured if measurement["dtype"] == dtype]
        print(f"\nbnjax's time to its peers'. {tables.operation({'measured': of_dtype}, dtype)}")
        for name in ("bnjax", *options.peers):
            of_peer = [measurement["errors"][name] for measurement in of_dtype if name in measurement["errors"]]
            if of_peer:
                print(f"largest error of output and gradient, {name}: {max(map(max, of_peer)):.0e}")
    save(options.json, result)


if __name__ == "__main__":
    main()
