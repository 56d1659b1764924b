"""A benchmark of whole networks' training steps: bnjax's batch norm, Flax's, none, Flax's own layers, and PyTorch.

The networks are that of the CIFAR-100 study (80 images, RMSprop, dropout) and ResNet-18 for small images (32 images,
SGD with momentum), float32. The first three contestants differ in nothing but the batch norm; "flax throughout" takes
its convolution and its max-pool too. Beside them "the passes" sums and copies arrays of the sizes of the batch norms'
inputs, as often as batch norm must read and write them in a step: the least that it can cost.

    pip install -e ".[bench]" && python benchmarks/bench_training.py [--keep-memory] [--json training.json]
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
from common import device, save, take_turns, torch_place

SIDE = 32
NETWORKS = ("cifar", "resnet18")
BATCH = {"cifar": 80, "resnet18": 32}
CLASSES = {"cifar": 100, "resnet18": 10}


def examples(network: str) -> tuple[np.ndarray, np.ndarray]:
    """Makes images and labels of a batch."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH[network], SIDE, SIDE, 3)).astype(np.float32)
    return images, np.arange(BATCH[network], dtype=np.int32) % CLASSES[network]


def of_jax(
    network: str, norm: Any, is_flax_throughout: bool = False
) -> tuple[Callable[[], Any], list[tuple[int, ...]]]:
    """Returns a call that takes one step of `bnjax.training`, and the shapes of the batch norms' inputs."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from bnjax import models, training
    from bnjax.models import networks
    from bnjax.training import make_mesh

    options: dict[str, Any] = {"num_classes": CLASSES[network], "norm": norm}
    if network == "cifar":
        model, optimizer = models.CifarNetwork(**options), optax.rmsprop(1e-3, decay=0.9)
    else:
        model, optimizer = models.resnet18(**options, stem="cifar"), optax.sgd(0.1, momentum=0.9)
    x, y = (jax.device_put(v) for v in examples(network))
    key = jax.random.key(0) if network == "cifar" else None
    shapes: list[tuple[int, ...]] = []

    def note(next_call, args, kwargs, context):
        if norm is not None and type(context.module).__name__ == "BatchNorm" and context.method_name == "__call__":
            shapes.append(jnp.shape(args[0]))
        return next_call(*args, **kwargs)

    step = training.make_train_step(training.cross_entropy, make_mesh(devices=jax.devices()[:1]))
    conv, max_pool = (nn.Conv, flax_max_pool) if is_flax_throughout else (networks.Conv, networks.max_pool)
    with mock.patch.multiple(networks, Conv=conv, max_pool=max_pool), nn.intercept_methods(note):
        state = training.create_train_state(model, optimizer, jax.random.key(0), x[:1])
        shapes.clear()
        state, _ = step(state, x, y, key=key)
    held = [state]

    def call():
        held[0], metrics = step(held[0], x, y, key=key)
        return float(metrics.loss)

    return call, shapes


def flax_max_pool(x: Any, window: int, strides: int, padding: Any = "VALID") -> Any:
    """Calls Flax's max-pool with the arguments of bnjax's."""
    from flax import linen as nn

    return nn.max_pool(x, (window, window), (strides, strides), padding)


def of_torch(network: str, channels_last: bool) -> Callable[[], Any]:
    """Returns a call that takes one step of the same network in PyTorch."""
    import torch

    torch.manual_seed(0)
    model = torch_cifar(torch) if network == "cifar" else torch_resnet18(torch)
    if network == "cifar":
        optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, alpha=0.9)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    place, _ = torch_place()  # reading the loss waits for the device
    model = model.to(place, memory_format=layout)
    x, y = examples(network)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(place).contiguous(memory_format=layout)
    y = torch.from_numpy(y).long().to(place)

    def call():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return call


def torch_cifar(torch: Any) -> Any:
    """Makes `bnjax.models.CifarNetwork` in PyTorch."""
    nn, layers, channels = torch.nn, [], 3
    for block in range(5):
        for _ in range(2):
            features = 100 if block == 4 else 60
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features, 1e-3, 0.01), nn.ReLU()]
            channels = features
        if block < 4:
            layers += [nn.MaxPool2d(2), nn.Dropout(0.15)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100 * (SIDE // 16) ** 2, CLASSES["cifar"]))


def torch_resnet18(torch: Any) -> Any:
    """Makes `bnjax.models.resnet18` with the stem for small images in PyTorch."""
    nn = torch.nn

    def conv(inputs, features, size, stride=1):
        layer = nn.Conv2d(inputs, features, size, stride, size // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(features, 1e-5, 0.01))

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            self.body = nn.Sequential(conv(inputs, features, 3, stride), nn.ReLU(), conv(features, features, 3))
            self.shortcut = nn.Identity() if inputs == features else conv(inputs, features, 1, stride)

        def forward(self, x):
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    blocks, inputs = [], 64
    for stage in range(4):
        for index in range(2):
            features = 64 * 2**stage
            blocks.append(Block(inputs, features, 2 if stage and not index else 1))
            inputs = features
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES["resnet18"])]
    return nn.Sequential(conv(3, 64, 3), nn.ReLU(), *blocks, *head)


def of_passes(shapes: list[tuple[int, ...]]) -> Callable[[], Any]:
    """Returns a call that, for every shape, sums an array four times and copies it twice."""
    import jax

    arrays = {shape: jax.random.normal(jax.random.key(0), shape) for shape in set(shapes)}
    total, twice = jax.jit(lambda x: x.sum(tuple(range(x.ndim - 1)))), jax.jit(lambda x: x * 2)
    compiled = {s: (total.lower(x).compile(), twice.lower(x).compile()) for s, x in arrays.items()}

    def call():
        for shape in shapes:
            add, copy = compiled[shape]
            for f in (add, copy, add, add, add, copy):
                jax.block_until_ready(f(arrays[shape]))

    return call


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Returns the ratios of bnjax's time to others', round by round, and to no batch norm's with the passes."""
    both = [a + b for a, b in zip(seconds["no norm"], seconds["the passes"], strict=True)]
    others = {name: times for name, times in seconds.items() if name not in ("bnjax", "the passes")}
    others["no norm + the passes"] = both
    return {name: [a / b for a, b in zip(seconds["bnjax"], times, strict=True)] for name, times in others.items()}


def measure(network: str, rounds: int) -> dict[str, Any]:
    """Measures the times of all contestants."""
    from flax import linen as nn

    from bnjax import linen

    epsilon = 1e-3 if network == "cifar" else 1e-5
    ours = functools.partial(linen.BatchNorm, epsilon=epsilon)
    flax = functools.partial(nn.BatchNorm, epsilon=epsilon)
    calls: dict[str, Callable[[], Any]] = {}
    calls["bnjax"], shapes = of_jax(network, ours)
    calls["flax batch norm"], _ = of_jax(network, flax)
    calls["no norm"], _ = of_jax(network, None)
    calls["flax throughout"], _ = of_jax(network, flax, is_flax_throughout=True)
    calls["torch"] = of_torch(network, False)
    calls["torch, channels last"] = of_torch(network, True)
    calls["the passes"] = of_passes(shapes)
    seconds = take_turns(calls, rounds)
    about = {"network": network, "batch": BATCH[network], "norms": len(shapes)}
    return {**about, "seconds": seconds, "ratios": ratios(seconds)}


def main() -> None:
    """Prints the table; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="networks (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each contestant (default %(default)s)")
    parser.add_argument("--keep-memory", action="store_true", help="see bnjax.training.host.keep_freed_memory")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's threads must not keep the others' processors busy
    if options.keep_memory:
        from bnjax.training.host import keep_freed_memory

        keep_freed_memory()
    import tables

    measured = []
    for network in options.networks.split(","):
        result = measure(network, options.rounds)
        measured.append(result)
        print(f"\n{tables.training({'measured': [result]})}", flush=True)
    save(options.json, {"device": device(), "keeps memory": options.keep_memory, "measured": measured})


if __name__ == "__main__":
    main()
