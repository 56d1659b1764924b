"""The training step of each study and of the residual networks, to compile without data or devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from bnjax import models, training
from bnjax.linen import BatchNorm
from bnjax.studies import cifar, perceptrons
from bnjax.training.ahead_of_time import CompileReport, compile_report, topology_devices


@dataclasses.dataclass(frozen=True)
class StepOf:
    """What is needed to compile a network's training step.

    Attributes:
      model: makes the network from its normalizer.
      optimizer: optax gradient transformation.
      objective: loss and correctness of each example.
      shape: of one input.
      batch_size: examples on each device.
      dtype: of the inputs.
      epsilon: of the batch norms.
      norm_dtype: of the batch norms' outputs; that of their inputs by default.
      preprocess: of the step, if any.
      random: whether the step takes a random key.
    """

    model: Callable[..., nn.Module]
    optimizer: optax.GradientTransformation
    objective: training.Objective
    shape: tuple[int, ...]
    batch_size: int
    dtype: Any = jnp.float32
    epsilon: float = 1e-3
    norm_dtype: Any = None
    preprocess: training.Preprocess | None = None
    random: bool = False


def _perceptron(hidden: Sequence[int], outputs: int, place: str, norm: Any) -> nn.Module:
    return models.Perceptron(hidden, outputs, norm, place)


def _residual(network: Callable[..., nn.Module], batch_size: int) -> StepOf:
    """He et al. 2016, section 3.4: 224×224 images, SGD with momentum; computed in bfloat16."""
    return StepOf(
        lambda norm: network(num_classes=1000, norm=norm, dtype=jnp.bfloat16),
        optax.sgd(0.1, momentum=0.9),
        training.cross_entropy,
        (224, 224, 3),
        batch_size,
        jnp.bfloat16,
        1e-5,
        jnp.bfloat16,
    )


STEPS: Mapping[str, StepOf] = {
    "circles": StepOf(
        functools.partial(_perceptron, (50,), 1, "after"),
        optax.sgd(0.01, momentum=0.9),
        training.binary_cross_entropy,
        (2,),
        32,
    ),
    "blobs": StepOf(
        functools.partial(_perceptron, (128,) * 11, 1, "before"),
        optax.adam(0.01),
        training.binary_cross_entropy,
        (2,),
        300,
    ),
    "mnist": StepOf(
        functools.partial(_perceptron, (64, 64), 10, "before"), optax.adam(1e-3), training.cross_entropy, (784,), 32
    ),
    "cifar": StepOf(
        lambda norm: models.CifarNetwork(100, norm, nn.relu),
        optax.rmsprop(1e-3, decay=0.9),
        training.cross_entropy,
        (32, 32, 3),
        80,
        jnp.uint8,
        preprocess=functools.partial(cifar.prepare, mean=121.0),
        random=True,
    ),
    "activations": StepOf(
        lambda norm: models.Perceptron((100, 100, 100), 10, norm, "before", nn.sigmoid),
        optax.sgd(0.1),
        training.cross_entropy,
        (784,),
        60,
        epsilon=1e-5,
    ),
    "smoothness": StepOf(
        lambda norm: models.VGG(10, norm), optax.sgd(0.1), training.cross_entropy, (32, 32, 3), 128, epsilon=1e-5
    ),
    "sensitivity": StepOf(
        lambda norm: models.Perceptron(perceptrons.DEEP, 10, norm, "before", nn.sigmoid),
        optax.adam(1e-3),
        training.cross_entropy,
        (784,),
        32,
    ),
    "recurrent": StepOf(
        lambda norm: models.RecurrentNetwork(10, 64, norm), optax.adam(1e-3), training.cross_entropy, (28, 28), 64
    ),
    "accelerating": StepOf(
        lambda norm: models.VGG(10, norm, width=8, local_response_norm=True),
        optax.sgd(0.1),
        training.cross_entropy,
        (32, 32, 3),
        128,
    ),
    "resnet18": _residual(models.resnet18, 256),
    "resnet50": _residual(models.resnet50, 128),
}


def compile_step(name: str, topology: str, *, parallel_by: str = "jit", batch_size: int | None = None) -> CompileReport:
    """Compiles the training step of a study's network with synchronized batch norm for a slice of TPU chips.

    Args:
      name: in `STEPS`.
      topology: generation and shape of the slice, such as 'v5e:2x4'.
      parallel_by: 'jit' or 'shard_map'.
      batch_size: examples on each chip; the study's by default.

    Returns:
      What the compiled program needs and does.

    Raises:
      ValueError: for an unknown name or topology.
      ImportError: where libtpu is not installed.
    """
    if name not in STEPS:
        raise ValueError(f"the step must be one of {', '.join(STEPS)}, got {name!r}.")
    mesh = training.make_mesh(devices=topology_devices(topology))
    step, arguments = abstract_step(STEPS[name], mesh, parallel_by=parallel_by, batch_size=batch_size)
    return compile_report(step, *arguments, topology=topology, name=f"{name}, {parallel_by}")


def abstract_step(of: StepOf, mesh: Mesh, *, parallel_by: str, batch_size: int | None) -> tuple[Any, tuple]:
    """The jitted step over a mesh, and shapes with shardings to lower it with."""
    norm = functools.partial(BatchNorm, epsilon=of.epsilon, axis_name=training.SYNC_AXIS, dtype=of.norm_dtype)
    model = of.model(norm)
    step = training.make_train_step(of.objective, mesh, parallel=parallel_by, preprocess=of.preprocess)
    whole, split = training.replicated(mesh), training.batch_sharding(mesh)
    float_dtype = jnp.float32 if of.dtype == jnp.uint8 else of.dtype
    create = functools.partial(training.create_train_state, model, of.optimizer)
    state = jax.eval_shape(create, jax.random.key(0), jnp.zeros((1, *of.shape), float_dtype))
    examples = (batch_size or of.batch_size) * mesh.size
    batch = training.Batch(
        jax.ShapeDtypeStruct((examples, *of.shape), of.dtype), jax.ShapeDtypeStruct((examples,), jnp.int32)
    )
    key = jax.eval_shape(lambda: jax.random.key(0)) if of.random else None
    return step.compiled, (_placed(state, whole), _placed(batch, split), _placed(key, whole))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
