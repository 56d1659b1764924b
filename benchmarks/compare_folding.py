"""Accuracies of networks trained in bfloat16 with folded batch norms and with the plain pairs, from the same seeds.

It trains ResNet-18, of which the projections are folded, and a network of bottlenecks, of which each block's last
convolution is, for CIFAR-10, and says whether the accuracies differ: by the 95 % interval of the paired differences.

    python benchmarks/compare_folding.py --json folding.json
"""

import argparse
import functools
import json
import os
from collections.abc import Callable

from common import device, save


def trainer(build, epochs: int, examples: int, fold, images) -> Callable[[int], float]:
    """Makes a function that trains a network from a seed and returns its accuracy on the test set."""
    import jax
    import jax.numpy as jnp
    import optax

    from bnjax import training
    from bnjax.linen import BatchNorm

    norm = functools.partial(BatchNorm, momentum=0.9, dtype=jnp.bfloat16)
    model = build(10, norm, stem="cifar", width=16, dtype=jnp.bfloat16, fold=fold)
    steps = epochs * (examples // 64)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9, nesterov=True)
    epoch = jax.jit(functools.partial(training.train_epoch, batch_size=64, objective=training.cross_entropy))

    def to_numbers(x):
        return jnp.asarray(x / 255 - 0.5, jnp.bfloat16)

    x, y = to_numbers(images.train.x[:examples]), images.train.y[:examples]
    of_test = to_numbers(images.test.x), images.test.y

    def accuracy(seed: int) -> float:
        key = jax.random.key(seed)
        state = training.create_train_state(model, optimizer, key, jnp.zeros((1, 32, 32, 3), jnp.bfloat16))
        for number in range(epochs):
            state, _ = epoch(state, jax.random.fold_in(key, number), x, y)
        metrics = training.evaluate_in_batches(state, *of_test, objective=training.cross_entropy, batch_size=500)
        return float(metrics.accuracy)

    return accuracy


def main() -> None:
    """Prints accuracies and their differences; with --json it saves them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each network (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the examples (default %(default)s)")
    parser.add_argument("--examples", type=int, default=12800, help="images of the training set (default %(default)s)")
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps CIFAR-10")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    import numpy as np

    from bnjax import models
    from bnjax.studies import data
    from bnjax.studies.evidence.statistics import interval

    def bottlenecks(classes, norm, **others):
        return models.ResNet(classes, norm, (1, 1, 1), bottleneck=True, **others)

    images = data.images("cifar10", options.data_dir)
    settings = {name: getattr(options, name) for name in ("seeds", "epochs", "examples")}
    record = {"device": device(), **settings}
    if options.json and os.path.exists(options.json):
        with open(options.json, encoding="utf-8") as file:
            before = json.load(file)
        record |= before if all(before.get(name) == value for name, value in record.items()) else {}
    for build in (models.resnet18, bottlenecks):
        found = record.setdefault(build.__name__, {"folded": [], "pair": []})
        for way, fold in (("folded", "auto"), ("pair", False)):
            accuracy = trainer(build, options.epochs, options.examples, fold, images)
            for seed in range(len(found[way]), options.seeds):
                found[way].append(accuracy(seed))
                print(f"{build.__name__}, {way}, seed {seed}: {found[way][-1]:.4f}", flush=True)
                save(options.json, record)
        difference = interval(np.subtract(found["folded"], found["pair"]))
        found["difference"] = difference._asdict()
        print(f"{build.__name__}, folded less pair: {difference.text()}", flush=True)
    save(options.json, record)


if __name__ == "__main__":
    main()
