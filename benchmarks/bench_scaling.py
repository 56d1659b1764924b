"""A benchmark of synchronized batch norm over 1 to 16 devices: step time, collectives and bytes, and a prediction.

The devices are simulated on CPU and share the processor's cores: the benchmark does not show how training scales, but
what a step costs beside the same step with `flax.linen.BatchNorm`, both interleaved in one run. Collectives and bytes
are read from the compiled programs, and stand beside the formula:

    bytes that a device sends in a step = 2 (n − 1) / n · 4 · (P + Σ over batch norms (2C n + 2C))

for n devices, P parameters (and the loss, the accuracy and the weight) and C features a batch norm: an all-reduce of 2C
numbers of each device forward (of more than 256 devices two of C), of 2C backward, by the ring algorithm. Flax's layer
sums 2C forward. PyTorch's SyncBatchNorm gathers 2C + 1 numbers forward, of which a device sends (n − 1) (2C + 1), and
reduces 2C backward (torch/nn/modules/_functions.py). The prediction for a pod is:

    time = max(latency · hops, bytes / bandwidth)        for each of the collectives, which wait for one another

    python benchmarks/bench_scaling.py --devices 1,2,4,8,16 --json scaling.json
"""

import argparse
import functools
import json
import platform
import statistics
from typing import Any

import jax
from common import take_turns

NORMS = ("bnjax", "flax")
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and blocks of ResNet-50's stages
RESNET50 = [64, *(c for width, blocks in STAGES for c in [width, width, 4 * width] * blocks + [4 * width])]


def sent_by_formula(features: list[int], parameters: int, devices: int) -> float:
    """Computes the bytes that each device sends in a step, by bnjax's synchronization."""
    ours = sum(sum(forward(c, devices)) + 2 * c for c in features)
    return 2 * (devices - 1) / devices * 4 * (parameters + 3 + ours)


def forward(features: int, devices: int) -> list[int]:
    """Returns how many numbers each of a batch norm's forward sums has."""
    return [2 * features * devices] if devices <= 256 else [features, features]


def network(norm: str, depth: int, width: int):
    """Makes a perceptron with `depth` synchronized batch norms of `width` features."""
    from flax import linen as nn

    from bnjax.linen import BatchNorm
    from bnjax.models import Perceptron

    layer = {"bnjax": BatchNorm, "flax": nn.BatchNorm}[norm]
    return Perceptron(
        (width,) * depth, 10, functools.partial(layer, axis_name="batch"), "before", use_hidden_bias=False
    )


def measure(devices: int, depth: int, width: int, way: str, batch: int, repeats: int) -> dict:
    """Times one network with both layers in turns, and reads their collectives from the compiled steps."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bnjax import training
    from bnjax.training.ahead_of_time import collectives

    mesh = training.make_mesh(devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, width)).astype(np.float32), rng.integers(0, 10, batch).astype(np.int32)
    data = training.shard_batch(training.Batch(x, y), mesh)
    contestants, states, result = {}, {}, {}
    for norm in NORMS:
        model = network(norm, depth, width)
        state = training.create_train_state(model, optax.sgd(1e-3), jax.random.key(0), jnp.asarray(x[:1]))
        state = training.place_state(state, mesh)
        step = training.make_train_step(training.cross_entropy, mesh, parallel=way)
        compiled = step.compiled.lower(state, data, None).compile()
        operations = collectives(compiled.as_text())
        own = [c for c in operations if c.group_size > 1]
        result[norm] = {"collectives": len(own), "sent": sum(c.sent * c.times for c in own)}
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        states[norm] = state

        def take_step(norm: str = norm, compiled: Any = step.compiled) -> None:
            states[norm], metrics = compiled(states[norm], data, None)
            jax.block_until_ready((states[norm], metrics))

        contestants[norm] = take_step
    for norm, seconds in take_turns(contestants, repeats, warm_up=3).items():
        result[norm]["seconds"] = seconds
    ratios = [a / b for a, b in zip(result["bnjax"]["seconds"], result["flax"]["seconds"], strict=True)]
    result["ratio"] = statistics.median(ratios)
    result["spread"] = tuple(statistics.quantiles(ratios, n=4)[::2])
    result["formula"] = sent_by_formula([width] * depth, parameters, devices)
    return {"devices": devices, "depth": depth, "width": width, "parallel": way, **result}


def predict(features: list[int], devices: int, bandwidth: float, latency: float) -> dict:
    """Predicts the seconds that a step's synchronization of batch norms takes on a pod, apart from the gradients'.

    Args:
      features: number of features of each batch norm.
      devices: n, on a torus of two dimensions up to 256 and of three above.
      bandwidth: bytes a second that a device sends.
      latency: seconds from one device to the next.
    """
    hops = 2 * (round(devices ** (1 / 2)) if devices <= 256 else 3 * round(devices ** (1 / 3)) // 2)
    ring = 2 * (devices - 1) / devices
    sizes = {
        "bnjax": [ring * 4 * numbers for c in features for numbers in (*forward(c, devices), 2 * c)],
        "flax": [ring * 8 * c for c in features for _ in range(2)],
        "torch": [s for c in features for s in ((devices - 1) * 4 * (2 * c + 1), ring * 8 * c)],
    }
    predictions = {}
    for peer, sent in sizes.items():
        waits = [max(latency * hops, size / bandwidth) for size in sent]
        bound = sum(size / bandwidth > latency * hops for size in sent)
        predictions[peer] = {
            "sent": sum(sent),
            "seconds": sum(waits),
            "bandwidth_bound": bound,
            "collectives": len(sent),
        }
    return {"devices": devices, "hops": hops, **predictions}


def print_row(*cells: object) -> None:
    """Prints a row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    """Prints the tables in Markdown; with --json it saves the numbers too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8,16", help="device counts (default 1,2,4,8,16)")
    parser.add_argument("--networks", default="2x64,8x64,8x512,32x64", help="DEPTHxWIDTH (default %(default)s)")
    parser.add_argument("--parallel", default="jit,shard_map", help="how the step is mapped (default %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="examples in a step (default 512)")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each layer (default 30)")
    parser.add_argument("--bandwidth", type=float, default=100e9, help="bytes/s a device sends, for the prediction")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds a hop, for the prediction")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    counts = [int(n) for n in options.devices.split(",")]
    jax.config.update("jax_num_cpu_devices", max(counts))

    head = "batch norms × features", "parallel", "devices", "collectives, bnjax / flax", "KiB sent, bnjax / flax"
    print_row(*head, "formula", "step time, bnjax / flax")
    print_row(*["---"] * 7)
    rows = []
    for shape in options.networks.split(","):
        depth, width = map(int, shape.split("x"))
        for way in options.parallel.split(","):
            for devices in counts:
                row = measure(devices, depth, width, way, options.batch, options.repeats)
                rows.append(row)
                both = [row[norm] for norm in NORMS]
                numbers = " / ".join(str(of["collectives"]) for of in both)
                sent = " / ".join(f"{of['sent'] / 1024:.1f}" for of in both)
                ratio = f"{row['ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"
                print_row(f"{depth} × {width}", way, devices, numbers, sent, f"{row['formula'] / 1024:.1f}", ratio)
    print(f"\n{len(RESNET50)} batch norms of ResNet-50, {options.bandwidth:g} B/s, {options.latency:g} s a hop\n")
    predictions = [predict(RESNET50, n, options.bandwidth, options.latency) for n in (8, 256, 4096)]
    print_row("devices", "hops", "bnjax", "flax", "PyTorch SyncBatchNorm")
    print_row(*["---"] * 5)
    for p in predictions:
        cells = [
            f"{of['sent'] / 1e6:.2f} MB, {of['seconds'] * 1e3:.2f} ms, {of['bandwidth_bound']} of {of['collectives']} "
            "bound by bandwidth"
            for of in (p["bnjax"], p["flax"], p["torch"])
        ]
        print_row(p["devices"], p["hops"], *cells)
    if options.json:
        with open(options.json, "w") as file:
            machine = {"system": platform.machine(), "python": platform.python_version(), "jax": jax.__version__}
            json.dump({"machine": machine, "steps": rows, "predictions": predictions}, file, indent=1)


if __name__ == "__main__":
    main()
