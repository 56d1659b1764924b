"""bnjax: batch normalisation for JAX as a pure function, with Flax layers and the studies of why it works."""

from bnjax.moments import Moments, merge_moments, moments
from bnjax.norm import batch_norm, init_batch_norm, update_batch_stats

__version__ = "0.1.0"

__all__ = ["Moments", "batch_norm", "init_batch_norm", "merge_moments", "moments", "update_batch_stats"]
