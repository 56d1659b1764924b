"""The loss of a batch that is split over the devices of a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from bnjax.analysis._trees import LossFn


def shard_loss(loss_fn: LossFn, mesh: Mesh) -> LossFn:
    """Returns a loss whose batch is split over all devices of a mesh: the mean over devices of each device's loss.

    Each device calls `loss_fn` with its part of the batch, inside `jax.shard_map`. The caller chooses the statistics:
    batch norms with the mesh's axes as `axis_name` take global statistics, others each device's own, which is another
    function. Every measurement takes the new loss as any other; its numbers are those of one device. (Without this
    function, automatic partitioning of a sharded batch under jit gives global statistics too.)

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples: all parts weigh the same. (The losses of
        `bnjax.analysis.losses` take an `axis_name` for sample weights that sum differently on each device.)
      mesh: mesh of devices with axes of type Auto, as `bnjax.training.make_mesh` makes it.

    Returns:
      `loss(params, *args)`, where each array in `args` has a leading axis of examples that the devices divide.

    Raises:
      ValueError: when called, for examples that the devices do not divide.

    >>> from bnjax import analysis
    >>> from bnjax.training import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> loss = analysis.shard_loss(lambda w, x: (w * x).mean(), mesh)
    >>> print(analysis.gradient_probe(loss, jnp.array(1.0), 0.5, jnp.array([1.0, 3.0])).loss)
    [0.]
    """
    axes = mesh.axis_names

    def of_shard(params: Any, *args: Any) -> Array:
        return lax.pmean(loss_fn(params, *args), axes)

    def loss(params: Any, *args: Any) -> Array:
        args = jax.tree.map(jnp.asarray, args)
        for leaf in jax.tree.leaves(args):
            if leaf.ndim == 0 or leaf.shape[0] % mesh.size:
                raise ValueError(
                    f"args must be arrays whose first axis the {mesh.size} devices divide, got shape {leaf.shape}."
                )
        specs = (P(), *(P(axes) for _ in args))
        return jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=P())(params, *args)

    return loss
