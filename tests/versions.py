"""What the tests expect of older versions of JAX and Flax: what these can't do is skipped, with the reason."""

import flax
import jax
import pytest

JAX = jax.__version_info__
FLAX = tuple(int(part) for part in flax.__version__.split(".")[:2])

PMAP_IS_SHARD_MAP = JAX >= (0, 8)
"""Since then a pmapped axis is known to be one of devices; before, its sums are those of a vmapped axis."""

needs_flax_0_12 = pytest.mark.skipif(FLAX < (0, 12), reason="Flax 0.11's nnx layers take no promote_dtype or metadata")
