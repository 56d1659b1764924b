"""A benchmark of measurements against the same as PyTorch loops on the same network and batch, in one process.

    pip install -e ".[bench]" && python benchmarks/bench_analysis.py [--networks perceptron,vgg] [--json FILE]

Both networks have batch norm, in the mode 'batch', and a batch of 128: a perceptron 784 – 64 – 64 – 10, and VGG-11 on
32 × 32 images (`--width`, 64 by default). Three questions, each answered by medians of alternating runs:

- probes: eight probes along the gradient (loss, gradient, distance, cosine), against nine calls of the compiled
  gradient, and against PyTorch, in its faster memory format;
- eigenpairs: the 5, 10 and 20 eigenpairs of the Hessian that are largest by magnitude, to relative residuals of 1e-3,
  against SciPy's `eigsh` (ARPACK) to the same, with products by PyTorch, each from a random first vector;
- loop: a training loop that probes every ten steps, against plain training, beside the ratio of their gradients.
"""

import argparse
import functools
import json
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import take_turns
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from bnjax import analysis, training
from bnjax.analysis import losses
from bnjax.linen import BatchNorm
from bnjax.models import VGG, Perceptron

BATCH, PROBES, EIGENPAIRS, EVERY, TOLERANCE = 128, 8, (5, 10, 20), 10, 1e-3
STEPS = tuple(float(step) for step in np.linspace(0.05, 0.4, PROBES))


turns = functools.partial(take_turns, warm_up=1, pause=0.3)


class Pair:
    """A network in both libraries: its loss in JAX with parameters and batch, and the PyTorch module."""

    def __init__(self, name: str, width: int):
        rng = np.random.default_rng(0)
        shape = (784,) if name == "perceptron" else (32, 32, 3)
        self.x, self.y = rng.normal(size=(BATCH, *shape)).astype(np.float32), np.arange(BATCH, dtype=np.int32) % 10
        self.model = (
            Perceptron((64, 64), 10, BatchNorm, "before") if name == "perceptron" else VGG(10, BatchNorm, 11, width)
        )
        variables = self.model.init(jax.random.key(0), jnp.asarray(self.x[:1]), training=False)
        self.params, self.variables = variables["params"], variables
        self.loss = losses.linen_loss(self.model, variables, training.cross_entropy)
        self.batch = jnp.asarray(self.x), jnp.asarray(self.y)
        layers = losses.layers_in_order(self.model, variables, self.x[:1])
        self._order = [path for layer in layers for path in layer]
        self.module = self._torch_module(name, width)
        self._copy()
        images = torch.from_numpy(self.x)
        self.images = images if images.ndim == 2 else images.permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(self.y).long()

    @staticmethod
    def _torch_module(name: str, width: int) -> torch.nn.Module:
        nn, layers = torch.nn, []
        if name == "perceptron":
            for inputs in (784, 64):
                layers += [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(64, 10))
        channels = 3
        for stage, count in enumerate((1, 1, 2, 2, 2)):
            for _ in range(count):
                filters = width * min(2**stage, 8)
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
                channels = filters
            layers.append(nn.MaxPool2d(2))
        dense = 8 * width
        head = [nn.Linear(dense, dense), nn.ReLU(), nn.Linear(dense, dense), nn.ReLU(), nn.Linear(dense, 10)]
        return nn.Sequential(*layers, nn.Flatten(), *head)

    def train(self, steps: int, rate: float) -> None:
        """Trains the network on its batch by gradient descent, in both libraries' copies."""

        def step(params, _):
            return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(self.loss)(params, *self.batch)), None

        self.params = jax.jit(lambda params: jax.lax.scan(step, params, None, steps)[0])(self.params)
        self._copy()

    def _copy(self) -> None:
        """Copies the weights to PyTorch; as images are 1 × 1 after the last pool, flattening needs no permutation."""
        modules = [module for module in self.module if list(module.parameters())]
        with torch.no_grad():
            for name, module in zip(self._order, modules, strict=True):
                ours = {key: np.asarray(value) for key, value in self.params[name].items()}
                weight = ours.get("kernel", ours.get("scale"))
                axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[weight.ndim]
                module.weight.copy_(torch.from_numpy(weight.transpose(axes).copy()))
                module.bias.copy_(torch.from_numpy(ours["bias"].copy()))

    def torch_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Computes the mean cross-entropy of the batch, in training mode."""
        return torch.nn.functional.cross_entropy(self.module(images), self.labels)


def torch_probe(pair: Pair, images: torch.Tensor) -> list[tuple[float, float, float]]:
    """Returns loss, gradient distance and cosine at each step size, by PyTorch."""
    parameters = list(pair.module.parameters())
    start = [p.detach().clone() for p in parameters]
    gradient = torch.autograd.grad(pair.torch_loss(images), parameters)
    size = torch.sqrt(sum((g * g).sum() for g in gradient))
    measurements = []
    for step in STEPS:
        with torch.no_grad():
            for p, w, g in zip(parameters, start, gradient, strict=True):
                torch.sub(w, g, alpha=step, out=p)
        loss = pair.torch_loss(images)
        there = torch.autograd.grad(loss, parameters)
        distance = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(there, gradient, strict=True)))
        product = sum((a * b).sum() for a, b in zip(there, gradient, strict=True))
        norm = torch.sqrt(sum((a * a).sum() for a in there))
        measurements.append((loss.item(), distance.item(), (product / norm / size).item()))
    with torch.no_grad():
        for p, w in zip(parameters, start, strict=True):
            p.copy_(w)
    return measurements


def probes(pair: Pair, repeats: int) -> dict[str, Any]:
    """Compares eight probes by bnjax with nine gradients by JAX and with PyTorch's loop."""
    steps = jnp.array(STEPS)
    gradient = jax.jit(jax.value_and_grad(pair.loss))

    def of(size: int | None) -> Callable[[], Any]:
        probe = jax.jit(functools.partial(analysis.gradient_probe, pair.loss, batch_size=size))
        return lambda: jax.block_until_ready(probe(pair.params, steps, *pair.batch))

    def nine_gradients():
        for _ in range(PROBES + 1):
            jax.block_until_ready(gradient(pair.params, *pair.batch))

    contestants: dict[str, Callable[[], Any]] = {
        "ours, one after the other": of(None),
        "ours, all at once": of(PROBES),
        "ours, nine gradients": nine_gradients,
        "torch": lambda: torch_probe(pair, pair.images),
    }
    if pair.images.ndim == 4:
        del contestants["ours, all at once"]  # it takes several gigabytes at the full width
        last = pair.images.contiguous(memory_format=torch.channels_last)
        contestants["torch, channels last"] = lambda: torch_probe(pair, last)
    ours, theirs = of(None)(), torch_probe(pair, pair.images)
    agreement = max(
        float(np.abs(np.asarray(values) / np.array(theirs)[:, i] - 1).max())
        for i, values in enumerate((ours.loss, ours.gradient_distance, ours.gradient_cosine))
    )
    times = turns(contestants, repeats)
    best = min(statistics.median(v) for name, v in times.items() if name.startswith("torch"))
    mine = min(statistics.median(times[name]) for name in times if name in list(contestants)[:2] and "nine" not in name)
    nine = statistics.median(times["ours, nine gradients"])
    return {
        "seconds": times,
        "largest_relative_difference": agreement,
        "ours_to_nine_gradients": statistics.median(times["ours, one after the other"]) / nine,
        "ours_to_torch": mine / best,
    }


def arpack(pair: Pair, images: torch.Tensor, count: int, start: np.ndarray) -> tuple[np.ndarray, int]:
    """Computes the largest eigenvalues by magnitude by ARPACK, with PyTorch's products; returns them and how many."""
    parameters, products = list(pair.module.parameters()), 0
    gradient = torch.autograd.grad(pair.torch_loss(images), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        vector = torch.from_numpy(np.ascontiguousarray(v.ravel(), np.float32))
        parts = torch.autograd.grad(flat, parameters, grad_outputs=vector, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in parts]).numpy()

    operator = LinearOperator((len(start), len(start)), product, dtype=np.float32)
    values, _ = eigsh(operator, count, which="LM", tol=TOLERANCE, v0=start)
    return values, products


def eigenpairs(pair: Pair, repeats: int, count: int) -> dict[str, Any]:
    """Compares the computation of the largest eigenvalues by magnitude."""
    flat, unravel = ravel_pytree(pair.params)
    start = np.random.default_rng(0).normal(size=flat.size).astype(np.float32)
    options: dict[str, Any] = {"key": jax.random.key(0), "which": "magnitude", "tolerance": TOLERANCE}

    @jax.jit
    def run(params, start, *batch):
        return analysis.hessian_eigenpairs(pair.loss, params, count, *batch, start=start, **options)

    first = jax.tree.map(lambda v: v[None], unravel(jnp.asarray(start)))
    last = pair.images if pair.images.ndim == 2 else pair.images.contiguous(memory_format=torch.channels_last)
    found: dict[str, Any] = {}

    def run_ours():
        found["ours"] = jax.block_until_ready(run(pair.params, first, *pair.batch))

    def run_torch():
        found["torch"] = arpack(pair, last, count, start)

    times = turns({"ours": run_ours, "torch": run_torch}, repeats)
    ours, (values, products) = found["ours"], found["torch"]
    difference = np.abs(np.sort(np.asarray(ours.values)) / np.sort(values) - 1).max()
    return {
        "seconds": times,
        "torch_to_ours": statistics.median(times["torch"]) / statistics.median(times["ours"]),
        "products": {"ours": int(ours.products), "torch": products},
        "largest_relative_residual": float((np.asarray(ours.residuals) / np.abs(ours.values)).max()),
        "largest_relative_difference": float(difference),
    }


def loop(pair: Pair, repeats: int) -> dict[str, Any]:
    """Compares ten training steps with and without a probe before the first."""

    def step(params, _):
        value, gradient = jax.value_and_grad(pair.loss)(params, *pair.batch)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), value

    def measure(params, _):
        return analysis.gradient_probe(pair.loss, params, jnp.array(STEPS), *pair.batch)

    count = jnp.arange(EVERY)
    with_ = jax.jit(lambda p: analysis.measured_scan(step, p, count, measure=measure, every=EVERY))
    without = jax.jit(lambda p: jax.lax.scan(step, p, count))
    runs = {"measured": with_, "plain": without}
    times = turns(
        {name: lambda run=run: jax.block_until_ready(run(pair.params)) for name, run in runs.items()}, repeats
    )
    return {
        "seconds": times,
        "measured_to_plain": statistics.median(times["measured"]) / statistics.median(times["plain"]),
        "gradients": (EVERY + PROBES + 1) / EVERY,
    }


def main() -> None:
    """Runs the comparisons, prints medians and ratios, and saves all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="perceptron,vgg", help="networks (default perceptron,vgg)")
    parser.add_argument("--questions", default="probes,eigenpairs,loop", help="questions (default %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="width of VGG (default 64)")
    parser.add_argument(
        "--eigen-width", type=int, default=8, help="width of VGG for the eigenpairs (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs (default 5)")
    parser.add_argument(
        "--eigen-repeats", type=int, default=2, help="runs for the eigenpairs of VGG (default %(default)s)"
    )
    parser.add_argument("--json", help="where to save all times")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {threads} cores",
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "width": options.width,
        "eigen_width": options.eigen_width,
    }
    questions: dict[str, Callable[..., dict[str, Any]]] = {"probes": probes, "loop": loop}
    of_eigenpairs = {f"{count} eigenpairs": functools.partial(eigenpairs, count=count) for count in EIGENPAIRS}
    for network in options.networks.split(","):
        asked = [q for q in options.questions.split(",") if q != "eigenpairs"]
        asked += list(of_eigenpairs) if "eigenpairs" in options.questions else []
        for question in asked:
            eigen = question in of_eigenpairs
            repeats = options.eigen_repeats if eigen and network == "vgg" else options.repeats
            pair = Pair(network, options.eigen_width if eigen else options.width)
            result = (questions | of_eigenpairs)[question](pair, repeats)
            results[f"{network}, {question}"] = result
            print(f"{network}, {question}")
            for name, value in result.items():
                if name == "seconds":
                    for contestant, times in value.items():
                        spread = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
                        print(f"  {contestant:28} {statistics.median(times) * 1e3:10.1f} ms ({spread})")
                else:
                    print(
                        f"  {name.replace('_', ' '):28} {value if isinstance(value, dict) else format(value, '10.3g')}"
                    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
