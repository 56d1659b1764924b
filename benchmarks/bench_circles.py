"""The study of two circles, whole commands, cold: bnjax with 32 seeds a variant against Keras with one.

Needs the extra `bench`. Runs both in alternating processes, imports and compilation included, and prints the ratio of
the median times with their spread; `--json FILE` saves them.

    python benchmarks/bench_circles.py --repeats 3 --backend jax
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

KERAS_PROGRAM = """
import keras
from keras import layers
from sklearn.datasets import make_circles

x, y = make_circles(n_samples=1000, noise=0.1, random_state=1)
variants = [("none", {}), ("after", {}), ("before", {}), ("after", {"scale": False, "center": False}),
            ("after", {"momentum": 0.0}), ("input", {})]
for place, arguments in variants:
    norm = lambda at: [layers.BatchNormalization(**arguments)] if place == at else []
    hidden = layers.Dense(50, kernel_initializer="he_uniform")
    parts = [*norm("input"), hidden, *norm("before"), layers.Activation("relu"), *norm("after")]
    model = keras.Sequential([keras.Input((2,)), *parts, layers.Dense(1, activation="sigmoid")])
    optimizer = keras.optimizers.SGD(learning_rate=0.01, momentum=0.9)
    model.compile(loss="binary_crossentropy", optimizer=optimizer, metrics=["accuracy"])
    model.fit(x[:500], y[:500], validation_data=(x[500:], y[500:]), epochs=100, batch_size=32, verbose=0)
"""


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", choices=("jax", "torch"), default="jax", help="Keras's backend")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"bnjax": [], "keras": []}
    with tempfile.TemporaryDirectory() as out:
        ours = [sys.executable, "-m", "bnjax", "run", "circles", "--seeds", "32", "--quiet", "--out", out]
        for _ in range(options.repeats):
            times["bnjax"].append(seconds(ours, {}))
            times["keras"].append(seconds([sys.executable, "-c", KERAS_PROGRAM], {"KERAS_BACKEND": options.backend}))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["bnjax"] / median["keras"]
    ratios = [a / b for a, b in zip(times["bnjax"], times["keras"], strict=True)]
    print(f"bnjax (192 trainings) / keras on {options.backend} (6 trainings), whole command, cold: {ratio:.2f}")
    print(
        f"ratios of the {options.repeats} pairs: {min(ratios):.2f} to {max(ratios):.2f}; per training {ratio / 32:.4f}"
    )
    if options.json:
        packages = {name: version(name) for name in ("bnjax", "jax", "keras", "flax")}
        report = {"seconds": times, "ratio": ratio, "backend": options.backend, "versions": packages}
        with open(options.json, "w") as file:
            json.dump({**report, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}, file, indent=1)


if __name__ == "__main__":
    main()
