"""A count of what batch norm with a ReLU keeps for the backward pass, in bytes of its input: nothing is timed.

JAX gives the distinct arrays that the pullback holds. XLA gives the growth of a compiled gradient's memory with every
block of matrix product, batch norm and ReLU, of which the product keeps its input too unless that is computed anew (the
least is 1). The whole training step of ResNet-50 is in `count_tpu.py`.

    python benchmarks/count_memory.py [--json memory.json]
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
from common import device, save
from flax import linen as nn

import bnjax

SHAPE = (65536, 64)
FEW, MANY = 4, 12  # blocks

Block = Callable[[jax.Array, Any], jax.Array]
_, STATS = bnjax.init_batch_norm(SHAPE[-1])


def ours(x: jax.Array, params: Any) -> jax.Array:
    """Computes bnjax's batch norm in training, then ReLU."""
    return nn.relu(bnjax.batch_norm(x, params, STATS, training=True)[0])


def flax(x: jax.Array, params: Any) -> jax.Array:
    """Computes Flax's batch norm in training, then ReLU."""
    layer = nn.BatchNorm(use_running_average=False, dtype=x.dtype)
    return nn.relu(layer.apply({"params": params, "batch_stats": STATS}, x, mutable=["batch_stats"])[0])


# The contestants: the function called for each block, and the policy for all blocks together.
CONTESTANTS: dict[str, tuple[Block, Any]] = {
    "bnjax": (ours, None),
    "bnjax, policy save_batch_norm_inputs": (ours, bnjax.save_batch_norm_inputs),
    "flax": (flax, None),
    "flax, each in jax.checkpoint": (jax.checkpoint(flax), None),
}


def kept(block: Block, policy: Any, dtype: Any) -> float:
    """Returns the bytes of the distinct arrays that the pullback of one block holds, over the input's."""
    x = jax.random.normal(jax.random.key(0), SHAPE).astype(dtype)
    f = block if policy is None else jax.checkpoint(block, policy=policy)
    pullback = jax.jit(lambda *args: jax.vjp(f, *args)[1])(x, bnjax.init_batch_norm(SHAPE[-1])[0])
    arrays = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size}
    return sum(map(len, arrays)) / x.nbytes


def growth(block: Block, policy: Any, dtype: Any) -> float:
    """Returns the temporary bytes that each further block adds to a compiled gradient, over the input's."""
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    kernel = jax.ShapeDtypeStruct((SHAPE[-1], SHAPE[-1]), dtype)
    params = jax.eval_shape(lambda: bnjax.init_batch_norm(SHAPE[-1])[0])

    def temporary(blocks: int) -> int:
        def network(kernels, params, x):
            for of_kernel, of_norm in zip(kernels, params, strict=True):
                x = block(x @ of_kernel, of_norm)
            return x

        run = network if policy is None else jax.checkpoint(network, policy=policy)
        gradient = jax.jit(jax.grad(lambda *args: run(*args).astype(jnp.float32).var(), argnums=(0, 1)))
        return gradient.lower([kernel] * blocks, [params] * blocks, x).compile().memory_analysis().temp_size_in_bytes

    return (temporary(MANY) - temporary(FEW)) / (MANY - FEW) / (x.size * x.dtype.itemsize)


def main() -> None:
    """Prints the table; with --json it saves the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="save the numbers")
    options = parser.parse_args()
    results = [
        {"norm": name, "dtype": dtype.__name__, "kept": kept(*how, dtype), "growth": growth(*how, dtype)}
        for dtype in (jnp.float32, jnp.bfloat16)
        for name, how in CONTESTANTS.items()
    ]
    found = {"device": device(), "shape": SHAPE, "measured": results}
    print(tables.memory(found))
    save(options.json, found)


if __name__ == "__main__":
    main()
