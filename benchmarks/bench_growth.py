"""A benchmark of how cost grows: times over sizes, and the exponent of a power of the size that fits them.

It times the operation against batch and channels; a training step against layers, devices and seeds, and its
compilation against layers; measurements against the number of probes and of eigenpairs, of parameters and of devices.
The sizes of one question take turns. The exponent is fitted by least squares to the logarithms, of all sizes and of the
larger half, as the fixed cost of a call flattens the curve at smaller sizes. Freed memory is kept. Devices are
simulated by one processor, and share one batch.

    python benchmarks/bench_growth.py [--questions batch,channels] [--json growth.json]
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import device, save, take_turns
from jax.sharding import NamedSharding

import bnjax
from bnjax import analysis, training
from bnjax.analysis import losses
from bnjax.linen import BatchNorm
from bnjax.models import Perceptron
from bnjax.training.host import keep_freed_memory

Call = Callable[[], Any]


def operation(batch: int, channels: int) -> Call:
    """Returns a call of batch norm on [batch, channels], forward and backward."""
    x = jax.random.normal(jax.random.key(0), (batch, channels))
    params, stats = bnjax.init_batch_norm(channels)

    @jax.jit
    def both(x, params, g):
        y, pullback, stats_ = jax.vjp(
            lambda x, params: bnjax.batch_norm(x, params, stats, training=True), x, params, has_aux=True
        )
        return y, stats_, pullback(g)

    return lambda: jax.block_until_ready(both(x, params, x))


def examples(count: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes inputs and labels of ten classes."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, features)).astype(np.float32), np.arange(count, dtype=np.int32) % 10


def compiled_step(layers: int, devices: int) -> tuple[training.ParallelStep, Any]:
    """Makes a perceptron's training step, synchronized over devices, and its state."""
    name = training.SYNC_AXIS if devices > 1 else None
    model = Perceptron((128,) * layers, 10, functools.partial(BatchNorm, axis_name=name), "before")
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(0), jnp.zeros((1, 128)))
    return training.make_train_step(training.cross_entropy, mesh, parallel="shard_map"), state


def training_step(layers: int = 2, devices: int = 1) -> Call:
    """Returns a call that takes one step of 512 examples."""
    step, state = compiled_step(layers, devices)
    x, y = examples(512, 128)
    held = [state]

    def call():
        held[0], metrics = step(held[0], x, y)
        return float(metrics.loss)

    return call


def compilation(layers: int) -> Call:
    """Returns a call that traces, lowers and compiles a step."""
    x, y = examples(512, 128)

    def call():
        step, state = compiled_step(layers, 1)
        step.compiled.lower(state, training.Batch(x, y), None).compile()

    return call


def seeds(count: int) -> Call:
    """Returns a call that takes a step of the circles' network from several seeds in one program."""
    model = Perceptron((50,), 1, BatchNorm, "after")
    x, y = (np.broadcast_to(v, (count, *v.shape)) for v in examples(32, 2))
    keys = jax.random.split(jax.random.key(0), count)
    create = functools.partial(training.create_train_state, model, optax.sgd(0.01, 0.9))
    states = jax.vmap(lambda key: create(key, jnp.zeros((1, 2))))(keys)
    step = functools.partial(training.train_step, objective=training.binary_cross_entropy)
    steps = jax.jit(jax.vmap(step))
    return lambda: jax.block_until_ready(steps(states, x, y > 4))


def perceptron_loss(width: int, batch: int = 128, devices: int = 1) -> tuple[Callable, Any, tuple]:
    """Makes the loss of a perceptron 784 – width – width – 10 in mode 'batch', its parameters, and a batch."""
    model = Perceptron((width, width), 10, BatchNorm, "before")
    variables = jax.jit(functools.partial(model.init, training=False))(jax.random.key(0), jnp.zeros((1, 784)))
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, jax.P(*mesh.axis_names))
    x, y = (jax.device_put(v, sharding) for v in examples(batch, 784))
    return losses.linen_loss(model, variables, training.cross_entropy), variables["params"], (x, y)


def probes(count: int = 4, width: int = 64, batch: int = 128, devices: int = 1) -> Call:
    """Returns a call that computes loss and gradient at several points along the gradient."""
    loss, params, data = perceptron_loss(width, batch, devices)
    steps = jnp.linspace(0.05, 0.4, count)
    probe = jax.jit(functools.partial(analysis.gradient_probe, loss))
    return lambda: jax.block_until_ready(probe(params, steps, *data))


def eigenpairs(count: int = 2, width: int = 64, num_steps: int | None = None) -> Call:
    """Returns a call that computes the largest eigenpairs of the Hessian."""
    loss, params, data = perceptron_loss(width)
    options: dict[str, Any] = {"key": jax.random.key(0), "num_steps": num_steps, "which": "magnitude"}
    run = jax.jit(lambda p, *b: analysis.hessian_eigenpairs(loss, p, count, *b, **options))
    return lambda: jax.block_until_ready(run(params, *data))


def parameters(width: int) -> int:
    """Returns the number of parameters of the perceptron 784 – width – width – 10."""
    return width * (784 + width + 10 + 6) + 10


WIDTHS = (13, 116, 690, 2780, 9620)  # widths with 1e4, 1e5, 1e6, 1e7 and 1e8 parameters
QUESTIONS: dict[str, tuple[str, str, list[tuple[int, Callable[[], Call]]]]] = {
    "batch": (
        "batch norm, forward + backward, 256 channels",
        "examples",
        [(n, functools.partial(operation, n, 256)) for n in (1024, 4096, 16384, 65536, 262144)],
    ),
    "channels": (
        "batch norm, forward + backward, 4096 examples",
        "channels",
        [(n, functools.partial(operation, 4096, n)) for n in (16, 64, 256, 1024, 4096)],
    ),
    "layers": (
        "a training step of a perceptron",
        "layers",
        [(n, functools.partial(training_step, n)) for n in (1, 2, 4, 8, 16, 32)],
    ),
    "compilation": (
        "compiling it",
        "layers",
        [(n, functools.partial(compilation, n)) for n in (1, 2, 4, 8, 16, 32)],
    ),
    "devices": (
        "a synchronized training step, one batch shared",
        "devices",
        [(n, functools.partial(training_step, 2, n)) for n in (1, 2, 4, 8, 16)],
    ),
    "seeds": (
        "training steps of the circles' network in one program",
        "seeds",
        [(n, functools.partial(seeds, n)) for n in (1, 4, 16, 64, 256, 1024)],
    ),
    "probes": (
        "probing along the gradient",
        "probes",
        [(n, functools.partial(probes, n)) for n in (1, 2, 4, 8, 16, 32)],
    ),
    "eigenpairs": (
        "eigenpairs of the Hessian",
        "eigenpairs",
        [(n, functools.partial(eigenpairs, n)) for n in (1, 2, 4, 8, 16, 32)],
    ),
    "probe parameters": (
        "two probes along the gradient, 32 examples",
        "parameters",
        [(parameters(w), functools.partial(probes, 2, w, 32)) for w in WIDTHS],
    ),
    "eigenpair parameters": (
        "two eigenpairs, eight steps of Lanczos",
        "parameters",
        [(parameters(w), functools.partial(eigenpairs, 2, w, 8)) for w in WIDTHS[:4]],
    ),
    "probe devices": (
        "four probes along the gradient, one batch shared",
        "devices",
        [(n, functools.partial(probes, 4, 64, 512, n)) for n in (1, 2, 4, 8, 16)],
    ),
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Fits the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(question: str, rounds: int) -> dict[str, Any]:
    """Measures times at all sizes of a question, and their exponents."""
    what, of, sizes = QUESTIONS[question]
    calls = {str(size): make() for size, make in sizes}
    start = time.perf_counter()
    seconds = take_turns(calls, 1 if question == "compilation" else rounds, warm_up=1)
    numbers = [size for size, _ in sizes]
    medians = [statistics.median(v) for v in seconds.values()]
    half = len(numbers) // 2
    return {
        "question": question,
        "what": what,
        "of": of,
        "sizes": numbers,
        "seconds": seconds,
        "to the first": [m / medians[0] for m in medians],
        "exponent": exponent(numbers, medians),
        "exponent of the larger": exponent(numbers[half:], medians[half:]),
        "took": time.perf_counter() - start,
    }


def main() -> None:
    """Prints the table; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default=",".join(QUESTIONS), help="questions (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each size (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 16)
    keep_freed_memory()
    import tables

    measured = []
    for question in options.questions.split(","):
        result = measure(question, options.rounds)
        measured.append(result)
        growth = ", ".join(
            f"{size:,}: {r:.2f}" for size, r in zip(result["sizes"], result["to the first"], strict=True)
        )
        print(f"{result['what']}, to the first size: {growth} ({result['took']:.0f} s)", flush=True)
    result = {"device": device(), "measured": measured}
    print(f"\n{tables.growth(result)}")
    save(options.json, result)


if __name__ == "__main__":
    main()
