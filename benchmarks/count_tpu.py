"""A count of passes over memory in batch norm's programs by TPU's own compiler: it needs no TPU and times nothing.

It counts passes over the input (bytes read and written in HBM, over the input's bytes), forward, both directions in one
program and backward alone, and the bytes kept for the backward pass; then of whole training steps: bytes in HBM,
memory on a chip and the compiler's lower bound of the time, of the same network with bnjax's batch norm (also folded
into the convolutions), with Flax's and with none.

    pip install -e ".[tpu]"
    python benchmarks/count_tpu.py --json tpu.json
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from common import save

SHAPE = (256, 56, 56, 128)
LARGE = (1024, 56, 56, 128)  # as much on each of four chips as SHAPE on one, whose fast memory holds a quarter of it
TOPOLOGY, SYNCED = "v5e:1x1", "v5e:2x2"
PLAIN, FOLDED, BY_POLICY = "bnjax", "bnjax, folded", "bnjax, by the policy"
STEPS = {  # which batch norms on which chips
    "cifar": {TOPOLOGY: (PLAIN, BY_POLICY, "flax", "none")},
    "resnet50": {TOPOLOGY: (FOLDED, PLAIN, BY_POLICY, "flax", "none")}
    | dict.fromkeys(("v5e:2x4", "v5e:16x16"), (FOLDED, "flax")),
}


def functions(norm: str, features: int) -> Callable:
    """Returns a function `(x, params, mask) -> (y, batch_stats)` in training."""
    from flax import linen as nn

    import bnjax

    _, stats = bnjax.init_batch_norm(features)

    def ours(x, params, mask):
        return bnjax.batch_norm(x, params, stats, training=True, mask=mask)

    def flax(x, params, mask, **options):
        layer = nn.BatchNorm(use_running_average=False, dtype=x.dtype, **options)
        y, updates = layer.apply({"params": params, "batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return {
        "bnjax": ours,
        "flax": flax,
        "flax, two-pass": lambda *arrays: flax(*arrays, use_fast_variance=False),
    }[norm]


def passes(norm: str, dtype: Any, masked: bool, topology: str, shape: tuple[int, ...] = SHAPE) -> dict[str, float]:
    """Counts the passes of one layer, on each of the chips that share the batch and its statistics."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    import bnjax
    from bnjax.training.ahead_of_time import compile_report, topology_devices

    mesh = Mesh(np.array(topology_devices(topology)).reshape(-1), ("batch",))

    def place(v):
        spec = jax.P("batch") if v.ndim and v.shape[0] == shape[0] else jax.P()
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, spec))

    def shapes(tree):
        return jax.tree.map(place, tree)

    params = shapes(jax.eval_shape(lambda: bnjax.init_batch_norm(shape[-1])[0]))
    x = shapes(jax.ShapeDtypeStruct(shape, dtype))
    mask = shapes(jax.ShapeDtypeStruct((shape[0], 1, 1, 1), jnp.bool_)) if masked else None
    f = functions(norm, shape[-1])

    def both(x, params, mask, g):
        y, vjp, stats = jax.vjp(lambda x, params: f(x, params, mask), x, params, has_aux=True)
        return y, stats, vjp(g)

    def pullback(x, params, mask):
        return jax.vjp(lambda x, params: f(x, params, mask)[0], x, params)[1]

    kept = shapes(jax.eval_shape(pullback, x, params, mask))
    unit = x.size * x.dtype.itemsize / mesh.size
    programs = {
        "forward": (jax.jit(f), (x, params, mask)),
        "both": (jax.jit(both), (x, params, mask, x)),
        "backward": (jax.jit(lambda vjp, g: vjp(g)), (kept, x)),
    }
    traffic = {n: compile_report(g, *args, topology=topology).hbm_bytes / unit for n, (g, args) in programs.items()}
    return {
        **traffic,
        "kept": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) / unit / mesh.size,
    }


def step(name: str, norm: str, topology: str = TOPOLOGY) -> dict[str, float]:
    """Measures the memory of one training step of a study's network, on each of the chips that share the batch.

    Each chip has as many examples as one alone.
    """
    from flax import linen as nn

    import bnjax
    from bnjax import linen, training
    from bnjax.studies.engine import steps
    from bnjax.training.ahead_of_time import compile_report, topology_devices

    class Nothing(nn.Module):
        """A layer that does nothing, in the place of a batch norm."""

        epsilon: float = 0.0
        axis_name: str | None = None
        dtype: Any = None
        use_running_average: bool = False
        scale_init: Any = None

        def __call__(self, x, **_):
            return x

    network = steps.network_of(name)
    layer = {"flax": nn.BatchNorm, "none": Nothing}.get(norm, linen.BatchNorm)
    given = {key: value for key, value in network.model.norm.keywords.items() if key in ("epsilon", "dtype")}
    folding = {"fold": "auto" if norm == FOLDED else False} if hasattr(network.model, "fold") else {}
    model = network.model.clone(norm=functools.partial(layer, **given), **folding)
    if norm == BY_POLICY:
        inner = model

        class Checkpointed(nn.Module):
            """The network under the policy that keeps only the batch norms' inputs for the backward pass."""

            norm: Any

            @nn.compact
            def __call__(self, x, *, training: bool, **options):
                run = nn.remat(
                    lambda network, x: network(x, training=training, **options), policy=bnjax.save_batch_norm_inputs
                )
                return run(inner.clone(norm=self.norm, parent=self), x)

        model = Checkpointed(model.norm)
    mesh = training.make_mesh(devices=topology_devices(topology))
    compiled, args = steps.abstract_step(dataclasses.replace(network, model=model), mesh, parallel_by="jit")
    report = compile_report(compiled, *args, topology=topology)
    if report.memory is None:
        raise RuntimeError(f"{name} with {norm} does not compile: {report.error}")
    return {"GiB": report.hbm_bytes / 2**30, "memory": report.memory.total / 2**30, "bound": 1000 * report.bound}


def main() -> None:
    """Prints the tables; with --json it saves them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="training steps (default %(default)s; '' for none)")
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    from bnjax.training.ahead_of_time import tpu_environment

    os.environ.update(tpu_environment())
    import jax
    import jax.numpy as jnp
    import tables

    jax.config.update("jax_platforms", "cpu")
    layers, networks = [], []
    of_one, of_four = ("bnjax", "flax", "flax, two-pass"), ("bnjax", "flax")
    for topology, shape, norms in ((TOPOLOGY, SHAPE, of_one), (SYNCED, SHAPE, of_four), (SYNCED, LARGE, of_four)):
        for dtype in (jnp.float32, jnp.bfloat16):
            for masked in (False, True):
                for norm in norms:
                    settings = {"norm": norm, "dtype": dtype.__name__, "masked": masked, "topology": topology}
                    layers.append({**settings, "shape": shape, **passes(norm, dtype, masked, topology, shape)})
    print(f"passes over the input\n\n{tables.layers_table(layers)}\n", flush=True)
    for name in filter(None, options.steps.split(",")):
        for topology, norms in STEPS[name].items():
            for norm in norms:
                networks.append({"step": name, "norm": norm, "topology": topology, **step(name, norm, topology)})
                print(networks[-1], flush=True)
    print(f"\n{tables.steps_table(networks)}")
    save(options.json, {"layers": layers, "steps": networks})


if __name__ == "__main__":
    main()
