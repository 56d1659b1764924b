"""Helpers of the studies' tests: a report that is not shown, and small image sets."""

import numpy as np

from bnjax.studies import data


class Silent:
    """A report that remembers what it was told, by the plans' labels or names."""

    def __init__(self, by="label"):
        self.by, self.told, self.read = by, {}, []

    def expect(self, count):
        pass

    def task(self, plan):
        return lambda done, means: self.told.setdefault(getattr(plan, self.by), []).append((done, means))

    def reading(self, text, fraction):
        self.read.append((text, fraction))


def images(shape, counts, classes=10, name="small"):
    """Random images of as many examples for training and test, with a bright pixel in the place of their label."""
    rng = np.random.default_rng(0)

    def split(count):
        y = rng.integers(0, classes, count).astype(np.int32)
        x = rng.integers(0, 60, (count, *shape)).astype(np.uint8)
        x[np.arange(count), y % shape[0], y] = 255
        return data.Split(x, y)

    return data.Dataset(name, *map(split, counts), classes)


def check_figures(figures):
    """Figures say what they are of, and in no panel do two lines of the legend look alike."""
    for name, figure in figures.items():
        assert figure.get_suptitle(), name
        for ax in figure.axes:
            drawn = [line for line in ax.get_lines() if not line.get_label().startswith("_") and len(line.get_xdata())]
            styles = [(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in drawn]
            assert len(set(map(str, styles))) == len(styles), (name, [line.get_label() for line in drawn])
            if "accuracy" in ax.get_ylabel() or ax.get_ylabel().startswith(("training loss", "test loss")):
                for band in ax.collections:
                    heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()] or [np.zeros(1)])
                    assert heights.min() >= -1e-9, name
