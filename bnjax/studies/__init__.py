"""The classic studies of batch norm, each a module with `run(options, report)`; this list imports nothing heavy."""

import dataclasses
import importlib
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run of a study may choose; None stands for the study's own default.

    Attributes:
      seeds: number of seeds, 0 to seeds − 1.
      epochs: passes over the training examples.
      dataset: name of an image set.
      data_dir: where prepared image sets are.
      batch_sizes: for a sweep.
    """

    seeds: int
    epochs: int | None = None
    dataset: str | None = None
    data_dir: str | None = None
    batch_sizes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What the command line says of a study before its module is imported.

    Attributes:
      name: on the command line.
      summary: one line.
      source: where the study comes from.
      seeds: default number of seeds.
      epochs: default numbers of epochs, as text.
      image_data: whether it takes a data set of images.
    """

    name: str
    summary: str
    source: str
    seeds: int
    epochs: str
    image_data: bool = False

    def load(self) -> ModuleType:
        """Imports the study's module."""
        return importlib.import_module(f"bnjax.studies.{self.name}")


STUDIES = {
    study.name: study
    for study in (
        Study(
            "circles",
            "two circles, one hidden layer: batch norm after or before the activation, or on the input",
            "S1, circles case study (Keras)",
            32,
            "100",
        ),
        Study(
            "blobs",
            "two blobs: a shallow and an eleven-layer network, and a look inside the layer",
            "S4, training and inference slides (Keras)",
            32,
            "50 shallow, 100 deep, 10 inside",
        ),
        Study(
            "mnist",
            "a perceptron on MNIST or Fashion-MNIST with and without batch norm, over batch sizes",
            "S2, MNIST assignment (Keras)",
            8,
            "10",
            image_data=True,
        ),
    )
}
