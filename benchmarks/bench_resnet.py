"""A benchmark of ResNet-50's training step by batch norm: bnjax's, folded and not, Flax's, and none.

It measures tracing, lowering and compiling (each anew, with JAX's caches cleared), the memory of the compiled step,
and its time. Contestants take turns in one process. On a CPU a smaller batch of smaller images does, in float32, and
`--no-steps` measures the compiling alone. Before it, the exact sums of bfloat16 and the sums about a sample are held
against float64 on the device that is there.

    python benchmarks/bench_resnet.py --json resnet.json
    python benchmarks/bench_resnet.py --batch 8 --side 64 --dtype float32 --rounds 5    # on a CPU
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import device, save, take_turns

CONTESTANTS = ("bnjax", "bnjax, folded", "flax", "none")


def program(contestant: str, batch: int, side: int, dtype: str) -> tuple[Callable, tuple]:
    """Returns a training step of state and images, and its arguments."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from bnjax import linen, models, training

    layers = {"flax": nn.BatchNorm, "none": None}
    layer = layers.get(contestant, linen.BatchNorm)
    norm = None if layer is None else functools.partial(layer, dtype=dtype)
    model = models.resnet50(1000, norm, dtype=dtype, fold="auto" if "folded" in contestant else False)
    state = training.create_train_state(
        model, optax.sgd(0.1, momentum=0.9), jax.random.key(0), jnp.ones((1, side, side, 3), dtype)
    )
    x = jax.random.normal(jax.random.key(1), (batch, side, side, 3)).astype(dtype)
    step = functools.partial(training.train_step, objective=training.cross_entropy)
    return step, (state, x, jnp.arange(batch) % 1000)


def compilation(contestant: str, options: Any) -> dict[str, float]:
    """Measures the seconds of tracing, lowering and compiling, and the bytes of the step's temporary arrays."""
    import jax

    step, arguments = program(contestant, options.batch, options.side, options.dtype)
    jax.clear_caches()
    moments = [time.perf_counter()]
    traced = jax.jit(step).trace(*arguments)
    moments.append(time.perf_counter())
    lowered = traced.lower()
    moments.append(time.perf_counter())
    compiled = lowered.compile()
    moments.append(time.perf_counter())
    seconds = dict(zip(("trace", "lower", "compile"), np.diff(moments), strict=True))
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {**seconds, "temporary": memory.temp_size_in_bytes, "accessed": cost["bytes accessed"]}


def steps(options: Any) -> dict[str, list[float]]:
    """Measures the seconds of one step of each contestant, in turns."""
    import jax

    calls = {}
    for contestant in CONTESTANTS:
        step, arguments = program(contestant, options.batch, options.side, options.dtype)
        compiled = jax.jit(step).lower(*arguments).compile()

        def call(compiled=compiled, arguments=arguments):
            jax.block_until_ready(compiled(*arguments))

        calls[contestant] = call
    return take_turns(calls, options.rounds)


def exactness() -> dict[str, float]:
    """Returns the largest error of a variance, of itself, by mean over deviation and by the way to sum."""
    import jax
    import jax.numpy as jnp

    from bnjax import _exact, _sampled

    found = {}
    for ratio in (0, 1, 10, 100, 1000, 100_000):
        x = jnp.asarray(np.random.default_rng(0).normal(ratio, 1, (64, 56, 56, 64)), jnp.bfloat16)
        exact = np.asarray(x, np.float64).reshape(-1, 64).var(0)
        for name, way in (("exact sums", _exact.exact_moments), ("about a sample", _sampled.sampled_moments)):
            var = jax.jit(lambda x, way=way: way(x, None, (3,)).var)(x)
            error = np.abs(np.asarray(var, np.float64) - exact) / np.maximum(exact, 1e-300)
            found[f"{name}, mean {ratio} deviations"] = float(error.max())
    return found


def main() -> None:
    """Prints the table; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images (default %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="height and width of an image (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the network (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each contestant (default %(default)s)")
    parser.add_argument("--compilations", type=int, default=3, help="of each contestant (default %(default)s)")
    parser.add_argument("--no-steps", action="store_true", help="compile only")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    import tables

    from bnjax.studies.evidence.results import markdown_table

    errors = exactness()
    print(markdown_table(["variance of bfloat16", "largest error"], [[n, f"{e:.1e}"] for n, e in errors.items()]))
    compilations: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for turn in range(options.compilations):
        for name in CONTESTANTS[turn % 4 :] + CONTESTANTS[: turn % 4]:
            compilations[name].append(compilation(name, options))
    seconds = {} if options.no_steps else steps(options)
    result = {"device": device(), "options": vars(options), "errors": errors}
    result |= {"compilations": compilations, "seconds": seconds}
    print(f"\n{tables.resnet(result)}", flush=True)
    save(options.json, result)


if __name__ == "__main__":
    main()
