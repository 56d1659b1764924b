"""Small image sets in TFDS's format, made without a network."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_SETS = {"mnist": ((28, 28, 1), "3.0.1"), "cifar10": ((32, 32, 3), "3.0.2")}


def prepare(name, directory, counts=(96, 24)):
    """A set of as many training and test images, whose brightness is their label.

    Args:
      name: 'mnist' or 'cifar10'.
      directory: where it is prepared.
      counts: of training and test images.
    """
    shape, version = _SETS[name]

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            image, label = tfds.features.Image(shape=shape), tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(n) for split, n in zip(("train", "test"), counts, strict=True)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": Image.fromarray(np.full(shape, 25 * (i % 10), np.uint8).squeeze()), "label": i % 10}

    Tiny.name = name
    Tiny(data_dir=directory).download_and_prepare(file_format="array_record")
