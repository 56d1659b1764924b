"""A benchmark of the studies of circles, MNIST and blobs, per training, against programs in Keras.

The programs in Keras train the same networks. Cold is a whole command, imports and compilation included; with a cache,
it is a command whose compiled programs JAX kept from an earlier one (JAX_COMPILATION_CACHE_DIR); warm is the training
alone of the networks that Keras trains, in a process that has trained them before. Contestants are processes of their
own that take turns. Keras trains each network once, on JAX and on PyTorch; bnjax's command trains all its variants
(other normalizers among them) from many seeds: times are divided by the number of trainings.

    pip install -e ".[bench]"
    python benchmarks/bench_studies.py [--studies circles,mnist,blobs] [--data-dir DIR] [--json studies.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import device, save

CHOICES: dict[str, dict[str, Any]] = {
    "circles": {"seeds": 32},
    "mnist": {"seeds": 8, "batch_sizes": [32]},
    "blobs": {"seeds": 32},
}
NETWORKS = {  # the variants that Keras trains too
    "circles": ("none", "after", "before", "no_scale_bias", "no_momentum", "input"),
    "mnist": ("none_32", "before_32"),
    "blobs": ("shallow_before", "deep_none", "deep_before"),
}
BACKENDS = ("jax", "torch")

# This program prints when it has trained once, how long a second training took, and the number of networks.
KERAS = """
import sys, time, numpy as np, keras
from keras import layers
norm = layers.BatchNormalization

def perceptron(inputs, hidden, place, outputs, initializer="glorot_uniform", use_bias=True, **options):
    def normalizer(at):
        return [norm(**options)] if place == at else []
    parts = [keras.Input((inputs,)), *normalizer("input")]
    for size in hidden:
        parts += [layers.Dense(size, kernel_initializer=initializer, use_bias=use_bias), *normalizer("before"),
                  layers.Activation("relu"), *normalizer("after")]
    end = layers.Dense(1, activation="sigmoid") if outputs == 1 else layers.Dense(outputs, activation="softmax")
    return keras.Sequential([*parts, end])

def circles():
    from sklearn.datasets import make_circles
    x, y = make_circles(n_samples=1000, noise=0.1, random_state=1)
    variants = [("none", {}), ("after", {}), ("before", {}), ("after", {"scale": False, "center": False}),
                ("after", {"momentum": 0.0}), ("input", {})]
    for place, options in variants:
        model = perceptron(2, [50], place, 1, "he_uniform", **options)
        optimizer = keras.optimizers.SGD(learning_rate=0.01, momentum=0.9)
        model.compile(loss="binary_crossentropy", optimizer=optimizer, metrics=["accuracy"])
        yield model, x[:500], y[:500], dict(validation_data=(x[500:], y[500:]), epochs=100, batch_size=32)

def mnist():
    with np.load(sys.argv[2]) as arrays:
        x, y = arrays["x"].reshape(-1, 784).astype("float32") / 255, arrays["y"]
    for place in ("none", "before"):
        model = perceptron(784, [64, 64], place, 10)
        model.compile(loss="sparse_categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
        yield model, x, y, dict(validation_split=0.2, epochs=10, batch_size=32)

def blobs():
    from sklearn.datasets import make_blobs
    x, y = make_blobs(1000, centers=[(0, 0), (0.5, 0.1)], cluster_std=0.25, random_state=0)
    for place, hidden, epochs in (("before", 1, 50), ("none", 11, 100), ("before", 11, 100)):
        model = perceptron(2, [128] * hidden, place, 1, use_bias=False)
        optimizer = keras.optimizers.Adam(learning_rate=0.01)
        model.compile(loss="binary_crossentropy", optimizer=optimizer, metrics=["accuracy"])
        yield model, x[:750], y[:750], dict(validation_data=(x[750:], y[750:]), epochs=epochs, batch_size=300)

models = []
for model, x, y, options in globals()[sys.argv[1]]():
    model.fit(x, y, verbose=0, **options)
    models.append((model, x, y, options))
print(time.time())
start = time.perf_counter()
for model, x, y, options in models:
    model.fit(x, y, verbose=0, **options)
print(time.perf_counter() - start, len(models))
"""

# This program prints the time of a second training of Keras's networks, their number, and that of all trainings.
OURS = """
import importlib, json, sys, time
from unittest import mock
from bnjax.studies.engine import training

class Silent:
    def task(self, plan):
        return lambda done, means: None
    def reading(self, text, fraction):
        pass

def twice(jobs, *arguments):
    of_keras = [job for job in jobs if job.plan.name in sys.argv[3].split(",")]
    training.train_all(of_keras, *arguments)
    start = time.perf_counter()
    training.train_all(of_keras, *arguments)
    seeds = arguments[-1].seeds
    print(time.perf_counter() - start, len(of_keras) * seeds, len(jobs) * seeds)
    sys.exit()

study = importlib.import_module("bnjax.studies." + sys.argv[1])
with mock.patch.object(study, "train_all", twice):
    study.run(study.Options(**json.loads(sys.argv[2])), Silent())
"""


def run(command: list[str], **environment: str) -> tuple[float, list[str]]:
    """Runs a command that must succeed; returns when it was started, and the words that it printed."""
    start = time.time()
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    return start, done.stdout.split()


def cold(study: str, **environment: str) -> float:
    """Measures the seconds of bnjax's command."""
    arguments = []
    for name, value in CHOICES[study].items():
        arguments += [
            f"--{name.replace('_', '-')}",
            ",".join(map(str, value)) if isinstance(value, list) else str(value),
        ]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bnjax", "run", study, *arguments, "--quiet", "--out", out]
        start, _ = run(command, **environment)
        return time.time() - start


def warm(study: str) -> tuple[float, int, int]:
    """Measures bnjax's second training of Keras's networks: its seconds, its trainings, and those of the command."""
    command = [sys.executable, "-c", OURS, study, json.dumps(CHOICES[study]), ",".join(NETWORKS[study])]
    _, (seconds, count, all_of_them) = run(command)
    return float(seconds), int(count), int(all_of_them)


def keras(study: str, backend: str, data: str) -> tuple[float, float, int]:
    """Measures Keras: seconds of a process that trains each network once, of a second training, and their number."""
    start, (first, second, count) = run([sys.executable, "-c", KERAS, study, data], KERAS_BACKEND=backend)
    return float(first) - start, float(second), int(count)


def measure(study: str, repeats: int, backends: list[str], scratch: Path) -> dict[str, Any]:
    """Measures seconds per training of all contestants in turns, cold, warm, and for circles with a cache."""
    data = str(scratch / "mnist.npz")
    if study == "mnist" and not Path(data).exists():
        import numpy as np

        from bnjax.studies.data import images

        split = images("mnist", CHOICES[study].get("data_dir"), lambda text, fraction: None).train
        np.savez(data, x=split.x, y=split.y)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if study == "circles":
        cold(study, **cache)  # fills the cache
    per_training: dict[str, dict[str, list[float]]] = {}

    def note(contestant: str, kind: str, seconds: float, trainings: int) -> None:
        per_training.setdefault(contestant, {}).setdefault(kind, []).append(seconds / trainings)

    trainings = 0
    for _ in range(repeats):
        seconds, count, trainings = warm(study)
        note("bnjax", "warm", seconds, count)
        note("bnjax", "cold", cold(study), trainings)
        if study == "circles":
            note("bnjax", "cached", cold(study, **cache), trainings)
        for backend in backends:
            first, second, networks = keras(study, backend, data)
            note(f"keras, {backend}", "cold", first, networks)
            note(f"keras, {backend}", "warm", second, networks)
    choices = {name: value for name, value in CHOICES[study].items() if name != "data_dir"}
    by_backend = {backend: ratios(per_training, backend) for backend in backends}
    return {"study": study, "choices": choices, "trainings": trainings, "seconds": per_training, "ratios": by_backend}


def ratios(seconds: dict[str, dict[str, list[float]]], backend: str) -> dict[str, list[float]]:
    """Returns the ratios of Keras's time for a training to bnjax's, turn by turn."""
    ours, theirs = seconds["bnjax"], seconds[f"keras, {backend}"]
    pairs = {"cold": ("cold", "cold"), "cached": ("cached", "cold"), "warm": ("warm", "warm")}
    return {
        name: [b / a for a, b in zip(ours[i], theirs[k], strict=True)] for name, (i, k) in pairs.items() if i in ours
    }


def main() -> None:
    """Prints the table; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", default=",".join(CHOICES), help="studies (default %(default)s)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="backends of Keras (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default %(default)s)")
    parser.add_argument("--data-dir", metavar="DIR", help="where MNIST is, as for bnjax's command")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    if options.data_dir:
        CHOICES["mnist"]["data_dir"] = options.data_dir
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import tables

    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        for study in options.studies.split(","):
            measured.append(measure(study, options.repeats, options.backends.split(","), Path(scratch)))
            print(tables.studies(measured[-1:]), flush=True)
    print("\nhow many times less time bnjax takes for a training\n")
    print(tables.studies(measured))
    save(options.json, {"device": device(), "measured": measured})


if __name__ == "__main__":
    main()
