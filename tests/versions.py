"""What the tests expect of older versions of JAX and Flax: what these can't do is skipped, with the reason."""

import inspect

import flax
import jax
import pytest
from flax import nnx

JAX = jax.__version_info__
FLAX = tuple(int(part) for part in flax.__version__.split(".")[:2])

SHARDING = "out_sharding" if "out_sharding" in inspect.getsource(nnx.spmd) else "sharding_names"
"""How Flax calls the metadata of an nnx variable that says how it is sharded."""

List = getattr(nnx, "List", list)
"""A list of modules in an nnx module; Python's own in Flax 0.11."""

needs_jax_0_8 = pytest.mark.skipif(
    JAX < (0, 8), reason="jax 0.7's pmap serves in no step over a mesh, and sums mean and variance apart"
)
needs_flax_0_12 = pytest.mark.skipif(FLAX < (0, 12), reason="Flax 0.11's nnx layers take no promote_dtype or metadata")
