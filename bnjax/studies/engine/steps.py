"""The training step of each study and of the residual networks, to compile without data or devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from bnjax import models, training
from bnjax.linen import BatchNorm
from bnjax.studies import COMPILABLE, STUDIES, data
from bnjax.studies.engine.plan import Variant
from bnjax.training.ahead_of_time import CompileReport, compile_report, topology_devices


def network_of(name: str) -> Variant:
    """Makes a study's own network, or a residual network in bfloat16 (He et al. 2016, section 3.4).

    Raises:
      ValueError: for a name that is not in `bnjax.studies.COMPILABLE`.
    """
    if name not in COMPILABLE:
        raise ValueError(f"the step must be one of {', '.join(COMPILABLE)}, got {name!r}.")
    if name in STUDIES:
        study, module = STUDIES[name], STUDIES[name].load()
        options = module.Options(**study.compiled_options)
        images = (data.blank(study.datasets[0]),) if study.datasets else ()
        return module.networks(options, *images)[study.compiled]
    network, batch_size = {"resnet18": (models.resnet18, 256), "resnet50": (models.resnet50, 128)}[name]
    norm = functools.partial(BatchNorm, dtype=jnp.bfloat16)
    model, optimizer = network(num_classes=1000, norm=norm, dtype=jnp.bfloat16), optax.sgd(0.1, momentum=0.9)
    return Variant(name, name, model, optimizer, (224, 224, 3), batch_size, input_dtype=jnp.bfloat16)


def compile_step(name: str, topology: str, *, parallel_by: str = "jit", batch_size: int | None = None) -> CompileReport:
    """Compiles the training step of a study's network with synchronized batch norm for a slice of TPU chips.

    The name is one of `bnjax.studies.COMPILABLE`, the topology generation and shape of the slice, as 'v5e:2x4'. The
    step is mapped by 'jit' or 'shard_map'; the batch size is that of each chip, by default the study's.

    Raises:
      ValueError: for an unknown name or topology.
      ImportError: where libtpu is not installed.
    """
    mesh = training.make_mesh(devices=topology_devices(topology))
    step, arguments = abstract_step(network_of(name), mesh, parallel_by=parallel_by, batch_size=batch_size)
    return compile_report(step, *arguments, topology=topology, name=f"{name}, {parallel_by}")


def abstract_step(network: Variant, mesh: Mesh, *, parallel_by: str, batch_size: int | None = None) -> tuple:
    """Returns the jitted step over a mesh, and shapes with shardings to lower it with.

    The network's batch norms are made to synchronize; the batch size is that of each device, by default the network's.
    """
    model = network.model.clone(norm=functools.partial(network.model.norm, axis_name=training.SYNC_AXIS))
    step = training.make_train_step(network.objective, mesh, parallel=parallel_by, preprocess=network.preprocess)
    whole, split = training.replicated(mesh), training.batch_sharding(mesh)
    state = jax.eval_shape(dataclasses.replace(network, model=model).create, {"key": jax.random.key(0)})
    examples = (batch_size or network.batch_size) * mesh.size
    dtype = jnp.uint8 if network.preprocess else network.input_dtype
    x = jax.ShapeDtypeStruct((examples, *network.input_shape), dtype)
    batch = training.Batch(x, jax.ShapeDtypeStruct((examples,), jnp.int32))
    key = jax.eval_shape(lambda: jax.random.key(0)) if network.preprocess else None

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    return step.compiled, (placed(state, whole), placed(batch, split), placed(key, whole))
