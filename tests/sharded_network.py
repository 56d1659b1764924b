"""A network whose parameters are split over a mesh, its data, and what is measured of its curvature."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bnjax import analysis

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)).astype(np.float32), (np.arange(24) % 3).astype(np.int32)
PARTS = [slice(0, 8), slice(8, 12), slice(12, 24)]
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in {"in": (5, 8), "out": (8, 3)}.items()}
SPECS = {"in": P(None, "model"), "out": P("model", None)}
KEY = 0


def outputs(params, x, y):
    z = jnp.tanh(x @ params["in"])
    z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-5)  # of the whole batch
    return z @ params["out"]


def loss(params, x, y):
    z = outputs(params, x, y)
    return (jax.nn.logsumexp(z, -1) - (z * jax.nn.one_hot(y, 3)).sum(-1)).mean()


def measured(params, batch, few=False):
    """Eigenpairs, trace, and further quantities of Hessian and Fisher matrix, of `batches` or of arrays `of`."""
    key, of, options = jax.random.key(KEY), batch.get("of", ()), {k: v for k, v in batch.items() if k != "of"}
    hessian = analysis.hessian_operator(loss, params, *of, **options)
    fisher = analysis.fisher_operator(outputs, params, *of, **options)
    pairs = analysis.eigenpairs(hessian, 3, key=key, which="both", tolerance=1e-4)
    trace = analysis.trace(hessian, key=key, num_samples=12, method="xtrace").estimate
    found = {"values": pairs.values, "vectors": pairs.vectors, "trace": trace}
    if few:
        return found
    diagonal = analysis.diagonal(hessian, key=key, num_samples=4)
    density = analysis.spectral_density(hessian, key=key, num_probes=2, num_steps=6)
    natural = fisher.inverse(damping=0.1)(jax.tree.map(jnp.ones_like, params))
    return found | {
        "diagonal": jnp.stack([jnp.square(v).sum() for v in jax.tree.leaves(diagonal.estimate)]),
        "nodes": density.nodes,
        "norm": analysis.frobenius_norm(fisher, key=key, num_samples=6).estimate,
        "natural": jnp.stack([jnp.square(v).sum() for v in jax.tree.leaves(natural)]),
    }
