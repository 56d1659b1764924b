"""A small network and data for the tests of training over devices and processes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax import training
from bnjax.linen import BatchNorm
from bnjax.studies.data import Split
from bnjax.studies.engine import training as engine
from bnjax.studies.engine.plan import Variant, seed_keys

EPOCHS, STEPS, BATCH = 3, 30, 20


class Network(nn.Module):
    """Two layers, synchronized batch norm, and noise from the examples' keys."""

    axis_index_groups: tuple | None = None

    @nn.compact
    def __call__(self, x, *, training, mask=None, keys=None):
        masked = {} if mask is None else {"mask": mask[:, None]}
        norm = BatchNorm(
            use_running_average=not training, axis_name="batch", axis_index_groups=self.axis_index_groups, momentum=0.9
        )
        return nn.Dense(3)(nn.relu(norm(nn.Dense(8, use_bias=False)(x), **masked)))


def prepare(x, keys):
    """Adds noise in training."""
    x = x.astype(jnp.float32) / 50 - 2
    return x if keys is None else x + 0.1 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


def data():
    """Bytes of which the greatest of the first three decides."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (173, 4)).astype(np.uint8)
    y = x[:, :3].argmax(1).astype(np.int32)
    return Split(x[:130], y[:130]), {"test": Split(x[130:], y[130:])}


def train(options, report, groups=None):
    """Curves of three epochs of thirty steps, batches of twenty."""
    variant = Variant("net", "net", Network(groups), optax.adam(0.02), (4,), BATCH, preprocess=prepare)
    mesh = training.make_mesh(options.group_size)
    how = {"parallel": options.parallel, "accumulate_steps": options.accumulate_steps, "preprocess": prepare}
    plan = variant.parallel_epochs(EPOCHS, STEPS, training.make_train_step(variant.objective, mesh, **how))
    seeds = {"key": seed_keys(range(options.seeds)), "seed": np.arange(options.seeds)}
    return engine.train(plan, seeds, data(), mapped=mesh, report=report, options=options)
