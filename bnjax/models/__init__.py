"""The studies' networks in Flax linen, parametrized by their normalizer, and the layers that they are made of."""

from bnjax.models.networks import (
    VGG,
    CifarNetwork,
    Norm,
    Perceptron,
    Place,
    RecurrentNetwork,
    ResNet,
    of_example,
    resnet18,
    resnet50,
)

__all__ = [
    "VGG",
    "CifarNetwork",
    "Norm",
    "Perceptron",
    "Place",
    "RecurrentNetwork",
    "ResNet",
    "of_example",
    "resnet18",
    "resnet50",
]
