"""A benchmark of `bnjax.models.layers.conv2d` in the training steps of the convolutional studies on CPU.

The networks of the studies `cifar`, `smoothness` and `accelerating`, at the sizes that these have on a CPU, are trained
with batch norm on random images: with XLA's convolution, with matrix products of windows alone, and as published, with
Winograd's products where channels suffice. A call trains a few steps inside `lax.scan`, as the studies do.

    pip install -e ".[bench]" && python benchmarks/bench_convolution.py [--rounds 3] [--json convolution.json]
"""

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import tables
from common import device, save, take_turns

STEPS = 2
NETWORKS = ("cifar", "smoothness", "accelerating")


def training_of(network: str, way: str) -> Callable[[], Any]:
    """Returns a call that trains a network of a study for some steps, with a way to convolve."""
    import jax
    import optax
    from jax import lax

    from bnjax import models, training
    from bnjax.linen import BatchNorm
    from bnjax.models import layers

    norm = functools.partial(BatchNorm, epsilon=1e-3)
    model, optimizer, batch_size = {
        "cifar": (models.CifarNetwork(100, norm, filters=16, last_filters=27), optax.rmsprop(1e-3, decay=0.9), 80),
        "smoothness": (models.VGG(10, norm, width=16), optax.sgd(0.1), 128),
        "accelerating": (models.VGG(10, norm, width=8, local_response_norm=True), optax.sgd(0.1), 128),
    }[network]
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32))
    y = jax.device_put(np.arange(batch_size, dtype=np.int32) % 10)

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def by_xla(x, kernel, strides, pads):
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ways: dict[str, dict[str, Any]] = {
        "XLA's convolution": {"_conv2d": by_xla},
        "windows": {"_TILED_CHANNELS": 10**9},
        "windows and tiles": {"_TILED_CHANNELS": layers._TILED_CHANNELS},
    }

    @jax.jit
    def train(state):
        def step(state, _):
            return training.train_step(state, x, y, objective=training.cross_entropy)

        return lax.scan(step, state, length=STEPS)

    jax.clear_caches()  # `_conv2d` is compiled by itself, whatever it calls
    with mock.patch.multiple(layers, **ways[way]):
        state = training.create_train_state(model, optimizer, jax.random.key(0), x[:1])
        compiled = train.lower(state).compile()
    return lambda: jax.block_until_ready(compiled(state))


WAYS = ("XLA's convolution", "windows", "windows and tiles")


def main() -> None:
    """Prints the seconds of each way as a multiple of the published way's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which each way has its turn (default 3)")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    ratios: dict[str, dict[str, list[float]]] = {}
    for network in NETWORKS:
        seconds = take_turns({way: training_of(network, way) for way in WAYS}, options.rounds, warm_up=1)
        published = seconds["windows and tiles"]
        ratios[network] = {
            way: [a / b for a, b in zip(values, published, strict=True)] for way, values in seconds.items()
        }
        print(tables.convolution({"ratios": {network: ratios[network]}}), flush=True)
    medians = {n: {way: round(statistics.median(v), 2) for way, v in r.items()} for n, r in ratios.items()}
    save(options.json, {"device": device(), "steps": STEPS, "medians": medians, "ratios": ratios})


if __name__ == "__main__":
    main()
