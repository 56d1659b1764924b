"""The classic studies of batch norm, each a module with `run(options, report)`; this list imports nothing heavy."""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run of a study may choose; None stands for the study's own default.

    Attributes:
      seeds: number of seeds, 0 to seeds − 1.
      epochs: passes over the training examples.
      dataset: name of an image set.
      data_dir: where prepared image sets are.
      batch_sizes: for a sweep.
      batch_size: examples in a step, over all devices.
      steps_per_epoch: steps after which a network is evaluated.
      steps: of training, in studies that count these.
      width: of the network.
      variants: names of those to train; all by default.
      augment: whether training images are varied at random, in studies that leave the choice.
      parallel: how a step is mapped over devices: 'jit', 'shard_map' or 'pmap'.
      group_size: devices whose batch norms synchronize; all by default.
      accumulate_steps: micro-batches in a step.
      saving: where and how often trainings are saved; not at all by default.
      histograms: whether weights and gradients are counted on the way in studies that else don't.
    """

    seeds: int
    epochs: int | None = None
    dataset: str | None = None
    data_dir: str | None = None
    batch_sizes: tuple[int, ...] | None = None
    batch_size: int | None = None
    steps_per_epoch: int | None = None
    steps: int | None = None
    width: int | None = None
    variants: tuple[str, ...] | None = None
    augment: bool = False
    parallel: str = "jit"
    group_size: int | None = None
    accumulate_steps: int = 1
    saving: Any = None  # a bnjax.studies.engine.saving.Saving
    histograms: bool = False

    def to_json(self) -> dict[str, Any]:
        """Those that change what is measured, without the defaults."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if field.name not in ("data_dir", "saving", "histograms")
            and (value := getattr(self, field.name)) != field.default
        }


@dataclasses.dataclass(frozen=True)
class Study:
    """What the command line says of a study before its module is imported.

    Attributes:
      name: on the command line.
      summary: one line.
      source: where the study comes from.
      seeds: default number of seeds.
      epochs: default numbers of epochs, as text; empty where the study counts steps.
      datasets: the image sets that it takes, its default first; none for generated data.
      distributed: whether one network is trained on several devices, so that the options for them apply.
      steps: default numbers of steps, as text.
      fast: the options of `bnjax claims --fast`; None where that leaves the study out.
      source_size: what the source trained, where the study's default on a CPU is smaller.
    """

    name: str
    summary: str
    source: str
    seeds: int
    epochs: str
    datasets: tuple[str, ...] = ()
    distributed: bool = False
    steps: str = ""
    fast: Mapping[str, Any] | None = None
    source_size: str = ""

    def load(self) -> ModuleType:
        """Imports the study's module."""
        return importlib.import_module(f"bnjax.studies.{self.name}")


STUDIES = {
    study.name: study
    for study in (
        Study(
            "circles",
            "two circles, one hidden layer: batch norm after, before the activation, on the input; other normalizers",
            "S1, circles case study (Keras)",
            32,
            "100",
            fast={"seeds": 16},
        ),
        Study(
            "blobs",
            "two blobs: a shallow and an eleven-layer network, and a look inside the layer",
            "S4, training and inference slides (Keras)",
            32,
            "50 shallow, 100 deep, 10 inside",
            fast={"seeds": 4},
        ),
        Study(
            "mnist",
            "a perceptron on MNIST or Fashion-MNIST with and without batch norm, over batch sizes; other normalizers",
            "S2, MNIST assignment (Keras)",
            8,
            "10",
            datasets=("mnist", "fashion_mnist"),
            fast={"seeds": 3, "batch_sizes": (32, 128)},
        ),
        Study(
            "sensitivity",
            "a perceptron on MNIST over learning rates, initial scales, batch sizes, regularizers and normalizers",
            "S1 to S3, statements without numbers",
            8,
            "",
            datasets=("mnist", "fashion_mnist"),
            steps="750 of 32 examples, as many examples at other batch sizes",
            fast={"seeds": 6, "steps": 90, "variants": ("deep_none", "deep_bn")},
            source_size="statements only",
        ),
        Study(
            "accelerating",
            "a narrow VGG on CIFAR-10 with and without local response normalization and photometric distortions",
            "original paper notes, 'Accelerating BN networks'",
            3,
            "",
            datasets=("cifar10", "cifar100"),
            steps="500",
            source_size="a variant of Inception on ImageNet",
        ),
        Study(
            "recurrent",
            "a recurrent network that reads MNIST row by row: statistics for each time step, shared, and none",
            "S1, circles case study; Cooijmans et al. 2016",
            16,
            "",
            datasets=("mnist", "fashion_mnist"),
            steps="1000",
            fast={"seeds": 3},
            source_size="statements only",
        ),
        Study(
            "cifar",
            "a ten-layer convolutional network on CIFAR-100 or CIFAR-10: sigmoid and ReLU, with and without batch norm",
            "S5, CIFAR-100 article (Keras)",
            3,
            "20, of 80 steps with 16 filters on CPU, of 2000 with 60 on GPU and TPU",
            datasets=("cifar100", "cifar10"),
            distributed=True,
            source_size="CIFAR-100, 20 epochs of 2000 steps, 60 filters",
        ),
        Study(
            "activations",
            "a sigmoid network on binary MNIST, its activations and gradients watched with and without batch norm",
            "S3, original paper notes; Ioffe & Szegedy 2015, section 4.1",
            4,
            "",
            datasets=("mnist", "fashion_mnist"),
            steps="10,000 on CPU, 50,000 on GPU and TPU",
            fast={"seeds": 2, "steps": 2000},
            source_size="50,000 steps",
        ),
        Study(
            "smoothness",
            "VGG and a deep linear network, plain, normalized and noisy: smoothness, covariate shift, curvature",
            "S6, Santurkar et al. 2018",
            3,
            "",
            datasets=("cifar10", "cifar100"),
            steps="500 of VGG at width 16 on CPU, 15,000 at width 64 on GPU and TPU",
            source_size="15,000 steps of VGG at width 64",
        ),
    )
}

COMPILABLE = (*STUDIES, "resnet18", "resnet50")
"""The training steps that can be compiled ahead of time."""

LOGS = ("tensorboard", "wandb")
"""Where a run can be logged."""
