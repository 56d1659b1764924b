"""Goes on with a study whose run takes longer than a machine is at hand: `python tools/unfinished/go_on.py STUDY …`.

It is `bnjax run STUDY …`, which keeps what the study needs of each finished network as small files in
`tools/unfinished/STUDY/`: metrics and measurements of its training, and what was measured at its end. With these files
the run goes on on another machine. (The checkpoints of `bnjax run --resume` are too large for that.) The files are
pickles: open only those that you made. They are removed with this file as soon as the last study is published.
"""

import argparse
import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bnjax.studies import landscape, smoothness
from bnjax.studies.cli.main import main
from bnjax.studies.engine.plan import Trained, Variant

_LEFT_OUT = {"looked": {}, "state": None, "histograms": {}}  # of a training, as large or of no use afterwards
_OF_SMOOTHNESS = dict.fromkeys(("vgg_none", "vgg_bn"), ("end", "rates"))  # what is measured of which network


class Folder:
    """The files of what is finished, by name."""

    def __init__(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        self._path = path

    def has(self, *names: str) -> bool:
        """Says whether something is kept under each name."""
        return all(self._file(name).exists() for name in names)

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns what is kept under a name, or computes it and keeps it."""
        if not self.has(name):
            part = self._file(name).with_suffix(".part")
            part.write_bytes(pickle.dumps(jax.device_get(compute())))
            part.replace(self._file(name))
        return pickle.loads(self._file(name).read_bytes())

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.pickle"


def keeping(train: Callable[..., Trained], folder: Folder, needed: Callable[[str], tuple[str, ...]]):
    """Returns `train` that does not train a network again of which all is kept that its study needs."""

    def trained(plan, *arguments, **options):
        name = f"{plan.name}-train"
        if folder.has(name, *(f"{plan.name}-{what}" for what in needed(plan.name))):
            return dataclasses.replace(Trained(plan, None, None, {}, None), **folder.get(name, dict))
        found = train(plan, *arguments, **options)
        small = {"metrics": found.metrics, "measurements": found.measurements, "parameters": dict(found.parameters)}
        folder.get(name, lambda: small | _LEFT_OUT)
        return found

    return trained


def keep_results(study: str, folder: Folder) -> None:
    """Puts functions that keep what they return in the place of the study's own."""
    if study == "smoothness":
        end, rates = landscape.at_the_end, Variant.learning_rates
        smoothness.train = keeping(smoothness.train, folder, lambda name: _OF_SMOOTHNESS.get(name, ("end",)))
        landscape.at_the_end = lambda variant, *more: folder.get(f"{variant.name}-end", lambda: end(variant, *more))
        Variant.learning_rates = lambda self, *more, **options: folder.get(
            f"{self.name}-rates", lambda: rates(self, *more, **options)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("smoothness", "cifar"), help="which study; cifar keeps nothing here")
    given, options = parser.parse_known_args()
    keep_results(given.study, Folder(Path(__file__).parent / given.study))
    sys.argv = ["bnjax", "run", given.study, *options]
    sys.exit(main())
